//! Postcopy into memory that can have no more pages than come.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry::pagecopy::backend::{
    BackendError, Fault, Guest, GuestRam, MissingPages, Room, StateBlob, StateSink,
};
use pageferry::pagecopy::bitmap::PageBitmap;
use pageferry::pagecopy::layout::{CHUNK_PAGES, CHUNK_SIZE, Layout, PAGE_SIZE};
use pageferry::vmm_shim::guest_memory::GuestMemory;
use pageferry::{Destination, Fate, SourceBuilder, explain};
use testkit::PATIENCE;
use vm_memory::Bytes;
use vm_memory::volatile_memory::VolatileSlice;

use crate::ends::{self, Still, Taker, Told, differences, empty, ferry};

/// Chunks of the guest, of which the last is a hole.
const CHUNKS: u32 = 16;
/// Pages that come.
const COME: u64 = (CHUNKS as u64 - 1) * CHUNK_PAGES as u64;

/// Memory in which a hole cannot be brought in, which shows once all others are there.
struct Tight {
    memory: Arc<GuestMemory>,
    /// What it has room for, and then once a guest was offered.
    room: Mutex<Vec<u64>>,
}

impl Tight {
    fn new(memory: &Arc<GuestMemory>, room: &[u64]) -> Arc<Self> {
        Arc::new(Self { memory: memory.clone(), room: Mutex::new(room.iter().rev().copied().collect()) })
    }
}

impl GuestRam for Tight {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }
    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.memory.region(region)
    }
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        self.memory.populated(first, pages)
    }
    fn room(&self) -> Option<Room> {
        let bytes = self.room.lock().unwrap().pop()?;
        Some(Room { bytes, of: "this test".into(), hint: "give it more" })
    }
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.memory.discard(chunk, pages)
    }
    fn missing_unit(&self) -> Result<u32, BackendError> {
        self.memory.missing_unit()
    }
    fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        Ok(Box::new(TightPages { pages: self.memory.clone().miss(missing)?, placed: AtomicU64::new(0) }))
    }
}

struct TightPages {
    pages: Box<dyn MissingPages>,
    placed: AtomicU64,
}

impl MissingPages for TightPages {
    fn wait(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), BackendError> {
        self.pages.wait(faults, timeout)
    }
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        self.pages.place(chunk, first, bytes)?;
        self.placed.fetch_add((bytes.len() / PAGE_SIZE) as u64, Ordering::SeqCst);
        Ok(())
    }
    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError> {
        self.pages.place_zeros(chunk, first, count)
    }
    fn settle(&self, fault: Fault) -> Result<(), BackendError> {
        if fault.chunk != CHUNKS - 1 {
            return self.pages.settle(fault);
        }
        let deadline = Instant::now() + PATIENCE;
        while self.placed.load(Ordering::SeqCst) < COME && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        // The last of them is placed, and on its way to be counted.
        std::thread::sleep(Duration::from_millis(2));
        Err(BackendError::new("bring a hole in", io::Error::from_raw_os_error(libc::ENOSPC)))
    }
    fn end(&self) -> Result<(), BackendError> {
        self.pages.end()
    }
}

/// A guest that touches the hole as soon as it runs.
struct Toucher {
    memory: Arc<GuestMemory>,
    touching: Mutex<Option<JoinHandle<u64>>>,
    stopped: AtomicBool,
}

impl Toucher {
    fn new(memory: &Arc<GuestMemory>) -> Arc<Self> {
        let (touching, stopped) = (Mutex::default(), AtomicBool::new(false));
        Arc::new(Self { memory: memory.clone(), touching, stopped })
    }
}

impl Guest for Toucher {
    fn pause(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn resume(&self) -> Result<(), BackendError> {
        let memory = self.memory.clone();
        let touch = move || memory.chunk(CHUNKS - 1).read_obj(0).unwrap();
        *self.touching.lock().unwrap() = Some(std::thread::spawn(touch));
        Ok(())
    }
    fn save_state(&self, _out: &mut dyn StateSink) -> Result<(), BackendError> {
        Ok(())
    }
    fn load_state(&self, _state: &[StateBlob]) -> Result<(), BackendError> {
        Ok(())
    }
    fn stop_for_good(&self, release: &dyn Fn() -> Result<(), BackendError>) -> Result<(), BackendError> {
        self.stopped.store(true, Ordering::SeqCst);
        release()
    }
}

/// A guest to move, and its memory; `None`, with the reason printed, where it cannot run before its pages.
fn source() -> Option<(Arc<GuestMemory>, SourceBuilder)> {
    let memory = empty(Layout::flat(u64::from(CHUNKS) * CHUNK_SIZE as u64).unwrap());
    if let Err(error) = memory.missing_unit() {
        println!("skipped: {error}");
        return None;
    }
    for chunk in 0..CHUNKS - 1 {
        memory.chunk(chunk).copy_from(&[chunk as u8 + 1; CHUNK_SIZE][..]);
    }
    let from = ends::source(memory.clone(), Arc::new(Told::default()), Arc::new(Still), 1);
    let from = from.postcopy_after_rounds(0);
    Some((memory, from))
}

/// Room that has gone since the guest was offered.
#[test]
fn a_guest_whose_missing_pages_do_not_fit_stays_at_the_source() {
    let Some((memory, from)) = source() else { return };
    let needed = COME * PAGE_SIZE as u64;
    let arrived = empty(memory.layout().clone());
    let guest = Toucher::new(&arrived);
    let to = Taker { ram: Tight::new(&arrived, &[needed, needed - 1]), guest: guest.clone() };
    let (sent, received) = ferry("tcp:127.0.0.1:0", from, Destination::builder(), to);
    let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
    let word = format!("{needed} bytes are still to come, but this test has {} left", needed - 1);
    assert_eq!(sent.fate, Fate::RunsOn, "{sent:?}");
    assert!(explain(&sent).contains(&word), "{}", explain(&sent));
    assert!(explain(&received).contains(&word), "{}", explain(&received));
    assert!(guest.touching.lock().unwrap().is_none(), "it ran at the destination");
}

/// A destination says that it is lost only where it has stopped it, and that is only while pages are missing.
#[test]
fn a_guest_that_has_all_its_pages_is_not_lost_by_a_hole() {
    let mut kept = 0;
    // The hole is heard of between the last page and the next look at what is missing, but for a host that is busy elsewhere.
    for _ in 0..8 {
        let Some((memory, from)) = source() else { return };
        let arrived = empty(memory.layout().clone());
        let guest = Toucher::new(&arrived);
        let to = Taker { ram: Tight::new(&arrived, &[]), guest: guest.clone() };
        // A source that is done leaves without a word where its link timed out: nobody is then waited for for long.
        let short = Duration::from_secs(10);
        let destination = Destination::builder().postcopy_timeout(short);
        let destination = destination.handover_timeout(short).reconnect_timeout(short);
        let (sent, received) = ferry("tcp:127.0.0.1:0", from, destination, to);
        let stopped = guest.stopped.load(Ordering::SeqCst);
        assert_eq!(received.is_err(), stopped, "{received:?}");
        let touching = guest.touching.lock().unwrap().take().unwrap();
        assert_eq!(touching.join().unwrap(), 0);
        if received.is_ok() {
            assert!(sent.unwrap().verified);
            assert_eq!(differences(&memory, &arrived), 0);
            kept += 1;
        }
    }
    assert!(kept > 0, "it was stopped each time");
}
