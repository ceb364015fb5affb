//! What the steps between sending pages as they are and compressing them hardest cost and save, on this memory.

use super::Step;

/// Steps that `auto` takes: level, with references, and what is assumed until it is measured: nanoseconds that a core takes for a byte,
/// and the share of the byte that is left. Source: `peers choose record` of the memory of a Linux guest (`make-guest-ram --kind heaps`),
/// times brought to those of an idle machine.
const STEPS: [(i32, bool, f64, f64); 7] = [
    (-7, false, 1.12, 0.480),
    (-3, false, 1.38, 0.404),
    (-1, false, 1.67, 0.364),
    (1, false, 1.90, 0.329),
    (1, true, 2.35, 0.272),
    (3, true, 3.25, 0.264),
    (6, true, 10.0, 0.255),
];
/// How many there are.
pub(super) const COUNT: usize = STEPS.len();
/// The step with which a session begins, when nothing is known.
pub(super) const FIRST: usize = 1;
/// The step by which it is tried whether anything shrinks again: one that finds most of what there is.
pub(super) const SEEK: usize = 3;
/// Weight of what a step makes of a chunk: over about as many as are under way, which evens out what differs from one to the next.
const WEIGHT_DATA: f64 = 1.0 / 32.0;
/// Weight of a trial of a step beside the one in use; they are few.
const WEIGHT_TRIED: f64 = 0.25;
/// A step that saves less than this of a chunk says nothing of others beside it; and none saves so many times as much as another.
const SAVES: f64 = 0.03;
const TIMES_MAX: f64 = 10.0;
/// A step is worth its place where it saves this much of a byte beyond the one before.
const WORTH: f64 = 0.005;

/// Cost and output for each byte, or factors of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Average {
    pub(super) nanos: f64,
    pub(super) out: f64,
}

impl Average {
    /// Pages as they are.
    pub(super) const RAW: Self = Self { nanos: 0.0, out: 1.0 };
    const ONE: Self = Self { nanos: 1.0, out: 1.0 };

    /// On the way to another, so far.
    pub(super) fn toward(self, other: Self, part: f64) -> Self {
        let mix = |from: f64, to: f64| from + (to - from) * part;
        Self { nanos: mix(self.nanos, other.nanos), out: mix(self.out, other.out) }
    }

    /// With what is saved in place of what is left.
    fn saved(self) -> Self {
        Self { nanos: self.nanos, out: (1.0 - self.out).max(0.0) }
    }

    fn times(self, other: Self) -> Self {
        Self { nanos: self.nanos * other.nanos, out: self.out * other.out }
    }

    /// How many times as much this is; what no measurement says, one that is off by 1000 and more, counts as that.
    fn over(self, other: Self) -> Self {
        let ratio = |this: f64, other: f64| (this / other.max(1e-9)).clamp(1e-3, 1e3);
        Self { nanos: ratio(self.nanos, other.nanos), out: ratio(self.out, other.out) }
    }
}

/// A part of the chunks goes by the heavier of two steps, the others by the lighter; `None`: as they are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Mix {
    pub(super) lighter: Option<usize>,
    pub(super) heavier: Option<usize>,
    /// Of the heavier.
    pub(super) part: f64,
}

impl Mix {
    pub(super) fn all(step: Option<usize>) -> Self {
        Self { lighter: step, heavier: step, part: 1.0 }
    }
}

/// What is known of the steps.
#[derive(Clone, Debug)]
pub(super) struct Ladder {
    /// How the data compares to what `STEPS` was measured on, lately: the same for every step. Of the output it is what is saved
    /// that is compared: what does not shrink saves nothing, by any step.
    data: Average,
    /// How often it was seen.
    data_seen: u32,
    /// How each step compares to what is assumed of it beside the others, whatever the data. It is learnt only from steps that compressed
    /// the same pages: from one chunk to the next data differs by more than steps do.
    steps: [Average; COUNT],
    /// The destination takes references.
    references: bool,
    /// Pages may go as they are.
    raw: bool,
}

/// A corner of what the steps can do: none is to be had that costs less and makes less of a byte.
pub(super) type Corner = (Option<usize>, Average);

impl Ladder {
    pub(super) fn new(raw: bool) -> Self {
        Self { data: Average::ONE, data_seen: 0, steps: [Average::ONE; COUNT], references: false, raw }
    }

    pub(super) fn refer(&mut self, references: bool) {
        self.references = references;
    }

    pub(super) fn refers(&self) -> bool {
        self.references
    }

    /// Whether a step can be taken.
    pub(super) fn has(&self, step: usize) -> bool {
        self.references || !STEPS[step].1
    }

    /// What a step costs and makes, as far as known.
    pub(super) fn estimate(&self, step: usize) -> Average {
        let Average { nanos, out } = assumed(step).times(self.steps[step]).times(self.data);
        Average { nanos, out: (1.0 - out).clamp(0.0, 1.0) }
    }

    /// Notes what a step made of some data.
    pub(super) fn see(&mut self, step: usize, new: Average) {
        self.data_seen = self.data_seen.saturating_add(1);
        let weight = WEIGHT_DATA.max(1.0 / f64::from(self.data_seen));
        let mut found = new.saved().over(assumed(step).times(self.steps[step]));
        if self.data_seen == 1 {
            // The compressor's own memory came in with it: what that took is no one else's time.
            found.nanos = self.data.nanos;
        }
        self.data = self.data.toward(found, weight);
    }

