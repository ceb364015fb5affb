//! Precopy: rounds, until what remains fits into the downtime limit, and all that may change their course meanwhile.

mod brake;
mod looks;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::source::{Feeder, PageSource, Waits};
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::policy::{Decision, Earlier, Precopy, Sample, SwitchReason};
use pagecopy::throttle::PERCENT_MAX;

use self::brake::Brake;
use self::looks::Looks;
use super::environment::Environment;
use super::watch::Watch;
use super::{Attempt, Cause, SourceBackend, state_time};
use crate::clock;
use crate::engine::progress::Progress;
use crate::engine::report::{Remedy, Stalled};
use crate::engine::tuning::Tuning;

/// Ways, of which a round trip has two, while the guest stands still: the last pages with FINISH, READY, GO.
const WAYS: u32 = 3;
/// Where the streams end before FINISH, for the session cannot be resumed: the last pages and their receipts, the streams' ends and theirs
/// besides.
const WAYS_SETTLED: u32 = 7;

/// A round takes at least this long: what was dirtied in less is not worth a sync, and where only the state takes too long,
/// rounds would follow each other for nothing.
const ROUND_MIN: Duration = Duration::from_millis(5);

/// Of a guest that is stood still for each sync, so many times that long is a round: the guest runs for the rest of it.
const PAUSED_SHARE: u32 = 20;

/// Trials of the state's time at most; the shortest counts.
const REHEARSALS_MAX: u32 = 8;
/// How long a trial may hold the guest for a vCPU that does not stop.
const REHEARSAL_LIMIT: Duration = Duration::from_millis(100);
/// What no trial shows: threads at both ends that wake up in turn, ends of streams. The rest of what 72 migrations of a guest that hardly
/// wrote took on loopback, at the median, of 5.2 ms in all.
const WAKE_UPS: Duration = Duration::from_micros(3500);

/// How precopy ended, where it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The guest is to be stopped, and the rest sent.
    SwitchOver,
    /// It is to be stopped, and to run at the destination while the rest is sent.
    Postcopy,
}

/// Whoever moves the pages of a round, as far as rounds need to know: to a peer, or into an archive.
pub(super) trait Mover<'a> {
    /// How it waits.
    type Waits: Waits + 'a;

    /// Waits by it.
    fn waits(&self) -> &'a Self::Waits;

    /// Waits for so long.
    async fn sleep(&self, time: Duration);

    /// Looks at everything that may have happened, and fails when the migration is to end.
    fn check(&mut self) -> Result<(), Cause>;

    /// A round has ended, by whose sync so many pages were found dirty.
    fn end_round(&mut self, dirtied_pages: u64);
}

impl<'a, E: Environment> Mover<'a> for Watch<'a, E> {
    type Waits = E;

    fn waits(&self) -> &'a E {
        self.env
    }

    async fn sleep(&self, time: Duration) {
        self.env.sleep(time).await;
    }

    fn check(&mut self) -> Result<(), Cause> {
        Self::check(self)
    }

    fn end_round(&mut self, dirtied_pages: u64) {
        Self::end_round(self, dirtied_pages);
    }
}

/// Why a round ended before everything was sent.
enum Stop {
    Failed(Cause),
    Decided(Decision),
    /// A limit was changed: what is decided by it is decided now.
    Sync,
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
    began: Duration,
    /// The changes of limits that are in force, and what they came to.
    tuned: u64,
    tuning: Option<Tuning>,
    /// Whether the round is to end early, to decide by other limits.
    sync_now: bool,
    brake: Option<Brake<'a>>,
    /// A round trip, as opening the streams showed it; what delayed that need not delay the handover.
    round_trip: Duration,
    /// Ways that the handover takes.
    ways: u32,
    /// How long there was nothing to send, for receipts were on their way.
    waited: Duration,
    /// Comparisons of all memory.
    looks: Looks,
    /// Trials of the state's time so far.
    rehearsals: u32,
    /// A trial left the guest paused that is to run, since then.
    left_paused: Option<Duration>,
    /// Pausing, saving and loading, without the messages of the handover and the last sync, once that was tried.
    state_time: Duration,
}

