//! Connections and listeners on tokio.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::{Connection, Listener};

/// A connection on tokio, until it is known what it is for.
#[derive(Debug)]
pub enum AsyncConnection {
    /// Over TCP.
    Tcp(tokio::net::TcpStream),
    /// Over a Unix socket.
    Unix(tokio::net::UnixStream),
}

impl AsyncConnection {
    /// Reads exactly `bytes`.
    pub async fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.read_exact(bytes).await,
            Self::Unix(stream) => stream.read_exact(bytes).await,
        }
        .map(drop)
    }

    /// Takes the socket off tokio; it stays non-blocking.
    pub fn into_connection(self) -> io::Result<Connection> {
        Ok(match self {
            Self::Tcp(stream) => Connection::Tcp(stream.into_std()?),
            Self::Unix(stream) => Connection::Unix(stream.into_std()?),
        })
    }
}

/// A listening socket on tokio.
#[derive(Debug)]
pub struct AsyncListener {
    inner: AsyncListenerKind,
    /// Removes a Unix socket's path in the end.
    _listener: Listener,
}

#[derive(Debug)]
enum AsyncListenerKind {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl AsyncListener {
    /// Hands a listener to tokio; must be called inside a runtime.
    pub fn new(listener: Listener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let inner = match &listener {
            Listener::Tcp(l) => AsyncListenerKind::Tcp(tokio::net::TcpListener::from_std(l.try_clone()?)?),
            Listener::Unix(l, _) => {
                AsyncListenerKind::Unix(tokio::net::UnixListener::from_std(l.try_clone()?)?)
            }
        };
        Ok(Self { inner, _listener: listener })
    }

    /// Waits for a connection; says who it is.
    pub async fn accept(&self) -> io::Result<(AsyncConnection, String)> {
        Ok(match &self.inner {
            AsyncListenerKind::Tcp(l) => {
                let (stream, peer) = l.accept().await?;
                (AsyncConnection::Tcp(stream), peer.to_string())
            }
            AsyncListenerKind::Unix(l) => {
                (AsyncConnection::Unix(l.accept().await?.0), "a local process".into())
            }
        })
    }
}

/// A socket of either family.
pub(crate) trait AsyncSocket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> AsyncSocket for T {}

/// Hands a connection to tokio; must be called inside a runtime.
pub(crate) fn into_async(connection: Connection) -> io::Result<Box<dyn AsyncSocket>> {
    connection.set_nonblocking(true)?;
    Ok(match connection {
        Connection::Tcp(stream) => Box::new(tokio::net::TcpStream::from_std(stream)?),
        Connection::Unix(stream) => Box::new(tokio::net::UnixStream::from_std(stream)?),
    })
}
