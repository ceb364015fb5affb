//! Chooses the codec of a stream, from what was measured: how fast the link drains, what encoding costs, and how well
//! the last pages shrank.
//!
//! One chooser a stream worker, pure: times come in as arguments. What it maximises is *logical* bytes per second.
//! A worker encodes while what it wrote before drains from the socket's buffer, so a logical byte takes about
//! `max(encode, wire / link)`, and a share of the lesser of the two because the overlap is not perfect. Where even the fastest
//! level takes longer than the link, only some chunks are compressed: as many as make the two equal.
//!
//! Two things make it hard, and shape the code:
//! * While the encoder is what limits, the link's true rate is invisible: all that is known is that it is at least
//!   what went through. Then the estimate rises slowly, until a choice that relies on it finds the link full again;
//!   each time that proves wrong it rises more slowly.
//! * A choice that is not in use is not measured. So now and then a few pages are compressed at another level only to see
//!   what it would do, and one chunk in [`DELTA_SAMPLE`] is always sent as deltas.

mod link;

use std::fmt;
use std::str::FromStr;

use self::link::Link;
use crate::compress::{LEVEL_MAX, LEVEL_MIN};
use crate::layout::PAGE_SIZE;

/// Longest delta that is sent, in bytes: two thirds of a page, as a longer one saves too little for its base's sake.
pub const DELTA_BYTES_MAX: usize = PAGE_SIZE * 2 / 3;
/// Chunks between two trials of another level.
const PROBE_EVERY: u32 = 64;
/// One chunk in this many always has delta bases and is always tried, so that the gain stays known.
pub const DELTA_SAMPLE: u32 = 16;
/// A choice is left for one that takes less than this share of its time.
const SWITCH_BELOW: f64 = 0.9;
/// A level is taken for part of the chunks only if that is at least this part, and kept down to the second.
const PART_MIN: (f64, f64) = (0.1, 0.05);
/// Share of the lesser of encoding and draining that is not hidden behind the other.
const OVERLAP_LOSS: f64 = 0.25;
/// Slowest link, in nanoseconds a byte, at which keeping first-pass pages as delta bases is dear: about 0.8 GB/s.
const FILL_LINK_NANOS: f64 = 1.25;
/// For how long a destination runs to take in what is compressed, of what the source runs to compress it. Measured over two cores: 0.42,
/// 0.37, 0.36 and 0.21 at levels -7, -3, 1 and 3.
const DECODE_SHARE: f64 = 0.4;
/// Weight of a new observation in the averages.
const WEIGHT: f64 = 0.125;
/// The same for what a level makes of a chunk: over about as much as is under way on a stream, which evens out what differs from one
/// chunk to the next.
const WEIGHT_DATA: f64 = 1.0 / 32.0;
/// Weight of a trial of a level beside the one in use; they are few.
const WEIGHT_TRIED: f64 = 0.25;

/// Levels that `auto` picks from, with nanoseconds a byte and output share that are assumed until measured. Source:
/// the memory of a Linux guest by chunks, one core, from -2 on with references to pages that were sent before.
const LEVELS: [(i32, f64, f64); 7] = [
    (-7, 1.14, 0.48),
    (-3, 1.38, 0.40),
    (-2, 1.77, 0.313),
    (-1, 1.97, 0.30),
    (1, 2.17, 0.268),
    (3, 2.85, 0.26),
    (6, 9.4, 0.251),
];
/// The lowest of them that is worth its references: below, finding them costs more than it saves.
const REFERENCES_LEVEL_MIN: i32 = -2;
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
    /// Compress pages at this level only to see what it does.
    pub probe: Option<i32>,
}

impl Plan {
    /// Whether the pages can be looked at where they lie: they are read once, to be hashed, and then at most sent as they are.
    /// `first_pass`: they were not sent before in this migration.
    pub fn in_place(self, first_pass: bool) -> bool {
        first_pass && self.zstd_level.is_none() && self.probe.is_none() && !(self.delta && self.fill)
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
    },
    /// Compression that [`Plan::probe`] asked for.
    Probe {
        /// The level.
        level: i32,
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

/// Wire bytes that have arrived so far, as far as their sender can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Of this worker.
    pub own: u64,
    /// Of all workers that share the link.
    pub all: u64,
}

/// How long a thread was busy, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// It ran.
    pub worked_nanos: u64,
    /// It could have run, and there was no core for it.
    pub ready_nanos: u64,
}

/// Cost and output per input byte, or factors of them.
#[derive(Clone, Copy, Debug)]
struct Average {
    nanos: f64,
    out: f64,
}

