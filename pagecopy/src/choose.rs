//! Chooses the codec of each chunk.
//!
//! The streams of a session choose together how hard they compress ([`Effort`]): the longer what was sent waits to arrive, the harder.
//! What each step costs and saves is learnt from the memory itself (`ladder`). Pure: times come in as arguments.

mod effort;
mod ladder;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use self::effort::Decision;
pub use self::effort::Effort;
use self::ladder::{Average, COUNT, Mix, SEEK, buy, index_of, step};
use crate::compress::{LEVEL_MAX, LEVEL_MIN};
use crate::layout::PAGE_SIZE;

/// Longest delta that is sent, in bytes: two thirds of a page, as a longer one saves too little for its base's sake.
pub const DELTA_BYTES_MAX: usize = PAGE_SIZE * 2 / 3;
/// Chunks between two trials of another step.
const PROBE_EVERY: u32 = 64;
/// Where nothing shrank when it was last tried, one chunk in this many is tried again, as long as something waits.
const SEEK_EVERY: u32 = 32;
/// One chunk in this many always has delta bases and is always tried, so that the gain stays known.
pub const DELTA_SAMPLE: u32 = 16;
/// Weight of a new observation of deltas.
const WEIGHT_DELTA: f64 = 0.125;
/// A stream tells the others what it did after this much time, in nanoseconds.
const TELL_NANOS: u64 = 4_000_000;
/// Slowest link, in nanoseconds a byte, at which keeping first-pass pages as delta bases is dear: about 0.8 GB/s.
const FILL_LINK_NANOS: f64 = 1.25;
/// The lowest level that has references where the user pins it: one who pins a fast level wants that, and where nothing resembles
/// anything looking for it takes a tenth of its time.
const REFERENCES_LEVEL_MIN_PINNED: i32 = 2;

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CodecMode {
    /// Whatever moves most logical bytes a second.
    #[default]
    Auto,
    /// Neither deltas nor compression. Zero and unchanged pages are still not sent.
    Raw,
    /// Always zstd, at this level or at the one that suits the link. No deltas.
    Zstd {
        /// The level.
        level: Option<i32>,
    },
    /// Always deltas where they are short, no compression.
    Delta,
}

/// A codec's name that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecModeError {
    /// No such codec.
    #[error("{name:?} is no codec; use auto, raw, delta, zstd or zstd:LEVEL")]
    Unknown {
        /// What was given.
        name: String,
    },
    /// A level that is no number in the supported range.
    #[error("{level:?} is no zstd level; use a number from {LEVEL_MIN} to {LEVEL_MAX}")]
    Level {
        /// What was given.
        level: String,
    },
}

impl FromStr for CodecMode {
    type Err = CodecModeError;

    fn from_str(name: &str) -> Result<Self, CodecModeError> {
        match name.split_once(':') {
            None => match name {
                "auto" => Ok(Self::Auto),
                "raw" => Ok(Self::Raw),
                "delta" => Ok(Self::Delta),
                "zstd" => Ok(Self::Zstd { level: None }),
                _ => Err(CodecModeError::Unknown { name: name.into() }),
            },
            Some(("zstd", text)) => match text.parse() {
                Ok(level) if (LEVEL_MIN..=LEVEL_MAX).contains(&level) => {
                    Ok(Self::Zstd { level: Some(level) })
                }
                _ => Err(CodecModeError::Level { level: text.into() }),
            },
            Some(_) => Err(CodecModeError::Unknown { name: name.into() }),
        }
    }
}

impl fmt::Display for CodecMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Raw => f.write_str("raw"),
            Self::Delta => f.write_str("delta"),
            Self::Zstd { level: None } => f.write_str("zstd"),
            Self::Zstd { level: Some(level) } => write!(f, "zstd:{level}"),
        }
    }
}

/// A level of zstd, and whether what is compressed refers to pages of other chunks.
pub type Step = (i32, bool);

/// How to encode one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Try deltas, and keep what is sent as the base of later ones.
    pub delta: bool,
    /// Keep also pages of the first pass as bases.
    pub fill: bool,
    /// Longest delta worth sending.
    pub delta_bytes_max: usize,
    /// Compress what is left at this level; `None`: send it raw.
    pub zstd_level: Option<i32>,
    /// Let what is compressed refer to pages of other chunks that resemble it.
    pub references: bool,
    /// Compress pages at this level, with references or without, only to see what it does.
    pub probe: Option<Step>,
}

impl Plan {
    /// Whether the pages can be looked at where they lie: they are read once, to be hashed, and then at most sent as they are.
    /// `first_pass`: they were not sent before in this migration.
    pub fn in_place(self, first_pass: bool) -> bool {
        first_pass && self.zstd_level.is_none() && !(self.delta && self.fill)
    }
}

/// What part of encoding an observation is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodeKind {
    /// Zero scan and hashing: costs time whatever is chosen.
    Scan,
    /// Deltas of a chunk. `bytes_in`: the pages that were tried; `bytes_out`: the deltas, and the pages that got none.
    Delta {
        /// The chunk.
        chunk: u32,
    },
    /// Compression whose output is sent.
    Zstd {
        /// The level.
        level: i32,
        /// With references.
        references: bool,
    },
    /// Compression that [`Plan::probe`] asked for.
    Probe {
        /// The level.
        level: i32,
        /// With references.
        references: bool,
    },
}

