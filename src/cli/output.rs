//! What commands print: the progress bar, the summary, the JSON object.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use pageferry::archive::Walk;
use pageferry::cli::print;
use pageferry::{Progress, Report, Status};

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
        let progress = progress.clone();
        Self::drawing(quiet, move |bar| {
            let report = progress.report();
            if report.status != Status::None {
                bar.show(&report);
            }
        })
    }

    /// Draws how far work on an archive is, which is called `what`.
    pub(super) fn walk(what: &'static str, walk: &Walk, quiet: bool) -> Self {
        let (walk, since) = (walk.clone(), Instant::now());
        Self::drawing(quiet, move |bar| {
            bar.appear();
            bar.show_bytes(what, walk.done_bytes(), walk.total_bytes(), since.elapsed());
        })
    }

    fn drawing(quiet: bool, show: impl Fn(&mut LateBar) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = (!quiet && print::terminals().1).then(|| {
            let stop = stop.clone();
            std::thread::spawn(move || draw(show, &stop))
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

fn draw(show: impl Fn(&mut LateBar), stop: &AtomicBool) {
    let mut bar = LateBar::new(false);
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(FRAME);
        show(&mut bar);
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
        self.appear();
        show(&self.bar, report);
    }

    /// Lets it be seen once that is due.
    fn appear(&self) {
        let wanted = !self.quiet && print::terminals().1;
        if wanted && self.since.elapsed() > PATIENCE && self.bar.is_hidden() {
            self.bar.set_draw_target(ProgressDrawTarget::term_like(Box::new(Screen::default())));
            self.bar.set_style(style());
        }
    }

    /// Shows bytes that are done, of so many.
    fn show_bytes(&self, what: &'static str, done: u64, total: u64, took: Duration) {
        self.bar.set_length(total.max(1));
        self.bar.set_position(done.min(total));
        self.bar.set_prefix(what);
        let gb_s = done as f64 / took.as_secs_f64().max(1e-9) / 1e9;
        self.bar.set_message(format!("{} of {} MiB, {gb_s:.2} GB/s", done >> 20, total >> 20));
    }

    /// Removes it.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// The terminal, by way of the queue that everything else goes: a terminal that is held up holds up nobody.
#[derive(Debug, Default)]
struct Screen {
    frame: Mutex<String>,
}

impl Screen {
    fn add(&self, text: std::fmt::Arguments<'_>) -> io::Result<()> {
        let mut frame = self.frame.lock().unwrap_or_else(|e| e.into_inner());
        std::fmt::Write::write_fmt(&mut *frame, text).map_err(io::Error::other)
    }

    /// Moves the cursor; 0 would be taken for 1.
    fn go(&self, count: usize, letter: char) -> io::Result<()> {
        if count == 0 { Ok(()) } else { self.add(format_args!("\x1b[{count}{letter}")) }
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        print::columns().unwrap_or(80)
    }
    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.go(n, 'A')
    }
    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.go(n, 'B')
    }
    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.go(n, 'C')
    }
    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.go(n, 'D')
    }
    fn write_line(&self, text: &str) -> io::Result<()> {
        self.add(format_args!("{text}\n"))
    }
    fn write_str(&self, text: &str) -> io::Result<()> {
        self.add(format_args!("{text}"))
    }
    fn clear_line(&self) -> io::Result<()> {
        self.add(format_args!("\r\x1b[2K"))
    }
    fn flush(&self) -> io::Result<()> {
        let frame = std::mem::take(&mut *self.frame.lock().unwrap_or_else(|e| e.into_inner()));
        if !frame.is_empty() {
            print::errors().push(frame.into_bytes());
        }
        Ok(())
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
    if json {
        print::line(serde_json::to_string(report).unwrap_or_default());
    } else if matches!(report.status, Status::Failed | Status::Cancelled) && report.logical_bytes == 0 {
        // Nothing happened that numbers could tell; the error says it all.
    } else {
        let digest = report.digest.as_ref().map(|d| format!("{:<18}{d}\n", "xxh3-128:"));
        print::text(report.summary() + &digest.unwrap_or_default());
    }
}
