//! The KVM calls that `kvm-ioctls` lacks, those that serve anybody's VM, and the pages shared with the kernel. All `unsafe` of the KVM
//! code is here.
//!
//! Ioctl numbers and structures: Linux `include/uapi/linux/kvm.h` and `Documentation/virt/kvm/api.rst`.

pub(crate) mod slots;

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::{offset_of, size_of};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Once};

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, kvm_device_attr, kvm_dirty_gfn, kvm_dirty_log, kvm_enable_cap, kvm_run,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use memmap2::{MmapOptions, MmapRaw};
use pagecopy::layout::PAGE_SIZE;

use slots::Slot;

const KVMIO: u64 = 0xae;

/// Number of an ioctl that moves `size` bytes from the kernel (`_IOR`).
pub(crate) const fn ior(nr: u64, size: usize) -> u64 {
    2 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}
/// Number of an ioctl that moves `size` bytes to the kernel (`_IOW`).
pub(crate) const fn iow(nr: u64, size: usize) -> u64 {
    1 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}
/// Number of an ioctl that moves `size` bytes both ways (`_IOWR`).
pub(crate) const fn iowr(nr: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}
const fn size_of_request(request: u64) -> usize {
    (request >> 16) as usize & 0x3fff
}

const CHECK_EXTENSION: u64 = KVMIO << 8 | 0x03;
const SET_USER_MEMORY_REGION: u64 = iow(0x46, size_of::<kvm_userspace_memory_region>());
const GET_DIRTY_LOG: u64 = iow(0x42, size_of::<kvm_dirty_log>());
const ENABLE_CAP: u64 = iow(0xa3, size_of::<kvm_enable_cap>());
const CLEAR_DIRTY_LOG: u64 = iowr(0xc0, size_of::<ClearDirtyLog>());
const RESET_DIRTY_RINGS: u64 = KVMIO << 8 | 0xc7;
const SET_DEVICE_ATTR: u64 = iow(0xe1, size_of::<kvm_device_attr>());
const GET_DEVICE_ATTR: u64 = iow(0xe2, size_of::<kvm_device_attr>());
const GET_XSAVE2: u64 = ior(0xcf, 4096);
const SET_XSAVE: u64 = iow(0xa5, 4096);

/// `struct kvm_clear_dirty_log`, with its union as the address it holds.
#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    dirty_bitmap: u64,
}
const _: () = assert!(CLEAR_DIRTY_LOG == 0xc018_aec0);

fn check(result: libc::c_int) -> io::Result<u32> {
    // A result of an ioctl that is not negative is a count.
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads (or, where `request` says so, writes and reads) a plain structure as bytes.
pub(crate) fn get_struct(fd: &impl AsRawFd, request: u64, bytes: &mut [u8]) -> io::Result<()> {
    assert_eq!(size_of_request(request), bytes.len(), "the ioctl's number tells its size");
    // SAFETY: the kernel accesses at most the bytes that the request's number tells, which is the buffer's
    // length; it copies bytewise, so alignment does not matter, and any bytes make a valid [u8].
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, bytes.as_mut_ptr()) }).map(drop)
}

/// Gives the kernel a plain structure as bytes.
pub(crate) fn set_struct(fd: &impl AsRawFd, request: u64, bytes: &[u8]) -> io::Result<()> {
    assert_eq!(size_of_request(request), bytes.len(), "the ioctl's number tells its size");
    // SAFETY: every setter this crate uses only reads the bytes that its number tells (KVM_SET_PIT2,
    // KVM_SET_IRQCHIP and others are misnamed `_IOR` and read, too), which is the buffer's length.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, bytes.as_ptr()) }).map(drop)
}

/// `KVM_GET_XSAVE2`: `bytes` must be as long as `KVM_CAP_XSAVE2` told, at least 4096.
pub(crate) fn get_xsave2(vcpu: &VcpuFd, vm: &VmFd, bytes: &mut [u8]) -> io::Result<()> {
    assert!(bytes.len() >= xsave_len(vm), "KVM_GET_XSAVE2 writes as much as the capability tells");
    // SAFETY: the kernel writes the size that KVM_CAP_XSAVE2 tells for this VM, and the buffer is that long.
    // This process does not enable further dynamic states (arch_prctl) that would make it grow.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), GET_XSAVE2 as _, bytes.as_mut_ptr()) }).map(drop)
}

