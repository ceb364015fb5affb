//! The allocator that falls back on the reserve, and what the C library keeps.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use super::RESERVE_BYTES;

/// Free bytes at the end of an arena from which on they are given back.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 256 << 10;

static RESERVE: AtomicPtr<u8> = AtomicPtr::new(null_mut());
static SHORT: AtomicBool = AtomicBool::new(false);

const RESERVED: Layout = match Layout::from_size_align(RESERVE_BYTES, 4096) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two, and far below isize::MAX"),
};

/// The system's allocator, with a reserve.
#[derive(Debug)]
pub struct Allocator;

/// Calls an allocation again while there is a reserve to give up.
fn again(allocate: impl Fn() -> *mut u8) -> *mut u8 {
    let memory = allocate();
    if !memory.is_null() || !give_up() {
        return memory;
    }
    allocate()
}

// SAFETY: every block comes from `System` by the layout that it is given back by, and whatever `System` promises of it holds. Nothing
// here unwinds or allocates by itself.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout, whose size is not zero.
        again(|| unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        again(|| unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's block with its layout and a size that is not zero; where it fails the block is as it was.
        again(|| unsafe { System.realloc(memory, layout, size) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's block, which `System` has allocated by this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

pub(super) fn fill() -> bool {
    if !RESERVE.load(Ordering::Acquire).is_null() {
        return true;
    }
    // SAFETY: the size is not zero. It is the system's own call, which leaves the reserve alone.
    let memory = unsafe { System.alloc(RESERVED) };
    if memory.is_null() {
        return false;
    }
    SHORT.store(false, Ordering::Release);
    let before = RESERVE.swap(memory, Ordering::AcqRel);
    free(before);
    true
}

pub(super) fn is_short() -> bool {
    SHORT.load(Ordering::Acquire)
}

/// Gives the reserve back to the system; false where there is none.
fn give_up() -> bool {
    let memory = RESERVE.swap(null_mut(), Ordering::AcqRel);
    if memory.is_null() {
        return false;
    }
    SHORT.store(true, Ordering::Release);
    free(memory);
    true
}

pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks, touches only memory that is free, and takes no pointer.
    unsafe {
        libc::malloc_trim(0);
    }
}

pub(super) fn keep_little() {
    #[cfg(target_env = "gnu")]
    {
        let tunables = std::env::var_os("GLIBC_TUNABLES").unwrap_or_default();
        let is_set = tunables.to_string_lossy().contains("glibc.malloc.trim_threshold");
        if is_set || std::env::var_os("MALLOC_TRIM_THRESHOLD_").is_some() {
            return;
        }
        // SAFETY: mallopt takes two numbers, and the allocator's own lock as it changes one of its bounds.
        unsafe {
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        }
    }
}

fn free(memory: *mut u8) {
    if !memory.is_null() {
        // SAFETY: it was allocated by `fill` by this layout, and whoever swapped it out of `RESERVE` is the only one that has it.
        unsafe { System.dealloc(memory, RESERVED) }
    }
}
