//! A migration as others see it while it runs: its report so far, and requests to it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::clock;
#[cfg(test)]
use crate::simulation::fault;
use crate::uri::Uri;

use super::events::{Event, Events, Journal};
use super::report::{Report, Round, Stalled, Status};
use super::tuning::Tuning;

/// Rounds that are remembered: those of a migration that lasts longer have nothing new to tell.
const ROUNDS_KEPT: usize = 4096;

/// How far a migration out has come, as far as that decides what may be asked of it. The report's status says how it fares on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    /// GO was not said: the guest is the source's, and the migration may be cancelled.
    #[default]
    Precopy,
    /// GO was said, with everything delivered. The source may still ask what came of it, and may be told to ask no more.
    HandedOver,
    /// GO was said, and pages follow. Whatever the status is, the destination may run the guest, and needs this side until it has
    /// every page: nothing ends this phase from outside.
    Postcopy,
}

/// Why a migration does not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It has ended.
    #[error("the migration has ended")]
    Ended,
    /// The guest was handed over, with all its pages.
    #[error("too late: the guest was handed over")]
    HandedOver,
    /// The guest was handed over, and its pages follow: it may run at the destination and needs this side until it has all of them.
    #[error("too late: the guest was handed over and needs the pages that are still here")]
    InPostcopy,
    /// It is not in postcopy.
    #[error("the migration is not in postcopy")]
    NotInPostcopy,
    /// The destination cannot run a guest before its pages are there, or no page has moved yet.
    #[error(
        "not now: no page has moved yet, or the destination cannot run a guest before its pages are there"
    )]
    NoPostcopy,
    /// It does not wait before its switchover.
    #[error("the migration does not wait before its switchover")]
    NotWaiting,
}

/// A migration as others see it: those who watch or command it, from any thread, while another waits for its end. A clone is the same
/// migration. Requests return at once; the migration does what it was asked within some 20 ms.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    report: Mutex<Report>,
    tuning: Mutex<Tuning>,
    /// How often `tuning` was changed.
    tuned: AtomicU64,
    rounds: Mutex<Vec<Round>>,
    stalled: Mutex<Option<Stalled>>,
    journal: Journal,
    cancel: AtomicBool,
    /// Cancelling looks at it, and GO at whether it was cancelled.
    phase: Mutex<Phase>,
    switch_over: AtomicBool,
    postcopy: AtomicBool,
    go_on: AtomicBool,
    /// The destination takes a guest before its pages.
    can_postcopy: AtomicBool,
    /// Where lost connections of postcopy are to be opened.
    recovery: Mutex<Option<Uri>>,
}

impl Progress {
    /// Of a migration that begins with these limits.
    pub(crate) fn new(tuning: Tuning) -> Self {
        let shared = Shared { tuning: Mutex::new(tuning), ..Shared::default() };
        Self { shared: Arc::new(shared) }
    }

    /// What happens to it, from its beginning on.
    pub fn events(&self) -> Events {
        Events::new(&self.shared.journal)
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        self.lock().status
    }

    /// Its numbers so far.
    pub fn report(&self) -> Report {
        self.lock().clone().rounded()
    }

