//! Sockets of a session: listening, connecting, and the options that data streams want.

mod address;
mod connect;
mod connection;
mod ends;
mod listener;
mod loopback;
mod on_tokio;
mod private;
mod tls;

use std::io;

#[cfg(feature = "rdma")]
pub(crate) use address::find;
pub(crate) use connection::Unfit;
pub use connection::{AsyncConnection, Connection};
pub use listener::Listener;
pub use on_tokio::AsyncListener;
pub use private::{AsyncPrivateListener, Caller, PrivateListener};
pub(crate) use tls::{Acceptor, Connector, PROOF_LEN, SessionKey};
pub use tls::{Protection, Side, Tls, TlsError, TlsFiles, certificates};

use crate::uri::Uri;

/// A socket operation that failed, with the address and what can be done.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct SocketError {
    what: String,
    #[source]
    source: io::Error,
}

impl SocketError {
    pub(crate) fn new(what: String, source: io::Error) -> Self {
        Self { what, source }
    }

    /// Of a place where nobody answers, to which no socket leads; `what` was to be done with it.
    pub(crate) fn one_way(what: &str, uri: &Uri) -> Self {
        let why = "a stream with nobody who answers is saved and loaded, never connected to";
        Self::new(format!("cannot {what} {uri}"), io::Error::new(io::ErrorKind::Unsupported, why))
    }

    /// Whether whoever waited asked to wait no longer.
    pub fn is_cancelled(&self) -> bool {
        crate::limit::is_cancelled(&self.source)
    }

    /// Whether the connection was closed before anything was said.
    pub(crate) fn is_unanswered(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        matches!(self.source.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
    }

    /// The system's error.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}
