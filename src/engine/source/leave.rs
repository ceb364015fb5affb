//! Whether a migration may go on. Everybody who waits before GO asks, at least every [`TICK`](super::watch::TICK).

use super::Cause;
use crate::engine::progress::Progress;

/// Asks whether a migration may go on.
#[derive(Clone, Debug)]
pub(super) struct Leave {
    progress: Progress,
}

impl Leave {
    pub(super) fn new(progress: &Progress) -> Self {
        Self { progress: progress.clone() }
    }

    /// Fails when the migration is to end.
    pub(super) fn check(&self) -> Result<(), Cause> {
        if self.progress.is_cancelled() { Err(Cause::Cancelled) } else { Ok(()) }
    }

    /// Whether the migration is to end: for whatever blocks.
    pub(super) fn is_over(&self) -> bool {
        self.check().is_err()
    }
}
