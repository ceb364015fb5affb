//! A snapshot: the archive holds the guest of one instant, and the guest stands still for milliseconds.
//!
//! It is paused, its state is taken, its memory guarded, and it goes on. Pages are saved behind its back; who is about to write one that
//! was not saved waits until its chunk was copied, which comes before all others. So no page is saved twice, and there are no rounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pagecopy::backend::{BackendError, Fault, GuardedPages, Guest, StateBlob, StaticLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::choose::CodecMode;
use pagecopy::chunk::ChunkEncoder;
use pagecopy::digest::PageHasher;
use pagecopy::layout::CHUNK_SIZE;

use super::converge::Mover;
use super::save::{SaveWatch, Saving, Threads};
use super::{Cause, SourceBackend, base, caught_while, state};
use crate::archive::ArchiveError;
use crate::archive::image::Image;
use crate::archive::writer::{ArchiveWriter, Sender};
use crate::clock;
use crate::engine::report::Status;
use crate::local::guarded;
use crate::source::{CLOCKS, Feeder, PageSource, copy_of};
use crate::sys::{self, Soon};
use crate::uri::Uri;

/// Faults of pages that another thread is about to save are looked at again so soon.
const AGAIN: Duration = Duration::from_millis(1);
/// How long the thread that waits for writers waits before it looks around, and writes what it has gathered.
const TICK: Duration = Duration::from_millis(20);

impl Saving<'_> {
    /// The phases of a snapshot.
    pub(super) async fn run_snapshot(&mut self, uri: &Uri, guest: &Arc<dyn Guest>) -> Result<(), Cause> {
        let ram = self.backend.ram.clone();
        ram.guard_check()?;
        self.prepare(uri)?;
        let base = self.base(uri)?;
        let (archive, hasher) = {
            // Only to say how much there is; what there is at the instant is found then.
            let populated = crate::engine::populated(&*ram)?;
            let header = self.header(&populated, base.as_ref())?;
            let archive = Arc::new(ArchiveWriter::create(uri, &header)?);
            self.foretell_room(&archive, header.data_bytes);
            (archive, PageHasher::new(header.seed))
        };
        let mut instant = self.stop_and_guard(guest, hasher)?;
        let resumed = instant.begin(&archive).and_then(|()| Ok(guest.resume()?));
        resumed?;
        self.ran_on();
        self.progress.update(|r| r.status = Status::Active);
        let saved =
            caught_while(self.save_instant(&mut instant, &archive, base.as_ref().map(|(image, _)| image)))
                .await;
        // Whatever came of it, nobody waits any more.
        let ended = instant.end();
        let failed = archive.take_error();
        match (saved, failed) {
            (Ok(()), None) => ended?,
            (Err(cause @ (Cause::Cancelled | Cause::OutOfTime { .. })), _) | (Err(cause), None) => {
                return Err(cause);
            }
            (_, Some(error)) => return Err(error.into()),
        }
        let (state, pages) = (std::mem::take(&mut instant.state), instant.source.carried_pages());
        drop(instant);
        self.finish(archive, &state, pages)
    }

    /// Pauses the guest, takes its state, and guards its memory.
    fn stop_and_guard(&mut self, guest: &Arc<dyn Guest>, hasher: PageHasher) -> Result<Instant, Cause> {
        self.progress.update(|r| r.status = Status::Device);
        self.paused_at = Some(clock::now());
        guest.pause()?;
        let state = state::pieces(&**guest, 1)?;
        let populated = crate::engine::populated(&*self.backend.ram)?;
        let pages: Arc<dyn GuardedPages> = Arc::from(self.backend.ram.clone().guard(&populated)?);
        let guard = Guard { pages, unsaved: Arc::new(copy_of(&populated)) };
        // What is guarded is not written before it was saved.
        let backend = SourceBackend { log: Arc::new(StaticLog), ..self.backend.clone() };
        let source = self.page_source(&backend, hasher, populated);
        source.limit_bandwidth(self.progress.tuning().bandwidth);
        source.when_settled({
            let guard = guard.clone();
            move |chunk, pages| {
                // An error is found by the thread that waits for writers, which ends the snapshot by it.
                let _ = guard.saved(chunk, pages);
            }
        });
        Ok(Instant { guard, source, state, urgent: None })
    }

    /// Saves everything that was guarded.
    async fn save_instant(
        &mut self,
        instant: &mut Instant,
        archive: &Arc<ArchiveWriter>,
        base: Option<&Image>,
    ) -> Result<(), Cause> {
        let source = instant.source.clone();
        if let Some(image) = base {
            let guard = instant.guard.clone();
            let kept = move |chunk, pages| guard.saved(chunk, pages).map_err(ArchiveError::from);
            base::keep_same(&source, archive, image, &kept, &|| self.leave.check())?;
        }
        let env = Threads::default();
        let feeder = Feeder::new(source.clone(), self.options.streams);
        let mut watch = SaveWatch::start(&env, archive, &source, self, &feeder)?;
        let moved = async {
            self.progress.update(|r| (r.rounds, r.streams) = (1, self.options.streams));
            let check = || watch.check().and_then(|()| instant.check());
            feeder.settle(&env, check).await?;
            drop(feeder);
            watch.lanes_ended()
        };
        let moved = caught_while(moved).await;
        if moved.is_err() {
            source.stop();
            archive.stop();
        }
        env.join();
        moved?;
        instant.join()?;
        watch.report();
        match source.never_carried() {
            0 => Ok(()),
            pages => Err(crate::source::FatalError::NeverSent { pages }.into()),
        }
    }
}

