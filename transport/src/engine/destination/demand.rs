//! Loading on demand: the guest runs at once, and its pages come as it touches them, the rest behind.
//!
//! It is postcopy with a file for a source. Whoever touches a page that is not there waits until its chunk was read, checked and placed;
//! other threads bring the archive in from its beginning to its end meanwhile. An archive that turns out damaged, or cannot be read any
//! more, costs the guest that runs, and nothing else: the file is as it was, and loads again.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pagecopy::backend::{Fault, GuestRam, MissingPages};
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::xbzrle::Page;

use super::{Incoming, IncomingError};
use crate::archive::ArchiveError;
use crate::archive::format::split_state;
use crate::archive::image::{ChunkReader, Image};
use crate::clock;
use crate::engine::explain;
use crate::engine::progress::Progress;
use crate::engine::report::{Postcopy, Status};
use crate::local::guarded;
use crate::sys::{self, Soon};

/// How often a thread that waits looks around.
const TICK: Duration = Duration::from_millis(20);
/// Faults of pages that another thread is about to bring are looked at again so soon.
const AGAIN: Duration = Duration::from_millis(1);

/// Whose guest it is that is loaded so.
#[derive(Clone, Copy)]
pub(super) struct Demand<'a> {
    pub(super) progress: &'a Progress,
    /// When it was begun.
    pub(super) began: Duration,
    /// Threads that bring in what nobody touches.
    pub(super) threads: usize,
}

/// Runs the guest of an archive, and brings its pages in until none is missing. Returns whether it runs.
pub(super) fn run(
    load: Demand<'_>,
    image: &Image,
    ram: &Arc<dyn GuestRam>,
    incoming: &mut dyn Incoming,
) -> Result<bool, IncomingError> {
    let Some(guest) = incoming.guest() else {
        let why = "memory alone is loaded whole: there is no guest that could run before its pages".into();
        return Err(IncomingError::Unfit { why });
    };
    if ram.missing_unit()? != 0 {
        let why = "memory that comes in by huge pages is loaded whole; load it without on-demand".into();
        return Err(IncomingError::Unfit { why });
    }
    let (state, runs) = split_state(image.state()?).ok_or_else(IncomingError::no_run_state)?;
    let missing = image.held();
    let memory = ram.clone().miss(&missing)?;
    load.progress.update(|r| r.status = Status::Device);
    guest.load_state(&state)?;
    if runs {
        guest.resume()?;
    }
    let total = missing.count();
    load.progress.update(|r| {
        r.status = Status::PostcopyActive;
        r.postcopy = Some(Postcopy { pages: total, pages_left: total, ..Postcopy::default() });
    });
    incoming.arrived(runs);
    let bringing = Bringing::new(image, memory, missing, load);
    match bringing.all(load) {
        Ok(()) => Ok(runs),
        Err(error) => {
            // Nobody brings its pages in any more.
            let stopped = guarded(|| guest.stop_for_good(&|| bringing.memory.end()));
            let why = explain(&error);
            let why = match stopped {
                Ok(Ok(())) => why,
                Ok(Err(stopping)) => format!("{why}; and it could not be stopped: {}", explain(&stopping)),
                Err(what) => format!("{why}; and stopping it panicked: {what}"),
            };
            Err(IncomingError::PostcopyFailed { why })
        }
    }
}

/// Pages on their way from the file into memory.
struct Bringing<'a> {
    image: &'a Image,
    memory: Box<dyn MissingPages>,
    /// Pages that no thread has taken on.
    untaken: PageBitmap,
    /// Chunks all of whose pages are there.
    done: PageBitmap,
    /// The next frame that is brought in unasked.
    next: AtomicUsize,
    left: AtomicU64,
    faults: AtomicU64,
    raw: AtomicU64,
    zero: AtomicU64,
    stop: AtomicBool,
    error: Mutex<Option<ArchiveError>>,
    began: Duration,
}

impl<'a> Bringing<'a> {
    fn new(image: &'a Image, memory: Box<dyn MissingPages>, missing: PageBitmap, load: Demand<'_>) -> Self {
        Self {
            image,
            memory,
            left: AtomicU64::new(missing.count()),
            done: PageBitmap::new(missing.chunks()),
            untaken: missing,
            next: AtomicUsize::new(0),
            faults: AtomicU64::new(0),
            raw: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            error: Mutex::default(),
            began: load.began,
        }
    }

