//! How fast messages must come and go.

use std::time::Duration;

/// Slowest that a message may come or be taken, once the time-out is over: a control connection lasts no longer than this allows while it
/// carries less than whole messages.
const RATE_MIN: usize = 128 << 10;
/// Bytes that are read or written at a time.
pub(super) const PIECE: usize = 64 << 10;

/// Longest that a message may take which is no dead peer's.
pub(super) fn time_for(len: usize, timeout: Duration) -> Duration {
    timeout + Duration::from_secs_f64(len as f64 / RATE_MIN as f64)
}
