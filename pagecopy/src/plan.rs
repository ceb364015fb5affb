//! What a migration would come to: rounds, time, downtime and bytes, from how a guest was seen to dirty its memory.
//!
//! Pure. The guest is a curve: how many distinct pages it dirties within a time. That it grows ever more slowly, because a guest writes
//! the same pages again, is what lets precopy end at all; a single rate would not tell.

use crate::layout::PAGE_SIZE;

/// Most rounds that are played through.
const ROUNDS_MAX: u32 = 1000;
/// A round that leaves more than this share of what the one before left, in percent, comes no nearer the end.
const STANDSTILL_PERCENT: u64 = 99;

/// How many distinct pages a guest dirties within a time.
#[derive(Clone, Debug)]
pub struct DirtyCurve {
    /// (Microseconds, pages), both rising, from (0, 0).
    points: Vec<(u64, u64)>,
    pages_max: u64,
}

impl DirtyCurve {
    /// Of a guest with `pages_max` pages that was seen to have dirtied so many pages after so many microseconds, in rising order.
    pub fn new(seen: impl IntoIterator<Item = (u64, u64)>, pages_max: u64) -> Self {
        let mut points = vec![(0, 0)];
        for (us, pages) in seen {
            let &(last_us, last_pages) = points.last().expect("it is never empty");
            if us > last_us {
                points.push((us, pages.max(last_pages)));
            }
        }
        Self { points, pages_max }
    }

    /// Pages dirtied within `us`; beyond what was seen, it goes on as it went last.
    pub fn pages_in(&self, us: u64) -> u64 {
        let after = self.points.partition_point(|&(at, _)| at < us).min(self.points.len() - 1);
        let Some((from_us, from)) = after.checked_sub(1).map(|i| self.points[i]) else { return 0 };
        let (to_us, to) = self.points[after];
        let more =
            u128::from(to - from) * u128::from(us.saturating_sub(from_us)) / u128::from(to_us - from_us);
        u64::try_from(more).unwrap_or(u64::MAX).saturating_add(from).min(self.pages_max)
    }

    /// The same guest with `percent` of its time taken from it.
    fn throttled(&self, percent: u8) -> Self {
        let keeps = 100 - u64::from(percent.min(99));
        let points = self.points.iter().map(|&(us, pages)| (us * 100 / keeps, pages)).collect();
        Self { points, ..*self }
    }
}

/// What is to be planned for.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// Bytes that the first pass sends.
    pub present_bytes: u64,
    /// Bytes a second that the link delivers.
    pub bytes_per_s: u64,
    /// The downtime aimed for, in microseconds.
    pub downtime_us: u64,
    /// How long the state of the devices takes, in microseconds.
    pub state_time_us: u64,
}

/// What a migration would come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// It would switch over by itself.
    pub converges: bool,
    /// Rounds until then, or until it comes no nearer the end.
    pub rounds: u32,
    /// Time until then, the downtime included, in microseconds.
    pub total_us: u64,
    /// The downtime of switching over then, in microseconds.
    pub downtime_us: u64,
    /// Bytes sent by then.
    pub bytes: u64,
}

/// Plays a migration through.
pub fn forecast(curve: &DirtyCurve, aim: Aim) -> Forecast {
    let rate = aim.bytes_per_s.max(1);
    let time =
        |bytes: u64| u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(rate)).unwrap_or(u64::MAX);
    let (mut left, mut total_us, mut bytes, mut rounds) = (aim.present_bytes, 0u64, 0u64, 0);
    loop {
        rounds += 1;
        let us = time(left);
        (total_us, bytes) = (total_us.saturating_add(us), bytes.saturating_add(left));
        let dirtied = curve.pages_in(us).saturating_mul(PAGE_SIZE as u64);
        let downtime_us = time(dirtied).saturating_add(aim.state_time_us);
        let converges = rounds >= 2 && downtime_us <= aim.downtime_us;
        let stands = rounds >= 2 && dirtied >= left / 100 * STANDSTILL_PERCENT;
        if converges || stands || rounds == ROUNDS_MAX {
            return Forecast {
                converges,
                rounds,
                total_us: total_us.saturating_add(downtime_us),
                downtime_us,
                bytes: bytes.saturating_add(dirtied),
            };
        }
        left = dirtied;
    }
}

/// What would let a migration end that does not by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remedies {
    /// The least downtime limit, in microseconds, at which it ends; never less than the one aimed for.
    pub downtime_us: u64,
    /// The least rate at which it ends, in bytes a second, found to a part in a thousand; `None`: none in reach.
    pub bytes_per_s: Option<u64>,
    /// The least throttle at which it ends, in percent, for a guest whose writes follow its time; `None`: not even the highest.
    pub throttle_percent: Option<u8>,
}

