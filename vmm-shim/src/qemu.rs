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
//! | its state | `getfd` of a pipe's end, `migrate` into it |
//! | to take a state | the same with `migrate-incoming`, in a QEMU that was started by `-incoming defer` |

mod blocks;
mod control;
mod guest;
mod qmp;
mod written;

#[cfg(test)]
mod tests;

pub use blocks::Block;
pub use guest::{Machine, QemuGuest, Role};
pub use qmp::Qmp;
pub use written::QemuScanLog;
