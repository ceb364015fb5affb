//! What commands print: the progress bar, the summary, the JSON object.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pageferry::engine::progress::Progress;
use pageferry::engine::report::{Report, Status};

/// A bar appears when a transfer takes longer than this.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is drawn.
const FRAME: Duration = Duration::from_millis(100);

/// A progress bar on standard error, if that is a terminal and nothing forbids it.
pub(super) struct Bar {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Bar {
    /// Draws what `progress` says until [`Self::finish`].
    pub(super) fn start(progress: &Progress, quiet: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let (progress, stop) = (progress.clone(), stop.clone());
            std::thread::spawn(move || draw(|| progress.report(), &stop))
        });
        Self { stop, thread }
    }

    /// Removes the bar.
    pub(super) fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn draw(report: impl Fn() -> Report, stop: &AtomicBool) {
    let mut bar = LateBar::new(false);
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(FRAME);
        let report = report();
        if report.status != Status::None {
            bar.show(&report);
        }
    }
    bar.finish();
}

/// A bar that appears once a transfer takes long.
pub(super) struct LateBar {
    bar: ProgressBar,
    since: Instant,
    quiet: bool,
}

impl LateBar {
    /// A bar that nobody sees yet, nor ever if `quiet`.
    pub(super) fn new(quiet: bool) -> Self {
        Self { bar: ProgressBar::hidden(), since: Instant::now(), quiet }
    }

    /// Shows how far it is.
    pub(super) fn show(&mut self, report: &Report) {
        if !self.quiet && self.since.elapsed() > PATIENCE && self.bar.is_hidden() {
            self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            self.bar.set_style(style());
        }
        show(&self.bar, report);
    }

    /// Removes it.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn style() -> ProgressStyle {
    // The template is a constant that indicatif accepts.
    ProgressStyle::with_template("{prefix} [{bar:20}] {percent}% {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Puts a report into a bar.
fn show(bar: &ProgressBar, report: &Report) {
    let page = u64::from(report.page_size);
    let present = (report.pages.total - report.pages.hole.min(report.pages.total)) * page;
    let done = match report.remaining_bytes {
        0 => report.logical_bytes.min(present),
        remaining => present.saturating_sub(remaining),
    };
    bar.set_length(present.max(1));
    bar.set_position(done);
    bar.set_prefix(match (report.status, report.rounds, &report.stalled) {
        (Status::PreSwitchover, ..) => "paused, waits for `continue`".into(),
        (_, 0, _) => "receiving".into(),
        (_, rounds, None) => format!("round {rounds}"),
        (_, rounds, Some(_)) => format!("round {rounds}, stalled"),
    });
    if let Some(stalled) = &report.stalled {
        bar.set_message(stalled.clone());
        return;
    }
    bar.set_message(format!(
        "{:.2} GB/s ({:.2} on the wire), {:.0} dirty pages/s, {} streams, zero {} unchanged {} delta {} zstd {} raw {}",
        report.logical_gb_s,
        report.wire_gb_s,
        report.dirty_pages_per_s,
        report.streams,
        report.pages.zero,
        report.pages.unchanged,
        report.pages.delta,
        report.pages.compressed,
        report.pages.raw,
    ));
}

/// Prints the final report to standard output.
pub(super) fn print(report: &Report, json: bool) {
    let text = if json {
        serde_json::to_string(report).unwrap_or_default() + "\n"
    } else if report.status == Status::Failed && report.logical_bytes == 0 {
        // Nothing happened that numbers could tell; the error says it all.
        return;
    } else {
        let digest = report.digest.as_ref().map(|d| format!("{:<18}{d}\n", "xxh3-128:"));
        report.summary() + &digest.unwrap_or_default()
    };
    // A reader that went away does not make the migration fail.
    let _ = std::io::stdout().write_all(text.as_bytes());
}
