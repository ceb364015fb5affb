//! What a migration came to: the numbers of `info migrate`, and ours.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use crate::socket::Protection;
use crate::source::Counters;
use crate::spent::Spent;
use serde::{Deserialize, Serialize};

/// How it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Status {
    /// Nothing has begun.
    #[default]
    None,
    /// Connecting and preparing.
    Setup,
    /// Pages move; the guest runs at the source.
    Active,
    /// The guest is paused and waits for the word to go on, as was asked for.
    #[serde(rename = "pre-switchover")]
    PreSwitchover,
    /// The guest is paused for the last pages and its state.
    Device,
    /// The guest runs at the destination; pages follow.
    PostcopyActive,
    /// The same, but the connections are lost: the guest stops where it needs a page that is missing.
    PostcopyPaused,
    /// The source is gone with pages that were missing: the guest was stopped for good.
    PostcopyLost,
    /// Connections are lost and made anew; the guest runs at the source.
    Reconnecting,
    /// It is at the destination.
    Completed,
    /// It failed; the guest is where the error says.
    Failed,
    /// Somebody cancelled it; the guest runs at the source.
    Cancelled,
    /// GO was said and not answered: the source asks until it knows who has the guest.
    Unknown,
}

/// Pages by what became of them. `zero` to `raw` count every time a page was handled; a page that was dirtied again counts again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Pages {
    /// Pages of the guest.
    pub total: u64,
    /// Never touched, never read, never sent.
    pub hole: u64,
    /// All zeros (QEMU: duplicate).
    pub zero: u64,
    /// Written again with the content sent last: not sent.
    pub unchanged: u64,
    /// Sent as XBZRLE deltas.
    pub delta: u64,
    /// Sent in zstd frames.
    pub compressed: u64,
    /// Sent as they are (QEMU: normal, together with the two before).
    pub raw: u64,
}

/// Compressed pages that were sent by what they have in common with pages sent before. They are among [`Pages::compressed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Similar {
    /// Pages in frames that refer to others.
    pub pages: u64,
    /// Pages that these refer to, each time.
    pub referred: u64,
    /// Encoded bytes of these frames.
    pub wire_bytes: u64,
}

/// Where the time of the threads that move pages went, in milliseconds, all threads together; waits are counted as well as work. The
/// source fills in the first four, the destination the others. Postcopy is not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Times {
    /// Finding holes, dirty pages and pages of zeros, and hashing pages that are sent from where they lie.
    pub scan: f64,
    /// Copying pages out of guest memory.
    pub copy: f64,
    /// Hashing, deltas and compression of what was copied.
    pub encode: f64,
    /// The kernel's copy into sockets, and waits for room.
    pub send: f64,
    /// The kernel's copy out of sockets, and waits for something to come.
    pub receive: f64,
    /// Bringing fresh memory in.
    pub fault_in: f64,
    /// Decoding, and writing what was decoded.
    pub apply: f64,
    /// Hashing what memory holds.
    pub hash: f64,
}

impl Times {
    /// The parts by name.
    pub fn parts(&self) -> [(&'static str, f64); 8] {
        let Self { scan, copy, encode, send, receive, fault_in, apply, hash } = *self;
        [
            ("scan", scan),
            ("copy", copy),
            ("encode", encode),
            ("send", send),
            ("receive", receive),
            ("fault-in", fault_in),
            ("apply", apply),
            ("hash", hash),
        ]
    }

    /// Each part through `f`, with the same part of `other`.
    #[must_use]
    pub fn zip(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            scan: f(self.scan, other.scan),
            copy: f(self.copy, other.copy),
            encode: f(self.encode, other.encode),
            send: f(self.send, other.send),
            receive: f(self.receive, other.receive),
            fault_in: f(self.fault_in, other.fault_in),
            apply: f(self.apply, other.apply),
            hash: f(self.hash, other.hash),
        }
    }
}

impl From<&Spent> for Times {
    fn from(spent: &Spent) -> Self {
        let ms = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / 1e6;
        Self {
            scan: ms(&spent.scan),
            copy: ms(&spent.copy),
            encode: ms(&spent.encode),
            send: ms(&spent.send),
            receive: ms(&spent.receive),
            fault_in: ms(&spent.fault_in),
            apply: ms(&spent.apply),
            hash: ms(&spent.hash),
        }
    }
}

