//! Chooses the codec of a stream, from what was measured: how fast the link drains, what encoding costs, and how well
//! the last pages shrank.
//!
//! One chooser a stream worker, pure: times come in as arguments. What it maximises is *logical* bytes per second.
//! A worker encodes while what it wrote before drains from the socket's buffer, so a logical byte takes about
//! `max(encode, wire / link)`, and a share of the lesser of the two because the overlap is not perfect.
//!
//! Two things make it hard, and shape the code:
//! * While the encoder is what limits, the link's true rate is invisible: all that is known is that it is at least
//!   what went through. Then the estimate rises slowly, until a choice that relies on it finds the link full again;
//!   each time that proves wrong it rises more slowly.
//! * A choice that is not in use is not measured. So now and then a few pages are compressed at another level only to see
//!   what it would do, and one chunk in [`DELTA_SAMPLE`] is always sent as deltas.

use std::fmt;
use std::str::FromStr;

use crate::compress::{LEVEL_MAX, LEVEL_MIN};
use crate::layout::PAGE_SIZE;

/// Longest delta that is sent, in bytes: two thirds of a page, as a longer one saves too little for its base's sake.
pub const DELTA_BYTES_MAX: usize = PAGE_SIZE * 2 / 3;
/// Chunks between two trials of another level.
const PROBE_EVERY: u32 = 64;
/// One chunk in this many always has delta bases and is always tried, so that the gain stays known.
pub const DELTA_SAMPLE: u32 = 16;
/// The link is judged after this many wire bytes ...
const WINDOW_BYTES: f64 = (2 << 20) as f64;
/// ... but not before this much time, in nanoseconds, ...
const WINDOW_NANOS_MIN: f64 = 10e6;
/// ... or, however few they were, after this much.
const WINDOW_NANOS: f64 = 100e6;
/// The link limits when at least this share of a window was spent waiting for it ...
const LINK_BOUND_SHARE: f64 = 0.2;
/// ... or this share where few bytes went: headers of zero pages, each with its system call, say nothing about a link.
const LINK_BOUND_SHARE_FEW: f64 = 0.8;
/// A stream that gets more than this many times its fair part of the link has it because others do not want theirs.
const ALONE: f64 = 2.0;
/// A choice is left for one that takes less than this share of its time.
const SWITCH_BELOW: f64 = 0.9;
/// Share of the lesser of encoding and draining that is not hidden behind the other.
const OVERLAP_LOSS: f64 = 0.25;
/// How much faster the link is taken to be after each window that did not show its rate: at first, and at least.
const RISE: (f64, f64) = (0.02, 0.001);
/// The same for a link that was never seen to limit.
const RISE_UNSEEN: f64 = 0.2;
/// Slowest link, in nanoseconds a byte, at which keeping first-pass pages as delta bases is dear: about 0.8 GB/s.
const FILL_LINK_NANOS: f64 = 1.25;
/// Weight of a new observation in the averages.
const WEIGHT: f64 = 0.125;
/// Weight of a trial of a level beside the one in use; they are few.
const WEIGHT_TRIED: f64 = 0.25;

/// Levels that `auto` picks from, with nanoseconds a byte and output share that are assumed until measured. Source:
/// measured at 256 KiB on library code and heap pages, one core.
const LEVELS: [(i32, f64, f64); 7] = [
    (-7, 1.47, 0.44),
    (-3, 1.72, 0.365),
    (-1, 1.89, 0.30),
    (1, 2.0, 0.236),
    (2, 3.3, 0.19),
    (3, 4.9, 0.185),
    (6, 10.0, 0.175),
];
/// The lowest level that is worth its references: below, finding and loading them costs more than it saves. The levels from here on
/// are measured with them, on the memory of a Linux guest.
pub const REFERENCES_LEVEL_MIN: i32 = 2;

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

/// What is known about the link.
#[derive(Clone, Debug)]
struct Link {
    /// Nanoseconds that a wire byte takes, once known.
    nanos: Option<f64>,
    /// The same, when it was last seen and not only assumed.
    seen: f64,
    /// How much the rate rises after a window that did not show it.
    rise: f64,
    /// Sums of the current window.
    wire: f64,
    waited: f64,
    encoded: f64,
    /// What all workers had sent when it began.
    all_before: u64,
}

