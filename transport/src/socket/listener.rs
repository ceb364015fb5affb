//! Listening.

use std::fs::Permissions;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::address::{host_of, resolve, unix_address};
use super::loopback::tune_for_loopback;
use super::{Connection, SocketError};
use crate::uri::{Uri, abstract_name};

/// Connections that may wait to be accepted; the system may allow fewer. A flood that comes faster than it is accepted costs others
/// another try at connecting.
const BACKLOG: i32 = 1024;

/// A listening socket; one for control and all streams.
#[derive(Debug)]
pub struct Listener(pub(super) Kind);

#[derive(Debug)]
pub(super) enum Kind {
    Tcp(TcpListener),
    /// The path is removed when the listener is dropped, if it is still this one's.
    Unix(UnixListener, UnixPath),
}

/// Where a Unix socket is, and which file it is there: none of a name in the abstract namespace.
#[derive(Debug)]
pub(super) struct UnixPath {
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

    /// The same; the file of a Unix socket has the mode before anybody can connect.
    pub(super) fn bind_with_mode(uri: &Uri, mode: Option<u32>) -> Result<Self, SocketError> {
        let fail =
            |hint: &str, source: io::Error| SocketError::new(format!("cannot listen on {uri}{hint}"), source);
        let hint = |e: &io::Error| match e.kind() {
            io::ErrorKind::AddrInUse => ": it is in use; choose another, or stop what listens there",
            io::ErrorKind::PermissionDenied => {
                ": no permission; choose a port above 1023 (or lower the sysctl net.ipv4.ip_unprivileged_port_start), or another path"
            }
            io::ErrorKind::AddrNotAvailable => ": this host has no such address",
            io::ErrorKind::NotFound => ": its folder does not exist",
            _ => "",
        };
        match uri {
            Uri::Unix(path) => {
                let found = std::fs::symlink_metadata(path).ok().filter(|_| abstract_name(path).is_none());
                if found.is_some_and(|file| file.file_type().is_socket()) && is_refused(path) {
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
                Ok(Self(Kind::Unix(listener, UnixPath::of(path))))
            }
            Uri::Tcp { host, port } | Uri::Rdma { host, port } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in
                    resolve(host, *port, true).map_err(|e| fail(": the name does not resolve", e))?
                {
                    match listen_tcp(address) {
                        Ok(listener) => return Ok(Self(Kind::Tcp(listener))),
                        Err(e) => last = e,
                    }
                }
                Err(fail(hint(&last), last))
            }
            Uri::File(_) | Uri::Exec(_) | Uri::Fd(_) => Err(SocketError::one_way("listen on", uri)),
        }
    }

    /// Waits for a connection.
    pub fn accept(&self) -> io::Result<Connection> {
        match &self.0 {
            Kind::Tcp(listener) => listener.accept().map(|(stream, _)| Connection::tcp(stream)),
            Kind::Unix(listener, _) => listener.accept().map(|(stream, _)| Connection::unix(stream)),
        }
    }

    /// Whether `accept` waits.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match &self.0 {
            Kind::Tcp(listener) => listener.set_nonblocking(nonblocking),
            Kind::Unix(listener, _) => listener.set_nonblocking(nonblocking),
        }
    }

    /// The address of a TCP listener.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.0 {
            Kind::Tcp(listener) => listener.local_addr().ok(),
            Kind::Unix(..) => None,
        }
    }

    /// Whether other hosts may reach it.
    pub fn is_reachable(&self) -> bool {
        self.address().is_some_and(|address| !address.ip().is_loopback())
    }

    /// The URI a source connects to: with the port that the system chose.
    pub fn uri(&self) -> Uri {
        match &self.0 {
            Kind::Tcp(listener) => match listener.local_addr() {
                Ok(address) => Uri::Tcp { host: host_of(&address), port: address.port() },
                Err(_) => Uri::Tcp { host: String::new(), port: 0 },
            },
            Kind::Unix(_, at) => Uri::Unix(at.path.clone()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Unix(_, at) = &self.0
            && at.file.is_some()
            && file_at(&at.path) == at.file
        {
            let _ = std::fs::remove_file(&at.path);
        }
    }
}

/// Listens at a path; with `mode`, that is the file's before anybody can connect.
fn listen_unix(path: &Path, mode: Option<u32>) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
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
    } else if is_of_another_type(path) {
        "a socket of another type"
    } else {
        return None;
    })
}

/// Whether nobody listens at a Unix socket's path. Does not wait for one whose queue is full.
fn is_refused(path: &Path) -> bool {
    let refused = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&unix_address(path)?)
    };
    refused().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

/// Whether the socket at a path takes no connections of the kind that this crate makes, as one for datagrams does not.
fn is_of_another_type(path: &Path) -> bool {
    let connected = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    connected().is_err_and(|e| e.raw_os_error() == Some(libc::EPROTOTYPE))
}

fn listen_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
    }

    #[test]
    fn nobody_there_is_said_so() {
        let free = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap().uri();
        let error = Connection::connect(&free, Duration::from_secs(1), &|| false).unwrap_err();
        assert!(error.to_string().contains("no destination listens there"), "{error}");
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
