//! Sockets of a session: listening, connecting, and the options that data streams want.

use std::fs::Permissions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{SockRef, Socket};

use crate::dial::unix_address;
use crate::uri::{Uri, abstract_name};

/// Bytes that may wait on loopback before they are sent: both sides take less time with few. Measured:
/// docs/adr/0019-loopback-sockets.md has the series.
const LOOPBACK_UNSENT: u32 = 128 << 10;

/// Connections that may wait to be accepted; the system may allow fewer. A flood that comes faster than it is accepted costs others
/// another try at connecting.
const BACKLOG: i32 = 1024;

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
        crate::dial::is_cancelled(&self.source)
    }

    /// The system's error.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}

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

/// A listening socket; one for control and all streams.
#[derive(Debug)]
pub enum Listener {
    /// On TCP.
    Tcp(TcpListener),
    /// On a Unix socket; the path is removed when the listener is dropped, if it is still this one's.
    Unix(UnixListener, UnixPath),
}

/// Where a Unix socket is, and which file it is there: none of a name in the abstract namespace.
#[derive(Debug)]
pub struct UnixPath {
    path: PathBuf,
    /// Device and inode.
    file: Option<(u64, u64)>,
}

impl UnixPath {
    fn of(path: &Path) -> Self {
        let file = if abstract_name(path).is_none() { file_at(path) } else { None };
        Self { path: path.into(), file }
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

impl Listener {
    /// Listens; for RDMA, for its control connections.
    ///
    /// A Unix socket's path that nobody listens on any more is replaced; any other file there is left alone.
    pub fn bind(uri: &Uri) -> Result<Self, SocketError> {
        Self::bind_with_mode(uri, None)
    }

    /// Listens at a Unix socket's path as [`Self::bind`] does, for this user alone.
    pub fn bind_private(path: &Path) -> Result<Self, SocketError> {
        Self::bind_with_mode(&Uri::Unix(path.into()), Some(0o600))
    }

    fn bind_with_mode(uri: &Uri, mode: Option<u32>) -> Result<Self, SocketError> {
        let fail =
            |hint: &str, source: io::Error| SocketError::new(format!("cannot listen on {uri}{hint}"), source);
        let hint = |e: &io::Error| match e.kind() {
            io::ErrorKind::AddrInUse => ": it is in use; choose another, or stop what listens there",
            io::ErrorKind::PermissionDenied => ": no permission; choose a port above 1023 or another path",
            io::ErrorKind::AddrNotAvailable => ": this host has no such address",
            io::ErrorKind::NotFound => ": its folder does not exist",
            _ => "",
        };
        match uri {
            Uri::Unix(path) => {
                let found = std::fs::symlink_metadata(path).ok().filter(|_| abstract_name(path).is_none());
                if found.is_some_and(|file| file.file_type().is_socket()) && crate::dial::is_refused(path) {
                    std::fs::remove_file(path).map_err(|e| fail(": cannot replace the old socket", e))?;
                }
                let listener = listen_unix(path, mode).map_err(|e| match what_is_at(path) {
                    Some(what) if e.kind() == io::ErrorKind::AddrInUse => {
                        let hint =
                            format!(": {what} is there and is left alone; choose another path, or remove it");
                        fail(&hint, e)
                    }
                    _ => fail(hint(&e), e),
                })?;
                Ok(Self::Unix(listener, UnixPath::of(path)))
            }
            Uri::Tcp { host, port } | Uri::Rdma { host, port } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in
                    resolve(host, *port, true).map_err(|e| fail(": the name does not resolve", e))?
                {
                    match listen_tcp(address) {
                        Ok(listener) => return Ok(Self::Tcp(listener)),
                        Err(e) => last = e,
                    }
                }
                Err(fail(hint(&last), last))
            }
        }
    }

    /// Waits for a connection.
    pub fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Connection::Tcp(stream)),
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Connection::Unix(stream)),
        }
    }

    /// Whether `accept` waits.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.set_nonblocking(nonblocking),
            Self::Unix(listener, _) => listener.set_nonblocking(nonblocking),
        }
    }

    /// The address of a TCP listener.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(..) => None,
        }
    }

    /// The URI a source connects to: with the port that the system chose.
    pub fn uri(&self) -> Uri {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => Uri::Tcp { host: host_of(&address), port: address.port() },
                Err(_) => Uri::Tcp { host: String::new(), port: 0 },
            },
            Self::Unix(_, at) => Uri::Unix(at.path.clone()),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, at) = self
            && at.file.is_some()
            && file_at(&at.path) == at.file
        {
            let _ = std::fs::remove_file(&at.path);
        }
    }
}

