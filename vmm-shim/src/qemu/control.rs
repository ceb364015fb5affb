//! Who lets QEMU's guest run and stand still: the engine that pauses it, looks at its page table, and a throttle that takes time from it.
//!
//! All of them say `stop` and `cont` to one guest. A lock is held while they do, and who pauses it goes before who looks, who before
//! the throttle.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagecopy::backend::BackendError;
use serde_json::Value;

use super::Qmp;

/// A stop and the run after it, for a throttled guest. QEMU takes about a millisecond for both commands.
const PERIOD: Duration = Duration::from_millis(50);

/// A guest that several command.
#[derive(Debug)]
pub(super) struct Control {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    qmp: Arc<Qmp>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The engine has paused it.
    paused: bool,
    /// Somebody looks at its page table.
    looked_at: bool,
    /// It ran before that, and goes on after it.
    ran: bool,
    /// The throttle has stopped it.
    braked: bool,
    /// The part of its time that is taken, and whether a thread does so.
    percent: u8,
    works: bool,
    /// What kept the throttle from its work.
    failed: Option<BackendError>,
}

impl State {
    fn is_held(&self) -> bool {
        self.paused || self.looked_at
    }
}

/// What QEMU's guest does: `running`, `paused`, `inmigrate`, `postmigrate` and others (RunState in QEMU's reference of QMP).
pub(super) fn status_of(qmp: &Qmp) -> Result<String, BackendError> {
    let status = qmp.execute("query-status", &Value::Null)?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}

fn say(qmp: &Qmp, command: &str) -> Result<(), BackendError> {
    qmp.execute(command, &Value::Null).map(drop)
}

impl Control {
    pub(super) fn new(qmp: Arc<Qmp>) -> Self {
        Self { shared: Arc::new(Shared { qmp, state: Mutex::default(), changed: Condvar::new() }) }
    }

    /// Stops the guest until it is let [`run`](Self::run).
    pub(super) fn pause(&self) -> Result<(), BackendError> {
        let mut state = self.shared.lock();
        say(&self.shared.qmp, "stop")?;
        (state.paused, state.braked) = (true, false);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Lets it run.
    pub(super) fn run(&self) -> Result<(), BackendError> {
        let mut state = self.shared.lock();
        say(&self.shared.qmp, "cont")?;
        (state.paused, state.braked) = (false, false);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Stops it for a look.
    pub(super) fn stop_to_look(&self) -> Result<(), BackendError> {
        let mut state = self.shared.lock();
        let runs = status_of(&self.shared.qmp)? == "running";
        if runs {
            say(&self.shared.qmp, "stop")?;
        }
        state.ran = runs || state.braked;
        (state.looked_at, state.braked) = (true, false);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Lets it go on after a look, if it ran before.
    pub(super) fn go_on(&self) -> Result<(), BackendError> {
        let mut state = self.shared.lock();
        state.looked_at = false;
        if std::mem::take(&mut state.ran) && !state.paused {
            say(&self.shared.qmp, "cont")?;
        }
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Takes so many percent of its time from it.
    pub(super) fn throttle(&self, percent: u8) -> Result<(), BackendError> {
        let mut state = self.shared.lock();
        if let Some(failed) = state.failed.take() {
            return Err(failed);
        }
        state.percent = percent;
        if percent == 0 && std::mem::take(&mut state.braked) {
            say(&self.shared.qmp, "cont")?;
        }
        if percent != 0 && !state.works {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("throttle".into());
            thread
                .spawn(move || shared.brake())
                .map_err(|e| BackendError::new("start a thread that throttles QEMU's guest", e))?;
            state.works = true;
        }
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // A QEMU that is gone runs no guest.
        let _ = self.throttle(0);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for so long, or until somebody else commands the guest.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        let goes_on = |state: &mut State| state.percent != 0 && !state.is_held();
        self.changed.wait_timeout_while(state, time, goes_on).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Stops the guest and lets it run in turn, until nothing is taken from it any more.
    fn brake(&self) {
        let mut state = self.lock();
        while state.percent != 0 {
            if state.is_held() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let stopped = PERIOD * u32::from(state.percent) / 100;
            if let Err(e) = say(&self.qmp, "stop") {
                state.failed = Some(e);
                break;
            }
            state.braked = true;
            state = self.wait(state, stopped);
            // Whoever holds the guest now has taken it over as it is.
            if std::mem::take(&mut state.braked)
                && let Err(e) = say(&self.qmp, "cont")
            {
                state.failed = Some(e);
                break;
            }
            state = self.wait(state, PERIOD.saturating_sub(stopped));
        }
        state.works = false;
    }
}
