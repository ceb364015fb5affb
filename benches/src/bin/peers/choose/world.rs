//! A migration of an image in virtual time: streams that encode, a link, and a destination that decodes.
//!
//! Cores of a host are shared evenly by whatever wants to run. The link carries pieces of streams by turns. A stream has under way what
//! it delivers in about 50 ms, as the real one has. Nothing is random.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use pagecopy::layout::PAGE_SIZE;
use transport::source::Window;

use super::chooses::{Chooses, Did, Sent};
use super::trace::{ChunkCosts, Trace};

/// Nanoseconds of a core that a byte costs: to write it to a socket, to read it, to hash it and to bring its page in where it is placed.
/// Source: two cores, Linux 6.18, loopback, large pages; the first two for each byte of the wire, the others for each of a page.
const SEND: f64 = 0.17;
const RECEIVE: f64 = 0.15;
const HASH: f64 = 0.05;
const PLACE: f64 = 0.2;
/// The same for a frame, whatever it carries, on either side.
const FRAME: f64 = 3_000.0;
/// Bytes of a frame's header.
const HEADER: u32 = 80;
/// Chunks that a worker takes at once.
const BATCH: usize = 16;
/// Bytes of a stream that the link carries before another's turn.
const PIECE: f64 = 65_536.0;
/// Least that may be under way on a stream, in bytes, as over TCP.
const WINDOW_BYTES_MIN: u64 = 768 << 10;

/// Two hosts and what joins them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct World {
    /// From when on the link carries so many bytes in a nanosecond; the first from 0.
    pub(crate) link: Vec<(f64, f64)>,
    /// Nanoseconds from one end to the other.
    pub(crate) delay: f64,
    /// Of source and destination.
    pub(crate) cores: [f64; 2],
    /// Both run on the source's cores.
    pub(crate) same_host: bool,
    /// Threads of somebody else that always run, on either.
    pub(crate) others: [f64; 2],
    /// Streams.
    pub(crate) streams: usize,
}

impl World {
    /// Two hosts with so many cores each, and a link of so many Gbit/s.
    pub(crate) fn new(gbit: f64, streams: usize, cores: f64, round_trip_ms: f64) -> Self {
        Self {
            link: vec![(0.0, gbit / 8.0)],
            delay: round_trip_ms * 5e5,
            cores: [cores; 2],
            same_host: false,
            others: [0.0; 2],
            streams,
        }
    }
}

/// How a migration went.
#[derive(Clone, Debug, Default)]
pub(crate) struct Played {
    /// Until the last receipt.
    pub(crate) nanos: f64,
    /// Bytes that the link carried.
    pub(crate) wire: f64,
    /// Nanoseconds that either side's cores ran for it.
    pub(crate) cpu: [f64; 2],
    /// When each chunk was planned, and the way it went.
    pub(crate) ways: Vec<(f64, Option<usize>)>,
}

/// What is to happen at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    /// A frame has arrived.
    Arrival(usize, Frame),
    /// Its receipt has.
    Receipt(usize, Frame),
    /// A stream's window has become larger by itself.
    Opens(usize),
    /// The link changes.
    Link(usize),
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct At(f64, u64, Event);

impl Eq for At {}

impl PartialOrd for At {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for At {
    /// The earliest is the greatest; of two at once the one that was planned first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.total_cmp(&self.0).then(other.1.cmp(&self.1))
    }
}

/// What a chunk became.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Frame {
    bytes: f64,
    /// Nanoseconds of a core at the destination.
    work: f64,
    sent_at: f64,
}

/// What a thread at the source is about.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Idle,
    Encoding,
    /// Its frame waits for room.
    Full,
    Sending,
}

