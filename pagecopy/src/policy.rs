//! The precopy policy: after each dirty sync, whether to go on, to switch over, or to give up.
//!
//! A pure state machine: times and counters come in, a decision goes out. What it predicts, it predicts like with like:
//! *logical* bytes that remain against the *logical* rate that was acknowledged, because a compressed or delta round
//! moves more logical bytes than wire bytes, and comparing the one with the other never finishes or finishes wrongly.
//! Only acknowledged bytes count; what lies in buffers has not arrived.
//!
//! ```text
//! first pass ──on_sync──▶ round 2 ──on_sync──▶ ... ──▶ SwitchOver   predicted downtime within the limit
//!                                                  ├─▶ SwitchOver   forced, out of time, or out of rounds and at a local minimum
//!                                                  ├─▶ Postcopy     asked for, or out of time
//!                                                  └─▶ GiveUp       out of time, or forced to stop at too long a downtime
//! ```
//!
//! What cannot wait for the end of a round, which may take minutes, is asked for by [`Precopy::interrupt`].

use std::collections::VecDeque;

/// Rates are taken over at least this much time where the rounds after the first pass give it, in microseconds.
const RATE_WINDOW_US: u64 = 200_000;
/// Most syncs that are remembered for rates.
const HISTORY_MAX: usize = 32;
/// Rounds whose smallest remainder counts as a local minimum.
const MINIMUM_ROUNDS: usize = 8;
/// Rounds after the last allowed one in which a local minimum is waited for.
const GRACE_ROUNDS: u32 = 8;
/// A remainder is a new low when it is below this many percent of the lowest before: less is noise, for what a guest writes in a
/// round varies by that much.
const LOW_PERCENT: u64 = 75;
/// A guest has stalled when there was no new low for at least this long, in microseconds, however short the rounds are.
const STALL_US: u64 = 1_000_000;

/// What becomes of a migration that is out of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It ends; the guest runs on at the source.
    #[default]
    Cancel,
    /// It switches over, however long that takes.
    SwitchOver,
    /// It goes on as postcopy.
    Postcopy,
}

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest downtime at which the policy switches over by itself, in milliseconds.
    pub downtime_ms: u64,
    /// Rounds after which it switches over at the next local minimum, whatever the downtime. `None`: no limit.
    pub max_rounds: Option<u32>,
    /// Longest downtime at which running out of rounds still switches over, in milliseconds; beyond it the migration is given up.
    /// `None`: no limit.
    pub last_resort_downtime_ms: Option<u64>,
    /// Longest time from the migration's request to the end of precopy, in milliseconds. `None`: no limit.
    pub total_ms: Option<u64>,
    /// What becomes of it then.
    pub on_timeout: OnTimeout,
    /// Rounds without progress after which [`Precopy::stalled`] says so.
    pub stall_rounds: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime_ms: 300,
            max_rounds: None,
            last_resort_downtime_ms: None,
            total_ms: None,
            on_timeout: OnTimeout::Cancel,
            stall_rounds: 5,
        }
    }
}

/// What is known right after a dirty sync. Totals count from the start of the migration and never go down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Logical bytes yet to arrive: dirty pages, and pages that were sent and are not acknowledged.
    pub remaining_logical_bytes: u64,
    /// Pages that the guest wrote since the sync before (since the start of logging, at the first).
    pub dirtied_pages: u64,
    /// Logical bytes that the destination acknowledged.
    pub acked_logical_bytes: u64,
    /// Wire bytes that the destination acknowledged.
    pub acked_wire_bytes: u64,
    /// How long saving, moving and loading the state of the devices is expected to take, and whatever else a switchover takes besides
    /// sending what is left, in microseconds.
    pub state_time_us: u64,
    /// How much of the time so far went by with nothing to send, for receipts were on their way: what is sent next takes no such time.
    pub waited_us: u64,
}

/// Why the policy switches over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwitchReason {
    /// The predicted downtime is within the limit.
    WithinLimit,
    /// The user asked for it.
    Forced,
    /// No more rounds are allowed, and there is no better moment in sight.
    OutOfRounds,
    /// No more time is allowed.
    OutOfTime,
}

