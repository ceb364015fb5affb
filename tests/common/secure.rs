//! Connections of peers made by hand: plain, or under TLS with whatever certificate they show.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::transport::wire::{Preamble, SessionId};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use super::raw::SILENCE_MAX;

/// What shows that a connection is of its session.
pub(crate) const PROOF_LEN: usize = 32;

fn certificates(folder: &Path, name: &str) -> Vec<CertificateDer<'static>> {
    let read = std::fs::read(folder.join(name)).unwrap();
    CertificateDer::pem_slice_iter(&read).collect::<Result<_, _>>().unwrap()
}

fn key(folder: &Path, name: &str) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
}

fn authorities(folder: &Path) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(folder, "ca-cert.pem"));
    Arc::new(roots)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What a source's peer connects with: the client's certificate of a `--tls-dir`, or none.
pub(crate) fn client(folder: &Path, shows: bool) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(authorities(folder));
    Arc::new(if shows {
        let own = certificates(folder, "client-cert.pem");
        builder.with_client_auth_cert(own, key(folder, "client-key.pem")).unwrap()
    } else {
        builder.with_no_client_auth()
    })
}

/// What a destination's peer listens with: the server's certificate of a `--tls-dir`.
pub(crate) fn server(folder: &Path) -> Arc<ServerConfig> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(authorities(folder), provider()).build().unwrap();
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(folder, "server-cert.pem"), key(folder, "server-key.pem"));
    Arc::new(config.unwrap())
}

/// What a client says first, to whom it belongs no matter.
pub(crate) fn client_hello(config: &Arc<ClientConfig>) -> Vec<u8> {
    let mut tls = ClientConnection::new(config.clone(), "127.0.0.1".try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    tls.write_tls(&mut bytes).unwrap();
    bytes
}

/// A connection, whose clones may be used by other threads.
pub(crate) struct Wire {
    socket: TcpStream,
    tls: Option<Secure>,
}

/// TLS on it. Nobody holds its state while he waits for the network.
#[derive(Clone)]
struct Secure {
    state: Arc<Mutex<rustls::Connection>>,
    /// Records that the network has not taken yet. They leave in their order.
    unsent: Arc<Mutex<Vec<u8>>>,
}

impl Secure {
    /// Has the library say something, and sends what comes of it: what is not taken at once, later. Nothing is said while something is
    /// left.
    fn say<T>(
        &self,
        socket: &mut TcpStream,
        what: impl FnOnce(&mut rustls::Connection) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut unsent = self.unsent.lock().unwrap();
        drain(socket, &mut unsent)?;
        let said = {
            let mut tls = self.state.lock().unwrap();
            let said = what(&mut tls)?;
            while tls.wants_write() {
                tls.write_tls(&mut *unsent)?;
            }
            said
        };
        match drain(socket, &mut unsent) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(said),
            drained => drained.map(|()| said),
        }
    }
}

fn drain(socket: &mut TcpStream, unsent: &mut Vec<u8>) -> io::Result<()> {
    while !unsent.is_empty() {
        let taken = socket.write(unsent)?;
        unsent.drain(..taken);
    }
    Ok(())
}

impl Wire {
    pub(crate) fn plain(socket: TcpStream) -> Self {
        socket.set_read_timeout(Some(SILENCE_MAX)).unwrap();
        socket.set_nodelay(true).unwrap();
        Self { socket, tls: None }
    }

    /// Shakes hands with a destination.
    pub(crate) fn secured(socket: TcpStream, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let name = "127.0.0.1".try_into().unwrap();
        Self::shake(socket, ClientConnection::new(config.clone(), name).unwrap().into())
    }

    /// Shakes hands with a source.
    pub(crate) fn accepted(socket: TcpStream, config: &Arc<ServerConfig>) -> io::Result<Self> {
        Self::shake(socket, ServerConnection::new(config.clone()).unwrap().into())
    }

    fn shake(socket: TcpStream, mut state: rustls::Connection) -> io::Result<Self> {
        let mut wire = Self::plain(socket);
        while state.is_handshaking() {
            state.complete_io(&mut wire.socket)?;
        }
        let state = Arc::new(Mutex::new(state));
        wire.tls = Some(Secure { state, unsent: Arc::default() });
        Ok(wire)
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()?, tls: self.tls.clone() })
    }

    pub(crate) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(timeout)
    }

    /// Below TLS.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    fn exporter(&self, label: &str, context: &[u8]) -> [u8; PROOF_LEN] {
        let state = self.tls.as_ref().expect("it is under TLS").state.lock().unwrap();
        state.export_keying_material([0; PROOF_LEN], label.as_bytes(), Some(context)).unwrap()
    }

    /// The key of the session whose control connection this is.
    pub(crate) fn session_key(&self, session: &SessionId) -> [u8; PROOF_LEN] {
        self.exporter("EXPORTER-pageferry-session", session)
    }

    /// The proof that this connection is of the session with this key.
    pub(crate) fn proof(&self, key: &[u8; PROOF_LEN], preamble: &Preamble) -> [u8; PROOF_LEN] {
        let own = self.exporter("EXPORTER-pageferry-connection", &preamble.encode());
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
        ring::hmac::sign(&key, &own).as_ref().try_into().unwrap()
    }

    /// Renews the keys for what is said, and asks the other side to do the same.
    pub(crate) fn renew_keys(&mut self) -> io::Result<()> {
        let tls = self.tls.as_ref().expect("it is under TLS");
        tls.say(&mut self.socket, |tls| tls.refresh_traffic_keys().map_err(io::Error::other))
    }
}

impl Read for Wire {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(Secure { state, .. }) = &self.tls else { return self.socket.read(bytes) };
        let mut heard = vec![0; 16 << 10];
        loop {
            match state.lock().unwrap().reader().read(bytes) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
            let len = self.socket.read(&mut heard)?;
            let mut tls = state.lock().unwrap();
            let mut rest = &heard[..len];
            loop {
                tls.read_tls(&mut rest)?;
                tls.process_new_packets().map_err(io::Error::other)?;
                if rest.is_empty() {
                    break;
                }
            }
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return self.socket.write(bytes) };
        tls.say(&mut self.socket, |tls| tls.writer().write(&bytes[..bytes.len().min(16 << 10)]))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