/// `KVM_SET_XSAVE`, with a buffer as long as for [`get_xsave2`].
pub(crate) fn set_xsave(vcpu: &VcpuFd, vm: &VmFd, bytes: &[u8]) -> io::Result<()> {
    assert!(bytes.len() >= xsave_len(vm), "KVM_SET_XSAVE reads as much as the capability tells");
    // SAFETY: the kernel reads the size that KVM_CAP_XSAVE2 tells for this VM, and the buffer is that long.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), SET_XSAVE as _, bytes.as_ptr()) }).map(drop)
}

/// Bytes of a vCPU's XSAVE image: what `KVM_CAP_XSAVE2` tells, 4096 on kernels before 5.17 that have it not.
pub(crate) fn xsave_len(vm: &VmFd) -> usize {
    const CAP_XSAVE2: libc::c_ulong = 208;
    usize::try_from(vm.check_extension_raw(CAP_XSAVE2)).unwrap_or(0).max(4096)
}

/// The offset of a vCPU's TSC from the (scaled) host TSC; `KVM_VCPU_TSC_OFFSET`, Linux 5.16.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let attr = kvm_device_attr { flags: 0, group: 0, attr: 0, addr: &raw mut offset as u64 };
    // SAFETY: group 0 (KVM_VCPU_TSC_CTRL), attribute 0 (KVM_VCPU_TSC_OFFSET) writes one u64 to `addr`, which
    // is ours.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), GET_DEVICE_ATTR as _, &raw const attr) })?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] reads.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attr = kvm_device_attr { flags: 0, group: 0, attr: 0, addr: &raw const offset as u64 };
    // SAFETY: the attribute reads one u64 from `addr`, which is ours.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), SET_DEVICE_ATTR as _, &raw const attr) }).map(drop)
}

/// `KVM_SET_USER_MEMORY_REGION`: makes a slot, or changes its flags.
///
/// # Safety
/// The slot's memory may be written at any time, and stays so until the VM is gone.
unsafe fn set_user_memory_region(vm: &impl AsRawFd, region: &kvm_userspace_memory_region) -> io::Result<()> {
    // SAFETY: the kernel reads the structure of this request; what becomes of the memory is the caller's promise.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), SET_USER_MEMORY_REGION as _, std::ptr::from_ref(region)) })
        .map(drop)
}

/// What `KVM_CHECK_EXTENSION` tells of a capability; 0 where there is no such.
pub(crate) fn check_extension(vm: &impl AsRawFd, cap: u32) -> u32 {
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), CHECK_EXTENSION as _, libc::c_ulong::from(cap)) }).unwrap_or(0)
}

/// `KVM_ENABLE_CAP` of a VM, with one argument. Only of capabilities that log what is written.
pub(crate) fn enable_cap(vm: &impl AsRawFd, cap: u32, arg: u64) -> io::Result<()> {
    let mut enable = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
    enable.args[0] = arg;
    // SAFETY: the kernel reads the structure of this request; the argument of these capabilities is a number.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), ENABLE_CAP as _, &raw const enable) }).map(drop)
}

/// `KVM_GET_DIRTY_LOG`: fills `bitmap`, which must have a bit for each page of the slot.
pub(crate) fn get_dirty_log(vm: &impl AsRawFd, slot: &Slot, bitmap: &mut [u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 * 64 * PAGE_SIZE as u64 >= slot.len, "a bit for each page");
    let mut arg = kvm_dirty_log { slot: slot.number, ..kvm_dirty_log::default() };
    arg.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: the kernel writes a bit for each page of the slot, rounded up to words. The slice holds them: KVM has refused the slot if
    // it had another length, and whoever told of the slot has promised that it stays.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), GET_DIRTY_LOG as _, &raw const arg) }).map(drop)
}