/// A stream: its two threads and what is between them.
struct Stream {
    stage: Stage,
    /// What is left of its work, in nanoseconds of a core.
    left: f64,
    batch: std::ops::Range<usize>,
    sent: Sent,
    frame: Frame,
    /// Cumulative.
    did: Did,
    encode_began: f64,
    chunk_began: f64,
    /// When its frame was made, and for how long the last one waited for room.
    full_since: f64,
    blocked: f64,
    under_way: f64,
    window: Window,
    /// Pieces for the link: bytes, and the frame that ends with it.
    pieces: VecDeque<(f64, Option<Frame>)>,
    /// At the destination.
    arrived: VecDeque<Frame>,
    receiving: Option<Frame>,
    receive_left: f64,
    peer: Did,
}

impl Stream {
    fn new(of: usize) -> Self {
        Self {
            stage: Stage::Idle,
            left: 0.0,
            batch: 0..0,
            sent: Sent::default(),
            frame: Frame::default(),
            did: Did::default(),
            encode_began: 0.0,
            chunk_began: 0.0,
            full_since: 0.0,
            blocked: 0.0,
            under_way: 0.0,
            window: Window::new(WINDOW_BYTES_MIN, of as u16, false),
            pieces: VecDeque::new(),
            arrived: VecDeque::new(),
            receiving: None,
            receive_left: 0.0,
            peer: Did::default(),
        }
    }

    fn runs(&self) -> bool {
        matches!(self.stage, Stage::Encoding | Stage::Sending)
    }

    /// How long what is before the newest frame on its way will take to arrive, beyond the time that the path takes in any case; or, where
    /// that is more, how long the last one waited for room.
    fn ahead(&self, now: f64) -> f64 {
        let before = (self.under_way - self.frame.bytes).max(0.0);
        (self.window.ahead(time(now), before as u64).as_nanos() as f64).max(self.blocked)
    }

    fn on_receipt(&mut self, now: f64, frame: Frame) {
        self.under_way -= frame.bytes;
        let idle = self.under_way < 1.0;
        self.window.on_receipt(time(now), frame.bytes as u64, time(now - frame.sent_at), idle);
    }
}

/// As the window wants it.
fn time(nanos: f64) -> Duration {
    Duration::from_nanos(nanos as u64)
}

/// Plays a migration.
pub(crate) fn play(world: &World, trace: &Trace, chooses: &mut dyn Chooses) -> Played {
    Play::new(world, trace, chooses).run()
}

struct Play<'a> {
    world: &'a World,
    chunks: &'a [ChunkCosts],
    chooses: &'a mut dyn Chooses,
    now: f64,
    next: usize,
    settled: usize,
    streams: Vec<Stream>,
    events: BinaryHeap<At>,
    planned: u64,
    rate: f64,
    /// What the link carries: whose, and how much of it is left.
    carries: Option<(usize, f64, Option<Frame>)>,
    turn: usize,
    played: Played,
}

impl<'a> Play<'a> {
    fn new(world: &'a World, trace: &'a Trace, chooses: &'a mut dyn Chooses) -> Self {
        let mut play = Self {
            world,
            chunks: &trace.chunks,
            chooses,
            now: 0.0,
            next: 0,
            settled: 0,
            streams: (0..world.streams).map(|_| Stream::new(world.streams)).collect(),
            events: BinaryHeap::new(),
            planned: 0,
            rate: world.link[0].1,
            carries: None,
            turn: 0,
            played: Played::default(),
        };
        for (step, &(at, _)) in world.link.iter().enumerate().skip(1) {
            play.plan(at, Event::Link(step));
        }
        play
    }

    fn plan(&mut self, at: f64, event: Event) {
        self.planned += 1;
        self.events.push(At(at, self.planned, event));
    }

    fn run(mut self) -> Played {
        for stream in 0..self.streams.len() {
            self.take_chunk(stream);
        }
        while self.settled < self.chunks.len() {
            self.step();
        }
        self.played.nanos = self.now;
        self.played
    }

    /// How fast a thread of either side runs.
    fn speeds(&self) -> [f64; 2] {
        let count = |of: fn(&Stream) -> bool| self.streams.iter().filter(|stream| of(stream)).count() as f64;
        let [source, destination] = [count(Stream::runs), count(|stream| stream.receiving.is_some())];
        let World { cores, others, .. } = self.world;
        let speed = |cores: f64, threads: f64| (cores / threads).min(1.0);
        if self.world.same_host {
            [speed(cores[0], source + destination + others[0]); 2]
        } else {
            [speed(cores[0], source + others[0]), speed(cores[1], destination + others[1])]
        }
    }

