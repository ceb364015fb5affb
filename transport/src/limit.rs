//! How long something may take, in steps between which whoever waits may give up.

use std::io;
use std::time::{Duration, Instant};

/// Longest time between two looks at whether to go on.
pub(crate) const STEP: Duration = Duration::from_millis(50);

/// What ends a wait that was cancelled.
#[derive(Debug, thiserror::Error)]
#[error("cancelled")]
struct Cancelled;

/// The error of a wait that was cancelled.
pub(crate) fn cancelled() -> io::Error {
    io::Error::other(Cancelled)
}

/// Whether an error is [`cancelled`].
pub(crate) fn is_cancelled(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Cancelled>())
}

/// How long something may take, and whether it still may.
#[derive(Clone, Copy)]
pub(crate) struct Limit<'a> {
    deadline: Instant,
    cancelled: &'a dyn Fn() -> bool,
}

impl<'a> Limit<'a> {
    pub(crate) fn new(timeout: Duration, cancelled: &'a dyn Fn() -> bool) -> Self {
        Self { deadline: Instant::now() + timeout, cancelled }
    }

    /// A share of what is left, for one of so many.
    pub(crate) fn share(self, of: usize) -> Self {
        let left = self.deadline.saturating_duration_since(Instant::now());
        Self { deadline: Instant::now() + left / of.max(1) as u32, ..self }
    }

    /// How long the next step may wait.
    ///
    /// # Errors
    /// When nothing may be waited for any more.
    pub(crate) fn step(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if (self.cancelled)() {
            Err(cancelled())
        } else if left.is_zero() {
            Err(io::ErrorKind::TimedOut.into())
        } else {
            Ok(left.min(STEP))
        }
    }
}
