//! A source that has the session of a destination, and breaks it: the destination ends with an error, or the stream does.

use std::ffi::OsStr;
use std::io::Write;
use std::time::{Duration, Instant};

use pageferry::pagecopy::digest::PageHasher;
use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::{
    ChunkRun, Hello, MISSING_RUNS_MAX, Message, STATE_BLOBS_MAX, STATE_LEN_MAX, Totals, capability,
};
use pageferry::vmm_shim::vmm;
use testkit::PATIENCE;

use super::{IN_THE_SESSION, IN_THE_SESSION_UNDER_TLS, Watch};
use crate::common::raw::{Door, Peer, SEED, hello, preamble};
use crate::common::secure::{self, PROOF_LEN};
use crate::common::{Ferry, Image, Job, MIB, Recv, turn};
use crate::lab::Keys;
use crate::to_destination::{bad_frames, encoded_frame, raw_frame};
use crate::vm::have_kvm;

/// `--link-timeout` of the destinations here.
const TIMEOUT: u64 = 2;
/// How long an attack goes on that is not ended by the destination.
const LONG: Duration = Duration::from_secs(3);
/// Memory of the guest.
const GUEST: u64 = 64 << 20;

/// What the attacker has.
struct Held {
    door: Door,
    /// Of the session, under TLS.
    key: Option<[u8; PROOF_LEN]>,
    control: Peer,
}

/// What the attacker says that it brings.
fn offer(live: bool) -> Hello {
    let capabilities = capability::ALL;
    let all = Hello { capabilities, streams: 256, reconnect_ms: 60_000, ..hello(GUEST) };
    let pieces = vec![0xff; (GUEST >> 24) as usize];
    if !live {
        return Hello { presence: pieces, ..all };
    }
    let machine = format!("{} cpus=1", if have_kvm() { "kvm" } else { "process" });
    Hello { live, machine, regions: vmm::layout(GUEST).unwrap().regions().to_vec(), presence: pieces, ..all }
}

impl Held {
    /// A connection of the session.
    fn open(&self, role: Role, id: u16) -> Option<Peer> {
        let mut peer = self.door.try_connect().ok()?;
        peer.begin(&preamble(role, id), self.key.as_ref());
        Some(peer)
    }

    /// A stream of the session that may send frames; `None` where it is refused.
    fn stream(&self, id: u16) -> Option<Peer> {
        let mut peer = self.open(Role::Stream, id)?;
        matches!(peer.receive(), Some(Message::Attached { .. })).then_some(peer)
    }

    /// Writes the same over and over, without reading, until the destination has had enough; or for a long time.
    fn flood(&mut self, bytes: &[u8]) {
        let begun = Instant::now();
        self.control.socket.set_write_timeout(Some(LONG)).unwrap();
        while begun.elapsed() < 2 * LONG && self.control.socket.write_all(bytes).is_ok() {}
    }
}

/// An attack from within.
struct Attack {
    name: &'static str,
    run: fn(&mut Held),
    /// For guests that run alone.
    live: bool,
    /// One of these is why the destination ends.
    words: &'static [&'static str],
}

const GONE: &[&str] = &["the source is gone", "lost", "closed", "broke"];

const ATTACKS: [Attack; 12] = [
    Attack { name: "oversize, overlap, out of region", run: bad, live: false, words: GONE },
    Attack { name: "zip bombs in every codec", run: bombs, live: false, words: GONE },
    Attack {
        name: "a STATE that never ends",
        run: endless_state,
        live: false,
        words: &["nothing was heard", "slowly"],
    },
    Attack { name: "STATE upon STATE", run: states, live: false, words: &["STATE while"] },
    Attack { name: "a STATE of the most pieces", run: pieces, live: false, words: &["differs", "STATE"] },
    Attack { name: "256 streams with half a frame each", run: halves, live: false, words: GONE },
    Attack { name: "streams in place of streams", run: incarnations, live: false, words: GONE },
    Attack {
        name: "STREAM_LOST, answers never read",
        run: lost,
        live: false,
        words: &["floods", "taken", "timed out", "gone"],
    },
    Attack { name: "PINGs, answers never read", run: pings, live: false, words: &["taken", "gone", "broke"] },
    Attack { name: "RESUME upon RESUME", run: resumes, live: false, words: GONE },
    Attack { name: "queries, answers never read", run: queries, live: false, words: GONE },
    Attack { name: "MISSING without end", run: missing, live: true, words: GONE },
];

