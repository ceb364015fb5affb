//! What was last sent for every page: its digest, by which an untouched page is recognised and not sent again.

use std::sync::OnceLock;

use crate::bitmap::bits;
use crate::digest::PageDigest;
use crate::layout::CHUNK_PAGES;
use crate::sync::{AtomicU64, Ordering};

/// Digests of the content last *sent* for each page of a layout.
///
/// Shared by all stream workers. One thread at a time makes entries of a chunk: the sender of the stream that owns it. The thread that
/// takes that stream's receipts forgets pages meanwhile ([`void`](Self::void)), never adds any. All accesses are relaxed: ownership
/// orders senders among themselves, and a page that was forgotten is put into the set of pending pages after that, out of which the
/// sender takes it before it looks here ([`PageBitmap`](crate::bitmap::PageBitmap) orders these two). Pages of zeros take one bit, and
/// a chunk's digests (1 KiB) are allocated with its first page of another content: an empty chunk costs about 32 bytes.
#[derive(Debug)]
pub struct DigestTable {
    chunks: Box<[Entry]>,
    zero: PageDigest,
}

#[derive(Debug, Default)]
struct Entry {
    /// Pages with an entry.
    known: AtomicU64,
    /// Of these, the ones last sent as zeros; they have no digest below.
    zero: AtomicU64,
    digests: OnceLock<Box<Digests>>,
}

/// The two halves of each page's digest.
#[derive(Debug)]
struct Digests {
    low: [AtomicU64; CHUNK_PAGES],
    high: [AtomicU64; CHUNK_PAGES],
}

impl Digests {
    fn new() -> Box<Self> {
        Box::new(Self {
            low: std::array::from_fn(|_| AtomicU64::new(0)),
            high: std::array::from_fn(|_| AtomicU64::new(0)),
        })
    }
}

impl DigestTable {
    /// A table that knows nothing, for a layout of `chunks` chunks; `zero` is the digest of a page of zeros.
    pub fn new(chunks: u32, zero: PageDigest) -> Self {
        Self { chunks: (0..chunks).map(|_| Entry::default()).collect(), zero }
    }

    /// The digest last sent for page `bit` of `chunk`, if one is known.
    pub fn get(&self, chunk: u32, bit: u32) -> Option<PageDigest> {
        let entry = &self.chunks[chunk as usize];
        let page = 1 << bit;
        if entry.known.load(Ordering::Relaxed) & page == 0 {
            return None;
        }
        if entry.zero.load(Ordering::Relaxed) & page != 0 {
            return Some(self.zero);
        }
        let digests = entry.digests.get()?;
        let half = |halves: &[AtomicU64; CHUNK_PAGES]| {
            PageDigest::from(halves[bit as usize].load(Ordering::Relaxed))
        };
        Some(half(&digests.high) << 64 | half(&digests.low))
    }

    /// The pages of `chunk` with a known digest.
    pub fn known(&self, chunk: u32) -> u64 {
        self.chunks[chunk as usize].known.load(Ordering::Relaxed)
    }

    /// The pages of `chunk` that were last sent as zeros, or that both sides hold as zeros (holes).
    pub fn zeros(&self, chunk: u32) -> u64 {
        let entry = &self.chunks[chunk as usize];
        entry.known.load(Ordering::Relaxed) & entry.zero.load(Ordering::Relaxed)
    }

    /// Notes what was sent for one page.
    pub fn set(&self, chunk: u32, bit: u32, digest: PageDigest) {
        if digest == self.zero {
            return self.set_zeros(chunk, 1 << bit);
        }
        let entry = &self.chunks[chunk as usize];
        let digests = entry.digests.get_or_init(Digests::new);
        digests.low[bit as usize].store(digest as u64, Ordering::Relaxed);
        digests.high[bit as usize].store((digest >> 64) as u64, Ordering::Relaxed);
        entry.zero.fetch_and(!(1 << bit), Ordering::Relaxed);
        entry.known.fetch_or(1 << bit, Ordering::Relaxed);
    }

    /// Notes what was sent for several pages: `digests[bit]` for each bit of `pages`.
    pub fn set_pages(&self, chunk: u32, pages: u64, digests: &[PageDigest; CHUNK_PAGES]) {
        for bit in bits(pages) {
            self.set(chunk, bit, digests[bit as usize]);
        }
    }

    /// Notes that pages were sent as zeros, or that both sides hold them as zeros (holes).
    pub fn set_zeros(&self, chunk: u32, pages: u64) {
        let entry = &self.chunks[chunk as usize];
        entry.zero.fetch_or(pages, Ordering::Relaxed);
        entry.known.fetch_or(pages, Ordering::Relaxed);
    }

    /// Forgets pages: what the destination holds for them is no longer certain.
    pub fn void(&self, chunk: u32, pages: u64) {
        self.chunks[chunk as usize].known.fetch_and(!pages, Ordering::Relaxed);
    }

