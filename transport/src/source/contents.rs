//! Finding what was written by its content: memory is compared with what was last sent of it.
//!
//! What was last sent is known of every page ([`DigestTable`](pagecopy::table::DigestTable)), for pages that are as they were need not be
//! sent again. So this takes no memory of its own, and a content that was sent in between and is gone again is found too. While the guest
//! runs it is as good as a dirty log: what is written behind the look is found by the next. While it stands still, nothing is overlooked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pagecopy::backend::BackendError;
use pagecopy::bitmap::bits;
use pagecopy::layout::PAGE_SIZE;

use super::PageSource;
use crate::clock;

/// Chunks that a thread looks through before it takes others.
const STRETCH: u32 = 256;

/// What a comparison came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Compared {
    /// Pages that it found.
    pub(crate) pages: u64,
    /// How long it takes on cores that it has to itself, as they are where the guest stands still.
    pub(crate) alone: Duration,
}

/// What threads that compare together have done.
#[derive(Debug, Default)]
struct Search {
    next: AtomicU32,
    found: AtomicU64,
    worked_nanos: AtomicU64,
    given_up: AtomicBool,
}

impl Search {
    fn result(&self, threads: usize) -> Compared {
        let worked = Duration::from_nanos(self.worked_nanos.load(Ordering::Relaxed));
        Compared { pages: self.found.load(Ordering::Relaxed), alone: worked / threads.max(1) as u32 }
    }
}

/// A comparison that goes on in threads of its own. Dropped, it is given up.
pub(crate) struct Comparing {
    source: Arc<PageSource>,
    search: Arc<Search>,
    threads: Vec<JoinHandle<Result<(), BackendError>>>,
}

impl Comparing {
    /// Of all memory, as by [`PageSource::compare`]. A thread that cannot be had leaves its part to the others.
    pub(crate) fn begin(source: &Arc<PageSource>) -> Self {
        let search = Arc::new(Search::default());
        let begin = |number| {
            let (source, search) = (source.clone(), search.clone());
            let thread = thread::Builder::new().name(format!("compare-{number}"));
            thread.spawn(move || source.search(&search)).ok()
        };
        let threads = (0..source.searchers()).filter_map(begin).collect();
        Self { source: source.clone(), search, threads }
    }

    /// Whether nobody compares any more.
    pub(crate) fn is_over(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// What it came to; what is left is done.
    ///
    /// # Errors
    /// When the memory cannot tell its holes.
    pub(crate) fn end(mut self) -> Result<Compared, BackendError> {
        let threads = self.threads.len();
        let own = self.source.search(&self.search);
        self.join().fold(own, Result::and)?;
        Ok(self.search.result(threads))
    }

    /// One that panicked has left chunks out.
    fn join(&mut self) -> impl Iterator<Item = Result<(), BackendError>> + '_ {
        let resume = |panic| std::panic::resume_unwind(panic);
        self.threads.drain(..).map(move |thread| thread.join().unwrap_or_else(resume))
    }
}

impl Drop for Comparing {
    fn drop(&mut self) {
        self.search.given_up.store(true, Ordering::Relaxed);
        // What it found is pending, whatever became of it.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl PageSource {
    /// Makes pages pending whose content is not what was last sent, by all cores, and returns how many there were. Pages that are pending
    /// are not looked at. Holes are not read: one whose page held something is pending, for it is zero now.
    ///
    /// # Errors
    /// When the memory cannot tell its holes.
    pub(crate) fn compare(&self) -> Result<Compared, BackendError> {
        let search = Search::default();
        let threads = thread::scope(|scope| {
            let begin = |_| thread::Builder::new().spawn_scoped(scope, || self.search(&search)).ok();
            let others: Vec<_> = (1..self.searchers()).filter_map(begin).collect();
            let (threads, own) = (others.len() + 1, self.search(&search));
            // One that panicked has left chunks out.
            others
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .fold(own, Result::and)
                .map(|()| threads)
        })?;
        Ok(search.result(threads))
    }

    /// Threads that are worth while.
    fn searchers(&self) -> u32 {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        cores.min(self.pending.chunks().div_ceil(STRETCH)).max(1)
    }

    fn search(&self, search: &Search) -> Result<(), BackendError> {
        let begun = clock::worked_nanos();
        let mut result = Ok(());
        while result.is_ok() && !search.given_up.load(Ordering::Relaxed) {
            let first = search.next.fetch_add(STRETCH, Ordering::Relaxed);
            if first >= self.pending.chunks() {
                break;
            }
            result = self.compare_stretch(first).map(|found| {
                search.found.fetch_add(found, Ordering::Relaxed);
            });
        }
        search.worked_nanos.fetch_add(clock::worked_nanos() - begun, Ordering::Relaxed);
        result
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
        if found != 0 {
            self.notify();
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
