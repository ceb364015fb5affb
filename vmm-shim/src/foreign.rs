//! Memory of a process that is not ours, and that knows nothing of us: where it is, and which pages of it were written.
//!
//! A VMM that has no dirty log for others, such as an unmodified QEMU, has a page table, and the kernel shows it to its user and to
//! root: [`Process`]. In it the kernel notes a *soft-dirty* bit for every page that the process writes: by its threads, by its vCPUs,
//! and by the kernel on its behalf, as in `read(2)` into guest memory. [`SoftDirtyLog`] makes a
//! [`DirtyLog`](pagecopy::backend::DirtyLog) of these bits.
//!
//! **Looking and clearing are two steps.** What is written between the scan of the page table and the clearing of its bits is covered by
//! the guest's [`Standstill`], and by nothing else. So is what a device writes by DMA: the kernel sets the bits when a read from a disk
//! is asked for, not when the data arrives. A standstill therefore stops vCPUs *and* has block I/O drained, as QMP's `stop` does and a
//! SIGSTOP does not. Every look is a little downtime; [`SoftDirtyLog::paused`] tells how much.
//!
//! What the log does not see, and what whoever uses it has to refuse:
//! * Writes through another process's mapping of the same memory (vhost-user back ends), by `pwrite(2)` to its file, and by devices of
//!   VFIO.
//! * A page that is taken away (a balloon, virtio-mem) and then read, not written, before the next look. It is noticed where it is still
//!   away. A guest that gives pages away expects nothing of them until it has written them.
//! * A page of shared memory that the process itself takes out of its page table and keeps; see [`SoftDirtyLog`], also about swap.
//!
//! What it reports beyond what was written: all of a transparent huge page, of which one byte was.
//!
//! Clearing takes no range: the bits of the whole process are cleared, and it faults once more at each page that it writes next. Two
//! logs of one process, or a log and CRIU, take each other's bits away.

mod log;
mod losses;
mod maps;
mod process;
mod soft_dirty;
mod standstill;

pub use log::SoftDirtyLog;
pub use maps::{Mapping, MappingKind};
pub use process::Process;
pub use soft_dirty::check;
pub use standstill::{Standstill, Standstills};
