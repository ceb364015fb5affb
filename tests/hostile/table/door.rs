//! Whoever reaches the port of a destination and has no session: it costs little, and keeps no rightful source out.

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pageferry::transport::wire::control::{Hello, Message, PRESENCE_MAX};
use pageferry::transport::wire::{Preamble, Role};
use rustls::ClientConfig;
use testkit::PATIENCE;

use super::{AT_THE_DOOR, Watch};
use crate::common::raw::{Door, hello, preamble};
use crate::common::secure::{self, PROOF_LEN, Wire};
use crate::common::{Image, Job, MIB, Recv, send, turn};
use crate::lab::Keys;
use crate::vm::{Spec, World, prove};

/// Threads of the strangers.
const THREADS: usize = 4;

/// One thread of strangers.
#[derive(Clone)]
struct Crowd<'a> {
    door: Door,
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

    /// The same without shaking hands.
    fn below_tls(&self) -> Self {
        Self { door: Door::plain(self.door.port), ..self.clone() }
    }

    /// What the library would say first.
    fn client_hello(&self) -> Vec<u8> {
        secure::client_hello(self.door.tls.as_ref().expect("it is an attack on TLS"))
    }

    /// A connection that does not wait.
    fn connect(&self) -> Option<Wire> {
        let wire = self.door.try_connect().ok()?.socket;
        wire.socket().set_nonblocking(true).ok()?;
        self.tried(1);
        Some(wire)
    }

    /// One that waits, but not for ever.
    fn connect_patiently(&self) -> Option<Wire> {
        let wire = self.connect()?;
        wire.socket().set_nonblocking(false).ok()?;
        wire.socket().set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        wire.set_write_timeout(Some(Duration::from_secs(5))).ok()?;
        Some(wire)
    }

    /// Keeps so many connections up, each of which has a script: bytes that are written in pieces, one a turn.
    fn keep_up(&self, count: usize, pause: Duration, bytes: &[u8], piece: usize) {
        let mut places: Vec<(Option<Wire>, usize)> = (0..count).map(|_| (None, 0)).collect();
        while !self.is_over() {
            for (wire, at) in &mut places {
                if !wire.as_mut().is_some_and(is_open) {
                    // First the old one goes.
                    *wire = None;
                    (*wire, *at) = (self.connect(), 0);
                }
                if self.is_over() {
                    break;
                }
                let Some(open) = wire.as_mut() else { continue };
                let rest = &bytes[*at..];
                *at += open.write(&rest[..rest.len().min(piece)]).unwrap_or(0);
            }
            std::thread::sleep(pause);
        }
    }
}

