//! What the bench found, as JSON and as a table.

use pageferry::engine::report::{Pages, Times};
use pageferry::pagecopy::layout::PAGE_SIZE;
use pageferry::vmm_shim::guest_memory::Backing;
use serde::{Deserialize, Serialize};

use super::limit::Limits;
use super::live::{Dirtying, Writing};
use super::series::Series;
use super::side::Outcome;
use crate::cli::backing;
use crate::cli::stats::median;

/// What a run reached of what the machine could do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct OfLimit {
    /// Of the least total time: for faulting the destination's memory in, finding its zeros and carrying its wire bytes, one
    /// after the other with all cores. None for memory that is written meanwhile, or of huge pages from the reserve.
    pub total: Option<f64>,
    /// Of the socket's rate, by wire bytes over the time after setup.
    pub wire: f64,
}

impl OfLimit {
    /// What `run` into memory of this kind reached.
    pub(super) fn of(limits: &Limits, run: &Run, memory: &str) -> Self {
        let page = PAGE_SIZE as f64;
        let pages = &run.pages;
        let (present, zero) = ((pages.total - pages.hole) as f64 * page, pages.zero as f64 * page);
        // Memory that is not brought in ahead stays untouched where zeros come.
        let faults = match backing::parse(memory) {
            Ok(Backing::Anonymous { huge: true }) => Some(present / limits.fault_anon_huge_gb_s),
            Ok(Backing::Anonymous { huge: false }) => Some(present / limits.fault_anon_4k_gb_s),
            Ok(Backing::Memfd | Backing::File { .. }) => Some((present - zero) / limits.fault_memfd_gb_s),
            Ok(Backing::MemfdHuge) | Err(_) => None,
        };
        let wire = run.wire_bytes as f64;
        let least_ns = |faults: f64| faults + zero / limits.zero_scan_gb_s + wire / limits.socket_gb_s;
        let after_setup_ns = ((run.total_ms - run.setup_ms) * 1e6).max(1.0);
        let hundredths = |value: f64| (value * 100.0).round() / 100.0;
        Self {
            total: faults
                .filter(|_| run.writing.is_none())
                .map(|faults| hundredths(least_ns(faults) / (run.total_ms * 1e6).max(1.0))),
            wire: hundredths(wire / after_setup_ns / limits.socket_gb_s),
        }
    }
}

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Results {
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// What it holds: a composition, or the path of an image.
    pub content: String,
    /// What carries the streams.
    pub transport: String,
    /// What the destination's memory is made of.
    pub memory: String,
    /// How it was written while it moved.
    pub dirtying: Option<Dirtying>,
    /// What this machine can do.
    pub limits: Option<Limits>,
    /// CPUs of this host.
    pub cpus: usize,
    /// One for each configuration.
    pub rows: Vec<Row>,
}

/// One configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    pub streams: u16,
    pub codec: String,
    /// Runs that count, in the order they ran in.
    pub runs: Vec<Run>,
    /// What the destination said that its memory is made of.
    #[serde(skip)]
    pub memory: Option<String>,
    /// How these runs went over time, where that was asked for.
    #[serde(skip)]
    pub series: Vec<Series>,
    /// The middle of each of their figures; codec mix, rounds and where time went are those of the run in the middle by total time.
    pub median: Option<Run>,
    /// What share of the limits the median run reached.
    pub of_limit: Option<OfLimit>,
    /// Why there are no more.
    pub failed: Option<String>,
}

/// One migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    /// From the request to the end, in milliseconds.
    pub total_ms: f64,
    /// Of that, before the first page could be sent.
    pub setup_ms: f64,
    /// Guest not running anywhere, in milliseconds.
    pub downtime_ms: f64,
    /// What it was predicted to be.
    pub expected_downtime_ms: f64,
    /// Guest memory moved in a second of the total time, in 10^9 bytes: pages as often as they were delivered, and holes.
    pub logical_gb_s: f64,
    /// Bytes on the wire in a second of the total time, in 10^9 bytes.
    pub wire_gb_s: f64,
    /// As `logical_gb_s`, in a second of the time after setup.
    pub after_setup_gb_s: f64,
    /// Page bytes delivered.
    pub logical_bytes: u64,
    /// Bytes on the wire for them.
    pub wire_bytes: u64,
    /// Passes over a dirty set.
    pub rounds: u64,
    /// Pages by what became of them.
    pub pages: Pages,
    /// Page bytes that a second of the guest's time dirtied by the last syncs, in 10^6.
    pub dirty_mb_s: f64,
    /// Where the time of both sides' threads went.
    #[serde(default)]
    pub time_ms: Times,
    /// What the writers did, where there were any.
    pub writing: Option<Writing>,
    /// What it cost the source.
    pub source: Cost,
    /// What it cost the destination.
    pub destination: Cost,
}

