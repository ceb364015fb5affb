//! How much may be under way on a stream, rule 7: buffers are bounded by a time, not by a size. And how long it will take to arrive.

use std::time::Duration;

/// Data under way is bounded to what the stream delivers in this time.
const BUFFERED: Duration = Duration::from_millis(50);
/// Until the rate is known, only so much is under way on all streams together, so that little was sent when the link turns out to be
/// slow; ...
const FIRST_BYTES: u64 = 2 << 20;
/// ... and as much more each time that so much time has passed: the path may be a long one.
const FIRST: Duration = Duration::from_millis(25);
/// The same on a stream that need not begin with little.
const UNKNOWN_BYTES: u64 = 4 << 20;
/// Never more than this.
const BYTES_MAX: u64 = 64 << 20;
/// Delivery rate is measured over intervals of at least this.
const INTERVAL: Duration = Duration::from_millis(10);
/// How fast the path drains is measured over so much time in which there was something to drain.
const DRAIN_INTERVAL: Duration = Duration::from_millis(5);

/// What is taken to be on its way before anything has arrived: as much as is wanted.
const AHEAD_FIRST: Duration = Duration::from_millis(10);

/// The window of one stream: pure; time comes in.
#[derive(Clone, Debug)]
pub struct Window {
    rate: Option<f64>,
    since: Duration,
    acked: u64,
    least: u64,
    /// Once the rate is known.
    limit: u64,
    /// When the first bytes were sent.
    begun: Option<Duration>,
    /// It need not begin with little.
    open: bool,
    /// What the session's streams may begin with together, as this one's part.
    first: u64,
    round_trip: Duration,
    /// Bytes a second that arrive while there are any on their way, once known; bytes and time of which that is not known yet; and when
    /// the last receipt came.
    drains: Option<f64>,
    drained: (u64, Duration),
    receipt_at: Option<Duration>,
}

impl Window {
    /// A window that is never less than `least` bytes, of one of so many streams; with `open`, there is no need to begin with little.
    pub fn new(least: u64, streams: u16, open: bool) -> Self {
        Self {
            rate: None,
            since: Duration::ZERO,
            acked: 0,
            least,
            limit: 0,
            begun: None,
            open,
            first: (FIRST_BYTES / u64::from(streams.max(1))).max(least),
            round_trip: Duration::MAX,
            drains: None,
            drained: (0, Duration::ZERO),
            receipt_at: None,
        }
    }

    /// Bytes that may be under way.
    pub fn limit(&self, now: Duration) -> u64 {
        let bytes = match self.rate {
            Some(_) => return self.limit,
            None if self.open => UNKNOWN_BYTES,
            None => self.first.saturating_mul(self.steps(now) + 1).min(BYTES_MAX),
        };
        bytes.max(self.least)
    }

    /// How often more may be under way by now though no rate is known.
    fn steps(&self, now: Duration) -> u64 {
        let elapsed = now.saturating_sub(self.begun.unwrap_or(now));
        (elapsed.as_nanos() / FIRST.as_nanos()) as u64
    }

    /// How long it is until more may be under way though no rate is known.
    pub fn opens_in(&self, now: Duration) -> Option<Duration> {
        let begun = self.begun.filter(|_| self.rate.is_none() && !self.open)?;
        let next = FIRST.saturating_mul(self.steps(now).saturating_add(1).min(u32::MAX.into()) as u32);
        Some((begun + next).saturating_sub(now))
    }

    /// How long these bytes, which are on their way before the newest frame, will take to arrive, beyond the time that the path takes in
    /// any case. Before anything has arrived: how long it is on its way already.
    pub fn ahead(&self, now: Duration, bytes: u64) -> Duration {
        if self.round_trip == Duration::MAX {
            return now.saturating_sub(self.begun.unwrap_or(now)).max(AHEAD_FIRST);
        }
        // Where the source is what limits, what arrives says nothing about what the path could drain, but at least so much it does.
        let rate = self.drains.unwrap_or(0.0).max(self.rate.unwrap_or(0.0));
        let takes = if rate > 0.0 {
            Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(Duration::MAX)
        } else {
            BUFFERED.mul_f64((bytes as f64 / self.limit(now) as f64).min(1.0))
        };
        takes.saturating_sub(self.round_trip)
    }

    /// A receipt tells how fast the path drains, if what it is for was on its way already when the one before it arrived.
    fn drain(&mut self, now: Duration, bytes: u64, travelled: Duration) {
        let before = self.receipt_at.replace(now);
        let sent_at = now.saturating_sub(travelled);
        let Some(before) = before.filter(|&before| sent_at + self.round_trip < before) else { return };
        self.drained = (self.drained.0 + bytes, self.drained.1 + now.saturating_sub(before));
        if self.drained.1 >= DRAIN_INTERVAL {
            let sample = self.drained.0 as f64 / self.drained.1.as_secs_f64();
            self.drains = Some(self.drains.map_or(sample, |old| f64::midpoint(old, sample)));
            self.drained = (0, Duration::ZERO);
        }
    }

