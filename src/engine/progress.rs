//! A migration as others see it while it runs: its report so far, and requests to it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::report::Report;

/// Shared by the thread that migrates and those that watch or command it.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    report: Mutex<Report>,
    cancel: AtomicBool,
}

impl Progress {
    /// The report so far.
    pub fn report(&self) -> Report {
        self.lock().clone().rounded()
    }

    /// Asks the migration to stop; it does so unless GO was said.
    pub fn cancel(&self) {
        self.shared.cancel.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancel.load(Ordering::Relaxed)
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Report> {
        self.shared.report.lock().unwrap_or_else(|e| e.into_inner())
    }
}