impl Link {
    fn new() -> Self {
        Self {
            nanos: None,
            seen: f64::MAX,
            rise: RISE.0,
            wire: 0.0,
            waited: 0.0,
            encoded: 0.0,
            all_before: 0,
        }
    }

    /// Begins a window, at which all workers together have sent `all` bytes.
    fn begin_window(&mut self, all: u64) {
        (self.wire, self.waited, self.encoded, self.all_before) = (0.0, 0.0, 0.0, all);
    }

    /// Ends the window when it is long enough; returns whether it did. `all`: bytes that all `workers` have sent so far.
    fn close_window(&mut self, all: u64, workers: f64) -> bool {
        let elapsed = self.encoded + self.waited;
        let short = elapsed < WINDOW_NANOS && (self.wire < WINDOW_BYTES || elapsed < WINDOW_NANOS_MIN);
        if short || self.wire == 0.0 {
            return false;
        }
        // Streams take turns at a link that they share, for longer than a window: this one's part is what is fair, unless the others
        // have nothing to send.
        let fair = all.saturating_sub(self.all_before) as f64 / workers;
        let part = if self.wire > ALONE * fair { self.wire } else { fair };
        let sample = (elapsed / part).max(1e-3);
        let few = self.wire < WINDOW_BYTES;
        let share = if few { LINK_BOUND_SHARE_FEW } else { LINK_BOUND_SHARE };
        let waited = self.waited >= share * elapsed;
        if few && !waited {
            self.begin_window(all);
            return false;
        }
        if waited {
            if let Some(assumed) = self.nanos
                && assumed < 0.95 * self.seen
            {
                // The rise was put to the test: was it right?
                self.rise = if sample > 0.7 * self.seen { (self.rise / 2.0).max(RISE.1) } else { RISE.0 };
            }
            // Averaged as time per byte: a buffer that swallows a burst counts little, a slow link much.
            let nanos = self.nanos.map_or(sample, |old| (old + sample) / 2.0);
            self.nanos = Some(nanos);
            self.seen = nanos;
        } else {
            // A link that never limited yet is likely a fast one: look for its limit in large steps.
            let rise = if self.seen == f64::MAX { RISE_UNSEEN } else { self.rise };
            self.nanos = Some(self.nanos.map_or(sample, |old| (old * (1.0 - rise)).min(sample)));
        }
        self.begin_window(all);
        true
    }
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
    /// Index in `LEVELS`, or `None` for raw.
    current: Option<usize>,
    delta: bool,
    /// Of the sampled chunks.
    delta_seen: Option<Average>,
    /// Each page is sent once.
    once: bool,
    /// The destination takes references.
    references: bool,
    /// How many workers share a core: what a level costs that is not in use was measured while the others waited for the link, and
    /// takes so many times as long once they all compress.
    crowding: f64,
    /// How many workers share the link.
    workers: f64,
    chunks: u32,
    next_probe: usize,
}

