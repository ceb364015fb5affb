//! The allocator: memory that is free goes back to the host.

/// Gives memory that nobody uses any more back to the host. glibc keeps what the threads of a migration had, in the arenas of each.
pub(super) fn give_free_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks, touches only memory that is free, and takes no pointer.
    unsafe {
        libc::malloc_trim(0);
    }
}
