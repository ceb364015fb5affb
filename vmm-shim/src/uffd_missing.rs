//! Memory whose pages are still to come: userfaultfd stops whoever touches a missing one until it is placed.
//!
//! All regions are registered for missing pages. A page that is missing but not to come, a hole, is filled with zeros by whoever
//! handles its fault ([`MissingPages::settle`]). vCPUs fault in kernel mode, so unlike for write tracking the descriptor must
//! be one that hands such faults out, which takes a privilege; [`check`] tells beforehand.
//!
//! Memory of huge pages from hugetlbfs comes in by whole huge pages only: what is placed is gathered until one is complete.

mod sys;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagecopy::backend::{BackendError, Fault, GuestRam, MissingPages, Room};
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::layout::{CHUNK_PAGES, CHUNK_SIZE, Layout, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileSlice;

use crate::room;
use crate::sys::{self as uffd, Userfaultfd};
use crate::watched::{self, Watched};

/// What it cannot do without.
const FEATURES: u64 =
    uffd::UFFD_FEATURE_MISSING_SHMEM | uffd::UFFD_FEATURE_MISSING_HUGETLBFS | uffd::UFFD_FEATURE_THREAD_ID;

/// Pages that a page of zeros is copied to at a time, where the kernel fills none by itself.
const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Memory of this process that can miss pages.
pub(crate) trait MissingRam: GuestRam {
    /// Makes `len` bytes at `offset` of a region holes.
    fn discard_run(&self, region: usize, offset: u64, len: u64) -> io::Result<()>;

    /// The error of bringing memory in: says where there is no room, if that is why.
    fn no_room(&self, what: String, error: io::Error) -> BackendError;
}

/// Memory that misses pages, by a userfaultfd: this process's own ([`over`](Self::over)), or that of whoever has handed out its
/// userfaultfd ([`foreign`](Self::foreign)).
///
/// A VMM's own [`GuestRam`] misses pages by two lines:
///
/// ```
/// use std::sync::Arc;
/// use pagecopy::backend::{BackendError, GuestRam, MissingPages};
/// use pagecopy::bitmap::PageBitmap;
/// # use pagecopy::layout::Layout;
/// use vmm_shim::uffd_missing::{UffdMissing, check};
/// # use vmm_shim::vm_memory::volatile_memory::VolatileSlice;
/// # struct Mine(vmm_shim::guest_memory::GuestMemory);
///
/// impl GuestRam for Mine {
///     fn missing_unit(&self) -> Result<u32, BackendError> {
///         check().map(|()| 0)
///     }
///     fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
///         Ok(Box::new(UffdMissing::over(self, missing)?))
///     }
///     // and so on
/// #    fn layout(&self) -> &Layout { self.0.layout() }
/// #    fn region(&self, region: usize) -> VolatileSlice<'_> { self.0.region(region) }
/// #    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> { self.0.populated(first, pages) }
/// #    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> { self.0.discard(chunk, pages) }
/// }
/// ```
#[derive(Debug)]
pub struct UffdMissing {
    watched: Watched<dyn MissingRam>,
    layout: Layout,
    /// Bytes of a huge page where memory comes in no smaller pieces, else 0.
    unit: u64,
    /// Huge pages that are not complete, by region and offset.
    gathered: Mutex<HashMap<(usize, u64), Gathered>>,
    /// Nobody is stopped any more, or will be in a moment.
    ended: AtomicBool,
}

/// A part of a huge page.
#[derive(Debug)]
struct Gathered {
    bytes: Box<[u8]>,
    /// Which of its pages are there, chunk by chunk.
    pages: Vec<u64>,
}

/// Whether this process may stop vCPUs at missing pages; the error says what to do.
pub fn check() -> Result<(), BackendError> {
    open().map(drop)
}

fn open() -> Result<Userfaultfd, BackendError> {
    watched::open("missing pages", FEATURES, "missing pages of shared memory: it takes Linux 4.14")
}

impl UffdMissing {
    /// Takes the missing pages of memory of this process away, by [`GuestRam::discard`], and registers all regions. Memory of small
    /// pages only: anonymous memory, memfds, and files in tmpfs.
    ///
    /// # Errors
    /// Where this process may not ([`check`]), and where the kernel does not do it with this memory.
    pub fn over(ram: Arc<dyn GuestRam>, missing: &PageBitmap) -> Result<Self, BackendError> {
        Self::of(Arc::new(Plain(ram)), 0, missing)
    }

    /// Takes the missing pages away, and registers all regions; memory comes in by no smaller pieces than `unit` bytes, where that is
    /// not 0.
    pub(crate) fn of(
        memory: Arc<dyn MissingRam>,
        unit: u64,
        missing: &PageBitmap,
    ) -> Result<Self, BackendError> {
        let fd = open()?;
        for (region, offset, len) in spans(memory.layout(), missing) {
            memory.discard_run(region, offset, len).map_err(|e| {
                let name = &memory.layout().regions()[region].name;
                BackendError::new(format!("take {len} stale bytes at {offset:#x} of region {name:?} away"), e)
            })?;
        }
        let layout = memory.layout().clone();
        let watched = Watched::own(fd, memory);
        for (region, r) in layout.regions().iter().enumerate() {
            let registered = watched.fd().register_missing(watched.range(region));
            registered.map_err(|e| watched::not_registered(&r.name, "missing pages", e))?;
        }
        Ok(Self::new(watched, layout, unit))
    }

    fn new(watched: Watched<dyn MissingRam>, layout: Layout, unit: u64) -> Self {
        Self { watched, layout, unit, gathered: Mutex::new(HashMap::new()), ended: AtomicBool::new(false) }
    }

    /// Region and offset in it of a page.
    fn locate(&self, chunk: u32, page: u32) -> (usize, u64) {
        let place = self.layout.locate(chunk).expect("chunk number was validated");
        (place.region, place.offset + u64::from(page) * PAGE_SIZE as u64)
    }

    /// Addresses of pages.
    fn range(&self, chunk: u32, first: u32, count: u32) -> Range<u64> {
        let (region, offset) = self.locate(chunk, first);
        let start = self.watched.range(region).start + offset;
        start..start + u64::from(count) * PAGE_SIZE as u64
    }

    fn gathered(&self) -> MutexGuard<'_, HashMap<(usize, u64), Gathered>> {
        // Pages are marked after they were copied: nothing is half done when a thread panics.
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fault at an address.
    fn fault_at(&self, address: u64, thread: u32) -> Option<Fault> {
        let (region, offset) = self.watched.find(address)?;
        let offset = if self.unit == 0 { offset } else { offset - offset % self.unit };
        let first = self.layout.region_chunks(region).start;
        let chunk = first + (offset / CHUNK_SIZE as u64) as u32;
        let page = (offset % CHUNK_SIZE as u64) as usize / PAGE_SIZE;
        Some(Fault { chunk, page: page as u32, thread })
    }

    /// Copies pages in, past those that are there.
    fn copy(&self, region: usize, offset: u64, bytes: &[u8], step: usize) -> Result<(), BackendError> {
        let mut at = 0;
        while at < bytes.len() {
            match self.watched.copy(region, offset + at as u64, &bytes[at..]) {
                Ok(copied) => at += copied,
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => at += step,
                Err(e) if self.is_there(region, offset + at as u64, &e) => at += PAGE_SIZE,
                Err(e) => return Err(self.no_room(region, offset, bytes.len() - at, e)),
            }
        }
        Ok(())
    }

    /// Whether a page that could not be had for want of room is there: the kernel takes room for it before it looks.
    fn is_there(&self, region: usize, offset: u64, error: &io::Error) -> bool {
        // A huge page is looked for first.
        let Some(memory) =
            self.watched.memory().filter(|_| self.unit == 0 && room::is_for_want_of_room(error))
        else {
            return false;
        };
        let chunk = self.layout.region_chunks(region).start + (offset / CHUNK_SIZE as u64) as u32;
        let page = offset % CHUNK_SIZE as u64 / PAGE_SIZE as u64;
        let mut pages = [0];
        memory.populated(chunk, &mut pages).is_ok() && pages[0] >> page & 1 != 0
    }

    fn no_room(&self, region: usize, offset: u64, len: usize, error: io::Error) -> BackendError {
        let name = &self.layout.regions()[region].name;
        let what = format!("bring {len} bytes in at {offset:#x} of region {name:?}");
        match self.watched.memory() {
            Some(memory) => memory.no_room(what, error),
            None => BackendError::new(what, error),
        }
    }

    /// Adds pages to their huge page, and brings that in once it is complete.
    fn gather(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        let (region, offset) = self.locate(chunk, first);
        let start = offset - offset % self.unit;
        let mut gathered = self.gathered();
        let part = gathered.entry((region, start)).or_insert_with(|| Gathered {
            bytes: vec![0; self.unit as usize].into(),
            pages: vec![0; (self.unit / CHUNK_SIZE as u64) as usize],
        });
        let at = (offset - start) as usize;
        part.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        part.pages[at / CHUNK_SIZE] |= mask(first, (bytes.len() / PAGE_SIZE) as u32);
        if part.pages.iter().all(|&pages| pages == u64::MAX)
            && let Some(whole) = gathered.remove(&(region, start))
        {
            drop(gathered);
            return self.copy(region, start, &whole.bytes, self.unit as usize);
        }
        Ok(())
    }

    /// Fills the page of a fault with zeros where it is not there, and wakes who waits for it.
    fn settle_registered(&self, fault: Fault) -> Result<(), BackendError> {
        let range = if self.unit == 0 {
            self.place_zeros(fault.chunk, fault.page, 1)?;
            self.range(fault.chunk, fault.page, 1)
        } else {
            let (region, offset) = self.locate(fault.chunk, fault.page);
            self.copy(region, offset, &vec![0; self.unit as usize], self.unit as usize)?;
            let start = self.range(fault.chunk, fault.page, 1).start;
            start..start + self.unit
        };
        // Where it was there already, nobody was woken.
        self.watched
            .fd()
            .wake(range)
            .map_err(|e| BackendError::new("wake whoever waits for a page that is there", e))
    }
}

impl MissingPages for UffdMissing {
    fn wait(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), BackendError> {
        let each = |address, thread| faults.extend(self.fault_at(address, thread));
        self.watched
            .fd()
            .wait(timeout, each)
            .map_err(|e| BackendError::new("wait for faults of missing pages", e))
    }

    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        assert!(bytes.len().is_multiple_of(PAGE_SIZE), "whole pages are placed, not {} bytes", bytes.len());
        if self.unit != 0 {
            return self.gather(chunk, first, bytes);
        }
        let (region, offset) = self.locate(chunk, first);
        self.copy(region, offset, bytes, PAGE_SIZE)
    }

    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError> {
        if self.unit != 0 {
            return (first..first + count).try_for_each(|page| self.gather(chunk, page, &ZERO_PAGE));
        }
        let mut range = self.range(chunk, first, count);
        while range.start < range.end {
            match self.watched.fd().zero(range.clone()) {
                Ok(bytes) => range.start += bytes as u64,
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => range.start += PAGE_SIZE as u64,
                Err(e) => {
                    let (region, _) = self.locate(chunk, first);
                    let offset = range.start - self.watched.range(region).start;
                    if self.is_there(region, offset, &e) {
                        range.start += PAGE_SIZE as u64;
                        continue;
                    }
                    return Err(self.no_room(region, offset, (range.end - range.start) as usize, e));
                }
            }
        }
        Ok(())
    }

    fn settle(&self, fault: Fault) -> Result<(), BackendError> {
        match self.settle_registered(fault) {
            // The end of the registration came between the fault and this, and has let go who waited.
            Err(_) if self.ended.load(Ordering::Acquire) => Ok(()),
            settled => settled,
        }
    }

    fn end(&self) -> Result<(), BackendError> {
        self.ended.store(true, Ordering::Release);
        for (region, r) in self.layout.regions().iter().enumerate() {
            self.watched.fd().unregister(self.watched.range(region)).map_err(|e| {
                BackendError::new(format!("end the registration of region {:?} for missing pages", r.name), e)
            })?;
        }
        Ok(())
    }
}

