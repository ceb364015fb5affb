//! Page content for the benches: the kinds of memory that a guest holds, the same on every run.

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