    /// Notes what a step that was tried made of the same pages as the one in use.
    pub(super) fn compare(&mut self, tried: usize, other: Average, used: usize, new: Average) {
        // other / new = assumed(tried) * steps[tried] / (assumed(used) * steps[used])
        let (other, new) = (other.saved(), new.saved());
        if new.out.max(other.out) < SAVES {
            // Neither saves anything, which tells nothing of how much more the one would.
            return;
        }
        let mut found = other.over(new);
        found.out = found.out.clamp(1.0 / TIMES_MAX, TIMES_MAX);
        let found = found.times(assumed(used).times(self.steps[used])).over(assumed(tried));
        self.steps[tried] = self.steps[tried].toward(found, WEIGHT_TRIED);
    }

    /// The corners, by what they cost; a mix of two neighbours does better than what lies above the line between them.
    pub(super) fn corners(&self) -> Vec<Corner> {
        let mut found: Vec<Corner> = Vec::with_capacity(COUNT + 1);
        let all = (0..COUNT).filter(|&step| self.has(step)).map(|step| (Some(step), self.estimate(step)));
        let mut all: Vec<Corner> = self.raw.then_some((None, Average::RAW)).into_iter().chain(all).collect();
        all.sort_by(|a, b| a.1.nanos.total_cmp(&b.1.nanos));
        for (step, at) in all {
            if found.last().is_some_and(|(_, last)| at.out > last.out - WORTH) {
                continue;
            }
            while let [.., (_, one), (_, two)] = found[..] {
                let slope =
                    |from: Average, to: Average| (from.out - to.out) / (to.nanos - from.nanos).max(1e-9);
                if slope(one, two) > slope(two, at) {
                    break;
                }
                found.pop();
            }
            found.push((step, at));
        }
        found
    }
}

/// What may be spent on a byte buys this mix, which costs and makes so much.
pub(super) fn buy(corners: &[Corner], nanos: f64) -> (Mix, Average) {
    let Some(&(first, least)) = corners.first() else { return (Mix::all(None), Average::RAW) };
    let above = corners.iter().position(|(_, at)| at.nanos > nanos);
    match above {
        Some(0) => (Mix::all(first), least),
        Some(above) => {
            let ((lighter, from), (heavier, to)) = (corners[above - 1], corners[above]);
            let part = (nanos - from.nanos) / (to.nanos - from.nanos);
            (Mix { lighter, heavier, part }, from.toward(to, part))
        }
        None => {
            let (last, most) = corners[corners.len() - 1];
            (Mix::all(last), most)
        }
    }
}

/// What is assumed of a step, with what it saves.
fn assumed(step: usize) -> Average {
    let (_, _, nanos, out) = STEPS[step];
    Average { nanos, out }.saved()
}

/// The level of a step, and whether it has references.
pub(super) fn step(at: usize) -> Step {
    (STEPS[at].0, STEPS[at].1)
}

/// Where a step stands.
pub(super) fn index_of(level: i32, references: bool) -> Option<usize> {
    STEPS.iter().position(|step| (step.0, step.1) == (level, references))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_are_worth_what_they_cost() {
        let mut ladder = Ladder::new(true);
        let corners = ladder.corners();
        assert_eq!(corners[0], (None, Average::RAW));
        assert!(corners.is_sorted_by(|a, b| a.1.nanos < b.1.nanos && a.1.out > b.1.out));
        assert!(corners.iter().all(|(step, _)| step.is_none_or(|step| !STEPS[step].1)));
        ladder.refer(true);
        assert!(ladder.corners().iter().any(|(step, _)| step.is_some_and(|step| STEPS[step].1)));
        // Nothing shrinks.
        for _ in 0..100 {
            ladder.see(FIRST, Average { nanos: 1.0, out: 1.0 });
        }
        assert!(ladder.corners().len() <= 4, "{:?}", ladder.corners());
        let ladder = Ladder::new(false);
        assert!(ladder.corners()[0].0.is_some());
    }

    #[test]
    fn what_is_spent_buys_a_mix() {
        let ladder = Ladder::new(true);
        let corners = ladder.corners();
        assert_eq!(
            buy(&corners, 0.0),
            (Mix { lighter: None, heavier: corners[1].0, part: 0.0 }, Average::RAW)
        );
        let half = corners[1].1.nanos / 2.0;
        let (mix, average) = buy(&corners, half);
        assert_eq!((mix.lighter, mix.heavier, mix.part), (None, corners[1].0, 0.5));
        assert!((average.nanos - half).abs() < 1e-9 && average.out < 1.0);
        let (mix, average) = buy(&corners, 1e9);
        assert_eq!((mix, average), (Mix::all(corners[corners.len() - 1].0), corners[corners.len() - 1].1));
        assert_eq!(buy(&Ladder::new(false).corners(), 0.0).0.part, 1.0);
    }

    /// Whatever the data, a step is known by how it does beside another.
    #[test]
    fn steps_are_compared_on_the_same_pages() {
        let mut ladder = Ladder::new(true);
        for round in 0..600 {
            // Data that differs, or does not shrink at all; the heavier step saves half as much again, for twice the time.
            let saves = [0.2, 0.6, 0.0][round % 3];
            let one = |nanos, saves: f64| Average { nanos, out: 1.0 - saves };
            ladder.compare(3, one(4.0, saves * 1.5), 1, one(2.0, saves));
            ladder.see(1, one(2.0, saves));
        }
        let (light, heavy) = (ladder.estimate(1), ladder.estimate(3));
        assert!((heavy.nanos / light.nanos - 2.0).abs() < 0.05, "{heavy:?} {light:?}");
        let (light, heavy) = (light.saved().out, heavy.saved().out);
        assert!((heavy / light - 1.5).abs() < 0.05 && (0.15..0.4).contains(&light), "{heavy} {light}");
    }
}