/// Postcopy: what came after the guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Postcopy {
    /// Pages that were missing when the guest began to run at the destination.
    pub pages: u64,
    /// Pages that still are.
    pub pages_left: u64,
    /// Times that the guest had to wait for a page.
    pub faults: u64,
    /// Microseconds that half of these waits did not exceed, from the fault's event to the wake-up; known at the destination, and at the
    /// end from it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fault_p50_us: Option<u64>,
    /// Microseconds that all but one in a hundred did not exceed; likewise.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fault_p99_us: Option<u64>,
    /// The longest wait, in microseconds; known at the destination.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fault_max_us: Option<u64>,
    /// Time that vCPUs waited for pages, all of them together, in milliseconds; known at the destination, and at the end from it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub blocked_ms: Option<f64>,
    /// The same for each of them, in milliseconds; known at the destination.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub vcpu_blocked_ms: Vec<f64>,
    /// Of these pages, zeros: at the source as often as they were sent, at the destination as they came.
    #[serde(default)]
    pub zero: u64,
    /// In zstd frames; likewise.
    #[serde(default)]
    pub compressed: u64,
    /// As they are; likewise.
    #[serde(default)]
    pub raw: u64,
    /// Bytes on the wire for these pages.
    pub wire_bytes: u64,
    /// Page bytes delivered.
    #[serde(default)]
    pub logical_bytes: u64,
    /// From GO until no page was missing, in milliseconds; so far.
    pub drain_ms: f64,
    /// Page bytes delivered in a second of that time, in MiB.
    pub drain_mib_s: f64,
    /// Pages that were sent again because their connection was lost.
    pub resent: u64,
    /// Pages that came other than they were sent, and were sent again.
    pub damaged: u64,
    /// Times that the connections were opened again.
    pub reconnects: u64,
}

/// How a migration stood when one of its passes over a dirty set had ended. Bytes and pages are those of all passes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Round {
    /// From the request, in milliseconds.
    pub ended_ms: f64,
    /// Pages that were written since the last dirty sync.
    pub dirtied_pages: u64,
    /// Bytes of pages that waited or were under way.
    pub remaining_bytes: u64,
    /// Page bytes delivered.
    pub logical_bytes: u64,
    /// Bytes on the wire for them.
    pub wire_bytes: u64,
    /// Pages by what became of them.
    pub pages: Pages,
    /// For how long the guest stood still so that the dirty log could look, in milliseconds.
    #[serde(default)]
    pub paused_ms: f64,
}

/// Why a migration does not end by itself, and what may help.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Stalled {
    /// Why.
    pub why: String,
    /// Each by itself, what costs least first.
    pub what_helps: Vec<Remedy>,
}

/// What may help a migration that does not end by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Remedy {
    /// A higher [`Tuning::bandwidth`](super::tuning::Tuning::bandwidth).
    Bandwidth,
    /// [`Tuning::auto_converge`](super::tuning::Tuning::auto_converge).
    AutoConverge,
    /// A higher [`Tuning::throttle_max`](super::tuning::Tuning::throttle_max).
    ThrottleMax,
    /// [`Progress::postcopy`](super::progress::Progress::postcopy).
    Postcopy,
    /// A downtime limit of at least so many milliseconds.
    DowntimeLimit(u64),
    /// A guest that writes less.
    QuieterGuest,
    /// [`Progress::switchover`](super::progress::Progress::switchover): to accept the downtime.
    Switchover,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bandwidth => f.write_str("a higher bandwidth limit"),
            Self::AutoConverge => f.write_str("auto-converge"),
            Self::ThrottleMax => f.write_str("a higher limit of what auto-converge takes"),
            Self::Postcopy => f.write_str("postcopy"),
            Self::DowntimeLimit(ms) => write!(f, "a downtime limit of {ms} ms"),
            Self::QuieterGuest => f.write_str("a quieter guest"),
            Self::Switchover => f.write_str("to switch over and accept the downtime"),
        }
    }
}

impl Stalled {
    /// A sentence, with each remedy as `say` has it.
    pub fn text(&self, say: impl Fn(Remedy) -> String) -> String {
        let said: Vec<String> = self.what_helps.iter().map(|&remedy| say(remedy)).collect();
        match said.as_slice() {
            [] => self.why.clone(),
            [only] => format!("{}; what may help: {only}", self.why),
            [others @ .., last] => format!("{}; what may help: {}, or {last}", self.why, others.join(", ")),
        }
    }
}

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(|remedy| remedy.to_string()))
    }
}

