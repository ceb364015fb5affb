//! Guest memory of vm-memory without its bitmap.

use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// The whole mapping of a region, whose writes nobody marks.
///
/// # Panics
/// Where there is no such region, or it is not mapped any more: both were looked at when the memory was taken.
pub(super) fn whole<M: GuestMemoryBackend>(memory: &M, region: usize) -> VolatileSlice<'_> {
    let region = memory.iter().nth(region).expect("a region of the memory");
    let marked = region.as_volatile_slice().expect("memory that was mapped when it was taken");
    // SAFETY: vm-memory's slice is as long, and lives for as long as `memory` is borrowed, which the new one does, too. Without a bitmap it
    // is the same memory, read and written in the same ways.
    unsafe { VolatileSlice::new(marked.ptr_guard_mut().as_ptr(), marked.len()) }
}
