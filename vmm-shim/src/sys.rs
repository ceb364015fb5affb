//! Raw system calls that no library wraps: `PAGEMAP_SCAN`.
//!
//! Nothing here changes the content of memory or what is mapped; that is in `guest_memory`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Categories and flags of `PAGEMAP_SCAN`. Source: Documentation/admin-guide/mm/pagemap.rst and linux/fs.h.
pub(crate) mod scan {
    /// The page was written since it was last write-protected through userfaultfd.
    pub(crate) const WRITTEN: u64 = 1 << 1;
    /// The page belongs to a file or to shared memory.
    pub(crate) const FILE: u64 = 1 << 2;
    /// The page is in RAM and in this process's page table.
    pub(crate) const PRESENT: u64 = 1 << 3;
    /// The page is swapped out, or its entry is a write-protect marker.
    pub(crate) const SWAPPED: u64 = 1 << 4;
    /// The entry is the kernel's shared page of zeros.
    pub(crate) const PFNZERO: u64 = 1 << 5;
}

/// A run of pages that `PAGEMAP_SCAN` reports: `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    /// Address of the first byte.
    pub(crate) start: u64,
    /// Address one past the last byte.
    pub(crate) end: u64,
    /// Those categories that were asked for and that hold for the run.
    pub(crate) categories: u64,
}

/// The argument of `PAGEMAP_SCAN`: `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PmScanArg {
    /// Filled by [`pagemap_scan`], like the other two that say so.
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Out: where the walk ended.
    pub(crate) walk_end: u64,
    /// Filled by [`pagemap_scan`].
    pub(crate) vec: u64,
    /// Filled by [`pagemap_scan`].
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

const _: () = assert!(size_of::<PageRegion>() == 24 && size_of::<PmScanArg>() == 96);

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// Runs one `PAGEMAP_SCAN` with `arg` over a `/proc/PID/pagemap`; reports go to `out`. Returns how many were written;
/// `arg.walk_end` says where to go on.
pub(crate) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    arg: &mut PmScanArg,
    out: &mut [PageRegion],
) -> io::Result<usize> {
    arg.size = size_of::<PmScanArg>() as u64;
    arg.vec = out.as_mut_ptr() as u64;
    arg.vec_len = out.len() as u64;
    // SAFETY: the kernel reads and writes `arg` within its stated size and writes at most `vec_len` whole `PageRegion`s
    // to `out`, which is borrowed mutably for the call and for which any bits are valid values. The walked addresses are
    // only inspected and, at most, write-protected against tracking faults: memory content and mappings do not change.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, std::ptr::from_mut(arg)) };
    if count < 0 { Err(io::Error::last_os_error()) } else { Ok((count as usize).min(out.len())) }
}