    /// To whatever happens next.
    fn step(&mut self) {
        let speeds = self.speeds();
        let mut least = self.events.peek().map_or(f64::MAX, |at| at.0 - self.now);
        for stream in &self.streams {
            if stream.runs() {
                least = least.min(stream.left / speeds[0]);
            }
            if stream.receiving.is_some() {
                least = least.min(stream.receive_left / speeds[1]);
            }
        }
        if let Some((_, left, _)) = self.carries {
            least = least.min(left / self.rate);
        }
        assert!(least < f64::MAX, "nothing happens any more");
        let passed = least.max(0.0);
        self.now += passed;
        for stream in &mut self.streams {
            let runs = stream.runs();
            pass(&mut stream.did, &mut stream.left, runs, passed, speeds[0]);
            pass(&mut stream.peer, &mut stream.receive_left, stream.receiving.is_some(), passed, speeds[1]);
        }
        self.carry(passed);
        for stream in 0..self.streams.len() {
            if self.streams[stream].runs() && self.streams[stream].left <= 1e-3 {
                self.worked(stream);
            }
            if self.streams[stream].receive_left <= 1e-3 {
                self.received(stream);
            }
        }
        while self.events.peek().is_some_and(|at| at.0 <= self.now + 1e-3) {
            let Some(At(_, _, event)) = self.events.pop() else { break };
            self.happen(event);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrival(stream, frame) => {
                self.streams[stream].arrived.push_back(frame);
                self.receive(stream);
            }
            Event::Receipt(stream, frame) => {
                let now = self.now;
                self.settled += 1;
                self.streams[stream].on_receipt(now, frame);
                self.launch(stream);
            }
            Event::Opens(stream) => self.launch(stream),
            Event::Link(step) => self.rate = self.world.link[step].1,
        }
    }

    /// Some time passes on the link.
    fn carry(&mut self, passed: f64) {
        if let Some((stream, left, frame)) = &mut self.carries {
            *left -= passed * self.rate;
            if *left > 1e-3 {
                return;
            }
            let (stream, frame) = (*stream, *frame);
            self.carries = None;
            if let Some(frame) = frame {
                self.plan(self.now + self.world.delay, Event::Arrival(stream, frame));
            }
        }
        let count = self.streams.len();
        for step in 0..count {
            let stream = (self.turn + step) % count;
            if let Some((bytes, frame)) = self.streams[stream].pieces.pop_front() {
                self.carries = Some((stream, bytes, frame));
                self.turn = stream + 1;
                return;
            }
        }
    }

    /// A thread at the source has done what it was about.
    fn worked(&mut self, stream: usize) {
        match self.streams[stream].stage {
            Stage::Encoding => self.encoded(stream),
            Stage::Sending => self.sent(stream),
            Stage::Idle | Stage::Full => {}
        }
    }

    fn take_chunk(&mut self, stream: usize) {
        let now = self.now;
        let this = &mut self.streams[stream];
        if this.batch.is_empty() {
            let end = self.chunks.len().min(self.next + BATCH);
            this.batch = self.next..end;
            self.next = end;
        }
        let Some(at) = this.batch.next() else {
            this.stage = Stage::Idle;
            return;
        };
        let chunk = &self.chunks[at];
        let sent = self.chooses.plan(stream, chunk, this.ahead(now));
        self.played.ways.push((now, sent.way));
        (this.stage, this.sent, this.encode_began) = (Stage::Encoding, sent, now);
        this.left = f64::from(chunk.scan) + sent.encode + sent.tried;
        let logical = f64::from(chunk.full()) * PAGE_SIZE as f64;
        this.frame = Frame {
            bytes: f64::from(sent.bytes + HEADER),
            work: FRAME + f64::from(sent.bytes + HEADER) * RECEIVE + sent.decode + logical * (HASH + PLACE),
            sent_at: 0.0,
        };
        self.played.cpu[0] += this.left;
    }

