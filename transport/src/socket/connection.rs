//! A connection that owns its bytes: what is sent and received goes through here, and nobody else reaches its descriptor.
//!
//! So a stream that encrypts, or a carrier of another kind, may take a socket's place one day without anybody passing it by. Plain
//! sockets have their fast paths here: gathered and scattered bytes, straight from and into memory, and what comes from a pipe.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::pipe::{SpliceFlags, splice};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vm_memory::volatile_memory::VolatileSlice;

use super::loopback::tune_for_loopback;
use crate::sys::{ReceiveList, SendList};

/// A connected socket.
#[derive(Debug)]
pub struct Connection(Stream);

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    pub(super) fn tcp(stream: TcpStream) -> Self {
        Self(Stream::Tcp(stream))
    }

    pub(crate) fn unix(stream: UnixStream) -> Self {
        Self(Stream::Unix(stream))
    }

    /// Sends what is left of a list, as much as one call takes.
    pub(crate) fn send(&self, list: &mut SendList<'_>) -> io::Result<usize> {
        list.send(self.descriptor())
    }

    /// Receives into what is left of a list, as much as one call brings; 0 when the peer sends no more. With `wait` false, fails with
    /// `WouldBlock` when nothing is there.
    pub(crate) fn receive(&self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize> {
        list.receive(self.descriptor(), wait)
    }

    /// Sends memory that others may write meanwhile, as much as one call takes.
    pub fn send_memory(&self, memory: &VolatileSlice<'_>) -> io::Result<usize> {
        let mut list = SendList::new();
        list.push_guest(memory);
        uninterrupted(|| self.send(&mut list))
    }

    /// Receives into memory that others may access meanwhile, as much as one call brings; 0 when the peer sends no more.
    pub fn receive_memory(&self, memory: &VolatileSlice<'_>) -> io::Result<usize> {
        let mut list = ReceiveList::new();
        list.push_guest(memory);
        uninterrupted(|| self.receive(&mut list, true))
    }

    /// Sends up to `count` bytes of what is in a pipe, without a copy where the kernel can; returns how many.
    pub fn send_piped(&self, pipe: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE | SpliceFlags::MORE;
        Ok(splice(pipe, None, self.descriptor(), None, count, flags)?)
    }

    /// Sets what a session's connections want: no delay, and death within `timeout` of silence from the peer's kernel; and on loopback
    /// what is fastest there.
    pub fn tune(&self, timeout: Duration) -> io::Result<()> {
        if let Stream::Tcp(stream) = &self.0 {
            stream.set_nodelay(true)?;
            let socket = SockRef::from(stream);
            socket.set_tcp_user_timeout(Some(timeout))?;
            let (own, peer) = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
            if peer.is_loopback() || own == peer {
                tune_for_loopback(&socket);
            }
        }
        Ok(())
    }

    /// How long blocking reads and writes wait.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        let socket = self.socket();
        socket.set_read_timeout(read)?;
        socket.set_write_timeout(write)
    }

    /// Switches between blocking and not.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket().set_nonblocking(nonblocking)
    }

    /// Ends both directions; threads blocked on the socket wake up.
    pub fn shutdown(&self) {
        // Fails only when the peer closed first, which is what is wanted.
        let _ = self.socket().shutdown(std::net::Shutdown::Both);
    }

    /// Says that nothing more will be sent.
    pub fn shutdown_write(&self) {
        // As above.
        let _ = self.socket().shutdown(std::net::Shutdown::Write);
    }

    /// The peer, for messages.
    pub fn peer(&self) -> String {
        match &self.0 {
            Stream::Tcp(stream) => stream.peer_addr().map_or_else(|_| "tcp peer".into(), |a| a.to_string()),
            Stream::Unix(_) => "unix socket".into(),
        }
    }

    /// Hands the connection to tokio; must be called inside a runtime.
    pub(crate) fn into_async(self) -> io::Result<AsyncConnection> {
        self.set_nonblocking(true)?;
        Ok(match self.0 {
            Stream::Tcp(stream) => AsyncConnection::tcp(tokio::net::TcpStream::from_std(stream)?),
            Stream::Unix(stream) => AsyncConnection::unix(tokio::net::UnixStream::from_std(stream)?),
        })
    }

    fn socket(&self) -> SockRef<'_> {
        match &self.0 {
            Stream::Tcp(stream) => SockRef::from(stream),
            Stream::Unix(stream) => SockRef::from(stream),
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Calls again what a signal has interrupted.
fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl io::Read for &Connection {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &self.0 {
            Stream::Tcp(stream) => (&*stream).read(buf),
            Stream::Unix(stream) => (&*stream).read(buf),
        }
    }
}

impl io::Write for &Connection {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Stream::Tcp(stream) => (&*stream).write(buf),
            Stream::Unix(stream) => (&*stream).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection on tokio, until it is known what it is for.
#[derive(Debug)]
pub struct AsyncConnection(AsyncStream);

#[derive(Debug)]
enum AsyncStream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

impl AsyncConnection {
    pub(super) fn tcp(stream: tokio::net::TcpStream) -> Self {
        Self(AsyncStream::Tcp(stream))
    }

    pub(super) fn unix(stream: tokio::net::UnixStream) -> Self {
        Self(AsyncStream::Unix(stream))
    }

    /// Takes the connection off tokio; it stays non-blocking.
    pub fn into_connection(self) -> io::Result<Connection> {
        Ok(match self.0 {
            AsyncStream::Tcp(stream) => Connection::tcp(stream.into_std()?),
            AsyncStream::Unix(stream) => Connection::unix(stream.into_std()?),
        })
    }
}

impl AsyncRead for AsyncConnection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            AsyncStream::Tcp(stream) => Pin::new(stream).poll_read(context, buf),
            AsyncStream::Unix(stream) => Pin::new(stream).poll_read(context, buf),
        }
    }
}

impl AsyncWrite for AsyncConnection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            AsyncStream::Tcp(stream) => Pin::new(stream).poll_write(context, buf),
            AsyncStream::Unix(stream) => Pin::new(stream).poll_write(context, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            AsyncStream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            AsyncStream::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            AsyncStream::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            AsyncStream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Listener;
    use crate::socket::loopback::LOOPBACK_UNSENT;

    #[test]
    fn little_waits_to_be_sent_on_loopback() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = Connection::connect(&listener.uri(), Duration::from_secs(1), &|| false).unwrap();
        connection.tune(Duration::from_secs(10)).unwrap();
        assert_eq!(connection.socket().tcp_notsent_lowat().unwrap(), LOOPBACK_UNSENT);
    }

    #[test]
    fn loopback_is_tuned_before_it_connects() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = Connection::connect(&listener.uri(), Duration::from_secs(1), &|| false).unwrap();
        for end in [connection, listener.accept().unwrap()] {
            let before = (end.socket().tcp_congestion().unwrap(), end.socket().tcp_notsent_lowat().unwrap());
            end.tune(Duration::from_secs(10)).unwrap();
            let after = (end.socket().tcp_congestion().unwrap(), end.socket().tcp_notsent_lowat().unwrap());
            assert_eq!(before, after);
        }
    }
}
