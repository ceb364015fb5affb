//! A connection that owns its bytes: what is sent and received goes through here, and nobody else reaches its descriptor.
//!
//! Plain sockets have their fast paths here: gathered and scattered bytes, straight from and into memory, and what comes from a pipe.
//! Those under TLS take the same calls, and nobody passes the encryption by.

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
use super::tls::{Acceptor, Admitted, AsyncRecords, Connector, PROOF_LEN, Records, SessionKey, Unprotected};
use crate::limit::{Limit, STEP};
use crate::sys::{ReceiveList, SendList};
use crate::wire::{Preamble, SessionId};

/// Bytes of a pipe that are encrypted at a time.
const PIPED: usize = 64 << 10;

/// A connected socket.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    /// What encrypts, under TLS.
    records: Option<Box<Records>>,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    pub(super) fn tcp(stream: TcpStream) -> Self {
        Self { stream: Stream::Tcp(stream), records: None }
    }

    pub(crate) fn unix(stream: UnixStream) -> Self {
        Self { stream: Stream::Unix(stream), records: None }
    }

    /// Shakes hands with the destination that this is connected to, and encrypts from here on.
    pub(crate) fn protect(&mut self, connector: &Connector, limit: Limit<'_>) -> io::Result<()> {
        self.set_timeouts(Some(STEP), Some(STEP))?;
        let records = Records::connect(connector, self.descriptor(), limit)?;
        self.records = Some(Box::new(records));
        self.set_timeouts(None, None)
    }

    /// The key of the session whose control connection this is, under TLS.
    pub(crate) fn session_key(&self, session: &SessionId) -> io::Result<Option<SessionKey>> {
        self.records.as_ref().map(|records| records.session_key(session)).transpose()
    }

    /// What shows that this connection is opened by whoever has the session's key.
    pub(crate) fn prove(&self, key: &SessionKey, preamble: &Preamble) -> io::Result<[u8; PROOF_LEN]> {
        let records = self.records.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        records.prove(key, preamble)
    }

    /// Whether a proof is of this connection and that key.
    pub(crate) fn check(&self, key: &SessionKey, preamble: &Preamble, proof: &[u8; PROOF_LEN]) -> bool {
        self.records.as_ref().is_some_and(|records| records.check(key, preamble, proof))
    }

    /// Sends what is left of a list, as much as one call takes.
    pub(crate) fn send(&self, list: &mut SendList<'_>) -> io::Result<usize> {
        match &self.records {
            None => list.send(self.descriptor()),
            Some(records) => records.send(self.descriptor(), list),
        }
    }

    /// Receives into what is left of a list, as much as one call brings; 0 when the peer sends no more. With `wait` false, fails with
    /// `WouldBlock` when nothing is there.
    pub(crate) fn receive(&self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize> {
        match &self.records {
            None => list.receive(self.descriptor(), wait),
            Some(records) => records.receive(self.descriptor(), list, wait),
        }
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
        if let Some(records) = &self.records {
            let mut bytes = vec![0; count.min(PIPED)];
            let read = rustix::io::read(pipe, &mut *bytes)?;
            records.send_bytes(self.descriptor(), &bytes[..read])?;
            return Ok(read);
        }
        let flags = SpliceFlags::MOVE | SpliceFlags::MORE;
        Ok(splice(pipe, None, self.descriptor(), None, count, flags)?)
    }

    /// Sets what a session's connections want: no delay, and death within `timeout` of silence from the peer's kernel; and on loopback
    /// what is fastest there.
    pub fn tune(&self, timeout: Duration) -> io::Result<()> {
        if let Stream::Tcp(stream) = &self.stream {
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
        socket.set_write_timeout(write)?;
        self.records.iter().for_each(|records| records.set_write_timeout(write));
        Ok(())
    }

    /// Switches between blocking and not.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket().set_nonblocking(nonblocking)?;
        self.records.iter().for_each(|records| records.set_nonblocking(nonblocking));
        Ok(())
    }

    /// Ends both directions; threads blocked on the socket wake up.
    pub fn shutdown(&self) {
        // Fails only when the peer closed first, which is what is wanted.
        let _ = self.socket().shutdown(std::net::Shutdown::Both);
    }

    /// Says that nothing more will be sent.
    pub fn shutdown_write(&self) {
        self.records.iter().for_each(|records| records.say_goodbye(self.descriptor()));
        // As above.
        let _ = self.socket().shutdown(std::net::Shutdown::Write);
    }

    /// The peer, for messages.
    pub fn peer(&self) -> String {
        match &self.stream {
            Stream::Tcp(stream) => stream.peer_addr().map_or_else(|_| "tcp peer".into(), |a| a.to_string()),
            Stream::Unix(_) => "unix socket".into(),
        }
    }

    /// Hands the connection to tokio; must be called inside a runtime.
    pub(crate) fn into_async(self) -> io::Result<AsyncConnection> {
        self.set_nonblocking(true)?;
        let stream = match self.stream {
            Stream::Tcp(stream) => AsyncStream::Tcp(tokio::net::TcpStream::from_std(stream)?),
            Stream::Unix(stream) => AsyncStream::Unix(tokio::net::UnixStream::from_std(stream)?),
        };
        Ok(AsyncConnection(match self.records {
            None => Kind::Plain(stream),
            Some(records) => Kind::Protected(Box::new(AsyncRecords::new(stream, records.into_tls()?))),
        }))
    }

    #[cfg(test)]
    pub(super) fn renew_keys(&self) {
        self.records.iter().for_each(|records| records.renew_keys());
    }

    #[cfg(test)]
    pub(super) fn into_records(self) -> Option<Records> {
        self.records.map(|records| *records)
    }

    fn socket(&self) -> SockRef<'_> {
        match &self.stream {
            Stream::Tcp(stream) => SockRef::from(stream),
            Stream::Unix(stream) => SockRef::from(stream),
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match &self.stream {
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
        match (&self.records, &self.stream) {
            (None, Stream::Tcp(stream)) => (&*stream).read(buf),
            (None, Stream::Unix(stream)) => (&*stream).read(buf),
            (Some(records), _) => {
                let mut list = ReceiveList::new();
                list.push(buf);
                records.receive(self.descriptor(), &mut list, true)
            }
        }
    }
}

impl io::Write for &Connection {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match (&self.records, &self.stream) {
            (None, Stream::Tcp(stream)) => (&*stream).write(buf),
            (None, Stream::Unix(stream)) => (&*stream).write(buf),
            (Some(records), _) => records.send_bytes(self.descriptor(), buf).map(|()| buf.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection on tokio, until it is known what it is for.
#[derive(Debug)]
pub struct AsyncConnection(Kind);

#[derive(Debug)]
enum Kind {
    Plain(AsyncStream),
    Protected(Box<AsyncRecords<AsyncStream>>),
}

#[derive(Debug)]
enum AsyncStream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

/// Why somebody who connected is not served.
pub(crate) enum Unfit {
    /// He does not speak TLS, and is told so without.
    Plain(Connection),
    /// TLS failed. What is to be said of it was said; the connection is closed once it was heard.
    Failed(AsyncConnection, io::Error),
    /// He is gone.
    Gone,
}

impl AsyncConnection {
    pub(super) fn tcp(stream: tokio::net::TcpStream) -> Self {
        Self(Kind::Plain(AsyncStream::Tcp(stream)))
    }

    pub(super) fn unix(stream: tokio::net::UnixStream) -> Self {
        Self(Kind::Plain(AsyncStream::Unix(stream)))
    }

    /// Shakes hands with whoever has connected, and encrypts from here on. Says, too, whether he may send.
    pub(crate) async fn protect(self, acceptor: &Acceptor) -> Result<(Self, Admitted), Unfit> {
        let Kind::Plain(mut stream) = self.0 else { return Ok((self, Ok(()))) };
        match AsyncRecords::accept(acceptor, &mut stream).await {
            Ok((tls, admitted)) => {
                Ok((Self(Kind::Protected(Box::new(AsyncRecords::new(stream, tls)))), admitted))
            }
            Err(Unprotected::Failed(error)) => Err(Unfit::Failed(Self(Kind::Plain(stream)), error)),
            Err(Unprotected::Plain) => match Self(Kind::Plain(stream)).into_connection() {
                Ok(connection) => Err(Unfit::Plain(connection)),
                Err(_) => Err(Unfit::Gone),
            },
        }
    }

    /// Takes the connection off tokio; it stays non-blocking.
    pub fn into_connection(self) -> io::Result<Connection> {
        let (stream, tls) = match self.0 {
            Kind::Plain(stream) => (stream, None),
            Kind::Protected(records) => {
                let (stream, tls) = records.into_parts();
                (stream, Some(tls))
            }
        };
        let stream = match stream {
            AsyncStream::Tcp(stream) => Stream::Tcp(stream.into_std()?),
            AsyncStream::Unix(stream) => Stream::Unix(stream.into_std()?),
        };
        let records = tls.map(|tls| {
            let records = Records::new(tls);
            records.set_nonblocking(true);
            Box::new(records)
        });
        Ok(Connection { stream, records })
    }
}

impl AsyncRead for AsyncConnection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Plain(stream) => Pin::new(stream).poll_read(context, buf),
            Kind::Protected(records) => Pin::new(&mut **records).poll_read(context, buf),
        }
    }
}

impl AsyncWrite for AsyncConnection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Kind::Plain(stream) => Pin::new(stream).poll_write(context, buf),
            Kind::Protected(records) => Pin::new(&mut **records).poll_write(context, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Plain(stream) => Pin::new(stream).poll_flush(context),
            Kind::Protected(records) => Pin::new(&mut **records).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Kind::Protected(records) => Pin::new(&mut **records).poll_shutdown(context),
        }
    }
}

impl AsyncRead for AsyncStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buf),
        }
    }
}

impl AsyncWrite for AsyncStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
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
