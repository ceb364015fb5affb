//! The vector kernels, chosen once by what the CPU offers; besides those of `digest` and `xbzrle`, the only module of this crate
//! with unsafe code.
//!
//! The unsafe part is small: calling functions that are compiled for CPU features which were found at run time, and
//! vector loads from arrays of known size. Each kernel has a portable form in safe Rust which gives the same answer
//! on every input; tests and benches run all [`Level::all`] side by side.

use std::sync::OnceLock;

use crate::layout::PAGE_SIZE;

/// Bytes in the lines that [`compare`] works by: one mask word each.
const LINE: usize = 64;
/// Lines in a page.
const LINES: usize = PAGE_SIZE / LINE;
/// Bytes folded before a zero test looks at its result.
const FOLD: usize = 256;

/// What a level is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "portable", allow(dead_code))]
pub(crate) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A set of CPU features that this CPU has; the value itself is the proof, since only detection makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Kind);

impl Level {
    /// Safe Rust, on any CPU.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The widest that this CPU has.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop().unwrap_or(Self::PORTABLE))
    }

    /// Every level that this CPU has, narrowest first.
    pub fn all() -> Vec<Self> {
        #[cfg_attr(any(feature = "portable", not(target_arch = "x86_64")), allow(unused_mut))]
        let mut levels = vec![Self::PORTABLE];
        #[cfg(all(target_arch = "x86_64", not(feature = "portable")))]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("popcnt")
                && is_x86_feature_detected!("bmi1");
            if avx2 {
                levels.push(Self(Kind::Avx2));
            }
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                levels.push(Self(Kind::Avx512));
            }
        }
        levels
    }

    /// The one that hashes fastest: the widest, unless vector instructions are emulated (QEMU's TCG), where plain ones are
    /// more than twice as fast.
    pub fn best_to_hash() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| if emulated() { Self::PORTABLE } else { Self::best() })
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }

    /// A short name for reports: `portable`, `avx2`, `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
        }
    }
}

/// Whether the CPU is one that QEMU emulates: its hypervisor leaf says so.
fn emulated() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        /// Leaf 1, ECX: there is a hypervisor, and so a leaf that names it.
        const HYPERVISOR: u32 = 1 << 31;
        // SAFETY: every x86-64 has the instruction. (Newer compilers call it safe.)
        #[allow(unused_unsafe)]
        let leaf = |number| unsafe { __cpuid(number) };
        if leaf(1).ecx & HYPERVISOR != 0 {
            let leaf = leaf(0x4000_0000);
            let name = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
            return name.as_flattened() == b"TCGTCGTCGTCG";
        }
    }
    false
}

/// Whether all bytes are zero, read from the start until one is not.
pub(crate) fn all_zero(level: Level, bytes: &[u8]) -> bool {
    match level.0 {
        Kind::Portable => all_zero_body(bytes),
        // From memory AVX-512 is no faster than AVX2 here, and slower on some CPUs, so both use AVX2.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 | Kind::Avx512 => {
            // SAFETY: the function needs AVX2, and `level` is only ever made where AVX2 was detected.
            unsafe { all_zero_avx2(bytes) }
        }
    }
}

#[inline(always)]
fn all_zero_body(bytes: &[u8]) -> bool {
    let (folds, rest) = bytes.as_chunks::<FOLD>();
    let (words, tail) = rest.as_chunks::<8>();
    folds.iter().all(|fold| {
        let (words, _) = fold.as_chunks::<8>();
        words.iter().fold(0, |acc, word| acc | u64::from_ne_bytes(*word)) == 0
    }) && words.iter().all(|word| u64::from_ne_bytes(*word) == 0)
        && tail.iter().all(|&byte| byte == 0)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn all_zero_avx2(bytes: &[u8]) -> bool {
    all_zero_body(bytes)
}

/// Where two pages differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Bit `i` of word `l`: byte `64 * l + i` differs.
    pub(crate) masks: [u64; LINES],
    /// Bit `l`: some byte of line `l` differs.
    pub(crate) touched: u64,
    /// Bit `l`: every byte of line `l` differs.
    pub(crate) full: u64,
    /// Bytes that differ.
    pub(crate) bytes: u32,
    /// Runs of adjacent bytes that differ.
    pub(crate) runs: u32,
}

impl Difference {
    /// Two pages that are alike.
    pub(crate) fn none() -> Self {
        Self { masks: [0; LINES], touched: 0, full: 0, bytes: 0, runs: 0 }
    }

