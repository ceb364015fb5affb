//! Whoever has a good certificate and wants into somebody else's session. He speaks the protocol by hand, as docs/protocol.md has it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use pageferry::transport::wire::control::{ErrorCode, Message};
use pageferry::transport::wire::{Preamble, Role};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::common::raw::{SESSION, SILENCE_MAX, assert_refused, hello, next_message, preamble};
use crate::common::{Image, Job, MIB, turn};
use crate::lab::{Authority, Keys, Wanted, assert_serves, recv};

/// A connection under TLS.
struct Peer(StreamOwned<ClientConnection, TcpStream>);

impl Peer {
    /// With the client's certificate in this folder, or none.
    fn connect(port: u16, keys: &Keys, shows: bool) -> Self {
        let mut roots = RootCertStore::empty();
        let read = |name: &str| std::fs::read(keys.file(name)).unwrap();
        let certificates =
            |name: &str| CertificateDer::pem_slice_iter(&read(name)).collect::<Result<Vec<_>, _>>().unwrap();
        roots.add_parsable_certificates(certificates("ca-cert.pem"));
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let config = if shows {
            let key = PrivateKeyDer::from_pem_slice(&read("client-key.pem")).unwrap();
            builder.with_client_auth_cert(certificates("client-cert.pem"), key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        let name = "127.0.0.1".try_into().unwrap();
        let tls = ClientConnection::new(Arc::new(config), name).unwrap();
        let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
        socket.set_read_timeout(Some(SILENCE_MAX)).unwrap();
        let mut stream = StreamOwned::new(tls, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).unwrap();
        }
        Self(stream)
    }

    fn exporter(&self, label: &str, context: &[u8]) -> [u8; 32] {
        self.0.conn.export_keying_material([0; 32], label.as_bytes(), Some(context)).unwrap()
    }

    /// The proof that this connection is of the session with this key.
    fn proof(&self, key: &[u8; 32], preamble: &Preamble) -> [u8; 32] {
        let own = self.exporter("EXPORTER-pageferry-connection", &preamble.encode());
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
        ring::hmac::sign(&key, &own).as_ref().try_into().unwrap()
    }

    fn write(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes).and_then(|()| self.0.flush());
    }

    fn receive(&mut self) -> Option<Message> {
        next_message(&mut self.0)
    }

    #[track_caller]
    fn expect_refusal(&mut self, code: ErrorCode, words: &str) {
        assert_refused(self.receive(), code, words);
    }
}

#[test]
fn a_certificate_alone_lets_nobody_into_a_session() {
    let _turn = turn();
    let authority = Authority::new("the authority");
    let keys = Keys::trusting(&authority).with("server", &authority, &Wanted::good(), "");
    let keys = keys.with("client", &authority, &Wanted::good(), "");
    let others = Keys::trusting(&authority).with("client", &authority, &Wanted::good(), "");
    let job = Job::new(Image::Mixed, MIB);
    let listening = recv(&job, &keys, &[]);
    let port = listening.port();
    let mut control = Peer::connect(port, &keys, true);
    control.write(&preamble(Role::Control, 0).encode());
    control.write(&Message::Hello(hello(MIB as u64)).encode());
    assert!(matches!(control.receive(), Some(Message::Welcome(_))));
    assert_eq!(control.receive(), Some(Message::Prepared));
    let key = control.exporter("EXPORTER-pageferry-session", &SESSION);
    // Who knows the session's id, which never leaves the two, and has a good certificate.
    for role in [Role::Stream, Role::Query, Role::Resume, Role::Postcopy] {
        let said = preamble(role, 0);
        let mut thief = Peer::connect(port, &others, true);
        // By a key of his own, one that he made up, or the right proof of another connection.
        let another = Peer::connect(port, &keys, true).proof(&key, &said);
        let own = thief.exporter("EXPORTER-pageferry-session", &SESSION);
        let own = thief.proof(&own, &said);
        for proof in [own, [0; 32], another] {
            thief.write(&said.encode());
            thief.write(&proof);
            thief.expect_refusal(ErrorCode::UnknownSession, "does not show that it belongs to the session");
            assert_eq!(thief.receive(), None, "the connection is closed");
            thief = Peer::connect(port, &others, true);
        }
    }
    // The session's own get in, once for each proof.
    let said = preamble(Role::Stream, 0);
    let mut stream = Peer::connect(port, &keys, true);
    let proof = stream.proof(&key, &said);
    stream.write(&said.encode());
    stream.write(&proof);
    assert_eq!(stream.receive(), Some(Message::Attached { stream: 0 }));
    let mut replayed = Peer::connect(port, &others, true);
    replayed.write(&said.encode());
    replayed.write(&proof);
    replayed.expect_refusal(ErrorCode::UnknownSession, "does not show that it belongs to the session");
}

#[test]
fn whoever_shows_no_certificate_is_shown_out() {
    let _turn = turn();
    let keys = Keys::good();
    let job = Job::new(Image::Mixed, MIB);
    let mut listening = recv(&job, &keys, &[]);
    let mut peer = Peer::connect(listening.port(), &keys, false);
    peer.write(&preamble(Role::Control, 0).encode());
    let mut byte = [0];
    let error = peer.0.read(&mut byte).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    listening.ferry.wait_stderr("the other side showed no certificate");
    assert_serves(&job, listening, &keys);
}

/// Whoever begins to shake hands, and does not go on, costs nobody else anything.
#[test]
fn handshakes_that_stand_still_keep_nobody_out() {
    let _turn = turn();
    let keys = Keys::good();
    let job = Job::new(Image::Mixed, MIB);
    let listening = recv(&job, &keys, &[]);
    let connect = || TcpStream::connect(("127.0.0.1", listening.port())).unwrap();
    let mut half: Vec<TcpStream> = (0..200).map(|_| connect()).collect();
    for (at, socket) in half.iter_mut().enumerate() {
        // The beginning of a record of a handshake, of a record that is too long, of a preamble, of nothing known; or a byte of each.
        let begun: [&[u8]; 4] =
            [&[22, 3, 1, 2, 0, 1, 0, 1], &[22, 3, 3, 0xff, 0xff], b"\x8fPGF", b"GET / HT"];
        let bytes = begun[at % 4];
        let _ = socket.write_all(if at < 100 { bytes } else { &bytes[..1] });
    }
    crate::common::send(&listening.uri, &job.from, &["--tls-dir", keys.text(), "--streams", "4"])
        .wait()
        .code(0);
    listening.ferry.wait().code(0);
    job.assert_arrived();
    drop(half);
}