    /// The rounds so far, at a source; the last one is that of the switchover. The first 4096 are kept.
    pub fn rounds(&self) -> Vec<Round> {
        self.shared.rounds.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Why it does not end by itself, where it does not; at a source. [`Report::stalled`] is its text.
    pub fn stalled(&self) -> Option<Stalled> {
        self.shared.stalled.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    pub(crate) fn set_stalled(&self, stalled: Option<Stalled>) {
        let text = stalled.as_ref().map(Stalled::to_string);
        *self.shared.stalled.lock().unwrap_or_else(|e| e.into_inner()) = stalled;
        self.update(|r| r.stalled = text);
    }

    /// A round has ended, by whose sync so many pages were found dirty. The report is up to date.
    pub(crate) fn end_round(&self, dirtied_pages: u64) {
        let report = self.report();
        let round = Round {
            ended_ms: report.total_ms,
            dirtied_pages,
            remaining_bytes: report.remaining_bytes,
            logical_bytes: report.logical_bytes,
            wire_bytes: report.wire_bytes,
            pages: report.pages,
            paused_ms: report.paused_ms,
        };
        let mut rounds = self.shared.rounds.lock().unwrap_or_else(|e| e.into_inner());
        if rounds.len() < ROUNDS_KEPT {
            rounds.push(round);
        }
        drop(rounds);
        self.tell(Event::Round(round));
    }

    pub(crate) fn tell(&self, event: Event) {
        self.shared.journal.change(|journal| journal.add(event));
    }

    /// It has ended: no event follows.
    pub(crate) fn end(&self) {
        self.tell(Event::Done { report: Box::new(self.report()) });
    }

    /// Asks the migration to stop. At a source it does so unless the guest was handed over with all its pages; then this ends the
    /// asking that may follow, and not the uncertainty who has the guest. At a destination it ends the session, or the waiting for one.
    ///
    /// # Errors
    /// [`Refusal::InPostcopy`], at a source.
    pub fn cancel(&self) -> Result<(), Refusal> {
        let phase = self.lock_phase();
        let counts = *phase != Phase::Postcopy;
        #[cfg(test)]
        let counts = counts || fault::is(fault::Fault::AskingEndsService);
        if !counts {
            return Err(Refusal::InPostcopy);
        }
        self.shared.cancel.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether [`Self::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancel.load(Ordering::Relaxed)
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.lock_phase()
    }

    /// Whether the guest was handed over before its pages, which follow; at a source. Whatever the status is, the destination may run
    /// the guest then, and needs this side until it has every page.
    pub fn in_postcopy(&self) -> bool {
        self.phase() == Phase::Postcopy
    }

    /// GO is about to be said, unless the migration was cancelled; says whether it may be. Who cancels later knows that he is too late.
    pub(crate) fn say_go(&self, next: Phase) -> bool {
        let mut phase = self.lock_phase();
        let may = !self.is_cancelled();
        if may {
            *phase = next;
        }
        may
    }

    fn check_not_ended(&self) -> Result<(), Refusal> {
        if self.shared.journal.look(|journal| journal.has_ended()) { Err(Refusal::Ended) } else { Ok(()) }
    }

    /// Fails once the guest was handed over.
    fn check_precopy(&self) -> Result<(), Refusal> {
        self.check_not_ended()?;
        match self.phase() {
            Phase::Precopy => Ok(()),
            Phase::HandedOver => Err(Refusal::HandedOver),
            Phase::Postcopy => Err(Refusal::InPostcopy),
        }
    }

    /// Asks to switch over as soon as the first pass is done, whatever the downtime.
    ///
    /// # Errors
    /// When the guest was handed over, or the migration has ended.
    pub fn switchover(&self) -> Result<(), Refusal> {
        self.check_precopy()?;
        self.shared.switch_over.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn wants_switchover(&self) -> bool {
        self.shared.switch_over.load(Ordering::Relaxed)
    }

    /// Asks to go on as postcopy: the guest runs at the destination, and its pages follow. Nothing, where they do already.
    ///
    /// # Errors
    /// [`Refusal::NoPostcopy`], or when the migration has ended.
    pub fn postcopy(&self) -> Result<(), Refusal> {
        self.check_not_ended()?;
        if self.in_postcopy() {
            return Ok(());
        }
        if !self.can_postcopy() {
            return Err(Refusal::NoPostcopy);
        }
        self.request_postcopy();
        Ok(())
    }

    /// The same, unconditionally.
    pub(crate) fn request_postcopy(&self) {
        self.shared.postcopy.store(true, Ordering::Relaxed);
    }

    pub(crate) fn wants_postcopy(&self) -> bool {
        self.shared.postcopy.load(Ordering::Relaxed)
    }

    /// Lets a migration go on that waits before its switchover ([`Tuning::pause_before_switchover`]).
    ///
    /// # Errors
    /// [`Refusal::NotWaiting`].
    pub fn continue_(&self) -> Result<(), Refusal> {
        if self.status() != Status::PreSwitchover {
            return Err(Refusal::NotWaiting);
        }
        self.shared.go_on.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn may_go_on(&self) -> bool {
        self.shared.go_on.load(Ordering::Relaxed)
    }

    /// The limits as they are now.
    pub fn tuning(&self) -> Tuning {
        *self.lock_tuning()
    }

    /// Sets all limits. To change some, see [`Self::tune`].
    ///
    /// # Errors
    /// As [`Self::tune`].
    pub fn set(&self, tuning: Tuning) -> Result<(), Refusal> {
        self.tune(|now| *now = tuning)
    }

    /// Changes limits, while nobody else does.
    ///
    /// # Errors
    /// When the guest was handed over, in postcopy only where more is changed than the bandwidth; or when the migration has ended. Nothing
    /// is changed then.
    pub fn tune(&self, change: impl FnOnce(&mut Tuning)) -> Result<(), Refusal> {
        self.check_not_ended()?;
        let mut tuning = self.lock_tuning();
        let mut new = *tuning;
        change(&mut new);
        let bandwidth_alone = Tuning { bandwidth: tuning.bandwidth, ..new } == *tuning;
        match self.phase() {
            Phase::Precopy => {}
            Phase::Postcopy if bandwidth_alone => {}
            Phase::Postcopy => return Err(Refusal::InPostcopy),
            Phase::HandedOver => return Err(Refusal::HandedOver),
        }
        *tuning = new;
        self.shared.tuned.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The limits, where they were changed since `seen`, which becomes now.
    pub(crate) fn tuned_since(&self, seen: &mut u64) -> Option<Tuning> {
        let now = self.shared.tuned.load(Ordering::Acquire);
        (std::mem::replace(seen, now) != now).then(|| self.tuning())
    }

    /// Whether [`Self::postcopy`] can be asked for: a migration is under way whose destination takes a guest before its pages.
    pub fn can_postcopy(&self) -> bool {
        self.shared.can_postcopy.load(Ordering::Relaxed)
    }

    pub(crate) fn offer_postcopy(&self, possible: bool) {
        self.shared.can_postcopy.store(possible, Ordering::Relaxed);
    }

    /// Has a migration in postcopy open its lost connections at another address of the destination.
    ///
    /// # Errors
    /// [`Refusal::NotInPostcopy`].
    pub fn recover(&self, uri: Uri) -> Result<(), Refusal> {
        if !self.in_postcopy() {
            return Err(Refusal::NotInPostcopy);
        }
        *self.recovery() = Some(uri);
        Ok(())
    }

    pub(crate) fn take_recovery(&self) -> Option<Uri> {
        self.recovery().take()
    }

    fn recovery(&self) -> MutexGuard<'_, Option<Uri>> {
        self.shared.recovery.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Report)) {
        let mut report = self.lock();
        let before = News::of(&report);
        change(&mut report);
        let after = News::of(&report);
        let events = after.events_since(&before);
        let news = after.since(&before, &report);
        drop(report);
        // Nobody waits for a log with the report in hand.
        news.into_iter().for_each(News::tell);
        for event in events {
            match event {
                Told::Stalled => {
                    self.stalled().into_iter().for_each(|stalled| self.tell(Event::Stalled(stalled)));
                }
                Told::Event(event) => self.tell(event),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Report> {
        self.shared.report.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn lock_phase(&self) -> MutexGuard<'_, Phase> {
        self.shared.phase.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn lock_tuning(&self) -> MutexGuard<'_, Tuning> {
        self.shared.tuning.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// An event that follows from a change of the report.
enum Told {
    Event(Event),
    /// Its reasons are not in the report.
    Stalled,
}

/// What of a report the log and the events tell when it changes.
#[derive(Debug, PartialEq)]
struct News {
    status: Status,
    stalled: bool,
    streams_lost: u32,
    streams_reconnected: u32,
    why: Option<String>,
}

impl News {
    fn of(report: &Report) -> Self {
        Self {
            status: report.status,
            stalled: report.stalled.is_some(),
            streams_lost: report.streams_lost,
            streams_reconnected: report.streams_reconnected,
            why: None,
        }
    }

    /// Itself with the reason, unless nothing has changed.
    fn since(self, before: &Self, report: &Report) -> Option<Self> {
        let why = if self.stalled && !before.stalled { &report.stalled } else { &report.error };
        (self != *before).then(|| Self { why: why.clone(), ..self })
    }

    fn events_since(&self, before: &Self) -> Vec<Told> {
        let mut events = Vec::new();
        let mut add = |changed: bool, event| {
            if changed {
                events.push(event);
            }
        };
        let Self { status, stalled, streams_lost: lost, streams_reconnected: reconnected, .. } = *self;
        add(status != before.status, Told::Event(Event::Phase { status }));
        add(stalled && !before.stalled, Told::Stalled);
        add(!stalled && before.stalled && status == before.status, Told::Event(Event::GetsOn));
        add(lost > before.streams_lost, Told::Event(Event::StreamLost { lost }));
        add(reconnected > before.streams_reconnected, Told::Event(Event::StreamReconnected { reconnected }));
        events
    }

    fn tell(self) {
        let Self { status, stalled, streams_lost, streams_reconnected, why } = self;
        let why = why.unwrap_or_default();
        tracing::info!(stalled, streams_lost, streams_reconnected, why, "migration: {status:?}");
    }
}

/// A time without connections, as the report shows it: status `reconnecting`, the reason, and how long it has lasted.
#[derive(Debug)]
pub(crate) struct Outage {
    since: Duration,
    before_ms: f64,
}

impl Outage {
    /// Connections were lost just now.
    pub(crate) fn begin(progress: &Progress, reason: &str) -> Self {
        let mut before_ms = 0.0;
        progress.update(|r| {
            r.status = Status::Reconnecting;
            r.error = Some(reason.into());
            before_ms = r.reconnecting_ms;
        });
        Self { since: clock::now(), before_ms }
    }

    /// How long it has lasted; renews the report.
    pub(crate) fn lasts(&self, progress: &Progress) -> Duration {
        let elapsed = clock::now() - self.since;
        progress.update(|r| r.reconnecting_ms = self.before_ms + elapsed.as_secs_f64() * 1e3);
        elapsed
    }

    /// It is over: pages move again.
    pub(crate) fn end(self, progress: &Progress) {
        self.lasts(progress);
        progress.update(|r| {
            r.status = Status::Active;
            r.error = None;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Remedy;
    use super::*;

    #[test]
    fn who_cancels_is_heard_or_told_that_it_is_too_late() {
        for next in [Phase::HandedOver, Phase::Postcopy] {
            let early = Progress::default();
            assert!(early.cancel().is_ok() && early.is_cancelled());
            assert!(!early.say_go(next), "GO is not said of a migration that was cancelled");
            assert_eq!(early.phase(), Phase::Precopy);
            let late = Progress::default();
            assert!(late.say_go(next));
            assert_eq!(late.phase(), next);
            // Asking may end; serving pages may not.
            assert_eq!(late.cancel().is_ok(), next == Phase::HandedOver);
            assert_eq!(late.is_cancelled(), next == Phase::HandedOver);
        }
    }

    #[test]
    fn what_comes_too_late_is_refused() {
        let more = |tuning: &mut Tuning| tuning.auto_converge = true;
        let faster = |tuning: &mut Tuning| tuning.bandwidth = Some(5);
        let at = |phase| {
            let progress = Progress::default();
            assert!(phase == Phase::Precopy || progress.say_go(phase));
            progress
        };
        let early = at(Phase::Precopy);
        assert_eq!((early.tune(more), early.switchover()), (Ok(()), Ok(())));
        assert_eq!(
            (early.postcopy(), early.continue_()),
            (Err(Refusal::NoPostcopy), Err(Refusal::NotWaiting))
        );
        early.offer_postcopy(true);
        assert_eq!((early.postcopy(), early.wants_postcopy()), (Ok(()), true));
        let late = at(Phase::HandedOver);
        assert_eq!(
            (late.tune(faster), late.switchover()),
            (Err(Refusal::HandedOver), Err(Refusal::HandedOver))
        );
        assert_eq!(late.tuning().bandwidth, None);
        let serving = at(Phase::Postcopy);
        assert_eq!((serving.tune(faster), serving.tune(more)), (Ok(()), Err(Refusal::InPostcopy)));
        assert_eq!((serving.tuning().bandwidth, serving.tuning().auto_converge), (Some(5), false));
        assert_eq!((serving.postcopy(), serving.switchover()), (Ok(()), Err(Refusal::InPostcopy)));
        early.end();
        assert_eq!(
            (early.set(Tuning::default()), early.switchover()),
            (Err(Refusal::Ended), Err(Refusal::Ended))
        );
    }

    #[test]
    fn changes_of_the_report_are_events() {
        let progress = Progress::default();
        let stalled =
            Stalled { why: "it is busy".into(), what_helps: vec![Remedy::AutoConverge, Remedy::Switchover] };
        progress.update(|r| r.status = Status::Active);
        progress.set_stalled(Some(stalled.clone()));
        progress.set_stalled(Some(stalled.clone()));
        progress.set_stalled(None);
        progress.update(|r| (r.streams_lost, r.rounds) = (2, 7));
        progress.end_round(3);
        progress.update(|r| r.status = Status::Completed);
        progress.end();
        let events: Vec<_> = progress.events().collect();
        let report = progress.report();
        assert_eq!(
            events,
            [
                Event::Phase { status: Status::Active },
                Event::Stalled(stalled.clone()),
                Event::GetsOn,
                Event::StreamLost { lost: 2 },
                Event::Round(progress.rounds()[0]),
                Event::Phase { status: Status::Completed },
                Event::Done { report: Box::new(report) },
            ]
        );
        let text = "it is busy; what may help: auto-converge, or to switch over and accept the downtime";
        assert_eq!(stalled.to_string(), text);
    }
}
