//! Arrays of numbers as simulations hold them: fields that a stencil smooths, and particles that walk at random.

use std::hint::black_box;
use std::ops::{Add, Mul, Sub};

use clap::ValueEnum;
use pageferry_benches::Random;

use super::cache::{self, Files};
use super::guest;

/// What each process holds, in percent of the guest's memory.
const SHARES: [(Numbers, u64); 4] =
    [(Numbers::Heat, 25), (Numbers::Waves, 20), (Numbers::Walkers, 18), (Numbers::Atoms, 12)];
/// Programs in the page cache, at most, in percent.
const PROGRAMS_PERCENT: u64 = 10;
/// Steps of each computation: the guest is emulated.
const STEPS: usize = 6;
/// Sine waves of which a field is made at the start.
const MODES: usize = 6;

/// What a process computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Numbers {
    /// Heat in a cube, float64: two arrays.
    Heat,
    /// Waves on shallow water, float32: three arrays.
    Waves,
    /// Particles that walk, float64: an array for each coordinate.
    Walkers,
    /// Particles with velocities, float32: an array of records.
    Atoms,
}

/// Fills the guest: one process for each of the computations, and some page cache.
pub(super) fn fill(total: u64) -> Result<(), String> {
    for (numbers, percent) in SHARES {
        guest::start_own("--compute", &numbers, total * percent / 100)?;
    }
    guest::wait_until_ready(SHARES.len())?;
    cache::fill(Files::Programs, total * cache::FREE_PERCENT / 100, total * PROGRAMS_PERCENT / 100)
}

/// Computes arrays of `bytes` together, says so, and keeps them.
pub(super) fn hold(numbers: Numbers, bytes: u64) -> Result<(), String> {
    let bytes = usize::try_from(bytes).map_err(|e| e.to_string())?;
    let mut random = Random::new(numbers as u64 + 1);
    match numbers {
        Numbers::Heat => keep(numbers, &heat(side(bytes / 16, 3), STEPS, &mut random)),
        Numbers::Waves => keep(numbers, &waves::<f32>(side(bytes / 12, 2), STEPS, &mut random)),
        Numbers::Walkers => keep(numbers, &walkers(bytes / 24, STEPS, &mut random)),
        Numbers::Atoms => keep(numbers, &atoms(bytes / size_of::<Atom>(), STEPS, &mut random)),
    }
}

fn keep<T>(numbers: Numbers, arrays: &T) -> Result<(), String> {
    guest::say_ready(&guest::name(&numbers))?;
    black_box(arrays);
    guest::stay()
}

/// The side of a square or cube with at most so many cells.
fn side(cells: usize, dimensions: u32) -> usize {
    let mut side = (cells as f64).powf(1.0 / f64::from(dimensions)) as usize + 1;
    while side.pow(dimensions) > cells {
        side -= 1;
    }
    side
}

/// A sum of a few sine waves along one axis, each with a length and phase of its own.
fn axis(cells: usize, random: &mut Random) -> Vec<[f64; MODES]> {
    let waves = [(); MODES].map(|()| (1 + random.below(9), random.below(1000)));
    let turn = std::f64::consts::TAU;
    let at = |cell: usize| {
        waves.map(|(count, phase)| {
            (turn * (count as f64 * cell as f64 / cells as f64 + phase as f64 / 1000.0)).sin()
        })
    };
    (0..cells).map(at).collect()
}

/// A number of a field.
trait Real: Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {
    fn new(value: f64) -> Self;
}

impl Real for f64 {
    fn new(value: f64) -> Self {
        value
    }
}

impl Real for f32 {
    fn new(value: f64) -> Self {
        value as Self
    }
}