/// Why the policy gives up. The guest runs on at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GiveUpReason {
    /// Precopy took longer than allowed.
    #[error(
        "precopy has run for {:.1} s of the {} s allowed; allow more time, a longer downtime, or throttle the guest",
        *elapsed_us as f64 / 1e6, *limit_us as f64 / 1e6
    )]
    OutOfTime {
        /// How long it ran, in microseconds.
        elapsed_us: u64,
        /// What was allowed, in microseconds.
        limit_us: u64,
    },
    /// Out of rounds, with a downtime ahead that is longer than even the last resort allows.
    #[error(
        "after {rounds} rounds switching over would still stop the guest for {} ms of the {} ms allowed; allow a longer downtime, or throttle the guest",
        predicted_us.div_ceil(1000), limit_us / 1000
    )]
    DowntimeTooLong {
        /// Rounds so far.
        rounds: u32,
        /// The predicted downtime, in microseconds.
        predicted_us: u64,
        /// What was allowed, in microseconds.
        limit_us: u64,
    },
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send what is dirty, with the guest running, and sync again.
    NextRound,
    /// Stop the guest and send the rest.
    SwitchOver {
        /// How long the guest is expected to stand still, in microseconds; `u64::MAX` when it cannot be told.
        predicted_downtime_us: u64,
        /// Why now.
        reason: SwitchReason,
    },
    /// Stop the guest, send its state, and let it run at the destination while the rest follows.
    Postcopy,
    /// End the migration.
    GiveUp {
        /// Why.
        reason: GiveUpReason,
    },
}

/// What there was before precopy began, or began again after connections were lost: limits count from the migration's request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Earlier {
    /// When the migration was asked for.
    pub requested_us: u64,
    /// Rounds that were complete.
    pub rounds: u32,
    /// Logical bytes that the destination had acknowledged.
    pub acked_logical_bytes: u64,
    /// Wire bytes that the destination had acknowledged.
    pub acked_wire_bytes: u64,
}

/// One remembered sync.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at_us: u64,
    sample: Sample,
    /// Pages that all syncs up to this one found dirty.
    dirtied_total: u64,
}

/// Amounts over a time, as a rate that is kept exact until it is asked for.
#[derive(Clone, Copy, Debug)]
struct Rate {
    amount: u64,
    us: u64,
}

impl Rate {
    fn per_s(self) -> u64 {
        to_u64(u128::from(self.amount) * 1_000_000 / u128::from(self.us))
    }

    /// Microseconds that `amount` takes at this rate, rounded up; `u64::MAX` at a rate of 0.
    fn us_for(self, amount: u64) -> u64 {
        match (amount, self.amount) {
            (0, _) => 0,
            (_, 0) => u64::MAX,
            (amount, done) => to_u64((u128::from(amount) * u128::from(self.us)).div_ceil(u128::from(done))),
        }
    }
}

