//! What is fastest where both ends are on one host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use socket2::SockRef;

/// Bytes that may wait on loopback before they are sent: both sides take less time with few. Measured:
/// docs/adr/0019-loopback-sockets.md has the series.
pub(super) const LOOPBACK_UNSENT: u32 = 128 << 10;

/// Whether packets to this address go over the loopback device: it is one of this host's own. That is the first hop of what may be a
/// long path, through a forwarder, and says nothing about the rest of it.
pub(super) fn leads_here(address: SocketAddr) -> bool {
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

/// Asks for what moves most over loopback: cubic, as bbr's pacing halves the rate, and little that waits to be sent. A kernel
/// without one of them keeps its default. Best before the socket is connected: one that has once begun with bbr goes on to pace
/// itself by timers, whatever comes after it.
pub(super) fn tune_for_loopback(socket: &SockRef<'_>) {
    let _ = socket.set_tcp_congestion(b"cubic");
    let _ = socket.set_tcp_notsent_lowat(LOOPBACK_UNSENT);
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