impl Average {
    const ONE: Self = Self { nanos: 1.0, out: 1.0 };

    fn add(self, new: Self, weight: f64) -> Self {
        let mix = |old: f64, new: f64| old + (new - old) * weight;
        Self { nanos: mix(self.nanos, new.nanos), out: mix(self.out, new.out) }
    }

    fn times(self, other: Self) -> Self {
        Self { nanos: self.nanos * other.nanos, out: self.out * other.out }
    }

    /// How many times as much this is; what no measurement says, one that is off by 1000 and more, counts as that.
    fn over(self, other: Self) -> Self {
        let ratio = |this: f64, other: f64| (this / other.max(1e-9)).clamp(1e-3, 1e3);
        Self { nanos: ratio(self.nanos, other.nanos), out: ratio(self.out, other.out) }
    }
}

/// A level in use.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Compression {
    /// Index in `LEVELS`.
    level: usize,
    /// The part of the chunks that is compressed; the others are sent raw.
    part: f64,
}

/// Picks how to encode each chunk of one stream.
#[derive(Clone, Debug)]
pub struct Chooser {
    mode: CodecMode,
    link: Link,
    /// How the data compares to what `LEVELS` was measured on, lately: the same for every level.
    data: Average,
    /// How often it was seen.
    data_seen: u32,
    /// How each level compares to what is assumed of it beside the others, whatever the data. It is learnt only from levels that
    /// compressed the same pages: from one chunk to the next data differs by more than levels do.
    levels: [Average; LEVELS.len()],
    /// What the trial of another level made of the chunk that is being encoded.
    tried: Option<(usize, Average)>,
    /// What is in use.
    current: Option<Compression>,
    /// Chunks that are owed compression, where only a part of them gets it.
    owed: f64,
    delta: bool,
    /// Of the sampled chunks.
    delta_seen: Option<Average>,
    /// Each page is sent once.
    once: bool,
    /// The destination takes references.
    references: bool,
    /// The destination runs on the same cores.
    near: bool,
    /// How many workers share a core.
    crowding: f64,
    /// How many workers share the link, and how many cores they do.
    workers: u32,
    cores: f64,
    chunks: u32,
    next_probe: usize,
}

impl Chooser {
    /// A chooser that has measured nothing yet.
    pub fn new(mode: CodecMode) -> Self {
        let current = match mode {
            CodecMode::Zstd { level: None } => index_of(1).map(|level| Compression { level, part: 1.0 }),
            _ => None,
        };
        Self {
            mode,
            link: Link::new(),
            data: Average::ONE,
            data_seen: 0,
            levels: [Average::ONE; LEVELS.len()],
            tried: None,
            current,
            owed: 0.0,
            delta: matches!(mode, CodecMode::Auto | CodecMode::Delta),
            delta_seen: None,
            once: false,
            references: false,
            near: false,
            crowding: 1.0,
            workers: 1,
            cores: 1.0,
            chunks: 0,
            next_probe: 0,
        }
    }

    /// For memory that nobody writes: each page is sent once, so no content is kept for deltas.
    pub fn each_once(self) -> Self {
        Self { once: true, ..self }
    }

    /// For a destination that takes references to other pages.
    pub fn referring(self, references: bool) -> Self {
        Self { references, ..self }
    }

    /// For one of `workers` that share the link, and `cores` cores; with a destination that is `near`, its workers share them as well.
    pub fn sharing(mut self, workers: u16, cores: usize, near: bool) -> Self {
        (self.cores, self.near) = (cores.max(1) as f64, near);
        self.share_with(workers.into());
        self
    }

    /// So many workers share the link and the cores from now on, this one and those of other sessions among them. What
    /// [`Delivered::all`] counts must be theirs.
    pub fn share_with(&mut self, workers: u32) {
        self.workers = workers.max(1);
        let threads = f64::from(self.workers) * if self.near { 1.0 + DECODE_SHARE } else { 1.0 };
        self.crowding = (threads / self.cores).max(1.0);
    }

    /// How many workers share the link, as far as it was told.
    pub fn workers(&self) -> u32 {
        self.workers
    }

    /// What the user asked for.
    pub fn mode(&self) -> CodecMode {
        self.mode
    }

    /// Whether what is compressed at a level refers to other pages.
    pub fn refers(&self, level: i32) -> bool {
        let least = match self.mode {
            CodecMode::Zstd { level: Some(_) } => REFERENCES_LEVEL_MIN_PINNED,
            _ => REFERENCES_LEVEL_MIN,
        };
        self.references && level >= least
    }

