//! Whoever reaches the port of a destination and has no session: it costs little, and keeps no rightful source out.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pageferry::transport::wire::control::{Hello, Message, PRESENCE_MAX};
use pageferry::transport::wire::{Preamble, Role};
use testkit::PATIENCE;

use super::{AT_THE_DOOR, Watch};
use crate::common::raw::{hello, preamble};
use crate::common::{Image, Job, MIB, Recv, send, turn};
use crate::vm::{Spec, World, prove};

/// Threads of the strangers.
const THREADS: usize = 4;

/// One thread of strangers.
struct Crowd<'a> {
    port: u16,
    over: &'a AtomicBool,
    /// Connections that were opened, or messages that were sent: how hard they try.
    tries: &'a AtomicUsize,
}

impl Crowd<'_> {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn tried(&self, times: usize) {
        self.tries.fetch_add(times, Ordering::Relaxed);
    }

    /// A connection that does not wait.
    fn connect(&self) -> Option<TcpStream> {
        let socket = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        socket.set_nonblocking(true).ok()?;
        self.tried(1);
        Some(socket)
    }

    /// Keeps so many connections up, each of which has a script: bytes that are written in pieces, one a turn.
    fn keep_up(&self, count: usize, pause: Duration, bytes: &[u8], piece: usize) {
        let mut places: Vec<(Option<TcpStream>, usize)> = (0..count).map(|_| (None, 0)).collect();
        while !self.is_over() {
            for (socket, at) in &mut places {
                if !socket.as_ref().is_some_and(is_open) {
                    // First the old one goes.
                    *socket = None;
                    (*socket, *at) = (self.connect(), 0);
                }
                let Some(mut open) = socket.as_ref() else { continue };
                let rest = &bytes[*at..];
                *at += open.write(&rest[..rest.len().min(piece)]).unwrap_or(0);
            }
            std::thread::sleep(pause);
        }
    }
}

