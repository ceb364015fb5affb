//! How much may be under way on a stream: rule 7, buffers are bounded by a time, not by a size.

use std::time::Duration;

/// Data under way is bounded to what the stream delivers in this time.
const BUFFERED: Duration = Duration::from_millis(50);
/// Never less than this: two whole chunks, so that one can be built while the other travels.
pub(crate) const BYTES_MIN: u64 = 768 << 10;
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
    limit: u64,
    round_trip: Duration,
}

impl Window {
    /// A window that is never less than `least` bytes.
    pub(crate) fn new(least: u64) -> Self {
        // Until something is measured: what a 1 Gbit/s link carries in 50 ms is about this.
        Self { rate: None, since: Duration::ZERO, acked: 0, least, limit: 4 << 20, round_trip: Duration::MAX }
    }

    /// Bytes that may be under way.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
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
        self.since = now;
        self.acked = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(bytes_per_ms: u64) -> Window {
        let mut window = Window::new(BYTES_MIN);
        for ms in 1..1000 {
            window.on_receipt(Duration::from_millis(ms), bytes_per_ms, Duration::from_millis(1), false);
        }
        window
    }

    #[test]
    fn bounded_by_time_at_every_rate() {
        // 1 Gbit/s: 125 kB a millisecond, so 50 ms are 6.25 MB.
        assert!((6_000_000..6_600_000).contains(&steady(125_000).limit()), "{}", steady(125_000).limit());
        assert_eq!(steady(10).limit(), BYTES_MIN);
        assert_eq!(steady(10_000_000).limit(), BYTES_MAX);
    }

    #[test]
    fn a_long_path_gets_two_round_trips() {
        let mut window = Window::new(BYTES_MIN);
        for ms in 1..1000 {
            window.on_receipt(Duration::from_millis(ms), 125_000, Duration::from_millis(100), false);
        }
        assert!((24_000_000..26_500_000).contains(&window.limit()), "{}", window.limit());
    }
}
