//! What a VMM implements so that its guest can migrate: memory, the dirty log, and control of the guest.
//!
//! Three traits, because a static file has only the first, memory without KVM the first two, and a VM all three.
//! Guest memory is never handed out by reference: it is a [`VolatileSlice`] (rust-vmm `vm-memory`), because vCPUs
//! write it at any time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::volatile_memory::VolatileSlice;

use crate::bitmap::PageBitmap;
use crate::layout::Layout;

/// An operation of a backend that failed, with what was tried.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct BackendError {
    /// What was tried, where, and, where something can be done about it, what.
    pub what: String,
    /// The system's word on it.
    #[source]
    pub source: io::Error,
}

impl BackendError {
    /// An error with the last OS error as its source.
    pub fn last_os(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: io::Error::last_os_error() }
    }
    /// An error with a source.
    pub fn new(what: impl Into<String>, source: io::Error) -> Self {
        Self { what: what.into(), source }
    }
    /// An error that stems from bad data rather than from the system.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: io::ErrorKind::InvalidData.into() }
    }
}

/// What memory can still grow by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes.
    pub bytes: u64,
    /// What has no more than these.
    pub of: String,
    /// What to do where that is too little.
    pub hint: &'static str,
}

/// Guest memory: regions with their host mappings.
pub trait GuestRam: Send + Sync {
    /// The layout; it never changes during a session.
    fn layout(&self) -> &Layout;

    /// The whole mapping of a region (an index into `layout().regions()`). It stays where it is until this value is dropped:
    /// adapters that write to memory by themselves rely on it.
    fn region(&self, region: usize) -> VolatileSlice<'_>;

    /// Tells which pages may hold something other than zeros: for each chunk from `first`, one word of `pages`. A clear bit is a
    /// hole: never touched, reads as zero, and must not be read, for that would allocate it. Bits past a region's end
    /// are clear. It is only a snapshot: pages filled after a dirty log was started are in that log.
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError>;

    /// Whether [`populate`](Self::populate) pays ahead of all data, with all cores, for every 2 MiB that will get some: true for
    /// anonymous memory and huge pages. Memory that is not populated ahead is populated chunk by chunk, when a whole
    /// one comes.
    fn populates_ahead(&self) -> bool {
        false
    }

    /// Faults the memory of `count` chunks from `first` in, for writing. They are then no holes any more.
    fn populate(&self, first: u32, count: u32) -> Result<(), BackendError> {
        let _ = (first, count);
        Ok(())
    }

    /// Brings pages of a chunk in for writing, where touching them would otherwise kill the process for want of room. What they hold
    /// stays, and they are no holes any more. Memory that always has room for its pages does nothing.
    fn bring_in(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let _ = (chunk, pages);
        Ok(())
    }

    /// What this memory can still grow by as its pages are brought in; `None` where it was given all its room when it was made, or
    /// where nobody knows.
    fn room(&self) -> Option<Room> {
        None
    }

    /// All of these chunks will be filled, and by whom brings them in at once: memory that has a choice may use larger pages for
    /// them. A hint.
    fn expect_filled(&self, first: u32, count: u32) {
        let _ = (first, count);
    }

    /// Bytes of memory that may be brought in ahead of its content without making this host swap; as good as endless where nobody knows.
    fn spare_bytes(&self) -> u64 {
        u64::MAX
    }

    /// Whether [`enlarge`](Self::enlarge) is worth calling.
    fn enlarges(&self) -> bool {
        false
    }

    /// Brings these chunks in for writing as larger pages than usual, where that costs less; returns whether it did. What they hold
    /// stays, and others may read and write them meanwhile, which may make it fail. They are no holes any more. Not after
    /// [`placer`](Self::placer).
    fn enlarge(&self, first: u32, count: u32) -> bool {
        let _ = (first, count);
        false
    }

