//! Two ends over a socket pair, with certificates made for the occasion.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams, SerialNumber,
};
use rustls::crypto::CipherSuiteCommon;
use rustls::{CipherSuite, ClientConfig, SupportedCipherSuite, Tls13CipherSuite};
use tempfile::TempDir;
use testkit::Rng;

use super::*;
use crate::limit::Limit;
use crate::socket::connection::{AsyncConnection, Connection, Unfit};
use crate::sys::{ReceiveList, SendList};
use crate::wire::{Preamble, Role};

const NAME: &str = "node7.lab";
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with an authority, and certificates of both sides.
struct Lab {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Lab {
    fn new() -> Self {
        let (folder, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = params.self_signed(&key).unwrap();
        fs::write(folder.path().join("ca-cert.pem"), authority.pem()).unwrap();
        let lab = Self { folder, issuer: Issuer::new(params, key) };
        lab.write("server", NAME);
        lab.write("client", NAME);
        lab
    }

    /// Certificate and key of a side.
    fn write(&self, side: &str, name: &str) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.serial_number = Some(serial(side));
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let file = |what: &str| self.folder.path().join(format!("{side}-{what}.pem"));
        fs::write(file("cert"), certificate.pem()).unwrap();
        fs::write(file("key"), key.serialize_pem()).unwrap();
    }

    /// Says that the certificates of these sides are not good any more.
    fn revoke(&self, sides: &[&str]) {
        let (now, day) = (std::time::SystemTime::now(), Duration::from_secs(86_400));
        let revoked = |side: &&str| RevokedCertParams {
            serial_number: serial(side),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: (now - day).into(),
            next_update: (now + day).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: sides.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer).unwrap();
        fs::write(self.folder.path().join("ca-crl.pem"), list.pem().unwrap()).unwrap();
    }

    fn tls(&self, side: Side) -> Tls {
        Tls::new(TlsFiles::of_folder(self.folder.path(), side))
    }

    fn connector(&self) -> Connector {
        let tls = self.tls(Side::Client).hostname(NAME.to_owned());
        tls.connector(tls.config().unwrap(), &"unix:/x".parse().unwrap()).unwrap()
    }

    fn acceptor(&self) -> Acceptor {
        self.tls(Side::Server).acceptor().unwrap()
    }

    /// Both ends, blocking.
    fn pair(&self) -> (Connection, Connection) {
        let (client, server) = UnixStream::pair().unwrap();
        shake(&self.connector(), client, &self.acceptor(), server).unwrap()
    }
}

/// Of a side's certificate.
fn serial(side: &str) -> SerialNumber {
    SerialNumber::from(side.as_bytes().to_vec())
}

/// Both sides of a handshake; why the client's failed, or the server's.
fn shake(
    connector: &Connector,
    client: UnixStream,
    acceptor: &Acceptor,
    server: UnixStream,
) -> Result<(Connection, Connection), io::Error> {
    let mut client = Connection::unix(client);
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| accept(acceptor, server));
        let connected = client.protect(connector, Limit::new(PATIENCE, &|| false));
        let accepted = accepting.join().unwrap();
        connected?;
        Ok((client, accepted?))
    })
}

fn accept(acceptor: &Acceptor, server: UnixStream) -> io::Result<Connection> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = runtime.block_on(async {
        server.set_nonblocking(true).unwrap();
        let server = AsyncConnection::unix(tokio::net::UnixStream::from_std(server).unwrap());
        match server.protect(acceptor).await {
            Ok((server, _)) => server.into_connection(),
            Err(Unfit::Failed(_, error)) => Err(error),
            Err(_) => Err(io::Error::other("plain")),
        }
    })?;
    server.set_nonblocking(false)?;
    Ok(server)
}

/// Sends all of it in pieces of odd lengths, and says goodbye.
fn send(connection: &Connection, bytes: &[u8], meanwhile: impl Fn(usize)) {
    for (at, piece) in bytes.chunks(150_001).enumerate() {
        meanwhile(at);
        let mut list = SendList::new();
        let (head, tail) = piece.split_at(piece.len() / 3);
        list.push(head);
        list.push(tail);
        while !list.is_empty() {
            connection.send(&mut list).unwrap();
        }
    }
    connection.shutdown_write();
}

