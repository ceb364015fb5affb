//! `pageferry qemu`: moves guests of QEMU from beside it, by its memory in shared files.

mod commanded;
mod recv;
mod send;

use std::path::Path;
use std::sync::Arc;

use clap::{Args, Subcommand};
use pageferry::vmm_shim::qemu::{QemuGuest, Role};

use super::CliError;

/// Moves the guest of a QEMU that nobody changed
#[derive(Debug, Args)]
#[command(
    after_help = "Both QEMUs have their memory in shared files, each in one of its own; the destination's waits:\n  \
qemu-system-x86_64 ... -object memory-backend-file,id=ram,size=4G,mem-path=/dev/shm/vm1,share=on -machine memory-backend=ram \\\n    \
-qmp unix:/run/vm1.qmp,server=on,wait=off [-incoming defer]\n\n\
Examples:\n  pageferry qemu recv tcp:0:4444 --qmp unix:/run/vm1.qmp\n  pageferry qemu send tcp:node7:4444 --qmp unix:/run/vm1.qmp"
)]
pub(super) struct QemuArgs {
    #[command(subcommand)]
    command: QemuCommand,
}

#[derive(Debug, Subcommand)]
enum QemuCommand {
    Send(Box<send::SendArgs>),
    Recv(Box<recv::RecvArgs>),
}

impl QemuArgs {
    /// Whether it is to print one JSON object, whatever happens.
    pub(super) fn json(&self) -> bool {
        match &self.command {
            QemuCommand::Send(args) => args.json,
            QemuCommand::Recv(args) => args.json,
        }
    }
}

pub(super) fn run(args: &QemuArgs) -> Result<(), CliError> {
    match &args.command {
        QemuCommand::Send(args) => send::run(args),
        QemuCommand::Recv(args) => recv::run(args),
    }
}

/// Attaches to the QEMU at a monitor's socket.
fn attach(qmp: &Path, role: Role) -> Result<Arc<QemuGuest>, CliError> {
    let guest = QemuGuest::attach(qmp, role).map_err(|e| CliError::cannot_start(&e))?;
    let (major, minor) = guest.qmp().version();
    tracing::debug!("QEMU {major}.{minor}, process {}: {}", guest.qmp().pid(), guest.machine());
    Ok(Arc::new(guest))
}
