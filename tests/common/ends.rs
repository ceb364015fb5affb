//! Both ends of a migration in this process, by the library: for what must happen at an exact moment.

#![allow(dead_code, reason = "every test binary uses its own part")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use pageferry::backend::{BackendError, DirtyLog, Guest, GuestRam, StateBlob, StateSink};
use pageferry::bitmap::PageBitmap;
use pageferry::layout::{Layout, PAGE_SIZE};
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::{
    Arrival, CodecMode, Destination, DestinationBuilder, Failure, IncomingError, Landing, Report, Source,
    SourceBuilder,
};
use testkit::Rng;
use vm_memory::volatile_memory::VolatileSlice;

/// Called before a chunk is read, with its number and how often it was read, this time included.
type Hook = Box<dyn Fn(u32, u32) + Send + Sync>;

/// Guest memory in which something happens whenever the source looks at a chunk.
pub(crate) struct Hooked {
    memory: Arc<GuestMemory>,
    reads: Vec<AtomicU32>,
    hook: Hook,
}

impl Hooked {
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        hook: impl Fn(u32, u32) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let reads = (0..memory.layout().chunks()).map(|_| AtomicU32::new(0)).collect();
        Arc::new(Self { memory: memory.clone(), reads, hook: Box::new(hook) })
    }
}

impl GuestRam for Hooked {
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
    fn chunk(&self, chunk: u32) -> VolatileSlice<'_> {
        let read = self.reads[chunk as usize].fetch_add(1, Ordering::Relaxed) + 1;
        (self.hook)(chunk, read);
        self.memory.chunk(chunk)
    }
}

/// A guest that has no vCPUs: whoever holds its memory writes it.
pub(crate) struct Still;

impl Guest for Still {
    fn pause(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn resume(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn save_state(&self, _out: &mut dyn StateSink) -> Result<(), BackendError> {
        Ok(())
    }
    fn load_state(&self, _state: &[StateBlob]) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A dirty log that holds what it was told.
#[derive(Default)]
pub(crate) struct Told(Mutex<Vec<(u32, u64)>>);

impl Told {
    fn tell(&self, chunk: u32, pages: u64) {
        self.0.lock().unwrap().push((chunk, pages));
    }
}

impl DirtyLog for Told {
    fn name(&self) -> &str {
        "told"
    }
    fn start(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        let told = std::mem::take(&mut *self.0.lock().unwrap());
        for &(chunk, pages) in &told {
            dirty.insert(chunk, pages);
        }
        Ok(told.iter().map(|(_, pages)| u64::from(pages.count_ones())).sum())
    }
    fn stop(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// Memory of this many MiB, full of pages that no two are alike.
pub(crate) fn full(mib: u64) -> Arc<GuestMemory> {
    let memory = empty(Layout::flat(mib << 20).unwrap());
    let mut bytes = vec![0u8; memory.chunk(0).len()];
    let mut rng = Rng::new(1);
    for chunk in 0..memory.layout().chunks() {
        for slot in bytes.as_chunks_mut::<8>().0 {
            *slot = rng.next().to_le_bytes();
        }
        let memory = memory.chunk(chunk);
        memory.copy_from(&bytes[..memory.len()]);
    }
    memory
}

/// Memory of this layout, all zeros.
pub(crate) fn empty(layout: Layout) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::create(layout, &Backing::Memfd).unwrap())
}

/// Pages in which two memories differ.
pub(crate) fn differences(a: &GuestMemory, b: &GuestMemory) -> usize {
    let bytes = |memory: &GuestMemory, chunk| {
        let memory = memory.chunk(chunk);
        let mut bytes = vec![0u8; memory.len()];
        memory.copy_to(&mut bytes[..]);
        bytes
    };
    let differ = |chunk| {
        let (a, b) = (bytes(a, chunk), bytes(b, chunk));
        a.chunks(PAGE_SIZE).zip(b.chunks(PAGE_SIZE)).filter(|(a, b)| a != b).count()
    };
    (0..a.layout().chunks()).map(differ).sum()
}

/// What takes a guest in.
pub(crate) struct Taker {
    pub(crate) ram: Arc<dyn GuestRam>,
    pub(crate) guest: Arc<dyn Guest>,
}

/// Memory and the guest that has it, raw pages over this many streams, so that it is known what is sent from where it lies.
pub(crate) fn source(
    ram: Arc<dyn GuestRam>,
    log: Arc<dyn DirtyLog>,
    guest: Arc<dyn Guest>,
    streams: u16,
) -> SourceBuilder {
    Source::builder(ram, log).guest(guest).machine("a").streams(streams).codec(CodecMode::Raw)
}

/// Moves a guest to a destination that listens at `uri`; how both ended.
pub(crate) fn ferry(
    uri: &str,
    from: SourceBuilder,
    destination: DestinationBuilder,
    to: Taker,
) -> (Result<Report, Failure>, Result<Arrival, IncomingError>) {
    let notice = |line: &str| println!("the destination says: {line}");
    let destination = destination.notice(notice).bind(&uri.parse().unwrap()).unwrap();
    let uri = destination.uri().clone();
    let arriving = destination.receive(move |offer| {
        assert_eq!(&offer.layout, to.ram.layout());
        Ok(Landing::guest(to.ram.clone(), to.guest.clone()))
    });
    let (migration, arriving) = (from.build().unwrap().start(&uri).unwrap(), arriving.unwrap());
    (migration.wait(), arriving.wait())
}

/// Moves memory of which every page is written once, after it was hashed and before it is sent; checks that what arrived is
/// what the source has. With `logged` the dirty log has these writes, too; without, nothing but receipts tells of them.
/// Returns how many pages were torn, and how many there are.
pub(crate) fn every_page_is_torn(uri: &str, streams: u16, mib: u64, logged: bool) -> (u64, u64) {
    let (memory, log) = (full(mib), Arc::new(Told::default()));
    let pages = memory.layout().pages();
    let (written, told) = (memory.clone(), log.clone());
    // In a first pass a chunk is read in order to hash it, and then in order to send it.
    let ram = Hooked::new(&memory, move |chunk, read| {
        if read != 2 {
            return;
        }
        let chunk_memory = written.chunk(chunk);
        for at in (0..chunk_memory.len()).step_by(PAGE_SIZE) {
            let piece = chunk_memory.subslice(at + 1000, 8).unwrap();
            piece.copy_from(&u64::from(chunk).to_le_bytes()[..]);
        }
        if logged {
            told.tell(chunk, u64::MAX >> (64 - chunk_memory.len() / PAGE_SIZE));
        }
    });
    let from = source(ram, log, Arc::new(Still), streams);
    let arrived = empty(memory.layout().clone());
    let to = Taker { ram: arrived.clone(), guest: Arc::new(Still) };
    let (sent, received) = ferry(uri, from, Destination::builder().insecure(true), to);
    let (report, _) = (sent.unwrap(), received.unwrap());
    println!("{uri}: {} pages, {} torn, {} mismatches", pages, report.torn, report.mismatches);
    assert_eq!((report.mismatches, report.verified), (0, true), "{report:?}");
    assert_eq!(differences(&memory, &arrived), 0, "pages that are not as the source has them");
    (report.torn, pages)
}
