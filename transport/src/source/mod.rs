//! The source's data plane: pages that wait, stream workers that send them, receipts that settle them.
//!
//! One truth: the *pending* bitmap. A page is pending until a worker takes it into a frame; a frame that is sent and not
//! receipted when its stream dies makes its pages pending again, and so does a receipt that does not match. There is no
//! other retransmission.

mod bandwidth;
mod base;
mod contents;
#[cfg(test)]
mod doubles;
mod doubt;
mod durable;
mod feeder;
mod flight;
mod lane;
mod owners;
mod pace;
mod receipts;
mod settle;
mod share;
#[cfg(test)]
pub(crate) mod stepped;
mod window;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use pagecopy::backend::{BackendError, DirtyLog, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::choose::{CodecMode, Effort};
use pagecopy::chunk::{EncodedChunk, Shared};
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::PAGE_SIZE;

pub(crate) use bandwidth::{Bandwidth, held_back};
pub(crate) use base::BaseSeals;
use doubt::Doubts;
pub use feeder::Feeder;
pub(crate) use feeder::Waits;
pub use flight::{LaneEnd, LaneError, LaneNews, Unreceipted};
pub(crate) use lane::CLOCKS;
pub use lane::Lane;
use owners::Owners;
pub(crate) use settle::{Carrier, Settles};
pub use share::HostShare;
pub use window::Window;

use crate::clock;
#[cfg(test)]
use crate::simulation::fault;
use crate::spent::{Lap, Spent};
use crate::wire::WireError;

/// Chunks that are claimed, re-armed in the dirty log and encoded together.
pub const BATCH_CHUNKS: u32 = 16;

/// A range of chunks that has pages pending: at most [`BATCH_CHUNKS`], from `first`.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: u32,
    count: u32,
}

/// Such a range that was given out. It counts as outstanding until it is dropped, whatever becomes of who has it.
pub struct Batch {
    span: Span,
    source: Arc<PageSource>,
}

impl Batch {
    fn new(source: &Arc<PageSource>, span: Span) -> Self {
        source.outstanding.fetch_add(1, Ordering::AcqRel);
        Self { span, source: source.clone() }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if self.source.outstanding.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.source.notify();
        }
        self.source.notify();
    }
}

/// How the workers of a session behave.
#[derive(Clone, Copy, Debug)]
pub struct SourceOptions {
    /// Codec choice.
    pub codec: CodecMode,
    /// The destination takes frames that refer to pages which were sent before.
    pub references: bool,
    /// Streams.
    pub streams: u16,
    /// Bound of the delta cache, in bytes.
    pub cache_bytes: u64,
    /// Silence after which a stream is given up.
    pub timeout: Duration,
    /// Receipts that may mismatch before the migration fails.
    pub mismatches_max: u64,
}