    /// Bytes of memory that the table takes now.
    pub fn memory_bytes(&self) -> u64 {
        let filled = self.chunks.iter().filter(|entry| entry.digests.get().is_some()).count();
        (self.chunks.len() * size_of::<Entry>() + filled * size_of::<Digests>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const ZERO: PageDigest = 77;

    #[test]
    fn zeros_take_no_digests() {
        let table = DigestTable::new(1024, ZERO);
        let empty = table.memory_bytes();
        table.set_zeros(3, u64::MAX);
        table.set(4, 5, ZERO);
        assert_eq!(table.memory_bytes(), empty);
        assert!(empty <= 1024 * 40);
        assert_eq!((table.get(3, 63), table.get(4, 5), table.get(4, 6)), (Some(ZERO), Some(ZERO), None));
        table.set(3, 0, u128::MAX - 1);
        assert_eq!(table.get(3, 0), Some(u128::MAX - 1));
        assert_eq!(table.zeros(3), !1);
        assert_eq!(table.memory_bytes(), empty + 1024);
    }

    proptest! {
        /// Equals a plain map under any sequence of operations.
        #[test]
        fn behaves_as_a_map(ops in prop::collection::vec((0u32..3, 0u32..64, 0u8..5, any::<u64>()), 0..200)) {
            let table = DigestTable::new(3, ZERO);
            let mut map = HashMap::new();
            for (chunk, bit, kind, value) in ops {
                match kind {
                    0 => {
                        table.void(chunk, value);
                        map.retain(|&(c, b): &(u32, u32), _| c != chunk || value >> b & 1 == 0);
                    }
                    1 => {
                        table.set_zeros(chunk, value);
                        for b in bits(value) { map.insert((chunk, b), ZERO); }
                    }
                    _ => {
                        let digest = u128::from(value) << 37 | 1;
                        table.set(chunk, bit, digest);
                        map.insert((chunk, bit), digest);
                    }
                }
            }
            for chunk in 0..3 {
                for bit in 0..64 {
                    prop_assert_eq!(table.get(chunk, bit), map.get(&(chunk, bit)).copied());
                }
            }
        }
    }
}

/// Every order in which two threads can see each other's accesses; see `tests/run` for how these are built.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;
    use crate::bitmap::PageBitmap;

    const ZERO: PageDigest = 77;
    const PAGE: u64 = 1;

    /// A thread takes a receipt that is wrong; the sender takes what is pending and asks what it knows of it.
    fn a_wrong_receipt(take: fn(&PageBitmap) -> u64) {
        loom::model(move || {
            let (table, pending) = (Arc::new(DigestTable::new(1, ZERO)), Arc::new(PageBitmap::new(1)));
            table.set_zeros(0, PAGE);
            let receipts = {
                let (table, pending) = (table.clone(), pending.clone());
                thread::spawn(move || {
                    table.void(0, PAGE);
                    pending.insert(0, PAGE);
                })
            };
            if take(&pending) != 0 {
                assert_eq!(
                    (table.known(0), table.get(0, 0)),
                    (0, None),
                    "a damaged page counts as unchanged"
                );
            }
            receipts.join().unwrap();
        });
    }

    #[test]
    fn loom_pages_that_are_taken_have_no_old_digest() {
        a_wrong_receipt(|pending| pending.take(0));
    }

    #[test]
    fn loom_pages_that_are_removed_have_no_old_digest() {
        a_wrong_receipt(|pending| pending.remove(0, PAGE));
    }

    /// The same where a dirty sync puts another page of the chunk in between.
    #[test]
    fn loom_another_page_comes_between() {
        loom::model(|| {
            let (table, pending) = (Arc::new(DigestTable::new(1, ZERO)), Arc::new(PageBitmap::new(1)));
            table.set_zeros(0, PAGE);
            let (of_receipts, of_sync) = ((table.clone(), pending.clone()), pending.clone());
            let receipts = thread::spawn(move || {
                of_receipts.0.void(0, PAGE);
                of_receipts.1.insert(0, PAGE);
            });
            let sync = thread::spawn(move || of_sync.insert(0, PAGE << 1));
            if pending.take(0) & PAGE != 0 {
                assert_eq!(table.known(0), 0, "a damaged page counts as unchanged");
            }
            receipts.join().unwrap();
            sync.join().unwrap();
        });
    }

    /// Each page that is put in is taken out once.
    #[test]
    fn loom_no_page_is_lost_or_taken_twice() {
        loom::model(|| {
            let pending = Arc::new(PageBitmap::new(1));
            let threads = [0b01, 0b10].map(|page| {
                let pending = pending.clone();
                thread::spawn(move || {
                    pending.insert(0, page);
                    pending.take(0)
                })
            });
            let taken = threads.map(|thread| thread.join().unwrap());
            assert_eq!((taken[0] & taken[1], taken[0] | taken[1], pending.get(0)), (0, 0b11, 0));
        });
    }
}
