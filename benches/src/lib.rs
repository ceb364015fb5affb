//! Page content for the benches: the kinds of memory that a guest holds, the same on every run.

pub mod images;

use pagecopy::layout::PAGE_SIZE;
use pagecopy::xbzrle::Page;

/// A small generator (xorshift64*), the same on every run.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator; any seed will do.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `limit`, which is at most 2^32.
    pub fn below(&mut self, limit: usize) -> usize {
        (((self.next_u64() >> 32) * limit as u64) >> 32) as usize
    }
}

/// Bytes that do not compress.
pub fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..length).map(|_| random.next_u64() as u8).collect()
}

/// Like a heap: pointers into one arena, small numbers and zeros, with some noise.
pub fn heap_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        let noise = random.next_u64();
        let word = match noise % 8 {
            0..=2 => 0x7f31_aa00_0000 + (noise >> 40) % 65_536 * 16,
            3..=5 => (noise >> 32) % 64,
            6 => 0,
            _ => noise,
        };
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// How a page changed between two rounds.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// What it is like.
    pub name: &'static str,
    /// Places that changed.
    pub runs: usize,
    /// Bytes in each.
    pub bytes: usize,
}

/// From a counter to a page that is nearly rewritten.
pub const CHANGES: [Change; 5] = [
    Change { name: "one-word", runs: 1, bytes: 8 },
    Change { name: "ten-words", runs: 10, bytes: 8 },
    Change { name: "fifty-words", runs: 50, bytes: 8 },
    Change { name: "one-kilobyte", runs: 1, bytes: 1024 },
    Change { name: "rewritten", runs: 1, bytes: PAGE_SIZE },
];

/// Pairs of an old and a new version of a page.
pub fn page_pairs(change: Change, count: usize) -> Vec<(Page, Page)> {
    let mut random = Random::new(11);
    let pages = heap_bytes(5, count * PAGE_SIZE);
    let pair = |old: &Page| {
        let mut new = *old;
        for _ in 0..change.runs {
            let start = random.below(PAGE_SIZE - change.bytes + 1);
            new[start..start + change.bytes].iter_mut().for_each(|byte| *byte = random.next_u64() as u8);
        }
        (*old, new)
    };
    pages.as_chunks::<PAGE_SIZE>().0.iter().map(pair).collect()
}

/// The workloads on which QEMU's XBZRLE is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// One byte of each page changes.
    OneByte,
    /// One byte in ten changes, each by itself.
    TenPercent,
    /// Up to 40 runs of random length change, at random places.
    Random,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::OneByte, Self::TenPercent, Self::Random];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneByte => "1-byte",
            Self::TenPercent => "10-percent",
            Self::Random => "random",
        }
    }

    /// Pairs of an old and a new version of a page.
    pub fn pairs(self, count: usize) -> Vec<(Page, Page)> {
        let mut random = Random::new(13);
        let pages = heap_bytes(7, count * PAGE_SIZE);
        let pair = |old: &Page| {
            let mut new = *old;
            // Every change is one: a byte that is its own successor would stay.
            match self {
                Self::OneByte => new[random.below(PAGE_SIZE)] ^= 0x55,
                Self::TenPercent => new.iter_mut().step_by(10).for_each(|byte| *byte ^= 0x55),
                Self::Random => {
                    for _ in 0..random.below(41) {
                        let start = random.below(PAGE_SIZE);
                        let end = PAGE_SIZE.min(start + 1 + random.below(64));
                        new[start..end].iter_mut().for_each(|byte| *byte = random.next_u64() as u8);
                    }
                    new[random.below(PAGE_SIZE)] ^= 0x55;
                }
            }
            (*old, new)
        };
        pages.as_chunks::<PAGE_SIZE>().0.iter().map(pair).collect()
    }
}

/// Applies a delta byte by byte, as the format's description has it; `None` if it is none. What a decoder is measured against.
pub fn decode_scalar(delta: &[u8], page: &mut Page) -> Option<usize> {
    let mut bytes = delta.iter().copied();
    let length = |bytes: &mut dyn Iterator<Item = u8>| {
        let low = bytes.next()?;
        let high = if low & 0x80 == 0 { 0 } else { bytes.next()? };
        Some(usize::from(low & 0x7f) | usize::from(high) << 7)
    };
    let mut at = 0;
    while bytes.len() > 0 {
        at += length(&mut bytes)?;
        for _ in 0..length(&mut bytes)? {
            *page.get_mut(at)? = bytes.next()?;
            at += 1;
        }
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use pagecopy::xbzrle::{Encoded, decode, encode, encode_reference};

    use super::*;

    #[test]
    fn all_coders_agree_on_the_workloads() {
        for workload in Workload::ALL {
            for (old, new) in workload.pairs(64) {
                let (mut out, mut expected) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
                let Encoded::Len(length) = encode(&old, &new, &mut out) else { panic!("{workload:?}") };
                assert_eq!(encode_reference(&old, &new, &mut expected), Encoded::Len(length));
                assert_eq!(out[..length], expected[..length]);
                let (mut one, mut other) = (old, old);
                assert_eq!(decode(&out[..length], &mut one).ok(), decode_scalar(&out[..length], &mut other));
                assert!(one == new && other == new, "{workload:?}");
            }
        }
        assert_eq!(decode_scalar(&[0, 5, 1], &mut [0; PAGE_SIZE]), None);
        assert_eq!(decode_scalar(&[0xff, 0x1f, 2, 1, 1], &mut [0; PAGE_SIZE]), None);
    }
}
