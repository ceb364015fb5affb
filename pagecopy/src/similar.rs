//! Which pages resemble one another, wherever in memory they lie.
//!
//! A guest holds much of its content more than once: a file in the page cache, the same in an archive it came from, and what a
//! process read of it. Such copies are rarely whole pages at the same offset, so that equal digests find few of them, and they lie
//! too far apart for the compressor's window. So each page is known here by a few *features*, hashes of 32 bytes of it, at places that
//! the content itself chooses: two pages that have some text in common have its features in common, at whatever offsets it
//! lies in them, as long as these differ by a multiple of 8. What compresses a page then gets the pages that it resembles as its
//! dictionary ([`crate::chunk`]).
//!
//! Sources: content-defined sampling, Manber, "Finding similar files in a large file system" (USENIX 1994); of pages of guest
//! memory, Gupta et al., "Difference Engine" (OSDI 2008).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{CHUNK_PAGES, PAGE_SIZE};
use crate::xbzrle::Page;

/// Bytes of a word, the grain at which content is found again.
const WORD: usize = 8;
/// Words that a feature is the hash of.
const FEATURE_WORDS: usize = 4;
/// One place in `2^SAMPLE_BITS` is a feature: 4 in a page.
const SAMPLE_BITS: u32 = 7;
/// Most features of a page; content with more repeats itself.
const FEATURES_MAX: usize = 16;
/// Features that are remembered, as a power of two: 8 MiB, for 1 GiB of memory without much in common.
const SLOT_BITS: u32 = 20;
/// Bits of a slot that hold a page's number, counted from 1.
const NUMBER_BITS: u32 = 40;

/// Features of pages that were sent, and the page that had each last. Shared by all stream workers. It may forget and be mistaken:
/// what it names is looked at before it is used.
#[derive(Debug, Default)]
pub struct SimilarPages {
    /// The rest of the feature above [`NUMBER_BITS`], the page's number below.
    slots: OnceLock<Box<[AtomicU64]>>,
}

impl SimilarPages {
    /// Knows nothing yet, and takes no memory before it does.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds to `found` the numbers ([`page_number`]) of pages of other chunks that share a feature with this one, once for each; and
    /// remembers this one.
    pub fn note(&self, chunk: u32, bit: u32, page: &Page, found: &mut Vec<u64>) {
        let slots = self.slots.get_or_init(|| bytemuck::zeroed_slice_box(1 << SLOT_BITS));
        let number = page_number(chunk, bit);
        features(page, |feature| {
            let slot = &slots[(feature >> (u64::BITS - SLOT_BITS)) as usize];
            let word = feature << NUMBER_BITS | (number + 1);
            let before = slot.swap(word, Ordering::Relaxed);
            let known = before & ((1 << NUMBER_BITS) - 1);
            if known != 0 && (before ^ word) >> NUMBER_BITS == 0 && chunk_of(known - 1).0 != chunk {
                found.push(known - 1);
            }
        });
    }
}

/// A page's number in its layout: 64 for each chunk.
pub fn page_number(chunk: u32, bit: u32) -> u64 {
    u64::from(chunk) * CHUNK_PAGES as u64 + u64::from(bit)
}

/// The chunk of a page's number, and its bit there.
fn chunk_of(number: u64) -> (u32, u32) {
    ((number / CHUNK_PAGES as u64) as u32, (number % CHUNK_PAGES as u64) as u32)
}

/// Of pages that were found, the `most` that share most features, as masks of their chunks, ascending. `found` is used up.
pub fn best_of(found: &mut Vec<u64>, most: usize, mut take: impl FnMut(u32, u64)) {
    found.sort_unstable();
    // Counts go above the numbers, so that one sort serves.
    let mut distinct = 0;
    let mut at = 0;
    while at < found.len() {
        let number = found[at];
        let same = found[at..].iter().take_while(|other| **other == number).count();
        found[distinct] = (same as u64).min(u64::MAX >> NUMBER_BITS) << NUMBER_BITS | number;
        (distinct, at) = (distinct + 1, at + same);
    }
    found.truncate(distinct);
    if found.len() > most {
        found.select_nth_unstable_by(most, |a, b| b.cmp(a));
        found.truncate(most);
    }
    for number in found.iter_mut() {
        *number &= (1 << NUMBER_BITS) - 1;
    }
    found.sort_unstable();
    let mut of_chunk = None::<(u32, u64)>;
    for (chunk, bit) in found.drain(..).map(chunk_of) {
        match &mut of_chunk {
            Some((same, pages)) if *same == chunk => *pages |= 1 << bit,
            _ => {
                if let Some((chunk, pages)) = of_chunk.replace((chunk, 1 << bit)) {
                    take(chunk, pages);
                }
            }
        }
    }
    if let Some((chunk, pages)) = of_chunk {
        take(chunk, pages);
    }
}

