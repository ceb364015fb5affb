//! The choice where source and destination share the cores, with a link between them that is fast or slow.

use std::collections::VecDeque;

use super::*;

/// Time goes by in such steps, in nanoseconds.
const STEP: f64 = 20e3;

/// What the chooser is told has arrived.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    /// What has a receipt.
    Receipted,
    /// What was written, buffers or not.
    Written,
}

/// One of some equal pairs of a source's worker and a destination's, and their part of the cores and of the link.
struct Pair {
    chooser: Chooser,
    told: Told,
    /// Cores for the two.
    cores: f64,
    /// Bytes per nanosecond, and how many are taken in between before the source has to wait.
    link: f64,
    buffer: f64,
    /// What the destination runs for a byte of memory, and for one that was compressed besides, in nanoseconds.
    place: f64,
    decode: f64,
    /// How the data shrinks, against the assumed.
    out_factor: f64,
    now: f64,
    /// Frames under way: wire bytes that did not arrive yet, what placing them takes yet, wire bytes.
    flight: VecDeque<(f64, f64, f64)>,
    written: f64,
    receipted: f64,
    /// What the source's worker did.
    worked: f64,
    ready: f64,
    chunks: u32,
    compressed: u32,
}

impl Pair {
    fn new(mode: CodecMode, link: f64, buffer: f64) -> Self {
        Self {
            // As a source of four streams does on two cores.
            chooser: Chooser::new(mode).sharing(4, 2, true),
            told: Told::Receipted,
            cores: 0.5,
            link,
            buffer,
            place: 0.3,
            decode: 0.6,
            out_factor: 1.0,
            now: 0.0,
            flight: VecDeque::new(),
            written: 0.0,
            receipted: 0.0,
            worked: 0.0,
            ready: 0.0,
            chunks: 0,
            compressed: 0,
        }
    }

    /// A step, in which the source wants to run or not; returns for how long it ran.
    fn step(&mut self, wants: bool) -> f64 {
        let mut link = self.link * STEP;
        for (coming, ..) in &mut self.flight {
            let came = coming.min(link);
            *coming -= came;
            link -= came;
        }
        let arrived = self.flight.front().is_some_and(|&(coming, ..)| coming <= 0.0);
        let threads = f64::from(u8::from(wants) + u8::from(arrived));
        let share = (self.cores / threads.max(1.0)).min(1.0) * STEP;
        let mut place = if arrived { share } else { 0.0 };
        while let Some((coming, work, wire)) = self.flight.front_mut()
            && *coming <= 0.0
            && place > 0.0
        {
            let done = work.min(place);
            *work -= done;
            place -= done;
            if *work <= 0.0 {
                self.receipted += *wire;
                self.flight.pop_front();
            }
        }
        self.now += STEP;
        if wants {
            self.worked += share;
            self.ready += STEP - share;
        }
        share
    }

    fn chunk(&mut self) {
        let (before, bytes) = (self.now, CHUNK_SIZE as f64);
        let plan = self.chooser.plan(self.chunks);
        self.chunks += 1;
        let mut work = bytes * 0.1;
        let encode = |chooser: &mut Chooser, kind, bytes: f64, out: f64, nanos: f64| {
            chooser.observe_encode(kind, bytes as u64, out as u64, took(nanos, 1.0));
        };
        encode(&mut self.chooser, EncodeKind::Scan, bytes, bytes, work);
        let out_factor = self.out_factor;
        let cost = |level: i32, bytes: f64| {
            let (_, nanos, out) = *LEVELS.iter().find(|l| l.0 == level).unwrap();
            (bytes * nanos, (bytes * out * out_factor).min(bytes))
        };
        if let Some(level) = plan.probe {
            let (nanos, out) = cost(level, 16384.0);
            encode(&mut self.chooser, EncodeKind::Probe { level }, 16384.0, out, nanos);
            work += nanos;
        }
        let (mut wire, mut place) = (bytes, bytes * self.place);
        if let Some(level) = plan.zstd_level {
            let (nanos, out) = cost(level, bytes);
            encode(&mut self.chooser, EncodeKind::Zstd { level }, bytes, out, nanos);
            work += nanos;
            wire = out;
            place += bytes * self.decode;
            self.compressed += 1;
        }
        // The copy into the socket.
        work += wire * 0.2;
        while work > 0.0 {
            work -= self.step(true);
        }
        self.written += wire;
        self.flight.push_back((wire, place, wire));
        while self.written - self.receipted > self.buffer {
            self.step(false);
        }
        let arrived = if self.told == Told::Written { self.written } else { self.receipted };
        // Four alike.
        let delivered = Delivered { own: arrived as u64, all: 4 * arrived as u64 };
        let busy = Busy { worked_nanos: self.worked as u64, ready_nanos: self.ready as u64 };
        self.chooser.observe_link(wire as u64, (self.now - before) as u64, delivered, || Some(busy));
    }