/// Any memory of this process, of small pages.
struct Plain(Arc<dyn GuestRam>);

impl GuestRam for Plain {
    fn layout(&self) -> &Layout {
        self.0.layout()
    }
    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.0.region(region)
    }
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        self.0.populated(first, pages)
    }
    fn room(&self) -> Option<Room> {
        self.0.room()
    }
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.0.discard(chunk, pages)
    }
}

impl MissingRam for Plain {
    fn discard_run(&self, region: usize, offset: u64, len: u64) -> io::Result<()> {
        let first = self.layout().region_chunks(region).start;
        let (mut page, end) = (offset / PAGE_SIZE as u64, (offset + len) / PAGE_SIZE as u64);
        while page < end {
            let (chunk, bit) = (page / CHUNK_PAGES as u64, page % CHUNK_PAGES as u64);
            let count = (end - page).min(CHUNK_PAGES as u64 - bit);
            self.discard(first + chunk as u32, mask(bit as u32, count as u32)).map_err(io::Error::other)?;
            page += count;
        }
        Ok(())
    }
    fn no_room(&self, what: String, error: io::Error) -> BackendError {
        room::no_room(self, false, what, error)
    }
}

/// `count` pages from `first`.
fn mask(first: u32, count: u32) -> u64 {
    (u64::MAX >> (CHUNK_PAGES as u32 - count)) << first
}

