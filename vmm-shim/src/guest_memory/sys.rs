//! Mappings of guest memory, and all unsafe code about them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};

use pagecopy::layout::PAGE_SIZE;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::volatile_memory::VolatileSlice;

/// The size, in bytes, of the huge pages that mappings are aligned for.
pub(super) const HUGE_SIZE: u64 = 2 << 20;

/// One mapping of guest memory, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is memory of the process, not of a thread; it is only accessed through `VolatileSlice`, whose
// accesses are volatile and never make references, and through system calls, which are atomic towards each other.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes `base` or `len` through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from an offset, or of new anonymous memory, at an address that is `skew` past a
    /// multiple of `align`. A file is mapped privately if `private`, else shared.
    pub(super) fn new(
        file: Option<(&File, u64)>,
        len: u64,
        align: u64,
        skew: u64,
        private: bool,
    ) -> io::Result<Self> {
        let too_large = || io::Error::from(Errno::NOMEM);
        let room = len.checked_add(2 * align).ok_or_else(too_large)?;
        let (len, room) =
            (usize::try_from(len).map_err(|_| too_large())?, usize::try_from(room).map_err(|_| too_large())?);
        let (align, skew) = (align as usize, skew as usize);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let reserve = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice, which overlaps nothing.
        let start =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), reserve) }?;
        let lead = (start as usize).next_multiple_of(align) + skew - start as usize;
        debug_assert!(lead + len <= room && lead.is_multiple_of(PAGE_SIZE));
        // SAFETY: `lead < 2 * align`, so the address is in the range just reserved.
        let base = unsafe { start.byte_add(lead) };
        // SAFETY: `base..base + len` lies in the range reserved above, which nobody else knows of: FIXED replaces
        // only that.
        let mapped = unsafe {
            match file {
                None => rustix::mm::mmap_anonymous(base, len, access, reserve | MapFlags::FIXED),
                Some((file, offset)) => {
                    let share = if private { reserve } else { MapFlags::SHARED };
                    rustix::mm::mmap(base, len, access, share | MapFlags::FIXED, file, offset)
                }
            }
        };
        for (at, bytes) in [(start, lead), (base.wrapping_byte_add(len), room - lead - len)] {
            if bytes > 0 {
                // SAFETY: what is left of the reservation before and behind the mapping; nobody uses it.
                unsafe { rustix::mm::munmap(at, bytes) }?;
            }
        }
        // Where FIXED failed, the kernel may or may not have removed the reservation, and another thread may have
        // mapped something there since: so its addresses are given up rather than unmapped.
        mapped?;
        let this = Self { base: NonNull::new(base.cast()).ok_or_else(too_large)?, len };
        // A hint: without it, a fork would only cost copies of pages.
        let _ = this.advise(0, len as u64, Advice::LinuxDontFork);
        Ok(this)
    }

    /// Its addresses in this process.
    pub(super) fn range(&self) -> Range<u64> {
        let start = self.base.as_ptr() as u64;
        start..start + self.len as u64
    }

    /// The whole mapping.
    pub(super) fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `base` points to `len` mapped bytes, readable and writable, until `self` is dropped, which the
        // lifetime of the slice excludes. Guest memory is only ever accessed by volatile or raw copies, never by
        // reference.
        unsafe { VolatileSlice::new(self.base.as_ptr(), self.len) }
    }

    /// Advises the kernel about a range of the mapping, which must lie in it.
    pub(super) fn advise(&self, offset: u64, len: u64, advice: Advice) -> io::Result<()> {
        let in_range = offset.checked_add(len).is_some_and(|end| end <= self.len as u64);
        assert!(in_range, "advice for {len} bytes at {offset:#x} of a mapping of {} bytes", self.len);
        let part =
            self.slice().subslice(offset as usize, len as usize).expect("the range lies in the mapping");
        crate::sys::advise(&part, advice)
    }

    /// Makes large pages of a range of shared memory, of which it keeps the content; what was never touched in it is zeros then and
    /// no hole any more. Its ends must be multiples of 2 MiB, in memory and in the file, or it fails.
    pub(super) fn collapse(&self, offset: u64, len: u64) -> io::Result<()> {
        let aligned =
            (self.base.as_ptr() as u64 + offset).is_multiple_of(HUGE_SIZE) && len.is_multiple_of(HUGE_SIZE);
        if len == 0 || !aligned {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Mappings of files say that they want none, so that holes stay holes.
        self.advise(offset, len, Advice::LinuxHugepage)?;
        // The kernel passes a range over that has no page at all.
        for at in (offset..offset + len).step_by(HUGE_SIZE as usize) {
            self.advise(at, PAGE_SIZE as u64, Advice::LinuxPopulateWrite)?;
        }
        // SAFETY: `advise` has seen to it that the start of each 2 MiB lies in the mapping, and the last of these does not end behind
        // it, because `len` bytes do not. Collapsing changes neither content nor addresses.
        let result = unsafe {
            libc::madvise(self.base.as_ptr().add(offset as usize).cast(), len as usize, libc::MADV_COLLAPSE)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Asks for transparent huge pages, or refuses them. A kernel built without them knows neither, and needs neither.
    pub(super) fn advise_size(&self, huge: bool) {
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        let _ = self.advise(0, self.len as u64, advice);
    }

    /// Lets go of all pages of a large mapping, with all cores: unmapping takes 14 ms for each GiB of small pages, one after the other.
    fn release_pages(&self) {
        const PIECE: usize = 512 << 20;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if self.len < 2 * PIECE || cores < 2 {
            return;
        }
        let next = AtomicUsize::new(0);
        let work = || {
            while let at = next.fetch_add(PIECE, Ordering::Relaxed)
                && at < self.len
            {
                // What it does not let go of is unmapped all the same.
                let _ = self.advise(at as u64, PIECE.min(self.len - at) as u64, Advice::LinuxDontNeed);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..cores.min(self.len / PIECE) {
                // Without a thread there is one less.
                let _ = std::thread::Builder::new().name("release".into()).spawn_scoped(scope, work);
            }
            work();
        });
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.release_pages();
        // SAFETY: the mapping was made by `new` and every slice of it has ended, for slices borrow `self`.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}