/// What was sent and delivered so far; all counters only rise.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pages by what became of them when they were sent.
    pub zero: AtomicU64,
    /// Pages whose content was the one sent last, or is in the base: not sent.
    pub unchanged: AtomicU64,
    /// Pages sent as deltas.
    pub delta: AtomicU64,
    /// Pages sent in zstd frames.
    pub compressed: AtomicU64,
    /// Pages of other chunks that compressed pages referred to, each time.
    pub referred: AtomicU64,
    /// Compressed pages in frames that refer to others.
    pub similar: AtomicU64,
    /// Encoded bytes of these frames.
    pub similar_bytes: AtomicU64,
    /// Pages sent as they are.
    pub raw: AtomicU64,
    /// Bytes written to the streams.
    pub wire_sent: AtomicU64,
    /// Bytes of frames whose receipt came.
    pub wire_acked: AtomicU64,
    /// Page bytes of frames whose receipt came, and of unchanged pages.
    pub logical_acked: AtomicU64,
    /// Of these, page bytes that the destination was to take from its base.
    pub same_acked: AtomicU64,
    /// Pages whose receipt says that the base did not have them after all.
    pub same_lacking: AtomicU64,
    /// Page bytes of frames under way.
    pub logical_under_way: AtomicU64,
    /// Pages whose receipt did not match, without an excuse.
    pub mismatches: AtomicU64,
    /// Pages whose receipt did not match because memory was written that nobody was to write.
    pub written: AtomicU64,
    /// Pages that the guest wrote while they were sent from where they lie, so that their receipt did not match.
    pub torn: AtomicU64,
    /// Where the time of the threads went.
    pub spent: Spent,
    /// Receipts come this soon after their frame was sent, in nanoseconds, at best so far; 0 before the first.
    pub round_trip: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    /// Page bytes that were delivered over the wire, which is what the rest will have to be.
    pub(crate) fn logical_sent_and_acked(&self) -> u64 {
        let same = self.same_acked.load(Ordering::Relaxed);
        self.logical_acked.load(Ordering::Relaxed).saturating_sub(same)
    }

    /// The shortest round trip of a frame and its receipt so far; before the first, `otherwise`.
    pub(crate) fn path(&self, otherwise: Duration) -> Duration {
        match self.round_trip.load(Ordering::Relaxed) {
            0 => otherwise,
            nanos => Duration::from_nanos(nanos),
        }
    }

    /// Takes note of how long a frame and its receipt travelled.
    fn travelled(&self, time: Duration) {
        let nanos = (time.as_nanos() as u64).max(1);
        let best = self.round_trip.load(Ordering::Relaxed);
        if best == 0 {
            // Whoever is first; a better one that comes in between is good, too.
            let _ = self.round_trip.compare_exchange(0, nanos, Ordering::Relaxed, Ordering::Relaxed);
        } else if nanos < best {
            self.round_trip.fetch_min(nanos, Ordering::Relaxed);
        }
    }
}

/// The memory of a guest on its way out, shared by all stream workers of a session.
pub struct PageSource {
    ram: Arc<dyn GuestRam>,
    log: Arc<dyn DirtyLog>,
    options: SourceOptions,
    shared: Shared,
    /// How hard its streams compress.
    effort: Arc<Effort>,
    pending: PageBitmap,
    carried: PageBitmap,
    /// Pages that were no holes at the start.
    initial: PageBitmap,
    /// What the destination has an older copy of.
    base: Option<BaseSeals>,
    doubts: Doubts,
    /// Pages may have to be sent again, and may then be deltas: what was sent is kept.
    keeps_bases: bool,
    owners: Owners,
    bandwidth: Bandwidth,
    counters: Counters,
    progress: (Mutex<()>, Condvar),
    /// Batches given out and not yet dropped.
    outstanding: AtomicU64,
    /// Frames under way with pages that may turn out torn.
    doubtful: AtomicU64,
    stop: AtomicBool,
    /// Whoever is to be told of frames that are settled.
    settled: OnceLock<Box<dyn Fn(u32, u64) + Send + Sync>>,
}

impl PageSource {
    /// A source with these pages pending: all that are not holes, which the destination has already.
    pub fn new(
        ram: Arc<dyn GuestRam>,
        log: Arc<dyn DirtyLog>,
        hasher: PageHasher,
        options: SourceOptions,
        pending: PageBitmap,
    ) -> Self {
        let chunks = ram.layout().chunks();
        let effort = Arc::new(Effort::new(options.codec));
        effort.refer(options.references);
        Self {
            effort,
            shared: Shared::new(hasher, chunks, options.cache_bytes),
            carried: PageBitmap::new(chunks),
            initial: copy_of(&pending),
            base: None,
            doubts: Doubts::new(chunks, log.expects_writes()),
            keeps_bases: log.expects_writes(),
            owners: Owners::new(chunks),
            bandwidth: Bandwidth::new(None),
            counters: Counters::default(),
            progress: (Mutex::new(()), Condvar::new()),
            outstanding: AtomicU64::new(0),
            doubtful: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            settled: OnceLock::new(),
            pending,
            ram,
            log,
            options,
        }
    }

