//! Which pages were written.

use std::sync::Arc;
use std::time::Duration;

use super::BackendError;
use crate::bitmap::PageBitmap;

/// A dirty tracker: which pages were written since it was last asked.
///
/// What holds for every one of them, and what `vmm_shim::conformance` tries:
///
/// - A page written after [`start`](Self::start) is reported by some later [`sync`](Self::sync), also when it was written while `sync`
///   or `clear` ran.
/// - Whoever consumes a report reads the page *after* [`clear`](Self::clear) returned for it. A write that comes after that is reported
///   again.
/// - It covers everybody who writes guest memory. KVM's logs know of vCPUs alone: where devices write, in the VMM or beside it, a log of
///   theirs is added (`vmm_shim::union_log::UnionLog`).
///
/// A program that writes its memory by one function alone knows what it writes:
///
/// ```
/// use pagecopy::backend::{BackendError, DirtyLog};
/// use pagecopy::bitmap::PageBitmap;
///
/// struct Noted(PageBitmap);
///
/// impl Noted {
///     /// After each write.
///     fn note(&self, chunk: u32, page: u32) {
///         self.0.insert(chunk, 1 << page);
///     }
/// }
///
/// impl DirtyLog for Noted {
///     fn name(&self) -> &str {
///         "noted"
///     }
///     fn start(&self) -> Result<(), BackendError> {
///         for chunk in 0..self.0.chunks() {
///             self.0.take(chunk);
///         }
///         Ok(())
///     }
///     fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
///         let taken = (0..self.0.chunks()).map(|chunk| {
///             let pages = self.0.take(chunk);
///             dirty.insert(chunk, pages);
///             u64::from(pages.count_ones())
///         });
///         Ok(taken.sum())
///     }
///     fn stop(&self) -> Result<(), BackendError> {
///         Ok(())
///     }
/// }
///
/// let log = Noted(PageBitmap::new(2));
/// log.note(0, 9);
/// log.start()?;
/// log.note(1, 3);
/// let dirty = PageBitmap::new(2);
/// assert_eq!(log.sync(&dirty)?, 1);
/// assert_eq!((dirty.get(0), dirty.get(1)), (0, 1 << 3));
/// # Ok::<(), BackendError>(())
/// ```
pub trait DirtyLog: Send + Sync {
    /// A short name for reports: `kvm-bitmap`, `kvm-ring`, `uffd-wp`, `soft-dirty`, `scan`, `static`.
    fn name(&self) -> &str;

    /// *When*: once, before the first page is read; after [`stop`](Self::stop) or a failed migration perhaps again.
    /// *Must*: start logging, with no page reported. Whatever was written before is the caller's business: it sends everything. A log
    /// that runs starts afresh.
    /// *Error*: writes cannot be logged; the migration fails and the guest runs on.
    fn start(&self) -> Result<(), BackendError>;

    /// *When*: at the end of each round, while the guest runs; and after [`Guest::pause`](super::Guest::pause), where it counts. Never by
    /// two threads at once, but beside `clear`.
    /// *Must*: add the pages written since the last report to `dirty`, which has a word for each chunk of the layout, and take none out.
    /// Return how many pages the log held; a page already in `dirty` counts.
    /// *Error*: pages may be lost; the migration fails and the guest runs on.
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError>;

    /// *When*: for pages that `sync` reported, by the threads that are about to read them, several at once for different chunks, each
    /// chunk by one.
    /// *Must*: re-arm logging for them before it returns; word `i` of `pages` belongs to chunk `first + i`. Other pages of these chunks
    /// stay as they are. Trackers whose `sync` re-arms by itself do nothing, as this default.
    /// *Error*: later writes would be lost; the migration fails and the guest runs on.
    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        let _ = (first, pages);
        Ok(())
    }

    /// *When*: after each `sync`, to throttle those vCPUs that write most.
    /// *Must*: tell the pages that each vCPU wrote since logging was started, as far as reports have counted them; a page that was reported
    /// and written again counts again. `None` where the log does not know who wrote: then all vCPUs are throttled alike.
    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        None
    }

    /// *When*: once, at the start.
    /// *Must*: tell whether the memory may be written at all while it is moved. `false` lets pages be read where they lie without a
    /// second look.
    fn expects_writes(&self) -> bool {
        true
    }

    /// *When*: after each `sync`.
    /// *Must*: tell for how long in all the guest stood still since logging was started, so that it could be looked at; zero for a log that
    /// needs no standstill. Rounds are then kept so long that the guest stands still for a twentieth of the time at most.
    fn paused(&self) -> Duration {
        Duration::ZERO
    }

    /// *When*: after each `sync`.
    /// *Must*: tell whether pages may have been written before it that nobody noted: then all of memory is compared with what was last
    /// sent of it, which takes about 0.05 s for each GiB and core, and finds what changed by its content ([`ContentLog`]).
    fn compares(&self) -> bool {
        false
    }

    /// *When*: at the end of a migration, whatever came of it; also of a log that was never started.
    /// *Must*: stop logging and free what it took. Harmless when not started.
    /// *Error*: logging goes on and costs the guest time. It changes nothing of how the migration ended.
    fn stop(&self) -> Result<(), BackendError>;
}

impl<T: DirtyLog + ?Sized> DirtyLog for Arc<T> {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn start(&self) -> Result<(), BackendError> {
        (**self).start()
    }
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        (**self).sync(dirty)
    }
    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        (**self).clear(first, pages)
    }
    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        (**self).written_by_vcpu()
    }
    fn expects_writes(&self) -> bool {
        (**self).expects_writes()
    }
    fn paused(&self) -> Duration {
        (**self).paused()
    }
    fn compares(&self) -> bool {
        (**self).compares()
    }
    fn stop(&self) -> Result<(), BackendError> {
        (**self).stop()
    }
}

/// The dirty log of memory that nobody writes.
#[derive(Clone, Copy, Debug, Default)]
pub struct StaticLog;

impl DirtyLog for StaticLog {
    fn name(&self) -> &str {
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

/// The dirty log of memory whose writes nobody notes: what changed is found by its content.
///
/// A content that comes back is no change only where it is what was last *sent*: one that was sent in between is found, for memory is
/// compared with what left, not with what was there at the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct ContentLog;

impl DirtyLog for ContentLog {
    fn name(&self) -> &str {
        "scan"
    }
    fn start(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn sync(&self, _dirty: &PageBitmap) -> Result<u64, BackendError> {
        Ok(0)
    }
    fn compares(&self) -> bool {
        true
    }
    fn stop(&self) -> Result<(), BackendError> {
        Ok(())
    }
}
