//! What the migrations of a host share: a limit on the wire bytes of all of them together.
//!
//! The limit is one bucket, as a session has one of its own ([`super::pace`]). Of the sessions that wait for it the one goes next that
//! has sent the least, so that each gets the same part of the limit, however many streams it has and however large its frames are. A
//! session that has been silent gets no more than its part for that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{Thread, current, park_timeout};
use std::time::Duration;

use super::pace::{Bucket, TICK};
use crate::clock;

/// What migrations of a host share that run at the same time.
#[derive(Debug)]
pub struct HostShare {
    line: Mutex<Line>,
    /// Whether there is a limit: what every frame asks without a lock. A moment late is no harm.
    limits: AtomicBool,
}

impl HostShare {
    /// Without a limit.
    pub fn new() -> Self {
        Self { line: Mutex::new(Line::new()), limits: AtomicBool::new(false) }
    }

    /// Limits the wire bytes of all sessions together to so many a second, from now on; `None` lifts the limit. The limits that sessions
    /// have of their own hold beside it. What cannot wait is sent at once all the same, and everything else waits the longer for it: the
    /// last pages of a guest that is paused, and pages that a guest waits for in postcopy.
    pub fn limit_bandwidth(&self, bytes_per_s: Option<u64>) {
        let mut line = self.line();
        line.bucket.set_rate(clock::now(), bytes_per_s.unwrap_or(0));
        self.limits.store(line.bucket.limits(), Ordering::Relaxed);
        line.wake_first();
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Default for HostShare {
    fn default() -> Self {
        Self::new()
    }
}

/// What a session has sent, as far as that decides whose turn it is.
type Sent = Arc<AtomicU64>;

/// A session that waits, by a thread of its own.
#[derive(Debug)]
struct Waiter {
    sent: Sent,
    thread: Thread,
}

/// The bucket, and who waits for it. Time comes in.
#[derive(Debug)]
struct Line {
    bucket: Bucket,
    /// In the order in which they came.
    waiting: Vec<Waiter>,
    /// What had been sent by the one that was let through last: who comes anew, or back, begins there.
    passed: u64,
}

impl Line {
    fn new() -> Self {
        Self { bucket: Bucket::new(), waiting: Vec::new(), passed: 0 }
    }

    fn first(&self) -> Option<&Waiter> {
        self.waiting.iter().min_by_key(|waiter| waiter.sent.load(Ordering::Relaxed))
    }

    fn is_first(&self, sent: &Sent) -> bool {
        self.first().is_none_or(|first| Arc::ptr_eq(&first.sent, sent))
    }

    fn wake_first(&self) {
        if let Some(first) = self.first() {
            first.thread.unpark();
        }
    }

    /// How long a frame has to wait, zero when it may go; `None` while it is another session's turn. `waited`: it did so already.
    fn poll(&mut self, sent: &Sent, now: Duration, waited: bool) -> Option<Duration> {
        if !self.is_first(sent) {
            return None;
        }
        let wait = self.bucket.wait(now, waited);
        if wait.is_zero() {
            self.passed = self.passed.max(sent.load(Ordering::Relaxed));
        }
        Some(wait)
    }

    fn spend(&mut self, sent: &Sent, bytes: u64) {
        self.bucket.spend(bytes);
        let before = sent.load(Ordering::Relaxed).max(self.passed);
        sent.store(before.saturating_add(bytes), Ordering::Relaxed);
    }
}

/// A session's part in what its host's sessions share. One thread of it waits at a time.
#[derive(Debug)]
pub(super) struct Share {
    host: Arc<HostShare>,
    sent: Sent,
}

impl Share {
    pub(super) fn new(host: Arc<HostShare>) -> Self {
        Self { host, sent: Sent::default() }
    }

    fn limits(&self) -> bool {
        self.host.limits.load(Ordering::Relaxed)
    }

    /// Whether a frame may go now: not where another session waits.
    pub(super) fn is_open(&self) -> bool {
        !self.limits() || self.host.line().poll(&self.sent, clock::now(), false) == Some(Duration::ZERO)
    }

    /// Waits until a frame may go, or `stopped` says yes.
    pub(super) fn wait(&self, stopped: impl Fn() -> bool) {
        if !self.limits() {
            return;
        }
        self.host.line().waiting.push(Waiter { sent: self.sent.clone(), thread: current() });
        let _place = Place(self);
        let mut waited = false;
        while !stopped() {
            let mut line = self.host.line();
            let wait = match line.poll(&self.sent, clock::now(), waited) {
                Some(Duration::ZERO) => return,
                Some(wait) => wait,
                None => {
                    // What this session has sent meanwhile may have made another the first.
                    if waited {
                        line.wake_first();
                    }
                    TICK
                }
            };
            drop(line);
            waited = true;
            park_timeout(wait.min(TICK));
        }
    }

    /// Has the thread that waits look again.
    pub(super) fn wake(&self) {
        let line = self.host.line();
        let own = line.waiting.iter().filter(|waiter| Arc::ptr_eq(&waiter.sent, &self.sent));
        own.for_each(|waiter| waiter.thread.unpark());
    }

    /// Takes out what a frame came to.
    pub(super) fn spend(&self, bytes: u64) {
        if self.limits() {
            self.host.line().spend(&self.sent, bytes);
        }
    }
}

/// A session's place among those that wait, until it is dropped.
struct Place<'a>(&'a Share);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut line = self.0.host.line();
        line.waiting.retain(|waiter| !Arc::ptr_eq(&waiter.sent, &self.0.sent));
        line.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pace::BURST;
    use super::*;

