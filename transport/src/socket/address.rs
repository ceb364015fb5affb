//! Addresses: from names, and as a URI has them.

use std::ffi::OsStr;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crossbeam_channel::RecvTimeoutError;
use socket2::SockAddr;

use crate::limit::Limit;
use crate::uri::abstract_name;

/// The addresses of a name. A name server may be silent for long, so that it is asked by a thread that nobody has to wait for.
pub(crate) fn find(host: &str, port: u16, limit: Limit<'_>) -> io::Result<Vec<SocketAddr>> {
    if let Some(addresses) = resolve_literal(host, port) {
        return Ok(addresses);
    }
    let (found, answer) = crossbeam_channel::bounded(1);
    let name = host.to_owned();
    std::thread::Builder::new().name("resolve".into()).spawn(move || {
        // Nobody waits any more where it was cancelled.
        let _ = found.send(resolve(&name, port, false));
    })?;
    loop {
        match answer.recv_timeout(limit.step()?) {
            Ok(addresses) => return addresses,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the resolver ended")),
        }
    }
}

/// The address of a host that is written as one, without asking anybody.
fn resolve_literal(host: &str, port: u16) -> Option<Vec<SocketAddr>> {
    let literal =
        host.is_empty() || host == "0" || host.contains(':') || host.parse::<std::net::IpAddr>().is_ok();
    if literal { resolve(host, port, false).ok() } else { None }
}

/// The addresses of a host; an empty name or `0` is every address (listening) or the loopback (connecting).
pub(super) fn resolve(host: &str, port: u16, listening: bool) -> io::Result<Vec<SocketAddr>> {
    let host = match (host, listening) {
        ("" | "0", true) => "0.0.0.0",
        ("" | "0", false) => "127.0.0.1",
        (host, _) => host,
    };
    (host, port).to_socket_addrs().map(Iterator::collect)
}

/// The address of a path, or of a name in the abstract namespace.
pub(super) fn unix_address(path: &Path) -> io::Result<SockAddr> {
    match abstract_name(path) {
        Some(name) => SockAddr::unix(OsStr::from_bytes(&[b"\0", name].concat())),
        None => SockAddr::unix(path),
    }
}

/// An address as a URI has it: with the interface, without which a link-local one cannot be reached.
pub(super) fn host_of(address: &SocketAddr) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_local_address_is_told_with_its_interface() {
        let scoped =
            |scope| SocketAddr::V6(std::net::SocketAddrV6::new("fe80::1".parse().unwrap(), 1, 0, scope));
        assert_eq!(host_of(&scoped(1)), "fe80::1%lo");
        assert_eq!(host_of(&scoped(987_654)), "fe80::1%987654");
        assert_eq!(host_of(&scoped(0)), "fe80::1");
    }
}
