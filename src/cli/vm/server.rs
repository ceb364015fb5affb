//! What the requests to a `vm` process do.

mod recording;
mod refusal;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use pageferry::{Failure, Fate, Progress, RdmaOptions, Refusal, Report, Status, Uri};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::super::api::control::Commanded;
use super::super::api::{MigrateRequest, PlanRequest, Request, RunState, VmStatus};
use super::super::protection::TlsRequest;
use super::super::sandbox;
use super::super::send::is_not_started;
use super::super::stop::{Heard, stopping};
use super::super::words::{self, explain};
use super::super::{CliError, Exit};
use super::machine::Machine;
use recording::Recording;
use refusal::not_here;

/// How long a request waits for a migration to end that is about to; less than a client waits for the answer.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(15);

/// Why nothing ends a migration in postcopy.
const POSTCOPY_NEEDS_THIS: &str = "the guest may run at the destination and needs the pages that are still here: wait, or `quit --force` \
                                   if the destination is gone";
/// Why a destination in postcopy does not end.
const PAGES_ON_THEIR_WAY: &str = "pages of the guest that runs here are still on their way, and without this process it is lost: wait, or \
                                  `quit --force`";
/// Why a migration cannot be told what it was asked.
const HANDED_OVER: &str = "too late: the guest was handed over";

/// One VM and who commands it.
#[derive(Clone)]
pub(super) struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Arc<Machine>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    run: RunState,
    /// A migration out is under way.
    migrating: bool,
    /// The guest is watched by a dry run, which has the dirty log.
    planning: bool,
    progress: Option<Progress>,
    listening: Option<String>,
    /// Why a guest that ran here is lost.
    lost: Option<String>,
    /// The last migration out could not be started.
    not_started: bool,
    /// A signal asked for the end while pages of the guest were missing.
    warned: bool,
    recording: Recording,
    /// Set when the process is to end.
    end: Option<Result<(), String>>,
}

impl State {
    /// The report of the last migration, out or in.
    fn report(&self) -> Option<Report> {
        self.progress.as_ref().map(words::report)
    }

    /// The status of a migration out that is under way.
    fn migration(&self) -> Option<Status> {
        self.progress.as_ref().filter(|_| self.migrating).map(Progress::status)
    }

    /// The status of a migration in.
    fn incoming(&self) -> Option<Status> {
        let left = matches!(self.run, RunState::Migrated | RunState::Unknown);
        self.progress.as_ref().filter(|_| !self.migrating && !left).map(Progress::status)
    }

    /// Why the guest that ran here is lost, if it is. The report knows before the session's thread has entered it here.
    fn lost(&self) -> Option<String> {
        let reported = || {
            let report = self.report()?;
            let why =
                "pages of the running guest were missing and never came: the guest was stopped, and is lost";
            (self.incoming()? == Status::PostcopyLost).then(|| report.error.unwrap_or_else(|| why.into()))
        };
        self.lost.clone().or_else(reported)
    }

    /// GO was said, and the source asks what came of it.
    fn asks(&self) -> bool {
        self.migration() == Some(Status::Unknown)
    }

    /// The guest may run at the destination, and pages follow, whatever the status says.
    fn in_postcopy(&self) -> bool {
        self.migrating && self.progress.as_ref().is_some_and(Progress::in_postcopy)
    }

    /// The guest came in without all its pages: whoever reads its memory may wait for one, and for ever when it is lost.
    fn misses_pages(&self) -> bool {
        self.may_lose_guest() || self.incoming() == Some(Status::PostcopyLost)
    }

    /// It runs, and is lost if this process ends.
    fn may_lose_guest(&self) -> bool {
        matches!(self.incoming(), Some(Status::PostcopyActive | Status::PostcopyPaused))
            && self.lost.is_none()
    }

    /// The migration has its result, and its thread is about to enter it here.
    fn is_ending(&self) -> bool {
        matches!(
            self.migration(),
            Some(Status::Completed | Status::Failed | Status::Cancelled | Status::PostcopyLost)
        )
    }
}