    /// Brings all of it in.
    fn all(&self, load: Demand<'_>) -> Result<(), ArchiveError> {
        std::thread::scope(|scope| {
            let started = std::thread::Builder::new()
                .name("faults".into())
                .spawn_scoped(scope, || self.guard(|| self.serve_faults()));
            if let Err(source) = started {
                self.fail(ArchiveError::Read { offset: 0, source });
            }
            for number in 0..load.threads {
                let work = || self.guard(|| self.bring_rest());
                let started =
                    std::thread::Builder::new().name(format!("load-{number}")).spawn_scoped(scope, work);
                if let Err(source) = started
                    && number == 0
                {
                    self.fail(ArchiveError::Read { offset: 0, source });
                }
            }
            while self.left.load(Ordering::Acquire) != 0 && !self.stopped() {
                self.report(load);
                std::thread::park_timeout(TICK);
            }
            self.stop.store(true, Ordering::Release);
        });
        self.report(load);
        if let Some(error) = self.error.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        Ok(self.memory.end()?)
    }

    fn report(&self, load: Demand<'_>) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let drain_ms = (clock::now() - self.began).as_secs_f64() * 1e3;
        load.progress.update(|r| {
            let postcopy = r.postcopy.get_or_insert_default();
            postcopy.pages_left = get(&self.left);
            postcopy.faults = get(&self.faults);
            (postcopy.raw, postcopy.zero) = (get(&self.raw), get(&self.zero));
            postcopy.drain_ms = drain_ms;
            r.remaining_bytes = postcopy.pages_left * u64::from(r.page_size);
            r.logical_bytes = (postcopy.pages - postcopy.pages_left) * u64::from(r.page_size);
        });
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn fail(&self, error: ArchiveError) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.store(true, Ordering::Release);
    }

    fn guard(&self, work: impl FnOnce() -> Result<(), ArchiveError>) {
        let worked = guarded(work).unwrap_or_else(|what| Err(ArchiveError::Panicked { what }));
        if let Err(error) = worked {
            self.fail(error);
        }
    }

    /// The thread that brings what is touched.
    fn serve_faults(&self) -> Result<(), ArchiveError> {
        sys::run_soon(Soon::Urgent);
        let mut reader = self.image.reader()?;
        let (mut faults, mut waiting) = (Vec::new(), Vec::<Fault>::new());
        while !self.stopped() {
            let patience = if waiting.is_empty() { TICK } else { AGAIN };
            self.memory.wait(&mut faults, patience)?;
            self.faults.fetch_add(faults.len() as u64, Ordering::Relaxed);
            waiting.append(&mut faults);
            for fault in std::mem::take(&mut waiting) {
                self.bring(fault.chunk, &mut reader)?;
                if self.is_there(fault.chunk) {
                    // It is there, or is zero.
                    self.memory.settle(fault)?;
                } else {
                    waiting.push(fault);
                }
            }
        }
        Ok(())
    }

    /// A thread that brings everything else, as it lies.
    fn bring_rest(&self) -> Result<(), ArchiveError> {
        let mut reader = self.image.reader()?;
        let entries = self.image.archive().entries();
        while !self.stopped() {
            let Some(entry) = entries.get(self.next.fetch_add(1, Ordering::Relaxed)) else { return Ok(()) };
            if entry.pages != 0 {
                self.bring(entry.chunk, &mut reader)?;
            }
        }
        Ok(())
    }

    /// Nothing of a chunk is to come any more.
    fn is_there(&self, chunk: u32) -> bool {
        self.untaken.get(chunk) == 0 && (self.done.get(chunk) != 0 || self.image.frames_of(chunk).is_empty())
    }

    /// Brings what is missing of a chunk in, unless another thread is about to.
    fn bring(&self, chunk: u32, reader: &mut ChunkReader) -> Result<(), ArchiveError> {
        let pages = self.untaken.take(chunk);
        if pages == 0 {
            return Ok(());
        }
        let content = self.image.read(chunk, pages, reader)?;
        if content.damaged != 0 {
            return Err(self.image.damaged(chunk, content.damaged));
        }
        for (first, count) in runs(content.filled) {
            let pages = &content.pages[first as usize..(first + count) as usize];
            self.memory.place(chunk, first, <[Page]>::as_flattened(pages))?;
        }
        self.raw.fetch_add(content.filled.count_ones().into(), Ordering::Relaxed);
        self.zero.fetch_add(content.zero.count_ones().into(), Ordering::Relaxed);
        self.done.insert(chunk, 1);
        self.left.fetch_sub(pages.count_ones().into(), Ordering::Release);
        Ok(())
    }
}
