//! TLS 1.3 for the connections of a session: both sides show certificates, and each connection proves that it is of its session.
//!
//! Handshake, records and renewal of keys are rustls's. What is here joins it to sockets: blocking ones, whose two directions are used by
//! two threads, and those on tokio.

mod blocking;
mod bound;
mod files;
mod on_tokio;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::server::ParsedCertificate;
use serde::{Deserialize, Serialize};

use rustls::{AlertDescription, CertificateError, ClientConfig, InvalidMessage, ServerConnection};

pub(super) use blocking::Records;
pub(crate) use bound::{PROOF_LEN, SessionKey};
use files::Renewed;
pub use files::{Side, TlsFiles, certificates};
pub(super) use on_tokio::{Admitted, AsyncRecords, Unprotected};

use crate::uri::Uri;

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file that cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file without what it should hold.
    #[error("{} holds no {what} in PEM: {why}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What was found.
        why: String,
    },
    /// A file whose content is no good.
    #[error("{} {what}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What of it.
        what: String,
        /// Why.
        source: rustls::Error,
    },
    /// Authorities, or revoked certificates, that are no good.
    #[error("{} cannot be used", path.display())]
    Verifier {
        /// Those of the authorities.
        path: PathBuf,
        /// Why.
        source: rustls::server::VerifierBuilderError,
    },
    /// What no certificate can be for.
    #[error("{name:?} is neither a host's name nor an address, for which a certificate could be")]
    Name {
        /// What was given.
        name: String,
    },
    /// A destination without a name: behind a Unix socket.
    #[error("the certificate's name must be said for a destination at {uri}, whose address has none")]
    NoName {
        /// Its address.
        uri: Uri,
    },
    /// Where nobody answers there is no TLS.
    #[error("TLS does not apply to {uri}, where nobody answers: encrypt what is written there")]
    OneWay {
        /// The place.
        uri: Uri,
    },
    /// Nothing encrypts pages there.
    #[error(
        "pages to {uri} go by RDMA, which encrypts nothing: TLS would protect the control connection alone, which must be allowed"
    )]
    DataPath {
        /// The address.
        uri: Uri,
    },
    /// The library refuses.
    #[error("TLS cannot be had")]
    Library(#[source] rustls::Error),
}

impl TlsError {
    fn file(path: &Path, what: &str, source: rustls::Error) -> Self {
        Self::File { path: path.into(), what: what.into(), source }
    }

    fn pem(path: &Path, what: &'static str, error: &rustls::pki_types::pem::Error) -> Self {
        let why = match error {
            rustls::pki_types::pem::Error::NoItemsFound => "there is none".into(),
            other => other.to_string(),
        };
        Self::Pem { path: path.into(), what, why }
    }
}

/// What protects a session's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Protection {
    /// Nothing.
    #[default]
    None,
    /// TLS 1.3, all of them.
    Tls,
    /// TLS 1.3 for messages; pages travel as they are, over RDMA.
    TlsWithoutPages,
}

impl Protection {
    /// Whether there is nothing.
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde asks")]
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::None
    }
}

impl std::fmt::Display for Protection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Tls => "TLS 1.3",
            Self::TlsWithoutPages => "TLS 1.3 for messages; pages are NOT encrypted",
        })
    }
}

/// How a side's connections are protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    files: TlsFiles,
    hostname: Option<String>,
    allow: Vec<String>,
    insecure_data_path: bool,
}

impl Tls {
    /// By a side's own certificate, and those of the authorities that it trusts.
    pub fn new(files: TlsFiles) -> Self {
        Self { files, hostname: None, allow: Vec::new(), insecure_data_path: false }
    }

    /// The name that a destination's certificate must be for, where that is not its address: behind a tunnel, or a Unix socket.
    #[must_use]
    pub fn hostname(mut self, name: impl Into<Option<String>>) -> Self {
        self.hostname = name.into();
        self
    }

    /// At a destination: the names of which a source's certificate must have one. Without any, every certificate that an authority has
    /// signed may send.
    #[must_use]
    pub fn allow(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.allow.extend(names);
        self
    }

    /// Lets pages travel over RDMA, which encrypts nothing, beside a control link that is protected (no).
    #[must_use]
    pub fn insecure_data_path(mut self, insecure: bool) -> Self {
        self.insecure_data_path = insecure;
        self
    }

    /// Whether a certificate could be for this: a host's name, or an address.
    pub fn is_name(name: &str) -> bool {
        files::server_name(name).is_ok()
    }

    /// What it protects of a session at `uri`.
    pub(crate) fn protection(&self, uri: &Uri) -> Protection {
        if matches!(uri, Uri::Rdma { .. }) { Protection::TlsWithoutPages } else { Protection::Tls }
    }