/// What a run cost one side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Cost {
    /// CPU time, in seconds.
    pub cpu_s: f64,
    /// CPU time for a GiB of guest RAM, in seconds.
    pub cpu_s_per_gib: f64,
    /// Largest resident set less guest memory, in bytes.
    pub peak_beyond_bytes: u64,
}

impl Cost {
    fn of(outcome: &Outcome, ram_bytes: u64) -> Self {
        let cpu_s = outcome.report.cpu_s;
        let gib = ram_bytes as f64 / f64::from(1 << 30);
        Self { cpu_s, cpu_s_per_gib: cpu_s / gib, peak_beyond_bytes: outcome.peak_beyond_bytes }.rounded()
    }

    fn rounded(mut self) -> Self {
        round(&mut self.cpu_s);
        round(&mut self.cpu_s_per_gib);
        self
    }
}

impl Run {
    /// The figures of what both sides say.
    pub(super) fn new(source: &Outcome, destination: &Outcome) -> Self {
        let report = &source.report;
        let ram_bytes = report.pages.total * u64::from(report.page_size);
        let nanoseconds = (report.total_ms * 1e6).max(1.0);
        let holes = report.pages.hole * u64::from(report.page_size);
        Self {
            total_ms: report.total_ms,
            setup_ms: report.setup_ms,
            downtime_ms: report.downtime_ms,
            expected_downtime_ms: report.expected_downtime_ms,
            logical_gb_s: (report.logical_bytes + holes) as f64 / nanoseconds,
            wire_gb_s: report.wire_bytes as f64 / nanoseconds,
            after_setup_gb_s: report.logical_gb_s,
            logical_bytes: report.logical_bytes,
            wire_bytes: report.wire_bytes,
            rounds: report.rounds,
            pages: report.pages,
            dirty_mb_s: report.dirty_pages_per_s * f64::from(report.page_size) / 1e6,
            time_ms: report.time_ms.zip(destination.report.time_ms, |a, b| a + b),
            writing: source.writing,
            source: Cost::of(source, ram_bytes),
            destination: Cost::of(destination, ram_bytes),
        }
        .rounded()
    }

    fn rounded(mut self) -> Self {
        for value in [
            &mut self.total_ms,
            &mut self.setup_ms,
            &mut self.downtime_ms,
            &mut self.expected_downtime_ms,
            &mut self.logical_gb_s,
            &mut self.wire_gb_s,
            &mut self.after_setup_gb_s,
            &mut self.dirty_mb_s,
        ] {
            round(value);
        }
        self
    }

    /// The middle of each figure of these runs.
    fn middle(runs: &[Self]) -> Option<Self> {
        let typical = &runs[typical(runs)?];
        let middle = |figure: &dyn Fn(&Self) -> f64| {
            let figures: Vec<f64> = runs.iter().map(figure).collect();
            median(&figures).unwrap_or_default()
        };
        let cost = |side: &dyn Fn(&Self) -> Cost| Cost {
            cpu_s: middle(&|run| side(run).cpu_s),
            cpu_s_per_gib: middle(&|run| side(run).cpu_s_per_gib),
            peak_beyond_bytes: middle(&|run| side(run).peak_beyond_bytes as f64) as u64,
        };
        let median = Self {
            total_ms: middle(&|run| run.total_ms),
            setup_ms: middle(&|run| run.setup_ms),
            downtime_ms: middle(&|run| run.downtime_ms),
            expected_downtime_ms: middle(&|run| run.expected_downtime_ms),
            logical_gb_s: middle(&|run| run.logical_gb_s),
            wire_gb_s: middle(&|run| run.wire_gb_s),
            after_setup_gb_s: middle(&|run| run.after_setup_gb_s),
            logical_bytes: middle(&|run| run.logical_bytes as f64) as u64,
            wire_bytes: middle(&|run| run.wire_bytes as f64) as u64,
            rounds: typical.rounds,
            pages: typical.pages,
            dirty_mb_s: middle(&|run| run.dirty_mb_s),
            time_ms: typical.time_ms,
            writing: typical.writing,
            source: cost(&|run| run.source).rounded(),
            destination: cost(&|run| run.destination).rounded(),
        };
        Some(median.rounded())
    }
}

