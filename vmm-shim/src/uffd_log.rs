//! A dirty tracker for any memory of this process, with or without KVM: userfaultfd write-protect and `PAGEMAP_SCAN`.
//!
//! The kernel (6.7 and later) write-protects pages, and at the first write to one it takes the protection away by
//! itself; a scan of the page table finds those and protects them again in one step. Writes by this process are seen
//! whoever makes them: its threads, its vCPUs, and the kernel on its behalf, as in `read(2)` into guest memory.
//!
//! What it does not see: writes through *another* mapping of the same memfd or file, which includes other
//! processes (vhost-user) and `pwrite(2)` to the descriptor; and discarded pages
//! ([`GuestRam::discard`]), which whoever discards them has to report.
//!
//! What it reports beyond what was written:
//! * Transparent huge pages: the first write into untouched memory brings a huge page in, and all its 512 pages are
//!   reported. After that reports are exact, because a write to a protected huge page splits it: memory is tracked at
//!   the price of its huge pages.
//! * hugetlbfs, and tmpfs mounted with huge pages: always 512 pages for one written.
//! * Anonymous memory: a page that was never written, when it is read. Migration does not read those.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecopy::backend::{BackendError, DirtyLog, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_PAGES, PAGE_SIZE};

use crate::guest_memory::GuestMemory;
use crate::mapped::is_private;
use crate::pagemap::{Pagemap, Query};
use crate::sys::{self, Userfaultfd, scan};
use crate::watched::{self, Spans};

/// What the tracker cannot do without.
const FEATURES: u64 =
    sys::UFFD_FEATURE_WP_ASYNC | sys::UFFD_FEATURE_WP_UNPOPULATED | sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM;

/// Tracks writes to guest memory by write-protecting it. See the [module](self) for what it sees and what it
/// over-reports.
///
/// ```no_run
/// use std::sync::Arc;
/// use pagecopy::backend::{DirtyLog, GuestRam};
/// use pagecopy::bitmap::PageBitmap;
/// use pagecopy::layout::Layout;
/// use vmm_shim::guest_memory::{Backing, GuestMemory};
/// use vmm_shim::uffd_log::UffdLog;
///
/// let memory = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Anonymous { huge: false })?);
/// let log = UffdLog::new(memory.clone())?;
/// log.start()?;
/// memory.region(0).copy_from(&[7u8]);
/// let dirty = PageBitmap::new(memory.layout().chunks());
/// assert_eq!(log.sync(&dirty)?, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct UffdLog {
    memory: Memory,
    /// The regions' addresses, and whether their pages are private to this process, so that its page table knows all of them.
    regions: Vec<(Range<u64>, bool)>,
    pagemap: Pagemap,
    /// The descriptor that the regions are registered with, between `start` and `stop`.
    active: Mutex<Option<Userfaultfd>>,
}

/// The memory, which stays mapped for as long as it is tracked.
struct Memory(Arc<dyn GuestRam>);

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Memory").field(self.0.layout()).finish()
    }
}

impl UffdLog {
    /// Prepares tracking of all regions, and finds out whether this host can; nothing is tracked before
    /// [`start`](DirtyLog::start).
    ///
    /// # Errors
    /// When the kernel lacks the features or refuses them to this process, and for files that were opened for reading
    /// only, which the static log serves.
    pub fn new(memory: Arc<GuestMemory>) -> Result<Self, BackendError> {
        if memory.is_read_only_file() {
            return Err(BackendError::invalid(
                "track writes to a RAM file that is open for reading only: nothing can write it; use the static log",
            ));
        }
        let private = memory.is_anonymous();
        Self::of(memory, |_| private)
    }

    /// The same for any memory of this process. Of files that are mapped privately it may report pages that were only read.
    ///
    /// # Errors
    /// When the kernel lacks the features or refuses them to this process.
    pub fn over(memory: Arc<dyn GuestRam>) -> Result<Self, BackendError> {
        Self::of(memory, is_private)
    }

    /// `private` tells by a region's first address.
    fn of(memory: Arc<dyn GuestRam>, private: impl Fn(u64) -> bool) -> Result<Self, BackendError> {
        open()?;
        let pagemap = Pagemap::open().map_err(|e| {
            BackendError::new("open /proc/self/pagemap to find written pages: mount /proc", e)
        })?;
        let region = |region| {
            let slice = memory.region(region);
            let start = slice.ptr_guard_mut().as_ptr() as u64;
            (start..start + slice.len() as u64, private(start))
        };
        let regions = (0..memory.layout().regions().len()).map(region).collect();
        Ok(Self { memory: Memory(memory), regions, pagemap, active: Mutex::new(None) })
    }

    fn active(&self) -> MutexGuard<'_, Option<Userfaultfd>> {
        // What is protected stays valid when a thread panics: it is one value, replaced whole.
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The regions' names and addresses, and whether they are private.
    fn regions(&self) -> impl Iterator<Item = (usize, &str, Range<u64>, bool)> {
        let regions = self.memory.0.layout().regions().iter().zip(&self.regions).enumerate();
        regions.map(|(i, (r, (range, private)))| (i, r.name.as_str(), range.clone(), *private))
    }