    fn encoded(&mut self, stream: usize) {
        let this = &mut self.streams[stream];
        (this.stage, this.full_since) = (Stage::Full, self.now);
        let took = self.now - this.encode_began;
        self.chooses.encoded(stream, &this.sent, took);
        self.launch(stream);
    }

    /// Sends a frame that waits for room, if there is some.
    fn launch(&mut self, stream: usize) {
        let now = self.now;
        let this = &mut self.streams[stream];
        if this.stage != Stage::Full {
            return;
        }
        if this.under_way > 0.0 && this.under_way + this.frame.bytes > this.window.limit(time(now)) as f64 {
            if let Some(opens) = this.window.opens_in(time(now)) {
                self.plan(now + opens.as_nanos() as f64 + 1.0, Event::Opens(stream));
            }
            return;
        }
        if this.under_way < 1.0 {
            this.window.restart(time(now));
        }
        this.frame.sent_at = now;
        this.blocked = now - this.full_since;
        this.under_way += this.frame.bytes;
        (this.stage, this.left) = (Stage::Sending, FRAME + this.frame.bytes * SEND);
        self.played.cpu[0] += this.left;
    }

    fn sent(&mut self, stream: usize) {
        let now = self.now;
        let this = &mut self.streams[stream];
        let mut left = this.frame.bytes;
        while left > PIECE {
            this.pieces.push_back((PIECE, None));
            left -= PIECE;
        }
        this.pieces.push_back((left, Some(this.frame)));
        self.played.wire += this.frame.bytes;
        this.did.now = now;
        this.peer.now = now;
        let passed = now - this.chunk_began;
        this.chunk_began = now;
        self.chooses.sent(stream, passed, (this.did, this.peer));
        if self.carries.is_none() {
            self.carry(0.0);
        }
        self.take_chunk(stream);
    }

    /// The next frame that has arrived, if there is one.
    fn receive(&mut self, stream: usize) {
        let this = &mut self.streams[stream];
        if this.receiving.is_none()
            && let Some(frame) = this.arrived.pop_front()
        {
            (this.receiving, this.receive_left) = (Some(frame), frame.work);
        }
    }

    fn received(&mut self, stream: usize) {
        if let Some(frame) = self.streams[stream].receiving.take() {
            self.played.cpu[1] += frame.work;
            self.plan(self.now + self.world.delay, Event::Receipt(stream, frame));
            self.receive(stream);
        }
    }
}

/// Some time passes for a thread.
fn pass(did: &mut Did, left: &mut f64, runs: bool, passed: f64, speed: f64) {
    if runs {
        *left -= passed * speed;
        did.worked += passed * speed;
        did.ready += passed * (1.0 - speed);
    }
}

/// The least time that any choice could take, in nanoseconds, also one that knows all chunks ahead: neither the cores of a side, nor its
/// threads, nor the link can do more than they have time for. By weights for the three, of which any give a bound from below.
pub(crate) fn bound(world: &World, trace: &Trace) -> f64 {
    const STEPS: u32 = 20;
    const ONE_IN: usize = 7;
    let rate = world.link[0].1;
    let threads = world.streams as f64;
    let parallel = |cores: f64| cores.min(threads);
    let [source, destination] = [parallel(world.cores[0]), parallel(world.cores[1])];
    let work = |chunk: &ChunkCosts, way: Option<usize>| {
        let sent = Sent::new(chunk, way, None);
        let bytes = f64::from(sent.bytes + HEADER);
        let full = f64::from(chunk.full()) * PAGE_SIZE as f64;
        let encode = f64::from(chunk.scan) + sent.encode + 2.0 * FRAME + bytes * SEND;
        let decode = FRAME + bytes * RECEIVE + sent.decode + full * (HASH + PLACE);
        if world.same_host {
            // Both share the cores; either also has no more threads than there are.
            [(encode + decode) / world.cores[0].min(2.0 * threads), bytes / rate, encode / threads]
        } else {
            [encode / source, bytes / rate, decode / destination]
        }
    };
    let ways = |chunk: &ChunkCosts| {
        let compressed = (0..chunk.costs.len()).map(Some);
        [None].into_iter().chain(compressed).map(|way| work(chunk, way)).collect::<Vec<_>>()
    };
    let some: Vec<_> = trace.chunks.iter().step_by(ONE_IN).map(ways).collect();
    let scale = trace.chunks.len() as f64 / some.len().max(1) as f64;
    let mut best: f64 = 0.0;
    for first in 0..=STEPS {
        for second in 0..=STEPS - first {
            let weights = [first, second, STEPS - first - second].map(|w| f64::from(w) / f64::from(STEPS));
            let weigh = |work: &[f64; 3]| work.iter().zip(&weights).map(|(w, by)| w * by).sum::<f64>();
            let least = |ways: &Vec<[f64; 3]>| ways.iter().map(weigh).fold(f64::MAX, f64::min);
            best = best.max(some.iter().map(least).sum());
        }
    }
    best * scale
}