    /// Whether it protects what goes to `uri`.
    pub(crate) fn check(&self, uri: &Uri) -> Result<(), TlsError> {
        match uri {
            Uri::File(_) | Uri::Exec(_) | Uri::Fd(_) => Err(TlsError::OneWay { uri: uri.clone() }),
            Uri::Rdma { .. } if !self.insecure_data_path => Err(TlsError::DataPath { uri: uri.clone() }),
            Uri::Tcp { .. } | Uri::Unix(_) | Uri::Rdma { .. } => Ok(()),
        }
    }

    /// Reads the files for a session.
    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        self.files.client()
    }

    /// What connections to the destination at `uri` are made with.
    pub(crate) fn connector(&self, config: Arc<ClientConfig>, uri: &Uri) -> Result<Connector, TlsError> {
        let name = match (&self.hostname, uri) {
            (Some(name), _) => name.clone(),
            (None, Uri::Tcp { host, .. } | Uri::Rdma { host, .. }) => host.clone(),
            (None, _) => return Err(TlsError::NoName { uri: uri.clone() }),
        };
        Ok(Connector { config, name: files::server_name(&name)? })
    }

    /// Reads the files for a destination.
    pub(crate) fn acceptor(&self) -> Result<Acceptor, TlsError> {
        let allow = self.allow.iter().map(|name| files::server_name(name)).collect::<Result<_, _>>()?;
        Ok(Acceptor { config: Renewed::new(self.files.clone())?, allow })
    }
}

/// What a source's connections to one destination are protected by.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Connector {
    fn connection(&self) -> Result<rustls::Connection, rustls::Error> {
        let mut connection = rustls::ClientConnection::new(self.config.clone(), self.name.clone())?;
        connection.set_buffer_limit(None);
        Ok(connection.into())
    }
}

/// What a destination's connections are protected by.
#[derive(Debug)]
pub(crate) struct Acceptor {
    config: Renewed,
    allow: Vec<ServerName<'static>>,
}

impl Acceptor {
    fn connection(&self) -> Result<ServerConnection, rustls::Error> {
        let mut connection = ServerConnection::new(self.config.config())?;
        connection.set_buffer_limit(None);
        Ok(connection)
    }

    /// Whether the other side, whose certificate is good, may send.
    fn admit(&self, connection: &ServerConnection) -> Admitted {
        if self.allow.is_empty() {
            return Ok(());
        }
        let certificate = connection.peer_certificates().and_then(<[_]>::first);
        let parsed = certificate.and_then(|certificate| ParsedCertificate::try_from(certificate).ok());
        let is_for =
            |name| parsed.as_ref().is_some_and(|of| rustls::client::verify_server_name(of, name).is_ok());
        if self.allow.iter().any(is_for) {
            return Ok(());
        }
        let names: Vec<_> = self.allow.iter().map(ServerName::to_str).collect();
        Err(format!("its certificate is for none of the names that may send: {}", names.join(", ")))
    }
}

/// What went wrong with TLS, in words that say what to look at.
fn text_of(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(why) => format!("the other side's certificate {}", refused(why)),
        rustls::Error::AlertReceived(alert) => told(*alert),
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the other side does not speak TLS".into()
        }
        rustls::Error::NoCertificatesPresented => "the other side showed no certificate".into(),
        rustls::Error::PeerIncompatible(_) => format!("the other side speaks another TLS than 1.3: {error}"),
        rustls::Error::DecryptError => "what came was changed on its way".into(),
        other => format!("TLS failed: {other}"),
    }
}

fn refused(why: &CertificateError) -> String {
    match why {
        CertificateError::UnknownIssuer => "is not signed by an authority that this side trusts".into(),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("has expired ({why})")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("is not valid yet ({why}); are the clocks right?")
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("is for another name ({why})")
        }
        CertificateError::Revoked => "was revoked".into(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            format!("is for another purpose ({why})")
        }
        other => format!("is no good: {other}"),
    }
}

/// What the other side says of this one.
fn told(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRequired => "the other side asks for a certificate".into(),
        AlertDescription::UnknownCA => {
            "the other side does not trust the authority that signed this side's certificate".into()
        }
        AlertDescription::CertificateExpired => {
            "the other side says that this side's certificate has expired, or is not valid yet".into()
        }
        AlertDescription::CertificateRevoked => {
            "the other side says that this side's certificate was revoked".into()
        }
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => {
            format!("the other side refuses this side's certificate ({alert:?})")
        }
        AlertDescription::NoApplicationProtocol => "what answers there is no pageferry".into(),
        other => format!("the other side broke off TLS ({other:?})"),
    }
}

/// The same as an error of a connection.
fn broken(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text_of(error))
}

/// A connection that ended without a goodbye, which an attacker could have cut.
fn cut() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the connection was cut without the goodbye that TLS asks for",
    )
}
