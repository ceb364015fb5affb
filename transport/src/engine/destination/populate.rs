//! Bringing memory in at the destination: ahead of its content where that pays, beside it as large pages where those do.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::destination::PageSink;
use crate::link::LinkEvent;
use crate::local::guarded;
use crate::spent::Spent;
use crate::wire::control::PRESENCE_CHUNKS;
use crossbeam_channel::{Receiver, Select};
use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::layout::CHUNK_SIZE;

use super::{Destination, IncomingError, Session, TICK, start_thread};

/// Most pieces of 2 MiB that are brought in by one call: 32 MiB.
const POPULATE_PIECES: usize = 16;

impl Session {
    /// Brings in the memory that data will come for, with all cores: before it comes where the memory says so, else while it comes, as
    /// large pages where those are worth it. Never more than this host has to spare, for nothing was sent yet and anything may be
    /// announced. Whoever cancels meanwhile, here or at the source, is heard at once.
    pub(super) fn populate(&mut self, listening: &Destination) -> Result<(), IncomingError> {
        if !self.ram.populates_ahead() {
            if self.ram.enlarges() {
                let dense = ramped_up(runs_of_pieces(&*self.ram, |chunk| self.hello.is_dense(chunk)));
                dense.iter().for_each(|run| self.sink.announce(run.clone()));
                self.dense = Some(dense);
            } else {
                self.sink.begin_placing();
            }
            return Ok(());
        }
        let runs = runs_of_pieces(&*self.ram, |chunk| self.hello.present(chunk));
        let workers = Populating::start(&self.ram, &self.sink, runs)?;
        let mut left = workers.threads.len();
        while left != 0 {
            let mut either = Select::new();
            let (ended, _) = (either.recv(&workers.ended), either.recv(&listening.events));
            match either.ready_timeout(TICK) {
                Ok(which) if which == ended => {
                    workers.ended.try_recv().unwrap_or(Ok(()))?;
                    left -= 1;
                }
                _ => match self.next(listening)? {
                    Some(LinkEvent::Message(message)) => {
                        self.machine.handle(message)?;
                    }
                    Some(LinkEvent::Dead(error)) => return Err(IncomingError::Link(error)),
                    None => {}
                },
            }
        }
        Ok(())
    }
}

/// Threads that populate memory; dropping it stops them.
struct Populating {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// One message a thread.
    ended: Receiver<Result<(), BackendError>>,
}

impl Populating {
    fn start(
        ram: &Arc<dyn GuestRam>,
        sink: &Arc<PageSink>,
        runs: Vec<Range<u32>>,
    ) -> Result<Self, IncomingError> {
        let (runs, next, stop) =
            (Arc::new(runs), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (says, ended) = crossbeam_channel::unbounded();
        let mut workers = Self { stop: stop.clone(), threads: Vec::new(), ended };
        for n in 0..cores() {
            let (ram, sink, runs, next, stop, says) =
                (ram.clone(), sink.clone(), runs.clone(), next.clone(), stop.clone(), says.clone());
            let populate = move || {
                while !stop.load(Ordering::Relaxed)
                    && let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let begun = Instant::now();
                    ram.populate(run.start, run.end - run.start)?;
                    Spent::add(&sink.received().spent.fault_in, begun.elapsed());
                }
                Ok(())
            };
            let work = move || {
                let panicked = |what| {
                    let error = std::io::Error::other(format!("it panicked: {what}"));
                    Err(BackendError::new("populate memory", error))
                };
                let _ = says.send(guarded(populate).unwrap_or_else(panicked));
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

/// The pieces of 2 MiB that are wanted, as runs of chunks for as many calls: a call for many pieces costs less, and enough calls keep
/// all cores busy. Never more than this host has to spare.
fn runs_of_pieces(ram: &dyn GuestRam, wanted: impl Fn(u32) -> bool) -> Vec<Range<u32>> {
    let chunks = ram.layout().chunks();
    let piece_bytes = u64::from(PRESENCE_CHUNKS) * CHUNK_SIZE as u64;
    let spare = ram.spare_bytes() / 10 * 9;
    let most = usize::try_from(spare / piece_bytes).unwrap_or(usize::MAX);
    let pieces: Vec<u32> =
        (0..chunks).step_by(PRESENCE_CHUNKS as usize).filter(|&chunk| wanted(chunk)).take(most).collect();
    pieces
        .chunk_by(|left, right| right - left == PRESENCE_CHUNKS)
        .flat_map(|run| run.chunks(POPULATE_PIECES))
        .map(|run| run[0]..(run[0] + run.len() as u32 * PRESENCE_CHUNKS).min(chunks))
        .collect()
}

/// The same runs, of which the first are cut into pieces that double in size: what waits for the first waits a fraction of a
/// millisecond, and the others are large by the time that calls are slow.
fn ramped_up(runs: Vec<Range<u32>>) -> Vec<Range<u32>> {
    let mut most = PRESENCE_CHUNKS;
    let mut pieces = Vec::with_capacity(runs.len() + 8);
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            let end = at.saturating_add(most).min(run.end);
            pieces.push(at..end);
            (at, most) = (end, most.saturating_mul(2));
        }
    }
    pieces
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
