//! Panics at the destination: in what the VMM gives it, at every step. Before GO they fail the session on both sides; after GO the guest
//! runs on here.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::engine::Options;
use pageferry::engine::destination::{Arrival, Destination, Incoming, IncomingError};
use pageferry::engine::explain;
use pageferry::engine::progress::Progress;
use pageferry::engine::report::Report;
use pageferry::engine::source::{Failure, Fate, SourceBackend, migrate};
use pageferry::pagecopy::backend::{BackendError, Guest, GuestRam, StateBlob};
use pageferry::pagecopy::layout::{CHUNK_SIZE, Layout};
use pageferry::transport::wire::control::Hello;
use pageferry::vmm_shim::guest_memory::GuestMemory;
use vm_memory::volatile_memory::VolatileSlice;

use crate::ends::{Hooked, Still, Told, differences, empty, full, options};

/// A VMM that panics at a step, so often.
struct Shaky {
    ram: Arc<dyn GuestRam>,
    at: &'static str,
    left: Arc<AtomicU32>,
    guest: Arc<dyn Guest>,
    arrived: Arc<Mutex<Vec<bool>>>,
}

fn shake(at: &str, here: &str, left: &AtomicU32) {
    if at == here && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    {
        panic!("shaken at {here}");
    }
}

impl Incoming for Shaky {
    fn open(&mut self, _hello: &Hello, _layout: Layout) -> Result<Arc<dyn GuestRam>, String> {
        shake(self.at, "open", &self.left);
        Ok(self.ram.clone())
    }
    fn guest(&self) -> Option<Arc<dyn Guest>> {
        Some(self.guest.clone())
    }
    fn arrived(&mut self, running: bool) {
        self.arrived.lock().unwrap().push(running);
        shake(self.at, "arrived", &self.left);
    }
}

struct ShakyGuest {
    at: &'static str,
    left: Arc<AtomicU32>,
    runs: Arc<AtomicU32>,
}

impl Guest for ShakyGuest {
    fn pause(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn resume(&self) -> Result<(), BackendError> {
        shake(self.at, "resume", &self.left);
        self.runs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn throttle(&self, _percent: u8) -> Result<(), BackendError> {
        Ok(())
    }
    fn save_state(&self) -> Result<Vec<StateBlob>, BackendError> {
        Ok(Vec::new())
    }
    fn load_state(&self, _state: &[StateBlob]) -> Result<(), BackendError> {
        shake(self.at, "load", &self.left);
        Ok(())
    }
}

struct Outcome {
    sent: Result<Report, Failure>,
    received: Result<Arrival, IncomingError>,
    /// Times that the guest was told to run at the destination.
    runs: u32,
    arrived: Vec<bool>,
    notices: Vec<String>,
    differences: usize,
}

/// Moves a guest to a VMM that panics at `at`, `times` times.
fn ferry(at: &'static str, times: u32) -> Outcome {
    let memory = full(4);
    let from = SourceBackend {
        ram: memory.clone(),
        log: Arc::new(Told::default()),
        guest: Some(Arc::new(Still)),
        paused: false,
        machine: "a".into(),
    };
    let arrived_memory = empty(memory.layout().clone());
    let left = Arc::new(AtomicU32::new(times));
    let (runs, arrived) = (Arc::new(AtomicU32::new(0)), Arc::new(Mutex::new(Vec::new())));
    let shaking = left.clone();
    let ram: Arc<dyn GuestRam> = match at {
        "memory" => Hooked::new(&arrived_memory, move |chunk, _| {
            if chunk == 7 {
                shake("memory", "memory", &shaking);
            }
        }),
        _ => arrived_memory.clone(),
    };
    let guest = Arc::new(ShakyGuest { at, left: left.clone(), runs: runs.clone() });
    let mut taker = Shaky { ram, at, left: left.clone(), guest, arrived: arrived.clone() };
    let notices = Arc::new(Mutex::new(Vec::new()));
    let (noticed, shaking) = (notices.clone(), left);
    let notice = move |line: &str| {
        noticed.lock().unwrap_or_else(|e| e.into_inner()).push(line.to_owned());
        shake(at, "notice", &shaking);
    };
    let options = Options { handover_timeout: Duration::from_secs(5), ..options(2) };
    let uri = "tcp:127.0.0.1:0".parse().unwrap();
    let progress = Progress::default();
    let destination = Destination::bind(&uri, &options, &progress, notice).unwrap();
    let uri = destination.uri().clone();
    let (sent, received) = std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.receive(&mut taker));
        if at == "notice" {
            // A stranger, of whom it has something to say.
            let address = uri.to_string().replace("tcp:", "");
            std::io::Write::write_all(&mut std::net::TcpStream::connect(address).unwrap(), &[b'x'; 64])
                .unwrap();
        }
        let sent = migrate(&from, &uri, &options, &Progress::default());
        if sent.is_err() {
            // Where it listens on.
            progress.cancel();
        }
        (sent, arriving.join().expect("the session's thread ends in order"))
    });
    let arrived = arrived.lock().unwrap_or_else(|e| e.into_inner()).clone();
    let notices = notices.lock().unwrap_or_else(|e| e.into_inner()).clone();
    let runs = runs.load(Ordering::SeqCst);
    Outcome { sent, received, runs, arrived, notices, differences: differences(&memory, &arrived_memory) }
}

