//! Memory that is kept as it was at one moment while its guest runs: userfaultfd stops whoever is about to write a page that was not
//! copied yet.
//!
//! The kernel takes the write access of pages away, and tells of each write until it is given back. Writes of this process are stopped
//! whoever makes them: its threads, its vCPUs, and the kernel on its behalf. So who copies, or waits for faults, writes no guest memory.
//! vCPUs fault in kernel mode: as for [missing pages](crate::uffd_missing) the descriptor takes a privilege; [`check`] tells beforehand.
//! Reading is never stopped.
//!
//! What it does not stop, so that nobody may do it until the guard ends:
//! * writes through *another* mapping of the same memfd or file, which includes other processes (vhost-user) and `pwrite(2)` to the
//!   descriptor, and writes of devices to memory that they have pinned;
//! * pages that are taken away ([`GuestRam::discard`], a balloon): they read as zero from then on, also to whoever copies;
//! * writes to pages of private memory that hold nothing, whatever it was asked to guard.
//!
//! More is protected than was asked for, because one call protects a run of pages with what lies between. Who writes there waits for
//! a moment, until [`GuardedPages::wait`] lets him go on.
//!
//! Huge pages: a transparent one that nobody writes while it is guarded stays whole. Its chunks are released together, with the last of
//! them; whoever writes it before goes on with his chunk, and it comes apart. Memory from hugetlbfs is released by whole huge pages only:
//! who waits there waits for all chunks of one, and a fault is told for each.

mod pieces;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use pagecopy::backend::{BackendError, Fault, GuardedPages, GuestRam};
use pagecopy::bitmap::PageBitmap;

use crate::pagemap::{Pagemap, Query};
use crate::ram_file::Kind;
use crate::sys::{self, Userfaultfd, scan};
use crate::watched::{self, Watched};
pub(crate) use pieces::Grain;
use pieces::Pieces;

/// What it cannot do without.
const FEATURES: u64 =
    sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP | sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM | sys::UFFD_FEATURE_THREAD_ID;

/// Bytes of memory in a call that changes the protection of much: whoever needs the memory map waits for no more than that.
const PIECE: u64 = 64 << 20;

/// Memory of this process that is guarded by a userfaultfd. See the [module](self) for what it stops.
///
/// A VMM's own [`GuestRam`] is guarded by two lines:
///
/// ```
/// use std::sync::Arc;
/// use pagecopy::backend::{BackendError, GuardedPages, GuestRam};
/// use pagecopy::bitmap::PageBitmap;
/// # use pagecopy::layout::Layout;
/// use vmm_shim::uffd_guard::{UffdGuard, check};
/// # use vmm_shim::vm_memory::volatile_memory::VolatileSlice;
/// # struct Mine(vmm_shim::guest_memory::GuestMemory);
///
/// impl GuestRam for Mine {
///     fn guard_check(&self) -> Result<(), BackendError> {
///         check()
///     }
///     fn guard(self: Arc<Self>, pages: &PageBitmap) -> Result<Box<dyn GuardedPages>, BackendError> {
///         Ok(Box::new(UffdGuard::over(self, pages)?))
///     }
///     // and so on
/// #    fn layout(&self) -> &Layout { self.0.layout() }
/// #    fn region(&self, region: usize) -> VolatileSlice<'_> { self.0.region(region) }
/// #    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> { self.0.populated(first, pages) }
/// #    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> { self.0.discard(chunk, pages) }
/// }
/// ```
#[derive(Debug)]
pub struct UffdGuard {
    watched: Watched<dyn GuestRam>,
    /// By region.
    names: Vec<String>,
    pieces: Mutex<Pieces>,
    /// Whether it has not ended. Who changes a protection holds this: the kernel does not look whose it is, and after the end it may be
    /// another's.
    guards: RwLock<bool>,
    /// Where `/proc` is mounted.
    pagemap: Option<Pagemap>,
}

/// Whether this process may stop vCPUs that write; the error says what to do.
pub fn check() -> Result<(), BackendError> {
    open().map(drop)
}

fn open() -> Result<Userfaultfd, BackendError> {
    const LACKS: &str =
        "writes to protected pages of shared memory: it takes Linux 5.19 on x86-64, 6.10 on arm64";
    watched::open("guarded pages", FEATURES, LACKS)
}

/// How memory of a kind is guarded, or why the kernel cannot. `private` tells of files that are mapped so, `holes` whether pages of private
/// memory that hold nothing are known.
pub(crate) fn grain(kind: Kind, private: bool, holes: bool) -> Result<Grain, BackendError> {
    match kind {
        // A page that holds nothing cannot be guarded.
        Kind::Anonymous if !holes => Err(BackendError::invalid(
            "private memory cannot be guarded where nobody tells which of its pages hold something: mount /proc",
        )),
        Kind::Anonymous | Kind::Shmem => Ok(Grain::Small),
        Kind::Hugetlb(_) if private => Err(BackendError::invalid(
            "a private mapping of huge pages cannot be guarded while its guest runs: map them shared",
        )),
        Kind::Hugetlb(size) => Ok(Grain::Huge(size)),
        Kind::Disk => Err(BackendError::invalid(
            "memory in a file on a disk cannot be guarded while its guest runs: keep it on a tmpfs or in a memfd",
        )),
    }
}

impl UffdGuard {
    /// Guards memory of this process: registers all regions, and protects these pages. Memory of small pages only: anonymous memory,
    /// memfds, and files in tmpfs. Transparent huge pages are small ones.
    ///
    /// # Errors
    /// Where this process may not ([`check`]), where the kernel does not do it with this memory, and where another userfaultfd has it.
    /// Nothing is guarded then.
    pub fn over(ram: Arc<dyn GuestRam>, pages: &PageBitmap) -> Result<Self, BackendError> {
        Self::of(ram, |_| Grain::Small, pages)
    }

