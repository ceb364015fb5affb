//! Work on archives that takes long: done by several threads, watched and ended from outside.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::ArchiveError;
use crate::local::{guarded, lock};

/// Pieces of work that a thread takes at a time.
const BATCH: usize = 16;

/// How far some work on an archive is, for whoever watches, and the word that ends it. A clone is of the same work.
///
/// ```
/// # use transport::archive::Walk;
/// let walk = Walk::new(4);
/// let watch = walk.clone();
/// // Another thread, in the meantime:
/// assert_eq!((watch.done_bytes(), watch.total_bytes()), (0, 0));
/// watch.cancel();
/// assert!(walk.is_cancelled());
/// ```
#[derive(Clone, Debug)]
pub struct Walk {
    threads: usize,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Default for Walk {
    fn default() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from))
    }
}

impl Walk {
    /// For work of so many threads, at least one; by default one for each core.
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.max(1), shared: Arc::default() }
    }

    /// Bytes that are done: of files, or of memory, whichever the work is about.
    pub fn done_bytes(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Bytes that there are; 0 before anything has begun.
    pub fn total_bytes(&self) -> u64 {
        self.shared.total.load(Ordering::Relaxed)
    }

    /// Ends the work soon, with [`ArchiveError::Cancelled`].
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it is to end.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Relaxed)
    }

    /// Work on so many bytes begins.
    pub fn begin(&self, total_bytes: u64) {
        self.shared.done.store(0, Ordering::Relaxed);
        self.shared.total.store(total_bytes, Ordering::Relaxed);
    }

    /// So many more of them are done.
    pub fn step(&self, bytes: u64) {
        self.shared.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Does `work` for each number below `count`, by several threads, each with what `make` gives it and `end` takes back when there is
    /// nothing more. Returns when all have ended.
    ///
    /// # Errors
    /// The first of any of these, which ends all; and [`ArchiveError::Cancelled`].
    pub fn each<S, E: From<ArchiveError> + Send>(
        &self,
        count: usize,
        make: impl Fn() -> Result<S, E> + Sync,
        work: impl Fn(&mut S, usize) -> Result<(), E> + Sync,
        end: impl Fn(S) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let (next, error) = (AtomicUsize::new(0), Mutex::new(None));
        let failed = || lock(&error).is_some();
        let worker = || -> Result<(), E> {
            let mut own = make()?;
            loop {
                let first = next.fetch_add(BATCH, Ordering::Relaxed);
                if first >= count || failed() {
                    return end(own);
                }
                if self.is_cancelled() {
                    return Err(ArchiveError::Cancelled.into());
                }
                (first..count.min(first + BATCH)).try_for_each(|number| work(&mut own, number))?;
            }
        };
        let run = || {
            let result = guarded(worker).unwrap_or_else(|what| Err(ArchiveError::Panicked { what }.into()));
            if let Err(e) = result {
                lock(&error).get_or_insert(e);
            }
        };
        std::thread::scope(|scope| {
            for number in 1..self.threads.min(count.div_ceil(BATCH)) {
                // Fewer threads do it as well: this one works, too.
                let _ =
                    std::thread::Builder::new().name(format!("archive-{number}")).spawn_scoped(scope, run);
            }
            run();
        });
        error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(
        walk: &Walk,
        count: usize,
        work: impl Fn(usize) -> Result<(), ArchiveError> + Sync,
    ) -> Result<usize, ArchiveError> {
        let ended = AtomicUsize::new(0);
        walk.each(
            count,
            || Ok(()),
            |(), number| work(number),
            |()| {
                ended.fetch_add(1, Ordering::Relaxed);
                Ok(())
            },
        )?;
        Ok(ended.into_inner())
    }

    #[test]
    fn all_is_done_once_whatever_the_threads() {
        for (threads, count) in [(0, 5), (1, 0), (1, 100), (3, 16), (3, 17), (4, 1000)] {
            let times: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            let ended = each(&Walk::new(threads), count, |number| {
                times[number].fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            assert!(times.iter().all(|times| times.load(Ordering::Relaxed) == 1), "{threads} {count}");
            assert!((1..=threads.max(1)).contains(&ended.unwrap()), "{threads} {count}");
        }
    }

    #[test]
    fn an_error_a_panic_and_the_word_end_it() {
        let walk = Walk::new(3);
        let fail = |number| if number == 70 { Err(ArchiveError::Guest { why: "x".into() }) } else { Ok(()) };
        assert!(matches!(each(&walk, 1000, fail), Err(ArchiveError::Guest { .. })));
        let panic = |number| if number == 70 { panic!("at {number}") } else { Ok(()) };
        assert!(matches!(each(&walk, 1000, panic), Err(ArchiveError::Panicked { what }) if what == "at 70"));
        walk.cancel();
        assert!(each(&walk, 1000, |_| Ok(())).unwrap_err().is_cancelled());
    }
}