    /// Sends so many chunks; returns nanoseconds a byte, until all is there, and wire bytes a byte.
    fn run(mut self, chunks: u32) -> (f64, f64, Self) {
        (0..chunks).for_each(|_| self.chunk());
        while !self.flight.is_empty() {
            self.step(false);
        }
        let bytes = f64::from(chunks) * CHUNK_SIZE as f64;
        (self.now / bytes, self.written / bytes, self)
    }
}

/// A quarter of 1 Gbit/s, behind a forwarder on the same host that takes in much before it lets anybody wait.
fn forwarded(mode: CodecMode) -> Pair {
    Pair::new(mode, 125e6 / 4.0 / 1e9, 3e6)
}

#[test]
fn a_slow_link_to_a_near_peer_is_worth_compression() {
    for out_factor in [1.0, 1.5] {
        let best = LEVELS.map(|(level, ..)| {
            let pair = Pair { out_factor, ..forwarded(CodecMode::Zstd { level: Some(level) }) };
            pair.run(1000).0
        });
        let best = best.into_iter().min_by(f64::total_cmp).unwrap();
        for mode in [CodecMode::Auto, CodecMode::Zstd { level: None }] {
            let (time, _, pair) = Pair { out_factor, ..forwarded(mode) }.run(1000);
            assert!(time < 1.1 * best, "{mode}, output x{out_factor}: {time:.2} ns/B, at best {best:.2}");
            assert!(pair.compressed > 950, "{mode}, output x{out_factor}: {} of 1000", pair.compressed);
        }
    }
}

/// What a path takes in at its beginning goes as fast as it is written, and is no faster link for that.
#[test]
fn what_buffers_take_in_is_no_fast_link() {
    let wire = |mode, told| {
        // A path that holds 24 MB of each stream.
        let pair = Pair { told, buffer: 24e6, ..forwarded(mode) };
        pair.run(250).1
    };
    for mode in [CodecMode::Auto, CodecMode::Zstd { level: None }] {
        let (receipted, written) = (wire(mode, Told::Receipted), wire(mode, Told::Written));
        assert!(
            receipted < 0.92 * written,
            "{mode}: {receipted:.3} by receipts, {written:.3} by what was written"
        );
    }
}

/// A destination that waits for a core, or that takes longer than the source, is no slow link: what is sent raw is best.
#[test]
fn a_near_peer_that_wants_the_same_cores_gets_raw_pages() {
    for place in [0.1, 0.3, 0.6, 1.0] {
        for buffer in [1e6, 12e6] {
            let pair = |mode| Pair { place, ..Pair::new(mode, 20.0, buffer) };
            let (raw, ..) = pair(CodecMode::Raw).run(4000);
            let (time, _, pair) = pair(CodecMode::Auto).run(4000);
            assert!(time < 1.02 * raw, "{place} ns/B to place: {time:.3} ns/B, raw {raw:.3}");
            assert!(pair.compressed < 40, "{place} ns/B to place: {} of 4000 compressed", pair.compressed);
        }
    }
}
