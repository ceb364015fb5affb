//! A migration of QEMU's guest, as `pageferry ctl` commands it.

use std::sync::Arc;

use pageferry::engine::report::Status;
use pageferry::vmm_shim::qemu::Machine;
use pageferry::{Progress, Refusal};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::super::api::control::{Commanded, Control};
use super::super::api::{ApiAddress, Request, RunState, VmStatus};
use super::super::tuning::OnTimeoutArg;
use super::super::words::{self, explain};
use super::super::{CliError, Exit, sandbox};

/// Why most of what a VM can be asked is not for here.
const ASK_QEMU: &str = "QEMU's own monitor does that: this is its migration alone";

/// Why a guest of QEMU has all its pages before it runs.
pub(super) const NO_POSTCOPY: &str = "--on-timeout postcopy: a guest of QEMU moves by precopy alone, for QEMU would have to hand its \
                                      userfaultfd over; use cancel or switchover";

/// A migration, out or in, and what it is of.
#[derive(Clone)]
pub(super) struct Attached {
    progress: Progress,
    machine: Arc<Machine>,
    memory_bytes: u64,
    tracker: String,
    listening: Option<String>,
}

/// Opens the control socket, before anything is begun.
pub(super) fn open(api: Option<&ApiAddress>) -> Result<Option<Control>, CliError> {
    let cannot = |text| CliError { exit: Exit::CannotStart, text };
    api.map(|api| Control::open(&api.0, &[])).transpose().map_err(cannot)
}

impl Attached {
    pub(super) fn new(progress: Progress, machine: Machine, memory_bytes: u64) -> Self {
        Self { progress, machine: Arc::new(machine), memory_bytes, tracker: String::new(), listening: None }
    }

    pub(super) fn tracked_by(self, tracker: &str) -> Self {
        Self { tracker: tracker.to_owned(), ..self }
    }

    pub(super) fn listening_on(self, uri: String) -> Self {
        Self { listening: Some(uri), ..self }
    }

    /// Answers on a control socket, for as long as what is returned is kept. A migration that was begun goes on without.
    pub(super) fn serve(&self, api: Option<Control>) -> Option<Runtime> {
        api?.serve(self).inspect_err(|e| tracing::warn!("nobody is answered at --api: {e}")).ok()
    }

    fn status(&self) -> VmStatus {
        let report = words::report(&self.progress);
        let incoming = self.listening.is_some();
        let state = match (report.status, incoming) {
            (Status::Completed, false) => RunState::Migrated,
            (Status::Unknown, _) => RunState::Unknown,
            (Status::Completed, true) => RunState::Running,
            (Status::Device, false) => RunState::Paused,
            (_, false) => RunState::Running,
            (_, true) => RunState::Incoming,
        };
        VmStatus {
            state,
            reason: None,
            guest: "qemu".into(),
            cpus: self.machine.cpus,
            memory_bytes: self.memory_bytes,
            accelerator: self.machine.accelerator.clone(),
            tracker: self.tracker.clone(),
            sandbox: Some(sandbox::confinement()),
            longest_gap_ms: None,
            listening: self.listening.clone(),
            not_started: false,
            trace: None,
            migration: Some(report),
        }
    }
}

impl Commanded for Attached {
    fn execute(&self, request: Request) -> Result<Value, String> {
        let done = |told: Result<(), Refusal>| told.map(|()| Value::Null).map_err(|e| explain(&e));
        match request {
            Request::Status => serde_json::to_value(self.status()).map_err(|e| e.to_string()),
            Request::Cancel => done(self.progress.cancel()),
            Request::Set(tuning) if tuning.on_timeout == Some(OnTimeoutArg::Postcopy) => {
                Err(NO_POSTCOPY.into())
            }
            Request::Set(tuning) => done(self.progress.tune(|now| tuning.apply(now))),
            Request::Switchover => done(self.progress.switchover()),
            Request::Continue => done(self.progress.continue_()),
            _ => Err(ASK_QEMU.into()),
        }
    }

    fn quit(&self, _force: bool) {}
}