    /// Takes note of a receipt: `bytes` were delivered, sent `travelled` ago. `idle` says that nothing is under way any more,
    /// so that the time until the next receipt says nothing about the link.
    pub fn on_receipt(&mut self, now: Duration, bytes: u64, travelled: Duration, idle: bool) {
        self.round_trip = self.round_trip.min(travelled);
        self.drain(now, bytes, travelled);
        self.acked += bytes;
        let elapsed = now.saturating_sub(self.since);
        if elapsed >= INTERVAL {
            let sample = self.acked as f64 / elapsed.as_secs_f64();
            // A rise is believed at once, a fall by halves: a receiver that faults memory in delivers in bursts.
            let rate =
                self.rate.map_or(sample, |old| if sample > old { sample } else { (old + sample) / 2.0 });
            self.rate = Some(rate);
            let time = BUFFERED.max(self.round_trip.saturating_mul(2).min(Duration::from_secs(2)));
            self.limit = ((rate * time.as_secs_f64()) as u64).min(BYTES_MAX).max(self.least);
            self.restart(now);
        } else if idle {
            self.restart(now);
        }
    }

    /// Sending starts again after a pause.
    pub fn restart(&mut self, now: Duration) {
        self.begun.get_or_insert(now);
        self.since = now;
        self.acked = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carrier::WINDOW_BYTES_MIN;

    const SECOND: Duration = Duration::from_secs(1);

    fn limit(window: &Window) -> u64 {
        window.limit(SECOND)
    }

    fn steady(bytes_per_ms: u64) -> Window {
        let mut window = Window::new(WINDOW_BYTES_MIN, 1, false);
        for ms in 1..1000 {
            window.on_receipt(Duration::from_millis(ms), bytes_per_ms, Duration::from_millis(1), false);
        }
        window
    }

    #[test]
    fn bounded_by_time_at_every_rate() {
        // 1 Gbit/s: 125 kB a millisecond, so 50 ms are 6.25 MB.
        assert!((6_000_000..6_600_000).contains(&limit(&steady(125_000))), "{}", limit(&steady(125_000)));
        assert_eq!(limit(&steady(10)), WINDOW_BYTES_MIN);
        assert_eq!(limit(&steady(10_000_000)), BYTES_MAX);
    }

    #[test]
    fn a_long_path_gets_two_round_trips() {
        let mut window = Window::new(WINDOW_BYTES_MIN, 1, false);
        for ms in 1..1000 {
            window.on_receipt(Duration::from_millis(ms), 125_000, Duration::from_millis(100), false);
        }
        assert!((24_000_000..26_500_000).contains(&window.limit(SECOND)), "{}", window.limit(SECOND));
    }

    #[test]
    fn little_is_under_way_before_anything_is_known_and_more_with_time() {
        let at = Duration::from_millis;
        let mut window = Window::new(WINDOW_BYTES_MIN, 1, false);
        assert_eq!(window.limit(at(5)), FIRST_BYTES);
        window.restart(at(5));
        window.restart(at(20));
        assert_eq!((window.limit(at(29)), window.opens_in(at(29))), (FIRST_BYTES, Some(at(1))));
        assert_eq!((window.limit(at(30)), window.opens_in(at(30))), (2 * FIRST_BYTES, Some(FIRST)));
        assert_eq!(window.limit(at(105)), 5 * FIRST_BYTES);
        // Streams begin with a part each, and no less than there is in any case.
        assert_eq!(Window::new(WINDOW_BYTES_MIN, 2, false).limit(at(0)), FIRST_BYTES / 2);
        assert_eq!(Window::new(WINDOW_BYTES_MIN, 200, false).limit(at(0)), WINDOW_BYTES_MIN);
        // The first rate ends it.
        window.on_receipt(at(30), 20 << 20, at(1), false);
        assert_eq!((window.limit(at(31)), window.opens_in(at(31))), (BYTES_MAX, None));
        // A carrier that needs more has it, and so has a stream that need not be careful.
        assert_eq!(Window::new(WINDOW_BYTES_MIN, 1, true).limit(at(0)), UNKNOWN_BYTES);
        assert_eq!(Window::new(3 << 20, 1, false).limit(at(0)), 3 << 20);
    }

    #[test]
    fn what_is_ahead_takes_as_long_as_the_path_drains() {
        let at = Duration::from_millis;
        let mut window = Window::new(WINDOW_BYTES_MIN, 1, false);
        window.restart(at(1));
        // Nothing is known yet, and longer and longer nothing comes.
        assert_eq!((window.ahead(at(2), 0), window.ahead(at(50), 0)), (AHEAD_FIRST, at(49)));
        // 125 kB a millisecond, all of it on its way 5 ms before it arrives; the path takes 1 ms.
        window.on_receipt(at(52), 125_000, at(1), false);
        for ms in 53..100 {
            window.on_receipt(at(ms), 125_000, at(5), false);
        }
        assert_eq!(window.ahead(at(100), 125_000 * 11), at(10));
        assert_eq!(window.ahead(at(100), 100_000), at(0));
        // Now the source sends less than the path could carry: what arrives tells nothing.
        for ms in 100..200 {
            window.on_receipt(at(ms), 1_000, at(1), true);
        }
        assert_eq!(window.ahead(at(200), 125_000 * 11), at(10));
        // A path that has become slow.
        for ms in (200..300).step_by(10) {
            window.on_receipt(at(ms), 125_000, at(50), false);
        }
        assert!((90..=110).contains(&window.ahead(at(300), 1_375_000).as_millis()));
    }
}