impl Chooser {
    /// A chooser that has measured nothing yet.
    pub fn new(mode: CodecMode) -> Self {
        let current = match mode {
            CodecMode::Zstd { level: None } => LEVELS.iter().position(|level| level.0 == 1),
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
            delta: matches!(mode, CodecMode::Auto | CodecMode::Delta),
            delta_seen: None,
            once: false,
            references: false,
            crowding: 1.0,
            workers: 1.0,
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

    /// For one of `workers` that share the link, on cores each of which has to do for `crowding` threads.
    pub fn sharing(self, workers: u16, crowding: f64) -> Self {
        Self { crowding: crowding.max(1.0), workers: f64::from(workers.max(1)), ..self }
    }

    /// What the user asked for.
    pub fn mode(&self) -> CodecMode {
        self.mode
    }

    /// How to encode the next chunk, which is this one.
    pub fn plan(&mut self, chunk: u32) -> Plan {
        self.chunks = self.chunks.wrapping_add(1);
        let level = match self.mode {
            CodecMode::Auto | CodecMode::Zstd { level: None } => self.current.map(|i| LEVELS[i].0),
            CodecMode::Zstd { level } => level,
            CodecMode::Raw | CodecMode::Delta => None,
        };
        let picks = matches!(self.mode, CodecMode::Auto | CodecMode::Zstd { level: None });
        let refers = |level: i32| self.references && level >= REFERENCES_LEVEL_MIN;
        let references = level.is_some_and(refers);
        let probe = if picks && self.chunks % PROBE_EVERY == 1 {
            // References are found among pages that were sent with them: of a level that has them, only use tells.
            let tellable = |&i: &usize| Some(i) != self.current && (references || !refers(LEVELS[i].0));
            let next = (1..=LEVELS.len()).map(|step| (self.next_probe + step) % LEVELS.len()).find(tellable);
            self.next_probe = next.unwrap_or(self.next_probe);
            next.map(|i| LEVELS[i].0)
        } else {
            None
        };
        let auto = self.mode == CodecMode::Auto;
        let slow = self.link.nanos.is_none_or(|nanos| nanos >= FILL_LINK_NANOS);
        let sampled = auto && is_delta_sample(chunk);
        let keeps = !self.once;
        let share = self.current.map_or(1.0, |level| self.estimate(level).out);
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

    /// Notes that sending `wire_bytes` kept the worker waiting for `nanos`, in the write or for the window, and that all workers
    /// that share the link have sent `all_bytes` so far.
    pub fn observe_link(&mut self, wire_bytes: u64, nanos: u64, all_bytes: u64) {
        self.link.wire += wire_bytes as f64;
        self.link.waited += nanos as f64;
        if self.link.close_window(all_bytes, self.workers) {
            self.choose();
        }
    }

    /// Notes what a part of encoding took and made.
    pub fn observe_encode(&mut self, kind: EncodeKind, bytes_in: u64, bytes_out: u64, nanos: u64) {
        self.link.encoded += nanos as f64;
        if bytes_in == 0 {
            return;
        }
        let per_byte = |x: u64| x as f64 / bytes_in as f64;
        let new = Average { nanos: per_byte(nanos), out: per_byte(bytes_out) };
        match kind {
            EncodeKind::Scan => {}
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
        let weight = WEIGHT.max(1.0 / f64::from(self.data_seen));
        let mut found = new.over(assumed(level).times(self.levels[level]));
        if self.data_seen == 1 {
            // The compressor's own memory came in with it: what that took is no one else's time.
            found.nanos = self.data.nanos;
        }
        self.data = self.data.add(found, weight);
    }

    /// The rate at which the link is believed to drain, in bytes per second; `None` before it was measured.
    pub fn link_bytes_per_s(&self) -> Option<f64> {
        self.link.nanos.map(|nanos| 1e9 / nanos)
    }

    /// What a level costs and makes, as far as known.
    fn estimate(&self, level: usize) -> Average {
        let Average { nanos, out } = assumed(level).times(self.levels[level]).times(self.data);
        Average { nanos, out: out.min(1.0) }
    }

    /// Nanoseconds that a logical byte takes with a choice, over this link.
    fn time(&self, choice: Option<usize>, link_nanos: f64) -> f64 {
        let Average { nanos, out } =
            choice.map_or(Average { nanos: 0.0, out: 1.0 }, |level| self.estimate(level));
        // Between levels nothing changes: the core is as crowded with one as with the other.
        let nanos = if self.current.is_none() { nanos * self.crowding } else { nanos };
        let wire = out * link_nanos;
        nanos.max(wire) + OVERLAP_LOSS * nanos.min(wire)
    }

    /// Chooses again, after a window.
    fn choose(&mut self) {
        let Some(link) = self.link.nanos else { return };
        let raw = (self.mode == CodecMode::Auto).then_some(None);
        let best = raw
            .into_iter()
            .chain((0..LEVELS.len()).map(Some))
            .min_by(|&a, &b| self.time(a, link).total_cmp(&self.time(b, link)))
            .unwrap_or(self.current);
        let now = self.time(self.current, link);
        if self.time(best, link) < SWITCH_BELOW * now {
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
mod tests {
    use super::*;
    use crate::layout::CHUNK_SIZE;

    /// A link that drains a bounded buffer, behind a worker that encodes chunks as `LEVELS` says.
    struct Sim {
        chooser: Chooser,
        /// Bytes per nanosecond.
        link: f64,
        buffer: f64,
        queued: f64,
        nanos: f64,
        chunks: u32,
        sent: u64,
        switches: u32,
        last: Option<i32>,
        /// How the data shrinks, against the assumed.
        out_factor: f64,
    }

    impl Sim {
        fn new(mode: CodecMode, bytes_per_s: f64) -> Self {
            let link = bytes_per_s / 1e9;
            Self {
                chooser: Chooser::new(mode),
                link,
                buffer: (link * 50e6).max(256e3),
                queued: 0.0,
                nanos: 0.0,
                chunks: 0,
                sent: 0,
                switches: 0,
                last: None,
                out_factor: 1.0,
            }
        }

        fn pass(&mut self, nanos: f64) {
            self.nanos += nanos;
            self.queued = (self.queued - nanos * self.link).max(0.0);
        }

        fn chunk(&mut self) {
            let plan = self.chooser.plan(self.chunks);
            self.chunks += 1;
            let bytes = CHUNK_SIZE as f64;
            let scan = bytes * 0.08;
            self.chooser.observe_encode(EncodeKind::Scan, bytes as u64, bytes as u64, scan as u64);
            self.pass(scan);
            let cost = |level: i32, bytes: f64| {
                let (_, nanos, out) = *LEVELS.iter().find(|l| l.0 == level).unwrap();
                (bytes * nanos, (bytes * out * self.out_factor).min(bytes))
            };
            let probe = plan.probe.map(|level| (level, cost(level, 16384.0)));
            let sent = plan.zstd_level.map(|level| (level, cost(level, bytes)));
            if let Some((level, (nanos, out))) = probe {
                self.chooser.observe_encode(EncodeKind::Probe { level }, 16384, out as u64, nanos as u64);
                self.pass(nanos);
            }
            let mut wire = bytes;
            if let Some((level, (nanos, out))) = sent {
                self.chooser.observe_encode(
                    EncodeKind::Zstd { level },
                    bytes as u64,
                    out as u64,
                    nanos as u64,
                );
                self.pass(nanos);
                wire = out;
            }
            self.switches += u32::from(plan.zstd_level != self.last);
            self.last = plan.zstd_level;
            // The write: a copy into the buffer, and waiting until it fits.
            let before = self.nanos;
            self.pass(wire * 0.2);
            self.queued += wire;
            let over = self.queued - self.buffer;
            if over > 0.0 {
                self.pass(over / self.link);
            }
            self.sent += wire as u64;
            self.chooser.observe_link(wire as u64, (self.nanos - before) as u64, self.sent);
        }

        /// Logical bytes per second over the last of these chunks.
        fn run(&mut self, warm: u32, chunks: u32) -> f64 {
            (0..warm).for_each(|_| self.chunk());
            let start = self.nanos;
            self.switches = 0;
            (0..chunks).for_each(|_| self.chunk());
            f64::from(chunks) * CHUNK_SIZE as f64 * 1e9 / (self.nanos - start)
        }
    }

    fn best_fixed(bytes_per_s: f64, out_factor: f64) -> (f64, String) {
        let fixed = LEVELS.iter().map(|l| CodecMode::Zstd { level: Some(l.0) }).chain([CodecMode::Raw]);
        fixed
            .map(|mode| {
                let mut sim = Sim { out_factor, ..Sim::new(mode, bytes_per_s) };
                (sim.run(2000, 2000), mode.to_string())
            })
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .unwrap()
    }

    #[test]
    fn nothing_is_kept_of_what_is_sent_once() {
        for mode in [CodecMode::Auto, CodecMode::Delta] {
            let mut chooser = Chooser::new(mode).each_once();
            let plans: Vec<Plan> = (0..200).map(|chunk| chooser.plan(chunk)).collect();
            assert!(plans.iter().all(|plan| !plan.delta && !plan.fill));
            assert!(plans.iter().any(|plan| plan.in_place(true)));
        }
    }

    #[test]
    fn nearly_as_good_as_the_best_fixed_choice_on_every_link() {
        for mbit in [50.0, 100.0, 400.0, 1000.0, 2500.0, 5000.0, 10_000.0, 25_000.0, 60_000.0] {
            for out_factor in [1.0, 0.3, 2.0, 5.0] {
                let rate = mbit * 1e6 / 8.0;
                let (best, name) = best_fixed(rate, out_factor);
                let mut sim = Sim { out_factor, ..Sim::new(CodecMode::Auto, rate) };
                let got = sim.run(2000, 4000);
                assert!(
                    got > 0.85 * best,
                    "{mbit} Mbit/s, output x{out_factor}: auto {got:.3e}, {name} {best:.3e}, now {:?}",
                    sim.last
                );
                assert!(sim.switches < 100, "{mbit} Mbit/s: flaps, {} switches", sim.switches);
            }
        }
    }

    #[test]
    fn settles_on_raw_at_once_on_loopback_and_on_zstd_on_a_gigabit() {
        let mut loopback = Sim::new(CodecMode::Auto, 4e9);
        loopback.run(16, 1000);
        assert_eq!((loopback.last, loopback.switches), (None, 0));
        let mut gigabit = Sim::new(CodecMode::Auto, 125e6);
        gigabit.run(60, 1);
        assert!(gigabit.last.is_some());
    }

    /// Chunks of zeros: a header each, and a system call for many of them.
    #[test]
    fn zeros_say_nothing_about_the_link() {
        let mut chooser = Chooser::new(CodecMode::Auto).each_once();
        for chunk in 0..20_000 {
            assert!(chooser.plan(chunk).zstd_level.is_none());
            chooser.observe_encode(EncodeKind::Scan, CHUNK_SIZE as u64, 0, 12_000);
            chooser.observe_link(72, 4_000, 0);
        }
        assert_eq!(chooser.link_bytes_per_s(), None);
        // A link that is slow is waited for, however few the bytes.
        for chunk in 0..2000 {
            chooser.plan(chunk);
            chooser.observe_encode(EncodeKind::Scan, CHUNK_SIZE as u64, CHUNK_SIZE as u64, 12_000);
            chooser.observe_link(1000, 100_000, 0);
        }
        assert!(chooser.plan(0).zstd_level.is_some());
    }

    /// Four workers on two cores, each with its part of 10 Gbit/s: compression that would pay for one of them alone does not.
    #[test]
    fn a_crowded_core_is_reckoned_with() {
        let run = |sharing: (u16, f64), mbit: f64| {
            let mut sim = Sim::new(CodecMode::Auto, mbit * 1e6 / 8.0);
            sim.chooser = sim.chooser.sharing(sharing.0, f64::from(sharing.0) / sharing.1);
            sim.run(2000, 1);
            sim.last
        };
        assert!(run((4, 4.0), 2500.0).is_some());
        assert_eq!(run((4, 2.0), 2500.0), None);
        assert!(run((4, 2.0), 250.0).is_some());
    }

    /// Two streams on 10 Gbit/s, of which now one and now the other gets most: what the one that waits sees is no slower link.
    #[test]
    fn streams_that_take_turns_see_one_link() {
        let compressed = |tells_all: bool| {
            let mut chooser = Chooser::new(CodecMode::Auto).sharing(2, 1.0);
            let mut all = 0.0;
            let mut compressed = 0;
            for chunk in 0..4000u32 {
                compressed += u32::from(chooser.plan(chunk).zstd_level.is_some());
                let share = if chunk / 100 % 4 == 0 { 0.25 } else { 1.25 };
                let bytes = CHUNK_SIZE as f64;
                let nanos = bytes * 1.6 / share;
                all += nanos * 1.25;
                chooser.observe_link(bytes as u64, nanos as u64, if tells_all { all as u64 } else { 0 });
            }
            compressed
        };
        assert_eq!(compressed(true), 0);
        assert_ne!(compressed(false), 0);
    }

    /// 2 MiB pass in a millisecond or two, in which whoever receives may just not have run.
    #[test]
    fn no_link_is_judged_by_a_moment() {
        let mut chooser = Chooser::new(CodecMode::Auto);
        for ms in 1..10 {
            chooser.observe_link(2 << 20, 1_000_000, ms * (2 << 20));
            assert_eq!(chooser.link_bytes_per_s(), None);
        }
        chooser.observe_link(2 << 20, 1_000_000, 10 * (2 << 20));
        assert!(chooser.link_bytes_per_s().is_some_and(|rate| (2.0e9..2.2e9).contains(&rate)));
    }

    #[test]
    fn follows_a_link_that_changes() {
        let mut sim = Sim::new(CodecMode::Auto, 4e9);
        sim.run(1000, 1);
        assert_eq!(sim.last, None);
        for _ in 0..3 {
            (sim.link, sim.buffer) = (0.06, 3e6);
            sim.run(400, 1);
            assert!(sim.last.is_some());
            (sim.link, sim.buffer) = (4.0, 8e6);
            sim.run(8000, 1);
            assert_eq!(sim.last, None);
        }
    }

    #[test]
    fn references_come_with_levels_that_are_worth_them() {
        let mut sim = Sim::new(CodecMode::Auto, 4e9);
        sim.chooser = sim.chooser.referring(true);
        let mut probed = std::collections::BTreeSet::new();
        for chunk in 0..1000 {
            let plan = sim.chooser.plan(chunk);
            assert!(!plan.references);
            probed.extend(plan.probe);
            sim.chunk();
        }
        assert_eq!(Vec::from_iter(probed), [-7, -3, -1, 1]);
        // A gigabit for four streams.
        (sim.link, sim.buffer) = (0.03, 3e6);
        sim.run(2000, 1);
        assert!(sim.last.is_some_and(|level| level >= REFERENCES_LEVEL_MIN), "{:?}", sim.last);
        let plans: Vec<Plan> = (0..1000).map(|chunk| sim.chooser.plan(chunk)).collect();
        assert!(plans.iter().all(|plan| plan.references));
        assert!(plans.iter().any(|plan| plan.probe == Some(3)));
        for (level, references) in [(1, false), (2, true), (19, true)] {
            let mode = CodecMode::Zstd { level: Some(level) };
            assert_eq!(Chooser::new(mode).referring(true).plan(0).references, references);
            assert!(!Chooser::new(mode).plan(0).references);
        }
    }

    #[test]
    fn deltas_stay_only_while_they_pay() {
        let run = |link_nanos: u64, delta_nanos: u64, out: u64| {
            let mut chooser = Chooser::new(CodecMode::Auto);
            let bytes = CHUNK_SIZE as u64;
            for chunk in 0..200 {
                let kind = EncodeKind::Delta { chunk };
                if chooser.plan(chunk).delta {
                    chooser.observe_encode(kind, bytes, bytes * out / 100, bytes * delta_nanos / 100);
                }
                chooser.observe_link(bytes, bytes * link_nanos / 100, 0);
            }
            (0..200).filter(|&chunk| chooser.plan(chunk).delta).count()
        };
        // 0.25 ns a byte on the link, 0.1 ns for the delta: pays when it saves most, not when it saves 10 %.
        assert_eq!(run(25, 10, 5), 200);
        let sampled = run(25, 10, 90);
        assert!((1..40).contains(&sampled), "{sampled}");
        // On 1 Gbit/s even 10 % pay.
        assert_eq!(run(800, 10, 90), 200);
    }

    #[test]
    fn pinned_modes_stay_pinned() {
        for (mode, delta, level) in [
            (CodecMode::Raw, false, None),
            (CodecMode::Delta, true, None),
            (CodecMode::Zstd { level: Some(9) }, false, Some(9)),
        ] {
            let mut chooser = Chooser::new(mode);
            for chunk in 0..300 {
                let plan = chooser.plan(chunk);
                assert_eq!((plan.delta, plan.zstd_level, plan.probe), (delta, level, None));
                chooser.observe_link(1 << 20, 1 << 30, 0);
            }
        }
        let mut sim = Sim::new(CodecMode::Zstd { level: None }, 4e9);
        sim.run(1000, 1);
        assert_eq!(sim.last, Some(-7));
    }

    #[test]
    fn names_round_trip() {
        for name in ["auto", "raw", "delta", "zstd", "zstd:-7", "zstd:19"] {
            assert_eq!(name.parse::<CodecMode>().unwrap().to_string(), name);
        }
        assert!(matches!("lz4".parse::<CodecMode>(), Err(CodecModeError::Unknown { .. })));
        assert!(matches!("raw:1".parse::<CodecMode>(), Err(CodecModeError::Unknown { .. })));
        for level in ["zstd:", "zstd:99", "zstd:x"] {
            assert!(matches!(level.parse::<CodecMode>(), Err(CodecModeError::Level { .. })));
        }
    }

    #[test]
    fn survives_any_observation() {
        let mut chooser = Chooser::new(CodecMode::Auto);
        for (a, b) in [(0, 0), (0, u64::MAX), (u64::MAX, 0), (u64::MAX, u64::MAX), (1, 1)] {
            chooser.observe_encode(EncodeKind::Zstd { level: 1 }, a, b, b);
            chooser.observe_encode(EncodeKind::Delta { chunk: 0 }, a, b, a);
            chooser.observe_link(a, b, a);
            let plan = chooser.plan(0);
            assert!((PAGE_SIZE / 8..=DELTA_BYTES_MAX).contains(&plan.delta_bytes_max));
            assert!(chooser.link.nanos.is_none_or(f64::is_finite));
        }
    }
}