    /// One that shares with others what their host has, if that is to be shared.
    pub fn sharing(self, host: Option<Arc<HostShare>>) -> Self {
        Self { bandwidth: Bandwidth::new(host), ..self }
    }

    /// One of a guest that was paused before, if it was: hardly a page will be sent twice.
    pub(crate) fn of_paused(self, paused: bool) -> Self {
        Self { keeps_bases: self.keeps_bases && !paused, ..self }
    }

    /// One whose destination has an older copy of the guest.
    pub(crate) fn with_base(self, base: Option<BaseSeals>) -> Self {
        Self { base, ..self }
    }

    pub(crate) fn ram(&self) -> &Arc<dyn GuestRam> {
        &self.ram
    }

    /// Pages that were no holes at the start.
    pub(crate) fn initial(&self) -> &PageBitmap {
        &self.initial
    }

    /// How it sends.
    pub fn options(&self) -> &SourceOptions {
        &self.options
    }

    /// Hashes the session's pages.
    pub fn hasher(&self) -> &PageHasher {
        &self.shared.hasher
    }

    /// Pages that wait to be sent.
    pub fn pending(&self) -> &PageBitmap {
        &self.pending
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Limits the wire bytes of all streams together to so many a second, from now on; `None` lifts the limit.
    pub fn limit_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.bandwidth.set_rate(bytes_per_s);
    }

    /// The guest stands still, and waits. Nothing waits for a limit any more, its own or the host's, until one is set; and what leaves from
    /// where it lies is beyond doubt, until [`goes_on`](Self::goes_on).
    pub fn hurry(&self) {
        self.bandwidth.hurry();
        self.doubts.set_still(true);
    }

    /// Nobody writes memory from now on, and limits hold as they did: what leaves from where it lies is beyond doubt, until
    /// [`goes_on`](Self::goes_on).
    pub fn stands_still(&self) {
        self.doubts.set_still(true);
    }

    /// The guest goes on, and with it whoever wrote this memory.
    pub fn goes_on(&self) {
        self.doubts.set_still(false);
    }

    /// Distinct pages that frames carried.
    pub fn carried_pages(&self) -> u64 {
        self.carried.count()
    }

    /// The same without pages that are said to be missing, whose frames may or may not have arrived: the destination's account in
    /// postcopy.
    pub fn carried_pages_without(&self, missing: &PageBitmap) -> u64 {
        self.carried.count_outside(missing)
    }

    /// Pages that were no holes at the start and that no frame has carried. Once everything is delivered there are none: a page
    /// is pending or in a frame, until its receipt comes. Asked before the handover, because a page that got lost between the
    /// two would be missing from both sides' accounts alike.
    pub fn never_carried(&self) -> u64 {
        self.initial.count_outside(&self.carried)
    }

    /// Pages that the destination does not have: those that wait, and those that were no holes at the start and that no frame has
    /// carried. For when nothing is under way.
    pub fn missing(&self) -> PageBitmap {
        let missing = copy_of(&self.pending);
        for (chunk, pages) in self.initial.iter() {
            missing.insert(chunk, pages & !self.carried.get(chunk));
        }
        missing
    }

    /// Takes the pages of a chunk that are pending: whoever does saves them.
    pub(crate) fn take(&self, chunk: u32) -> u64 {
        self.pending.take(chunk)
    }

    /// Pages that were taken so wait again.
    pub(crate) fn give_back_taken(&self, chunk: u32, pages: u64) {
        self.pending.insert(chunk, pages);
    }

    /// Pages that were taken so are where they were to be sent to.
    pub(crate) fn saved(&self, chunk: u32, encoded: &EncodedChunk<'_>) {
        let pages = encoded.zero | encoded.zstd | encoded.raw;
        lane::count_pages(&self.counters, encoded);
        Counters::add(&self.counters.logical_acked, u64::from(pages.count_ones()) * PAGE_SIZE as u64);
        self.carried.insert(chunk, pages);
        self.notify();
    }

