//! Listeners on tokio.

use std::io;

use super::connection::AsyncConnection;
use super::listener::{Kind, Listener};

/// A listening socket on tokio.
#[derive(Debug)]
pub struct AsyncListener {
    inner: AsyncKind,
    /// Removes a Unix socket's path in the end.
    _listener: Listener,
}

#[derive(Debug)]
enum AsyncKind {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl AsyncListener {
    /// Hands a listener to tokio; must be called inside a runtime.
    pub fn new(listener: Listener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let inner = match &listener.0 {
            Kind::Tcp(l) => AsyncKind::Tcp(tokio::net::TcpListener::from_std(l.try_clone()?)?),
            Kind::Unix(l, _) => AsyncKind::Unix(tokio::net::UnixListener::from_std(l.try_clone()?)?),
        };
        Ok(Self { inner, _listener: listener })
    }

    /// Waits for a connection; says who it is.
    pub async fn accept(&self) -> io::Result<(AsyncConnection, String)> {
        Ok(match &self.inner {
            AsyncKind::Tcp(l) => {
                let (stream, peer) = l.accept().await?;
                (AsyncConnection::tcp(stream), peer.to_string())
            }
            AsyncKind::Unix(l) => (AsyncConnection::unix(l.accept().await?.0), "a local process".into()),
        })
    }
}
