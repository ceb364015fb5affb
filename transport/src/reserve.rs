//! Memory for hard times. Where the system refuses an allocation, Rust ends the process, and with it the guest that lives in it. A
//! program that installs [`Allocator`] has some address space set aside instead: an allocation that fails takes it, succeeds, and
//! [`is_short`] says so from then on, so that a migration ends in order while there is still memory to do it with.
//!
//! This helps against limits of address space and strict overcommit. A cgroup that is full kills and refuses nothing.

mod sys;

pub use sys::Allocator;

/// What is set aside, in bytes of address space; none of it is touched. Winding a session up takes a few messages and no large buffer.
pub const RESERVE_BYTES: usize = 32 << 20;

/// Sets memory aside, if that is not done; says whether there is any. Where [`Allocator`] is not installed nobody ever takes it.
pub fn fill() -> bool {
    sys::fill()
}

/// Whether the reserve had to be used since it was filled.
pub fn is_short() -> bool {
    sys::is_short()
}

/// Has the C library give free memory at the end of an arena back at once, where it is more than 256 KiB. By itself glibc raises that
/// bound to twice the largest buffer that was ever freed, up to 64 MiB, for each arena, and there is one for most threads of a migration.
/// Whoever has set the bound by the environment (mallopt(3)) keeps it.
///
/// It is for all memory of the process, so no part of this library calls it: a program does, in the beginning, that is there for
/// migrations.
pub fn keep_little() {
    sys::keep_little();
}

/// Gives memory that nobody uses any more back to the host, where the C library keeps it: glibc has what the threads of a migration had in
/// arenas of their own, and the more of it the larger a buffer once was that was freed. Due once a migration has ended.
pub(crate) fn give_back() {
    sys::give_back();
}
