//! A connected socket.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use socket2::SockRef;

use super::loopback::tune_for_loopback;

/// A connected socket.
#[derive(Debug)]
pub enum Connection {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
}

impl Connection {
    /// Sets what a session's connections want: no delay, and death within `timeout` of silence from the peer's kernel; and on loopback
    /// what is fastest there.
    pub fn tune(&self, timeout: Duration) -> io::Result<()> {
        if let Self::Tcp(stream) = self {
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
        match self {
            Self::Tcp(stream) => stream.peer_addr().map_or_else(|_| "tcp peer".into(), |a| a.to_string()),
            Self::Unix(_) => "unix socket".into(),
        }
    }

    fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream),
            Self::Unix(stream) => SockRef::from(stream),
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl io::Read for &Connection {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Connection::Tcp(stream) => (&*stream).read(buf),
            Connection::Unix(stream) => (&*stream).read(buf),
        }
    }
}

impl io::Write for &Connection {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Connection::Tcp(stream) => (&*stream).write(buf),
            Connection::Unix(stream) => (&*stream).write(buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
