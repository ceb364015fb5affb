//! What the destination says that an older copy of the guest holds: pages that are the same need not travel.
//!
//! The destination's word is a seal of each page, under a seed of the copy's own. A page whose seal fits is named instead of sent, once;
//! the destination then takes it from its copy, and its receipt says under the session's seed what memory holds. So nothing is believed
//! of a copy that two hashes with different seeds do not say. A page that turns out to be another is sent like any other.

use std::io;

use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{CHUNK_PAGES, Layout};
use pagecopy::xbzrle::Page;

use crate::local::zeroed;
use crate::session::SessionError;
use crate::wire::control::Base;

/// See the module. It takes 8 bytes for each page of the guest.
pub(crate) struct BaseSeals {
    hasher: PageHasher,
    seed: u64,
    /// By chunk and page.
    seals: Box<[u64]>,
    /// Pages with a seal that were not compared with it.
    untried: PageBitmap,
    /// The last chunk that was heard of.
    last: Option<u32>,
}

impl BaseSeals {
    /// Nothing was said yet but under which seed.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn new(layout: &Layout, seed: u64) -> io::Result<Self> {
        let seals = zeroed(layout.chunks() as usize * CHUNK_PAGES)?;
        let untried = PageBitmap::new(layout.chunks());
        Ok(Self { hasher: PageHasher::new(seed), seed, seals, untried, last: None })
    }

    /// Takes in what the destination says.
    ///
    /// # Errors
    /// When it is of no such guest, or says another seed than before, or a chunk twice.
    pub(crate) fn add(&mut self, said: &Base, layout: &Layout) -> Result<(), SessionError> {
        let wrong = |what| Err(SessionError::Base { what });
        if said.seed != self.seed {
            return wrong("its seed is another than before");
        }
        for one in &said.chunks {
            if one.chunk >= layout.chunks() || one.pages & !layout.valid(one.chunk) != 0 {
                return wrong("it has pages that the guest does not have");
            }
            if self.last.replace(one.chunk).is_some_and(|last| last >= one.chunk) {
                return wrong("a chunk comes twice, or out of order");
            }
            let first = one.chunk as usize * CHUNK_PAGES;
            bits(one.pages).zip(&one.seals).for_each(|(bit, &seal)| self.seals[first + bit as usize] = seal);
            self.untried.insert(one.chunk, one.pages);
        }
        Ok(())
    }

    /// Of these pages, those that may be in the base. Each is asked for once.
    pub(super) fn take(&self, chunk: u32, pages: u64) -> u64 {
        match self.untried.get(chunk) & pages {
            0 => 0,
            untried => self.untried.remove(chunk, untried),
        }
    }

    /// Whether the base says to hold this for a page that was taken.
    pub(super) fn holds(&self, chunk: u32, bit: u32, page: &Page) -> bool {
        self.seals[chunk as usize * CHUNK_PAGES + bit as usize] == receipt(self.hasher.page(page))
    }
}

#[cfg(test)]
mod tests {
    use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};

    use super::*;
    use crate::wire::control::BaseChunk;

    #[test]
    fn what_cannot_be_is_refused_and_a_page_is_asked_for_once() {
        let layout = Layout::flat(CHUNK_SIZE as u64 + 2 * PAGE_SIZE as u64).unwrap();
        let page = [7; PAGE_SIZE];
        let seal = receipt(PageHasher::new(5).page(&page));
        let said = |seed, chunk, pages: u64| {
            let seals = vec![seal; pages.count_ones() as usize];
            Base { seed, chunks: vec![BaseChunk { chunk, pages, seals }] }
        };
        let mut base = BaseSeals::new(&layout, 5).unwrap();
        base.add(&said(5, 0, 0b101), &layout).unwrap();
        for (bad, what) in [
            (said(6, 1, 1), "seed"),
            (said(5, 1, 0b100), "does not have"),
            (said(5, 2, 1), "does not have"),
            (said(5, 0, 1), "twice"),
        ] {
            let error = base.add(&bad, &layout).unwrap_err().to_string();
            assert!(error.contains(what), "{what}: {error}");
        }
        base.add(&said(5, 1, 0b10), &layout).unwrap();
        assert_eq!([base.take(0, 0b110), base.take(0, 0b111), base.take(0, u64::MAX)], [0b100, 0b1, 0]);
        assert!(base.holds(0, 2, &page) && !base.holds(0, 1, &page) && !base.holds(0, 2, &[8; PAGE_SIZE]));
        assert_eq!(base.take(1, u64::MAX), 0b10);
    }
}