    /// Finds written pages and protects them again: looks first, and then walks once more over what was found.
    ///
    /// A walk that protects announces all of its range to KVM's MMU notifier, and for as long as it lasts, and once more when
    /// it ends, a vCPU that faults anywhere in the VM starts over. Syncs that follow each other closely would so keep a guest
    /// from ever finishing its fault, although it writes nothing. A walk that only looks announces nothing; so a guest is
    /// disturbed only after it has written, and only about where it wrote.
    fn harvest(&self, range: Range<u64>, private: bool, mut each: impl FnMut(u64, u64)) -> io::Result<()> {
        // Private memory: only pages that exist. Otherwise the kernel would report every untouched page that shares a
        // page table with a touched one, and leave markers there that look like swapped pages to `populated` and keep
        // huge pages out. In shared memory, a page without an entry may have content, and markers were set by
        // `protect`. PFNZERO does not take part: a page that was written with zeros can be merged into the kernel's
        // page of zeros.
        let any_of = if private { scan::PRESENT | scan::SWAPPED } else { 0 };
        let look = Query {
            flags: sys::PM_SCAN_CHECK_WPASYNC,
            all_of: scan::WRITTEN,
            any_of,
            report: scan::WRITTEN,
            ..Query::default()
        };
        let mut spans = Spans::default();
        self.pagemap.scan(&look, range.start, range.end, |from, to| spans.add(from, to))?;
        let protect = Query { flags: look.flags | sys::PM_SCAN_WP_MATCHING, ..look };
        for span in spans.0 {
            self.pagemap.scan(&protect, span.start, span.end, &mut each)?;
        }
        Ok(())
    }

    /// Protects a registered region.
    fn protect(&self, fd: &Userfaultfd, range: Range<u64>, private: bool) -> io::Result<()> {
        if private { self.harvest(range, true, |_, _| ()) } else { fd.write_protect(range) }
    }
}

impl DirtyLog for UffdLog {
    fn name(&self) -> &str {
        "uffd-wp"
    }

    /// A log that runs is started afresh.
    fn start(&self) -> Result<(), BackendError> {
        self.stop()?;
        let mut active = self.active();
        let fd = open()?;
        for (_, name, range, private) in self.regions() {
            // On an error, closing the descriptor ends the registrations made so far.
            fd.register_wp(range.clone()).map_err(|e| watched::not_registered(name, "write tracking", e))?;
            self.protect(&fd, range, private)
                .map_err(|e| BackendError::new(format!("write-protect region {name:?}"), e))?;
        }
        *active = Some(fd);
        Ok(())
    }

    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        let layout = self.memory.0.layout();
        if dirty.chunks() != layout.chunks() {
            return Err(BackendError::invalid(format!(
                "sync into a bitmap of {} chunks: the layout has {}",
                dirty.chunks(),
                layout.chunks()
            )));
        }
        let active = self.active();
        if active.is_none() {
            return Err(BackendError::not_started(self.name()));
        }
        let mut count = 0;
        // By one thread: two were no faster over 4 GiB without writes, and up to five times slower where one page of
        // ten was written (presumably because protections must then be flushed from the other's CPU too).
        for (region, name, range, private) in self.regions() {
            let first = layout.region_chunks(region).start;
            let base = range.start;
            self.harvest(range, private, |from, to| {
                count += (to - from) / PAGE_SIZE as u64;
                insert_run(dirty, first, (from - base) / PAGE_SIZE as u64..(to - base) / PAGE_SIZE as u64);
            })
            .map_err(|e| BackendError::new(format!("look for written pages in region {name:?}"), e))?;
        }
        Ok(count)
    }

    fn stop(&self) -> Result<(), BackendError> {
        let Some(fd) = self.active().take() else { return Ok(()) };
        for (_, name, range, _) in self.regions() {
            fd.unregister(range)
                .map_err(|e| BackendError::new(format!("end write tracking of region {name:?}"), e))?;
        }
        Ok(())
    }
}

/// Adds pages, counted from the start of chunk `first`, to a bitmap.
pub(crate) fn insert_run(dirty: &PageBitmap, first: u32, pages: Range<u64>) {
    const PAGES: u64 = CHUNK_PAGES as u64;
    let mut page = pages.start;
    while page < pages.end {
        let (chunk, bit) = (page / PAGES, page % PAGES);
        let count = (pages.end - page).min(PAGES - bit);
        dirty.insert(first + chunk as u32, (u64::MAX >> (PAGES - count)) << bit);
        page += count;
    }
}

/// A userfaultfd with the features; the errors say what to do.
fn open() -> Result<Userfaultfd, BackendError> {
    let refused = |e: io::Error| {
        let hint = match e.raw_os_error() {
            Some(libc::ENOSYS) => "this kernel has none; it takes CONFIG_USERFAULTFD",
            Some(libc::EPERM | libc::EACCES) => {
                "this process may not; allow the system call in its seccomp filter, or give it access to /dev/userfaultfd"
            }
            Some(libc::EINVAL) => "this kernel is too old; write tracking takes Linux 6.7",
            _ => "see userfaultfd(2)",
        };
        BackendError::new(format!("open a userfaultfd: {hint}"), e)
    };
    let fd = Userfaultfd::open().map_err(refused)?;
    match fd.api(FEATURES) {
        Ok(_) => Ok(fd),
        Err(e) => {
            // Features are agreed on once a descriptor, so another one is asked what there is.
            let has = Userfaultfd::open().and_then(|fd| fd.api(0)).unwrap_or(0);
            Err(BackendError::new(
                format!(
                    "userfaultfd lacks features {:#x} of this kernel: asynchronous write-protect takes Linux 6.7 on x86-64 or \
                     arm64; use KVM's dirty log or a newer kernel",
                    FEATURES & !has
                ),
                e,
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cross_chunks() {
        let dirty = PageBitmap::new(5);
        insert_run(&dirty, 1, 63..129);
        insert_run(&dirty, 1, 200..200);
        assert_eq!(dirty.iter().collect::<Vec<_>>(), vec![(1, 1 << 63), (2, u64::MAX), (3, 1)]);
        insert_run(&dirty, 0, 3..5);
        assert_eq!(dirty.get(0), 0b11000);
    }
}
