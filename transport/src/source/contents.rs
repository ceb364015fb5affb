//! Finding what was written by its content: memory is compared with what was last sent of it.
//!
//! What was last sent is known of every page ([`DigestTable`](pagecopy::table::DigestTable)), for pages that are as they were need not be
//! sent again. So this takes no memory of its own, and a content that was sent in between and is gone again is found too. While the guest
//! runs it is as good as a dirty log: what is written behind the look is found by the next. While it stands still, nothing is overlooked.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

use pagecopy::backend::BackendError;
use pagecopy::bitmap::bits;
use pagecopy::layout::PAGE_SIZE;

use super::PageSource;

/// Chunks that a thread looks through before it takes others.
const STRETCH: u32 = 256;

impl PageSource {
    /// Makes pages pending whose content is not what was last sent, by all cores, and returns how many there were. Pages that are pending
    /// are not looked at. Holes are not read: one whose page held something is pending, for it is zero now.
    ///
    /// # Errors
    /// When the memory cannot tell its holes.
    pub fn compare(&self) -> Result<u64, BackendError> {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let threads = cores.min(self.pending.chunks().div_ceil(STRETCH)).max(1);
        let (next, found) = (AtomicU32::new(0), AtomicU64::new(0));
        let work = || -> Result<(), BackendError> {
            loop {
                let first = next.fetch_add(STRETCH, Ordering::Relaxed);
                if first >= self.pending.chunks() {
                    return Ok(());
                }
                found.fetch_add(self.compare_stretch(first)?, Ordering::Relaxed);
            }
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            // One that panicked has left chunks out.
            others
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .fold(own, Result::and)
        })?;
        Ok(found.into_inner())
    }

    fn compare_stretch(&self, first: u32) -> Result<u64, BackendError> {
        let count = STRETCH.min(self.pending.chunks() - first);
        let mut populated = vec![0; count as usize];
        self.ram.populated(first, &mut populated)?;
        let mut found = 0;
        for (chunk, populated) in (first..).zip(populated) {
            let changed = self.changed(chunk, populated);
            if changed != 0 {
                self.pending.insert(chunk, changed);
                found += u64::from(changed.count_ones());
            }
        }
        Ok(found)
    }

    /// The pages of a chunk that are not what was last sent. Of those that were never sent the destination has zeros; of those of which it
    /// is not known any more what was sent, anything.
    fn changed(&self, chunk: u32, populated: u64) -> u64 {
        let (table, hasher) = (&self.shared.table, &self.shared.hasher);
        let settled = !self.pending.get(chunk);
        let gone = table.known(chunk) & !table.zeros(chunk) & !populated;
        let memory = self.ram.chunk(chunk);
        let differs = |bit: &u32| {
            let page =
                memory.subslice(*bit as usize * PAGE_SIZE, PAGE_SIZE).expect("a page that the chunk has");
            hasher.memory(&page) != table.get(chunk, *bit).unwrap_or(hasher.zero())
        };
        let forgotten = self.carried.get(chunk) & !table.known(chunk);
        let written =
            bits(populated & settled & !forgotten).filter(differs).fold(0, |pages, bit| pages | 1 << bit);
        (written | gone | forgotten) & settled & self.ram.layout().valid(chunk)
    }
}

#[cfg(test)]
mod tests;