fn to_u64(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// The policy of one migration's precopy phase.
#[derive(Clone, Debug)]
pub struct Precopy {
    limits: Limits,
    started_us: u64,
    requested_us: u64,
    /// Rounds that were complete before the start.
    rounds_before: u32,
    /// Syncs so far: rounds that are complete.
    rounds: u32,
    forced: bool,
    postcopy: bool,
    /// The last syncs, oldest first; the start of the first pass is in front until rounds after it give a rate.
    history: VecDeque<Mark>,
    /// The last remainder that was a new low, the rounds since, and when it was.
    least_remaining: u64,
    rounds_since_least: u32,
    least_at_us: u64,
    expected_downtime_us: u64,
    state_time_us: u64,
}

impl Precopy {
    /// Starts the first pass at `now_us`, with nothing acknowledged yet.
    pub fn new(limits: Limits, now_us: u64) -> Self {
        Self {
            limits,
            started_us: now_us,
            requested_us: now_us,
            rounds_before: 0,
            rounds: 0,
            forced: false,
            postcopy: false,
            history: VecDeque::from([Mark { at_us: now_us, sample: Sample::default(), dirtied_total: 0 }]),
            least_remaining: u64::MAX,
            rounds_since_least: 0,
            least_at_us: now_us,
            expected_downtime_us: u64::MAX,
            state_time_us: 0,
        }
    }

    /// Takes into account what was before; nothing, where this is not called. Before the first sync.
    #[must_use]
    pub fn after(mut self, earlier: Earlier) -> Self {
        (self.requested_us, self.rounds_before) = (earlier.requested_us, earlier.rounds);
        if let Some(start) = self.history.front_mut() {
            start.sample.acked_logical_bytes = earlier.acked_logical_bytes;
            start.sample.acked_wire_bytes = earlier.acked_wire_bytes;
        }
        self
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Changes the limits; they apply from the next sync on, that of time at once.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Asks to switch over, whatever the downtime. The first pass is completed all the same.
    pub fn force_switchover(&mut self) {
        self.forced = true;
    }

    /// Asks to go on as postcopy, wherever precopy is.
    pub fn start_postcopy(&mut self) {
        self.postcopy = true;
    }

    /// Whether there is something to decide at once, in the middle of a round. Asks for the remaining logical bytes, as in
    /// [`Sample`], only if there is.
    pub fn interrupt(&mut self, now_us: u64, remaining: impl FnOnce() -> u64) -> Option<Decision> {
        if self.postcopy {
            return Some(Decision::Postcopy);
        }
        let reason = if self.forced && self.rounds >= 1 {
            SwitchReason::Forced
        } else {
            match (self.out_of_time(now_us)?, self.limits.on_timeout) {
                (_, OnTimeout::SwitchOver) => SwitchReason::OutOfTime,
                (_, OnTimeout::Postcopy) => return Some(Decision::Postcopy),
                (reason, OnTimeout::Cancel) => return Some(Decision::GiveUp { reason }),
            }
        };
        self.expected_downtime_us = self.predict(remaining());
        Some(Decision::SwitchOver { predicted_downtime_us: self.expected_downtime_us, reason })
    }

    fn out_of_time(&self, now_us: u64) -> Option<GiveUpReason> {
        let limit_us = self.limits.total_ms?.saturating_mul(1000);
        let elapsed_us = now_us.saturating_sub(self.requested_us);
        (elapsed_us > limit_us).then_some(GiveUpReason::OutOfTime { elapsed_us, limit_us })
    }

    /// The downtime of a switchover with so much left to send, in microseconds.
    fn predict(&self, remaining_logical_bytes: u64) -> u64 {
        let transfer_us = self.busy_rate().us_for(remaining_logical_bytes);
        transfer_us.saturating_add(self.state_time_us)
    }

    /// Decides before a sync that takes long, by what it is expected to find: whether to switch over in its place. Only after two others,
    /// which gave the rates.
    pub fn foresee(&mut self, remaining_logical_bytes: u64) -> Option<Decision> {
        let predicted_downtime_us = self.predict(remaining_logical_bytes);
        if self.rounds < 2 || predicted_downtime_us > self.limits.downtime_ms.saturating_mul(1000) {
            return None;
        }
        self.expected_downtime_us = predicted_downtime_us;
        Some(Decision::SwitchOver { predicted_downtime_us, reason: SwitchReason::WithinLimit })
    }

    /// Takes in a dirty sync that ends a round (the first one ends the first pass), and decides.
    pub fn on_sync(&mut self, now_us: u64, sample: Sample) -> Decision {
        self.rounds = self.rounds.saturating_add(1);
        if self.rounds == 3 {
            // From here on rounds after the first pass give the rate: the first pass held zeros and holes, which are quick.
            self.history.pop_front();
        }
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        // A clock that goes back counts as one that stands.
        let (at_us, dirtied_before) =
            self.history.back().map_or((now_us, 0), |last| (now_us.max(last.at_us), last.dirtied_total));
        let dirtied_total = dirtied_before.saturating_add(sample.dirtied_pages);
        self.history.push_back(Mark { at_us, sample, dirtied_total });
        let remaining = sample.remaining_logical_bytes;
        if remaining < self.least_remaining / 100 * LOW_PERCENT {
            (self.least_remaining, self.rounds_since_least, self.least_at_us) = (remaining, 0, at_us);
        } else {
            self.rounds_since_least = self.rounds_since_least.saturating_add(1);
        }
        self.state_time_us = sample.state_time_us;
        self.expected_downtime_us = self.predict(remaining);
        self.decide(remaining, at_us)
    }

    fn decide(&mut self, remaining: u64, now_us: u64) -> Decision {
        let predicted = self.expected_downtime_us;
        let switch = |reason| Decision::SwitchOver { predicted_downtime_us: predicted, reason };
        if self.forced && !self.postcopy {
            return switch(SwitchReason::Forced);
        }
        // After the first pass alone the rate is that of zeros and holes too, unless there is nothing to predict.
        let may_predict = self.rounds >= 2 || remaining == 0;
        if may_predict && predicted <= self.limits.downtime_ms.saturating_mul(1000) {
            return switch(SwitchReason::WithinLimit);
        }
        if let Some(decision) = self.interrupt(now_us, || remaining) {
            return decision;
        }
        let Some(last_round) = self.limits.max_rounds.map(|rounds| rounds.max(2)) else {
            return Decision::NextRound;
        };
        let rounds = self.rounds.saturating_add(self.rounds_before);
        if rounds < last_round {
            return Decision::NextRound;
        }
        let out_of_grace = rounds >= last_round.saturating_add(GRACE_ROUNDS);
        if !out_of_grace && !self.at_local_minimum(remaining) {
            return Decision::NextRound;
        }
        match self.limits.last_resort_downtime_ms.map(|ms| ms.saturating_mul(1000)) {
            Some(limit_us) if predicted > limit_us => {
                if out_of_grace {
                    let reason = GiveUpReason::DowntimeTooLong { rounds, predicted_us: predicted, limit_us };
                    Decision::GiveUp { reason }
                } else {
                    Decision::NextRound
                }
            }
            _ => switch(SwitchReason::OutOfRounds),
        }
    }

    fn at_local_minimum(&self, remaining: u64) -> bool {
        let recent = self.history.iter().skip(usize::from(self.rounds <= 2)).rev().take(MINIMUM_ROUNDS);
        recent.map(|mark| mark.sample.remaining_logical_bytes).min().is_none_or(|least| remaining <= least)
    }

    /// Growth of a total over the last rounds: back to the youngest sync that is [`RATE_WINDOW_US`] away, or else the oldest.
    fn rate(&self, total: impl Fn(&Mark) -> u64) -> Rate {
        let mut back = self.history.iter().rev();
        let Some(last) = back.next() else { return Rate { amount: 0, us: 1 } };
        let far = |mark: &&Mark| last.at_us - mark.at_us >= RATE_WINDOW_US;
        let Some(before) = back.find(far).or(self.history.front()) else { return Rate { amount: 0, us: 1 } };
        Rate { amount: total(last).saturating_sub(total(before)), us: (last.at_us - before.at_us).max(1) }
    }

    /// Growth of the acknowledged logical bytes, as [`rate`](Self::rate), without the time that went by waiting for receipts.
    fn busy_rate(&self) -> Rate {
        let rate = self.rate(|mark| mark.sample.acked_logical_bytes);
        let waited_us = self.rate(|mark| mark.sample.waited_us).amount;
        Rate { us: rate.us.saturating_sub(waited_us).max(1), ..rate }
    }

    /// Complete rounds, the first pass included.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// The downtime of switching over at the last sync, in microseconds; `u64::MAX` while it cannot be told.
    pub fn expected_downtime_us(&self) -> u64 {
        self.expected_downtime_us
    }

    /// Pages that the guest wrote per second over the last rounds.
    pub fn dirty_pages_per_s(&self) -> u64 {
        self.rate(|mark| mark.dirtied_total).per_s()
    }

    /// Logical bytes per second that were acknowledged over the last rounds.
    pub fn logical_bytes_per_s(&self) -> u64 {
        self.rate(|mark| mark.sample.acked_logical_bytes).per_s()
    }

    /// Logical bytes per second that were acknowledged over the last rounds, of the time in which there was something to send.
    pub fn busy_bytes_per_s(&self) -> u64 {
        self.busy_rate().per_s()
    }

    /// Wire bytes per second that were acknowledged over the last rounds.
    pub fn wire_bytes_per_s(&self) -> u64 {
        self.rate(|mark| mark.sample.acked_wire_bytes).per_s()
    }

    /// Whether the remainder reached no new low for [`Limits::stall_rounds`] rounds, and for a second at least: the guest writes as
    /// fast as it is copied.
    pub fn stalled(&self) -> bool {
        let since_us = self.history.back().map_or(0, |last| last.at_us.saturating_sub(self.least_at_us));
        self.rounds_since_least >= self.limits.stall_rounds.max(1) && since_us >= STALL_US
    }

    /// What was dirtied in the last round, and how long that took in microseconds; [`Self::dirty_pages_per_s`] may look further back.
    pub fn last_round(&self) -> (u64, u64) {
        let mut back = self.history.iter().rev();
        match (back.next(), back.next()) {
            (Some(last), Some(before)) => (last.sample.dirtied_pages, (last.at_us - before.at_us).max(1)),
            (Some(last), None) => {
                (last.sample.dirtied_pages, last.at_us.saturating_sub(self.started_us).max(1))
            }
            _ => (0, 1),
        }
    }
}

#[cfg(test)]
mod tests;
