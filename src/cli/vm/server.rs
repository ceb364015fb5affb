//! The control socket of a `vm` process, and what its requests do.

mod recording;
mod refusal;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use pageferry::engine::plan::plan;
use pageferry::engine::progress::{Phase, Progress};
use pageferry::engine::report::{Report, Status};
use pageferry::engine::source::{Failure, Fate, migrate};
use pageferry::engine::{Options, explain};
use pageferry::transport::rdma::RdmaOptions;
use pageferry::transport::socket::{AsyncConnection, AsyncListener, Listener};
use pageferry::transport::uri::Uri;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::runtime::Runtime;

use super::super::api::{Answer, LINE_MAX, MigrateRequest, PlanRequest, Request, RunState, VmStatus};
use super::super::send::is_not_started;
use super::super::stop::{Heard, stopping};
use super::super::{CliError, Exit};
use super::machine::Machine;
use super::sys;
use recording::Recording;
use refusal::not_here;

/// A client that says nothing for this long is left.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);
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
/// What is said of a thread that panicked, beside its own words.
const PANICKED: &str = "a thread panicked, which is a defect (its words are in the log): please report it";

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
    /// Why the thread of the last migration out ended without a result.
    panicked: Option<String>,
    /// A signal asked for the end while pages of the guest were missing.
    warned: bool,
    recording: Recording,
    /// Set when the process is to end.
    end: Option<Result<(), String>>,
}

impl State {
    /// The report of the last migration, out or in.
    fn report(&self) -> Option<Report> {
        let mut report = self.progress.as_ref().map(Progress::report)?;
        if let Some(why) = &self.panicked {
            report.status = if self.run == RunState::Unknown { Status::Unknown } else { Status::Failed };
            report.error = Some(why.clone());
        }
        Some(report)
    }

    /// The status of a migration out that is under way.
    fn migration(&self) -> Option<Status> {
        self.progress.as_ref().filter(|_| self.migrating).map(|progress| progress.report().status)
    }

    /// The status of a migration in.
    fn incoming(&self) -> Option<Status> {
        let left = matches!(self.run, RunState::Migrated | RunState::Unknown);
        self.progress.as_ref().filter(|_| !self.migrating && !left).map(|progress| progress.report().status)
    }

    /// Why the guest that ran here is lost, if it is. The report knows before the session's thread has entered it here.
    fn lost(&self) -> Option<String> {
        let reported = || {
            let report = self.progress.as_ref()?.report();
            let why =
                "pages of the running guest were missing and never came: the guest was stopped, and is lost";
            (self.incoming()? == Status::PostcopyLost).then(|| report.error.unwrap_or_else(|| why.into()))
        };
        self.lost.clone().or_else(reported)
    }

    /// How far a migration out that is under way has come.
    fn phase(&self) -> Option<Phase> {
        self.progress.as_ref().filter(|_| self.migrating).map(Progress::phase)
    }

    /// GO was said, and the source asks what came of it.
    fn asks(&self) -> bool {
        self.migration() == Some(Status::Unknown)
    }