    /// `settled` is called for the pages of each frame once it is where it was sent. Once.
    pub(crate) fn when_settled(&self, settled: impl Fn(u32, u64) + Send + Sync + 'static) {
        let _ = self.settled.set(Box::new(settled));
    }

    /// Pages that were taken so are there already.
    pub(crate) fn keep(&self, chunk: u32, pages: u64) {
        self.carried.insert(chunk, pages);
        Counters::add(&self.counters.unchanged, pages.count_ones().into());
        Counters::add(&self.counters.logical_acked, u64::from(pages.count_ones()) * PAGE_SIZE as u64);
    }

    /// Pages that were said to be missing are to be sent like any others: the destination may have taken away what it had of them. For
    /// when no stream works.
    pub fn give_back(&self, missing: &PageBitmap) {
        for (chunk, pages) in missing.iter() {
            self.shared.void(chunk, pages);
            // A hole that no frame has carried is zero there as here, and is not read.
            let data = self.initial.get(chunk) | self.carried.get(chunk) | self.pending.get(chunk);
            self.pending.insert(chunk, pages & data);
        }
        self.notify();
    }

    /// Adds what was written since the last time to the pending pages: what the dirty log holds, and what a comparison finds where the log
    /// asks for one. Returns how many pages there were.
    pub fn dirty_sync(&self) -> Result<u64, BackendError> {
        let found = self.sync_log()?;
        Ok(if self.compared() { found + self.compare()?.pages } else { found })
    }

    /// Adds what the dirty log holds to the pending pages; returns how many pages it held. They are all only where it does not ask for a
    /// comparison ([`compared`](Self::compared)).
    pub(crate) fn sync_log(&self) -> Result<u64, BackendError> {
        let mut lap = Lap::start();
        let found = self.log.sync(&self.pending);
        lap.to(&self.counters.spent.scan);
        found
    }

    /// Whether all of memory is compared with what was sent, as a part of the last dirty sync.
    pub(crate) fn compared(&self) -> bool {
        self.log.compares()
    }

    /// For how long the guest stood still for dirty syncs.
    pub(crate) fn paused(&self) -> Duration {
        self.log.paused()
    }

    /// Page bytes that are pending or under way.
    pub fn remaining_bytes(&self) -> u64 {
        self.pending.count() * PAGE_SIZE as u64 + self.counters.logical_under_way.load(Ordering::Relaxed)
    }

    /// Nothing is pending and nothing is under way. Only the thread that feeds may ask: it knows that no batch appears meanwhile.
    fn is_settled(&self) -> bool {
        // In this order. With no batch given out, nobody holds pages that he took and has not launched, and nobody will; then
        // frames under way only get fewer, and one that fails makes its pages pending before it stops being under way.
        self.outstanding.load(Ordering::Acquire) == 0
            && self.counters.logical_under_way.load(Ordering::Acquire) == 0
            && self.pending.is_empty()
    }

    /// Nothing is pending, and nothing is under way that may turn out torn: what was dirty is on its way. Asked as
    /// [`is_settled`](Self::is_settled).
    fn is_sent(&self) -> bool {
        self.outstanding.load(Ordering::Acquire) == 0
            && self.doubtful.load(Ordering::Acquire) == 0
            && self.pending.is_empty()
    }

    /// Whether pages wait to be sent.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The next batch at or after `chunk` that has pages pending: it ends with the chunk in which it comes to `pages_min` of them.
    fn next_batch(&self, chunk: u32, pages_min: u64) -> Option<Span> {
        let first = self.pending.next_chunk(chunk)?;
        let most = BATCH_CHUNKS.min(self.pending.chunks() - first);
        let (mut count, mut pages) = (0, 0);
        while count < most && pages < pages_min {
            pages += u64::from(self.pending.get(first + count).count_ones());
            count += 1;
        }
        Some(Span { first, count })
    }

