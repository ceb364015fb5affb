//! Records which pages the guest writes, while nobody migrates it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cli::words::explain;
use pageferry::pagecopy::backend::{BackendError, DirtyLog};
use pageferry::pagecopy::bitmap::PageBitmap;
use pageferry::pagecopy::layout::Layout;

use super::super::super::api::{RecordRequest, RunState, TraceState, TraceStatus};
use super::super::super::trace::Recorder;
use super::{Server, not_here};

/// Seconds and milliseconds that may be asked for.
const SECONDS_MAX: u64 = 86_400;
const INTERVAL_MS: std::ops::RangeInclusive<u64> = 10..=60_000;

/// How often a recording looks whether it should end.
const TICK: Duration = Duration::from_millis(100);

/// The last recording.
#[derive(Default)]
pub(super) struct Recording {
    status: Option<TraceStatus>,
    stop: Arc<AtomicBool>,
}

impl Recording {
    /// How it stands.
    pub(super) fn status(&self) -> Option<TraceStatus> {
        self.status.clone()
    }

    /// Whether it goes on.
    pub(super) fn runs(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status.state == TraceState::Recording)
    }

    /// Ends it before its time; what was recorded so far remains.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Server {
    /// Starts to record a trace; `Status` tells how it goes on.
    pub(super) fn record(&self, request: &RecordRequest) -> Result<(), String> {
        if !(1..=SECONDS_MAX).contains(&request.seconds) || !INTERVAL_MS.contains(&request.interval_ms) {
            return Err(format!("seconds are 1 to {SECONDS_MAX}, interval_ms is 10 to 60000"));
        }
        let mut state = self.state();
        if state.migrating || state.planning || state.recording.runs() {
            return Err(
                "a migration, a dry run or a recording is under way, and there is one dirty log".into()
            );
        }
        if state.misses_pages() {
            return Err(
                "pages of the guest are still on their way here: record it once they have come".into()
            );
        }
        match state.run {
            RunState::Running | RunState::Paused => {}
            other => return Err(not_here(other, false)),
        }
        let machine = self.machine();
        let recorder = Recorder::create(&request.file, machine.ram.layout())
            .map_err(|e| format!("cannot write the trace to {}: {e}", request.file.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let status = TraceStatus {
            state: TraceState::Recording,
            file: request.file.clone(),
            ..TraceStatus::default()
        };
        state.recording = Recording { status: Some(status), stop: stop.clone() };
        let server = self.clone();
        let (length, interval) =
            (Duration::from_secs(request.seconds), Duration::from_millis(request.interval_ms));
        let work = move || {
            let log = &*machine.log;
            let job = Job { log, layout: machine.ram.layout(), length, interval, stop: &stop };
            let result = job.run(recorder);
            server.recorded(result);
        };
        std::thread::Builder::new().name("recording".into()).spawn(work).map(drop).map_err(|e| {
            state.recording = Recording::default();
            format!("cannot start a thread: {e}")
        })
    }

    /// Whether memory can be migrated as far as its dirty log goes.
    pub(super) fn check_not_recording(recording: &Recording) -> Result<(), String> {
        if recording.runs() {
            return Err("a trace is being recorded, and there is one dirty log: `cancel` ends it".into());
        }
        Ok(())
    }

    fn recorded(&self, result: Result<(u32, u64), String>) {
        let mut state = self.state();
        if let Some(status) = &mut state.recording.status {
            match result {
                Ok((intervals, pages)) => {
                    (status.state, status.intervals, status.pages) = (TraceState::Done, intervals, pages);
                }
                Err(error) => (status.state, status.error) = (TraceState::Failed, Some(error)),
            }
        }
    }
}

/// What is to be recorded.
struct Job<'a> {
    log: &'a dyn DirtyLog,
    layout: &'a Layout,
    length: Duration,
    interval: Duration,
    stop: &'a AtomicBool,
}

impl Job<'_> {
    /// Records; intervals, and pages that were written in all of them.
    fn run(&self, mut recorder: Recorder) -> Result<(u32, u64), String> {
        self.log.start().map_err(|e| explain(&e))?;
        let result = self.intervals(&mut recorder);
        // A log that does not stop costs speed and nothing else.
        let _ = self.log.stop();
        let counts = result?;
        recorder.finish(self.layout).map_err(|e| format!("the trace could not be written: {e}"))?;
        Ok(counts)
    }

    fn intervals(&self, recorder: &mut Recorder) -> Result<(u32, u64), String> {
        let began = Instant::now();
        let (mut last, mut intervals, mut pages) = (began, 0, 0);
        while began.elapsed() < self.length && !self.stop.load(Ordering::Relaxed) {
            self.wait(last + self.interval);
            let dirty = PageBitmap::new(self.layout.chunks());
            self.sync(&dirty).map_err(|e| explain(&e))?;
            let now = Instant::now();
            recorder.add(now - last, &dirty).map_err(|e| format!("the trace could not be written: {e}"))?;
            (last, intervals, pages) = (now, intervals + 1, pages + dirty.count());
        }
        Ok((intervals, pages))
    }

    /// Waits until then, or until it is to end.
    fn wait(&self, end: Instant) {
        while let Some(left) = end.checked_duration_since(Instant::now())
            && !left.is_zero()
            && !self.stop.load(Ordering::Relaxed)
        {
            std::thread::sleep(left.min(TICK));
        }
    }

    /// Takes what was written, and makes the log ready for the next interval.
    fn sync(&self, dirty: &PageBitmap) -> Result<(), BackendError> {
        self.log.sync(dirty)?;
        let words: Vec<u64> = (0..dirty.chunks()).map(|chunk| dirty.get(chunk)).collect();
        self.log.clear(0, &words)
    }
}
