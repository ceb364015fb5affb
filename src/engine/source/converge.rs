//! Precopy: rounds, until what remains fits into the downtime limit, and all that may change their course meanwhile.

use std::sync::atomic::Ordering;
use std::time::Instant;

use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::policy::{Decision, Precopy, Sample, SwitchReason};
use transport::source::{Feeder, PageSource};

use super::watch::Watch;
use super::{Attempt, Cause, STATE_TIME_GUESS};
use crate::engine::progress::Progress;

/// How precopy ended, where it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The guest is to be stopped, and the rest sent.
    SwitchOver,
    /// It is to be stopped, and to run at the destination while the rest is sent.
    Postcopy,
}

/// Why a round ended before everything was sent.
enum Stop {
    Failed(Cause),
    Decided(Decision),
}

impl From<Cause> for Stop {
    fn from(cause: Cause) -> Self {
        Self::Failed(cause)
    }
}

/// What the rounds of one migration have come to.
struct Course<'a> {
    policy: Precopy,
    progress: &'a Progress,
    source: &'a PageSource,
    began: Instant,
    /// The changes of limits that are in force.
    tuned: u64,
}

impl<'a> Course<'a> {
    fn new(progress: &'a Progress, source: &'a PageSource, began: Instant) -> Self {
        let policy = Precopy::new(progress.tuning().limits, micros(began));
        let mut course = Self { policy, progress, source, began, tuned: u64::MAX };
        course.tune();
        course
    }

    /// Keeps to the limits as they are now.
    fn tune(&mut self) {
        if let Some(tuning) = self.progress.tuned_since(&mut self.tuned) {
            self.policy.set_limits(tuning.limits);
            self.source.limit_bandwidth(tuning.bandwidth);
            self.progress.update(|r| {
                r.downtime_limit_ms = tuning.limits.downtime_ms;
                r.bandwidth_limit = tuning.bandwidth;
            });
        }
    }

    /// Looks at everything that may have happened. Called often while a round goes on.
    fn check(&mut self, watch: &mut Watch) -> Result<(), Stop> {
        watch.check()?;
        self.tune();
        if self.progress.wants_switchover() {
            self.policy.force_switchover();
        }
        if self.progress.wants_postcopy() {
            self.policy.start_postcopy();
        }
        let remaining = || self.source.remaining_bytes();
        self.policy.interrupt(micros(self.began), remaining).map_or(Ok(()), |now| Err(Stop::Decided(now)))
    }

    /// Sends what is dirty, finds what was dirtied meanwhile, and decides.
    fn round(&mut self, watch: &mut Watch, feeder: &Feeder) -> Result<Decision, Stop> {
        feeder.pass(|| self.check(watch))?;
        // Sync when the round is all but delivered: the streams still have work, and what was dirtied early is not sent
        // once more for nothing.
        let under_way = self.source.counters().logical_under_way.load(Ordering::Relaxed);
        feeder.drain_to((under_way / 4).max(CHUNK_SIZE as u64), || self.check(watch))?;
        let dirtied = self.source.dirty_sync().map_err(Cause::from)?;
        watch.end_round(dirtied);
        let counters = self.source.counters();
        let sample = Sample {
            remaining_logical_bytes: self.source.remaining_bytes(),
            dirtied_pages: dirtied,
            acked_logical_bytes: counters.logical_acked.load(Ordering::Relaxed),
            acked_wire_bytes: counters.wire_acked.load(Ordering::Relaxed),
            state_time_us: STATE_TIME_GUESS.as_micros() as u64,
        };
        let decision = self.policy.on_sync(micros(self.began), sample);
        self.report();
        Ok(decision)
    }

    /// Shows others how it goes.
    fn report(&self) {
        let policy = &self.policy;
        let expected = Some(policy.expected_downtime_us()).filter(|&us| us != u64::MAX);
        let stall = policy.stalled().then(|| self.advice());
        self.progress.update(|r| {
            r.dirty_pages_per_s = policy.dirty_pages_per_s() as f64;
            r.expected_downtime_ms = expected.map_or(0.0, |us| us as f64 / 1e3);
            r.stalled = stall;
        });
    }

    /// What would help a guest that has stalled.
    fn advice(&self) -> String {
        let policy = &self.policy;
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let dirtied = mb(policy.dirty_pages_per_s().saturating_mul(PAGE_SIZE as u64));
        let delivered = mb(policy.logical_bytes_per_s());
        let limited = match self.progress.tuning().bandwidth {
            Some(_) => "a higher --bandwidth, ",
            None => "",
        };
        format!(
            "the guest dirties {dirtied:.0} MB/s of memory and {delivered:.0} MB/s are delivered; what may help: \
             {limited}--downtime-limit {} (ms), a quieter guest, or `ctl switchover` to accept the downtime",
            policy.expected_downtime_us().div_ceil(1000).saturating_add(policy.limits().downtime_ms / 10)
        )
    }
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}

impl Attempt<'_> {
    /// Rounds, until the policy has enough of them. Returns how many there were.
    pub(super) fn precopy(&mut self, feeder: &Feeder) -> Result<(u64, Next), Cause> {
        let live = self.backend.guest.is_some();
        let (began, progress) = (self.began, self.progress);
        let postcopy_after = self.options.postcopy_after_rounds;
        let (watch, source) = self.parts();
        let source = source.clone();
        let mut course = Course::new(progress, &source, began);
        let mut rounds = 0;
        loop {
            rounds += 1;
            progress.update(|r| r.rounds = rounds);
            if postcopy_after.is_some_and(|after| rounds > after) {
                progress.request_postcopy();
            }
            let decided = if live {
                course.round(watch, feeder)
            } else {
                // Memory that nobody writes: all of it is sent in the one pass.
                feeder.settle(|| course.check(watch)).map(|()| {
                    watch.end_round(0);
                    Decision::SwitchOver { predicted_downtime_us: 0, reason: SwitchReason::WithinLimit }
                })
            };
            let decision = match decided {
                Ok(decision) | Err(Stop::Decided(decision)) => decision,
                Err(Stop::Failed(cause)) => return Err(cause),
            };
            match decision {
                Decision::NextRound => {}
                Decision::SwitchOver { predicted_downtime_us, .. } => {
                    progress.update(|r| r.expected_downtime_ms = predicted_downtime_us as f64 / 1e3);
                    return Ok((rounds, Next::SwitchOver));
                }
                Decision::Postcopy => return Ok((rounds, Next::Postcopy)),
                Decision::GiveUp { reason } => return Err(Cause::Policy(reason.to_string())),
            }
        }
    }
}
