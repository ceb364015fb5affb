//! Raw system calls: advice about memory, `PAGEMAP_SCAN`, and of userfaultfd write-protect, missing pages, and placing pages.
//!
//! Nothing here changes what is mapped; that is in `guest_memory`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mm::Advice;
use vm_memory::volatile_memory::VolatileSlice;

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
    /// The page is part of a huge page that is mapped as such.
    pub(crate) const HUGE: u64 = 1 << 6;
    /// The page was written since the process's bits were last cleared. Kernels without `CONFIG_MEM_SOFT_DIRTY` take it, and never say so.
    pub(crate) const SOFT_DIRTY: u64 = 1 << 7;
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
    // SAFETY: the kernel reads and writes `arg` within its stated size and writes at most `vec_len` whole
    // `PageRegion`s to `out`, which is borrowed mutably for the call and for which any bits are valid values. The
    // walked addresses are only inspected and, at most, write-protected against tracking faults: memory content and
    // mappings do not change.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, std::ptr::from_mut(arg)) };
    if count < 0 { Err(io::Error::last_os_error()) } else { Ok((count as usize).min(out.len())) }
}

/// Advises the kernel about memory.
pub(crate) fn advise(memory: &VolatileSlice<'_>, advice: Advice) -> io::Result<()> {
    loop {
        // SAFETY: the slice is live memory that is only accessed by volatile and raw copies. No advice used in this crate unmaps anything;
        // `DONTNEED` makes pages of anonymous memory read as zero, which is a write like any other to a volatile reader, and those of
        // shared memory as what they were.
        let result =
            unsafe { rustix::mm::madvise(memory.ptr_guard_mut().as_ptr().cast(), memory.len(), advice) };
        match result {
            Err(Errno::INTR | Errno::AGAIN) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

/// Tells of each page of a mapping whether it can be read without a wait for a disk; of pages of tmpfs, whether they are in memory. Where
/// the file neither belongs to the caller nor may be written by him, the system says so of all pages. Source: mincore(2), `mm/mincore.c`.
pub(crate) fn in_core(memory: &VolatileSlice<'_>) -> io::Result<Vec<bool>> {
    let mut pages = vec![0u8; memory.len().div_ceil(pagecopy::layout::PAGE_SIZE)];
    loop {
        // SAFETY: the kernel looks at the mapping, whose content it neither reads nor changes, and writes a byte for each of its pages,
        // for which `pages` has room.
        let result = unsafe {
            libc::mincore(memory.ptr_guard_mut().as_ptr().cast(), memory.len(), pages.as_mut_ptr())
        };
        if result == 0 {
            return Ok(pages.into_iter().map(|page| page & 1 != 0).collect());
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
            return Err(error);
        }
    }
}

/// `PAGEMAP_SCAN`: write-protect the pages that match.
pub(crate) const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// `PAGEMAP_SCAN`: fail where the memory is not registered for asynchronous write-protect.
pub(crate) const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// userfaultfd: faults tell whether the page is protected.
pub(crate) const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// userfaultfd: markers keep the protection of pages that have no page table entry.
pub(crate) const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// userfaultfd: pages that were never touched can be protected too.
pub(crate) const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// userfaultfd: a write to a protected page is resolved by the kernel, which only takes the protection away.
pub(crate) const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

/// userfaultfd: missing pages of hugetlbfs.
pub(crate) const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// userfaultfd: missing pages of tmpfs and memfds.
pub(crate) const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// userfaultfd: events tell the thread.
pub(crate) const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;

/// `struct uffdio_range`. Source of this and the next ones: linux/userfaultfd.h.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct UffdRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_api`.
#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdRegister {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct UffdWriteProtect {
    range: UffdRange,
    mode: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    /// Out: bytes copied, or an error number, negative.
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct UffdZeropage {
    range: UffdRange,
    mode: u64,
    /// Out: bytes that were made zero, or an error number, negative.
    zeroed: i64,
}

/// `struct uffd_msg`, read as a page fault, which is all that is asked for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct UffdMessage {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u32,
    padding: u32,
}

const _: () = assert!(
    size_of::<UffdRange>() == 16
        && size_of::<UffdZeropage>() == 32
        && size_of::<UffdMessage>() == 32
        && size_of::<UffdApi>() == 24
        && size_of::<UffdRegister>() == 32
        && size_of::<UffdWriteProtect>() == 24
        && size_of::<UffdCopy>() == 40
);

/// `_IO(0xaa, 0)`, of /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
const UFFDIO_API: u64 = 0xc018_aa3f;
/// `_IOWR(0xaa, 0, struct uffdio_register)`
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
/// `_IOR(0xaa, 1, struct uffdio_range)`
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
/// `_IOWR(0xaa, 3, struct uffdio_copy)`
const UFFDIO_COPY: u64 = 0xc028_aa03;
/// `UFFDIO_COPY`: nobody waits for the page.
const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
/// `_IOR(0xaa, 2, struct uffdio_range)`
const UFFDIO_WAKE: u64 = 0x8010_aa02;
/// `_IOWR(0xaa, 4, struct uffdio_zeropage)`
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
/// `event` of [`UffdMessage`]: a page fault.
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// Events that are read at a time.
const EVENTS_MAX: usize = 32;
/// `_IOWR(0xaa, 6, struct uffdio_writeprotect)`
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
/// Flag of userfaultfd(2): faults by the kernel are not handed out; needs no privilege.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// A userfaultfd. Memory registered by [`Self::register_wp`] stops whoever writes a protected page. Not so where the descriptor has agreed
/// on [`UFFD_FEATURE_WP_ASYNC`]: that never stops an access, but tracks writes, and places pages ([`Self::copy`]). Memory registered by
/// [`Self::register_missing`] stops whoever touches a page that is not there.
#[derive(Debug)]
pub(crate) struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Opens one: by the system call where that is allowed, else from /dev/userfaultfd.
    ///
    /// Faults in kernel mode are not asked for, which would need a privilege: asynchronous write-protect hands no
    /// fault out, and tracks writes by the kernel all the same.
    pub(crate) fn open() -> io::Result<Self> {
        Self::open_with(UFFD_USER_MODE_ONLY)
    }

    /// Opens one that hands out faults in kernel mode, too, such as those of vCPUs. It takes CAP_SYS_PTRACE, the sysctl
    /// `vm.unprivileged_userfaultfd`, or access to /dev/userfaultfd.
    pub(crate) fn open_for_kernel() -> io::Result<Self> {
        Self::open_with(0)
    }

    fn open_with(more: libc::c_int) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | more;
        // SAFETY: takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd >= 0 {
            // SAFETY: a descriptor that the kernel just made for us.
            return Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }));
        }
        let refused = io::Error::last_os_error();
        let Ok(device) = File::open("/dev/userfaultfd") else { return Err(refused) };
        // SAFETY: takes the same flags, by value.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel just made for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Agrees on features, once a descriptor; returns those the kernel has. `EINVAL`: it has not all of them.
    pub(crate) fn api(&self, features: u64) -> io::Result<u64> {
        let mut arg = UffdApi { api: 0xaa, features, ioctls: 0 };
        self.ioctl(UFFDIO_API, &mut arg)?;
        Ok(arg.features)
    }

    /// Registers a range for write-protect. Nothing is protected yet.
    pub(crate) fn register_wp(&self, range: Range<u64>) -> io::Result<()> {
        let mut arg = UffdRegister { range: UffdRange::of(range), mode: 1 << 1, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
    }

    /// Registers a range for missing pages: whoever touches a page that is not there waits, and [`Self::faults`] tells of him.
    pub(crate) fn register_missing(&self, range: Range<u64>) -> io::Result<()> {
        let mut arg = UffdRegister { range: UffdRange::of(range), mode: 1, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
    }

    /// Lets those who wait for pages of a range look again.
    pub(crate) fn wake(&self, range: Range<u64>) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut UffdRange::of(range))
    }

    /// Makes a registered range of missing pages read as zero, up to the first one that is there: `EEXIST` when that is the very
    /// first. Returns the number of bytes. Wakes those who wait.
    pub(crate) fn zero(&self, range: Range<u64>) -> io::Result<usize> {
        let mut arg = UffdZeropage { range: UffdRange::of(range.clone()), mode: 0, zeroed: 0 };
        match self.ioctl(UFFDIO_ZEROPAGE, &mut arg) {
            Ok(()) => Ok((range.end - range.start) as usize),
            Err(e) => usize::try_from(arg.zeroed).ok().filter(|&zeroed| zeroed > 0).ok_or(e),
        }
    }

    /// Waits until there are faults, at most `timeout`, and tells them as [`Self::faults`] does. A signal ends it early.
    pub(crate) fn wait(&self, timeout: Duration, each: impl FnMut(u64, u32)) -> io::Result<()> {
        let timeout = Timespec::try_from(timeout).ok();
        match poll(&mut [PollFd::new(self, PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => self.faults(each).map(drop),
            Err(e) => Err(e.into()),
        }
    }

    /// Tells each fault that waits to be told of, address and thread; returns how many, 0 where there is none.
    pub(crate) fn faults(&self, mut each: impl FnMut(u64, u32)) -> io::Result<usize> {
        let mut messages = [UffdMessage::default(); EVENTS_MAX];
        // SAFETY: the kernel writes at most this many bytes, whole messages, to the array, which any bits are valid values of.
        let read =
            unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        let Ok(read) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        };
        let messages = &messages[..read / size_of::<UffdMessage>()];
        for message in messages.iter().filter(|message| message.event == UFFD_EVENT_PAGEFAULT) {
            each(message.address, message.thread);
        }
        Ok(messages.len())
    }

    /// Protects a registered range. Pages of shared memory that are not there are protected, too; those of private memory only where the
    /// descriptor has agreed on [`UFFD_FEATURE_WP_UNPOPULATED`].
    pub(crate) fn write_protect(&self, range: Range<u64>) -> io::Result<()> {
        let mut arg = UffdWriteProtect { range: UffdRange::of(range), mode: 1 };
        self.ioctl(UFFDIO_WRITEPROTECT, &mut arg)
    }

    /// Takes the protection of a registered range away, and lets those who wait to write it go on.
    pub(crate) fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        let mut arg = UffdWriteProtect { range: UffdRange::of(range), mode: 0 };
        self.ioctl(UFFDIO_WRITEPROTECT, &mut arg)
    }

    /// Makes `bytes`, whole pages, the content of as many pages from the start of `to` as have none yet, up to the first one
    /// that has: `EEXIST` when that is the very first. Returns the number of bytes placed. Such a page is allocated and
    /// filled at once, where touching it would have it filled with zeros first. The memory must be registered. With `wake`, those
    /// who wait for these pages go on.
    pub(crate) fn copy(&self, to: &VolatileSlice<'_>, bytes: &[u8], wake: bool) -> io::Result<usize> {
        assert!(bytes.len() <= to.len(), "{} bytes for {} bytes of memory", bytes.len(), to.len());
        // SAFETY: live memory that is only accessed by volatile and raw copies, and that has as many bytes.
        unsafe { self.copy_to(to.ptr_guard_mut().as_ptr() as u64, bytes, wake) }
    }

    /// The same for an address.
    ///
    /// # Safety
    /// As many bytes from the address on are memory that others may write at any time; or the descriptor is another process's, whose
    /// addresses these are.
    pub(crate) unsafe fn copy_to(&self, to: u64, bytes: &[u8], wake: bool) -> io::Result<usize> {
        let mut arg = UffdCopy {
            to,
            from: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode: if wake { 0 } else { UFFDIO_COPY_MODE_DONTWAKE },
            copied: 0,
        };
        loop {
            // SAFETY: the kernel reads and writes the struct of this request, reads `bytes`, and writes at most as many
            // bytes from `to` on, which the caller may have written.
            let result =
                unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY as _, std::ptr::from_mut(&mut arg)) };
            let error = io::Error::last_os_error();
            match usize::try_from(arg.copied) {
                _ if result >= 0 => return Ok(bytes.len()),
                // Part of it, and then something that the next call will tell of.
                Ok(copied) if copied > 0 => return Ok(copied),
                // The memory map is being changed by another thread.
                _ if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => arg.copied = 0,
                _ => return Err(error),
            }
        }
    }

    /// Ends the registration of a range and takes its protection away. Who waits for a protected page is not woken.
    pub(crate) fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut UffdRange::of(range))
    }

    fn ioctl<T>(&self, request: u64, arg: &mut T) -> io::Result<()> {
        loop {
            // SAFETY: every caller passes the `repr(C)` struct of its request, whose size is in the request's number;
            // the kernel reads and writes only that. Requests here change memory content at most from a missing page to
            // one of zeros, which is a write like any other to a volatile reader.
            let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, std::ptr::from_mut(arg)) };
            if result >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // EAGAIN: the memory map is being changed by another thread.
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
                return Err(error);
            }
        }
    }
}

impl From<OwnedFd> for Userfaultfd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl std::os::fd::AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl UffdRange {
    fn of(range: Range<u64>) -> Self {
        Self { start: range.start, len: range.end - range.start }
    }
}
