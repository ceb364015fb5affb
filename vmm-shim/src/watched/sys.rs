//! The memory that a userfaultfd watches, and the calls about it that could write anywhere.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use pagecopy::backend::GuestRam;

use crate::sys::Userfaultfd;

/// Regions that a userfaultfd watches, by their addresses in the process that it belongs to.
pub(crate) struct Watched<M: ?Sized> {
    fd: Userfaultfd,
    ranges: Vec<Range<u64>>,
    /// The memory, where it is this process's.
    memory: Option<Arc<M>>,
}

impl<M: GuestRam + ?Sized> Watched<M> {
    /// Memory of this process.
    pub(crate) fn own(fd: Userfaultfd, memory: Arc<M>) -> Self {
        let range = |region| {
            let slice = memory.region(region);
            let start = slice.ptr_guard_mut().as_ptr() as u64;
            start..start + slice.len() as u64
        };
        let ranges = (0..memory.layout().regions().len()).map(range).collect();
        Self { fd, ranges, memory: Some(memory) }
    }

    /// Memory at these addresses of the process that made the userfaultfd.
    ///
    /// # Safety
    /// Where it is this process, they are memory that others may write at any time.
    pub(crate) unsafe fn foreign(fd: Userfaultfd, ranges: Vec<Range<u64>>) -> Self {
        Self { fd, ranges, memory: None }
    }

    pub(crate) fn fd(&self) -> &Userfaultfd {
        &self.fd
    }

    /// The addresses of a region.
    pub(crate) fn range(&self, region: usize) -> Range<u64> {
        self.ranges[region].clone()
    }

    /// Region and offset in it of an address.
    pub(crate) fn find(&self, address: u64) -> Option<(usize, u64)> {
        let region = self.ranges.iter().position(|range| range.contains(&address))?;
        Some((region, address - self.ranges[region].start))
    }

    /// The memory, where it is this process's.
    pub(crate) fn memory(&self) -> Option<&M> {
        self.memory.as_deref()
    }

    /// [`Userfaultfd::copy`] to a place in a region, and wakes those who wait.
    ///
    /// # Panics
    /// Where the bytes end behind the region.
    pub(crate) fn copy(&self, region: usize, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let Range { start, end } = self.ranges[region];
        let fits = offset.checked_add(bytes.len() as u64).is_some_and(|to| to <= end - start);
        assert!(fits, "{} bytes at {offset:#x} of a region of {} bytes", bytes.len(), end - start);
        // SAFETY: the bytes lie in the region. Of memory of this process that is guest memory, which is kept, and is only accessed by
        // volatile and raw copies; of other memory, what `foreign` was promised.
        unsafe { self.fd.copy_to(start + offset, bytes, true) }
    }
}

impl<M: ?Sized> fmt::Debug for Watched<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("fd", &self.fd).field("ranges", &self.ranges).finish_non_exhaustive()
    }
}