impl<'a> Course<'a> {
    fn new(
        backend: &'a SourceBackend,
        progress: &'a Progress,
        source: &'a PageSource,
        began: Duration,
        round_trip: Duration,
        ways: u32,
    ) -> Result<Self, Cause> {
        let acked = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = source.counters();
        // Those before the connections were lost count, too.
        let rounds = progress.rounds().len();
        let policy = Precopy::new(progress.tuning().limits, micros(began)).after(Earlier {
            requested_us: 0,
            rounds: rounds.try_into().unwrap_or(u32::MAX),
            acked_logical_bytes: counters.logical_sent_and_acked(),
            acked_wire_bytes: acked(&counters.wire_acked),
        });
        let brake = backend.guest.as_ref().map(|guest| Brake::new(guest, &backend.log));
        let state_time = state_time(backend);
        let mut course = Self {
            policy,
            progress,
            source,
            began,
            tuned: u64::MAX,
            tuning: None,
            sync_now: false,
            brake,
            round_trip,
            ways,
            waited: Duration::ZERO,
            looks: Looks::default(),
            rehearsals: 0,
            left_paused: None,
            state_time,
        };
        course.tune()?;
        Ok(course)
    }

    /// Keeps to the limits as they are now.
    fn tune(&mut self) -> Result<(), Cause> {
        let Some(tuning) = self.progress.tuned_since(&mut self.tuned) else { return Ok(()) };
        let before = self.tuning.replace(tuning);
        self.policy.set_limits(tuning.limits);
        self.source.limit_bandwidth(tuning.bandwidth);
        if let Some(brake) = &mut self.brake {
            brake.limit(tuning.auto_converge.then_some(tuning.throttle_max))?;
        }
        // A pass may take minutes, and only a sync says whether what is left would fit now, or how fast the guest writes.
        let decides =
            |t: Tuning| (t.limits.downtime_ms, t.limits.max_rounds, t.auto_converge, t.throttle_max);
        self.sync_now |= before.is_some_and(|before| decides(before) != decides(tuning));
        let throttle = self.throttle_percents();
        self.progress.update(|r| {
            r.downtime_limit_ms = tuning.limits.downtime_ms;
            r.bandwidth_limit = tuning.bandwidth;
            r.throttle_percent = throttle;
        });
        Ok(())
    }

    fn throttle_percents(&self) -> Vec<u8> {
        self.brake.as_ref().map(|brake| brake.throttle.percents()).unwrap_or_default()
    }

