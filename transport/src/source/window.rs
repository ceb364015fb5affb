//! How much may be under way on a stream: rule 7, buffers are bounded by a time, not by a size.

use std::time::Duration;

/// Data under way is bounded to what the stream delivers in this time.
const BUFFERED: Duration = Duration::from_millis(50);
/// Until the rate is known, but for no longer than this ...
const FIRST: Duration = Duration::from_millis(30);
/// ... only so much is under way, so that little was sent as it is when the link turns out to be worth compression, ...
const FIRST_BYTES: u64 = 1 << 20;
/// ... and from then on what a 1 Gbit/s link carries in about 50 ms: the path is a long one.
const UNKNOWN_BYTES: u64 = 4 << 20;
/// Never more than this.
const BYTES_MAX: u64 = 64 << 20;
/// Delivery rate is measured over intervals of at least this.
const INTERVAL: Duration = Duration::from_millis(10);

/// The window of one stream: pure; time comes in.
#[derive(Clone, Debug)]
pub(crate) struct Window {
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
    round_trip: Duration,
}

impl Window {
    /// A window that is never less than `least` bytes; with `open`, there is no need to begin with little.
    pub(crate) fn new(least: u64, open: bool) -> Self {
        Self {
            rate: None,
            since: Duration::ZERO,
            acked: 0,
            least,
            limit: 0,
            begun: None,
            open,
            round_trip: Duration::MAX,
        }
    }

    /// Bytes that may be under way.
    pub(crate) fn limit(&self, now: Duration) -> u64 {
        match (self.rate, self.opens_in(now)) {
            (Some(_), _) => self.limit,
            (None, Some(_)) => FIRST_BYTES.max(self.least),
            (None, None) => UNKNOWN_BYTES.max(self.least),
        }
    }

    /// How long it is until more may be under way though no receipt has come.
    pub(crate) fn opens_in(&self, now: Duration) -> Option<Duration> {
        let elapsed = now.saturating_sub(self.begun.unwrap_or(now));
        let waits = self.rate.is_none() && !self.open;
        FIRST.checked_sub(elapsed).filter(|left| waits && !left.is_zero())
    }

    /// Takes note of a receipt: `bytes` were delivered, sent `travelled` ago. `idle` says that nothing is under way any more,
    /// so that the time until the next receipt says nothing about the link.
    pub(crate) fn on_receipt(&mut self, now: Duration, bytes: u64, travelled: Duration, idle: bool) {
        self.round_trip = self.round_trip.min(travelled);
        self.acked += bytes;
        let elapsed = now.saturating_sub(self.since);
        if elapsed >= INTERVAL {
            let sample = self.acked as f64 / elapsed.as_secs_f64();
            // A rise is believed at once, a fall by halves: a receiver that faults memory in delivers in bursts.
            let rate =
                self.rate.map_or(sample, |old| if sample > old { sample } else { (old + sample) / 2.0 });
            self.rate = Some(rate);
            let time = BUFFERED.max(self.round_trip.saturating_mul(2).min(Duration::from_secs(2)));
            self.limit = ((rate * time.as_secs_f64()) as u64).clamp(self.least, BYTES_MAX);
            self.restart(now);
        } else if idle {
            self.restart(now);
        }
    }

    /// Sending starts again after a pause.
    pub(crate) fn restart(&mut self, now: Duration) {
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
        let mut window = Window::new(WINDOW_BYTES_MIN, false);
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
        let mut window = Window::new(WINDOW_BYTES_MIN, false);
        for ms in 1..1000 {
            window.on_receipt(Duration::from_millis(ms), 125_000, Duration::from_millis(100), false);
        }
        assert!((24_000_000..26_500_000).contains(&window.limit(SECOND)), "{}", window.limit(SECOND));
    }

    #[test]
    fn little_is_under_way_before_anything_is_known_but_not_for_long() {
        let at = Duration::from_millis;
        let mut window = Window::new(WINDOW_BYTES_MIN, false);
        assert_eq!(window.limit(at(5)), FIRST_BYTES);
        window.restart(at(5));
        window.restart(at(20));
        assert_eq!((window.limit(at(34)), window.opens_in(at(34))), (FIRST_BYTES, Some(at(1))));
        assert_eq!((window.limit(at(35)), window.opens_in(at(35))), (UNKNOWN_BYTES, None));
        // The first rate ends it.
        window.on_receipt(at(30), 20 << 20, at(1), false);
        assert_eq!((window.limit(at(31)), window.opens_in(at(31))), (BYTES_MAX, None));
        // A carrier that needs more has it, and so has a stream that need not be careful.
        assert_eq!(Window::new(WINDOW_BYTES_MIN, true).limit(at(0)), UNKNOWN_BYTES);
        assert_eq!(Window::new(2 << 20, false).limit(at(0)), 2 << 20);
    }
}