/// A migration's numbers, while it runs and at its end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Report {
    /// How it stands.
    pub status: Status,
    /// From the request to the end, in milliseconds.
    pub total_ms: f64,
    /// Guest not running anywhere, in milliseconds: from its pause at the source to the destination's word that it runs.
    pub downtime_ms: f64,
    /// Time that the guest stood still for trials of how long its state takes, all of them together, in milliseconds.
    #[serde(default)]
    pub rehearsed_ms: f64,
    /// Time that the guest stood still so that its dirty log could look which pages it wrote, all of them together, in milliseconds.
    #[serde(default)]
    pub paused_ms: f64,
    /// Pages that were not as they had been sent, and that the dirty log had not told of, where all of memory was compared in the end.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub final_check_pages: Option<u64>,
    /// What is not as the rest of this may make one think, and is right so: memory that is the destination's own, say.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
    /// What the downtime was predicted to be at the switchover, or would be now, in milliseconds; 0 while it cannot be told.
    pub expected_downtime_ms: f64,
    /// The downtime that is aimed for, in milliseconds.
    #[serde(default)]
    pub downtime_limit_ms: u64,
    /// Most wire bytes a second, where they are limited.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bandwidth_limit: Option<u64>,
    /// Percent of their time that is taken from the vCPUs: one number for each, or one for all; empty while nothing is.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub throttle_percent: Vec<u8>,
    /// The guest dirties memory as fast as it is delivered: how fast, and what would help.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stalled: Option<String>,
    /// Connecting, layout, destination memory, in milliseconds.
    pub setup_ms: f64,
    /// Passes over a dirty set (QEMU: dirty sync count).
    pub rounds: u64,
    /// What protects the connections.
    #[serde(default, skip_serializing_if = "Protection::is_none")]
    pub protection: Protection,
    /// Data streams.
    pub streams: u16,
    /// Page bytes delivered, unchanged pages included.
    pub logical_bytes: u64,
    /// Bytes on the wire for them.
    pub wire_bytes: u64,
    /// Bytes of pages that wait or are under way.
    pub remaining_bytes: u64,
    /// Pages by what became of them.
    pub pages: Pages,
    /// Pages sent by what they have in common with others; known at the source.
    #[serde(default)]
    pub similar: Similar,
    /// Page size in bytes.
    pub page_size: u32,
    /// Pages the guest dirties in a second, by the last syncs.
    pub dirty_pages_per_s: f64,
    /// Guest memory moved in a second, in 10^9 bytes: logical bytes, and holes, over the time after setup.
    pub logical_gb_s: f64,
    /// Wire bytes in a second, in 10^9 bytes, over the time after setup.
    pub wire_gb_s: f64,
    /// CPU time of this process during the migration, in seconds.
    pub cpu_s: f64,
    /// Where the time of the threads that move pages went.
    #[serde(default)]
    pub time_ms: Times,
    /// Largest resident set of this process, in bytes.
    pub max_rss_bytes: u64,
    /// Pages whose receipt did not match and that were sent again.
    pub mismatches: u64,
    /// Pages that the guest wrote while they were sent from where they lie, and that were sent again from a copy.
    #[serde(default)]
    pub torn: u64,
    /// Streams that were lost on the way.
    pub streams_lost: u32,
    /// Postcopy, where there was some.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub postcopy: Option<Postcopy>,
    /// Streams that were connected again after a loss.
    #[serde(default)]
    pub streams_reconnected: u32,
    /// Times that the control connection was lost and the session went on over another.
    #[serde(default)]
    pub reconnects: u32,
    /// Time without any connection that pages could travel on, in milliseconds.
    #[serde(default)]
    pub reconnecting_ms: f64,
    /// Wire bytes sent on streams that were lost, and not receipted: their pages were sent twice, or more often.
    #[serde(default)]
    pub resent_bytes: u64,
    /// Every page was receipted with the digest of what was sent, and both sides' accounts are equal.
    pub verified: bool,
    /// xxh3-128 of the content, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub digest: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

impl Report {
    /// Rounds what is measured to what is worth printing: microseconds, and thousandths of the rest.
    pub fn rounded(mut self) -> Self {
        for value in [
            &mut self.total_ms,
            &mut self.downtime_ms,
            &mut self.expected_downtime_ms,
            &mut self.rehearsed_ms,
            &mut self.setup_ms,
            &mut self.reconnecting_ms,
            &mut self.dirty_pages_per_s,
            &mut self.logical_gb_s,
            &mut self.wire_gb_s,
            &mut self.cpu_s,
        ] {
            *value = (*value * 1e3).round() / 1e3;
        }
        self.time_ms = self.time_ms.zip(Times::default(), |ms, _| (ms * 1e3).round() / 1e3);
        if let Some(p) = &mut self.postcopy {
            let times = [&mut p.drain_ms, &mut p.drain_mib_s].into_iter();
            times
                .chain(&mut p.blocked_ms)
                .chain(&mut p.vcpu_blocked_ms)
                .for_each(|value| *value = (*value * 1e3).round() / 1e3);
        }
        self
    }