/// Listens at a path; with `mode`, that is the file's before anybody can connect.
fn listen_unix(path: &Path, mode: Option<u32>) -> io::Result<UnixListener> {
    let socket = Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    if mode.is_some() && abstract_name(path).is_some() {
        let text =
            "a name in the abstract namespace has no mode, and is open to everybody on this host: use a path";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    socket.bind(&unix_address(path)?)?;
    let ready = mode.map_or(Ok(()), |mode| std::fs::set_permissions(path, Permissions::from_mode(mode)));
    if let Err(e) = ready.and_then(|()| socket.listen(BACKLOG)) {
        if abstract_name(path).is_none() {
            // Whatever it is, it is this socket's.
            let _ = std::fs::remove_file(path);
        }
        return Err(e);
    }
    Ok(socket.into())
}

/// Whether packets to this address go over the loopback device: it is one of this host's own. That is the first hop of what may be a
/// long path, through a forwarder, and says nothing about the rest of it.
pub(crate) fn leads_here(address: SocketAddr) -> bool {
    // Connecting a datagram socket sends nothing: the kernel looks for a route, and says what address it would send from.
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let route = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(address)?;
        socket.local_addr()
    };
    address.ip().is_loopback() || route().is_ok_and(|own| own.ip() == address.ip())
}

/// What is in the way of a socket at a path, other than a socket that somebody listens on.
fn what_is_at(path: &Path) -> Option<&'static str> {
    let kind = std::fs::symlink_metadata(path).ok()?.file_type();
    Some(if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_dir() {
        "a folder"
    } else if kind.is_file() {
        "a file"
    } else if !kind.is_socket() {
        "a device or a pipe"
    } else if crate::dial::is_of_another_type(path) {
        "a socket of another type"
    } else {
        return None;
    })
}

/// An address as a URI has it: with the interface, without which a link-local one cannot be reached.
fn host_of(address: &SocketAddr) -> String {
    match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => {
            let scope = v6.scope_id();
            let name = interface_name(scope).unwrap_or_else(|| scope.to_string());
            format!("{}%{name}", v6.ip())
        }
        address => address.ip().to_string(),
    }
}

/// An interface's name.
fn interface_name(index: u32) -> Option<String> {
    let interfaces = std::fs::read_dir("/sys/class/net").ok()?;
    interfaces.flatten().find_map(|interface| {
        let found = std::fs::read_to_string(interface.path().join("ifindex")).ok()?;
        (found.trim().parse() == Ok(index)).then(|| interface.file_name().into_string().ok())?
    })
}

