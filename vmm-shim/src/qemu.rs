//! Guests of QEMU that nobody changed: what a process beside QEMU takes to move them.
//!
//! QEMU is commanded over its monitor ([`Qmp`]). Its memory lies in files that both processes have mapped ([`QemuGuest::memory`]), and
//! its devices' state is what its own migration sends once memory in shared files is left out (capability `x-ignore-shared`): opaque
//! bytes here. `docs/adr/0042-qemu-by-its-shared-memory.md` has why.
//!
//! | what is asked of QEMU | how |
//! |---|---|
//! | let the guest stand still, and its devices' requests come to an end | `stop` |
//! | let it run | `cont` |
//! | its state | `getfd` of a pipe's end, `migrate` into it; in the mode `cpr-transfer`, `migrate` to two sockets |
//! | to take a state | the same with `migrate-incoming`, in a QEMU that was started by `-incoming defer` |

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

mod blocks;
mod control;
mod door;
mod guest;
mod qmp;
mod written;

#[cfg(test)]
mod tests;

pub use blocks::Block;
pub use guest::{Machine, QemuGuest, Role};
pub use qmp::Qmp;
pub use written::QemuScanLog;

/// QEMU says nothing of its state for so long, or takes nothing of it: it has stalled.
const STATE_PATIENCE: Duration = Duration::from_secs(30);

/// Waits until a pipe or socket can be read or written, at most for so long.
fn ready(fd: &impl AsFd, flags: PollFlags, patience: Duration) -> io::Result<()> {
    let patience =
        Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
    match poll(&mut [PollFd::new(fd, flags)], Some(&patience)) {
        Ok(0) => Err(ErrorKind::TimedOut.into()),
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
