//! Whether a migration may go on. Everybody who waits before GO asks, at least every [`TICK`](super::watch::TICK).
//!
//! Its time is one, from the request to the handover. While pages move, running out of it is the policy's business, which may switch
//! over; everywhere else nothing can be done but to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use pagecopy::policy::OnTimeout;

use super::Cause;
use crate::clock;
use crate::engine::progress::Progress;
use crate::engine::usage::short_of_memory;

/// What a migration does, as far as its time is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Doing {
    Connecting,
    OpeningStreams,
    MovingPages,
    SwitchingOver,
    Reconnecting,
}

impl Doing {
    const ALL: [Self; 5] =
        [Self::Connecting, Self::OpeningStreams, Self::MovingPages, Self::SwitchingOver, Self::Reconnecting];

    fn text(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::OpeningStreams => "opening data streams",
            Self::MovingPages => "moving pages",
            Self::SwitchingOver => "switching over",
            Self::Reconnecting => "making lost connections anew",
        }
    }
}

/// Asks whether a migration may go on. Clones are of the same migration.
#[derive(Clone, Debug)]
pub(crate) struct Leave {
    progress: Progress,
    /// By the clock.
    requested: Duration,
    doing: Arc<AtomicU8>,
}

impl Leave {
    /// For a migration that was asked for at `requested` and is about to connect.
    pub(crate) fn new(progress: &Progress, requested: Duration) -> Self {
        Self {
            progress: progress.clone(),
            requested,
            doing: Arc::new(AtomicU8::new(Doing::Connecting as u8)),
        }
    }

    /// When the migration was asked for, by the clock.
    pub(super) fn requested(&self) -> Duration {
        self.requested
    }

    /// Takes note of what is done from here on.
    pub(super) fn begin(&self, doing: Doing) {
        self.doing.store(doing as u8, Ordering::Relaxed);
    }

    /// Fails when the migration is to end.
    pub(super) fn check(&self) -> Result<(), Cause> {
        self.check_while(Doing::ALL[usize::from(self.doing.load(Ordering::Relaxed))])
    }

    /// The same, as if that were done.
    pub(super) fn check_while(&self, doing: Doing) -> Result<(), Cause> {
        if self.progress.is_cancelled() {
            return Err(Cause::Cancelled);
        }
        short_of_memory()?;
        let limits = self.progress.tuning().limits;
        let ends = match doing {
            Doing::MovingPages => false,
            // It may be what was to be done.
            Doing::SwitchingOver => limits.on_timeout == OnTimeout::Cancel,
            Doing::Connecting | Doing::OpeningStreams | Doing::Reconnecting => true,
        };
        let (Some(limit), elapsed) =
            (limits.total_ms.map(Duration::from_millis), clock::now() - self.requested)
        else {
            return Ok(());
        };
        if !ends || elapsed <= limit {
            return Ok(());
        }
        Err(Cause::OutOfTime {
            doing: doing.text(),
            elapsed_s: elapsed.as_secs_f64(),
            limit_s: limit.as_secs_f64(),
        })
    }

    /// Whether the migration is to end: for whatever blocks.
    pub(super) fn is_over(&self) -> bool {
        self.check().is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::virtual_time;
    use crate::engine::tuning::Tuning;

    #[test]
    fn time_ends_what_cannot_be_hurried() {
        virtual_time::set(Some(60_000_000_000));
        for (on_timeout, ended) in [
            (OnTimeout::Cancel, [true, true, false, true, true]),
            (OnTimeout::SwitchOver, [true, true, false, false, true]),
            (OnTimeout::Postcopy, [true, true, false, false, true]),
        ] {
            let progress = Progress::new(Tuning::default());
            let leave = Leave::new(&progress, clock::now() - Duration::from_millis(30_250));
            for (doing, ended) in Doing::ALL.into_iter().zip(ended) {
                leave.begin(doing);
                for (seconds, ends) in [(0, false), (31, false), (30, ended)] {
                    progress
                        .tune(|tuning| {
                            tuning.limits.on_timeout = on_timeout;
                            tuning.limits.total_ms = Some(seconds * 1000).filter(|&ms| ms != 0);
                        })
                        .unwrap();
                    let result = leave.check();
                    assert_eq!(result.is_err(), ends, "{on_timeout:?} {doing:?} {seconds}");
                    assert_eq!(leave.is_over(), ends);
                    if let Err(cause) = result {
                        let text = cause.to_string();
                        let end =
                            format!(" s of the 30 s allowed and is still {}; allow more time", doing.text());
                        let start = "the migration has run for 30.";
                        assert!(text.starts_with(start) && text.contains(&end), "{text}");
                    }
                }
            }
        }
        let progress = Progress::default();
        let leave = Leave::new(&progress, clock::now());
        progress.cancel().unwrap();
        assert!(matches!(leave.check(), Err(Cause::Cancelled)));
        virtual_time::set(None);
    }
}