    /// Looks at everything that may have happened. Called often while a round goes on.
    fn check<'m>(&mut self, mover: &mut impl Mover<'m>) -> Result<(), Stop> {
        mover.check()?;
        self.tune()?;
        if self.progress.wants_switchover() {
            self.policy.force_switchover();
        }
        if self.progress.wants_postcopy() {
            self.policy.start_postcopy();
        }
        let remaining = || self.source.remaining_bytes();
        if let Some(now) = self.policy.interrupt(micros(self.began), remaining) {
            return Err(Stop::Decided(now));
        }
        // The first pass is what rates are measured by, and is not cut short.
        if std::mem::take(&mut self.sync_now) && self.policy.rounds() != 0 { Err(Stop::Sync) } else { Ok(()) }
    }

    /// Sends what is dirty, until it is all but delivered.
    async fn pass<'m>(&mut self, mover: &mut impl Mover<'m>, feeder: &Feeder) -> Result<(), Stop> {
        let waits = mover.waits();
        feeder.pass(waits, || self.check(mover)).await?;
        // Sync when the round is all but delivered: the streams still have work, and what was dirtied early is not sent
        // once more for nothing.
        let under_way = self.source.counters().logical_under_way.load(Ordering::Relaxed);
        let path = self.path();
        // What the path holds by itself: the streams have no work any more, and chunks with frames under way could not change streams.
        let held = self.policy.busy_bytes_per_s().saturating_mul(path.as_micros() as u64) / 1_000_000;
        let left = if under_way <= held { 0 } else { (under_way / 4).max(CHUNK_SIZE as u64) };
        let begun = clock::now();
        let drained = feeder.drain_to(waits, left, || self.check(mover)).await;
        self.waited += (clock::now() - begun).min(path);
        drained
    }

    /// A round trip of what carries data: the shortest so far.
    fn path(&self) -> Duration {
        self.source.counters().path(self.round_trip)
    }

    /// Sends what is dirty, finds what was dirtied meanwhile, and decides.
    async fn round<'m>(
        &mut self,
        mover: &mut impl Mover<'m>,
        feeder: &Feeder,
        paused: bool,
    ) -> Result<Decision, Stop> {
        let begun = clock::now();
        match self.pass(mover, feeder).await {
            Ok(()) | Err(Stop::Sync) => {}
            Err(stop) => return Err(stop),
        }
        // A host that was busy at the first try must not keep the guest from ever being handed over.
        let long = self.state_time.as_millis() as u64 > self.policy.limits().downtime_ms / 2;
        if self.rehearsals == 0 || (long && self.rehearsals < REHEARSALS_MAX) {
            self.rehearse(paused)?;
        }
        if let Some(unseen) = self.looks.unseen_bytes(clock::now())
            && let Some(switch) = self.policy.foresee(self.source.remaining_bytes() + unseen)
        {
            mover.end_round(0);
            self.report();
            return Ok(switch);
        }
        let (begun_sync, paused_before) = (clock::now(), self.source.paused());
        let mut dirtied = self.source.sync_log().map_err(Cause::from)?;
        let sync_time = clock::now() - begun_sync;
        let looked = self.looks.after_sync(self.source, self.began).map_err(Cause::from)?;
        (dirtied, self.waited) = (dirtied + looked.pages, self.waited + looked.took);
        let round_min = ROUND_MIN.max((self.source.paused() - paused_before) * PAUSED_SHARE);
        mover.end_round(dirtied);
        let counters = self.source.counters();
        let sample = Sample {
            remaining_logical_bytes: self.source.remaining_bytes()
                + self.looks.unseen_bytes(clock::now()).unwrap_or(0),
            dirtied_pages: dirtied,
            acked_logical_bytes: counters.logical_sent_and_acked(),
            acked_wire_bytes: counters.wire_acked.load(Ordering::Relaxed),
            state_time_us: (self.switch_time() + sync_time + looked.alone).as_micros() as u64,
            waited_us: self.waited.as_micros() as u64,
        };
        let decision = self.policy.on_sync(micros(self.began), sample);
        if decision == Decision::NextRound
            && let Some(brake) = &mut self.brake
        {
            let tuning = self.progress.tuning();
            let most = tuning.auto_converge.then_some(tuning.throttle_max);
            brake.on_round(&self.policy, sample.remaining_logical_bytes, most)?;
        }
        self.report();
        while decision == Decision::NextRound && clock::now() - begun < round_min {
            match self.check(mover) {
                Ok(()) => {}
                // The next one begins at once.
                Err(Stop::Sync) => break,
                Err(stop) => return Err(stop),
            }
            let left = round_min.saturating_sub(clock::now() - begun);
            mover.sleep(left.min(Duration::from_millis(1))).await;
            self.waited += left.min(Duration::from_millis(1));
        }
        Ok(decision)
    }

    /// Tries how long the state takes, at a moment when the streams still have work.
    fn rehearse(&mut self, paused: bool) -> Result<(), Cause> {
        let Some(brake) = &self.brake else { return Ok(()) };
        let Some(rehearsal) = brake.guest.rehearsal() else {
            self.rehearsals = REHEARSALS_MAX;
            return Ok(());
        };
        let begun = clock::now();
        match rehearsal.rehearse(REHEARSAL_LIMIT) {
            Ok(tried) => {
                // The destination loads what the source saves, and lets the guest run where the source paused it.
                let time = tried * 2 + WAKE_UPS;
                self.state_time = if self.rehearsals == 0 { time } else { self.state_time.min(time) };
                self.rehearsals += 1;
                self.progress.update(|r| r.rehearsed_ms += tried.as_secs_f64() * 1e3);
            }
            // What is estimated is then guessed, which is no reason to fail. Only a guest that stays paused is one.
            Err(_) => {
                self.rehearsals = REHEARSALS_MAX;
                if !paused {
                    brake.guest.resume().inspect_err(|_| self.left_paused = Some(begun))?;
                }
                self.progress.update(|r| r.rehearsed_ms += (clock::now() - begun).as_secs_f64() * 1e3);
            }
        }
        Ok(())
    }

    /// What the state and the messages of the handover take.
    fn switch_time(&self) -> Duration {
        self.state_time + self.path() * self.ways / 2
    }

    /// Shows others how it goes.
    fn report(&self) {
        let policy = &self.policy;
        let expected = Some(policy.expected_downtime_us()).filter(|&us| us != u64::MAX);
        let stall = (policy.stalled() || self.is_far()).then(|| self.advice());
        let throttle = self.throttle_percents();
        self.progress.update(|r| {
            r.dirty_pages_per_s = policy.dirty_pages_per_s() as f64;
            r.expected_downtime_ms = expected.map_or(0.0, |us| us as f64 / 1e3);
            r.throttle_percent = throttle;
        });
        self.progress.set_stalled(stall);
    }

    /// Whether state and path alone take longer than the guest may stand still, however little is left.
    fn is_far(&self) -> bool {
        self.switch_time() >= Duration::from_millis(self.policy.limits().downtime_ms)
    }

    /// Says so before the first pass, where it is so.
    fn foretell(&self) {
        let limit = self.policy.limits().downtime_ms;
        if !self.is_far() || limit == 0 {
            return;
        }
        let time = self.switch_time();
        let why = format!(
            "pausing, state and round trips alone take {:.0} ms of the {limit} ms allowed, a round trip {:.0} ms",
            time.as_secs_f64() * 1e3,
            self.path().as_secs_f64() * 1e3,
        );
        let postcopy = self.progress.can_postcopy().then_some(Remedy::Postcopy);
        let enough = Remedy::DowntimeLimit((time.as_millis() * 21 / 20 + 1) as u64);
        let what_helps = postcopy.into_iter().chain([enough, Remedy::Switchover]).collect();
        self.progress.update(|r| r.expected_downtime_ms = time.as_secs_f64() * 1e3);
        self.progress.set_stalled(Some(Stalled { why, what_helps }));
    }

    /// What would help a guest that has stalled.
    fn advice(&self) -> Stalled {
        let policy = &self.policy;
        let tuning = self.progress.tuning();
        let most = self.throttle_percents().into_iter().max().unwrap_or(0);
        Stall {
            dirtied_per_s: policy.dirty_pages_per_s().saturating_mul(PAGE_SIZE as u64),
            delivered_per_s: policy.logical_bytes_per_s(),
            expected: Some(policy.expected_downtime_us())
                .filter(|&us| us != u64::MAX)
                .map(Duration::from_micros),
            handover: self.switch_time(),
            limit: Duration::from_millis(policy.limits().downtime_ms),
            bandwidth_limited: tuning.bandwidth.is_some(),
            throttle: match (tuning.auto_converge, tuning.throttle_max) {
                _ if !self.brake.as_ref().is_some_and(Brake::works) => Braking::Spent,
                (false, _) => Braking::Off,
                (true, max) if most < max => Braking::Under,
                (true, PERCENT_MAX..) => Braking::Spent,
                (true, _) => Braking::AtLimit,
            },
            can_postcopy: self.progress.can_postcopy(),
        }
        .advice()
    }
}