impl Row {
    /// A configuration that has not run yet.
    pub(super) fn new(streams: u16, codec: String) -> Self {
        Self {
            streams,
            codec,
            runs: vec![],
            memory: None,
            series: vec![],
            median: None,
            of_limit: None,
            failed: None,
        }
    }

    /// Takes in a run and how it went over time. After a failure there are no more.
    pub(super) fn add(&mut self, run: Result<(Run, Series), String>) {
        match run {
            Ok((run, series)) => {
                self.runs.push(run);
                self.series.push(series);
                self.median = Run::middle(&self.runs);
            }
            Err(reason) => self.failed = Some(reason),
        }
    }

    /// How the run in the middle by total time went.
    pub(super) fn typical(&self) -> Option<&Series> {
        self.series.get(typical(&self.runs)?)
    }
}

/// Which run is the one in the middle by total time.
fn typical(runs: &[Run]) -> Option<usize> {
    let mut by_time: Vec<_> = (0..runs.len()).collect();
    by_time.sort_by(|&a, &b| runs[a].total_ms.total_cmp(&runs[b].total_ms));
    by_time.get(runs.len().checked_sub(1)? / 2).copied()
}

/// To thousandths.
fn round(value: &mut f64) {
    *value = (*value * 1e3).round() / 1e3;
}

/// What was measured, in a line or two.
pub(super) fn heading(results: &Results) -> Vec<String> {
    let Results { ram_bytes, content, transport, memory, cpus, .. } = results;
    let runs = results.rows.iter().map(|row| row.runs.len()).max().unwrap_or(0);
    let mut lines = vec![format!(
        "{} of RAM ({content}) over {transport} into {memory}, {cpus} CPUs; medians of {runs}; GB = 10^9 bytes, MiB = 2^20",
        size_text(*ram_bytes)
    )];
    lines.extend(results.dirtying.as_ref().map(|dirtying| {
        let Dirtying { bytes_per_s, pattern, trace, writers, write_bytes } = dirtying;
        let what = match (bytes_per_s, trace) {
            (Some(rate), _) => format!("dirty {} MB/s ({pattern})", *rate as f64 / 1e6),
            (None, Some(trace)) => format!("replay {}", trace.display()),
            (None, None) => "dirty nothing".into(),
        };
        format!("{writers} writers {what}, {write_bytes} bytes in each page")
    }));
    lines
}

/// The table with its heads.
pub(super) fn cells(results: &Results) -> Vec<Vec<String>> {
    let heads = HEAD.map(str::to_owned).to_vec();
    std::iter::once(heads).chain(results.rows.iter().map(cells_of)).collect()
}

/// What the columns mean.
pub(super) fn footing(results: &Results) -> Vec<String> {
    let mut lines = vec![
        "total, setup, down: ms. CPU-s/GiB: of guest RAM. peak: MiB beyond guest RAM. S: source, D: destination."
            .into(),
    ];
    let times = results.rows.iter().filter_map(times_of);
    let head = "thread time, all threads of a side together, waits included, ms a GiB of RAM (send, receive: copies and waits):";
    lines.extend(std::iter::once(head.to_owned()).chain(times));
    if results.limits.is_some() {
        lines.push("of limit: of the least total time, and of the sockets' rate after setup.".into());
    }
    lines
}

/// The table as text.
pub(super) fn text(results: &Results) -> String {
    let blank = || std::iter::once(String::new());
    let table = align(&cells(results));
    let mut lines: Vec<_> = heading(results).into_iter().chain(blank()).chain(table).chain(blank()).collect();
    lines.extend(footing(results));
    if let Some(limits) = &results.limits {
        lines.extend(blank().chain(limits.text(&results.transport).lines().map(str::to_owned)));
    }
    lines.join("\n") + "\n"
}

