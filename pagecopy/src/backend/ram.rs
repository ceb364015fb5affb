//! Guest memory, as it is read and filled.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::volatile_memory::VolatileSlice;

use super::{BackendError, Fault, GuardedPages};
use crate::bitmap::PageBitmap;
use crate::layout::Layout;

/// Why memory is not guarded that says no more.
const NOT_GUARDED: &str = "this memory cannot be guarded while its guest runs";

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

/// Room that a guest has spoken for which is on its way: others that come to the same host see less. Dropped, it is given up.
pub trait Claim: Send {
    /// *When*: often, while pages come: it is to be cheap.
    /// *Must*: speak for less, by what has come since the claim. `populated` is how many bytes of memory were brought in ahead of their
    /// content so far; what else has come the memory knows by itself.
    fn update(&mut self, populated: u64);
}

/// Why there is no claim.
#[derive(Debug)]
pub enum Unclaimed {
    /// Too little is left beside what others have spoken for. The guest is refused.
    NoRoom(Room),
    /// Nobody knows what others have spoken for. The guest is taken in all the same.
    Unknown(BackendError),
}

/// Guest memory: regions with their host mappings.
///
/// A VMM writes four methods: `layout`, `region`, `populated` and `discard`. The others make it faster, let postcopy have it, or say
/// before it is too late that there is no room; their defaults are for memory of which nothing is known.
///
/// Chunk numbers that come in are the layout's; several threads call at once, each for chunks of its own.
pub trait GuestRam: Send + Sync {
    /// *When*: at any time, often.
    /// *Must*: return the same layout for as long as this value lives.
    fn layout(&self) -> &Layout;

    /// *When*: at any time, often: it is to be cheap.
    /// *Must*: return the whole mapping of a region (an index into `layout().regions()`). It stays where it is until this value is
    /// dropped: adapters that write to memory by themselves rely on it.
    fn region(&self, region: usize) -> VolatileSlice<'_>;

    /// *When*: at the start, of all chunks, in large runs.
    /// *Must*: tell which pages may hold something other than zeros: for each chunk from `first`, one word of `pages`. A clear bit is a
    /// hole: never touched, reads as zero, and must not be read, for that would allocate it. Bits past a region's end are clear. It is
    /// only a snapshot: pages filled after a dirty log was started are in that log. Where nobody knows, every page may hold something.
    /// *Error*: the migration fails before it began.
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError>;

    /// *When*: at the destination, often: it is to be cheap.
    /// *Must*: tell whether [`populate`](Self::populate) pays ahead of all data, with all cores, for every 2 MiB that will get some: true
    /// for anonymous memory and huge pages. Memory that is not populated ahead is populated chunk by chunk, when a whole one comes.
    fn populates_ahead(&self) -> bool {
        false
    }

    /// *When*: at the destination, before pages of these chunks come.
    /// *Must*: fault the memory of `count` chunks from `first` in, for writing. They are then no holes any more.
    /// *Error*: there is no room or no memory; the migration fails, and the guest runs on at the source.
    fn populate(&self, first: u32, count: u32) -> Result<(), BackendError> {
        let _ = (first, count);
        Ok(())
    }

    /// *When*: at the destination, before these pages of a chunk are written.
    /// *Must*: bring them in for writing, where touching them would otherwise kill the process for want of room. What they hold stays, and
    /// they are no holes any more. Memory that always has room for its pages does nothing.
    /// *Error*: there is no room; the migration fails, and the guest runs on at the source.
    fn bring_in(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let _ = (chunk, pages);
        Ok(())
    }

    /// *When*: at the destination, before the first page, and to explain why memory could not be had.
    /// *Must*: tell what this memory can still grow by as its pages are brought in; `None` where it was given all its room when it was
    /// made, or where nobody knows.
    fn room(&self) -> Option<Room> {
        None
    }

    /// *When*: at the destination, once, before the first page, where [`room`](Self::room) is enough by itself.
    /// *Must*: speak for so many bytes of it, so that guests which come at the same time do not count on the same bytes; `None` where that
    /// was all given when the memory was made, or where nobody keeps account.
    /// *Error*: as it says.
    fn claim(&self, bytes: u64) -> Result<Option<Box<dyn Claim>>, Unclaimed> {
        let _ = bytes;
        Ok(None)
    }

    /// *When*: at the destination, before pages of these chunks come.
    /// *Must*: nothing. All of these chunks will be filled, and by whom brings them in at once: memory that has a choice may use larger
    /// pages for them.
    fn expect_filled(&self, first: u32, count: u32) {
        let _ = (first, count);
    }

    /// *When*: at the destination, before memory is brought in ahead of its content.
    /// *Must*: tell the bytes of memory that may be brought in so without making this host swap; as good as endless where nobody
    /// knows.
    fn spare_bytes(&self) -> u64 {
        u64::MAX
    }

