//! What a wire shows to who taps it.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::common::{Image, Job, MIB, Recv, send, turn};
use crate::lab::{Keys, recv};

/// In every page of the memory that moves.
const PATTERN: &[u8] = b"What the guest knows, nobody may.";

/// `ETH_P_ALL` of `linux/if_ether.h`.
const ETH_P_ALL: u16 = 3;

/// Counts the pattern in all packets of this host while `work` goes on. `None` where this process may not look at packets.
fn tapped(port: impl Fn() -> u16, work: impl FnOnce()) -> Option<(u64, u64)> {
    let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
    let mut socket = match Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)) {
        Ok(socket) => socket,
        Err(error) => {
            eprintln!("skipped: packets cannot be captured here ({error}): it takes CAP_NET_RAW");
            return None;
        }
    };
    // The wire is faster than who listens: what counts is that much is seen, not all of it.
    socket.set_recv_buffer_size(64 << 20).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let over = AtomicBool::new(false);
    let port = port().to_be_bytes();
    let seen = std::thread::scope(|scope| {
        let tap = scope.spawn(|| {
            let mut packet = vec![0; 1 << 17];
            let (mut bytes, mut found) = (0, 0);
            loop {
                let len = match socket.read(&mut packet) {
                    Ok(len) => len,
                    Err(_) if over.load(Ordering::Relaxed) => return (bytes, found),
                    Err(_) => continue,
                };
                // IPv4 without options, then TCP: to or from the destination.
                let packet = &packet[..len];
                if len > 24 && (packet[20..22] == port || packet[22..24] == port) {
                    bytes += len as u64;
                    found += packet.windows(PATTERN.len()).filter(|window| *window == PATTERN).count() as u64;
                }
            }
        });
        work();
        over.store(true, Ordering::Relaxed);
        tap.join().unwrap()
    });
    Some(seen)
}

/// Memory with the pattern in every page, and nothing that compresses beside it.
fn job() -> Job {
    let job = Job::new(Image::Random, 8 * MIB);
    let mut content = std::fs::read(&job.from).unwrap();
    for page in content.chunks_mut(4096) {
        page[1000..1000 + PATTERN.len()].copy_from_slice(PATTERN);
    }
    std::fs::write(&job.from, &content).unwrap();
    Job { content, ..job }
}

#[test]
fn a_wire_shows_nothing_of_memory() {
    let _turn = turn();
    let keys = Keys::good();
    // Slow enough for whoever listens.
    let slow = ["--codec", "raw", "--bandwidth", "20MB/s", "--streams", "2"];
    for protected in [false, true] {
        let job = job();
        let listening = if protected { recv(&job, &keys, &[]) } else { Recv::to_file(&job.to, 10) };
        let (uri, port) = (listening.uri.clone(), listening.port());
        let tls = ["--tls-dir", keys.text()];
        let args: Vec<&str> = slow.iter().chain(tls.iter().filter(|_| protected)).copied().collect();
        let Some((bytes, found)) = tapped(
            || port,
            || {
                send(&uri, &job.from, &args).wait().code(0);
            },
        ) else {
            return;
        };
        listening.ferry.wait().code(0);
        job.assert_arrived();
        assert!(bytes > 4 * MIB as u64, "{bytes} bytes were seen");
        if protected {
            assert_eq!(found, 0, "in {bytes} bytes");
        } else {
            assert!(found > 500, "the tap is deaf: {found} in {bytes} bytes");
        }
    }
}

/// Forwards what comes to `port`, and counts connections. Those that are there are cut once, after so many bytes.
fn forwarder(port: u16, cut_after: u64) -> (u16, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    let (passed, connections) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (counted, cut) = (connections.clone(), Arc::new(AtomicBool::new(false)));
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (Ok(near), Ok(far)) = (near, TcpStream::connect(("127.0.0.1", port))) else { continue };
            counted.fetch_add(1, Ordering::Relaxed);
            let before = cut.load(Ordering::Relaxed);
            for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                let (passed, cut) = (passed.clone(), cut.clone());
                std::thread::spawn(move || {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(len @ 1..) = from.read(&mut bytes) {
                        if passed.fetch_add(len as u64, Ordering::Relaxed) > cut_after {
                            cut.store(true, Ordering::Relaxed);
                        }
                        if !before && cut.load(Ordering::Relaxed) {
                            break;
                        }
                        if std::io::Write::write_all(&mut to, &bytes[..len]).is_err() {
                            break;
                        }
                    }
                    let _ = (from.shutdown(std::net::Shutdown::Both), to.shutdown(std::net::Shutdown::Both));
                });
            }
        }
    });
    (own, connections)
}

/// All connections are lost on the way: those that take their place prove that they are of the session.
#[test]
fn a_session_goes_on_over_connections_that_are_made_anew() {
    let _turn = turn();
    let keys = Keys::good();
    let job = Job::new(Image::Random, 32 * MIB);
    let file = job.to.to_str().unwrap();
    let listening = Recv::start("tcp:127.0.0.1:0", ["--json", "--tls-dir", keys.text(), "--ram-file", file]);
    let (port, connections) = forwarder(listening.port(), 10 * MIB as u64);
    let uri = format!("tcp:127.0.0.1:{port}");
    let sent = send(&uri, &job.from, &["--tls-dir", keys.text(), "--codec", "raw", "--streams", "3"]).wait();
    sent.code(0);
    let report = sent.json();
    assert_eq!(report["reconnects"], 1, "{report}");
    assert_eq!(report["verified"], true, "{report}");
    assert!(connections.load(Ordering::Relaxed) >= 8, "control and three streams, twice");
    listening.ferry.wait().code(0);
    job.assert_arrived();
}
