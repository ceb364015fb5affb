//! Dirty bitmaps: one atomic word per chunk, shared between the dirty sync and the stream workers.

use crate::layout::Layout;
use crate::sync::{AtomicU64, Ordering};

/// A set of pages of one layout: word `i` holds the pages of chunk `i`.
///
/// All operations are atomic per word. Who takes a page out ([`take`](Self::take), [`remove`](Self::remove)) sees what those who put it
/// in ([`insert`](Self::insert)) did before: a page that is pending because its receipt was wrong has no digest any more for whoever
/// sends it next ([`DigestTable::void`](crate::table::DigestTable::void)). Looking at the set orders nothing, nor do these bits order
/// the content of guest memory, which the dirty log (the kernel) does.
#[derive(Debug)]
pub struct PageBitmap {
    words: Box<[AtomicU64]>,
}

impl PageBitmap {
    /// An empty set for a layout of `chunks` chunks.
    pub fn new(chunks: u32) -> Self {
        Self { words: crate::sync::zeros(chunks as usize) }
    }

    /// The set of all pages of a layout.
    pub fn full(layout: &Layout) -> Self {
        Self { words: (0..layout.chunks()).map(|chunk| AtomicU64::new(layout.valid(chunk))).collect() }
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u32 {
        self.words.len() as u32
    }

    /// The pages of a chunk that are in the set.
    pub fn get(&self, chunk: u32) -> u64 {
        self.words[chunk as usize].load(Ordering::Relaxed)
    }

    /// Adds pages; returns those that were not in the set before.
    pub fn insert(&self, chunk: u32, pages: u64) -> u64 {
        if pages == 0 {
            return 0;
        }
        pages & !self.words[chunk as usize].fetch_or(pages, Ordering::Release)
    }

    /// Removes pages; returns those that were in the set.
    pub fn remove(&self, chunk: u32, pages: u64) -> u64 {
        pages & self.words[chunk as usize].fetch_and(!pages, Ordering::AcqRel)
    }

    /// Removes and returns all pages of a chunk.
    pub fn take(&self, chunk: u32) -> u64 {
        let word = &self.words[chunk as usize];
        // A plain load first: most words are empty, and a swap would own the cache line.
        if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) }
    }

    /// The first chunk at or after `from` that has a page in the set.
    pub fn next_chunk(&self, from: u32) -> Option<u32> {
        let start = from as usize;
        let rest = self.words.get(start..)?;
        rest.iter().position(|w| w.load(Ordering::Relaxed) != 0).map(|i| (start + i) as u32)
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Number of pages in this set that are not in `other`, a set over as many chunks.
    pub fn count_outside(&self, other: &Self) -> u64 {
        self.iter().map(|(chunk, pages)| u64::from((pages & !other.get(chunk)).count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.next_chunk(0).is_none()
    }

    /// The chunks that have pages in the set, with those pages, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.words.iter().enumerate().filter_map(|(chunk, word)| match word.load(Ordering::Relaxed) {
            0 => None,
            pages => Some((chunk as u32, pages)),
        })
    }
}

/// The runs of set bits in a word, as `(first bit, length)`, in order.
pub fn runs(mut word: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let first = word.trailing_zeros();
        let length = (word >> first).trailing_ones();
        // first + length can be 64, which a plain shift would refuse.
        word &= u64::MAX.checked_shl(first + length).unwrap_or(0);
        Some((first, length))
    })
}

/// The set bits of a word, in order.
pub fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        (word != 0).then(|| {
            word &= word - 1;
            bit
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn takes_each_page_once() {
        let set = PageBitmap::new(3);
        assert_eq!(set.insert(1, 0b1010), 0b1010);
        assert_eq!(set.insert(1, 0b0110), 0b0100);
        assert_eq!(set.count(), 3);
        assert_eq!(set.next_chunk(0), Some(1));
        assert_eq!(set.next_chunk(2), None);
        assert_eq!(set.next_chunk(99), None);
        assert_eq!(set.remove(1, 0b11), 0b10);
        assert_eq!(set.take(1), 0b1100);
        assert_eq!(set.take(1), 0);
        assert!(set.is_empty());
    }

    #[test]
    fn full_ends_at_the_regions_end() {
        let layout = Layout::flat(crate::layout::CHUNK_SIZE as u64 + 3 * 4096).unwrap();
        let set = PageBitmap::full(&layout);
        assert_eq!(set.iter().collect::<Vec<_>>(), vec![(0, u64::MAX), (1, 0b111)]);
        assert_eq!(set.count(), 67);
    }

    proptest! {
        #[test]
        fn runs_and_bits_cover_the_word(word: u64) {
            let mut from_runs = 0u64;
            let mut end = 0;
            for (first, length) in runs(word) {
                prop_assert!(length > 0 && (first == 0 || first > end || end == 0));
                for bit in first..first + length { from_runs |= 1 << bit; }
                end = first + length;
            }
            prop_assert_eq!(from_runs, word);
            prop_assert_eq!(bits(word).fold(0u64, |w, b| w | 1 << b), word);
        }
    }

    #[test]
    fn a_full_word_is_one_run() {
        assert_eq!(runs(u64::MAX).collect::<Vec<_>>(), vec![(0, 64)]);
    }
}