fn receive(connection: &Connection) -> Vec<u8> {
    let mut all = Vec::new();
    let (mut one, mut other) = (vec![0; 70_001], vec![0; 3]);
    loop {
        let mut list = ReceiveList::new();
        list.push(&mut one);
        list.push(&mut other);
        match connection.receive(&mut list, true).unwrap() {
            0 => return all,
            len => {
                let first = len.min(one.len());
                all.extend_from_slice(&one[..first]);
                all.extend_from_slice(&other[..len - first]);
            }
        }
    }
}

/// Both directions at once, each by its own two threads.
fn exchange(client: &Connection, server: &Connection, meanwhile: impl Fn(&Connection, usize) + Sync) {
    let (there, back) = (Rng::new(1).bytes(24 << 20), Rng::new(2).bytes(16 << 20));
    std::thread::scope(|scope| {
        scope.spawn(|| send(client, &there, |at| meanwhile(client, at)));
        scope.spawn(|| send(server, &back, |at| meanwhile(server, at)));
        let come = scope.spawn(|| receive(server));
        assert!(receive(client) == back);
        assert!(come.join().unwrap() == there);
    });
}

#[test]
fn bytes_go_both_ways_at_once() {
    let (client, server) = Lab::new().pair();
    exchange(&client, &server, |_, _| {});
}

#[test]
fn keys_are_renewed_while_bytes_go() {
    let (client, server) = Lab::new().pair();
    exchange(&client, &server, |connection, at| {
        if at % 7 == 3 {
            connection.renew_keys();
        }
    });
}

/// The library renews them by itself before they have encrypted too much: here after 200 records, of which there are over a thousand.
#[test]
fn keys_that_have_encrypted_enough_are_renewed_by_themselves() {
    const LIMIT: u64 = 200;
    let lab = Lab::new();
    let mut provider = rustls::crypto::ring::default_provider();
    for suite in &mut provider.cipher_suites {
        let SupportedCipherSuite::Tls13(real) = suite;
        let common = CipherSuiteCommon { confidentiality_limit: LIMIT, ..real.common };
        *suite = SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite { common, ..**real })));
    }
    let tls = lab.tls(Side::Client);
    let real = tls.config().unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates({
            let mut roots = rustls::RootCertStore::empty();
            roots.add_parsable_certificates(certificates(&lab.folder.path().join("ca-cert.pem")).unwrap());
            roots
        })
        .with_client_cert_resolver(real.client_auth_cert_resolver.clone());
    config.alpn_protocols.clone_from(&real.alpn_protocols);
    config.enable_secret_extraction = true;
    let connector = Connector { config: Arc::new(config), name: files::server_name(NAME).unwrap() };
    let (client, server) = UnixStream::pair().unwrap();
    let (client, server) = shake(&connector, client, &lab.acceptor(), server).unwrap();
    let bytes = Rng::new(3).bytes(32 << 20);
    assert!(bytes.len() as u64 > 10 * LIMIT * (16 << 10) / 2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for piece in bytes.chunks(100_000) {
                (&client).write_all(piece).unwrap();
            }
        });
        let mut come = vec![0; bytes.len()];
        (&server).read_exact(&mut come).unwrap();
        assert!(come == bytes);
    });
    let tls = client.into_records().unwrap().into_tls().unwrap();
    assert!(matches!(
        tls.negotiated_cipher_suite().unwrap().suite(),
        CipherSuite::TLS13_AES_256_GCM_SHA384 | CipherSuite::TLS13_AES_128_GCM_SHA256
    ));
    let (records, _) = tls.dangerous_extract_secrets().unwrap().tx;
    assert!(records <= LIMIT, "{records} records by one key");
}

#[test]
fn an_orderly_end_and_a_cut_are_told_apart() {
    let lab = Lab::new();
    let (client, server) = lab.pair();
    client.shutdown_write();
    assert_eq!((&server).read(&mut [0]).unwrap(), 0);
    // The other direction is open.
    (&server).write_all(b"still here").unwrap();
    server.shutdown_write();
    assert_eq!(receive(&client), b"still here");

    let (client, server) = UnixStream::pair().unwrap();
    let raw = client.try_clone().unwrap();
    let (client, server) = shake(&lab.connector(), client, &lab.acceptor(), server).unwrap();
    (&client).write_all(b"half a ").unwrap();
    raw.shutdown(Shutdown::Write).unwrap();
    let mut come = [0; 7];
    (&server).read_exact(&mut come).unwrap();
    let error = (&server).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(error.to_string().contains("without the goodbye"), "{error}");
}