    /// How to encode the next chunk, which is this one.
    pub fn plan(&mut self, chunk: u32) -> Plan {
        self.chunks = self.chunks.wrapping_add(1);
        let picks = matches!(self.mode, CodecMode::Auto | CodecMode::Zstd { level: None });
        let probes = picks && self.chunks % PROBE_EVERY == 1;
        let level = match self.mode {
            CodecMode::Auto | CodecMode::Zstd { level: None } => self.turn(probes).map(|i| LEVELS[i].0),
            CodecMode::Zstd { level } => level,
            CodecMode::Raw | CodecMode::Delta => None,
        };
        let in_use = self.current.map(|current| current.level);
        let references = level.is_some_and(|level| self.refers(level));
        let probe = if probes {
            // References are found among pages that were sent with them: of a level that has them, only use tells.
            let tellable = |&i: &usize| Some(i) != in_use && (references || !self.refers(LEVELS[i].0));
            let next = (1..=LEVELS.len()).map(|step| (self.next_probe + step) % LEVELS.len()).find(tellable);
            self.next_probe = next.unwrap_or(self.next_probe);
            next.map(|i| LEVELS[i].0)
        } else {
            None
        };
        let auto = self.mode == CodecMode::Auto;
        let slow = self.link.nanos().is_none_or(|nanos| nanos >= FILL_LINK_NANOS);
        let sampled = auto && is_delta_sample(chunk);
        let keeps = !self.once;
        let share = self.cost(self.current).out;
        Plan {
            delta: keeps && (self.delta || sampled),
            fill: keeps && (self.delta && (!auto || slow) || sampled),
            // Beside compression a delta must be shorter than what compression would make of the page.
            delta_bytes_max: ((PAGE_SIZE as f64 * share) as usize).clamp(PAGE_SIZE / 8, DELTA_BYTES_MAX),
            zstd_level: level,
            references,
            probe,
        }
    }

    /// Notes that `wire_bytes` were sent, and that `nanos` have passed since this was last noted, with encoding and with waiting for the
    /// link, but without waiting for work; and what has arrived so far. `busy` says what this worker has done so far, in all; where it is
    /// not known, all but encoding is taken for waiting. It is asked now and then.
    pub fn observe_link(
        &mut self,
        wire_bytes: u64,
        nanos: u64,
        delivered: Delivered,
        busy: impl Fn() -> Option<Busy>,
    ) {
        self.link.sent(wire_bytes, nanos);
        if self.link.close_window(delivered, self.workers.into(), busy) {
            self.choose();
        }
    }

    /// Notes what a part of encoding took and made.
    pub fn observe_encode(&mut self, kind: EncodeKind, bytes_in: u64, bytes_out: u64, took: Took) {
        self.link.encoded(took);
        if bytes_in == 0 {
            return;
        }
        let per_byte = |x: u64| x as f64 / bytes_in as f64;
        let new = Average { nanos: per_byte(took.worked_nanos), out: per_byte(bytes_out) };
        match kind {
            EncodeKind::Scan => self.link.scanned(bytes_in, took.worked_nanos),
            EncodeKind::Delta { chunk } => {
                if is_delta_sample(chunk) {
                    self.delta_seen = Some(self.delta_seen.map_or(new, |old| old.add(new, WEIGHT)));
                }
            }
            EncodeKind::Probe { level } => {
                let Some(i) = index_of(level) else { return };
                match self.current {
                    // Its chunk is about to be compressed by the level in use as well.
                    Some(_) => self.tried = Some((i, new)),
                    None => self.see(i, new),
                }
            }
            EncodeKind::Zstd { level } => {
                let Some(i) = index_of(level) else { return };
                if let Some((tried, other)) = self.tried.take() {
                    // other / new = assumed(tried) * levels[tried] / (assumed(i) * levels[i])
                    let found = other.over(new).times(assumed(i).times(self.levels[i])).over(assumed(tried));
                    self.levels[tried] = self.levels[tried].add(found, WEIGHT_TRIED);
                }
                self.see(i, new);
            }
        }
    }

    /// Notes what a level made of some data.
    fn see(&mut self, level: usize, new: Average) {
        self.data_seen = self.data_seen.saturating_add(1);
        let weight = WEIGHT_DATA.max(1.0 / f64::from(self.data_seen));
        let mut found = new.over(assumed(level).times(self.levels[level]));
        if self.data_seen == 1 {
            // The compressor's own memory came in with it: what that took is no one else's time.
            found.nanos = self.data.nanos;
        }
        self.data = self.data.add(found, weight);
    }

    /// The rate at which the link is believed to drain, in bytes per second; `None` before it was measured.
    pub fn link_bytes_per_s(&self) -> Option<f64> {
        self.link.nanos().map(|nanos| 1e9 / nanos)
    }