/// Sends bad frames, each on a stream of its own, which ends.
fn send_bad(held: &mut Held, frames: &[Vec<u8>]) {
    for frame in frames {
        let mut stream = held.stream(0).expect("the one before has ended");
        stream.write(frame);
        match held.control.receive() {
            Some(Message::StreamStopped { reason, .. }) => assert!(!reason.is_empty()),
            other => panic!("{other:?}"),
        }
        assert!(stream.receive().is_none(), "the stream is closed");
    }
}

fn bad(held: &mut Held) {
    // Without the last, which is the rest of a frame that never comes, and others that are of this size of guest in order.
    let beyond = ["beyond the region", "not all of them were sent", "in the middle", "chunk"];
    let frames = bad_frames(&PageHasher::new(SEED)).into_iter();
    let frames: Vec<Vec<u8>> =
        frames.filter(|(_, words)| !beyond.contains(words)).map(|(bytes, _)| bytes).collect();
    assert!(frames.len() > 15);
    for _ in 0..4 {
        send_bad(held, &frames);
    }
}

/// A zstd frame that is blocks of one byte each, 128 KiB long: a bomb of a factor of 32,768.
pub(super) fn bomb(header: &[u8], blocks: usize) -> Vec<u8> {
    let mut bytes = [&b"\x28\xb5\x2f\xfd"[..], header].concat();
    for block in 0..blocks {
        let head = u32::from(block + 1 == blocks) | 1 << 1 | (128 << 10) << 3;
        bytes.extend_from_slice(&head.to_le_bytes()[..3]);
        bytes.push(b'a');
    }
    bytes
}

fn bombs(held: &mut Held) {
    let hasher = PageHasher::new(SEED);
    let content = |bytes: u64| [&[0xe0][..], &bytes.to_le_bytes()].concat();
    let mut sections = Vec::new();
    // 8 GiB that say so, that say they are a page, that say nothing; a window of 3.75 TiB; a page and then 8 GiB.
    for header in [content(8 << 30), content(4096), vec![0x00, 0x00], vec![0x00, 0xff], content(u64::MAX)] {
        sections.push((0, 1, bomb(&header, 60_000)));
    }
    sections.push((0, 1, [bomb(&content(4096), 1), bomb(&content(8 << 30), 50_000)].concat()));
    sections.push((0, u64::MAX, bomb(&content(8 << 30), 60_000)));
    // Deltas: a run of zeros beyond the page, over and over, and one of bytes that are not there.
    sections.push((u64::MAX, 0, [0xff, 0x7f, 0xff, 0x7f].repeat(60_000)));
    sections.push((u64::MAX, 0, vec![0xff; 200_000]));
    sections.push((1, 0, [2u16.to_le_bytes().to_vec(), vec![0x80; 100_000]].concat()));
    let frames: Vec<Vec<u8>> = sections
        .iter()
        .map(|(delta, zstd, section)| encoded_frame(*delta, *zstd, section, &hasher))
        .collect();
    for _ in 0..10 {
        send_bad(held, &frames);
    }
}

/// The header of a message that says how long it is.
fn head(kind: u16, len: usize) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0, 0], &(len as u32).to_le_bytes()].concat()
}

fn endless_state(held: &mut Held) {
    held.control.write(&head(10, STATE_LEN_MAX));
    held.control.write(&vec![0; STATE_LEN_MAX - (1 << 20)]);
    held.expect_end();
}

fn blobs(count: usize, bytes: usize) -> Message {
    let blob = |n: usize| pageferry::backend::StateBlob {
        name: format!("piece/{n}"),
        version: 1,
        bytes: vec![n as u8; bytes],
    };
    Message::State((0..count).map(blob).collect())
}

fn states(held: &mut Held) {
    let state = blobs(1, STATE_LEN_MAX - 100).encode();
    for _ in 0..8 {
        held.control.write(&state);
    }
    held.expect_end();
}

fn pieces(held: &mut Held) {
    held.control.send(&blobs(STATE_BLOBS_MAX, 16_000));
    held.control.send(&Message::Finish(Totals { streams: vec![], pages: 0, state: 1 }));
    held.expect_end();
}

fn halves(held: &mut Held) {
    let hasher = PageHasher::new(SEED);
    let section = vec![9; 200_000];
    let mut streams = Vec::new();
    for id in 0..256 {
        let mut stream = held.stream(id).expect("as many were agreed on");
        let frame = encoded_frame(0, u64::MAX, &section, &hasher);
        stream.write(&frame[..frame.len() - 1]);
        streams.push(stream);
    }
    for _ in 0..256 {
        assert!(matches!(held.control.receive(), Some(Message::StreamStopped { .. })));
    }
}

