//! A migration of QEMU's guest, as `pageferry ctl` commands it.

use std::path::Path;
use std::sync::Arc;

use pageferry::engine::report::Status;
use pageferry::vmm_shim::qemu::{Machine, QemuGuest};
use pageferry::{Progress, Refusal};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::super::api::control::{Commanded, Control};
use super::super::api::{Request, RunState, VmStatus};
use super::super::words::{self, explain};
use super::super::{CliError, Exit, sandbox};

/// Why most of what a VM can be asked is not for here.
const ASK_QEMU: &str = "QEMU's own monitor does that: this is its migration alone";

/// A migration, out or in, and what it is of.
#[derive(Clone)]
pub(super) struct Attached {
    progress: Progress,
    machine: Arc<Machine>,
    memory_bytes: u64,
    tracker: String,
    listening: Option<String>,
}

impl Attached {
    pub(super) fn new(progress: Progress, guest: &QemuGuest, memory_bytes: u64) -> Result<Self, CliError> {
        let machine = guest.describe().map_err(|e| CliError::cannot_start(&e))?;
        Ok(Self {
            progress,
            machine: Arc::new(machine),
            memory_bytes,
            tracker: String::new(),
            listening: None,
        })
    }

    pub(super) fn tracked_by(self, tracker: &str) -> Self {
        Self { tracker: tracker.to_owned(), ..self }
    }

    pub(super) fn listening_on(self, uri: String) -> Self {
        Self { listening: Some(uri), ..self }
    }

    /// Answers at `api`, for as long as what is returned is kept.
    pub(super) fn serve(&self, api: Option<&Path>) -> Result<Option<Runtime>, CliError> {
        let Some(path) = api else { return Ok(None) };
        let cannot = |text| CliError { exit: Exit::CannotStart, text };
        Control::open(path, &[]).and_then(|control| control.serve(self)).map(Some).map_err(cannot)
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
            Request::Set(tuning) => done(self.progress.tune(|now| tuning.apply(now))),
            Request::Switchover => done(self.progress.switchover()),
            Request::Continue => done(self.progress.continue_()),
            _ => Err(ASK_QEMU.into()),
        }
    }

    fn quit(&self, _force: bool) {}
}
