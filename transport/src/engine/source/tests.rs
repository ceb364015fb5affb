//! The source against a real destination, with memory, log and guest that fail or panic where a test wants.

mod runtime;
mod shared;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;

use pagecopy::backend::{BackendError, Rehearsal, StateBlob, StateSink};
use pagecopy::layout::{CHUNK_SIZE, Layout};
use tokio::runtime::Handle;
use vm_memory::volatile_memory::VolatileSlice;

use super::*;
use crate::engine::destination::{Arrival, Destination, Incoming, IncomingError, Offer};
use crate::engine::tuning::Tuning;
use crate::guest_memory::Memory;

/// Where something goes wrong, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nowhere,
    /// A stream's thread panics while the guest runs.
    Lane,
    /// The same while it is paused for its switchover.
    LastLane,
    /// The migration's thread panics.
    Sync,
    SaveState,
    /// The trial of the state's time fails and leaves the guest paused.
    Rehearsal,
    /// The same, and the guest cannot be resumed.
    Stuck,
    /// The trial panics, with the guest paused.
    RehearsalPanics,
    /// The destination's guest cannot be resumed.
    NeverThere,
}

/// A machine that does nothing, and whose parts have trouble.
struct Machine {
    memory: Memory,
    /// Whether its memory can miss pages.
    postcopy: bool,
    running: AtomicBool,
    logging: AtomicBool,
    trouble: Mutex<Trouble>,
    resumed: AtomicU32,
    rehearsed: AtomicU32,
    /// Tasks that are seen on a runtime as its state is saved.
    watched: Mutex<Option<(Handle, usize)>>,
}

impl Machine {
    fn new(running: bool, trouble: Trouble) -> Arc<Self> {
        let layout = Layout::flat(64 * CHUNK_SIZE as u64).unwrap();
        let memory = Memory::new(layout);
        Arc::new(Self {
            memory,
            postcopy: false,
            running: AtomicBool::new(running),
            logging: AtomicBool::new(false),
            trouble: Mutex::new(trouble),
            resumed: AtomicU32::new(0),
            rehearsed: AtomicU32::new(0),
            watched: Mutex::new(None),
        })
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether it is time for this.
    fn has(&self, trouble: Trouble) -> bool {
        let mut now = self.trouble();
        let due = *now == trouble;
        if due {
            *now = Trouble::Nowhere;
        }
        due
    }

    fn runs(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    fn backend(self: &Arc<Self>) -> SourceBackend {
        SourceBackend {
            ram: self.clone(),
            log: self.clone(),
            guest: Some(self.clone()),
            paused: false,
            machine: String::new(),
        }
    }
}

impl GuestRam for Machine {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }
    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.memory.region(region)
    }
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        self.memory.populated(first, pages)
    }
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.memory.discard(chunk, pages)
    }
    fn missing_unit(&self) -> Result<u32, BackendError> {
        if self.postcopy { Ok(0) } else { Err(BackendError::invalid("no pages are missed here")) }
    }
}

