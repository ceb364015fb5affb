//! Auto-converge: how much time to take from the vCPUs of a guest that writes faster than it is copied.
//!
//! Pure: what was dirtied and what was delivered come in, percentages go out. It does not grope in blind steps: the share of
//! time that a vCPU keeps is scaled by what the link carries over what is dirtied. A guest whose writes follow its time
//! is there after one step; one that catches up on what it missed, or whose writes to one page counted once in a long round and count
//! more often in a short one, takes a few. A guest that converges by itself keeps all its time.

/// Dirtying is aimed at this share of what is delivered: every round then leaves about half of what the one before left.
const AIM: f64 = 0.5;
/// A remainder that is this share of the one before, or less, is converging.
const CONVERGING: f64 = 0.75;
/// A step leaves a vCPU at least this share of the time it had, and at most [`STEP_MOST`]: measurements of a single round are rough.
const STEP_LEAST: f64 = 0.25;
/// See [`STEP_LEAST`].
const STEP_MOST: f64 = 0.9;
/// The most that may be taken, in percent.
pub const PERCENT_MAX: u8 = 99;

/// What is known after a round.
#[derive(Clone, Copy, Debug)]
pub struct Round<'a> {
    /// Logical bytes that remain.
    pub remaining: u64,
    /// Logical bytes that the guest dirtied in this round, each page counted once.
    pub dirtied: u64,
    /// How long the round took, in microseconds.
    pub us: u64,
    /// Logical bytes a second that are delivered.
    pub delivered_per_s: u64,
    /// Pages that each vCPU dirtied in this round, where that is known; only their proportions count.
    pub by_vcpu: Option<&'a [u64]>,
}

/// The throttle of one migration.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    /// The share of its time that each vCPU keeps, 1 for all; a single one where it is not known which vCPU dirties what.
    shares: Vec<f64>,
    remaining_before: Option<u64>,
}

impl Throttle {
    /// Takes in a round after which the guest is not yet stopped; returns the percentage to take from each vCPU, or a single one
    /// for all of them, where it changed. `percent_max` is the most that may be taken.
    pub fn on_round(&mut self, round: Round<'_>, percent_max: u8) -> Option<Vec<u8>> {
        let before = self.remaining_before.replace(round.remaining)?;
        let dirtied_per_s = round.dirtied as f64 * 1e6 / round.us.max(1) as f64;
        let aim = round.delivered_per_s as f64 * AIM;
        // Nothing delivered says that the streams are stuck, which no guest is to blame for.
        if round.remaining as f64 <= before as f64 * CONVERGING || dirtied_per_s <= aim || aim == 0.0 {
            return None;
        }
        let old = self.percents();
        let least = least_share(percent_max);
        match round.by_vcpu.filter(|pages| pages.iter().any(|&pages| pages != 0)) {
            None => {
                let tightest = self.shares.iter().copied().fold(1.0, f64::min);
                self.shares = vec![step(tightest, aim / dirtied_per_s, least)];
            }
            Some(pages) => {
                let sum: u64 = pages.iter().sum();
                let rates: Vec<f64> =
                    pages.iter().map(|&pages| dirtied_per_s * pages as f64 / sum as f64).collect();
                let level = level(&rates, aim);
                if self.shares.len() != rates.len() {
                    let tightest = self.shares.iter().copied().fold(1.0, f64::min);
                    self.shares = vec![tightest; rates.len()];
                }
                for (share, rate) in self.shares.iter_mut().zip(rates) {
                    if rate > level {
                        *share = step(*share, level / rate, least);
                    }
                }
            }
        }
        let new = self.percents();
        (new != old).then_some(new)
    }

    /// The percentage that is taken from each vCPU, or from all; empty before any is.
    pub fn percents(&self) -> Vec<u8> {
        self.shares.iter().map(|share| ((1.0 - share) * 100.0).round() as u8).collect()
    }

    /// From now on at most `percent_max` is taken; returns the percentages as [`Self::on_round`] does, where more was.
    pub fn limit(&mut self, percent_max: u8) -> Option<Vec<u8>> {
        let old = self.percents();
        let least = least_share(percent_max);
        self.shares.iter_mut().for_each(|share| *share = share.max(least));
        let new = self.percents();
        (new != old).then_some(new)
    }

    /// Forgets everything: nothing is taken any more.
    pub fn release(&mut self) {
        *self = Self::default();
    }
}

/// What a vCPU keeps at least.
fn least_share(percent_max: u8) -> f64 {
    1.0 - f64::from(percent_max.min(PERCENT_MAX)) / 100.0
}

/// A vCPU's share of time after a step by `factor`.
fn step(share: f64, factor: f64, least: f64) -> f64 {
    (share * factor.clamp(STEP_LEAST, STEP_MOST)).max(least)
}