    /// Makes the pages of frames pending again whose stream has died on both sides, and voids what they would have been bases of.
    pub fn take_back(&self, frames: Vec<Unreceipted>) {
        for frame in frames {
            self.void_lost(&frame);
            self.pending.insert(frame.chunk, frame.pages);
            self.settle(&frame);
        }
        self.notify();
    }

    fn void_lost(&self, frame: &Unreceipted) {
        #[cfg(test)]
        if fault::is(fault::Fault::BaseNotVoided) {
            return;
        }
        self.shared.void(frame.chunk, frame.pages);
    }

    /// Tells the workers to stop where they stand; nothing more is delivered. For ends that are not in order.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.notify();
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits until a receipt comes in, at most `timeout`.
    pub(crate) fn wait_progress(&self, timeout: Duration) {
        let guard = self.progress.0.lock().unwrap_or_else(|e| e.into_inner());
        // Spurious or early wake-ups only cost the caller one more look.
        drop(self.progress.1.wait_timeout(guard, timeout));
    }

    fn notify(&self) {
        self.progress.1.notify_all();
    }

    /// A frame is no longer under way.
    fn settle(&self, frame: &Unreceipted) {
        let bytes = u64::from(frame.pages.count_ones()) * PAGE_SIZE as u64;
        self.owners.release(frame.chunk);
        frame.references.iter().for_each(|&chunk| self.return_lent(chunk));
        self.doubtful.fetch_sub(u64::from(frame.doubtful != 0), Ordering::Release);
        self.counters.logical_under_way.fetch_sub(bytes, Ordering::Release);
    }

    /// A frame that referred to this chunk is no longer under way, or was not sent.
    fn return_lent(&self, chunk: u32) {
        #[cfg(test)]
        if fault::is(fault::Fault::ReferenceNotHeld) {
            return;
        }
        self.owners.release(chunk);
    }

    /// How many of these pages of a frame are not any more what they were when it was sent.
    fn written_since(&self, frame: &Unreceipted, pages: u64) -> u64 {
        let memory = self.ram.chunk(frame.chunk);
        let changed = |(ours, bit): (u64, u32)| {
            let page = memory.subslice(bit as usize * PAGE_SIZE, PAGE_SIZE);
            let now = self.shared.hasher.memory(&page.expect("pages of a chunk lie in its mapping"));
            pages >> bit & 1 != 0 && receipt(now) != ours
        };
        frame.digests.into_iter().zip(bits(frame.pages)).filter(|&page| changed(page)).count() as u64
    }

    fn now(&self) -> Duration {
        clock::now()
    }
}

pub(crate) fn copy_of(bitmap: &PageBitmap) -> PageBitmap {
    let copy = PageBitmap::new(bitmap.chunks());
    bitmap.iter().for_each(|(chunk, pages)| {
        copy.insert(chunk, pages);
    });
    copy
}

/// Why a session's data plane cannot go on at all.
#[derive(Debug, thiserror::Error)]
pub enum FatalError {
    /// Content keeps arriving other than it was sent.
    #[error(
        "{count} pages arrived other than they were sent; the network or the memory of a host damages data: \
         check both hosts' memory and NIC error counters"
    )]
    Integrity {
        /// Pages that mismatched.
        count: u64,
    },
    /// Memory that nobody was to write while it is moved was written.
    #[error(
        "the memory was written during the transfer ({count} pages differ from what was sent): stop whoever writes the file, and send it again"
    )]
    Written {
        /// Pages that mismatched and are not what they were.
        count: u64,
    },
    /// This host lacks something: memory that it may pin, memory at all, descriptors.
    #[error("this host cannot send the guest's pages")]
    Local {
        /// What, and what to do.
        #[source]
        source: std::io::Error,
    },
    /// A thread of a stream panicked.
    #[error("a thread of the migration panicked, which is a fault of pageferry's: please report it: {what}")]
    Panicked {
        /// What it said.
        what: String,
    },
    /// Pages were lost on the way to the streams.
    #[error("{pages} pages were never sent, which is a fault of pageferry's: please report it")]
    NeverSent {
        /// Pages that no frame carried.
        pages: u64,
    },
    /// The dirty log failed.
    #[error("the dirty log failed: {0}")]
    Backend(#[from] BackendError),
}