/// What `--auto-converge` can still do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Braking {
    /// It is off.
    Off,
    /// More will be taken by itself.
    Under,
    /// All that is allowed is taken.
    AtLimit,
    /// All is taken that can be.
    Spent,
}

/// A migration whose remainder does not shrink.
#[derive(Clone, Copy, Debug)]
struct Stall {
    dirtied_per_s: u64,
    delivered_per_s: u64,
    /// Of a switchover now, where it can be told.
    expected: Option<Duration>,
    /// What the state and the messages of the handover take of it.
    handover: Duration,
    limit: Duration,
    bandwidth_limited: bool,
    throttle: Braking,
    can_postcopy: bool,
}

impl Stall {
    /// Why it stalls, and what may help against that; nothing that cannot.
    fn advice(&self) -> Stalled {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let rates = format!(
            "the guest dirties {:.0} MB/s of memory and {:.0} MB/s are delivered",
            mb(self.dirtied_per_s),
            mb(self.delivered_per_s)
        );
        if self.delivered_per_s == 0 {
            let why = format!(
                "{rates}: nothing gets through; see that the connection to the destination carries data"
            );
            return Stalled { why, what_helps: Vec::new() };
        }
        let mut helps = Vec::new();
        // However little is left, the rest takes too long.
        let by_handover = self.handover >= self.limit;
        let why = match self.expected {
            _ if by_handover => format!(
                "{rates}, but pausing, state and round trips alone take {:.0} ms of the {:.0} ms allowed",
                ms(self.handover),
                ms(self.limit)
            ),
            Some(expected) => {
                format!("{rates}: what is left does not shrink and takes {:.0} ms", ms(expected))
            }
            None => format!("{rates}: what is left does not shrink"),
        };
        if !by_handover {
            if self.bandwidth_limited {
                helps.push(Remedy::Bandwidth);
            }
            match self.throttle {
                Braking::Off => helps.push(Remedy::AutoConverge),
                Braking::AtLimit => helps.push(Remedy::ThrottleMax),
                Braking::Under | Braking::Spent => {}
            }
        }
        if self.can_postcopy {
            helps.push(Remedy::Postcopy);
        }
        let enough =
            self.expected.map(|expected| expected.as_micros().div_ceil(1000) + self.limit.as_millis() / 10);
        if let Some(enough_ms) = enough.filter(|&ms| ms > self.limit.as_millis()) {
            helps.push(Remedy::DowntimeLimit(enough_ms as u64));
        }
        if !by_handover {
            helps.push(Remedy::QuieterGuest);
        }
        helps.push(Remedy::Switchover);
        Stalled { why, what_helps: helps }
    }
}

