//! What chooses the way of each chunk: always the same one, or what migrations use.

use std::collections::VecDeque;
use std::sync::Arc;

use pagecopy::choose::{Busy, Chooser, CodecMode, Effort, EncodeKind, Load, Took};
use pagecopy::layout::PAGE_SIZE;

use super::trace::{ChunkCosts, WAYS, Way, way};

/// How often a thread of the destination says what it did, in nanoseconds.
const TELL_NANOS: f64 = 10e6;

/// How a thread spent its time, in nanoseconds from its start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Did {
    pub(crate) worked: f64,
    /// It could have run, and had no core.
    pub(crate) ready: f64,
    /// The time.
    pub(crate) now: f64,
}

/// What becomes of a chunk.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    /// Its way, of [`WAYS`]; `None`: as it is.
    pub(crate) way: Option<usize>,
    /// One that is tried beside it.
    pub(crate) probe: Option<usize>,
    /// Nanoseconds of a core for either.
    pub(crate) encode: f64,
    pub(crate) tried: f64,
    /// To look at it.
    pub(crate) scan: f64,
    pub(crate) bytes: u32,
    pub(crate) decode: f64,
    /// Bytes that went in and came out of the codec, in use and tried.
    pub(crate) through: (u64, u64),
    pub(crate) through_tried: (u64, u64),
    /// Bytes of its pages, and of those that are not zeros.
    pub(crate) logical: (u64, u64),
}

impl Sent {
    /// A chunk that goes one way, with another tried.
    pub(crate) fn new(chunk: &ChunkCosts, way: Option<usize>, probe: Option<usize>) -> Self {
        let full = u64::from(chunk.full()) * PAGE_SIZE as u64;
        let mut sent = Self {
            bytes: full as u32,
            scan: chunk.scan.into(),
            logical: (u64::from(chunk.pages) * PAGE_SIZE as u64, full),
            ..Self::default()
        };
        if full == 0 {
            return sent;
        }
        let through = |at: usize| {
            let cost = &chunk.costs[at];
            let bytes = u64::from(cost.pages) * PAGE_SIZE as u64;
            (bytes, u64::from(cost.bytes) + bytes - full)
        };
        if let Some(at) = way {
            let cost = &chunk.costs[at];
            (sent.way, sent.through) = (way, through(at));
            (sent.encode, sent.bytes, sent.decode) = (cost.encode.into(), cost.bytes, cost.decode.into());
        }
        if let Some(at) = probe {
            // Where no level is in use, a trial takes a quarter of the chunk.
            let part = if way.is_some() { 1.0 } else { 0.25 };
            let (taken, made) = through(at);
            (sent.probe, sent.tried) = (probe, f64::from(chunk.costs[at].encode) * part);
            sent.through_tried = ((taken as f64 * part) as u64, (made as f64 * part) as u64);
        }
        sent
    }
}

/// Chooses, for the streams of a session.
pub(crate) trait Chooses {
    /// The way of a chunk of a stream; what is under way there will have arrived after so many nanoseconds more than the path takes.
    fn plan(&mut self, stream: usize, chunk: &ChunkCosts, ahead: f64) -> Sent;
    /// It was encoded, which took so long by the clock.
    fn encoded(&mut self, _stream: usize, _sent: &Sent, _took: f64) {}
    /// It was sent: the time since the one before, and what the threads of both sides did.
    fn sent(&mut self, _stream: usize, _passed: f64, _did: (Did, Did)) {}
}

/// Always the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fixed(pub(crate) Option<usize>);

/// What a user can pin, and what `auto` is held against.
pub(crate) const PINNED: [(&str, Option<(i32, bool)>); 7] = [
    ("raw", None),
    ("zstd:-7", Some((-7, false))),
    ("zstd:-3", Some((-3, false))),
    ("zstd:-1", Some((-1, false))),
    ("zstd:1", Some((1, false))),
    ("zstd:3", Some((3, true))),
    ("zstd:6", Some((6, true))),
];

impl Fixed {
    /// All of [`PINNED`].
    pub(crate) fn all() -> impl Iterator<Item = (&'static str, Self)> {
        PINNED.iter().map(|&(name, pinned)| (name, Self(pinned.and_then(|(level, with)| way(level, with)))))
    }
}

impl Chooses for Fixed {
    fn plan(&mut self, _: usize, chunk: &ChunkCosts, _: f64) -> Sent {
        Sent::new(chunk, self.0, None)
    }
}

/// What migrations use.
pub(crate) struct Auto {
    effort: Arc<Effort>,
    streams: Vec<Chooser>,
    delay: f64,
    /// What each stream's thread at the destination did when it last said so, and what is under way of it.
    told: Vec<Did>,
    under_way: VecDeque<(f64, Load)>,
}

impl Auto {
    /// For so many streams, on a path that takes so many nanoseconds each way.
    pub(crate) fn new(streams: usize, delay: f64) -> Self {
        let effort = Arc::new(Effort::new(CodecMode::Auto));
        effort.refer(true);
        let told = vec![Did::default(); streams];
        let streams = (0..streams).map(|_| Chooser::new(effort.clone()).each_once()).collect();
        Self { effort, streams, delay, told, under_way: VecDeque::new() }
    }
}

impl Chooses for Auto {
    fn plan(&mut self, stream: usize, chunk: &ChunkCosts, ahead: f64) -> Sent {
        let plan = self.streams[stream].plan(chunk.chunk, ahead as u64);
        let taken = plan.zstd_level.and_then(|level| way(level, plan.references));
        let tried = plan.probe.and_then(|(level, references)| way(level, references));
        Sent::new(chunk, taken, tried)
    }

    fn encoded(&mut self, stream: usize, sent: &Sent, took: f64) {
        let chooser = &mut self.streams[stream];
        let all = sent.scan + sent.encode + sent.tried;
        let took =
            |worked: f64| Took { nanos: (took * worked / all.max(1.0)) as u64, worked_nanos: worked as u64 };
        chooser.observe_encode(EncodeKind::Scan, sent.logical.0, sent.logical.1, took(sent.scan));
        if let Some(way) = sent.probe {
            let (taken, made) = sent.through_tried;
            let Way { level, references } = WAYS[way];
            chooser.observe_encode(EncodeKind::Probe { level, references }, taken, made, took(sent.tried));
        }
        if let Some(way) = sent.way {
            let (taken, made) = sent.through;
            let Way { level, references } = WAYS[way];
            chooser.observe_encode(EncodeKind::Zstd { level, references }, taken, made, took(sent.encode));
        }
    }

    fn sent(&mut self, stream: usize, passed: f64, (did, peer): (Did, Did)) {
        let told = &mut self.told[stream];
        if peer.now - told.now >= TELL_NANOS {
            let load = Load {
                passed_nanos: (peer.now - told.now) as u64,
                worked_nanos: (peer.worked - told.worked) as u64,
                ready_nanos: (peer.ready - told.ready) as u64,
            };
            *told = peer;
            self.under_way.push_back((peer.now + self.delay, load));
        }
        while let Some(&(_, load)) = self.under_way.front().filter(|(at, _)| *at <= did.now) {
            self.effort.observe_destination(load);
            self.under_way.pop_front();
        }
        let busy = Busy { worked_nanos: did.worked as u64, ready_nanos: did.ready as u64 };
        self.streams[stream].observe_sent(did.now as u64, passed as u64, || Some(busy));
    }
}
