//! An older copy that the destination has of the guest, some of which is not what is said of it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use pagecopy::bitmap::bits;
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{CHUNK_PAGES, PAGE_SIZE};
use pagecopy::xbzrle::Page;

use super::guest::Guest;
use super::rng::Rng;
use crate::destination::{BaseCopy, BaseReader};

/// The seed of its seals.
const SEED: u64 = 0xba5e;

/// See the module.
pub(super) struct OldCopy {
    pages: BTreeMap<(u32, u32), Held>,
}

/// What it has of a page.
struct Held {
    said: u64,
    /// Nothing, where it cannot be read.
    has: Option<Page>,
}

impl OldCopy {
    /// Of what a guest has now.
    pub(super) fn new(guest: &Guest, mut rng: Rng) -> Arc<Self> {
        let hasher = PageHasher::new(SEED);
        let layout = pagecopy::backend::GuestRam::layout(guest).clone();
        let all = (0..layout.chunks()).flat_map(|c| bits(layout.valid(c)).map(move |b| (c, b)));
        let mut pages = BTreeMap::new();
        for (chunk, bit) in all {
            let is = guest.page(chunk, bit);
            let mut other = is;
            other[rng.below(PAGE_SIZE as u64) as usize] ^= 1;
            let (said, has) = match rng.below(20) {
                0..=9 => (is, Some(is)),
                // It was written since it was said to be the same.
                10..=12 => (is, Some(other)),
                13 | 14 => (is, None),
                15 | 16 => (other, Some(other)),
                _ => continue,
            };
            pages.insert((chunk, bit), Held { said: receipt(hasher.page(&said)), has });
        }
        Arc::new(Self { pages })
    }
}

impl BaseCopy for OldCopy {
    fn seed(&self) -> u64 {
        SEED
    }

    fn seals(&self, chunk: u32) -> Result<(u64, [u64; CHUNK_PAGES]), String> {
        let (mut seals, mut pages) = ([0; CHUNK_PAGES], 0);
        for (&(_, bit), held) in self.pages.range((chunk, 0)..(chunk + 1, 0)) {
            seals[bit as usize] = held.said;
            pages |= 1 << bit;
        }
        if pages & 1 != 0 && seals[0].is_multiple_of(16) {
            return Err("this chunk cannot be read".into());
        }
        Ok((pages, seals))
    }

    fn reader(self: Arc<Self>) -> io::Result<Box<dyn BaseReader>> {
        Ok(Box::new(Reader { copy: self, pages: vec![[0; PAGE_SIZE]; CHUNK_PAGES].into() }))
    }
}

struct Reader {
    copy: Arc<OldCopy>,
    pages: Box<[Page]>,
}

impl BaseReader for Reader {
    fn read(&mut self, chunk: u32, pages: u64) -> (u64, &[Page]) {
        let mut has = 0;
        for bit in bits(pages) {
            if let Some(page) = self.copy.pages.get(&(chunk, bit)).and_then(|held| held.has.as_ref()) {
                self.pages[bit as usize] = *page;
                has |= 1 << bit;
            }
        }
        (has, &self.pages)
    }
}