impl Commanded for Server {
    fn execute(&self, request: Request) -> Result<Value, String> {
        self.answer(request)
    }
    fn quit(&self, force: bool) {
        self.leave(force);
    }
}

impl Server {
    pub(super) fn new(machine: Machine, incoming: bool) -> Self {
        let run = if incoming { RunState::Incoming } else { RunState::Paused };
        let recording = Recording::default();
        let (migrating, planning, progress) = (false, false, None);
        let (listening, lost, end) = (None, None, None);
        let (not_started, warned) = (false, false);
        let state = State {
            run,
            migrating,
            planning,
            progress,
            listening,
            lost,
            not_started,
            warned,
            recording,
            end,
        };
        let shared = Shared { machine: Arc::new(machine), state: Mutex::new(state), changed: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }

    pub(super) fn machine(&self) -> Arc<Machine> {
        self.shared.machine.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn answer(&self, request: Request) -> Result<Value, String> {
        match request {
            Request::Status => serde_json::to_value(self.status()).map_err(|e| e.to_string()),
            Request::Migrate(request) => self.migrate(&request).map(|()| Value::Null),
            Request::Plan(request) => self.plan(request),
            Request::Pause => self.pause().map(|()| Value::Null),
            Request::Resume { force } => self.resume(force).map(|()| Value::Null),
            Request::RecordTrace(request) => self.record(&request).map(|()| Value::Null),
            Request::Cancel => self.cancel().map(|()| Value::Null),
            Request::Set(tuning) => self.command(|progress| {
                if progress.in_postcopy() && tuning.has_more_than_bandwidth() {
                    return Err(
                        "the guest was handed over: in postcopy there is only the bandwidth to set".into()
                    );
                }
                progress.tune(|now| tuning.apply(now)).map_err(too_late)
            }),
            Request::Switchover => self.command(|progress| progress.switchover().map_err(too_late)),
            Request::Continue => self.command(|progress| {
                let refused = |_| "the migration does not wait before its switchover".into();
                progress.continue_().map_err(refused)
            }),
            Request::Postcopy => self.postcopy().map(|()| Value::Null),
            Request::Recover { uri } => self.recover(&uri).map(|()| Value::Null),
            Request::Quit { force } => {
                let state = self.state();
                match force {
                    false if state.in_postcopy() => Err(POSTCOPY_NEEDS_THIS.into()),
                    false if state.may_lose_guest() => Err(PAGES_ON_THEIR_WAY.into()),
                    // Done once the answer is written.
                    _ => Ok(Value::Null),
                }
            }
        }
    }

    fn status(&self) -> VmStatus {
        let machine = &self.shared.machine;
        let crash = machine.crash();
        // A migration whose report is final is one whose guest's place is known: they are shown together, from one look.
        let mut state = self.state();
        let mut report = state.report();
        if state.is_ending() {
            state = self.wait_while(state, State::is_ending);
            report = state.report();
        }
        let status = report.as_ref().map(|report| report.status);
        let out = status.filter(|_| state.migrating);
        let crash = crash.or_else(|| state.lost());
        VmStatus {
            state: match (&crash, out) {
                (Some(_), _) => RunState::Crashed,
                (None, Some(Status::Unknown)) => RunState::Unknown,
                (None, Some(Status::PreSwitchover)) => RunState::Paused,
                (None, Some(_)) if state.in_postcopy() => RunState::Postcopy,
                (None, _) => state.run,
            },
            reason: crash,
            guest: machine.name.clone(),
            cpus: machine.cpus,
            memory_bytes: machine.ram.layout().bytes(),
            accelerator: machine.accelerator().into(),
            tracker: machine.log.name().into(),
            sandbox: Some(sandbox::confinement()),
            // A guest that is on its way out is still here; on its way in not all of it may be.
            longest_gap_ms: (matches!(state.run, RunState::Running | RunState::Paused)
                && !state.misses_pages())
            .then(|| machine.longest_gap_ms())
            .flatten(),
            listening: state.listening.clone(),
            not_started: state.not_started && !state.migrating,
            trace: state.recording.status(),
            migration: report,
        }
    }

    fn pause(&self) -> Result<(), String> {
        let mut state = self.state();
        match state.run {
            _ if state.in_postcopy() => {
                Err("the guest was handed over, and pages follow: pause it at the destination".into())
            }
            _ if state.migrating => Err("a migration is under way: cancel it first".into()),
            RunState::Running => {
                self.shared.machine.guest.pause().map_err(|e| explain(&e))?;
                state.run = RunState::Paused;
                Ok(())
            }
            RunState::Paused => Ok(()),
            other => Err(not_here(other, false)),
        }
    }

    /// Lets the guest run.
    pub(super) fn resume(&self, force: bool) -> Result<(), String> {
        let mut state = self.state();
        if force && state.asks() && !state.in_postcopy() {
            // The user knows what the source asks for. Only when it asks no more can it not say GO again.
            if let Some(progress) = &state.progress {
                // Not in postcopy, as was just seen.
                let _ = progress.cancel();
            }
            state = self.wait_while(state, |state| state.migrating);
            if state.run == RunState::Migrated {
                return Err(format!(
                    "the destination has just confirmed the handover: {}",
                    not_here(state.run, false)
                ));
            }
        }
        if let Some(lost) = state.lost() {
            return Err(lost);
        }
        match state.run {
            _ if state.in_postcopy() => return Err(POSTCOPY_NEEDS_THIS.into()),
            _ if state.asks() => return Err(not_here(RunState::Unknown, true)),
            _ if state.migrating => return Err("a migration is under way: cancel it first".into()),
            RunState::Paused => {}
            RunState::Migrated | RunState::Unknown if force => {}
            RunState::Running => return Ok(()),
            other => return Err(not_here(other, true)),
        }
        self.shared.machine.guest.resume().map_err(|e| explain(&e))?;
        state.run = RunState::Running;
        Ok(())
    }

    fn postcopy(&self) -> Result<(), String> {
        let state = self.state();
        match &state.progress {
            Some(progress) if state.migrating => progress.postcopy().map_err(|_| {
                "not now: the migration has not begun to move pages, or its destination cannot run a guest before they are there"
                    .into()
            }),
            _ => Err("no migration is under way".into()),
        }
    }

    fn recover(&self, uri: &str) -> Result<(), String> {
        let uri = uri.parse().map_err(|e| explain(&e))?;
        let state = self.state();
        match &state.progress {
            Some(progress) if state.in_postcopy() => progress.recover(uri).map_err(|e| explain(&e)),
            _ => Err("no migration is in postcopy".into()),
        }
    }

    fn cancel(&self) -> Result<(), String> {
        let state = self.state();
        match &state.progress {
            Some(progress) if state.migrating || state.run == RunState::Incoming => {
                progress.cancel().map_err(|_| {
                    "the guest may run at the destination already: a migration in postcopy cannot be cancelled"
                        .into()
                })
            }
            _ if state.recording.runs() => {
                state.recording.stop();
                Ok(())
            }
            _ => Err("no migration is under way".into()),
        }
    }

    /// Tells the migration that is under way something.
    fn command(&self, tell: impl FnOnce(&Progress) -> Result<(), String>) -> Result<Value, String> {
        let state = self.state();
        match &state.progress {
            Some(progress) if state.migrating => tell(progress).map(|()| Value::Null),
            _ => Err("no migration is under way".into()),
        }
    }

    /// Watches the guest for a dry run.
    fn plan(&self, request: PlanRequest) -> Result<Value, String> {
        let PlanRequest { link, seconds, downtime_limit_ms } = request;
        if link == 0 || !(1..=20).contains(&seconds) {
            return Err("link is at least 1 byte a second, seconds are 1 to 20".into());
        }
        let mut state = self.state();
        match state.run {
            _ if state.migrating || state.planning || state.misses_pages() || state.recording.runs() => {
                return Err("a migration or a dry run is under way".into());
            }
            RunState::Running | RunState::Paused => state.planning = true,
            other => return Err(not_here(other, false)),
        }
        drop(state);
        let source = self.shared.machine.source(false).build().map_err(|e| explain(&e));
        let plan = source.and_then(|source| {
            let plan = source.plan(Duration::from_secs(seconds), link, downtime_limit_ms);
            plan.map_err(|e| explain(&e))
        });
        self.state().planning = false;
        serde_json::to_value(plan?).map_err(|e| e.to_string())
    }

    fn migrate(&self, request: &MigrateRequest) -> Result<(), String> {
        let uri: Uri = request.uri.parse().map_err(|e| explain(&e))?;
        if matches!(uri, Uri::Exec(_)) && sandbox::confinement().mode == sandbox::Mode::Strict {
            return Err(sandbox::NO_PROGRAMS.into());
        }
        let codec = request.codec.parse().map_err(|e| format!("codec: {e}"))?;
        if !(1..=256).contains(&request.streams) || !(1..=3600).contains(&request.link_timeout_s) {
            return Err("streams are 1 to 256, link_timeout_s is 1 to 3600".into());
        }
        if request.reconnect_timeout_s > 86400 {
            return Err("reconnect_timeout_s is at most 86400".into());
        }
        let mut state = self.state();
        if state.migrating {
            return Err("a migration is under way already".into());
        }
        if state.misses_pages() {
            return Err(
                "pages of the guest are still on their way here: migrate it once they have come".into()
            );
        }
        Self::check_not_recording(&state.recording)?;
        if state.planning {
            return Err("a dry run watches the guest: wait for its end".into());
        }
        let paused = match state.run {
            RunState::Running => false,
            RunState::Paused => true,
            other => return Err(not_here(other, false)),
        };
        if let Some(why) = self.shared.machine.crash() {
            return Err(format!("the guest has crashed ({why}); there is nothing to migrate"));
        }
        self.shared.machine.forget_gap();
        let source = self.shared.machine.source(paused);
        let source = source
            .tuning(request.tuning.tuning())
            .streams(request.streams)
            .codec(codec)
            .postcopy_after_rounds(request.postcopy_after_rounds)
            .resume_after_save(request.resume_after_save)
            .base(request.base.clone())
            .snapshot(request.snapshot)
            .tls(request.tls.as_ref().map(TlsRequest::tls))
            .link_timeout(Duration::from_secs(request.link_timeout_s))
            .reconnect_timeout(Duration::from_secs(request.reconnect_timeout_s))
            .rdma(RdmaOptions {
                pin_all: request.rdma_pin_all,
                pinned_max: request.rdma_max_pinned.unwrap_or(u64::MAX),
            });
        let source = source.build().map_err(|e| explain(&e))?;
        let migration = source.start(&uri).map_err(|e| format!("cannot start a thread: {e}"))?;
        state.progress = Some(migration.progress());
        (state.migrating, state.not_started) = (true, false);
        let server = self.clone();
        // A guest that was saved is still this process's.
        let after = match uri.is_one_way() {
            true if request.resume_after_save || request.snapshot => state.run,
            true => RunState::Paused,
            false => RunState::Migrated,
        };
        // Requests are served by tasks of the control socket's runtime.
        tokio::spawn(async move {
            server.migrated(migration.await.map(|_| after));
        });
        Ok(())
    }

    /// The migration has ended.
    fn migrated(&self, result: Result<RunState, Failure>) {
        let mut state = self.state();
        state.migrating = false;
        state.not_started = result.as_ref().is_err_and(is_not_started);
        match result.map_err(|failure| failure.fate) {
            Ok(after) => state.run = after,
            // Older than what ran at the destination: only by force.
            Err(Fate::Lost) => state.run = RunState::Migrated,
            Err(Fate::Unknown) => state.run = RunState::Unknown,
            Err(Fate::Stuck) => state.run = RunState::Paused,
            // It is as it was.
            Err(_) => {}
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// The destination listens.
    pub(super) fn listening(&self, uri: &Uri, progress: &Progress) {
        let mut state = self.state();
        state.listening = Some(uri.to_string());
        state.progress = Some(progress.clone());
    }

    /// The guest came in, and runs if it ran before.
    pub(super) fn arrived(&self, running: bool) {
        let mut state = self.state();
        state.listening = None;
        state.run = if running { RunState::Running } else { RunState::Paused };
    }

    /// It did not, and this process has no purpose any more; or it did before its pages, and they never will.
    pub(super) fn not_arrived(&self, error: String) {
        let mut state = self.state();
        if state.run == RunState::Incoming {
            drop(state);
            self.end(Err(error));
            return;
        }
        state.run = RunState::Paused;
        state.lost = Some(error.clone());
        drop(state);
        tracing::error!("{error}");
        self.shared.changed.notify_all();
    }

    /// Ends the process, after whatever migration is under way was cancelled or, in postcopy, has ended. By `force` at once.
    fn leave(&self, force: bool) {
        let state = self.state();
        let loses = state.in_postcopy() || state.may_lose_guest();
        if force && loses {
            drop(state);
            self.end_at_once();
            return;
        }
        if let Some(progress) = &state.progress {
            // In postcopy it does not count: see below.
            let _ = progress.cancel();
        }
        let waits = state.in_postcopy();
        drop(state);
        if waits {
            tracing::warn!("{POSTCOPY_NEEDS_THIS}; this process ends once the destination has them");
        }
        self.end(Ok(()));
    }

    /// What a signal does: [`Self::quit`]; other than where that would lose a guest, and nobody has said so yet.
    pub(super) fn signalled(&self) -> Heard {
        let mut state = self.state();
        if !state.may_lose_guest() {
            drop(state);
            stopping();
            self.leave(false);
            return Heard::Ending;
        }
        if std::mem::replace(&mut state.warned, true) {
            drop(state);
            self.end_at_once();
            return Heard::Ending;
        }
        drop(state);
        tracing::warn!(
            "pages of the guest that runs here are still on their way; once more ends it, and the guest is lost"
        );
        Heard::Refused
    }

    /// Ends the process without waiting for a migration, and the guest with it that needs it.
    fn end_at_once(&self) {
        let mut state = self.state();
        state.end =
            Some(Err("ended while pages of the running guest were missing: the guest is lost".into()));
        state.migrating = false;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Waits while something holds that a migration's thread will change, but not for ever.
    fn wait_while<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        holds: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let waited = self.shared.changed.wait_timeout_while(state, CHANGE_TIMEOUT, |state| holds(state));
        waited.unwrap_or_else(|e| e.into_inner()).0
    }

    fn end(&self, result: Result<(), String>) {
        self.state().end.get_or_insert(result);
        self.shared.changed.notify_all();
    }

    /// Waits until the process is to end.
    pub(super) fn wait(&self, api: Runtime) -> Result<(), CliError> {
        let mut state = self.state();
        let result = loop {
            match &state.end {
                Some(result) if !state.migrating => break result.clone(),
                _ => {
                    let waited = self.shared.changed.wait_timeout(state, Duration::from_millis(50));
                    state = waited.unwrap_or_else(|e| e.into_inner()).0;
                }
            }
        };
        drop(state);
        api.shutdown_timeout(Duration::from_millis(200));
        result.map_err(|text| CliError { exit: Exit::Failed, text })
    }
}

/// Why a request comes too late.
fn too_late(refusal: Refusal) -> String {
    match refusal {
        Refusal::HandedOver | Refusal::InPostcopy => HANDED_OVER.into(),
        other => explain(&other),
    }
}