/// Conduction of heat in a cube whose faces keep their temperature, by the stencil of seven points: the temperatures, in kelvin, after
/// the last step and before it.
fn heat(side: usize, steps: usize, random: &mut Random) -> [Vec<f64>; 2] {
    let axes = [(); 3].map(|()| axis(side, random));
    let mut now = Vec::with_capacity(side * side * side);
    for x in &axes[0] {
        for y in &axes[1] {
            let plane: [f64; MODES] = std::array::from_fn(|mode| 10.0 * x[mode] * y[mode]);
            now.extend(axes[2].iter().map(|z| 300.0 + dot(&plane, z)));
        }
    }
    let mut before = now.clone();
    let (row, plane) = (side, side * side);
    for _ in 0..steps {
        std::mem::swap(&mut now, &mut before);
        for x in 1..side.saturating_sub(1) {
            for y in 1..side - 1 {
                for at in x * plane + y * row + 1..x * plane + y * row + side - 1 {
                    let old = before[at];
                    let around = before[at - 1]
                        + before[at + 1]
                        + before[at - row]
                        + before[at + row]
                        + before[at - plane]
                        + before[at + plane];
                    now[at] = old + 0.1 * (around - 6.0 * old);
                }
            }
        }
    }
    [now, before]
}

fn dot(left: &[f64; MODES], right: &[f64; MODES]) -> f64 {
    left.iter().zip(right).map(|(a, b)| a * b).sum()
}

/// Waves on shallow water in a square that goes on at its other side: the height, in metres, and the speed along both axes.
fn waves<T: Real>(side: usize, steps: usize, random: &mut Random) -> [Vec<T>; 3] {
    let axes = [(); 2].map(|()| axis(side, random));
    let mut height = Vec::with_capacity(side * side);
    for x in &axes[0] {
        height.extend(axes[1].iter().map(|y| T::new(10.0 + 0.2 * dot(x, y))));
    }
    let (mut along, mut across) = (vec![T::new(0.0); side * side], vec![T::new(0.0); side * side]);
    let (gravity, depth) = (T::new(9.81 * 0.02), T::new(10.0 * 0.02));
    for _ in 0..steps {
        for x in 0..side {
            let (here, below) = (x * side, (x + 1) % side * side);
            for y in 0..side {
                let right = if y + 1 == side { 0 } else { y + 1 };
                along[here + y] = along[here + y] - gravity * (height[below + y] - height[here + y]);
                across[here + y] = across[here + y] - gravity * (height[here + right] - height[here + y]);
            }
        }
        for x in 0..side {
            let (here, above) = (x * side, (x + side - 1) % side * side);
            for y in 0..side {
                let left = if y == 0 { side - 1 } else { y - 1 };
                let out = along[here + y] - along[above + y] + (across[here + y] - across[here + left]);
                height[here + y] = height[here + y] - depth * out;
            }
        }
    }
    [height, along, across]
}

/// About a normal distribution, with a deviation of 1.
fn normal(random: &mut Random) -> f64 {
    let bits = random.next_u64();
    let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
    // Of four numbers from 0 to 1 the sum has the mean 2 and the variance 1/3.
    (sum as f64 / 65_536.0 - 2.0) * 3f64.sqrt()
}

/// Where a particle starts: they lie in the order of the slices of a box of side 100, as codes that sort by cell keep them.
fn start(index: usize, count: usize, random: &mut Random) -> [f64; 3] {
    let mut within = || random.next_u64() as f64 / u64::MAX as f64;
    [100.0 * (index as f64 + within()) / count as f64, 100.0 * within(), 100.0 * within()]
}

/// Particles that walk: their three coordinates, an array each.
fn walkers(count: usize, steps: usize, random: &mut Random) -> [Vec<f64>; 3] {
    let mut places = [(); 3].map(|()| Vec::with_capacity(count));
    for index in 0..count {
        for (place, at) in places.iter_mut().zip(start(index, count, random)) {
            place.push(at);
        }
    }
    for _ in 0..steps {
        for at in places.iter_mut().flatten() {
            *at += 0.05 * normal(random);
        }
    }
    places
}

/// A particle of a molecular simulation.
#[repr(C)]
#[derive(Clone, Debug)]
struct Atom {
    place: [f32; 3],
    speed: [f32; 3],
    mass: f32,
    kind: u32,
}