/// On tokio as well.
#[test]
fn links_tell_an_orderly_end_from_a_cut_too() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let lab = Lab::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bytes = Rng::new(4).bytes(1 << 20);
    for orderly in [true, false] {
        let (client, server) = lab.pair();
        let said = bytes.clone();
        let come = runtime.block_on(async {
            let (mut client, mut server) = (client.into_async().unwrap(), server.into_async().unwrap());
            let saying = tokio::spawn(async move {
                client.write_all(&said).await.unwrap();
                if orderly {
                    client.shutdown().await.unwrap();
                }
            });
            let mut come = Vec::new();
            let end = server.read_to_end(&mut come).await;
            saying.await.unwrap();
            end.map(|_| come)
        });
        match come {
            Ok(come) => assert!(orderly && come == bytes),
            Err(error) => assert!(!orderly && error.to_string().contains("without the goodbye"), "{error}"),
        }
    }
}

#[test]
fn what_was_changed_on_its_way_is_an_error() {
    let lab = Lab::new();
    let ((client, theirs), (ours, server)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let flip = Arc::new(std::sync::atomic::AtomicBool::new(false));
    for (mut from, mut to, flips) in
        [(theirs.try_clone().unwrap(), ours.try_clone().unwrap(), Some(flip.clone())), (ours, theirs, None)]
    {
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut bytes) {
                if flips.as_ref().is_some_and(|flip| flip.load(std::sync::atomic::Ordering::Relaxed)) {
                    bytes[len / 2] ^= 1;
                }
                if to.write_all(&bytes[..len]).is_err() {
                    return;
                }
            }
        });
    }
    let (client, server) = shake(&lab.connector(), client, &lab.acceptor(), server).unwrap();
    (&client).write_all(b"right").unwrap();
    let mut come = [0; 5];
    (&server).read_exact(&mut come).unwrap();
    flip.store(true, std::sync::atomic::Ordering::Relaxed);
    (&client).write_all(&[7; 1000]).unwrap();
    let error = (&server).read(&mut [0; 1000]).unwrap_err();
    assert!(error.to_string().contains("changed on its way"), "{error}");
}