/// A receipt that is not the one that must come next.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptError {
    /// Not a receipt at all.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A receipt for nothing.
    #[error(
        "the destination sent a receipt for frame {found} while frame {expected:?} was the oldest without one"
    )]
    OutOfOrder {
        /// The frame it names.
        found: u64,
        /// The oldest frame under way, if any.
        expected: Option<u64>,
    },
    /// A receipt with another number of pages.
    #[error("the receipt of frame {seq} has {found} digests instead of {expected}")]
    Count {
        /// The frame.
        seq: u64,
        /// Digests in the receipt.
        found: usize,
        /// Pages in the frame.
        expected: usize,
    },
}

#[cfg(test)]
mod tests {
    use pagecopy::backend::StaticLog;
    use pagecopy::layout::{CHUNK_SIZE, Layout};

    use super::*;
    use crate::nowhere::Nowhere;

    fn nowhere(layout: Layout, pending: PageBitmap) -> PageSource {
        let (ram, log) = (Arc::new(Nowhere(layout)), Arc::new(StaticLog));
        PageSource::new(ram, log, PageHasher::new(1), doubles::options(), pending)
    }

    #[test]
    fn what_was_missing_is_given_back_without_its_holes() {
        let (initial, missing) = (PageBitmap::new(4), PageBitmap::new(4));
        initial.insert(1, 0b0110);
        let source = nowhere(Layout::flat(4 * CHUNK_SIZE as u64).unwrap(), initial);
        source.pending.take(1);
        source.carried.insert(1, 0b0010);
        source.carried.insert(2, 0b1000);
        source.pending.insert(3, 1);
        // With what comes in with them.
        for chunk in 1..4 {
            missing.insert(chunk, u64::MAX);
        }
        source.give_back(&missing);
        assert_eq!([0, 1, 2, 3].map(|chunk| source.pending.get(chunk)), [0, 0b0110, 0b1000, 1]);
    }

    #[test]
    fn a_batch_ends_where_it_has_its_share() {
        let chunks = 40;
        let pending = PageBitmap::new(chunks);
        for chunk in 3..chunks {
            pending.insert(chunk, if chunk < 10 { u64::MAX } else { 1 });
        }
        let source = nowhere(Layout::flat(u64::from(chunks) * CHUNK_SIZE as u64).unwrap(), pending);
        let batch = |chunk, pages| source.next_batch(chunk, pages).map(|batch| (batch.first, batch.count));
        assert_eq!(batch(0, 64), Some((3, 1)));
        assert_eq!(batch(0, 65), Some((3, 2)));
        assert_eq!(batch(9, 66), Some((9, 3)));
        assert_eq!(batch(0, u64::MAX), Some((3, BATCH_CHUNKS)));
        assert_eq!(batch(30, 64), Some((30, 10)));
        assert_eq!(batch(chunks, 64), None);
    }

    #[test]
    fn pages_that_no_frame_carried_are_missed() {
        let layout = Layout::flat(4 * CHUNK_SIZE as u64).unwrap();
        let pending = PageBitmap::new(4);
        pending.insert(0, 0b111);
        pending.insert(3, 1 << 63);
        let source = nowhere(layout, pending);
        assert_eq!(source.never_carried(), 4);
        // Taken, and in no frame: pending no more, and still missed.
        source.pending.take(0);
        assert_eq!(source.never_carried(), 4);
        source.carried.insert(0, 0b101);
        source.carried.insert(1, 1);
        assert_eq!(source.never_carried(), 2);
        source.carried.insert(0, 0b010);
        source.carried.insert(3, 1 << 63);
        assert_eq!(source.never_carried(), 0);
    }
}