    /// Something that fills pages that were never touched for less than touching them costs, where this memory has that.
    fn placer(self: Arc<Self>) -> Option<Box<dyn Placer>> {
        None
    }

    /// How much memory at a time is brought in where pages are missing while the guest runs, in chunks of a region, or 0 for single
    /// pages; or why this memory cannot miss pages at all.
    fn missing_unit(&self) -> Result<u32, BackendError> {
        Err(BackendError::invalid("this memory cannot be brought in while its guest runs"))
    }

    /// Takes these pages away, and stops whoever touches one that is not there from then on, until it is brought in: vCPUs, this
    /// process, and the kernel on its behalf. `missing` is whole units.
    fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        let _ = missing;
        Err(BackendError::invalid("this memory cannot be brought in while its guest runs"))
    }

    /// Makes these pages of a chunk read as zero, and holes again where the memory's kind allows it.
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError>;

    /// Makes what was written durable, where the memory is a file on a disk.
    fn persist(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// The mapping of one chunk.
    ///
    /// # Panics
    /// When there is no such chunk: chunk numbers that came from a peer are checked with [`Layout::locate`] first.
    fn chunk(&self, chunk: u32) -> VolatileSlice<'_> {
        let place = self.layout().locate(chunk).expect("chunk number was validated");
        self.region(place.region)
            .subslice(place.offset as usize, place.bytes())
            .expect("a layout's chunk lies in its region's mapping")
    }
}

/// Fills pages that were never touched: allocated with their content, where touching them would allocate zeros first, take a
/// fault, and then be overwritten. Touching such pages in any other way stays possible at any time.
pub trait Placer: Send + Sync {
    /// Makes `bytes` the content of pages of a chunk from page `first` on: as many as `bytes` holds. Pages that are there
    /// already are overwritten.
    ///
    /// # Panics
    /// When `bytes` is not whole pages that the chunk has.
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError>;
}

/// Somebody touched a page that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Chunk of the page.
    pub chunk: u32,
    /// The page in its chunk; the first page of its unit where memory is brought in by more than pages.
    pub page: u32,
    /// The thread that waits for it, by the system's number.
    pub thread: u32,
}

/// Memory some of whose pages are still to come, while its guest may run. When it is dropped, nobody waits any more, and what is
/// not there reads as zero.
pub trait MissingPages: Send + Sync {
    /// Waits until somebody touches a page that is not there, at most `timeout`; adds what was touched to `faults`.
    fn wait(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), BackendError>;

    /// Makes `bytes`, whole pages, the content of a chunk's pages from `first` on, and lets whoever waits for them go on. Pages
    /// that are there are left as they are: the guest may have written them.
    ///
    /// # Panics
    /// When `bytes` is not whole pages that the chunk has.
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError>;

    /// The same with `count` pages of zeros.
    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError>;

    /// Lets whoever waits for the page of a fault go on: with zeros, where it is not there. After [`end`](Self::end) nobody waits, and
    /// this does nothing.
    fn settle(&self, fault: Fault) -> Result<(), BackendError>;

    /// Nothing is missing any more, or what is never comes: nobody is stopped from here on, and whoever waits goes on, with zeros where a
    /// page is not there.
    fn end(&self) -> Result<(), BackendError>;
}

/// A dirty tracker: which pages were written since it was last asked.
///
/// A page written after [`start`](Self::start) is reported by some later [`sync`](Self::sync), also when it was
/// written while `sync` or `clear` ran. Whoever consumes a report reads the page *after* [`clear`](Self::clear)
/// returned for it; a write that comes after that is reported again.
pub trait DirtyLog: Send + Sync {
    /// A short name for reports: `kvm-bitmap`, `kvm-ring`, `uffd-wp`, `static`.
    fn name(&self) -> &'static str;

    /// Starts logging, with no page reported (whatever was written before is the caller's business: it sends everything).
    fn start(&self) -> Result<(), BackendError>;

