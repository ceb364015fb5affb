//! The files of a side's certificate and key, and what is made of them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::TlsError;

/// What both sides call their protocol, so that nothing made for another one is taken for it.
const ALPN: &[u8] = b"pageferry";
/// Longest file that is read: hundreds of certificates.
const FILE_MAX: u64 = 1 << 20;

/// Certificates and a key, as files in PEM. They are read anew for every session, so that they can be renewed while a program runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that the other side's must be signed by.
    pub ca: PathBuf,
    /// This side's certificate, and those between it and an authority.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Certificates that are not good any more; a file that is not there has none.
    pub crl: Option<PathBuf>,
}

/// Which end of a connection a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Connects: a source.
    Client,
    /// Listens: a destination.
    Server,
}

impl TlsFiles {
    /// Those of a folder, by the names that QEMU and Cloud Hypervisor know them by: `ca-cert.pem`, `server-cert.pem` and
    /// `server-key.pem`, or `client-cert.pem` and `client-key.pem`; and `ca-crl.pem` where there is one.
    pub fn of_folder(folder: &Path, side: Side) -> Self {
        let name = match side {
            Side::Client => "client",
            Side::Server => "server",
        };
        Self {
            ca: folder.join("ca-cert.pem"),
            cert: folder.join(format!("{name}-cert.pem")),
            key: folder.join(format!("{name}-key.pem")),
            crl: Some(folder.join("ca-crl.pem")),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Path> {
        [&self.ca, &self.cert, &self.key].into_iter().chain(&self.crl).map(PathBuf::as_path)
    }

    /// What the files are now: another once one was replaced.
    fn stamp(&self) -> Vec<Option<Stamp>> {
        self.all().map(|path| Stamp::of(path).ok()).collect()
    }

    fn read(&self) -> Result<Read, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(&self.ca)? {
            roots
                .add(authority)
                .map_err(|e| TlsError::file(&self.ca, "holds a certificate that is none", e))?;
        }
        let chain = certificates(&self.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&bytes_of(&self.key)?);
        let key = key.map_err(|e| TlsError::pem(&self.key, "private key", &e))?;
        let crls = self.crl.as_deref().map_or(Ok(Vec::new()), revoked)?;
        Ok(Read { roots: Arc::new(roots), chain, key, crls })
    }

    /// What a source connects with.
    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let read = self.read()?;
        let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(read.roots, provider())
            .with_crls(read.crls)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|source| TlsError::Verifier { path: self.ca.clone(), source })?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Library)?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(read.chain, read.key)
            .map_err(|e| self.mismatched(e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A session of one connection says nothing about the next one's.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// What a destination listens with.
    pub(super) fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let read = self.read()?;
        let verifier = WebPkiClientVerifier::builder_with_provider(read.roots, provider())
            .with_crls(read.crls)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|source| TlsError::Verifier { path: self.ca.clone(), source })?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Library)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(read.chain, read.key)
            .map_err(|e| self.mismatched(e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn mismatched(&self, error: rustls::Error) -> TlsError {
        let what = format!("and {} do not go together", self.key.display());
        TlsError::file(&self.cert, &what, error)
    }
}

/// What the files hold.
struct Read {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    crls: Vec<CertificateRevocationListDer<'static>>,
}

/// The certificates of a file in PEM, of which there is at least one, in DER.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes_of(path)?).collect();
    match found {
        Ok(found) if found.is_empty() => Err(TlsError::pem(path, "certificate", &pem::Error::NoItemsFound)),
        Ok(found) => Ok(found),
        Err(e) => Err(TlsError::pem(path, "certificate", &e)),
    }
}

/// Lists of certificates that are revoked, of a file in PEM, or none where there is no file.
fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    match bytes_of(path) {
        Err(TlsError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Vec::new())
        }
        bytes => CertificateRevocationListDer::pem_slice_iter(&bytes?)
            .collect::<Result<_, _>>()
            .map_err(|e| TlsError::pem(path, "list of revoked certificates", &e)),
    }
}

fn bytes_of(path: &Path) -> Result<Vec<u8>, TlsError> {
    let read = || {
        let mut file = std::fs::File::open(path)?;
        if file.metadata()?.len() > FILE_MAX {
            return Err(io::Error::other(format!("it is longer than {FILE_MAX} bytes")));
        }
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&mut file, FILE_MAX), &mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|source| TlsError::Unreadable { path: path.into(), source })
}

/// All of the library's cipher suites and groups for TLS 1.3.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Tells a file from the one that was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    changed: SystemTime,
    len: u64,
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let file = std::fs::metadata(path)?;
        let inode = std::os::unix::fs::MetadataExt::ino(&file);
        Ok(Self { changed: file.modified()?, len: file.len(), inode })
    }
}

/// What a destination listens with, made anew when its files were replaced.
#[derive(Debug)]
pub(super) struct Renewed {
    files: TlsFiles,
    now: Mutex<(Vec<Option<Stamp>>, Arc<ServerConfig>)>,
}

impl Renewed {
    pub(super) fn new(files: TlsFiles) -> Result<Self, TlsError> {
        let stamp = files.stamp();
        let config = files.server()?;
        Ok(Self { files, now: Mutex::new((stamp, config)) })
    }

    /// What holds now. Files that are being replaced, and do not go together yet, are looked at again by the next connection.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let mut now = self.now.lock().unwrap_or_else(|e| e.into_inner());
        let stamp = self.files.stamp();
        if stamp != now.0 {
            match self.files.server() {
                Ok(config) => *now = (stamp, config),
                Err(error) => {
                    let why =
                        std::error::Error::source(&error).map_or_else(String::new, |why| format!(": {why}"));
                    tracing::warn!("certificates that were replaced are not used yet: {error}{why}");
                }
            }
        }
        now.1.clone()
    }
}

/// The name that a certificate must be for.
pub(super) fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    // An interface is no part of an address that a certificate could be for.
    let name = name.split('%').next().unwrap_or(name);
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name { name: name.to_owned() })
}