/// Heads of the columns.
const HEAD: [&str; 16] = [
    "streams",
    "codec",
    "total",
    "least to most",
    "setup",
    "down",
    "GB/s",
    "wire GB/s",
    "CPU-s/GiB S",
    "D",
    "peak S",
    "D",
    "rounds",
    "dirty MB/s",
    "of limit",
    "pages sent as",
];

fn cells_of(row: &Row) -> Vec<String> {
    let mut cells = vec![row.streams.to_string(), row.codec.clone()];
    if let Some(run) = &row.median {
        let totals = || row.runs.iter().map(|run| run.total_ms);
        let (least, most) = (totals().fold(f64::INFINITY, f64::min), totals().fold(0.0, f64::max));
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        cells.extend([
            format!("{:.0}", run.total_ms),
            format!("{least:.0} to {most:.0}"),
            format!("{:.0}", run.setup_ms),
            format!("{:.1}", run.downtime_ms),
            format!("{:.2}", run.logical_gb_s),
            format!("{:.2}", run.wire_gb_s),
            format!("{:.3}", run.source.cpu_s_per_gib),
            format!("{:.3}", run.destination.cpu_s_per_gib),
            mib(run.source.peak_beyond_bytes),
            mib(run.destination.peak_beyond_bytes),
            run.rounds.to_string(),
            format!("{:.0}", run.dirty_mb_s),
            row.of_limit.map_or_else(
                || "-".into(),
                |of| {
                    let total = of.total.map_or_else(|| "-".into(), |total| format!("{total:.2}"));
                    format!("{total} {:.2}", of.wire)
                },
            ),
            codec_mix(&run.pages),
        ]);
    }
    if let Some(reason) = &row.failed {
        cells.push(format!("failed: {reason}"));
    }
    cells
}

/// Where the time of a configuration's typical run went, both sides.
fn times_of(row: &Row) -> Option<String> {
    let run = row.median.as_ref()?;
    let gib = run.pages.total as f64 * PAGE_SIZE as f64 / f64::from(1 << 30);
    let parts = run.time_ms.parts().into_iter().filter(|(_, ms)| *ms >= 0.5);
    let parts: Vec<_> = parts.map(|(name, ms)| format!("{name} {:.0}", ms / gib)).collect();
    Some(format!("{:>7}  {}  {}", row.streams, row.codec, parts.join(", ")))
}

/// What share of the pages that were handled went which way.
fn codec_mix(pages: &Pages) -> String {
    let kinds = [
        ("raw", pages.raw),
        ("zstd", pages.compressed),
        ("delta", pages.delta),
        ("unchanged", pages.unchanged),
        ("zero", pages.zero),
    ];
    let all = kinds.iter().map(|(_, count)| count).sum::<u64>().max(1);
    let present = kinds.iter().filter(|(_, count)| *count != 0);
    let parts: Vec<_> =
        present.map(|(name, count)| format!("{name} {:.0}%", *count as f64 / all as f64 * 100.0)).collect();
    if parts.is_empty() { "nothing".into() } else { parts.join(" ") }
}