/// `KVM_CLEAR_DIRTY_LOG`: clears and re-arms the pages that `bitmap` names, from `first_page` (a multiple of
/// 64).
pub(crate) fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first_page: u64,
    num_pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    assert!(bitmap.len() >= (num_pages as usize).div_ceil(64));
    let arg = ClearDirtyLog { slot, num_pages, first_page, dirty_bitmap: bitmap.as_ptr() as u64 };
    // SAFETY: the kernel only reads the bitmap, num_pages bits rounded up to words, which the slice holds.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), CLEAR_DIRTY_LOG as _, &raw const arg) }).map(drop)
}

/// `KVM_RESET_DIRTY_RINGS`: re-arms all pages that were harvested from the rings; returns how many.
pub(crate) fn reset_dirty_rings(vm: &impl AsRawFd) -> io::Result<u32> {
    // SAFETY: the ioctl has no argument.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), RESET_DIRTY_RINGS as _, 0) })
}

/// What KVM says of a `KVM_EXIT_INTERNAL_ERROR`: `KVM_INTERNAL_ERROR_*`, and its data.
pub(crate) fn internal_error(run: &kvm_run) -> (u32, Vec<u64>) {
    // SAFETY: all members of the union are plain numbers, for which any bytes are a value; with that exit
    // reason this is the one that the kernel has filled in.
    let internal = unsafe { &run.__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    (internal.suberror, internal.data[..count].to_vec())
}

/// Maps a part of a vCPU's file, shared.
fn map(vcpu: &dyn AsRawFd, offset: usize, len: usize) -> io::Result<MmapRaw> {
    MmapOptions::new().offset(offset as u64).len(len).map_raw(vcpu.as_raw_fd())
}

/// `immediate_exit` of a vCPU's `kvm_run`, through a mapping of its own, so that any thread may set it.
pub(crate) struct ImmediateExit(MmapRaw);

impl ImmediateExit {
    /// Maps the first page of a vCPU's `kvm_run`.
    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        map(vcpu, 0, PAGE_SIZE).map(Self)
    }
    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the field lies in the first page, which is mapped as long as `self` lives; the kernel only
        // reads it.
        unsafe { AtomicU8::from_ptr(self.0.as_mut_ptr().add(offset_of!(kvm_run, immediate_exit))) }
    }
    /// Whether the vCPU was asked to stop.
    pub(crate) fn get(&self) -> bool {
        self.flag().load(Ordering::SeqCst) != 0
    }
    /// Asks `KVM_RUN` to return at once (or no more to).
    pub(crate) fn set(&self, on: bool) {
        self.flag().store(on.into(), Ordering::SeqCst);
    }
}

/// A vCPU's dirty ring, as its single consumer.
pub(crate) struct DirtyRing {
    map: MmapRaw,
    entries: u32,
    /// Entries harvested since the start, modulo 2^32; `entries` is a power of two.
    next: u32,
}

const GFN_DIRTY: u32 = 1;
const GFN_RESET: u32 = 2;

impl DirtyRing {
    /// Maps the ring of a vCPU whose VM has rings of `entries` (a power of two).
    pub(crate) fn new(vcpu: &dyn AsRawFd, entries: u32) -> io::Result<Self> {
        assert!(entries.is_power_of_two());
        let bytes = entries as usize * size_of::<kvm_dirty_gfn>();
        let map = map(vcpu, KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE_SIZE, bytes)?;
        Ok(Self { map, entries, next: 0 })
    }