    /// Fills in what a source has counted.
    pub(crate) fn count(&mut self, counters: &Counters) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.pages.zero = get(&counters.zero);
        self.pages.unchanged = get(&counters.unchanged);
        self.pages.delta = get(&counters.delta);
        self.pages.compressed = get(&counters.compressed);
        self.pages.raw = get(&counters.raw);
        self.similar = Similar {
            pages: get(&counters.similar),
            referred: get(&counters.referred),
            wire_bytes: get(&counters.similar_bytes),
        };
        self.logical_bytes = get(&counters.logical_acked);
        self.wire_bytes = get(&counters.wire_acked);
        self.mismatches = get(&counters.mismatches);
        self.torn = get(&counters.torn);
        self.time_ms = (&counters.spent).into();
    }

    /// Fills in what follows from bytes and times.
    pub(crate) fn rates(&mut self, total: Duration) {
        self.total_ms = total.as_secs_f64() * 1e3;
        let moving = (self.total_ms - self.setup_ms).max(1e-3) * 1e6;
        let holes = self.pages.hole * u64::from(self.page_size);
        self.logical_gb_s = (self.logical_bytes + holes) as f64 / moving;
        self.wire_gb_s = self.wire_bytes as f64 / moving;
    }

    fn streams_text(&self) -> String {
        let Self { streams, streams_lost: lost, streams_reconnected: again, .. } = self;
        match lost {
            0 => streams.to_string(),
            _ => format!("{streams} ({lost} lost, {again} connected again)"),
        }
    }

    /// What looks at the guest's memory took and found, and what is to be said of it.
    fn looks(&self) -> Vec<(&'static str, String)> {
        let paused = (self.paused_ms != 0.0)
            .then(|| ("looks:", format!("{:.1} ms (the guest stood still for them)", self.paused_ms)));
        let found = self
            .final_check_pages
            .map(|pages| ("final check:", format!("{pages} pages (written unnoticed, and sent)")));
        let notes = self.notes.iter().map(|note| ("note:", note.clone()));
        paused.into_iter().chain(found).chain(notes).collect()
    }

    /// The lines that a reader of `info migrate` knows.
    pub fn summary(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{name:<18}{value}");
        };
        let status = serde_json::to_value(self.status).unwrap_or_default();
        line("Migration status:", status.as_str().unwrap_or("?").into());
        if let Some(error) = &self.error {
            line("error:", error.clone());
        }
        line("total time:", format!("{:.0} ms", self.total_ms));
        line(
            "downtime:",
            format!("{:.1} ms (expected {:.1} ms)", self.downtime_ms, self.expected_downtime_ms),
        );
        self.looks().into_iter().for_each(|(name, value)| line(name, value));
        if !self.throttle_percent.is_empty() {
            let percents: Vec<String> = self.throttle_percent.iter().map(u8::to_string).collect();
            line("cpu throttle:", format!("{} %", percents.join(", ")));
        }
        if let Some(stalled) = &self.stalled {
            line("stalled:", stalled.clone());
        }
        line("setup:", format!("{:.1} ms", self.setup_ms));
        line("transferred ram:", format!("{} kbytes", self.wire_bytes / 1024));
        line(
            "throughput:",
            format!(
                "{:.0} mbps ({:.2} GB/s wire, {:.2} GB/s logical)",
                self.wire_gb_s * 8e3,
                self.wire_gb_s,
                self.logical_gb_s
            ),
        );
        line("remaining ram:", format!("{} kbytes", self.remaining_bytes / 1024));
        line("total ram:", format!("{} kbytes", self.pages.total * u64::from(self.page_size) / 1024));
        line("holes:", format!("{} pages", self.pages.hole));
        line("duplicate:", format!("{} pages (zero)", self.pages.zero));
        line("unchanged:", format!("{} pages", self.pages.unchanged));
        let normal = self.pages.raw + self.pages.compressed + self.pages.delta;
        line(
            "normal:",
            format!(
                "{normal} pages ({} raw, {} compressed, {} delta)",
                self.pages.raw, self.pages.compressed, self.pages.delta
            ),
        );
        if self.similar.pages != 0 {
            let Similar { pages, referred, wire_bytes } = self.similar;
            line(
                "similar:",
                format!(
                    "{pages} of the compressed pages refer to {referred} sent before, in {} kbytes",
                    wire_bytes / 1024
                ),
            );
        }
        if self.torn != 0 {
            line("torn:", format!("{} pages (written while they were sent, and sent again)", self.torn));
        }
        if self.mismatches != 0 {
            line("mismatches:", format!("{} pages (arrived damaged, and sent again)", self.mismatches));
        }
        if let Some(p) = &self.postcopy {
            line(
                "postcopy:",
                format!(
                    "{} pages, {} left, {:.1} ms, {:.0} MiB/s",
                    p.pages, p.pages_left, p.drain_ms, p.drain_mib_s
                ),
            );
            line(
                "postcopy ram:",
                format!(
                    "{} kbytes ({} pages zero, {} raw, {} compressed)",
                    p.wire_bytes / 1024,
                    p.zero,
                    p.raw,
                    p.compressed
                ),
            );
            let waits = match (p.fault_p50_us, p.fault_p99_us, p.blocked_ms) {
                (Some(p50), Some(p99), Some(blocked)) => {
                    format!(" ({p50} us median, {p99} us p99; vCPUs waited {blocked:.1} ms)")
                }
                _ => String::new(),
            };
            line("postcopy faults:", format!("{}{waits}", p.faults));
        }
        let parts = self.time_ms.parts();
        let parts: Vec<_> = parts.iter().filter(|(_, ms)| *ms >= 0.05).collect();
        if !parts.is_empty() {
            let parts: Vec<_> = parts.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
            line("thread time, ms:", parts.join(", "));
        }
        line("dirty sync count:", format!("{} (rounds)", self.rounds));
        line("dirty pages rate:", format!("{:.0} pages/s", self.dirty_pages_per_s));
        line("page size:", format!("{} kbytes", self.page_size / 1024));
        if let Some(bytes_per_s) = self.bandwidth_limit {
            line("bandwidth limit:", format!("{:.3} MB/s", bytes_per_s as f64 / 1e6));
        }
        if self.protection != Protection::None {
            line("protection:", self.protection.to_string());
        }
        line("streams:", self.streams_text());
        if self.reconnects != 0 {
            line(
                "reconnects:",
                format!("{} ({:.1} s without connection)", self.reconnects, self.reconnecting_ms / 1e3),
            );
        }
        if self.resent_bytes != 0 {
            line("sent twice:", format!("{} kbytes", self.resent_bytes / 1024));
        }
        line(
            "verified:",
            if self.verified { "yes: every page receipted, accounts equal".into() } else { "no".into() },
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_said_of_postcopy_is_not_shown_as_nothing() {
        let at_source = Postcopy { faults: 7, ..Postcopy::default() };
        let report = |postcopy| Report { postcopy: Some(postcopy), ..Report::default() }.rounded();
        let early = report(at_source.clone());
        let shown = serde_json::to_value(&early).unwrap();
        for field in ["fault_p50_us", "fault_p99_us", "fault_max_us", "blocked_ms"] {
            assert!(shown["postcopy"].get(field).is_none(), "{field}: {shown}");
        }
        assert!(early.summary().contains("postcopy faults:  7\n"), "{}", early.summary());
        let (p50, p99, blocked) = (Some(5), Some(9), Some(0.5));
        let end = report(Postcopy { fault_p50_us: p50, fault_p99_us: p99, blocked_ms: blocked, ..at_source });
        let line = "postcopy faults:  7 (5 us median, 9 us p99; vCPUs waited 0.5 ms)";
        assert!(end.summary().contains(line), "{}", end.summary());
    }

    #[test]
    fn pages_that_were_sent_again_are_shown_where_there_are_any() {
        let text = Report::default().summary();
        assert!(
            !text.contains("similar") && !text.contains("torn") && !text.contains("mismatches"),
            "{text}"
        );
        let similar = Similar { pages: 12, referred: 5, wire_bytes: 2048 };
        let report = Report { torn: 7, mismatches: 3, similar, ..Report::default() };
        let text = report.summary();
        for line in [
            "similar:          12 of the compressed pages refer to 5 sent before, in 2 kbytes",
            "torn:             7 pages",
            "mismatches:       3 pages",
        ] {
            assert!(text.lines().any(|l| l.starts_with(line)), "{line}: {text}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["torn"], &json["mismatches"]), (&7.into(), &3.into()));
    }
}