/// What a part of encoding took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Took {
    /// By the clock.
    pub nanos: u64,
    /// Of which its thread ran, as far as that is known.
    pub worked_nanos: u64,
}

impl Took {
    /// From one reading of a clock to another, and taken for work as a whole.
    pub fn ran(start: u64, end: u64) -> Self {
        let nanos = end.saturating_sub(start);
        Self { nanos, worked_nanos: nanos }
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            nanos: self.nanos.saturating_add(other.nanos),
            worked_nanos: self.worked_nanos.saturating_add(other.worked_nanos),
        }
    }
}

/// How long a thread was busy, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// It ran.
    pub worked_nanos: u64,
    /// It could have run, and there was no core for it.
    pub ready_nanos: u64,
}

/// What a thread did for a while, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// The time.
    pub passed_nanos: u64,
    /// It ran.
    pub worked_nanos: u64,
    /// It could have run, and there was no core for it.
    pub ready_nanos: u64,
}

/// Bytes that a stream was to send.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    logical: f64,
    /// The same, each as often as streams had more ahead than they are to have.
    ahead: f64,
}

impl Sent {
    fn add(&mut self, other: Self) {
        self.logical += other.logical;
        self.ahead += other.ahead;
    }
}

/// What a stream did since it last told the others.
#[derive(Clone, Copy, Debug, Default)]
struct Since {
    passed: u64,
    encoded: Took,
    sent: Sent,
}

/// Picks how to encode each chunk of one stream.
#[derive(Debug)]
pub struct Chooser {
    effort: Arc<Effort>,
    stream: usize,
    /// As it was last heard.
    decision: Decision,
    version: u64,
    since: Since,
    /// How long the stream had been busy when it last told.
    busy_before: Option<Busy>,
    /// How much harder than the session this stream compresses now.
    pressure: f64,
    /// Chunks that are owed the heavier step, where only a part of them gets it.
    owed: f64,
    /// What the trial of another step made of the chunk that is being encoded.
    tried: Option<(usize, Average)>,
    delta: bool,
    /// Of the sampled chunks.
    delta_seen: Option<Average>,
    /// Each page is sent once.
    once: bool,
    chunks: u32,
    next_probe: usize,
}

impl Chooser {
    /// A chooser of one of the session's streams.
    pub fn new(effort: Arc<Effort>) -> Self {
        let (stream, mut version) = (effort.join(), 0);
        let first = Decision { budget: 0.0, corners: Vec::new(), nanos: None };
        let decision = effort.decided(&mut version).unwrap_or(first);
        Self {
            delta: matches!(effort.mode(), CodecMode::Auto | CodecMode::Delta),
            stream,
            effort,
            decision,
            version,
            since: Since::default(),
            busy_before: None,
            pressure: 0.0,
            owed: 0.0,
            tried: None,
            delta_seen: None,
            once: false,
            chunks: 0,
            next_probe: 0,
        }
    }

    /// For memory that nobody writes: each page is sent once, so no content is kept for deltas.
    #[must_use]
    pub fn each_once(mut self) -> Self {
        self.once = true;
        self
    }

    /// The session's destination takes references, or not.
    pub fn refer(&mut self, references: bool) {
        self.effort.refer(references);
    }

    /// What the session's streams decide together.
    pub fn effort(&self) -> &Arc<Effort> {
        &self.effort
    }

    /// How to encode the next chunk, which is this one. `ahead_nanos`: how long what is under way on the stream will take to arrive, beyond
    /// the time that the path takes in any case.
    pub fn plan(&mut self, chunk: u32, ahead_nanos: u64) -> Plan {
        self.chunks = self.chunks.wrapping_add(1);
        if let Some(decision) = self.effort.decided(&mut self.version) {
            self.hear(decision);
        }
        self.pressure = self.effort.pressure(self.stream, ahead_nanos);
        let (mix, average) = buy(&self.decision.corners, self.decision.budget * self.pressure);
        let mode = self.effort.mode();
        let (zstd, probe) = match mode {
            CodecMode::Auto | CodecMode::Zstd { level: None } => self.turn(mix),
            CodecMode::Zstd { level: Some(level) } => (
                Some((level, level >= REFERENCES_LEVEL_MIN_PINNED && self.effort.lock().ladder.refers())),
                None,
            ),
            CodecMode::Raw | CodecMode::Delta => (None, None),
        };
        let auto = mode == CodecMode::Auto;
        let slow = self.decision.nanos.is_none_or(|nanos| nanos >= FILL_LINK_NANOS);
        let sampled = auto && is_delta_sample(chunk);
        let keeps = !self.once;
        Plan {
            delta: keeps && (self.delta || sampled),
            fill: keeps && (self.delta && (!auto || slow) || sampled),
            // Beside compression a delta must be shorter than what compression would make of the page.
            delta_bytes_max: ((PAGE_SIZE as f64 * average.out) as usize)
                .clamp(PAGE_SIZE / 8, DELTA_BYTES_MAX),
            zstd_level: zstd.map(|zstd| zstd.0),
            references: zstd.is_some_and(|zstd| zstd.1),
            probe,
        }
    }