    /// Fills in everything from the masks of the lines, in order.
    #[inline(always)]
    fn fill(&mut self, mut mask_of: impl FnMut(usize) -> u64) {
        let (mut touched, mut full, mut bytes, mut runs, mut before) = (0, 0, 0, 0, 0);
        for (line, slot) in self.masks.iter_mut().enumerate() {
            let mask = mask_of(line);
            *slot = mask;
            if mask != 0 {
                touched |= 1 << line;
                full |= u64::from(mask == u64::MAX) << line;
                bytes += mask.count_ones();
                // A run starts at a set bit after a clear one, also across the line's border.
                runs += (mask & !(mask << 1 | before >> 63)).count_ones();
            }
            before = mask;
        }
        (self.touched, self.full, self.bytes, self.runs) = (touched, full, bytes, runs);
    }
}

/// Room for the borders of every run that a page can have, and for a whole word of them more.
pub(crate) const BORDERS_MAX: usize = PAGE_SIZE + LINE;

/// Where runs start and end, by turns: the positions at which a byte differs and the one before it does not, or the other way
/// round. Returns how many there are, at the start of `out`; they are even in number, as the page's end ends a run.
pub(crate) fn borders(level: Level, difference: &Difference, out: &mut [u16; BORDERS_MAX]) -> usize {
    match level.0 {
        Kind::Portable => borders_body(difference, out),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 | Kind::Avx512 => {
            // SAFETY: the function needs POPCNT and BMI1, and `level` is only made where both were detected.
            unsafe { borders_bmi(difference, out) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi1,popcnt")]
fn borders_bmi(difference: &Difference, out: &mut [u16; BORDERS_MAX]) -> usize {
    borders_body(difference, out)
}

#[inline(always)]
fn borders_body(difference: &Difference, out: &mut [u16; BORDERS_MAX]) -> usize {
    /// Borders that are written without a look at how many there are. Source: Langdale and Lemire, "Parsing Gigabytes of JSON per
    /// Second" (2019), section 3.2: a branch for each bit is guessed wrong too often.
    const AT_ONCE: usize = 8;
    let (mut count, mut before) = (0, 0);
    for (line, &mask) in difference.masks.iter().enumerate() {
        let mut borders = mask ^ (mask << 1 | before >> 63);
        before = mask;
        let here = borders.count_ones() as usize;
        let Some(slots) = out[count..].first_chunk_mut::<LINE>() else { break };
        for group in slots.as_chunks_mut::<AT_ONCE>().0.iter_mut().take(here.div_ceil(AT_ONCE)) {
            for slot in group {
                *slot = (line * LINE) as u16 + borders.trailing_zeros() as u16;
                borders &= borders.wrapping_sub(1);
            }
        }
        count += here;
    }
    if before >> 63 != 0 {
        out[count] = PAGE_SIZE as u16;
        count += 1;
    }
    count
}

/// Compares two pages byte by byte into `difference`.
pub(crate) fn compare(
    level: Level,
    old: &[u8; PAGE_SIZE],
    new: &[u8; PAGE_SIZE],
    difference: &mut Difference,
) {
    match level.0 {
        Kind::Portable => difference.fill(|line| line_portable(line_of(old, line), line_of(new, line))),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => {
            // SAFETY: the function needs AVX2 and POPCNT, and `level` is only made where both were detected.
            unsafe { compare_avx2(old, new, difference) }
        }
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => {
            // SAFETY: the function needs AVX-512 F and BW and POPCNT, and `level` is only made where all were detected.
            unsafe { compare_avx512(old, new, difference) }
        }
    }
}

#[inline(always)]
fn line_of(page: &[u8; PAGE_SIZE], line: usize) -> &[u8; LINE] {
    &page.as_chunks::<LINE>().0[line]
}

/// The mask of one line, by words of eight bytes.
#[inline(always)]
fn line_portable(old: &[u8; LINE], new: &[u8; LINE]) -> u64 {
    const LOW7: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    const GATHER: u64 = 0x0102_0408_1020_4080;
    if old == new {
        return 0;
    }
    let (old, new) = (old.as_chunks::<8>().0, new.as_chunks::<8>().0);
    let mut mask = 0;
    for (i, (o, n)) in old.iter().zip(new).enumerate() {
        let xor = u64::from_le_bytes(*o) ^ u64::from_le_bytes(*n);
        // The top bit of each byte that is not zero, moved to the bottom, then the eight of them gathered.
        let set = (((xor & LOW7) + LOW7) | xor) & !LOW7;
        mask |= ((set >> 7).wrapping_mul(GATHER) >> 56) << (8 * i);
    }
    mask
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,popcnt")]
fn compare_avx2(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE], difference: &mut Difference) {
    use std::arch::x86_64::{__m256i, _mm256_cmpeq_epi8, _mm256_loadu_si256, _mm256_movemask_epi8};

    let load = |line: &[u8; LINE], half: usize| {
        let half: &[u8; 32] = &line.as_chunks::<32>().0[half];
        // SAFETY: an unaligned load of 32 bytes from an array of 32 bytes.
        unsafe { _mm256_loadu_si256(std::ptr::from_ref(half).cast::<__m256i>()) }
    };
    difference.fill(|line| {
        let (old, new) = (line_of(old, line), line_of(new, line));
        let low = _mm256_movemask_epi8(_mm256_cmpeq_epi8(load(old, 0), load(new, 0))) as u32;
        let high = _mm256_movemask_epi8(_mm256_cmpeq_epi8(load(old, 1), load(new, 1))) as u32;
        !(u64::from(low) | u64::from(high) << 32)
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,popcnt")]
fn compare_avx512(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE], difference: &mut Difference) {
    use std::arch::x86_64::{_mm512_cmpneq_epi8_mask, _mm512_loadu_epi8};

    let load = |line: &[u8; LINE]| {
        // SAFETY: an unaligned load of 64 bytes from an array of 64 bytes.
        unsafe { _mm512_loadu_epi8(std::ptr::from_ref(line).cast::<i8>()) }
    };
    difference.fill(|line| _mm512_cmpneq_epi8_mask(load(line_of(old, line)), load(line_of(new, line))));
}

#[cfg(test)]
mod tests {
    use testkit::Rng;

    use super::*;

    #[cfg(feature = "portable")]
    #[test]
    fn the_portable_build_has_portable_kernels_only() {
        assert_eq!((Level::all(), Level::best()), (vec![Level::PORTABLE], Level::PORTABLE));
        assert_eq!(Level::best_to_hash().name(), "portable");
    }

    /// What `compare` must find, byte by byte.
    fn expected(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE]) -> Difference {
        let mut d = Difference::none();
        let mut before = false;
        for i in 0..PAGE_SIZE {
            let differs = old[i] != new[i];
            if differs {
                d.masks[i / 64] |= 1 << (i % 64);
                d.touched |= 1 << (i / 64);
                d.bytes += 1;
                d.runs += u32::from(!before);
            }
            before = differs;
        }
        for (line, mask) in d.masks.iter().enumerate() {
            d.full |= u64::from(*mask == u64::MAX) << line;
        }
        d
    }

    /// What `borders` must find.
    fn runs_of(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE]) -> Vec<u16> {
        let differs = |i: usize| i < PAGE_SIZE && old[i] != new[i];
        (0..=PAGE_SIZE).filter(|&i| differs(i) != (i != 0 && differs(i - 1))).map(|i| i as u16).collect()
    }

    #[test]
    fn every_level_finds_the_same_difference() {
        let mut rng = Rng::new(1);
        for round in 0..400 {
            let mut old = [0u8; PAGE_SIZE];
            old.iter_mut().for_each(|b| *b = rng.next() as u8);
            let mut new = old;
            for _ in 0..rng.below(40) {
                let start = rng.index(PAGE_SIZE);
                let end = (start + rng.index(1 + 20 * (round % 20))).min(PAGE_SIZE);
                // Flipping only one bit also covers the top bit of a byte alone.
                let flip = 1 << rng.below(8);
                new[start..end].iter_mut().for_each(|b| *b ^= flip);
            }
            let want = expected(&old, &new);
            for level in Level::all() {
                let mut got = Difference::none();
                compare(level, &old, &new, &mut got);
                assert_eq!(got, want, "{}", level.name());
                let mut borders = [0; BORDERS_MAX];
                let count = super::borders(level, &got, &mut borders);
                assert_eq!(&borders[..count], runs_of(&old, &new), "{}", level.name());
            }
        }
    }

    #[test]
    fn best_is_the_last_of_all() {
        assert_eq!(Level::all().first(), Some(&Level::PORTABLE));
        assert_eq!(Level::all().last(), Some(&Level::best()));
    }
}
