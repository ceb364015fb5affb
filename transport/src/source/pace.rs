//! A limit on the wire bytes of all streams of a session together.
//!
//! A token bucket that may go into debt: a stream waits until the bucket holds something, sends a whole frame, and takes out
//! what that came to. So the frame's size need not be known before it is encoded, a changed rate holds for those who wait, and over
//! any longer time exactly the rate is kept; a burst is what the bucket holds and at most one frame a stream. Only a stream that had to
//! wait, and was woken late, makes up for up to a quarter of a second.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::clock;

/// The bucket holds what the rate gives in this time.
pub(super) const BURST: Duration = Duration::from_millis(10);
/// A stream that waits for the bucket loses nothing by waking up late, on a host that is busy, up to this.
const LATE: Duration = Duration::from_millis(250);
/// Longest sleep at a time, so that whoever waits sees that the session stops.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// The bucket: pure, time comes in.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// Bytes that may be sent; below 0 what was sent ahead of its time.
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    /// Without a limit.
    pub(super) fn new() -> Self {
        Self { rate: 0, tokens: 0.0, filled: Duration::ZERO }
    }

    /// Whether there is a limit.
    pub(super) fn limits(&self) -> bool {
        self.rate != 0
    }

    /// Fills in what has come since, up to what the rate gives in `most`; what is in already stays.
    fn fill(&mut self, now: Duration, most: Duration) {
        let elapsed = now.saturating_sub(self.filled).as_secs_f64();
        let most = (self.rate as f64 * most.as_secs_f64()).max(self.tokens);
        self.tokens = (self.tokens + elapsed * self.rate as f64).min(most);
        self.filled = self.filled.max(now);
    }

    /// Changes the rate from now on. A debt is paid at the new rate, but a limit that is lifted forgives it.
    pub(super) fn set_rate(&mut self, now: Duration, rate: u64) {
        self.fill(now, BURST);
        if self.rate == 0 || rate == 0 {
            self.tokens = 0.0;
        }
        self.rate = rate;
        self.tokens = self.tokens.min(rate as f64 * BURST.as_secs_f64());
    }

    /// How long a frame has to wait; zero when it may go. `waited`: it did so already.
    pub(super) fn wait(&mut self, now: Duration, waited: bool) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        self.fill(now, if waited { LATE } else { BURST });
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        // At a rate of a byte a second, a frame's debt lasts for days, not for longer than a Duration.
        Duration::from_secs_f64(-self.tokens / self.rate as f64).max(Duration::from_micros(1))
    }

    pub(super) fn spend(&mut self, bytes: u64) {
        if self.rate != 0 {
            self.tokens -= bytes as f64;
        }
    }
}

/// The limit that the streams of a session share. One of them waits for it at a time: see [`super::bandwidth`].
#[derive(Debug)]
pub(super) struct Pace {
    bucket: Mutex<Bucket>,
    changed: Condvar,
    /// Whether there is a limit: what every frame asks without a lock. A moment late is no harm.
    limits: AtomicBool,
}

impl Pace {
    /// Without a limit.
    pub(super) fn new() -> Self {
        Self { bucket: Mutex::new(Bucket::new()), changed: Condvar::new(), limits: AtomicBool::new(false) }
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Bytes a second from now on, also for those who wait; `None` lifts the limit.
    pub(super) fn set_rate(&self, rate: Option<u64>) {
        let mut bucket = self.bucket();
        bucket.set_rate(clock::now(), rate.unwrap_or(0));
        self.limits.store(bucket.limits(), Ordering::Relaxed);
        drop(bucket);
        self.changed.notify_all();
    }

    /// Whether a frame may go now.
    pub(super) fn is_open(&self) -> bool {
        !self.limits.load(Ordering::Relaxed) || self.bucket().wait(clock::now(), false).is_zero()
    }

    /// Waits until a frame may go, or `stopped` says yes.
    pub(super) fn wait(&self, stopped: impl Fn() -> bool) {
        let mut bucket = self.bucket();
        let mut waited = false;
        while !stopped() {
            let wait = bucket.wait(clock::now(), waited);
            if wait.is_zero() {
                return;
            }
            waited = true;
            bucket = self.changed.wait_timeout(bucket, wait.min(TICK)).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Takes out what a frame came to.
    pub(super) fn spend(&self, bytes: u64) {
        if self.limits.load(Ordering::Relaxed) {
            self.bucket().spend(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the frames and however late a sleeper wakes up: the rate is kept, and kept again after a change.
        #[test]
        fn keeps_the_rate(
            rates in prop::array::uniform2(10_000_000u64..1_000_000_000),
            frames in prop::collection::vec((50_000u64..300_000, 0u64..200_000), 1..50),
        ) {
            let mut bucket = Bucket::new();
            let mut frames = frames.into_iter().cycle();
            let (mut now, mut until) = (Duration::ZERO, Duration::ZERO);
            for rate in rates {
                bucket.set_rate(now, rate);
                until += Duration::from_secs(2);
                let (begun, mut sent, mut waited) = (now, 0, false);
                while now < until {
                    let wait = bucket.wait(now, std::mem::take(&mut waited));
                    let (bytes, late_us) = frames.next().unwrap();
                    if wait.is_zero() {
                        bucket.spend(bytes);
                        sent += bytes;
                    } else {
                        now += wait + Duration::from_micros(late_us);
                        waited = true;
                    }
                }
                let wanted = rate as f64 * (now - begun).as_secs_f64();
                // A full bucket at either end, who wakes up late at the end, and a frame that overdraws.
                let slack = rate as f64 * (BURST.as_secs_f64() + 0.2) + 300_000.0;
                prop_assert!((sent as f64 - wanted).abs() <= slack, "{sent} of {wanted} at {rate}");
            }
        }
    }

    #[test]
    fn a_burst_is_bounded_however_long_nothing_was_sent() {
        let mut bucket = Bucket::new();
        bucket.set_rate(Duration::ZERO, 1_000_000);
        let later = Duration::from_secs(3600);
        let mut sent = 0;
        while bucket.wait(later, false).is_zero() {
            bucket.spend(1000);
            sent += 1000;
        }
        assert_eq!(sent, 11_000, "10 ms and the frame that overdraws");
    }

    #[test]
    fn who_waits_hears_of_a_lifted_limit_and_of_the_end() {
        let pace = Pace::new();
        assert!(pace.is_open());
        pace.set_rate(Some(1));
        pace.spend(1 << 20);
        assert!(!pace.is_open());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pace.wait(|| false));
            pace.set_rate(None);
            waiting.join().unwrap();
        });
        assert!(pace.is_open());
        pace.set_rate(Some(1));
        pace.spend(1 << 20);
        pace.wait(|| true);
        assert!(!pace.is_open());
    }
}