#[test]
fn before_go_both_sides_hear_of_it_and_the_guest_stays() {
    for at in ["memory", "load"] {
        let outcome = ferry(at, u32::MAX);
        let (sent, received) = (outcome.sent.unwrap_err(), outcome.received.unwrap_err());
        let said = format!("shaken at {at}");
        assert_eq!(sent.fate, Fate::RunsOn, "{at}: {sent:?}");
        assert!(explain(&sent).contains(&said), "{at}: {}", explain(&sent));
        assert!(explain(&received).contains(&said), "{at}: {}", explain(&received));
        assert_eq!((outcome.runs, outcome.arrived.len()), (0, 0), "{at}");
    }
}

#[test]
fn a_vmm_that_panics_at_an_offer_refuses_it_and_listens_on() {
    let outcome = ferry("open", u32::MAX);
    let sent = outcome.sent.unwrap_err();
    assert!(explain(&sent).contains("shaken at open"), "{}", explain(&sent));
    assert!(outcome.notices.iter().any(|line| line.contains("shaken at open")), "{:?}", outcome.notices);
    assert!(matches!(outcome.received, Err(IncomingError::Cancelled)), "{:?}", outcome.received);
}

#[test]
fn after_go_the_guest_runs_here_whatever_panics() {
    for at in ["resume", "arrived", "notice"] {
        let outcome = ferry(at, 1);
        let (report, arrival) = (outcome.sent.unwrap(), outcome.received.unwrap());
        assert!(report.verified && arrival.running, "{at}");
        assert_eq!(
            (outcome.runs, outcome.arrived.as_slice(), outcome.differences),
            (1, &[true][..], 0),
            "{at}"
        );
        assert!(
            at == "notice" || outcome.notices.iter().any(|l| l.contains("shaken")),
            "{:?}",
            outcome.notices
        );
    }
}

/// Memory that takes long to bring in, and whose owner cancels meanwhile.
struct Slow {
    memory: Arc<GuestMemory>,
    calls: AtomicU32,
    progress: Progress,
}

impl GuestRam for Slow {
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
    fn populates_ahead(&self) -> bool {
        true
    }
    fn populate(&self, _first: u32, _count: u32) -> Result<(), BackendError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.progress.cancel();
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }
}

#[test]
fn cancel_is_heard_while_memory_is_brought_in() {
    // One call is for 32 MiB at most: far more of them than there are threads.
    let pieces = 256u64;
    let layout = Layout::flat(pieces * (32 << 20)).unwrap();
    let memory = empty(layout.clone());
    for at in 0..layout.chunks() / 8 {
        memory.chunk(at * 8).subslice(0, 1).unwrap().copy_from(&[1u8]);
    }
    assert_eq!(memory.chunk(0).len(), CHUNK_SIZE);
    let progress = Progress::default();
    let slow = Arc::new(Slow { memory: empty(layout), calls: AtomicU32::new(0), progress: progress.clone() });
    let from = SourceBackend {
        ram: memory,
        log: Arc::new(Told::default()),
        guest: Some(Arc::new(Still)),
        paused: false,
        machine: "a".into(),
    };
    let options = options(1);
    let destination =
        Destination::bind(&"tcp:127.0.0.1:0".parse().unwrap(), &options, &progress, |_| {}).unwrap();
    let uri = destination.uri().clone();
    let guest = Arc::new(Still);
    let mut taker =
        Shaky { ram: slow.clone(), at: "nowhere", left: Arc::default(), guest, arrived: Arc::default() };
    let (sent, received) = std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.receive(&mut taker));
        (migrate(&from, &uri, &options, &Progress::default()), arriving.join().unwrap())
    });
    assert!(matches!(received, Err(IncomingError::Cancelled)), "{received:?}");
    assert!(explain(&sent.unwrap_err()).contains("cancelled"));
    let calls = slow.calls.load(Ordering::SeqCst);
    assert!(u64::from(calls) < pieces / 2, "{calls} of {pieces} calls were made all the same");
}