    /// The guest may run at the destination, and pages follow, whatever the status says.
    fn in_postcopy(&self) -> bool {
        self.phase() == Some(Phase::Postcopy)
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

impl Server {
    pub(super) fn new(machine: Machine, incoming: bool) -> Self {
        let run = if incoming { RunState::Incoming } else { RunState::Paused };
        let recording = Recording::default();
        let (migrating, planning, progress) = (false, false, None);
        let (listening, lost, panicked, end) = (None, None, None, None);
        let (not_started, warned) = (false, false);
        let state = State {
            run,
            migrating,
            planning,
            progress,
            listening,
            lost,
            not_started,
            panicked,
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

    /// Opens the control socket, for this user alone, and answers on it.
    pub(super) fn serve(&self, path: &Path) -> Result<Runtime, String> {
        let listener = Listener::bind_private(path).map_err(|e| format!("--api: {}", explain(&e)))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|e| format!("cannot start the control plane: {e}"))?;
        let listener = {
            let _guard = runtime.enter();
            AsyncListener::new(listener).map_err(|e| format!("--api: {e}"))?
        };
        let server = self.clone();
        runtime.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((connection, _)) => {
                        tokio::spawn(server.clone().client(connection));
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
        Ok(runtime)
    }

    async fn client(self, connection: AsyncConnection) {
        let (reader, mut writer) = tokio::io::split(connection);
        let mut reader = BufReader::new(reader.take(LINE_MAX));
        let mut line = Vec::new();
        while let Ok(Ok(1..)) =
            tokio::time::timeout(CLIENT_TIMEOUT, reader.read_until(b'\n', &mut line)).await
        {
            let whole = line.ends_with(b"\n") || (line.len() as u64) < LINE_MAX;
            let request = Request::parse(&line);
            let mut quits = match request {
                Ok(Request::Quit { force }) if whole => Some(force),
                _ => None,
            };
            let answer = match request {
                _ if !whole => Err(format!("a request is longer than {LINE_MAX} bytes")),
                Ok(request) => {
                    let server = self.clone();
                    // Pausing and resuming block.
                    let done = tokio::task::spawn_blocking(move || server.execute(request)).await;
                    done.unwrap_or_else(|e| Err(format!("the request failed: {e}")))
                }
                Err(e) => Err(e),
            };
            quits = quits.filter(|_| answer.is_ok());
            let answer = answer.map_or_else(Answer::Error, Answer::Return);
            let text = serde_json::to_string(&answer).unwrap_or_default() + "\n";
            let written = writer.write_all(text.as_bytes()).await;
            if let Some(force) = quits {
                // Only now: the process may be gone a moment later, and its answer with it.
                self.quit(force);
            }
            // What follows in a line that is too long is no request either.
            if written.is_err() || !whole {
                break;
            }
            line.clear();
            reader.get_mut().set_limit(LINE_MAX);
        }
    }

    fn execute(&self, request: Request) -> Result<Value, String> {
        match request {
            Request::Status => serde_json::to_value(self.status()).map_err(|e| e.to_string()),
            Request::Migrate(request) => self.migrate(&request).map(|()| Value::Null),
            Request::Plan(request) => self.plan(request),
            Request::Pause => self.pause().map(|()| Value::Null),
            Request::Resume { force } => self.resume(force).map(|()| Value::Null),
            Request::RecordTrace(request) => self.record(&request).map(|()| Value::Null),
            Request::Cancel => self.cancel().map(|()| Value::Null),
            Request::Set(tuning) => self.command(|progress| match progress.phase() {
                Phase::Precopy => {
                    progress.tune(|now| tuning.apply(now));
                    Ok(())
                }
                Phase::Postcopy if !tuning.has_more_than_bandwidth() => {
                    progress.tune(|now| tuning.apply(now));
                    Ok(())
                }
                Phase::Postcopy => {
                    Err("the guest was handed over: in postcopy there is only the bandwidth to set".into())
                }
                Phase::HandedOver => Err(HANDED_OVER.into()),
            }),
            Request::Switchover => self.command(|progress| match progress.phase() {
                Phase::Precopy => {
                    progress.request_switchover();
                    Ok(())
                }
                Phase::HandedOver | Phase::Postcopy => Err(HANDED_OVER.into()),
            }),
            Request::Continue => self.command(|progress| match progress.report().status {
                Status::PreSwitchover => {
                    progress.go_on();
                    Ok(())
                }
                _ => Err("the migration does not wait before its switchover".into()),
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
                progress.cancel();
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
            Some(_) if state.in_postcopy() => Ok(()),
            Some(progress) if state.migrating && progress.can_postcopy() => {
                progress.request_postcopy();
                Ok(())
            }
            Some(_) if state.migrating => Err(
                "not now: the migration has not begun to move pages, or its destination cannot run a guest before they are there"
                    .into(),
            ),
            _ => Err("no migration is under way".into()),
        }
    }

    fn recover(&self, uri: &str) -> Result<(), String> {
        let uri = uri.parse().map_err(|e| explain(&e))?;
        let state = self.state();
        match &state.progress {
            Some(progress) if state.in_postcopy() => {
                progress.recover(uri);
                Ok(())
            }
            _ => Err("no migration is in postcopy".into()),
        }
    }

    fn cancel(&self) -> Result<(), String> {
        let state = self.state();
        match &state.progress {
            Some(progress) if state.migrating || state.run == RunState::Incoming => match progress.cancel() {
                true => Ok(()),
                false => Err(
                    "the guest may run at the destination already: a migration in postcopy cannot be cancelled"
                        .into(),
                ),
            },
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
        let backend = self.shared.machine.backend(false);
        let plan = plan(&backend, Duration::from_secs(seconds), link, downtime_limit_ms);
        self.state().planning = false;
        serde_json::to_value(plan.map_err(|e| explain(&e))?).map_err(|e| e.to_string())
    }

    fn migrate(&self, request: &MigrateRequest) -> Result<(), String> {
        let uri: Uri = request.uri.parse().map_err(|e| explain(&e))?;
        let codec = request.codec.parse().map_err(|e| format!("codec: {e}"))?;
        if !(1..=256).contains(&request.streams) || !(1..=3600).contains(&request.link_timeout_s) {
            return Err("streams are 1 to 256, link_timeout_s is 1 to 3600".into());
        }
        if request.reconnect_timeout_s > 86400 {
            return Err("reconnect_timeout_s is at most 86400".into());
        }
        let options = Options {
            streams: request.streams,
            codec,
            postcopy_after_rounds: request.postcopy_after_rounds,
            timeout: Duration::from_secs(request.link_timeout_s),
            reconnect_timeout: Duration::from_secs(request.reconnect_timeout_s),
            rdma: RdmaOptions {
                pin_all: request.rdma_pin_all,
                pinned_max: request.rdma_max_pinned.unwrap_or(u64::MAX),
            },
            ..Options::default()
        };
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
        let progress = Progress::new(request.tuning.tuning());
        state.progress = Some(progress.clone());
        (state.migrating, state.not_started, state.panicked) = (true, false, None);
        let server = self.clone();
        let backend = self.shared.machine.backend(paused);
        std::thread::Builder::new()
            .name("migration".into())
            .spawn(move || {
                let result = catch_unwind(AssertUnwindSafe(|| migrate(&backend, &uri, &options, &progress)));
                match result {
                    Ok(result) => server.migrated(result.map(drop)),
                    Err(_) => server.migration_panicked(paused),
                }
                sys::give_free_memory_back();
            })
            .map(drop)
            .map_err(|e| {
                state.migrating = false;
                format!("cannot start a thread: {e}")
            })
    }

    /// The migration has ended.
    fn migrated(&self, result: Result<(), Failure>) {
        let mut state = self.state();
        state.migrating = false;
        state.not_started = result.as_ref().is_err_and(is_not_started);
        match result.map_err(|failure| failure.fate) {
            Ok(()) => state.run = RunState::Migrated,
            // Older than what ran at the destination: only by force.
            Err(Fate::Lost) => state.run = RunState::Migrated,
            Err(Fate::Unknown) => state.run = RunState::Unknown,
            Err(Fate::Stuck) => state.run = RunState::Paused,
            Err(Fate::RunsOn | Fate::StaysPaused | Fate::Unmoved) => {}
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// It ended without telling how. Before GO the guest is this side's, whatever became of the rest.
    fn migration_panicked(&self, paused: bool) {
        let mut state = self.state();
        if state.phase() == Some(Phase::Precopy) {
            let runs = !paused && self.shared.machine.guest.resume().is_ok();
            state.run = if runs { RunState::Running } else { RunState::Paused };
        } else {
            state.run = RunState::Unknown;
        }
        state.panicked = Some(PANICKED.into());
        state.migrating = false;
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

    /// The thread that takes a guest in has panicked. A guest that has all its pages runs on.
    pub(super) fn incoming_panicked(&self) {
        let (waits, misses) = {
            let state = self.state();
            (state.run == RunState::Incoming, state.may_lose_guest())
        };
        if waits || misses {
            self.not_arrived(PANICKED.into());
        }
        if misses {
            // Its vCPUs may wait for pages that nobody brings in any more; this may wait for them as long as they do.
            let _ = self.shared.machine.guest.stop_for_good(&|| Ok(()));
        }
    }

    /// Ends the process, after whatever migration is under way was cancelled or, in postcopy, has ended. By `force` at once.
    pub(super) fn quit(&self, force: bool) {
        let state = self.state();
        let loses = state.in_postcopy() || state.may_lose_guest();
        if force && loses {
            drop(state);
            self.end_at_once();
            return;
        }
        if let Some(progress) = &state.progress {
            progress.cancel();
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
            self.quit(false);
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