    /// Sessions that always have something to send, each with some streams, whose frames are of one size.
    struct Sessions {
        line: Line,
        now: Duration,
        /// What it has sent in all, the size of its frames, and which of them it may send and has not yet.
        sessions: Vec<(Sent, u64, u64, Vec<u64>)>,
    }

    impl Sessions {
        fn new(rate: u64) -> Self {
            let mut line = Line::new();
            line.bucket.set_rate(Duration::ZERO, rate);
            Self { line, now: Duration::ZERO, sessions: Vec::new() }
        }

        fn join(&mut self, streams: usize, frame: u64) {
            let sent = Sent::default();
            self.line.waiting.push(Waiter { sent: sent.clone(), thread: current() });
            self.sessions.push((sent, 0, frame, vec![0; streams - 1]));
        }

        /// Whoever is first sends a frame once the bucket lets it, as late as that thread wakes up. Each of a session's streams is given
        /// leave before the first of them has sent.
        fn step(&mut self, late: Duration) {
            let first = self.sessions.iter_mut().find(|session| self.line.is_first(&session.0));
            let (sent, total, frame, under_way) = first.unwrap();
            let wait = self.line.poll(sent, self.now, true).unwrap();
            if !wait.is_zero() {
                self.now += wait + late;
                return;
            }
            under_way.insert(0, *frame);
            let bytes = under_way.pop().unwrap();
            *total += bytes;
            if bytes != 0 {
                self.line.spend(sent, bytes);
            }
        }

        fn totals(&self) -> Vec<u64> {
            self.sessions.iter().map(|session| session.1).collect()
        }
    }

    proptest! {
        /// Whatever their streams and frames, and however late a thread wakes up: together they keep the rate, and each has the same.
        #[test]
        fn sessions_share_the_rate_alike(
            rate in 10_000_000u64..1_000_000_000,
            sessions in prop::collection::vec((1usize..9, 10_000u64..300_000), 2..6),
            late_us in prop::collection::vec(0u64..200_000, 1..20),
        ) {
            let mut all = Sessions::new(rate);
            sessions.iter().for_each(|&(streams, frame)| all.join(streams, frame));
            let mut late_us = late_us.into_iter().cycle();
            for _ in 0..5000 {
                all.step(Duration::from_micros(late_us.next().unwrap()));
            }
            let totals = all.totals();
            let most = rate as f64 * (all.now + BURST).as_secs_f64();
            let frames: u64 = sessions.iter().map(|&(streams, frame)| streams as u64 * frame).sum();
            let sent: u64 = totals.iter().sum();
            prop_assert!(sent as f64 <= most + frames as f64, "{sent} of {most}");
            // But for what each may have under way.
            let slack = 2 * sessions.iter().map(|&(streams, frame)| streams as u64 * frame).max().unwrap();
            let (least, most) = (totals.iter().min().unwrap(), totals.iter().max().unwrap());
            prop_assert!(most - least <= slack, "{totals:?}, frames {sessions:?}");
            prop_assert!(*least > slack, "{totals:?}: too few to tell");
        }
    }

    #[test]
    fn who_comes_late_gets_a_part_and_not_all_until_it_has_caught_up() {
        let mut all = Sessions::new(100_000_000);
        all.join(4, 260_000);
        (0..2000).for_each(|_| all.step(Duration::ZERO));
        let before = all.totals()[0];
        all.join(1, 260_000);
        (0..2000).for_each(|_| all.step(Duration::ZERO));
        let [first, second] = all.totals()[..] else { unreachable!() };
        assert!((first - before).abs_diff(second) <= 8 * 260_000, "{} and {second}", first - before);
        assert!(second > 100 * 260_000);
    }

    #[test]
    fn nobody_goes_before_those_who_wait() {
        let host = Arc::new(HostShare::new());
        host.limit_bandwidth(Some(1 << 40));
        let [waiting, other] = [(); 2].map(|()| Share::new(host.clone()));
        assert!(other.is_open());
        host.line().waiting.push(Waiter { sent: waiting.sent.clone(), thread: current() });
        assert!(!other.is_open());
        drop(Place(&waiting));
        assert!(other.is_open());
    }

    /// A session that ends keeps nobody from going, wherever it stood.
    #[test]
    fn who_stops_leaves_its_place() {
        let host = Arc::new(HostShare::new());
        host.limit_bandwidth(Some(1));
        let [first, second] = [(); 2].map(|()| Share::new(host.clone()));
        second.spend(1 << 20);
        let stop = AtomicBool::new(false);
        let stopped = || stop.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            let (a, b) = (scope.spawn(|| first.wait(stopped)), scope.spawn(|| second.wait(|| false)));
            while host.line().waiting.len() < 2 {
                std::thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
            a.join().unwrap();
            assert!(host.line().is_first(&second.sent) && !b.is_finished());
            host.limit_bandwidth(None);
            b.join().unwrap();
        });
        assert!(host.line().waiting.is_empty());
    }
}