/// Columns of equal width: words to the left, numbers to the right, the last two as they are.
fn align(rows: &[Vec<String>]) -> Vec<String> {
    let columns = HEAD.len();
    let width = |column: usize| {
        let cells = rows.iter().filter(|row| row.len() >= columns).filter_map(|row| row.get(column));
        let head = HEAD[column].len();
        cells.map(|cell| cell.len()).max().unwrap_or(0).max(head)
    };
    rows.iter()
        .map(|row| {
            let cells = row.iter().enumerate().map(|(column, cell)| match column {
                1 => format!("{cell:<0$}", width(column)),
                _ if column + 1 >= columns || cell.starts_with("failed") => cell.clone(),
                _ => format!("{cell:>0$}", width(column)),
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

/// `4 GiB`, `24 MiB`, `20 KiB`.
fn size_text(bytes: u64) -> String {
    let (shift, unit) = [(30, "GiB"), (20, "MiB")]
        .into_iter()
        .find(|(shift, _)| bytes.is_multiple_of(1 << shift))
        .unwrap_or((10, "KiB"));
    format!("{} {unit}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use pageferry::engine::report::Report;

    use super::*;
    use crate::cli::bench::limit::tests::LIMITS;

    fn run(total_ms: f64, cpu_s: f64) -> Run {
        let pages = Pages { total: 1 << 18, hole: 1 << 17, raw: 3 << 15, zero: 1 << 15, ..Pages::default() };
        let logical_bytes = 1 << 29;
        let mut report = Report::default();
        (report.total_ms, report.cpu_s, report.pages) = (total_ms, cpu_s, pages);
        (report.page_size, report.logical_bytes) = (4096, logical_bytes);
        let source = Outcome { report: report.clone(), peak_beyond_bytes: 3 << 20, ..Outcome::default() };
        Run::new(&source, &Outcome { report, peak_beyond_bytes: 5 << 19, ..Outcome::default() })
    }

    #[test]
    fn figures_follow_from_what_the_sides_say() {
        let run = run(500.0, 0.75);
        assert_eq!(run.logical_gb_s, 2.147);
        assert_eq!(run.source.cpu_s_per_gib, 0.75);
    }

    #[test]
    fn rows_show_medians_and_failures() {
        let mut row = Row::new(4, "auto".into());
        for (total, cpu) in [(400.0, 0.5), (600.0, 0.7), (500.0, 0.9)] {
            row.add(Ok((run(total, cpu), Series::default())));
        }
        let middle = row.median.clone().unwrap();
        assert_eq!((middle.total_ms, middle.source.cpu_s), (500.0, 0.7));
        let mut failed = Row::new(16, "zstd:1".into());
        failed.add(Err("source: cancelled".into()));
        let mut results = Results {
            ram_bytes: 1 << 30,
            content: "hole=50,random=50".into(),
            transport: "tcp".into(),
            memory: "anon".into(),
            dirtying: None,
            limits: None,
            cpus: 2,
            rows: vec![row, failed],
        };
        let text = text(&results);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("1 GiB of RAM (hole=50,random=50) over tcp into anon"), "{text}");
        assert_eq!(lines[2].find("least to most").unwrap() + 13, lines[3].find("400 to 600").unwrap() + 10);
        assert!(lines[3].ends_with("raw 75% zero 25%"), "{text}");
        assert!(lines[4].ends_with("zstd:1  failed: source: cancelled"), "{text}");
        let json = serde_json::to_string(&results).unwrap();
        // The object holds all but how runs went over time.
        results.rows.iter_mut().for_each(|row| row.series.clear());
        assert_eq!(serde_json::from_str::<Results>(&json).unwrap(), results);
    }

    #[test]
    fn sizes() {
        assert_eq!(size_text(4 << 30), "4 GiB");
        assert_eq!(size_text(24 << 20), "24 MiB");
        assert_eq!(size_text(20 << 10), "20 KiB");
    }

    #[test]
    fn ratios_are_by_what_must_be_done() {
        let pages = Pages { total: 3 << 20, hole: 1 << 20, zero: 1 << 20, raw: 1 << 20, ..Pages::default() };
        let gib = (1u64 << 30) as f64;
        let run = Run { total_ms: 5000.0, setup_ms: 1000.0, pages, wire_bytes: 4 << 30, ..Run::default() };
        let of = |memory| OfLimit::of(&LIMITS, &run, memory);
        // 8 GiB to fault in (4 that are no zeros into a memfd), 4 GiB of zeros, 4 GiB on the wire.
        let expect = |faults: f64| {
            let seconds = (faults + 4.0 * gib / 20.0 + 4.0 * gib / 5.0) / 1e9;
            Some((seconds / 5.0 * 100.0).round() / 100.0)
        };
        assert_eq!(of("anon").total, expect(8.0 * gib / 10.0));
        assert_eq!(of("anon4k").total, expect(8.0 * gib / 3.0));
        assert_eq!(of("memfd").total, expect(4.0 * gib / 2.0));
        assert_eq!(of("hugetlb").total, None);
        assert_eq!(of("anon").wire, 0.21);
        let live = Run { writing: Some(Default::default()), ..run.clone() };
        assert_eq!(OfLimit::of(&LIMITS, &live, "anon").total, None);
    }
}
