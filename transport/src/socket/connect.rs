//! Connecting: in steps, between which whoever waits may give up.
//!
//! Nothing here blocks for longer than a [`STEP`](crate::limit::STEP), whatever the network or a name server does.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

use super::address::{find, unix_address};
use super::loopback::{leads_here, tune_for_loopback};
use super::{Connection, SocketError};
use crate::limit::{Limit, is_cancelled};
use crate::sys::wait_writable;
use crate::uri::Uri;

/// Pause before a Unix socket whose queue is full is tried again.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(10);

impl Connection {
    /// Connects to a destination within `timeout`, trying every address the name has. Of RDMA that is its control connection.
    ///
    /// `cancelled` is asked several times a second; once it says yes the wait ends within `STEP`, with an error that
    /// [says so](SocketError::is_cancelled).
    pub fn connect(uri: &Uri, timeout: Duration, cancelled: &dyn Fn() -> bool) -> Result<Self, SocketError> {
        let limit = Limit::new(timeout, cancelled);
        let fail =
            |source: io::Error| SocketError::new(format!("cannot connect to {uri}{}", hint(&source)), source);
        match uri {
            Uri::Unix(path) => connect_unix(path, limit).map(Self::unix).map_err(fail),
            Uri::Tcp { host, port } | Uri::Rdma { host, port } => {
                let addresses = find(host, *port, limit).map_err(|e| {
                    let hint = if is_cancelled(&e) { "" } else { ": the name does not resolve" };
                    SocketError::new(format!("cannot connect to {uri}{hint}"), e)
                })?;
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                let count = addresses.len();
                for (address, left) in addresses.into_iter().zip((1..=count).rev()) {
                    match connect_tcp(address, limit.share(left)) {
                        Ok(stream) => return Ok(Self::tcp(stream)),
                        Err(e) if lacks_scope(&address) => {
                            let hint = "a link-local address is one of an interface: add it, as in tcp:[fe80::1%eth0]:4444";
                            return Err(SocketError::new(format!("cannot connect to {uri}: {hint}"), e));
                        }
                        Err(e) if is_cancelled(&e) => return Err(fail(e)),
                        Err(e) => last = e,
                    }
                }
                Err(fail(last))
            }
            Uri::File(_) | Uri::Exec(_) | Uri::Fd(_) => Err(SocketError::one_way("connect to", uri)),
        }
    }
}

/// Whether an address means nothing without the interface.
fn lacks_scope(address: &SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0)
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ": no destination listens there",
        io::ErrorKind::TimedOut => ": no answer; is a firewall in the way?",
        _ => "",
    }
}

/// As [`TcpStream::connect_timeout`], but in steps, and with what must be set before.
fn connect_tcp(address: SocketAddr, limit: Limit<'_>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if leads_here(address) {
        tune_for_loopback(&SockRef::from(&socket));
    }
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {
            while !wait_writable(socket.as_fd(), limit.step()?)? {}
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
        }
        Err(e) => return Err(e),
    }
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}

/// A Unix socket connects at once, or not before there is room in its listener's queue, of which nothing tells.
fn connect_unix(path: &Path, limit: Limit<'_>) -> io::Result<UnixStream> {
    let address = unix_address(path)?;
    loop {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&address) {
            Ok(()) => {
                socket.set_nonblocking(false)?;
                return Ok(socket.into());
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(limit.step()?.min(QUEUE_FULL_PAUSE));
            }
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::net::TcpListener;

    use socket2::SockAddr;

    use super::*;
    use crate::socket::Listener;

    /// Says yes from the third time on.
    fn soon(asked: &Cell<u32>) -> impl Fn() -> bool {
        move || {
            asked.set(asked.get() + 1);
            asked.get() > 3
        }
    }

    const LONG: Duration = Duration::from_secs(3600);

    /// A TCP listener that answers nobody any more, and what fills its queue.
    fn full_tcp() -> (TcpListener, Vec<Socket>) {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let listener = TcpListener::from(listener);
        let address = listener.local_addr().unwrap();
        let fill = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&address.into());
            socket
        };
        let filling = (0..8).map(|_| fill()).collect();
        (listener, filling)
    }

    #[test]
    fn a_connect_that_nobody_answers_is_cancelled() {
        let (listener, _filling) = full_tcp();
        let address = listener.local_addr().unwrap();
        let uri = Uri::Tcp { host: address.ip().to_string(), port: address.port() };
        let asked = Cell::new(0);
        let error = Connection::connect(&uri, LONG, &soon(&asked)).unwrap_err();
        assert!(error.is_cancelled(), "{error}: {}", error.io());
        let error = Connection::connect(&uri, Duration::from_millis(120), &|| false).unwrap_err();
        assert!(error.to_string().contains("firewall"), "{error}");
    }

    #[test]
    fn a_unix_socket_with_a_full_queue_is_waited_for_and_no_longer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let uri = Uri::Unix(path);
        // The queue of length 0 holds one.
        let _first = Connection::connect(&uri, LONG, &|| false).unwrap();
        let asked = Cell::new(0);
        assert!(Connection::connect(&uri, LONG, &soon(&asked)).unwrap_err().is_cancelled());
        let error = Connection::connect(&uri, Duration::from_millis(30), &|| false).unwrap_err();
        assert_eq!(error.io().kind(), io::ErrorKind::TimedOut, "{error}");
        // It is in use, though it takes nobody now.
        assert!(Listener::bind(&uri).is_err());
        // Once there is room somebody who waits gets in.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| Connection::connect(&uri, LONG, &|| false));
            drop(listener.accept().unwrap());
            drop(listener.accept().unwrap());
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_link_local_address_needs_its_interface() {
        let uri = Uri::Tcp { host: "fe80::1".into(), port: 9 };
        let error = Connection::connect(&uri, LONG, &|| false).unwrap_err().to_string();
        assert!(error.contains("%eth0"), "{error}");
    }

    #[test]
    fn where_nobody_answers_nothing_connects_or_listens() {
        for uri in ["file:/tmp/x", "exec:cat", "fd:7"] {
            let uri: Uri = uri.parse().unwrap();
            for error in
                [Connection::connect(&uri, LONG, &|| false).unwrap_err(), Listener::bind(&uri).unwrap_err()]
            {
                let text = crate::engine::explain(&error);
                assert!(text.contains(&uri.to_string()) && text.contains("is saved and loaded"), "{text}");
                assert!(!error.is_cancelled());
            }
        }
    }

    #[test]
    fn a_name_without_an_address_says_so() {
        let uri = Uri::Tcp { host: "no-such-host.invalid".into(), port: 1 };
        let error = Connection::connect(&uri, LONG, &|| false).unwrap_err();
        assert!(error.to_string().contains("does not resolve"), "{error}");
        assert!(Connection::connect(&uri, LONG, &|| true).unwrap_err().is_cancelled());
    }
}
