//! Threads of a destination that bring memory in: ahead of its content, or beside it as large pages.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::layout::CHUNK_SIZE;

use super::IncomingError;
use crate::destination::PageSink;
use crate::local::guarded;
use crate::spent::Spent;

/// Starts a thread that serves a session.
pub(super) fn start_thread(
    name: String,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, IncomingError> {
    let started = std::thread::Builder::new().name(name.clone()).spawn(work);
    started.map_err(|source| IncomingError::Thread { name, source })
}

/// Threads that populate memory; dropping it stops them.
pub(super) struct Populating {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Populating {
    /// Each thread says how it ended.
    pub(super) fn start(
        ram: &Arc<dyn GuestRam>,
        sink: &Arc<PageSink>,
        runs: Vec<Range<u32>>,
        says: impl Fn(Result<(), BackendError>) + Clone + Send + 'static,
    ) -> Result<Self, IncomingError> {
        let (runs, next, stop) =
            (Arc::new(runs), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut workers = Self { stop: stop.clone(), threads: Vec::new() };
        for n in 0..cores() {
            let (ram, sink, runs, next, stop, says) =
                (ram.clone(), sink.clone(), runs.clone(), next.clone(), stop.clone(), says.clone());
            let populate = move || {
                while !stop.load(Ordering::Relaxed)
                    && let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let begun = Instant::now();
                    ram.populate(run.start, run.end - run.start)?;
                    let bytes = u64::from(run.end - run.start) * CHUNK_SIZE as u64;
                    sink.received().populated.fetch_add(bytes, Ordering::Relaxed);
                    Spent::add(&sink.received().spent.fault_in, begun.elapsed());
                }
                Ok(())
            };
            let work = move || {
                let panicked = |what| {
                    let error = std::io::Error::other(format!("it panicked: {what}"));
                    Err(BackendError::new("populate memory", error))
                };
                says(guarded(populate).unwrap_or_else(panicked));
            };
            match start_thread(format!("populate-{n}"), work) {
                Ok(thread) => workers.threads.push(thread),
                Err(error) if workers.threads.is_empty() => return Err(error),
                // Those that there are do it all.
                Err(_) => break,
            }
        }
        Ok(workers)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }
}

impl Drop for Populating {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // What it did not bring in comes in as its content does.
            let _ = thread.join();
        }
    }
}

/// Threads that bring memory in.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}

/// Brings dense memory in as large pages while pages come, and soon ahead of them: a link that is slow need not wait for it.
pub(super) struct Enlarger {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Enlarger {
    /// What is left when it is through is placed, page by page.
    pub(super) fn start(sink: &Arc<PageSink>, runs: Vec<Range<u32>>) -> Self {
        let (stop, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(runs));
        // The first to start the next run, and how many threads are not through.
        let count = cores();
        let (next, left) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(count)));
        let work = || {
            let (sink, stop, runs, next, left) =
                (sink.clone(), stop.clone(), runs.clone(), next.clone(), left.clone());
            move || {
                // Also when it panics.
                let _last = Last { sink: &sink, left: &left };
                while !stop.load(Ordering::Relaxed)
                    && let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let begun = Instant::now();
                    sink.enlarge(run.start, run.end - run.start);
                    Spent::add(&sink.received().spent.fault_in, begun.elapsed());
                }
            }
        };
        let mut threads = Vec::new();
        for n in 0..count {
            match start_thread(format!("enlarge-{n}"), work()) {
                Ok(thread) => threads.push(thread),
                // Without a thread memory comes in as its content does.
                Err(_) => drop(Last { sink, left: &left }),
            }
        }
        Self { stop, threads }
    }
}

/// One of the threads; the last that ends has what is left placed, page by page.
struct Last<'a> {
    sink: &'a PageSink,
    left: &'a AtomicUsize,
}

impl Drop for Last<'_> {
    fn drop(&mut self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.sink.begin_placing();
        }
    }
}

impl Drop for Enlarger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // If it panicked, memory comes in as its content does.
            let _ = thread.join();
        }
    }
}
