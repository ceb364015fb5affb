//! Atomics: the standard ones, and loom's where it tries all orders of accesses.

#[cfg(all(test, loom))]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

/// So many zeros. From the allocator, which does not touch them: a layout that a peer only claims to have costs address space, not memory.
#[cfg(not(all(test, loom)))]
pub(crate) fn zeros(count: usize) -> Box<[AtomicU64]> {
    bytemuck::zeroed_slice_box(count)
}

/// The same, each made by loom.
#[cfg(all(test, loom))]
pub(crate) fn zeros(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}