/// Particles that are pushed at random and slowed down.
fn atoms(count: usize, steps: usize, random: &mut Random) -> Vec<Atom> {
    let masses = [1.008, 12.011, 15.999];
    let mut atoms = Vec::with_capacity(count);
    for index in 0..count {
        let kind = random.below(masses.len());
        let place = start(index, count, random).map(|at| at as f32);
        atoms.push(Atom { place, speed: [0.0; 3], mass: masses[kind], kind: kind as u32 });
    }
    for _ in 0..steps {
        for atom in &mut atoms {
            for (at, speed) in atom.place.iter_mut().zip(&mut atom.speed) {
                *speed = 0.9 * *speed + normal(random) as f32 / atom.mass;
                *at += 0.01 * *speed;
            }
        }
    }
    atoms
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deviation(values: impl Iterator<Item = f64> + Clone) -> f64 {
        let count = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / count;
        (values.map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt()
    }

    #[test]
    fn a_side_is_the_largest_that_fits() {
        assert_eq!((side(27, 3), side(26, 3), side(1_000_000, 3), side(99, 2)), (3, 2, 100, 9));
    }

    #[test]
    fn heat_spreads() {
        let [after, before] = heat(24, STEPS, &mut Random::new(1));
        let [start, _] = heat(24, 0, &mut Random::new(1));
        assert_eq!(after.len(), 24 * 24 * 24);
        assert_ne!(after, before);
        let (first, last) = (deviation(start.iter().copied()), deviation(after.iter().copied()));
        assert!(last < 0.99 * first && last > 0.2 * first, "{first} became {last}");
        assert_eq!((after[0], after[24]), (start[0], start[24]), "a face keeps its temperature");
    }

    #[test]
    fn waves_move_and_keep_their_water() {
        let [height, along, across] = waves::<f64>(64, STEPS, &mut Random::new(2));
        let [start, ..] = waves::<f64>(64, 0, &mut Random::new(2));
        let sum = |values: &[f64]| values.iter().sum::<f64>();
        assert!((sum(&height) - sum(&start)).abs() < 1e-6, "{} and {}", sum(&height), sum(&start));
        // What the heights lose the speeds gain.
        let square =
            |values: &[f64], rest: f64| values.iter().map(|value| (value - rest).powi(2)).sum::<f64>();
        let moving = 10.0 * (square(&along, 0.0) + square(&across, 0.0));
        let (before, after) = (9.81 * square(&start, 10.0), 9.81 * square(&height, 10.0) + moving);
        assert!(moving > before / 20.0 && (after / before - 1.0).abs() < 0.2, "{before}, {after}, {moving}");
        assert!(along.iter().chain(&across).all(|speed| *speed != 0.0 && speed.abs() < 1.0));
        // Neighbours differ far less than the whole does: the field is smooth.
        let steps = height.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(deviation(steps) < deviation(height.iter().copied()));
        let [short, ..] = waves::<f32>(64, STEPS, &mut Random::new(2));
        assert!(short.iter().zip(&height).all(|(short, long)| (f64::from(*short) - long).abs() < 1e-4));
    }

    #[test]
    fn walkers_walk_as_far_as_chance_takes_them() {
        let far = |steps| {
            let after = walkers(5000, steps, &mut Random::new(3));
            let start = walkers(5000, 0, &mut Random::new(3));
            let moved: Vec<f64> =
                after.iter().flatten().zip(start.iter().flatten()).map(|(a, b)| a - b).collect();
            deviation(moved.iter().copied())
        };
        assert!((far(1) - 0.05).abs() < 0.002, "{}", far(1));
        assert!((far(4) - 0.1).abs() < 0.004, "{}", far(4));
        let [first, ..] = walkers(5000, 0, &mut Random::new(3));
        assert!(first.is_sorted() && first[4999] > 99.0);
    }

    #[test]
    fn light_atoms_are_faster() {
        let atoms = atoms(6000, STEPS, &mut Random::new(4));
        let speed = |kind| deviation(atoms.iter().filter(|a| a.kind == kind).map(|a| f64::from(a.speed[0])));
        let ratio = speed(0) / speed(1);
        assert!((10.0..14.0).contains(&ratio), "{ratio}");
        assert_eq!(atoms.iter().filter(|atom| atom.kind > 2).count(), 0);
    }
}