fn micros(since: Duration) -> u64 {
    (clock::now() - since).as_micros() as u64
}

impl<E: Environment> Attempt<'_, E> {
    /// Rounds, until the policy has enough of them. Returns how many there were.
    pub(super) async fn precopy(&mut self, feeder: &Feeder) -> Result<(u64, Next), Cause> {
        let round_trip = self.round_trip.unwrap_or_default();
        let (after, final_check) = (self.options.postcopy_after_rounds, self.options.final_check);
        let (backend, progress, began) = (self.backend, self.progress, self.began);
        let (watch, source) = self.parts();
        let source = source.clone();
        let ways = if watch.may_finish_in_flight() { WAYS } else { WAYS_SETTLED };
        let mut course = Course::new(backend, progress, &source, began, round_trip, ways)?;
        course.looks.in_the_end = final_check;
        let mut left_paused = None;
        let rounds = course.run(watch, feeder, (backend, after), &mut left_paused).await;
        if left_paused.is_some() {
            self.paused_at = left_paused;
        }
        rounds
    }
}

/// Rounds into an archive: there is no way to wait for.
pub(super) async fn rounds_without_a_peer<'m>(
    backend: &SourceBackend,
    progress: &Progress,
    source: &PageSource,
    began: Duration,
    mover: &mut impl Mover<'m>,
    feeder: &Feeder,
) -> Result<u64, Cause> {
    let course = Course::new(backend, progress, source, began, Duration::ZERO, 0)?;
    // A guest that a trial left paused is resumed by who ends the migration.
    course.run(mover, feeder, (backend, None), &mut None).await.map(|(rounds, _)| rounds)
}