/// The runs of pages in a set, across chunks: region, offset and length in bytes.
fn spans(layout: &Layout, pages: &PageBitmap) -> Vec<(usize, u64, u64)> {
    let mut spans: Vec<(usize, u64, u64)> = Vec::new();
    for (chunk, word) in pages.iter() {
        let place = layout.locate(chunk).expect("a bitmap of the memory's layout");
        for (first, count) in runs(word) {
            let offset = place.offset + u64::from(first) * PAGE_SIZE as u64;
            let len = u64::from(count) * PAGE_SIZE as u64;
            match spans.last_mut() {
                Some((region, from, bytes)) if *region == place.region && *from + *bytes == offset => {
                    *bytes += len;
                }
                _ => spans.push((place.region, offset, len)),
            }
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use vm_memory::Bytes;

    use super::*;
    use crate::guest_memory::{Backing, GuestMemory};

    /// Reads the first word of a page of chunk `chunk`.
    fn word(memory: &GuestMemory, chunk: u32, page: usize) -> u64 {
        memory.chunk(chunk).read_obj(page * PAGE_SIZE).unwrap()
    }

    fn whole(value: u8, pages: usize) -> Vec<u8> {
        vec![value; pages * PAGE_SIZE]
    }

    /// Memory with old content in all pages of chunk 0 and 1, which misses pages 1 to 3 of chunk 0.
    fn missing(backing: &Backing) -> Option<(Arc<GuestMemory>, Box<dyn MissingPages>)> {
        let layout = Layout::flat(3 * CHUNK_SIZE as u64).unwrap();
        let memory = Arc::new(GuestMemory::create(layout, backing).unwrap());
        if let Err(error) = memory.missing_unit() {
            println!("skipped: {error}");
            return None;
        }
        for chunk in 0..2 {
            memory.chunk(chunk).copy_from(&whole(0xee, CHUNK_PAGES)[..]);
        }
        let pages = PageBitmap::new(3);
        pages.insert(0, 0b1110);
        let missing = memory.clone().miss(&pages).unwrap();
        Some((memory, missing))
    }

    fn backings() -> [Backing; 3] {
        [Backing::Memfd, Backing::Anonymous { huge: false }, Backing::Anonymous { huge: true }]
    }

    #[test]
    fn whoever_touches_a_missing_page_gets_what_is_placed_and_nothing_old() {
        for backing in backings() {
            let Some((memory, missing)) = missing(&backing) else { return };
            let seen = AtomicU64::new(0);
            std::thread::scope(|scope| {
                scope.spawn(|| seen.store(word(&memory, 0, 2), Ordering::SeqCst));
                let mut faults = Vec::new();
                while faults.is_empty() {
                    missing.wait(&mut faults, Duration::from_secs(5)).unwrap();
                }
                assert_eq!((faults[0].chunk, faults[0].page), (0, 2), "{backing:?}");
                assert_eq!(seen.load(Ordering::SeqCst), 0, "{backing:?}: nobody let it go on");
                missing.place(0, 1, &whole(7, 2)).unwrap();
            });
            assert_eq!(seen.load(Ordering::SeqCst), 0x0707_0707_0707_0707, "{backing:?}");
            missing.place_zeros(0, 3, 1).unwrap();
            assert_eq!(word(&memory, 0, 3), 0, "{backing:?}");
            // What was not missing is as it was.
            assert_eq!(word(&memory, 0, 0), 0xeeee_eeee_eeee_eeee);
            assert_eq!(word(&memory, 1, 63), 0xeeee_eeee_eeee_eeee);
        }
    }

    #[test]
    fn what_is_there_is_not_overwritten() {
        for backing in backings() {
            let Some((memory, missing)) = missing(&backing) else { return };
            missing.place(0, 2, &whole(5, 1)).unwrap();
            memory.chunk(0).write_obj(1u64, 2 * PAGE_SIZE).unwrap();
            missing.place(0, 1, &whole(9, 3)).unwrap();
            missing.place_zeros(0, 1, 3).unwrap();
            assert_eq!(word(&memory, 0, 1), 0x0909_0909_0909_0909, "{backing:?}");
            assert_eq!(word(&memory, 0, 2), 1, "{backing:?}");
            assert_eq!(word(&memory, 0, 3), 0x0909_0909_0909_0909, "{backing:?}");
        }
    }

    #[test]
    fn a_hole_is_settled_with_zeros_and_can_be_written() {
        for backing in backings() {
            let Some((memory, missing)) = missing(&backing) else { return };
            std::thread::scope(|scope| {
                let writing = memory.clone();
                let writer = scope.spawn(move || writing.chunk(2).write_obj(3u64, 5 * PAGE_SIZE).unwrap());
                let mut faults = Vec::new();
                while !writer.is_finished() {
                    faults.clear();
                    missing.wait(&mut faults, Duration::from_millis(10)).unwrap();
                    faults.iter().for_each(|&fault| missing.settle(fault).unwrap());
                }
            });
            assert_eq!(word(&memory, 2, 5), 3, "{backing:?}");
            missing.end().unwrap();
            assert_eq!(word(&memory, 2, 6), 0, "{backing:?}");
        }
    }

    /// The last page may come while a fault of a hole is between its two halves.
    #[test]
    fn a_fault_that_was_read_before_the_end_is_settled_after_it() {
        for backing in backings() {
            let Some((memory, missing)) = missing(&backing) else { return };
            std::thread::scope(|scope| {
                let reading = memory.clone();
                let reader = scope.spawn(move || word(&reading, 2, 5));
                let mut faults = Vec::new();
                while faults.is_empty() {
                    missing.wait(&mut faults, Duration::from_secs(5)).unwrap();
                }
                missing.end().unwrap();
                // Who waited was let go, and nothing is left to be done.
                assert_eq!(reader.join().unwrap(), 0, "{backing:?}");
                missing.settle(faults[0]).unwrap();
            });
        }
    }

    #[test]
    fn any_memory_of_this_process_may_miss_pages() {
        let layout = Layout::flat(3 * CHUNK_SIZE as u64).unwrap();
        let memory: Arc<dyn GuestRam> =
            Arc::new(GuestMemory::create(layout, &Backing::Anonymous { huge: false }).unwrap());
        if let Err(error) = check() {
            return println!("skipped: {error}");
        }
        memory.chunk(0).copy_from(&whole(0xee, CHUNK_PAGES)[..]);
        memory.chunk(1).copy_from(&whole(0xee, CHUNK_PAGES)[..]);
        let pages = PageBitmap::new(3);
        pages.insert(0, 1 << 63);
        pages.insert(1, 0b11);
        let missing = UffdMissing::over(memory.clone(), &pages).unwrap();
        let mut there = [0; 3];
        memory.populated(0, &mut there).unwrap();
        assert_eq!(there, [u64::MAX >> 1, !0b11, 0]);
        missing.place(1, 1, &whole(4, 1)).unwrap();
        missing.end().unwrap();
        assert_eq!(memory.chunk(1).read_obj::<u8>(PAGE_SIZE).unwrap(), 4);
        assert_eq!(memory.chunk(1).read_obj::<u8>(0).unwrap(), 0, "never came");
    }

    #[test]
    fn memory_on_a_disk_says_why_not() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let backing = Backing::File { path: folder.path().join("ram"), create: true };
        let memory = GuestMemory::create(Layout::flat(CHUNK_SIZE as u64).unwrap(), &backing).unwrap();
        match memory.missing_unit() {
            Err(error) => {
                assert!(error.what.contains("tmpfs") || error.what.contains("userfaultfd"), "{error}");
            }
            Ok(_) => println!("skipped: the repository is on a tmpfs"),
        }
    }
}