    /// What a level costs and makes, as far as known.
    fn estimate(&self, level: usize) -> Average {
        let Average { nanos, out } = assumed(level).times(self.levels[level]).times(self.data);
        Average { nanos, out: out.min(1.0) }
    }

    /// The level for the next chunk: if it is its turn to be compressed, or `must` be if any is.
    fn turn(&mut self, must: bool) -> Option<usize> {
        let Compression { level, part } = self.current?;
        self.owed += part;
        (must || self.owed >= 1.0).then(|| {
            self.owed -= 1.0;
            level
        })
    }

    /// What a byte costs and makes with a level.
    fn cost_of(&self, level: usize) -> Average {
        let Average { nanos, out } = self.estimate(level);
        Average { nanos: nanos * self.crowding(), out }
    }

    /// How many times as long as a worker runs its work takes: as was seen, but at least what it will be once all compress.
    fn crowding(&self) -> f64 {
        self.crowding.max(self.link.crowding())
    }

    /// For how long a worker is busy with a byte, however it is encoded.
    fn base_nanos(&self) -> f64 {
        self.link.base_nanos() * self.crowding()
    }

    /// What a byte costs and makes with a choice, beside what is done in any case.
    fn cost(&self, choice: Option<Compression>) -> Average {
        let Some(Compression { level, part }) = choice else { return Average { nanos: 0.0, out: 1.0 } };
        let Average { nanos, out } = self.cost_of(level);
        Average { nanos: part * nanos, out: 1.0 - part * (1.0 - out) }
    }

    /// Nanoseconds that a logical byte takes with a choice, over this link.
    fn time(&self, choice: Option<Compression>, link_nanos: f64) -> f64 {
        let Average { nanos, out } = self.cost(choice);
        let nanos = nanos + self.base_nanos();
        let wire = out * link_nanos;
        nanos.max(wire) + OVERLAP_LOSS * nanos.min(wire)
    }

    /// A level for all chunks, or the fastest one for the part of them that the worker has time for while the link is busy with what it
    /// sends; `None` if that is less than `least`.
    fn fitting(&self, level: usize, link_nanos: f64, least: f64) -> Option<Compression> {
        let mut part = 1.0;
        if level == 0 && self.mode == CodecMode::Auto {
            let Average { nanos, out } = self.cost_of(level);
            // base + part * nanos = link * (1 - part * (1 - out))
            let saved = link_nanos * (1.0 - out);
            part = (link_nanos - self.base_nanos()) / (nanos + saved).max(1e-9);
        }
        (part >= least).then_some(Compression { level, part: part.min(1.0) })
    }

    /// Chooses again, after a window.
    fn choose(&mut self) {
        let Some(link) = self.link.nanos() else { return };
        let raw = (self.mode == CodecMode::Auto).then_some(None);
        let fitting = |level| self.fitting(level, link, PART_MIN.0).map(Some);
        let best = raw
            .into_iter()
            .chain((0..LEVELS.len()).filter_map(fitting))
            .min_by(|&a, &b| self.time(a, link).total_cmp(&self.time(b, link)))
            .unwrap_or(self.current);
        self.current = self.current.and_then(|current| self.fitting(current.level, link, PART_MIN.1));
        let now = self.time(self.current, link);
        // A destination on the same cores gets less of them the more is compressed, which looks like a link that needs it: there is no
        // staying with it by habit.
        let below = if self.near && best.is_none() { 1.0 } else { SWITCH_BELOW };
        if self.time(best, link) < below * now {
            self.current = best;
        }
        if let (CodecMode::Auto, Some(seen)) = (self.mode, self.delta_seen) {
            let gain = (1.0 - seen.out) * self.time(self.current, link);
            // Each side of the border has to be left by a margin.
            self.delta = seen.nanos < gain * if self.delta { 1.25 } else { 0.8 };
        }
    }
}

/// What is assumed of a level.
fn assumed(level: usize) -> Average {
    let (_, nanos, out) = LEVELS[level];
    Average { nanos, out }
}

/// Where a level stands in [`LEVELS`].
fn index_of(level: i32) -> Option<usize> {
    LEVELS.iter().position(|entry| entry.0 == level)
}

/// Whether a chunk is one of those that always have delta bases.
fn is_delta_sample(chunk: u32) -> bool {
    // Fibonacci hashing: neighbours, and strides of a power of two, spread over all residues.
    chunk.wrapping_mul(0x9e37_79b1) >> (u32::BITS - DELTA_SAMPLE.ilog2()) == 0
}

#[cfg(test)]
mod tests;