    /// *When*: at the destination, once.
    /// *Must*: tell whether [`enlarge`](Self::enlarge) is worth calling.
    fn enlarges(&self) -> bool {
        false
    }

    /// *When*: at the destination, where [`enlarges`](Self::enlarges) said so, and not after [`placer`](Self::placer).
    /// *Must*: bring these chunks in for writing as larger pages than usual, where that costs less; return whether it did. What they
    /// hold stays, and others may read and write them meanwhile, which may make it fail. They are no holes any more.
    fn enlarge(&self, first: u32, count: u32) -> bool {
        let _ = (first, count);
        false
    }

    /// *When*: at the destination, once, before pages come.
    /// *Must*: give something that fills pages that were never touched for less than touching them costs, where this memory has that.
    fn placer(self: Arc<Self>) -> Option<Box<dyn Placer>> {
        None
    }

    /// *When*: on both sides, where the guest may have to run before its pages are there (postcopy).
    /// *Must*: tell how much memory at a time is brought in where pages are missing while the guest runs, in chunks of a region, or 0
    /// for single pages.
    /// *Error*: why this memory cannot miss pages at all: the guest moves by precopy alone.
    fn missing_unit(&self) -> Result<u32, BackendError> {
        Err(BackendError::invalid("this memory cannot be brought in while its guest runs"))
    }

    /// *When*: at the destination, when postcopy begins and the guest is paused at the source: it is part of the downtime.
    /// *Must*: take these pages away, and stop whoever touches one that is not there from then on, until it is brought in: vCPUs, this
    /// process, and the kernel on its behalf. `missing` is whole units.
    /// *Error*: the handover fails, and the guest runs on at the source.
    fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        let _ = missing;
        Err(BackendError::invalid("this memory cannot be brought in while its guest runs"))
    }

    /// *When*: before a guest is copied while it runs, and before anything of that is done.
    /// *Must*: tell whether [`guard`](Self::guard) can work, and change nothing.
    /// *Error*: why this memory cannot be guarded at all: the guest stands still for as long as it is copied.
    fn guard_check(&self) -> Result<(), BackendError> {
        Err(BackendError::invalid(NOT_GUARDED))
    }

    /// *When*: when a guest is to be copied as it is at this moment, and is paused: it is part of the downtime.
    /// *Must*: stop whoever is about to write one of these pages from then on, until it is released: vCPUs, this process, and the kernel
    /// on its behalf. `pages` are those that hold something; to guard more is harmless. It need not stop who takes pages away
    /// ([`discard`](Self::discard), a balloon), nor other processes that have this memory mapped: until the guard ends, whoever guards
    /// sees to it that there are neither.
    /// *Error*: nothing is guarded, and the guest can run on.
    fn guard(self: Arc<Self>, pages: &PageBitmap) -> Result<Box<dyn GuardedPages>, BackendError> {
        let _ = pages;
        Err(BackendError::invalid(NOT_GUARDED))
    }

    /// *When*: at the destination, for pages that held something and are zero at the source.
    /// *Must*: make these pages of a chunk read as zero, and holes again where the memory's kind allows it.
    /// *Error*: the migration fails, and the guest runs on at the source.
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError>;

    /// *When*: at the destination, when all has come, before it says that it is ready.
    /// *Must*: make what was written durable, where the memory is a file on a disk.
    /// *Error*: the migration fails, and the guest runs on at the source.
    fn persist(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// The mapping of one chunk. What is implemented is [`region`](Self::region).
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

/// Memory some of whose pages are still to come, while its guest may run. When it is dropped, nobody waits any more, and what is
/// not there reads as zero.
///
/// An error of any method means that the guest cannot be completed: it is stopped for good. `vmm_shim::uffd_missing::UffdMissing` is one
/// by userfaultfd, for any memory.
pub trait MissingPages: Send + Sync {
    /// *When*: by one thread, in a loop.
    /// *Must*: wait until somebody touches a page that is not there, at most `timeout`; add what was touched to `faults`.
    fn wait(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), BackendError>;

    /// *When*: by several threads at once, each for pages of its own.
    /// *Must*: make `bytes`, whole pages, the content of a chunk's pages from `first` on, and let whoever waits for them go on. Pages
    /// that are there are left as they are: the guest may have written them.
    ///
    /// # Panics
    /// When `bytes` is not whole pages that the chunk has.
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError>;

    /// The same with `count` pages of zeros.
    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError>;

    /// *When*: for a fault of a page that does not come: a hole, or one that is there.
    /// *Must*: let whoever waits for the page go on: with zeros, where it is not there. After [`end`](Self::end) nobody waits, and this
    /// does nothing.
    fn settle(&self, fault: Fault) -> Result<(), BackendError>;

    /// *When*: once, when nothing is missing any more, or what is never comes.
    /// *Must*: stop nobody from here on, and let whoever waits go on, with zeros where a page is not there.
    fn end(&self) -> Result<(), BackendError>;
}