/// The features of a page, in order, without those that follow themselves.
fn features(page: &Page, mut take: impl FnMut(u64)) {
    // Odd, so that multiplying loses nothing; from the golden ratio, as Fibonacci hashing has it.
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    /// Bits by which older words move out of the hash: after `FEATURE_WORDS` of them nothing is left.
    const SHIFT: u32 = u64::BITS / FEATURE_WORDS as u32;
    const { assert!(PAGE_SIZE.is_multiple_of(WORD)) };
    let (mut hash, mut last, mut count) = (0u64, 0, 0);
    for (i, word) in page.as_chunks::<WORD>().0.iter().enumerate() {
        let word = u64::from_le_bytes(*word).wrapping_add(1).wrapping_mul(FACTOR);
        hash = (hash << SHIFT).wrapping_add(word ^ word >> 32);
        if hash >> (u64::BITS - SAMPLE_BITS) == 0 && i + 1 >= FEATURE_WORDS && hash != last {
            last = hash;
            take(hash.wrapping_mul(FACTOR));
            count += 1;
            if count == FEATURES_MAX {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use testkit::Rng;

    use super::*;

    fn noise(seed: u64) -> Vec<u8> {
        Rng::new(seed).bytes(2 * PAGE_SIZE)
    }

    fn page(bytes: &[u8]) -> Page {
        *bytes.first_chunk().unwrap()
    }

    fn best(mut found: Vec<u64>, most: usize) -> Vec<(u32, u64)> {
        let mut best = Vec::new();
        best_of(&mut found, most, |chunk, pages| best.push((chunk, pages)));
        best
    }

    #[test]
    fn content_is_found_again_at_another_offset() {
        let similar = SimilarPages::new();
        let mut found = Vec::new();
        let mut hit = 0;
        for seed in 1..=100 {
            let bytes = noise(seed * 0x1234_5678_9abc);
            similar.note(7, 3, &page(&bytes), &mut found);
            assert!(found.is_empty(), "seed {seed}");
            // Half of it is the other's.
            similar.note(9, 1, &page(&bytes[PAGE_SIZE / 2 + 8..]), &mut found);
            hit += u32::from(!found.is_empty());
            assert!(found.drain(..).all(|number| number == page_number(7, 3)));
        }
        // Two features are in common on average: none at all once in exp(2).
        assert!(hit > 75, "{hit} of 100");
    }

    #[test]
    fn a_chunk_does_not_resemble_itself() {
        let similar = SimilarPages::new();
        let (bytes, mut found) = (noise(1), Vec::new());
        for bit in 0..64 {
            similar.note(u32::MAX, bit, &page(&bytes), &mut found);
        }
        assert!(found.is_empty());
        similar.note(0, 0, &page(&bytes), &mut found);
        assert!(found.iter().all(|&number| number == page_number(u32::MAX, 63)) && !found.is_empty());
    }

    #[test]
    fn uniform_pages_have_one_feature_at_most() {
        for byte in 0..=255 {
            let mut count = 0;
            features(&[byte; PAGE_SIZE], |_| count += 1);
            assert!(count <= 1, "{byte}");
        }
    }

    #[test]
    fn the_best_are_those_that_share_most() {
        let (a, b, c) = (page_number(2, 5), page_number(2, 6), page_number(1, 63));
        assert_eq!(best(vec![a, c, b, a, b, a], 3), [(1, 1 << 63), (2, 0b110_0000)]);
        assert_eq!(best(vec![a, c, b, a, b, a], 2), [(2, 0b110_0000)]);
        assert_eq!(best(vec![a, c, b, a, b, a], 1), [(2, 0b10_0000)]);
        assert_eq!(best(vec![], 4), []);
        assert_eq!(best(vec![c, a], 0), []);
    }
}