/// Each takes the place of the one before.
fn incarnations(held: &mut Held) {
    let hasher = PageHasher::new(SEED);
    let mut streams = Vec::new();
    for id in 0..=255u16 {
        let mut stream = held.stream(id << 8).expect("it is a later one");
        stream.write(&raw_frame(0, 0, u64::MAX).encode(&hasher));
        streams.push(stream);
    }
}

fn lost(held: &mut Held) {
    let bytes: Vec<u8> = (0..1000).flat_map(|stream| Message::StreamLost { stream }.encode()).collect();
    held.flood(&bytes);
}

fn pings(held: &mut Held) {
    let bytes: Vec<u8> = (0..1000).flat_map(|nonce| Message::Ping(nonce).encode()).collect();
    held.flood(&bytes);
}

fn resumes(held: &mut Held) {
    let mut peers = Vec::new();
    for epoch in 1..1000 {
        let mut peer = held.open(Role::Resume, 0).expect("it is the session's");
        peer.send(&Message::Resume { epoch });
        peers.push(peer);
    }
}

/// As fast as they are taken, for less than the time-out.
fn queries(held: &mut Held) {
    let begun = Instant::now();
    let queries = Message::Query.encode().repeat(1000);
    let mut peers = Vec::new();
    while begun.elapsed() < Duration::from_secs(TIMEOUT) / 2 {
        let Some(mut peer) = held.open(Role::Query, 0) else { break };
        peer.socket.socket().set_nonblocking(true).unwrap();
        peer.write(&queries);
        peers.push(peer);
        if peers.len() > 2000 {
            peers.clear();
        }
    }
}

fn missing(held: &mut Held) {
    held.control.send(&Message::Postcopy);
    match held.control.receive() {
        Some(Message::PostcopyReady { .. }) => {}
        // No postcopy on this host: the session is over.
        _ => return println!("skipped: no postcopy here"),
    }
    let run = |n: usize| ChunkRun { first: n as u32 % 256, count: 256, pages: u64::MAX };
    held.flood(&Message::Missing((0..MISSING_RUNS_MAX).map(run).collect()).encode());
}

impl Held {
    /// The destination ends the session.
    fn expect_end(&mut self) {
        // PINGs are not answered.
        let _ = std::io::copy(&mut self.control.socket, &mut std::io::sink());
    }
}

/// A destination of one of the two kinds, and what it is named by.
fn destination(live: bool, job: &Job, keys: Option<&Keys>) -> (Recv, &'static str) {
    let timeout = TIMEOUT.to_string();
    let mut common = vec!["--link-timeout", &timeout, "--reconnect-timeout", "3"];
    common.extend(keys.iter().flat_map(|keys| ["--tls-dir", keys.text()]));
    if !live {
        let file = [OsStr::new("--ram-file"), job.to.as_os_str()];
        let args = common.iter().map(OsStr::new).chain(file);
        return (Recv::start("tcp:127.0.0.1:0", args), "recv");
    }
    let api = format!("unix:{}", job.folder.path().join("api").display());
    let mut args =
        vec!["vm", "--mem", "64M", "--memory", "memfd", "--api", &api, "--incoming", "tcp:127.0.0.1:0"];
    args.extend(common);
    if !have_kvm() {
        args.push("--no-kvm");
    }
    (Recv::of(Ferry::start(args)), "vm --incoming")
}

#[test]
fn a_source_that_breaks_its_session_loses_it() {
    let keys = Keys::good();
    for attack in &ATTACKS {
        // Under TLS on one kind of destination: what the other has besides is not about connections.
        let ways = [(false, None), (true, None), (attack.live, Some(&keys))];
        for (live, keys) in ways.into_iter().filter(|&(live, _)| live || !attack.live) {
            let _turn = turn();
            let job = Job::new(Image::Zero, MIB);
            let (recv, name) = destination(live, &job, keys);
            let watch = Watch::of(recv.ferry.id());
            let door = Door { port: recv.port(), tls: keys.map(|keys| secure::client(keys.path(), true)) };
            let (control, key) = door.open_session(offer(live));
            let mut held = Held { door, key, control };
            (attack.run)(&mut held);
            drop(held);
            let under = if keys.is_some() { ", under TLS" } else { "" };
            let row = format!("{}, on {name}{under}", attack.name);
            let ended = recv.ferry.wait_for(PATIENCE);
            watch.end(&row, if keys.is_some() { IN_THE_SESSION_UNDER_TLS } else { IN_THE_SESSION });
            assert_eq!(ended.code, Some(1), "{row}: {ended:?}");
            ended.says(attack.words);
        }
    }
}