    /// The same for memory of a grain that depends on the region.
    pub(crate) fn of(
        ram: Arc<dyn GuestRam>,
        grain: impl Fn(usize) -> Grain,
        pages: &PageBitmap,
    ) -> Result<Self, BackendError> {
        let layout = ram.layout().clone();
        if pages.chunks() != layout.chunks() {
            return Err(BackendError::invalid(format!(
                "guard pages of {} chunks: the layout has {}",
                pages.chunks(),
                layout.chunks()
            )));
        }
        let watched = Watched::own(open()?, ram);
        let names: Vec<String> = layout.regions().iter().map(|r| r.name.clone()).collect();
        for (region, name) in names.iter().enumerate() {
            // On an error, closing the descriptor ends the registrations made so far.
            let registered = watched.fd().register_wp(watched.range(region));
            registered.map_err(|e| watched::not_registered(name, "guarded pages", e))?;
        }
        let regions = (0..names.len()).map(|region| (watched.range(region), grain(region))).collect();
        let pieces = Pieces::new(layout, regions, pages);
        let runs = pieces.to_protect(PIECE);
        let (pieces, guards) = (Mutex::new(pieces), RwLock::new(true));
        let guard = Self { watched, names, pieces, guards, pagemap: Pagemap::open().ok() };
        guard.protect(&runs)?;
        Ok(guard)
    }

    /// Protects runs of addresses, with all cores: one takes 7 ms for each GiB of small pages.
    fn protect(&self, runs: &[Range<u64>]) -> Result<(), BackendError> {
        let (next, failed) = (AtomicUsize::new(0), OnceLock::new());
        let work = || {
            while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.watched.fd().write_protect(run.clone()) {
                    next.store(runs.len(), Ordering::Relaxed);
                    // One reason is enough.
                    let _ = failed.set(self.failed("write-protect", run, error));
                }
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 1..cores.min(runs.len()) {
                // Without a thread there is one less.
                let _ = std::thread::Builder::new().name("guard".into()).spawn_scoped(scope, work);
            }
            work();
        });
        failed.into_inner().map_or(Ok(()), Err)
    }

    /// Lets writes go on, and whoever waits there; while it is held that the guard has not ended.
    fn unprotect(&self, runs: &[Range<u64>]) -> Result<(), BackendError> {
        runs.iter().try_for_each(|run| {
            let done = self.watched.fd().unprotect(run.clone());
            done.map_err(|error| self.failed("let writes go on to", run, error))
        })
    }

    /// What failed with a run of addresses.
    fn failed(&self, what: &str, run: &Range<u64>, error: io::Error) -> BackendError {
        let len = run.end - run.start;
        let place = self.watched.find(run.start).map_or_else(String::new, |(region, offset)| {
            format!(" at {offset:#x} of region {:?}", self.names[region])
        });
        BackendError::new(format!("{what} {len} guarded bytes{place}"), error)
    }

    /// Whether these addresses are mapped as one huge page; where nobody knows, which is before Linux 6.7, they are not.
    fn is_huge(&self, addresses: &Range<u64>) -> bool {
        let Some(pagemap) = &self.pagemap else { return false };
        let query = Query { any_of: scan::HUGE, report: scan::HUGE, ..Query::default() };
        let mut huge = 0;
        let scanned = pagemap.scan(&query, addresses.start, addresses.end, |from, to| huge += to - from);
        scanned.is_ok() && huge == addresses.end - addresses.start
    }

    fn guards(&self) -> RwLockReadGuard<'_, bool> {
        // It is one value.
        self.guards.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn pieces(&self) -> MutexGuard<'_, Pieces> {
        // What is left is told before anything else: nothing that matters is half done when a thread panics.
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuardedPages for UffdGuard {
    fn wait(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), BackendError> {
        let mut touched = Vec::new();
        self.watched
            .fd()
            .wait(timeout, |address, thread| touched.push((address, thread)))
            .map_err(|e| BackendError::new("wait for writes to guarded pages", e))?;
        let guards = self.guards();
        for (address, thread) in touched.into_iter().filter(|_| *guards) {
            let Some((region, offset)) = self.watched.find(address) else { continue };
            let runs = self.pieces().touched(region, offset, thread, faults);
            self.unprotect(&runs)?;
        }
        Ok(())
    }

    fn release(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let guards = self.guards();
        if !*guards {
            return Ok(());
        }
        let runs = self.pieces().release(chunk, pages, |addresses| self.is_huge(addresses));
        self.unprotect(&runs)
    }

    fn end(&self) -> Result<(), BackendError> {
        let mut guards = self.guards.write().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::take(&mut *guards) {
            return Ok(());
        }
        for region in 0..self.names.len() {
            let range = self.watched.range(region);
            for run in pieces::cut(range.clone(), self.pieces().grain(region).bytes().max(PIECE)) {
                let ended = self.watched.fd().unregister(run.clone());
                ended.map_err(|error| self.failed("end the guard of", &run, error))?;
            }
            // The end of a registration wakes nobody who waits to write.
            let woken = self.watched.fd().wake(range.clone());
            woken.map_err(|error| self.failed("wake whoever waits to write", &range, error))?;
        }
        Ok(())
    }
}

impl Drop for UffdGuard {
    fn drop(&mut self) {
        // What does not end so ends with the descriptor.
        let _ = self.end();
    }
}