/// Guarded memory, and which of its pages were not saved.
#[derive(Clone)]
struct Guard {
    pages: Arc<dyn GuardedPages>,
    unsaved: Arc<PageBitmap>,
}

impl Guard {
    /// These pages of a chunk were: whoever waits to write them goes on.
    fn saved(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.unsaved.remove(chunk, pages);
        self.pages.release(chunk, pages)
    }

    /// Lets those go on who wait for pages of a chunk that are not to be saved any more.
    fn release_saved(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.pages.release(chunk, pages & !self.unsaved.get(chunk))
    }
}

/// A guest of one instant.
struct Instant {
    guard: Guard,
    source: Arc<PageSource>,
    state: Vec<StateBlob>,
    /// The thread that saves before all others what somebody is about to write.
    urgent: Option<Urgent>,
}

struct Urgent {
    thread: std::thread::JoinHandle<Result<(), Cause>>,
    /// It is to end, once all was saved.
    end: Arc<AtomicBool>,
}

impl Instant {
    /// Starts the thread that waits for writers; the guest may run from then on.
    fn begin(&mut self, archive: &Arc<ArchiveWriter>) -> Result<(), Cause> {
        let end = Arc::new(AtomicBool::new(false));
        let encoder = ChunkEncoder::new(CodecMode::Raw, CLOCKS).each_once();
        let mut writers = Writers {
            guard: self.guard.clone(),
            source: self.source.clone(),
            sender: archive.sender(),
            encoder,
            snapshot: vec![0; CHUNK_SIZE].into(),
            out: Vec::with_capacity(2 * CHUNK_SIZE),
            end: end.clone(),
        };
        let run = move || {
            guarded(|| writers.run()).unwrap_or_else(|what| Err(Cause::Panicked { what })).inspect_err(|_| {
                // Nobody looks any more: nobody may wait.
                let _ = writers.guard.pages.end();
            })
        };
        let thread = std::thread::Builder::new().name("writers".into()).spawn(run)?;
        self.urgent = Some(Urgent { thread, end });
        Ok(())
    }

    /// Fails when the thread that waits for writers has ended.
    fn check(&mut self) -> Result<(), Cause> {
        match &self.urgent {
            Some(urgent) if urgent.thread.is_finished() => self.join(),
            _ => Ok(()),
        }
    }

    /// Everything was saved, or is not to be: waits for the thread's end.
    fn join(&mut self) -> Result<(), Cause> {
        let Some(Urgent { thread, end }) = self.urgent.take() else { return Ok(()) };
        end.store(true, Ordering::Release);
        thread.join().unwrap_or_else(|panic| Err(Cause::Panicked { what: crate::panic_text(&*panic) }))
    }

    /// Nobody waits any more.
    fn end(&mut self) -> Result<(), Cause> {
        let ended = self.guard.pages.end();
        self.join()?;
        Ok(ended?)
    }
}

/// The thread that waits for writers.
struct Writers {
    guard: Guard,
    source: Arc<PageSource>,
    sender: Sender,
    encoder: ChunkEncoder,
    snapshot: Box<[u8]>,
    out: Vec<u8>,
    end: Arc<AtomicBool>,
}

impl Writers {
    fn run(&mut self) -> Result<(), Cause> {
        sys::run_soon(Soon::Urgent);
        let mut faults: Vec<Fault> = Vec::new();
        // Those of pages that another thread has taken.
        let mut waiting: Vec<Fault> = Vec::new();
        loop {
            self.guard.pages.wait(&mut faults, if waiting.is_empty() { TICK } else { AGAIN })?;
            if faults.is_empty() && waiting.is_empty() {
                // Nobody waits: a good time to write what was gathered.
                self.sender.write_rest()?;
                if self.end.load(Ordering::Acquire) {
                    return Ok(());
                }
            }
            faults.append(&mut waiting);
            for fault in faults.drain(..) {
                self.save(fault.chunk)?;
                if self.guard.unsaved.get(fault.chunk) >> fault.page & 1 != 0 {
                    waiting.push(fault);
                }
            }
        }
    }

    /// Copies a chunk out, and lets who waits go on. One that a stream has taken is released by it, once it is written; and one that was
    /// guarded though it holds nothing needs no copy.
    fn save(&mut self, chunk: u32) -> Result<(), Cause> {
        let (pages, all) = (self.source.take(chunk), self.source.ram().layout().valid(chunk));
        if pages == 0 {
            return Ok(self.guard.release_saved(chunk, all)?);
        }
        let memory = self.source.ram().chunk(chunk);
        let plan = self.encoder.plan(chunk, 0);
        let encoded =
            self.encoder.encode_alone(plan, self.source.hasher(), &memory, &mut self.snapshot, pages);
        self.sender.save(chunk, &encoded, &memory, &mut self.out)?;
        self.source.saved(chunk, &encoded);
        Ok(self.guard.saved(chunk, all)?)
    }
}