fn listen_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    if address.ip().is_loopback() {
        // What is accepted takes after it. Of other addresses nobody knows yet who will connect: `tune` does what it can then.
        tune_for_loopback(&SockRef::from(&socket));
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Asks for what moves most over loopback: cubic, as bbr's pacing halves the rate, and little that waits to be sent. A kernel
/// without one of them keeps its default. Best before the socket is connected: one that has once begun with bbr goes on to pace
/// itself by timers, whatever comes after it.
pub(crate) fn tune_for_loopback(socket: &SockRef<'_>) {
    let _ = socket.set_tcp_congestion(b"cubic");
    let _ = socket.set_tcp_notsent_lowat(LOOPBACK_UNSENT);
}

/// The addresses of a host; an empty name or `0` is every address (listening) or the loopback (connecting).
pub(crate) fn resolve(host: &str, port: u16, listening: bool) -> io::Result<Vec<SocketAddr>> {
    let host = match (host, listening) {
        ("" | "0", true) => "0.0.0.0",
        ("" | "0", false) => "127.0.0.1",
        (host, _) => host,
    };
    (host, port).to_socket_addrs().map(Iterator::collect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_port_says_so() {
        let first = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let error = Listener::bind(&first.uri()).unwrap_err();
        assert!(error.to_string().contains("in use"), "{error}");
    }

    #[test]
    fn a_dead_unix_socket_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let uri = Uri::Unix(path.clone());
        // A listener of std leaves its path behind.
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&uri).unwrap();
        assert!(Listener::bind(&uri).unwrap_err().to_string().contains("in use"));
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "keep me").unwrap();
        assert!(Listener::bind(&uri).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"keep me");
    }

    #[test]
    fn what_is_in_the_way_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        std::os::unix::fs::symlink(path("nowhere"), path("link")).unwrap();
        let _datagrams = std::os::unix::net::UnixDatagram::bind(path("datagrams")).unwrap();
        for (name, what) in [
            ("file", "a file is there"),
            ("folder", "a folder is there"),
            ("link", "a symbolic link is there"),
            ("datagrams", "a socket of another type is there"),
        ] {
            let error = Listener::bind(&Uri::Unix(path(name))).unwrap_err().to_string();
            assert!(error.contains(what) && !error.contains("stop what listens"), "{error}");
            assert!(std::fs::symlink_metadata(path(name)).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_listener_removes_its_own_path_only() {
        let folder = tempfile::tempdir().unwrap();
        let uri = Uri::Unix(folder.path().join("s"));
        let first = Listener::bind(&uri).unwrap();
        std::fs::rename(folder.path().join("s"), folder.path().join("old")).unwrap();
        let second = Listener::bind(&uri).unwrap();
        drop(first);
        Connection::connect(&uri, Duration::from_secs(1), &|| false).expect("the other's is there");
        drop(second);
        assert!(!folder.path().join("s").exists());
    }

    #[test]
    fn abstract_names_are_no_files() {
        let name = format!("@pageferry-test-{}", std::process::id());
        let uri: Uri = format!("unix:{name}").parse().unwrap();
        let listener = Listener::bind(&uri).unwrap();
        assert_eq!(listener.uri(), uri);
        assert!(!Path::new(&name).exists());
        Connection::connect(&uri, Duration::from_secs(1), &|| false).unwrap();
        assert!(Listener::bind(&uri).unwrap_err().to_string().contains("in use"));
        drop(listener);
        Listener::bind(&uri).unwrap();
        let error = Listener::bind_private(Path::new(&name)).unwrap_err();
        assert!(error.io().to_string().contains("use a path"), "{error}");
    }

    #[test]
    fn a_link_local_address_is_told_with_its_interface() {
        let scoped =
            |scope| SocketAddr::V6(std::net::SocketAddrV6::new("fe80::1".parse().unwrap(), 1, 0, scope));
        assert_eq!(host_of(&scoped(1)), "fe80::1%lo");
        assert_eq!(host_of(&scoped(987_654)), "fe80::1%987654");
        assert_eq!(host_of(&scoped(0)), "fe80::1");
    }

    #[test]
    fn nobody_there_says_what_to_do() {
        let free = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap().uri();
        let error = Connection::connect(&free, Duration::from_secs(1), &|| false).unwrap_err();
        assert!(error.to_string().contains("start `pageferry recv`"), "{error}");
    }

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

    #[test]
    fn own_addresses_lead_here_and_others_do_not() {
        let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 9);
        assert!(leads_here(at("127.0.0.1")) && leads_here(at("127.3.2.1")));
        // TEST-NET-3 is nobody's; whether there is a way to it or not, it does not end here.
        assert!(!leads_here(at("203.0.113.77")));
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        match socket.connect(at("203.0.113.77")).and_then(|()| socket.local_addr()) {
            Ok(own) => {
                // Only the route is asked for: nothing is sent to an address that others might hear.
                assert!(leads_here(SocketAddr::new(own.ip(), 9)), "{own}");
            }
            Err(error) => eprintln!("skipped in part: this host has no way out ({error})"),
        }
    }

    #[test]
    fn ipv6_loopback_works_where_there_is_one() {
        match Listener::bind(&"tcp:[::1]:0".parse().unwrap()) {
            Ok(listener) => {
                Connection::connect(&listener.uri(), Duration::from_secs(1), &|| false).unwrap();
            }
            Err(error) => eprintln!("skipped: no IPv6 loopback here ({error})"),
        }
    }
}