    /// Adds the pages written since the last report to `dirty`; returns how many pages the log held (a page already in
    /// `dirty` counts).
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError>;

    /// Re-arms logging for pages that `sync` reported and that are about to be read: word `i` of `pages` belongs to
    /// chunk `first + i`. Trackers whose `sync` re-arms by itself do nothing.
    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        let _ = (first, pages);
        Ok(())
    }

    /// Pages that each vCPU wrote since logging was started, as far as reports have counted them; a page that was reported and written
    /// again counts again. `None` where the log does not know who wrote.
    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        None
    }

    /// Whether the memory may be written at all while it is moved.
    fn expects_writes(&self) -> bool {
        true
    }

    /// Stops logging and frees what it took. Harmless when not started.
    fn stop(&self) -> Result<(), BackendError>;
}

/// One named, versioned piece of device or vCPU state, opaque to the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateBlob {
    /// Name, such as `vcpu/0`.
    pub name: String,
    /// Version of the encoding of `bytes`.
    pub version: u32,
    /// The state.
    pub bytes: Vec<u8>,
}

/// How long [`Guest::pause`] waits for a vCPU. One in the kernel that touches memory which is still to come cannot be stopped before
/// it has.
pub const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// Control over a running guest.
pub trait Guest: Send + Sync {
    /// Stops all vCPUs; returns when none runs and all their writes are in memory and in the dirty log. Where one does not stop within
    /// [`PAUSE_PATIENCE`] this fails, and the guest is as before.
    fn pause(&self) -> Result<(), BackendError>;
    /// Stops all vCPUs for ever, also those that wait for pages which never come. Once each has been told to stop, `release` is called,
    /// which lets go on whoever waits for a page ([`MissingPages::end`]); nothing that the guest does from then on leaves it. A guest
    /// whose memory is whole whenever it runs need not do more than pause.
    fn stop_for_good(&self, release: &dyn Fn() -> Result<(), BackendError>) -> Result<(), BackendError> {
        let _ = release;
        self.pause()
    }
    /// Lets the vCPUs run; nothing, where they do. All of them or, where it fails, none, not for one instruction: a destination whose guest
    /// cannot be resumed gives it back to its source.
    fn resume(&self) -> Result<(), BackendError>;
    /// Takes `percent` (0..=99) of their time from the vCPUs; 0 ends throttling.
    fn throttle(&self, percent: u8) -> Result<(), BackendError>;
    /// Takes each vCPU a percentage of its own, by its number. A guest that cannot do that takes the highest from all.
    fn throttle_each(&self, percents: &[u8]) -> Result<(), BackendError> {
        self.throttle(percents.iter().copied().max().unwrap_or(0))
    }
    /// Tries how long pausing, saving the state and resuming take together; the guest is as before. Waits at most `limit` for a vCPU to
    /// stop. `None` where that is not to be tried with a guest that runs, because it takes more than a moment. A trial that fails says
    /// nothing but that there is no estimate; whoever called resumes a guest that is to run.
    fn rehearse(&self, limit: Duration) -> Result<Option<Duration>, BackendError> {
        let _ = limit;
        Ok(None)
    }
    /// The state of everything but memory, of a paused guest.
    fn save_state(&self) -> Result<Vec<StateBlob>, BackendError>;
    /// Puts state into a guest that has not run yet, in place of what was loaded before, if anything was: a handover may be taken back and
    /// done again. Unknown names and versions are refused.
    fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError>;
}

/// The dirty log of memory that nobody writes.
#[derive(Clone, Copy, Debug, Default)]
pub struct StaticLog;

impl DirtyLog for StaticLog {
    fn name(&self) -> &'static str {
        "static"
    }
    fn start(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn sync(&self, _dirty: &PageBitmap) -> Result<u64, BackendError> {
        Ok(0)
    }
    fn expects_writes(&self) -> bool {
        false
    }
    fn stop(&self) -> Result<(), BackendError> {
        Ok(())
    }
}