/// The rate that, with every higher one brought down to it, makes the sum of rates `aim`: so those who dirty little keep their time.
fn level(rates: &[f64], aim: f64) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut left = aim;
    for (i, &rate) in sorted.iter().enumerate() {
        let even = left / (sorted.len() - i) as f64;
        if rate >= even {
            return even;
        }
        left -= rate;
    }
    f64::INFINITY
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn those_who_dirty_little_keep_their_time() {
        let mut throttle = Throttle::default();
        let round = |remaining, by_vcpu| Round {
            remaining,
            dirtied: 400 << 20,
            us: 1_000_000,
            delivered_per_s: 200 << 20,
            by_vcpu,
        };
        assert_eq!(
            throttle.on_round(round(1 << 30, Some(&[1000, 10, 1000])), 99),
            None,
            "nothing to compare with"
        );
        let percents = throttle.on_round(round(1 << 30, Some(&[1000, 10, 1000])), 99).unwrap();
        assert!(
            percents[1] == 0 && percents[0] == percents[2] && (70..80).contains(&percents[0]),
            "{percents:?}"
        );
        // Which vCPU it was is not known any more: what held for the worst holds for all.
        let percents = throttle.on_round(round(1 << 30, None), 90).unwrap();
        assert_eq!(percents, [90]);
        assert_eq!(throttle.on_round(round(1 << 30, None), 90), None, "it is at its most");
        assert_eq!(throttle.limit(95), None, "more may be taken, and is not");
        assert_eq!(throttle.limit(40), Some(vec![40]));
        assert_eq!(throttle.percents(), [40]);
        throttle.release();
        assert!(throttle.percents().is_empty());
    }

    #[test]
    fn a_converging_guest_is_left_alone() {
        let mut throttle = Throttle::default();
        for i in 0..20 {
            let remaining = (1u64 << 30) >> i;
            let round = Round {
                remaining,
                dirtied: remaining,
                us: 1_000_000,
                delivered_per_s: 1 << 28,
                by_vcpu: None,
            };
            assert_eq!(throttle.on_round(round, 99), None);
        }
    }

    proptest! {
        /// A guest that dirties up to twenty times what the link carries, of a working set of whatever size, is caught within some
        /// rounds, also when it catches up on some of what it misses.
        #[test]
        fn a_stalled_guest_is_caught(
            rate in 50e6f64..2e9,
            times in 0.6f64..20.0,
            working_set in 50_000_000u64..4_000_000_000,
            spare in 0.3f64..1.0,
            vcpus in prop::option::of(prop::collection::vec(1u64..1000, 1..8)),
        ) {
            let mut throttle = Throttle::default();
            let fits = (rate * 0.3) as u64;
            let mut remaining = working_set * 2;
            let mut rounds = 0;
            while remaining > fits {
                let seconds = remaining as f64 / rate;
                // With `spare` of its time it writes as much as with all of it.
                let percents = throttle.percents();
                let pages = vcpus.clone().unwrap_or_else(|| vec![1]);
                let sum: u64 = pages.iter().sum();
                let written: Vec<f64> = pages.iter().enumerate().map(|(i, &pages)| {
                    let percent = percents.get(i).or(percents.first()).copied().unwrap_or(0);
                    let share = ((100 - percent) as f64 / 100.0 / spare).min(1.0);
                    rate * times * share * pages as f64 / sum as f64 * seconds
                }).collect();
                let all: f64 = written.iter().sum();
                let dirtied = (all as u64).min(working_set);
                remaining = dirtied;
                let by_vcpu: Vec<u64> = written.iter().map(|&bytes| bytes as u64 / 4096).collect();
                throttle.on_round(Round {
                    remaining,
                    dirtied,
                    us: (seconds * 1e6) as u64,
                    delivered_per_s: rate as u64,
                    by_vcpu: vcpus.as_ref().map(|_| &by_vcpu[..]),
                }, 99);
                rounds += 1;
                prop_assert!(rounds < 40, "{:?}", throttle.percents());
            }
        }

        /// Whatever comes in: no panic, and never more than allowed.
        #[test]
        fn keeps_to_the_most(
            rounds in prop::collection::vec(any::<(u64, u64, u64, u64, Option<Vec<u64>>)>(), 1..30),
            most in 0u8..=255,
        ) {
            let mut throttle = Throttle::default();
            for (remaining, dirtied, us, delivered_per_s, pages) in rounds {
                let pages = pages.map(|pages| pages.into_iter().map(|p| p >> 8).take(64).collect::<Vec<_>>());
                let round = Round { remaining, dirtied, us, delivered_per_s, by_vcpu: pages.as_deref() };
                if let Some(percents) = throttle.on_round(round, most) {
                    prop_assert!(percents.iter().all(|&p| p <= most.min(PERCENT_MAX)));
                }
            }
        }
    }
}