    /// Takes the entries there are (at most a ring full), as `(slot, page in the slot)`; returns how many.
    /// They are re-armed by [`reset_dirty_rings`].
    pub(crate) fn harvest(&mut self, mut page: impl FnMut(u32, u64)) -> u32 {
        for taken in 0..self.entries {
            let at = (self.next & (self.entries - 1)) as usize * size_of::<kvm_dirty_gfn>();
            // SAFETY: `at` is inside the mapping by the mask. The kernel publishes an entry by its flags
            // (release), and does not touch it between GFN_DIRTY and the reset that follows GFN_RESET: after
            // the acquire load that saw GFN_DIRTY, the other two fields are stable and only we read them.
            let (slot, offset) = unsafe {
                let entry = self.map.as_mut_ptr().add(at);
                let flags = AtomicU32::from_ptr(entry.add(offset_of!(kvm_dirty_gfn, flags)).cast());
                if flags.load(Ordering::Acquire) & (GFN_DIRTY | GFN_RESET) != GFN_DIRTY {
                    return taken;
                }
                let slot = entry.add(offset_of!(kvm_dirty_gfn, slot)).cast::<u32>().read_volatile();
                let offset = entry.add(offset_of!(kvm_dirty_gfn, offset)).cast::<u64>().read_volatile();
                flags.store(GFN_RESET, Ordering::Release);
                (slot, offset)
            };
            page(slot, offset);
            self.next = self.next.wrapping_add(1);
        }
        self.entries
    }
}

/// The calling thread's id, for [`kick`].
pub(crate) fn thread_id() -> i32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }
}

/// The signal that ends `KVM_RUN`: a real-time one that C libraries and debuggers leave alone.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

thread_local! {
    /// What says that a kick of this thread is on its way.
    static KICKED: Cell<*const AtomicBool> = const { Cell::new(std::ptr::null()) };
}

extern "C" fn on_kick(_: libc::c_int) {
    let kicked = KICKED.get();
    if !kicked.is_null() {
        // SAFETY: `expect_kicks` made it of a value that lives until it is taken back, on this thread.
        unsafe { (*kicked).store(false, Ordering::SeqCst) };
    }
}

/// Has the handler take back `kicked`, which says that a kick of this thread is on its way; until what this returns is dropped.
pub(crate) fn expect_kicks(kicked: &Arc<AtomicBool>) -> ExpectsKicks {
    KICKED.set(Arc::as_ptr(kicked));
    ExpectsKicks { _kicked: kicked.clone(), _of_this_thread: PhantomData }
}

/// See [`expect_kicks`].
pub(crate) struct ExpectsKicks {
    /// Lives for as long as the handler looks at it.
    _kicked: Arc<AtomicBool>,
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for ExpectsKicks {
    fn drop(&mut self) {
        KICKED.set(std::ptr::null());
    }
}

/// Installs the handler of the kick signal, once: it takes note that the signal came, and is without `SA_RESTART`, so that a system
/// call it interrupts returns `EINTR`.
pub(crate) fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the action is fully initialised, and its handler is async-signal-safe: it reads a thread-local of a constant, which
        // needs no set-up, and stores to an atomic.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
        };
        assert_eq!(result, 0, "sigaction takes a valid real-time signal");
    });
}

/// Lets the calling thread receive the kick signal, also when its creator blocks all signals.
pub(crate) fn unblock_kick() {
    // SAFETY: the set is initialised before use, and only this thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

/// As long as it lives, the thread that made it receives no signal but those that cannot be held back. They come when it is dropped.
pub(crate) struct SignalsBlocked {
    before: libc::sigset_t,
    /// The mask is the thread's.
    _of_this_thread: PhantomData<*const ()>,
}

impl SignalsBlocked {
    pub(crate) fn new() -> Self {
        // SAFETY: both sets are initialised before use, the one by sigfillset and the other by pthread_sigmask, which cannot fail with a
        // valid `how`; only this thread's mask changes.
        let before = unsafe {
            let (mut all, mut before): (libc::sigset_t, libc::sigset_t) =
                (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            before
        };
        Self { before, _of_this_thread: PhantomData }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: `before` is this thread's mask from before, for the type cannot leave the thread.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }
}

/// Interrupts a thread of this process; says whether the signal is on its way. That the thread is gone is no error.
pub(crate) fn kick(thread_id: i32) -> bool {
    // SAFETY: no memory is passed; the handler is installed before any vCPU thread exists.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread_id, kick_signal()) == 0 }
}