#[test]
fn waits_end_when_they_should() {
    let (client, server) = Lab::new().pair();
    let mut byte = [0];
    let mut list = ReceiveList::new();
    list.push(&mut byte);
    let error = client.receive(&mut list, false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    let timeout = Duration::from_millis(50);
    client.set_timeouts(Some(timeout), Some(timeout)).unwrap();
    assert_eq!((&client).read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // Nobody reads what is sent: it waits no longer than that once there is no room, and no lock is held meanwhile.
    let begun = Instant::now();
    let error = loop {
        match (&client).write_all(&[0; 100_000]) {
            Ok(()) => assert!(begun.elapsed() < PATIENCE),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    // A thread that waits for ever for room keeps nobody from reading.
    client.set_timeouts(None, None).unwrap();
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| (&client).write_all(&[0; 1 << 20]));
        (&server).write_all(b"word").unwrap();
        let mut come = [0; 4];
        (&client).read_exact(&mut come).unwrap();
        assert_eq!(&come, b"word");
        server.shutdown();
        assert!(sending.join().unwrap().is_err(), "a peer that is gone takes nothing");
    });
}

fn preamble(stream: u16) -> Preamble {
    Preamble { version_min: 1, version_max: 1, role: Role::Stream, stream, session: [7; 16] }
}

#[test]
fn a_proof_is_of_one_connection_of_one_session() {
    let lab = Lab::new();
    let keys = |(client, server): &(Connection, Connection), session: [u8; 16]| {
        let key = |of: &Connection| of.session_key(&session).unwrap().unwrap();
        (key(client), key(server))
    };
    let (control, other, stream, another) = (lab.pair(), lab.pair(), lab.pair(), lab.pair());
    let (ours, theirs) = keys(&control, [7; 16]);
    let proof = stream.0.prove(&ours, &preamble(3)).unwrap();
    assert!(stream.1.check(&theirs, &preamble(3), &proof));
    // Of another stream; with a byte changed; on another connection; by the key of another session, or of another control connection.
    assert!(!stream.1.check(&theirs, &preamble(4), &proof));
    let mut changed = proof;
    changed[31] ^= 1;
    assert!(!stream.1.check(&theirs, &preamble(3), &changed));
    assert!(!another.1.check(&theirs, &preamble(3), &proof));
    assert!(!stream.1.check(&keys(&control, [8; 16]).1, &preamble(3), &proof));
    assert!(!stream.1.check(&keys(&other, [7; 16]).1, &preamble(3), &proof));
    // A connection without TLS proves nothing.
    let plain = Connection::unix(UnixStream::pair().unwrap().0);
    assert!(plain.session_key(&[7; 16]).unwrap().is_none());
    assert!(plain.prove(&ours, &preamble(3)).is_err());
    assert!(!plain.check(&theirs, &preamble(3), &proof));
}

#[test]
fn certificates_that_are_replaced_are_used_from_then_on() {
    let lab = Lab::new();
    let acceptor = lab.acceptor();
    let shaken = |lab: &Lab| {
        let (client, server) = UnixStream::pair().unwrap();
        shake(&lab.connector(), client, &acceptor, server).map(drop)
    };
    shaken(&lab).unwrap();
    lab.write("server", "node8.lab");
    let error = shaken(&lab).unwrap_err();
    assert!(error.to_string().contains("is for another name"), "{error}");
    // Half of a renewal is not used.
    fs::write(lab.folder.path().join("server-key.pem"), "not yet").unwrap();
    assert!(shaken(&lab).unwrap_err().to_string().contains("is for another name"));
    lab.write("server", NAME);
    shaken(&lab).unwrap();
}

/// A list that comes when a destination listens already counts from then on, as does one that says something else.
#[test]
fn certificates_that_are_revoked_are_refused_from_then_on() {
    let lab = Lab::new();
    let acceptor = lab.acceptor();
    let shaken = || {
        let (client, server) = UnixStream::pair().unwrap();
        let (client, server) = shake(&lab.connector(), client, &acceptor, server)?;
        // What the destination thinks of a source is heard with its first word.
        (&server).write_all(b"x")?;
        (&client).read_exact(&mut [0])
    };
    shaken().unwrap();
    lab.revoke(&["server"]);
    let error = shaken().unwrap_err().to_string();
    assert!(error.contains("the other side's certificate was revoked"), "{error}");
    lab.revoke(&["client", "somebody"]);
    let error = shaken().unwrap_err().to_string();
    assert!(error.contains("was revoked"), "{error}");
    lab.revoke(&["somebody"]);
    shaken().unwrap();
    fs::write(
        lab.folder.path().join("ca-crl.pem"),
        "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
    )
    .unwrap();
    let text = crate::engine::explain(&lab.tls(Side::Client).config().unwrap_err());
    assert!(text.contains("ca-c"), "{text}");
}

#[test]
fn files_that_are_no_good_are_named() {
    let lab = Lab::new();
    let path = |name: &str| lab.folder.path().join(name);
    let said = |error: TlsError| crate::engine::explain(&error);
    fs::write(path("client-key.pem"), "-----BEGIN NONSENSE").unwrap();
    let text = said(lab.tls(Side::Client).config().unwrap_err());
    assert!(text.contains("client-key.pem") && text.contains("private key"), "{text}");
    lab.write("other", NAME);
    fs::copy(path("other-key.pem"), path("client-key.pem")).unwrap();
    let text = said(lab.tls(Side::Client).config().unwrap_err());
    assert!(text.contains("client-cert.pem") && text.contains("do not go together"), "{text}");
    fs::remove_file(path("ca-cert.pem")).unwrap();
    let text = said(lab.tls(Side::Server).acceptor().unwrap_err());
    assert!(text.contains("cannot read") && text.contains("ca-cert.pem"), "{text}");
    let tls = Lab::new().tls(Side::Client);
    let config = Lab::new().tls(Side::Client).config().unwrap();
    let text = said(tls.connector(config, &"unix:/x".parse().unwrap()).unwrap_err());
    assert!(text.contains("name must be said"), "{text}");
}

/// A socket of whoever never reads or writes costs a handshake no more than its time.
#[test]
fn a_handshake_ends_when_it_is_cancelled_or_too_long() {
    let lab = Lab::new();
    let (client, _silent) = UnixStream::pair().unwrap();
    let mut client = Connection::unix(client);
    let error =
        client.protect(&lab.connector(), Limit::new(Duration::from_millis(120), &|| false)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let asked = std::cell::Cell::new(0);
    let soon = || {
        asked.set(asked.get() + 1);
        asked.get() > 3
    };
    let error = client.protect(&lab.connector(), Limit::new(PATIENCE, &soon)).unwrap_err();
    assert!(crate::limit::is_cancelled(&error), "{error}");
}