/// What it is told is of no interest, but its end.
fn is_open(mut socket: &TcpStream) -> bool {
    match socket.read(&mut [0; 4096]) {
        Ok(read) => read != 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// An attack at the door.
struct Attack {
    name: &'static str,
    strangers: fn(&Crowd<'_>),
    /// Tries before the rightful source comes.
    tries_min: usize,
}

const ATTACKS: [Attack; 9] = [
    Attack { name: "5,000 connections at once", strangers: five_thousand, tries_min: 5000 },
    Attack { name: "half-open handshakes", strangers: half_open, tries_min: 600 },
    Attack { name: "slow-loris preambles", strangers: slow_loris, tries_min: 400 },
    Attack { name: "control connections without a HELLO", strangers: callers, tries_min: 400 },
    Attack { name: "HELLOs that never end", strangers: endless_hellos, tries_min: 200 },
    Attack { name: "the longest HELLOs, refused", strangers: long_hellos, tries_min: 40 },
    Attack { name: "PINGs that nobody reads the answers of", strangers: pings, tries_min: 200_000 },
    Attack { name: "connections of other sessions", strangers: wrong_sessions, tries_min: 2000 },
    Attack { name: "oversize", strangers: oversize, tries_min: 1000 },
];

fn five_thousand(crowd: &Crowd<'_>) {
    crowd.keep_up(5000 / THREADS, Duration::from_millis(1), &[], 0);
}

/// All but the last byte of a preamble.
fn half_open(crowd: &Crowd<'_>) {
    crowd.keep_up(150, Duration::from_millis(1), &preamble(Role::Control, 0).encode()[..31], 31);
}

fn slow_loris(crowd: &Crowd<'_>) {
    crowd.keep_up(100, Duration::from_millis(100), &preamble(Role::Control, 0).encode(), 1);
}

fn callers(crowd: &Crowd<'_>) {
    crowd.keep_up(100, Duration::from_millis(1), &preamble(Role::Control, 0).encode(), 32);
}

/// A preamble, and the longest HELLO that there may be.
fn longest_hello() -> Vec<u8> {
    // No map of this guest is so long: it is refused once it is whole.
    let maps = vec![0xff; PRESENCE_MAX];
    let hello = Hello { presence: maps.clone(), dense: maps, ..hello(4096) };
    [&preamble(Role::Control, 0).encode()[..], &Message::Hello(hello).encode()].concat()
}

/// All of it but the last byte.
fn endless_hellos(crowd: &Crowd<'_>) {
    let bytes = longest_hello();
    crowd.keep_up(50, Duration::from_millis(1), &bytes[..bytes.len() - 1], bytes.len());
}

fn long_hellos(crowd: &Crowd<'_>) {
    let bytes = longest_hello();
    crowd.keep_up(10, Duration::from_millis(1), &bytes, bytes.len());
}

fn pings(crowd: &Crowd<'_>) {
    let pings: Vec<u8> = (0..2000).flat_map(|nonce| Message::Ping(nonce).encode()).collect();
    while !crowd.is_over() {
        let Some(mut socket) = crowd.connect() else { continue };
        socket.set_nonblocking(false).unwrap();
        // Without an end it would wait for ever.
        socket.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = socket.write_all(&preamble(Role::Control, 0).encode());
        while !crowd.is_over() && socket.write_all(&pings).is_ok() {
            crowd.tried(2000);
        }
    }
}

/// Streams, queries and the rest, of a session that is another's, by thousands of ids.
fn wrong_sessions(crowd: &Crowd<'_>) {
    let roles = [Role::Stream, Role::Query, Role::Resume, Role::Postcopy];
    let mut guess = 0u128;
    while !crowd.is_over() {
        for role in roles {
            guess = guess.wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645).wrapping_add(1);
            let bytes = Preamble { session: guess.to_le_bytes(), ..preamble(role, 0) }.encode();
            if let Some(mut socket) = crowd.connect() {
                socket.set_nonblocking(false).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let _ = socket.write_all(&bytes);
                let mut heard = Vec::new();
                let _ = socket.read_to_end(&mut heard);
                // Kind 7 is ATTACHED.
                assert!(!heard.starts_with(&[7]), "{heard:?}");
            }
        }
    }
}

/// First messages that say that they are of 4 GiB.
fn oversize(crowd: &Crowd<'_>) {
    let mut bytes = preamble(Role::Control, 0).encode().to_vec();
    bytes.extend_from_slice(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    bytes.resize(bytes.len() + 4096, 7);
    crowd.keep_up(50, Duration::from_millis(1), &bytes, bytes.len());
}

/// Runs an attack on a port, and `meanwhile` once it is in full swing.
fn besieged<T>(attack: &Attack, port: u16, meanwhile: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (over, tries) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _stop = Stop(&over);
        for _ in 0..THREADS {
            scope.spawn(|| (attack.strangers)(&Crowd { port, over: &over, tries: &tries }));
        }
        let deadline = Instant::now() + PATIENCE;
        while tries.load(Ordering::Relaxed) < attack.tries_min {
            assert!(Instant::now() < deadline, "{}: {tries:?} tries", attack.name);
            std::thread::sleep(Duration::from_millis(5));
        }
        meanwhile()
    })
}

#[test]
fn a_recv_serves_its_source_whoever_else_comes() {
    for attack in &ATTACKS {
        let _turn = turn();
        let job = Job::new(Image::Mixed, 8 * MIB);
        let recv = Recv::to_file(&job.to, 10);
        let watch = Watch::of(recv.ferry.id());
        besieged(attack, recv.port(), || {
            send(&recv.uri, &job.from, &["--streams", "8"]).wait().code(0);
        });
        recv.ferry.wait().code(0);
        watch.end(&format!("{}, on recv", attack.name), AT_THE_DOOR);
        job.assert_arrived();
    }
}

#[test]
fn a_vm_takes_its_guest_in_whoever_else_comes() {
    let world = World::new();
    let spec = Spec::counter().with(&["--memory", "memfd"]);
    for attack in &ATTACKS {
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let port = uri.rsplit(':').next().unwrap().parse().unwrap();
        let watch = Watch::of(destination.pid() as u32);
        besieged(attack, port, || {
            let moved = source.ctl(&["migrate", &uri]);
            assert_eq!(moved.code, Some(0), "{}: {moved:?}", attack.name);
        });
        let row = format!("{}, on vm --incoming", attack.name);
        watch.end(&row, AT_THE_DOOR);
        prove(&spec, &[&source, &destination]);
    }
}
