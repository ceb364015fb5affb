//! How a run went over time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::{Progress, Report, Round};
use serde::{Deserialize, Serialize};

/// How often the engine's report is looked at; it is renewed less often.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Samples that are kept. When there are more, every second one goes.
const SAMPLES_MAX: usize = 4096;

/// How a run stood at a moment. Bytes and pages are those so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    /// From the request, in milliseconds.
    pub at_ms: f64,
    /// Page bytes delivered.
    pub logical_bytes: u64,
    /// Bytes on the wire for them.
    pub wire_bytes: u64,
    /// Bytes of pages that waited or were under way.
    pub remaining_bytes: u64,
    /// Pages that the writers wrote.
    pub written_pages: u64,
}

/// A run over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Series {
    /// Ascending in time.
    pub samples: Vec<Sample>,
    /// Passes over a dirty set, in their order.
    pub rounds: Vec<Round>,
}

impl Series {
    /// The growth of a total in each span between samples: from when to when, in seconds, and by how much a second.
    pub(super) fn rates(&self, total: impl Fn(&Sample) -> u64) -> Vec<(f64, f64, f64)> {
        let spans = self.samples.windows(2).filter(|pair| pair[1].at_ms > pair[0].at_ms);
        let rate = |pair: &[Sample]| {
            let (from, to) = (pair[0].at_ms / 1e3, pair[1].at_ms / 1e3);
            let grown = total(&pair[1]).saturating_sub(total(&pair[0]));
            (from, to, grown as f64 / (to - from))
        };
        spans.map(rate).collect()
    }
}

/// Takes samples of a run while it lasts.
pub(super) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Sample>>>,
}

impl Sampler {
    /// Starts; `written` tells how many pages the writers have written.
    pub(super) fn start(progress: &Progress, written: impl Fn() -> u64 + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, progress) = (stop.clone(), progress.clone());
        let work = move || {
            let (mut samples, mut before) = (Vec::new(), 0);
            loop {
                let last = stopped.load(Ordering::Relaxed);
                let written = written();
                take(&mut samples, &progress.report(), before, written);
                if samples.is_empty() {
                    before = written;
                }
                if last {
                    return samples;
                }
                std::thread::sleep(LOOK_EVERY);
            }
        };
        // Without the thread there are no samples, and the run's own figures remain.
        let thread = std::thread::Builder::new().name("sampler".into()).spawn(work).ok();
        Self { stop, thread }
    }

    /// Ends; the run over time.
    pub(super) fn finish(mut self, progress: &Progress) -> Series {
        self.stop.store(true, Ordering::Relaxed);
        let samples = self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        Series { samples, rounds: progress.rounds() }
    }
}

/// Adds a sample, if the report has been renewed since the last one. `before` is what was written before the first page could go.
fn take(samples: &mut Vec<Sample>, report: &Report, before: u64, written: u64) {
    let set_up = report.setup_ms > 0.0 && report.total_ms > report.setup_ms;
    if !set_up || samples.last().is_some_and(|last| last.at_ms >= report.total_ms) {
        return;
    }
    if samples.is_empty() {
        samples.push(Sample { at_ms: report.setup_ms, written_pages: before, ..Sample::default() });
    }
    samples.push(Sample {
        at_ms: report.total_ms,
        logical_bytes: report.logical_bytes,
        wire_bytes: report.wire_bytes,
        remaining_bytes: report.remaining_bytes,
        written_pages: written,
    });
    if samples.len() > SAMPLES_MAX {
        let mut keep = false;
        samples.retain(|_| {
            keep = !keep;
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_the_growth_between_samples() {
        let sample = |at_ms, logical_bytes| Sample { at_ms, logical_bytes, ..Sample::default() };
        let samples = vec![sample(0.0, 0), sample(500.0, 100), sample(500.0, 100), sample(1500.0, 400)];
        let series = Series { samples, rounds: vec![] };
        assert_eq!(series.rates(|s| s.logical_bytes), [(0.0, 0.5, 200.0), (0.5, 1.5, 300.0)]);
        assert_eq!(Series::default().rates(|s| s.logical_bytes), []);
    }

    #[test]
    fn samples_begin_with_the_first_page_and_thin_out() {
        let mut samples = vec![];
        let mut look = |setup_ms, total_ms| {
            let mut report = Report::default();
            (report.setup_ms, report.total_ms) = (setup_ms, total_ms);
            take(&mut samples, &report, 7, 9);
            samples.clone()
        };
        assert!(look(0.0, 5.0).is_empty() && look(10.0, 5.0).is_empty());
        let first = look(10.0, 60.0);
        assert_eq!((first[0].at_ms, first[0].written_pages), (10.0, 7));
        assert_eq!((first[1].at_ms, first[1].written_pages), (60.0, 9));
        assert_eq!(look(10.0, 60.0), first);
        let all = (0..3 * SAMPLES_MAX).map(|i| look(10.0, 61.0 + i as f64)).last().unwrap();
        assert!((SAMPLES_MAX / 2..=SAMPLES_MAX).contains(&all.len()), "{}", all.len());
        assert!(all.windows(2).all(|pair| pair[0].at_ms < pair[1].at_ms));
    }
}