/// What would help, each by itself.
pub fn remedies(curve: &DirtyCurve, aim: Aim) -> Remedies {
    let ends = |curve: &DirtyCurve, aim: Aim| forecast(curve, aim).converges;
    let with_rate = |bytes_per_s| Aim { bytes_per_s, ..aim };
    let (mut too_slow, mut fast) = (aim.bytes_per_s.max(1), aim.bytes_per_s.max(1).saturating_mul(1000));
    let bytes_per_s = ends(curve, with_rate(fast)).then(|| {
        while fast - too_slow > fast / 1000 + 1 {
            let middle = too_slow + (fast - too_slow) / 2;
            if ends(curve, with_rate(middle)) {
                fast = middle;
            } else {
                too_slow = middle;
            }
        }
        fast
    });
    Remedies {
        downtime_us: forecast(curve, aim).downtime_us.max(aim.downtime_us),
        bytes_per_s,
        throttle_percent: (0..=99).find(|&percent| ends(&curve.throttled(percent), aim)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    /// A guest that writes so many pages a second, all different until it has written `set` of them.
    fn guest(pages_per_s: u64, set: u64) -> DirtyCurve {
        DirtyCurve::new((1..=30).map(|i| (i * 100_000, (pages_per_s * i / 10).min(set))), 1 << 20)
    }

    #[test]
    fn the_curve_goes_through_what_was_seen_and_on() {
        let curve = DirtyCurve::new([(1_000, 10), (2_000, 14), (2_000, 99), (4_000, 12)], 1000);
        for (us, pages) in
            [(0, 0), (500, 5), (1_000, 10), (1_500, 12), (2_000, 14), (4_000, 14), (1 << 40, 14)]
        {
            assert_eq!(curve.pages_in(us), pages, "{us}");
        }
        assert_eq!(DirtyCurve::new([(10, 10)], 1000).pages_in(500), 500);
        assert_eq!(DirtyCurve::new([(10, 10)], 1000).pages_in(u64::MAX), 1000);
        assert_eq!(DirtyCurve::new([], 1000).pages_in(5), 0);
    }

    #[test]
    fn plays_a_migration_through() {
        let aim =
            Aim { present_bytes: 1 << 30, bytes_per_s: 1 << 27, downtime_us: 300_000, state_time_us: 5_000 };
        // A quarter of what the link carries: 8 s, 2 s, 0.5 s, and an eighth of a second is left.
        let quarter = forecast(&guest((1 << 25) / PAGE, u64::MAX), aim);
        assert!(quarter.converges && quarter.rounds == 3, "{quarter:?}");
        assert!((129_000..131_000).contains(&quarter.downtime_us), "{quarter:?}");
        // Twice of it, over and over in 512 MiB, which take 4 s: that is the downtime it would take.
        let curve = guest((1 << 28) / PAGE, (1 << 29) / PAGE);
        let never = forecast(&curve, aim);
        assert!(!never.converges && (4_000_000..4_100_000).contains(&never.downtime_us), "{never:?}");
        let help = remedies(&curve, aim);
        assert!((4_000_000..4_100_000).contains(&help.downtime_us), "{help:?}");
        // It dirties twice the link's rate: half of its time is just too much, a link a little faster than it just enough.
        assert!(help.throttle_percent.is_some_and(|percent| (50..56).contains(&percent)), "{help:?}");
        assert!(
            help.bytes_per_s.is_some_and(|rate| (1 << 28..(1 << 28) * 11 / 10).contains(&rate)),
            "{help:?}"
        );
        assert!(forecast(&curve, Aim { downtime_us: help.downtime_us, ..aim }).converges);
    }

    proptest! {
        /// Whatever the guest: it ends, what is said to help does, and a faster link never does harm.
        #[test]
        fn what_is_said_to_help_helps(
            pages_per_s in 0u64..1 << 22,
            set in 1u64..1 << 22,
            present_bytes in 0u64..1 << 42,
            bytes_per_s in 1u64..1 << 36,
            downtime_us in 0u64..10_000_000,
        ) {
            let curve = guest(pages_per_s, set);
            let aim = Aim { present_bytes, bytes_per_s, downtime_us, state_time_us: 5_000 };
            let help = remedies(&curve, aim);
            let longer = forecast(&curve, Aim { downtime_us: help.downtime_us, ..aim });
            prop_assert!(longer.converges, "{:?}", longer);
            if let Some(bytes_per_s) = help.bytes_per_s {
                let faster = forecast(&curve, Aim { bytes_per_s, ..aim });
                prop_assert!(faster.converges, "{:?}", faster);
            }
            if let Some(percent) = help.throttle_percent {
                prop_assert!(forecast(&curve.throttled(percent), aim).converges);
            }
        }
    }
}