impl Course<'_> {
    /// Rounds, until the policy has enough of them. Where it fails `left_paused` is told since when the guest stands still, if it does.
    async fn run<'m>(
        mut self,
        mover: &mut impl Mover<'m>,
        feeder: &Feeder,
        (backend, postcopy_after): (&SourceBackend, Option<u64>),
        left_paused: &mut Option<Duration>,
    ) -> Result<(u64, Next), Cause> {
        let (live, progress) = (backend.guest.is_some(), self.progress);
        if live {
            self.foretell();
        }
        // Those before the connections were lost count, too.
        let mut rounds = progress.report().rounds;
        loop {
            rounds += 1;
            progress.update(|r| r.rounds = rounds);
            if postcopy_after.is_some_and(|after| rounds > after) {
                progress.request_postcopy();
            }
            let decided = if live {
                self.round(mover, feeder, backend.paused).await
            } else {
                // Memory that nobody writes: all of it is sent in the one pass.
                feeder.settle(mover.waits(), || self.check(mover)).await.map(|()| {
                    mover.end_round(0);
                    Decision::SwitchOver { predicted_downtime_us: 0, reason: SwitchReason::WithinLimit }
                })
            };
            let decision = match decided {
                Ok(decision) | Err(Stop::Decided(decision)) => decision,
                Err(Stop::Failed(cause)) => {
                    *left_paused = self.left_paused;
                    return Err(cause);
                }
                Err(Stop::Sync) => Decision::NextRound,
            };
            match decision {
                Decision::NextRound => {}
                Decision::SwitchOver { predicted_downtime_us, .. } => {
                    progress.update(|r| r.expected_downtime_ms = predicted_downtime_us as f64 / 1e3);
                    return Ok((rounds, Next::SwitchOver));
                }
                Decision::Postcopy => {
                    // Nothing but the state is moved while it stands still.
                    progress.update(|r| r.expected_downtime_ms = self.switch_time().as_secs_f64() * 1e3);
                    return Ok((rounds, Next::Postcopy));
                }
                Decision::GiveUp { reason } => return Err(Cause::Policy(reason.to_string())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_what_can_help() {
        let ms = Duration::from_millis;
        let busy = Stall {
            dirtied_per_s: 400_000_000,
            delivered_per_s: 100_000_000,
            expected: Some(ms(2500)),
            handover: ms(12),
            limit: ms(300),
            bandwidth_limited: false,
            throttle: Braking::Off,
            can_postcopy: false,
        };
        let (enough, grows) = ("a downtime limit of 2530 ms", "does not shrink and takes 2500 ms");
        let all = [
            "a higher bandwidth limit",
            "auto-converge, ",
            "what auto-converge takes",
            "postcopy",
            enough,
            "a quieter guest",
            "or to switch over",
            grows,
            "nothing gets through",
            "alone take",
        ];
        let last = ["a quieter guest", "or to switch over"];
        for (name, stall, said) in [
            ("as it comes", busy, &["auto-converge, ", enough, grows][..]),
            (
                "a limited bandwidth, and postcopy",
                Stall { bandwidth_limited: true, can_postcopy: true, ..busy },
                &["a higher bandwidth limit", "auto-converge, ", "postcopy", enough, grows],
            ),
            (
                "a brake that will be put on further by itself",
                Stall { throttle: Braking::Under, ..busy },
                &[enough, grows],
            ),
            (
                "a brake at its limit",
                Stall { throttle: Braking::AtLimit, ..busy },
                &["what auto-converge takes", enough, grows],
            ),
            ("a brake that is all on", Stall { throttle: Braking::Spent, ..busy }, &[enough, grows]),
            ("no telling how long it takes", Stall { expected: None, ..busy }, &["auto-converge, "]),
            // It will switch over at the next sync.
            ("it would fit by now", Stall { expected: Some(ms(100)), ..busy }, &["auto-converge, "]),
        ] {
            let text = stall.advice().to_string();
            for word in all {
                let expected = said.contains(&word) || last.contains(&word);
                assert_eq!(text.contains(word), expected, "{name}: {word}: {text}");
            }
        }
        // What the guest writes is not what keeps it from being handed over.
        let far = Stall {
            dirtied_per_s: 1_000_000,
            expected: Some(ms(573)),
            handover: ms(560),
            bandwidth_limited: true,
            can_postcopy: true,
            ..busy
        };
        assert_eq!(
            far.advice().to_string(),
            "the guest dirties 1 MB/s of memory and 100 MB/s are delivered, but pausing, state and round trips alone take 560 ms of the \
             300 ms allowed; what may help: postcopy, a downtime limit of 603 ms, or to switch over and accept the downtime"
        );
        let stuck = Stall { delivered_per_s: 0, expected: None, ..busy }.advice().to_string();
        assert!(stuck.contains("nothing gets through") && !stuck.contains("may help"), "{stuck}");
    }
}
