//! A dry run: watches a guest for a while and says what moving it would come to. Nothing is sent.

use std::time::{Duration, Instant};

use pagecopy::backend::BackendError;
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::plan::{Aim, DirtyCurve, forecast, remedies};
use serde::{Deserialize, Serialize};

use super::source::{SourceBackend, state_time};

/// Shortest time between two looks at what was dirtied; the first ones are this far apart, later ones farther.
const LOOK: Duration = Duration::from_millis(50);

/// What moving a guest would come to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Plan {
    /// How long the guest was watched, in milliseconds.
    pub watched_ms: f64,
    /// Pages that hold data.
    pub present_pages: u64,
    /// Distinct pages that it dirtied while it was watched.
    pub dirtied_pages: u64,
    /// Pages a second that it dirtied at first, before it came to write the same ones again.
    pub dirty_pages_per_s: f64,
    /// The link's rate that was planned with, in bytes a second.
    pub link_bytes_per_s: u64,
    /// The downtime that was aimed for, in milliseconds.
    pub downtime_limit_ms: u64,
    /// It would switch over by itself.
    pub converges: bool,
    /// Rounds until then, or until the remainder stops shrinking.
    pub rounds: u32,
    /// Time until then, in milliseconds.
    pub total_ms: f64,
    /// The downtime then, in milliseconds.
    pub downtime_ms: f64,
    /// Bytes on the wire until then, without deltas and compression.
    pub wire_bytes: u64,
    /// What would let it switch over, where it does not by itself; each by itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub helps: Option<Helps>,
}

/// See [`Plan::helps`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Helps {
    /// A downtime limit of so many milliseconds.
    pub downtime_limit_ms: u64,
    /// A link of so many bytes a second.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub link_bytes_per_s: Option<u64>,
    /// Auto-converge, which would come to about so many percent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub throttle_percent: Option<u8>,
}

/// Watches the guest for `time`, with its dirty log on, and plans for a link of `link_bytes_per_s`.
pub(super) fn plan(
    backend: &SourceBackend,
    time: Duration,
    link_bytes_per_s: u64,
    downtime_limit_ms: u64,
) -> Result<Plan, BackendError> {
    backend.log.start()?;
    let watched = watch(backend, time);
    // Whatever came of it, the guest is not to be slowed down by a log that nobody reads.
    let stopped = backend.log.stop();
    let seen = watched?;
    stopped?;
    let present_pages = super::populated(&*backend.ram)?.count();
    let curve = DirtyCurve::new(seen.iter().copied(), backend.ram.layout().pages());
    let aim = Aim {
        present_bytes: present_pages * PAGE_SIZE as u64,
        bytes_per_s: link_bytes_per_s,
        downtime_us: downtime_limit_ms.saturating_mul(1000),
        state_time_us: state_time(backend).as_micros() as u64,
    };
    let come_to = forecast(&curve, aim);
    let helps = (!come_to.converges).then(|| {
        let helps = remedies(&curve, aim);
        Helps {
            downtime_limit_ms: helps.downtime_us.div_ceil(1000),
            link_bytes_per_s: helps.bytes_per_s,
            throttle_percent: helps.throttle_percent,
        }
    });
    let (us, dirtied_pages) = seen.last().copied().unwrap_or((0, 0));
    Ok(Plan {
        watched_ms: us as f64 / 1e3,
        present_pages,
        dirtied_pages,
        dirty_pages_per_s: pages_per_s(&seen),
        link_bytes_per_s,
        downtime_limit_ms,
        converges: come_to.converges,
        rounds: come_to.rounds,
        total_ms: come_to.total_us as f64 / 1e3,
        downtime_ms: come_to.downtime_us as f64 / 1e3,
        wire_bytes: come_to.bytes,
        helps,
    })
}

/// How fast it dirties pages before it comes back to those that it has written: the highest mean from the start on. A look by itself
/// may fall into a pause.
fn pages_per_s(seen: &[(u64, u64)]) -> f64 {
    seen.iter().map(|&(us, pages)| pages as f64 * 1e6 / us.max(1) as f64).fold(0.0, f64::max)
}

/// What was dirtied by when: (microseconds, distinct pages).
fn watch(backend: &SourceBackend, time: Duration) -> Result<Vec<(u64, u64)>, BackendError> {
    // Never cleared: what was written once is reported once.
    let dirty = PageBitmap::new(backend.ram.layout().chunks());
    let begun = Instant::now();
    let (mut seen, mut pause) = (Vec::new(), LOOK);
    loop {
        std::thread::sleep(pause.min(time.saturating_sub(begun.elapsed())));
        backend.log.sync(&dirty)?;
        let elapsed = begun.elapsed();
        seen.push((elapsed.as_micros() as u64, dirty.count()));
        if elapsed >= time {
            return Ok(seen);
        }
        pause = pause * 5 / 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_pauses_at_first_writes_all_the_same() {
        assert_eq!(pages_per_s(&[(20_000, 0), (50_000, 100), (1_000_000, 400)]), 2000.0);
        assert_eq!(pages_per_s(&[(20_000, 100), (1_000_000, 100)]), 5000.0);
        assert_eq!(pages_per_s(&[]), 0.0);
    }
}
