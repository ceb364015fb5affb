//! How much of what nobody asked for may be under way: as little as keeps the path busy, for whoever asks for a page that is under
//! way, or whose answer shares the path, waits for it.

use std::time::Duration;

use pagecopy::layout::{CHUNK_PAGES, PAGE_SIZE};

/// A frame takes about this long on its way.
const FRAME_TIME: Duration = Duration::from_millis(1);
/// Fewest pages that a frame has room for as they are, unless there are no more.
const FRAME_PAGES_MIN: u32 = 8;
/// A frame has at most this many times the pages that it has room for as they are, however well pages shrink: the next may not.
const SHRINK_MAX: f64 = 4.0;
/// Weight of a new frame in the average of what a page takes.
const WEIGHT: f64 = 0.125;
/// The delivery rate is measured over intervals of at least this.
const INTERVAL: Duration = Duration::from_millis(5);
/// What a full window counts as.
const AHEAD: Duration = Duration::from_millis(20);
/// Never more than this is under way, in bytes.
const BYTES_MAX: u64 = 64 << 20;

/// The pace of one connection: pure; time comes in.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    /// Bytes a second.
    rate: f64,
    since: Duration,
    acked: u64,
    round_trip: Duration,
    /// What a page takes on the wire.
    page_bytes: f64,
}

impl Pace {
    pub(super) fn new(now: Duration) -> Self {
        Self { rate: 0.0, since: now, acked: 0, round_trip: Duration::MAX, page_bytes: PAGE_SIZE as f64 }
    }

    /// Most pages in a frame.
    pub(super) fn frame_pages(&self) -> u32 {
        let pages = self.frame_bytes() / self.page_bytes.max(PAGE_SIZE as f64 / SHRINK_MAX);
        (pages as u32).clamp(FRAME_PAGES_MIN, CHUNK_PAGES as u32)
    }

    /// Bytes that a frame should come to.
    fn frame_bytes(&self) -> f64 {
        let bytes = self.rate * FRAME_TIME.as_secs_f64();
        bytes.clamp(f64::from(FRAME_PAGES_MIN) * PAGE_SIZE as f64, (CHUNK_PAGES * PAGE_SIZE) as f64)
    }

    /// Takes note of a frame that is sent.
    pub(super) fn on_send(&mut self, pages: u32, bytes: u64) {
        let new = bytes as f64 / f64::from(pages.max(1));
        self.page_bytes += (new - self.page_bytes) * WEIGHT;
    }

    /// Bytes that may be under way: twice what the path carries in a round trip. One frame may be in any case.
    pub(super) fn limit(&self) -> u64 {
        let round_trip = self.round_trip.min(Duration::from_secs(2)).as_secs_f64();
        ((2.0 * self.rate * round_trip).max(2.0 * self.frame_bytes()) as u64).min(BYTES_MAX)
    }

    /// How long what is on its way waits, as what chooses the codec wants to know, when these bytes are before the newest frame. Little is
    /// under way here, so that requests pass: what there is room for beyond what the path carries counts as [`AHEAD`].
    pub(super) fn ahead(&self, bytes: u64) -> Duration {
        let path = self.rate * self.round_trip.min(Duration::from_secs(2)).as_secs_f64();
        let room = path.max(self.frame_bytes());
        AHEAD.mul_f64(((bytes as f64 - path) / room).clamp(0.0, 1.0))
    }

    /// Takes note of a receipt: `bytes` were delivered, sent `travelled` ago.
    pub(super) fn on_receipt(&mut self, now: Duration, bytes: u64, travelled: Duration) {
        self.round_trip = self.round_trip.min(travelled);
        self.acked += bytes;
        let elapsed = now.saturating_sub(self.since);
        if elapsed >= INTERVAL {
            let sample = self.acked as f64 / elapsed.as_secs_f64();
            // A rise is believed at once; a fall may be a busy moment of either host.
            self.rate = if sample > self.rate { sample } else { (7.0 * self.rate + sample) / 8.0 };
            self.restart(now);
        }
    }

    /// Sending starts again after a pause, whose length says nothing about the path.
    pub(super) fn restart(&mut self, now: Duration) {
        self.since = now;
        self.acked = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pace after a second on a path of so many bytes a millisecond and this round trip, always full.
    fn after(bytes_per_ms: u64, round_trip: Duration) -> Pace {
        let mut pace = Pace::new(Duration::ZERO);
        for ms in 1..1000 {
            pace.on_receipt(Duration::from_millis(ms), bytes_per_ms, round_trip);
        }
        pace
    }

    #[test]
    fn a_slow_path_gets_small_frames_and_few_of_them() {
        // 10 MB/s: 8 pages take 3 ms.
        let pace = after(10_000, Duration::from_millis(3));
        assert_eq!(pace.frame_pages(), FRAME_PAGES_MIN);
        assert_eq!(pace.limit(), 2 * 8 * 4096);
    }

    #[test]
    fn a_fast_path_gets_whole_chunks() {
        let pace = after(1_000_000, Duration::from_micros(100));
        assert_eq!(pace.frame_pages(), 64);
        assert_eq!(pace.limit(), 2 * 64 * 4096);
    }

    #[test]
    fn pages_that_shrink_make_a_frame_of_more_of_them_and_not_of_more_bytes() {
        let mut pace = after(10_000, Duration::from_millis(3));
        (0..100).for_each(|_| pace.on_send(8, 8 * 2000));
        assert_eq!(pace.frame_pages(), 16);
        (0..100).for_each(|_| pace.on_send(16, 80));
        assert_eq!((pace.frame_pages(), pace.limit()), (32, 2 * 8 * 4096));
        (0..100).for_each(|_| pace.on_send(32, 32 * 4096 + 80));
        assert_eq!(pace.frame_pages(), 8);
    }

    #[test]
    fn a_long_path_is_kept_full() {
        let pace = after(125_000, Duration::from_millis(100));
        assert!((24_900_000..=25_100_000).contains(&pace.limit()), "{}", pace.limit());
    }
}
