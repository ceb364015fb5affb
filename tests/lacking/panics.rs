//! Panics at the destination: in what the VMM gives it, at every step. Before GO they fail the session on both sides; after GO the guest
//! runs on here.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::backend::{BackendError, Guest, GuestRam, StateBlob, StateSink};
use pageferry::layout::{CHUNK_SIZE, Layout};
use pageferry::vmm_shim::guest_memory::GuestMemory;
use pageferry::{
    Arrival, Destination, Failure, Fate, IncomingError, Landing, Offer, Progress, Refused, Report, explain,
};
use vm_memory::volatile_memory::VolatileSlice;

use crate::ends::{Hooked, Still, Told, differences, empty, full, source};

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

impl Shaky {
    fn land(&self, _offer: &Offer) -> Result<Landing, Refused> {
        shake(self.at, "open", &self.left);
        let (at, left, arrived) = (self.at, self.left.clone(), self.arrived.clone());
        let landing = Landing::guest(self.ram.clone(), self.guest.clone());
        Ok(landing.on_arrival(move |running| {
            arrived.lock().unwrap().push(running);
            shake(at, "arrived", &left);
        }))
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
    fn save_state(&self, _out: &mut dyn StateSink) -> Result<(), BackendError> {
        Ok(())
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
    let from = source(memory.clone(), Arc::new(Told::default()), Arc::new(Still), 2);
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
    let taker = Shaky { ram, at, left: left.clone(), guest, arrived: arrived.clone() };
    let notices = Arc::new(Mutex::new(Vec::new()));
    let (noticed, shaking) = (notices.clone(), left);
    let notice = move |line: &str| {
        noticed.lock().unwrap_or_else(|e| e.into_inner()).push(line.to_owned());
        shake(at, "notice", &shaking);
    };
    let destination = Destination::builder().handover_timeout(Duration::from_secs(5)).notice(notice);
    let destination = destination.bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = destination.uri().clone();
    let arriving = destination.receive(move |offer| taker.land(offer)).unwrap();
    if at == "notice" {
        // A stranger, of whom it has something to say.
        let address = uri.to_string().replace("tcp:", "");
        std::io::Write::write_all(&mut std::net::TcpStream::connect(address).unwrap(), &[b'x'; 64]).unwrap();
    }
    let sent = from.build().unwrap().start(&uri).unwrap().wait();
    if sent.is_err() {
        // Where it listens on.
        arriving.cancel().unwrap();
    }
    let received = arriving.wait();
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
        self.progress.cancel().unwrap();
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
    let destination = Destination::builder().bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = destination.uri().clone();
    let slow =
        Arc::new(Slow { memory: empty(layout), calls: AtomicU32::new(0), progress: destination.progress() });
    let from = source(memory, Arc::new(Told::default()), Arc::new(Still), 1);
    let ram = slow.clone();
    let arriving = destination.receive(move |_| Ok(Landing::guest(ram.clone(), Arc::new(Still)))).unwrap();
    let sent = from.build().unwrap().start(&uri).unwrap().wait();
    let received = arriving.wait();
    assert!(matches!(received, Err(IncomingError::Cancelled)), "{received:?}");
    assert!(explain(&sent.unwrap_err()).contains("cancelled"));
    let calls = slow.calls.load(Ordering::SeqCst);
    assert!(u64::from(calls) < pieces / 2, "{calls} of {pieces} calls were made all the same");
}
