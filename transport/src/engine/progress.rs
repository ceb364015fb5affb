//! A migration as others see it while it runs: its report so far, and requests to it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::clock;
#[cfg(test)]
use crate::simulation::fault;
use crate::uri::Uri;
use serde::{Deserialize, Serialize};

use super::report::{Pages, Report, Status};
use super::tuning::Tuning;

/// Rounds that are remembered: those of a migration that lasts longer have nothing new to tell.
const ROUNDS_KEPT: usize = 4096;

/// How a migration stood when one of its passes over a dirty set had ended. Bytes and pages are those of all passes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// From the request, in milliseconds.
    pub ended_ms: f64,
    /// Pages that were written since the last dirty sync.
    pub dirtied_pages: u64,
    /// Bytes of pages that waited or were under way.
    pub remaining_bytes: u64,
    /// Page bytes delivered.
    pub logical_bytes: u64,
    /// Bytes on the wire for them.
    pub wire_bytes: u64,
    /// Pages by what became of them.
    pub pages: Pages,
}

/// How far a migration out has come, as far as that decides what may be asked of it. The report's status says how it fares on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// GO was not said: the guest is the source's, and the migration may be cancelled.
    #[default]
    Precopy,
    /// GO was said, with everything delivered. The source may still ask what came of it, and may be told to ask no more.
    HandedOver,
    /// GO was said, and pages follow. Whatever the status is, the destination may run the guest, and needs this side until it has
    /// every page: nothing ends this phase from outside.
    Postcopy,
}

/// Shared by the thread that migrates and those that watch or command it.
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
    pub fn new(tuning: Tuning) -> Self {
        let shared = Shared { tuning: Mutex::new(tuning), ..Shared::default() };
        Self { shared: Arc::new(shared) }
    }

    /// The report so far.
    pub fn report(&self) -> Report {
        self.lock().clone().rounded()
    }

    /// The rounds so far, at a source; the last one is that of the switchover.
    pub fn rounds(&self) -> Vec<Round> {
        self.shared.rounds.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// A round has ended, by whose sync so many pages were found dirty. The report is up to date.
    pub(crate) fn end_round(&self, dirtied_pages: u64) {
        let report = self.report();
        let mut rounds = self.shared.rounds.lock().unwrap_or_else(|e| e.into_inner());
        if rounds.len() < ROUNDS_KEPT {
            rounds.push(Round {
                ended_ms: report.total_ms,
                dirtied_pages,
                remaining_bytes: report.remaining_bytes,
                logical_bytes: report.logical_bytes,
                wire_bytes: report.wire_bytes,
                pages: report.pages,
            });
        }
    }

    /// Asks the migration to stop. It does so unless GO was said; then this ends the asking that may follow it. Returns whether the
    /// request counts: in [`Phase::Postcopy`] it does not.
    pub fn cancel(&self) -> bool {
        let phase = self.lock_phase();
        let counts = *phase != Phase::Postcopy;
        #[cfg(test)]
        let counts = counts || fault::is(fault::Fault::AskingEndsService);
        if counts {
            self.shared.cancel.store(true, Ordering::Relaxed);
        }
        counts
    }

    /// Whether [`Self::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancel.load(Ordering::Relaxed)
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        *self.lock_phase()
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

    /// Asks to switch over as soon as the first pass is done, whatever the downtime.
    pub fn request_switchover(&self) {
        self.shared.switch_over.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::request_switchover`] was called.
    pub fn wants_switchover(&self) -> bool {
        self.shared.switch_over.load(Ordering::Relaxed)
    }

    /// Asks to go on as postcopy: the guest runs at the destination, and its pages follow.
    pub fn request_postcopy(&self) {
        self.shared.postcopy.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::request_postcopy`] was called.
    pub fn wants_postcopy(&self) -> bool {
        self.shared.postcopy.load(Ordering::Relaxed)
    }

    /// Lets a migration go on that waits before its switchover ([`Tuning::pause_before_switchover`]).
    pub fn go_on(&self) {
        self.shared.go_on.store(true, Ordering::Relaxed);
    }

    pub(crate) fn may_go_on(&self) -> bool {
        self.shared.go_on.load(Ordering::Relaxed)
    }

    /// The limits as they are now.
    pub fn tuning(&self) -> Tuning {
        *self.lock_tuning()
    }

    /// Changes limits, at any time; a migration that runs keeps to the new ones within some 20 ms.
    pub fn tune(&self, change: impl FnOnce(&mut Tuning)) {
        change(&mut self.lock_tuning());
        self.shared.tuned.fetch_add(1, Ordering::Release);
    }

    /// The limits, where they were changed since `seen`, which becomes now.
    pub(crate) fn tuned_since(&self, seen: &mut u64) -> Option<Tuning> {
        let now = self.shared.tuned.load(Ordering::Acquire);
        (std::mem::replace(seen, now) != now).then(|| self.tuning())
    }

    /// Whether postcopy can be asked for: a migration is under way whose destination takes a guest before its pages.
    pub fn can_postcopy(&self) -> bool {
        self.shared.can_postcopy.load(Ordering::Relaxed)
    }

    pub(crate) fn offer_postcopy(&self, possible: bool) {
        self.shared.can_postcopy.store(possible, Ordering::Relaxed);
    }

    /// Has a migration in postcopy open its lost connections at another address of the destination.
    pub fn recover(&self, uri: Uri) {
        *self.recovery() = Some(uri);
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
        let news = News::of(&report).since(&before, &report);
        drop(report);
        // Nobody waits for a log with the report in hand.
        news.into_iter().for_each(News::tell);
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

/// What of a report the log tells when it changes.
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
    use super::*;

    #[test]
    fn who_cancels_is_heard_or_told_that_it_is_too_late() {
        for next in [Phase::HandedOver, Phase::Postcopy] {
            let early = Progress::default();
            assert!(early.cancel() && early.is_cancelled());
            assert!(!early.say_go(next), "GO is not said of a migration that was cancelled");
            assert_eq!(early.phase(), Phase::Precopy);
            let late = Progress::default();
            assert!(late.say_go(next));
            assert_eq!(late.phase(), next);
            // Asking may end; serving pages may not.
            assert_eq!(late.cancel(), next == Phase::HandedOver);
            assert_eq!(late.is_cancelled(), next == Phase::HandedOver);
        }
    }
}