#[cfg(test)]
mod tests {
    use super::super::chooses::Fixed;
    use super::super::synthetic;
    use super::*;

    /// What limits decides how long it takes.
    #[test]
    fn a_migration_takes_what_limits_it() {
        let trace = synthetic(400, 0.4);
        let bytes = 400.0 * 262_144.0;
        let near = |got: f64, wanted: f64| (got / wanted - 1.0).abs() < 0.05;
        let world = World::new(1.0, 2, 8.0, 1.0);
        let raw = play(&world, &trace, &mut Fixed(None));
        assert!(near(raw.nanos, bytes / 0.125), "{raw:?}");
        let shrunk = play(&world, &trace, &mut Fixed(Some(6)));
        assert!(near(shrunk.nanos, raw.nanos * shrunk.wire / raw.wire), "{}", shrunk.nanos);
        // One thread, which encodes and writes.
        let fast = World::new(100.0, 1, 8.0, 0.1);
        let alone = play(&fast, &trace, &mut Fixed(Some(6)));
        assert!(near(alone.nanos, alone.cpu[0]), "{} of {}", alone.nanos, alone.cpu[0]);
        // As many as there are cores, and others that want them, too.
        let two = play(&World { streams: 8, cores: [2.0; 2], ..fast.clone() }, &trace, &mut Fixed(Some(6)));
        assert!(near(two.nanos * 2.0, alone.nanos), "{} {}", two.nanos, alone.nanos);
        let shared = World { streams: 2, cores: [2.0; 2], others: [2.0, 0.0], ..fast };
        let shared = play(&shared, &trace, &mut Fixed(Some(6)));
        assert!(near(shared.nanos, alone.nanos), "{} {}", shared.nanos, alone.nanos);
    }

    #[test]
    fn a_link_that_changes_carries_as_much_as_it_says() {
        let trace = synthetic(400, 0.4);
        let world = World { link: vec![(0.0, 0.125), (400e6, 1.25)], ..World::new(1.0, 4, 8.0, 1.0) };
        let raw = play(&world, &trace, &mut Fixed(None));
        let wanted = 400e6 + (400.0 * 262_144.0 - 50e6) / 1.25;
        assert!((raw.nanos / wanted - 1.0).abs() < 0.05, "{} of {wanted}", raw.nanos);
    }

    #[test]
    fn nothing_is_faster_than_the_bound() {
        let trace = synthetic(400, 0.4);
        for gbit in [0.1, 1.0, 5.0, 25.0] {
            for same_host in [false, true] {
                let world = World { same_host, ..World::new(gbit, 4, 2.0, 1.0) };
                let bound = bound(&world, &trace);
                let best = Fixed::all().map(|(_, mut one)| play(&world, &trace, &mut one).nanos);
                let best = best.fold(f64::MAX, f64::min);
                assert!((0.5..1.02).contains(&(bound / best)), "{gbit} Gbit/s: {bound} of {best}");
            }
        }
    }
}