/// What it is told is of no interest, but its end.
fn is_open(wire: &mut Wire) -> bool {
    match wire.read(&mut [0; 4096]) {
        Ok(read) => read != 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// An attack at the door.
struct Attack {
    name: &'static str,
    strangers: fn(&Crowd<'_>),
    /// Tries before the rightful source comes: over plain connections, and under TLS. 0: it is not tried there.
    tries_min: [usize; 2],
}

const ATTACKS: [Attack; 17] = [
    Attack { name: "5,000 connections at once", strangers: five_thousand, tries_min: [5000, 0] },
    Attack { name: "half-open handshakes", strangers: half_open, tries_min: [600, 0] },
    Attack { name: "slow-loris preambles", strangers: slow_loris, tries_min: [400, 400] },
    Attack { name: "control connections without a HELLO", strangers: callers, tries_min: [400, 400] },
    Attack { name: "HELLOs that never end", strangers: endless_hellos, tries_min: [200, 200] },
    Attack { name: "the longest HELLOs, refused", strangers: long_hellos, tries_min: [40, 40] },
    Attack {
        name: "PINGs that nobody reads the answers of",
        strangers: pings,
        tries_min: [200_000, 100_000],
    },
    Attack { name: "connections of other sessions", strangers: wrong_sessions, tries_min: [2000, 500] },
    Attack { name: "oversize", strangers: oversize, tries_min: [1000, 400] },
    Attack { name: "half-open TLS handshakes", strangers: half_shaken, tries_min: [0, 600] },
    Attack { name: "ClientHellos byte by byte", strangers: slow_shakers, tries_min: [0, 400] },
    Attack { name: "ClientHellos in records of a byte", strangers: crumbs, tries_min: [0, 400] },
    Attack { name: "records of 64 KiB", strangers: long_records, tries_min: [0, 1000] },
    Attack { name: "handshake messages of 16 MiB", strangers: long_shakers, tries_min: [0, 1000] },
    Attack { name: "garbage in place of a ClientHello", strangers: garbage, tries_min: [0, 1000] },
    Attack { name: "keys renewed without end", strangers: renewals, tries_min: [0, 20_000] },
    Attack { name: "handshakes begun anew in mid connection", strangers: again, tries_min: [0, 400] },
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
        let Some(mut socket) = crowd.connect_patiently() else { continue };
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
            if let Some(mut socket) = crowd.connect_patiently() {
                // Whoever knows no session has no key of it either.
                let proof = vec![guess as u8; if crowd.door.tls.is_some() { PROOF_LEN } else { 0 }];
                let _ = socket.write_all(&[&bytes[..], &proof].concat());
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

/// The first words, and no more: the destination has answered, and waits.
fn half_shaken(crowd: &Crowd<'_>) {
    let hello = crowd.client_hello();
    crowd.below_tls().keep_up(150, Duration::from_millis(1), &hello, hello.len());
}

fn slow_shakers(crowd: &Crowd<'_>) {
    crowd.below_tls().keep_up(100, Duration::from_millis(100), &crowd.client_hello(), 1);
}

/// All but the last byte, each in a record of its own.
fn crumbs(crowd: &Crowd<'_>) {
    let hello = crowd.client_hello();
    let (head, message) = hello.split_at(5);
    let records: Vec<u8> = message.iter().flat_map(|byte| [head[0], head[1], head[2], 0, 1, *byte]).collect();
    let most = records.len() - 6;
    crowd.below_tls().keep_up(100, Duration::from_millis(1), &records[..most], 600);
}

fn long_records(crowd: &Crowd<'_>) {
    let bytes = [&[22, 3, 1, 0xff, 0xff][..], &[1; 0xffff]].concat();
    crowd.below_tls().keep_up(50, Duration::from_millis(1), &bytes, bytes.len());
}

/// In full records, of which each is fine by itself.
fn long_shakers(crowd: &Crowd<'_>) {
    let mut bytes = vec![22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    bytes.resize(5 + 0x4000, 0);
    for _ in 0..64 {
        bytes.extend_from_slice(&[22, 3, 3, 0x40, 0]);
        bytes.resize(bytes.len() + 0x4000, 0);
    }
    crowd.below_tls().keep_up(50, Duration::from_millis(1), &bytes, bytes.len());
}

/// Of every kind by turns: what was said once to other servers, and what was never said to any.
fn garbage(crowd: &Crowd<'_>) {
    let words: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-x\r\n",
        &[22, 3, 1, 0, 4, 0xff, 1, 2, 3],
        &[0x80; 40],
        &[0; 500],
    ];
    for turn in (0..words.len()).cycle() {
        if crowd.is_over() {
            return;
        }
        let Some(mut socket) = crowd.below_tls().connect_patiently() else { continue };
        let _ = socket.write_all(words[turn]);
        let _ = socket.read(&mut [0; 512]);
    }
}

/// Whoever may come in asks for new keys, over and over, and reads none of the answers.
fn renewals(crowd: &Crowd<'_>) {
    while !crowd.is_over() {
        let Some(mut socket) = crowd.connect_patiently() else { continue };
        let _ = socket.write_all(&preamble(Role::Control, 0).encode());
        // The library bears 32 in a row.
        while !crowd.is_over()
            && (0..16).all(|_| socket.renew_keys().is_ok())
            && socket.write_all(&Message::Ping(7).encode()).is_ok()
        {
            crowd.tried(16);
        }
    }
}

/// The first words of a handshake once more, where another one is over.
fn again(crowd: &Crowd<'_>) {
    let hello = crowd.client_hello();
    while !crowd.is_over() {
        let Some(mut socket) = crowd.connect_patiently() else { continue };
        let _ = socket.write_all(&preamble(Role::Control, 0).encode());
        for _ in 0..10 {
            let _ = socket.socket().write_all(&hello);
        }
        let _ = std::io::copy(&mut socket, &mut std::io::sink());
    }
}

/// Runs an attack on a port, and `meanwhile` once it is in full swing.
fn besieged<T>(attack: &Attack, door: &Door, meanwhile: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (over, tries) = (AtomicBool::new(false), AtomicUsize::new(0));
    let tries_min = attack.tries_min[usize::from(door.tls.is_some())];
    std::thread::scope(|scope| {
        let _stop = Stop(&over);
        for _ in 0..THREADS {
            scope.spawn(|| (attack.strangers)(&Crowd { door: door.clone(), over: &over, tries: &tries }));
        }
        let deadline = Instant::now() + PATIENCE;
        while tries.load(Ordering::Relaxed) < tries_min {
            assert!(Instant::now() < deadline, "{}: {tries:?} tries", attack.name);
            std::thread::sleep(Duration::from_millis(5));
        }
        meanwhile()
    })
}

/// How the strangers of a row connect, and the rightful source does.
struct Rows<'a> {
    keys: Option<&'a Keys>,
    tls: Option<Arc<ClientConfig>>,
}

impl<'a> Rows<'a> {
    fn new(keys: Option<&'a Keys>) -> Self {
        Self { keys, tls: keys.map(|keys| secure::client(keys.path(), true)) }
    }

    /// Those that are tried so.
    fn attacks(&self) -> impl Iterator<Item = &'static Attack> {
        let way = usize::from(self.tls.is_some());
        ATTACKS.iter().filter(move |attack| attack.tries_min[way] != 0)
    }

    /// What both sides of the rightful session are told.
    fn args(&self) -> Vec<&'a str> {
        self.keys.iter().flat_map(|keys| ["--tls-dir", keys.text()]).collect()
    }

    fn name(&self, attack: &Attack, attacked: &str) -> String {
        format!("{}, on {attacked}{}", attack.name, if self.tls.is_some() { ", under TLS" } else { "" })
    }
}

fn serves_its_source(rows: &Rows<'_>) {
    for attack in rows.attacks() {
        let _turn = turn();
        let job = Job::new(Image::Mixed, 8 * MIB);
        let file = job.to.to_str().unwrap();
        let args = [&["--json", "--link-timeout", "10", "--ram-file", file][..], &rows.args()].concat();
        let recv = Recv::start("tcp:127.0.0.1:0", args);
        let watch = Watch::of(recv.ferry.id());
        besieged(attack, &Door { port: recv.port(), tls: rows.tls.clone() }, || {
            let args = [&["--streams", "8"][..], &rows.args()].concat();
            send(&recv.uri, &job.from, &args).wait().code(0);
        });
        recv.ferry.wait().code(0);
        watch.end(&rows.name(attack, "recv"), AT_THE_DOOR);
        job.assert_arrived();
    }
}

#[test]
fn a_recv_serves_its_source_whoever_else_comes() {
    serves_its_source(&Rows::new(None));
}

#[test]
fn a_recv_under_tls_serves_its_source_whoever_else_comes() {
    serves_its_source(&Rows::new(Some(&Keys::good())));
}

fn takes_its_guest_in(rows: &Rows<'_>) {
    let world = World::new();
    let spec = Spec::counter().with(&["--memory", "memfd"]).with(&rows.args());
    for attack in rows.attacks() {
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let port = uri.rsplit(':').next().unwrap().parse().unwrap();
        let watch = Watch::of(destination.pid() as u32);
        besieged(attack, &Door { port, tls: rows.tls.clone() }, || {
            let moved = source.ctl(&[&["migrate", &*uri][..], &rows.args()].concat());
            assert_eq!(moved.code, Some(0), "{}: {moved:?}", attack.name);
        });
        watch.end(&rows.name(attack, "vm --incoming"), AT_THE_DOOR);
        prove(&spec, &[&source, &destination]);
    }
}

#[test]
fn a_vm_takes_its_guest_in_whoever_else_comes() {
    takes_its_guest_in(&Rows::new(None));
}

#[test]
fn a_vm_under_tls_takes_its_guest_in_whoever_else_comes() {
    takes_its_guest_in(&Rows::new(Some(&Keys::good())));
}