    /// The step for the next chunk, and now and then another to try.
    fn turn(&mut self, mix: Mix) -> (Option<Step>, Option<Step>) {
        let Mix { lighter, heavier, part } = mix;
        if self.decision.corners.len() == 1 && self.pressure > 0.0 && self.chunks % SEEK_EVERY == 1 {
            return (Some(step(SEEK)), None);
        }
        self.owed += part;
        let taken = if self.owed >= 1.0 {
            self.owed -= 1.0;
            heavier
        } else {
            lighter
        };
        let Some(used) = taken.filter(|_| self.chunks % PROBE_EVERY == 1) else {
            return (taken.map(step), None);
        };
        // References are found among pages that were sent with them: of a step that has them, only use tells.
        let ladder = &self.effort.lock().ladder;
        let tellable = |&i: &usize| i != used && ladder.has(i) && (step(used).1 || !step(i).1);
        let next = (1..=COUNT).map(|on| (self.next_probe + on) % COUNT).find(tellable);
        self.next_probe = next.unwrap_or(self.next_probe);
        (Some(step(used)), next.map(step))
    }

    /// Notes that a frame was sent, and that `nanos` have passed since this was last noted, with encoding and with
    /// waiting for the link, but without waiting for work. `busy` says what this stream's thread has done so far, in all; where it is
    /// not known, all but encoding is taken for waiting. It is asked now and then.
    pub fn observe_sent(&mut self, now: u64, nanos: u64, busy: impl Fn() -> Option<Busy>) {
        // It begins with the first frame.
        self.busy_before = self.busy_before.or_else(&busy);
        self.since.passed = self.since.passed.saturating_add(nanos);
        if self.since.passed < TELL_NANOS {
            return;
        }
        let since = std::mem::take(&mut self.since);
        let busy = busy();
        let Took { nanos, worked_nanos } = since.encoded;
        let (worked_nanos, ready_nanos) = match (self.busy_before, busy) {
            (Some(before), Some(now)) => (
                now.worked_nanos.saturating_sub(before.worked_nanos),
                now.ready_nanos.saturating_sub(before.ready_nanos),
            ),
            _ => (worked_nanos, nanos.saturating_sub(worked_nanos)),
        };
        self.busy_before = busy;
        let load = Load { passed_nanos: since.passed, worked_nanos, ready_nanos };
        self.effort.observe_source(now, load, since.sent);
    }

    /// Notes what a part of encoding took and made.
    pub fn observe_encode(&mut self, kind: EncodeKind, bytes_in: u64, bytes_out: u64, took: Took) {
        self.since.encoded = self.since.encoded.and(took);
        if bytes_in == 0 {
            return;
        }
        let per_byte = |x: u64| x as f64 / bytes_in as f64;
        let new = Average { nanos: per_byte(took.worked_nanos), out: per_byte(bytes_out) };
        match kind {
            EncodeKind::Scan => {
                self.since.sent.logical += bytes_out as f64;
                self.since.sent.ahead += bytes_out as f64 * self.pressure;
            }
            EncodeKind::Delta { chunk } => {
                if is_delta_sample(chunk) {
                    self.delta_seen = Some(self.delta_seen.map_or(new, |old| old.toward(new, WEIGHT_DELTA)));
                }
            }
            EncodeKind::Probe { level, references } => {
                // Its chunk is about to be compressed by the step in use as well.
                self.tried = index_of(level, references).map(|tried| (tried, new));
            }
            EncodeKind::Zstd { level, references } => {
                let tried = self.tried.take();
                let Some(used) = index_of(level, references) else { return };
                let ladder = &mut self.effort.lock().ladder;
                if let Some((tried, other)) = tried {
                    ladder.compare(tried, other, used, new);
                }
                ladder.see(used, new);
            }
        }
    }

    /// Takes in what was decided.
    fn hear(&mut self, decision: Decision) {
        self.decision = decision;
        let nanos = self.decision.nanos;
        if let (CodecMode::Auto, Some(seen), Some(nanos)) = (self.effort.mode(), self.delta_seen, nanos) {
            let gain = (1.0 - seen.out) * nanos;
            // Each side of the border has to be left by a margin.
            self.delta = seen.nanos < gain * if self.delta { 1.25 } else { 0.8 };
        }
    }
}

impl Drop for Chooser {
    fn drop(&mut self) {
        self.effort.leave(self.stream);
    }
}

/// Whether a chunk is one of those that always have delta bases.
fn is_delta_sample(chunk: u32) -> bool {
    // Fibonacci hashing: neighbours, and strides of a power of two, spread over all residues.
    chunk.wrapping_mul(0x9e37_79b1) >> (u32::BITS - DELTA_SAMPLE.ilog2()) == 0
}

#[cfg(test)]
mod tests;