impl DirtyLog for Machine {
    fn name(&self) -> &str {
        "double"
    }
    fn start(&self) -> Result<(), BackendError> {
        self.logging.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        assert!(!self.has(Trouble::Sync), "trouble at a dirty sync");
        dirty.insert(7, 1);
        Ok(1)
    }
    fn clear(&self, _first: u32, pages: &[u64]) -> Result<(), BackendError> {
        if pages.iter().any(|&pages| pages != 0) {
            assert!(!self.has(Trouble::Lane), "trouble in a lane");
            assert!(self.runs() || !self.has(Trouble::LastLane), "trouble in a lane at last");
        }
        Ok(())
    }
    fn stop(&self) -> Result<(), BackendError> {
        self.logging.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl Guest for Machine {
    fn pause(&self) -> Result<(), BackendError> {
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&self) -> Result<(), BackendError> {
        if *self.trouble() == Trouble::Stuck {
            return Err(BackendError::invalid("it does not resume"));
        }
        self.resumed.fetch_add(1, Ordering::SeqCst);
        self.running.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn rehearsal(&self) -> Option<&dyn Rehearsal> {
        Some(self)
    }
    fn save_state(&self, _out: &mut dyn StateSink) -> Result<(), BackendError> {
        assert!(!self.has(Trouble::SaveState), "trouble with the state");
        if let Some((runtime, tasks)) = &mut *self.watched.lock().unwrap() {
            *tasks = runtime.metrics().num_alive_tasks();
        }
        Ok(())
    }
    fn load_state(&self, _state: &[StateBlob]) -> Result<(), BackendError> {
        Ok(())
    }
}

impl Rehearsal for Machine {
    fn rehearse(&self, limit: Duration) -> Result<Duration, BackendError> {
        assert!(limit < Duration::from_secs(1), "a guest is not held for {limit:?} for an estimate");
        self.rehearsed.fetch_add(1, Ordering::SeqCst);
        let stuck = *self.trouble() == Trouble::Stuck;
        if stuck || self.has(Trouble::Rehearsal) {
            self.pause()?;
            return Err(BackendError::invalid("the trial failed"));
        }
        if self.has(Trouble::RehearsalPanics) {
            self.pause()?;
            panic!("trouble in a trial");
        }
        Ok(Duration::from_millis(3))
    }
}

/// Takes whatever comes into a machine.
struct Taker(Arc<Machine>);

impl Incoming for Taker {
    fn open(&mut self, _offer: &Offer) -> Result<Arc<dyn GuestRam>, String> {
        Ok(self.0.clone())
    }
    fn guest(&self) -> Option<Arc<dyn Guest>> {
        Some(self.0.clone())
    }
}

fn options() -> Options {
    Options {
        streams: 2,
        reconnect_timeout: Duration::ZERO,
        timeout: Duration::from_secs(5),
        ..Options::default()
    }
}

/// A destination that takes one session.
fn destination() -> (Uri, Arc<Machine>, JoinHandle<Result<Arrival, IncomingError>>) {
    let machine = Machine::new(false, Trouble::Nowhere);
    let uri = "tcp:127.0.0.1:0".parse().unwrap();
    let listening = Destination::bind(&uri, &options(), &Progress::default(), |_| {}).unwrap();
    let (uri, mut taker) = (listening.uri().clone(), Taker(machine.clone()));
    (uri, machine, std::thread::spawn(move || listening.receive_here(&mut taker)))
}

/// A migration of a machine that has all its memory written, and what came of it on both sides.
struct Moved {
    source: Arc<Machine>,
    destination: Arc<Machine>,
    result: Result<Report, Failure>,
    report: Report,
    arrived: Result<Arrival, IncomingError>,
}

fn move_with(trouble: Trouble, options: &Options, tuning: Tuning) -> Moved {
    moving(trouble, options, &Progress::new(tuning))
}

fn moving(trouble: Trouble, options: &Options, progress: &Progress) -> Moved {
    let source = Machine::new(true, trouble);
    *source.watched.lock().unwrap() = options.runtime.clone().map(|runtime| (runtime, 0));
    for chunk in 0..source.layout().chunks() {
        source.chunk(chunk).copy_from(&vec![chunk as u8 + 1; CHUNK_SIZE][..]);
    }
    let (uri, destination, arriving) = destination();
    if trouble == Trouble::NeverThere {
        *destination.trouble() = Trouble::Stuck;
    }
    let backend = source.backend();
    let result = migrate(&backend, &uri, options, progress);
    let arrived = arriving.join().expect("a destination does not panic");
    Moved { source, destination, result, report: progress.report(), arrived }
}

fn moved(trouble: Trouble) -> Moved {
    move_with(trouble, &options(), Tuning::default())
}

#[test]
fn a_panic_anywhere_before_go_leaves_the_guest_running_here() {
    for (trouble, says) in [
        (Trouble::Lane, "trouble in a lane"),
        (Trouble::LastLane, "trouble in a lane at last"),
        (Trouble::Sync, "trouble at a dirty sync"),
        (Trouble::SaveState, "trouble with the state"),
        (Trouble::RehearsalPanics, "trouble in a trial"),
    ] {
        let Moved { source, destination, result, report, arrived } = moved(trouble);
        let failure = result.expect_err("it panicked");
        assert_eq!(failure.fate, Fate::RunsOn, "{trouble:?}: {report:?}");
        assert!(source.runs() && !destination.runs(), "{trouble:?}");
        assert!(!source.logging.load(Ordering::SeqCst), "{trouble:?}: the log was left on");
        assert_eq!(report.status, Status::Failed, "{trouble:?}");
        let text = report.error.unwrap();
        assert!(text.contains("panicked") && text.contains(says), "{trouble:?}: {text}");
        // The other side hears why.
        let text = crate::engine::explain(&arrived.expect_err("nothing arrived"));
        assert!(text.contains(says), "{trouble:?}: {text}");
    }
}

#[test]
fn a_trial_that_fails_costs_nothing() {
    let Moved { source, destination, result, report, .. } = moved(Trouble::Rehearsal);
    let failure = result.err().map(|failure| crate::engine::explain(&failure));
    assert_eq!(failure, None);
    assert!(!source.runs() && destination.runs());
    assert_eq!(source.resumed.load(Ordering::SeqCst), 1, "it was left paused");
    assert_eq!(source.rehearsed.load(Ordering::SeqCst), 1, "it is not tried again");
    assert!(report.rehearsed_ms > 0.0, "{report:?}");
    // One that works is told of.
    let Moved { source, report, .. } = moved(Trouble::Nowhere);
    let trials = f64::from(source.rehearsed.load(Ordering::SeqCst));
    assert!(trials > 0.0 && (report.rehearsed_ms - 3.0 * trials).abs() < 0.01, "{trials}: {report:?}");
}

#[test]
fn a_guest_that_a_trial_left_paused_for_good_is_said_to_be_stuck() {
    let Moved { source, destination, result, report, .. } = moved(Trouble::Stuck);
    let failure = result.expect_err("it stands still");
    assert_eq!(failure.fate, Fate::Stuck, "{report:?}");
    assert!(!source.runs() && !destination.runs());
}

/// GO has come, and the guest does not run there for one instruction: the source hears so, and has it again.
#[test]
fn a_guest_that_cannot_run_at_the_destination_runs_on_here() {
    let Moved { source, destination, result, report, arrived } = moved(Trouble::NeverThere);
    let failure = result.expect_err("it runs nowhere else");
    assert_eq!(failure.fate, Fate::RunsOn, "{report:?}");
    assert!(matches!(failure.cause, Cause::Abandoned), "{report:?}");
    assert!(source.runs() && !destination.runs());
    assert_eq!(report.status, Status::Failed, "{report:?}");
    let text = crate::engine::explain(&arrived.expect_err("nothing arrived"));
    assert!(text.contains("it does not resume"), "{text}");
}

/// A destination that cannot run a guest before its pages is found out at once, and not when the time has come.
#[test]
fn postcopy_that_will_be_needed_is_asked_for_before_the_first_page() {
    let after = Options { postcopy_after_rounds: Some(100), ..options() };
    let mut on_timeout = Tuning::default();
    (on_timeout.limits.on_timeout, on_timeout.limits.total_ms) = (OnTimeout::Postcopy, Some(3_600_000));
    for (options, tuning, says) in [
        (options(), on_timeout, "postcopy when its time is up needs it"),
        (after, Tuning::default(), "postcopy after so many rounds needs it"),
    ] {
        let Moved { source, result, report, .. } = move_with(Trouble::Nowhere, &options, tuning);
        let text = crate::engine::explain(&result.expect_err("it cannot"));
        assert!(text.contains(says), "{text}");
        assert!(source.runs() && report.wire_bytes == 0, "{report:?}");
    }
}

/// Each codec is weighed by how many share the cores and the link, which are as many as WELCOME says.
#[test]
fn the_workers_reckon_with_the_streams_that_were_agreed() {
    let machine = Machine::new(true, Trouble::Nowhere);
    let (options, progress) = (Options { streams: 8, ..options() }, Progress::default());
    let leave = Leave::new(&progress, clock::now());
    let uri = "tcp:127.0.0.1:1".parse().unwrap();
    let env = Host::new(&uri, &options, leave.clone());
    let backend = machine.backend();
    let attempt = Attempt::new(&env, &backend, &options, &progress, leave);
    let welcome = Welcome {
        version: 1,
        capabilities: capability::ENCODINGS,
        // Fewer than asked for.
        streams: 3,
        timeout_ms: 5000,
        reconnect_ms: 0,
    };
    let agreed = Agreed { welcome, hasher: PageHasher::new(1), base: None };
    let populated = PageBitmap::new(machine.layout().chunks());
    let source = attempt.page_source(agreed, populated).unwrap_or_else(|cause| panic!("{cause}"));
    assert_eq!(source.options().streams, 3);
}
