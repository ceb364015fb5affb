//! Sockets of a session: listening, connecting, and the options that data streams want.

mod address;
mod connect;
mod connection;
mod ends;
mod listener;
mod loopback;
mod on_tokio;

use std::io;

#[cfg(feature = "rdma")]
pub(crate) use address::find;
pub use connection::{AsyncConnection, Connection};
pub use listener::Listener;
pub use on_tokio::AsyncListener;

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

    /// Whether whoever waited asked to wait no longer.
    pub fn is_cancelled(&self) -> bool {
        crate::limit::is_cancelled(&self.source)
    }

    /// The system's error.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}
