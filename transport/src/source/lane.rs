//! A stream at the source: one thread that encodes and sends, one that takes receipts.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use pagecopy::backend::BackendError;
use pagecopy::bitmap::{bits, runs};
use pagecopy::choose::{CodecMode, Delivered};
use pagecopy::chunk::{ChunkEncoder, Clocks, EncodedChunk, Job, Reference};
use pagecopy::digest::{PageDigest, receipt};
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::xbzrle::Page;
use vm_memory::volatile_memory::VolatileSlice;

use super::receipts::Receipts;
use super::window::Window;
use super::{BATCH_CHUNKS, Batch, Counters, FatalError, PageSource, ReceiptError, Span};
use crate::carrier::{Breaker, FrameSender, Placement, SourceEnd};
use crate::clock;
use crate::local::is_local;
use crate::panic_text;
use crate::spent::Lap;
use crate::sys::SendList;
use crate::wire::control::StreamEnd;
use crate::wire::frame::{FrameHeader, FrameKind};
use crate::wire::stream_number;

/// Small frames are gathered up to this many bytes before they are written.
const GATHER_BYTES: usize = 64 << 10;
/// How often an idle thread looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);

/// Why a stream ended out of order.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The socket failed.
    #[error("stream {}: the connection to the destination broke", stream_number(*stream))]
    Io {
        /// Which stream.
        stream: u16,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The destination closed the stream.
    #[error("stream {}: the destination closed the connection", stream_number(*stream))]
    Closed {
        /// Which stream.
        stream: u16,
    },
    /// Nothing was receipted for too long.
    #[error("stream {}: no receipt for {seconds} s", stream_number(*stream))]
    Timeout {
        /// Which stream.
        stream: u16,
        /// How long.
        seconds: u64,
    },
    /// Not the receipts the protocol wants.
    #[error("stream {}", stream_number(*stream))]
    Receipt {
        /// Which stream.
        stream: u16,
        /// What is wrong with it.
        #[source]
        source: ReceiptError,
    },
    /// Told to stop.
    #[error("stream {}: stopped", stream_number(*stream))]
    Stopped {
        /// Which stream.
        stream: u16,
    },
    /// The whole session cannot go on.
    #[error("stream {}", stream_number(*stream))]
    Fatal {
        /// Which stream noticed.
        stream: u16,
        /// Why.
        #[source]
        source: FatalError,
    },
}

/// A frame that was sent, or was to be sent, and has no receipt.
pub struct Unreceipted {
    pub(super) chunk: u32,
    pub(super) pages: u64,
    pub(super) seq: u64,
    pub(super) wire_bytes: u64,
    pub(super) sent_at: Duration,
    pub(super) digests: [u64; 64],
    /// Pages whose receipt may differ without damage: they were sent from memory that is written meanwhile, so that they may be
    /// newer than what was hashed; or as a delta whose base may have been such a page.
    pub(super) doubtful: u64,
    /// Chunks with pages that it refers to.
    pub(super) references: Box<[u32]>,
    /// What the carrier needs until the frame is settled.
    pub(super) _placement: Option<Placement>,
}

impl Unreceipted {
    /// What it took on the wire.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }
}

/// How a stream ended.
pub struct LaneEnd {
    /// Which stream, by its id.
    pub stream: u16,
    /// Its account if it ended in order.
    pub result: Result<StreamEnd, LaneError>,
    /// Frames without receipt: for [`PageSource::take_back`], once the destination has stopped the stream's worker.
    pub unreceipted: Vec<Unreceipted>,
}

/// Frames under way on a stream.
pub(super) struct Flight {
    pub(super) frames: VecDeque<Unreceipted>,
    pub(super) bytes: u64,
    pub(super) window: Window,
    /// When the wait for the destination began: at its last receipt, the first frame sent after silence, or END.
    pub(super) waiting_since: Duration,
    /// The sender has sent END: nothing will be added.
    pub(super) ended: bool,
    /// Frames sent in all, once `ended`.
    total: u64,
    /// Set by whichever thread fails first.
    pub(super) error: Option<LaneError>,
}

/// What both threads of a stream know.
pub(super) struct Shared {
    pub(super) source: Arc<PageSource>,
    pub(super) stream: u16,
    breaker: Arc<dyn Breaker>,
    flight: Mutex<Flight>,
    pub(super) room: Condvar,
    /// Bytes of frames whose receipt came.
    pub(super) delivered: AtomicU64,
}

/// A running stream. Dropping it does not stop it; its end is reported on the channel given to [`Lane::spawn`].
pub struct Lane {
    shared: Arc<Shared>,
    /// The receipt thread, which ends last.
    thread: JoinHandle<()>,
}

impl Lane {
    /// Starts the two threads of the stream with the id `stream` over what carries it. The sender takes batches from
    /// `work` until the channel is disconnected and empty, then ends the stream. `ends` gets the end, in order or not.
    pub fn spawn(
        source: Arc<PageSource>,
        carrier: SourceEnd,
        stream: u16,
        work: Receiver<Batch>,
        ends: Sender<LaneEnd>,
    ) -> io::Result<Self> {
        let SourceEnd { frames, receipts, breaker } = carrier;
        let chooses = matches!(source.options.codec, CodecMode::Auto | CodecMode::Zstd { level: None });
        let window = Window::new(frames.window_min(), !chooses);
        let shared = Arc::new(Shared::new(source, stream, breaker, window));
        let sending = shared.clone();
        let sender = std::thread::Builder::new().name(format!("send-{stream}")).spawn(move || {
            if let Err(error) = caught(&sending, || LaneSender::new(&sending, frames).run(&work)) {
                sending.fail(error);
            }
        })?;
        let lane = shared.clone();
        let thread = std::thread::Builder::new().name(format!("receipts-{stream}")).spawn(move || {
            let taken = caught(&shared, || {
                let (fold, result) = Receipts::new(&shared, receipts).run();
                result.map(|()| fold)
            });
            let fold = taken.unwrap_or_else(|error| {
                shared.fail(error);
                // An account of a stream that did not end in order is nobody's.
                0
            });
            // Its panics were caught.
            let _ = sender.join();
            let _ = ends.send(shared.end(fold));
            shared.source.notify();
        })?;
        Ok(Self { shared: lane, thread })
    }

    /// Breaks the connection, so that both threads end at once, wherever they wait.
    pub fn abort(&self) {
        self.shared.fail(LaneError::Stopped { stream: self.shared.stream });
    }

    /// Whether both threads have ended, or are about to: the end was reported.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until both threads have ended.
    pub fn join(self) {
        // Its panics were caught.
        let _ = self.thread.join();
    }
}

impl Shared {
    pub(super) fn new(
        source: Arc<PageSource>,
        stream: u16,
        breaker: Arc<dyn Breaker>,
        window: Window,
    ) -> Self {
        let flight = Flight {
            frames: VecDeque::with_capacity(512),
            bytes: 0,
            window,
            waiting_since: source.now(),
            ended: false,
            total: 0,
            error: None,
        };
        let (flight, room, delivered) = (Mutex::new(flight), Condvar::new(), AtomicU64::new(0));
        Self { source, stream, breaker, flight, room, delivered }
    }

    pub(super) fn flight(&self) -> MutexGuard<'_, Flight> {
        self.flight.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Notes the first error and wakes the other thread.
    pub(super) fn fail(&self, error: LaneError) {
        let mut flight = self.flight();
        flight.error.get_or_insert(error);
        drop(flight);
        self.breaker.shutdown();
        self.room.notify_all();
        self.source.notify();
    }

    pub(super) fn io_error(&self, source: io::Error) -> LaneError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.timeout(),
            // Another stream would lack the same.
            _ if is_local(&source) => self.fatal(FatalError::Local { source }),
            _ => LaneError::Io { stream: self.stream, source },
        }
    }

    pub(super) fn timeout(&self) -> LaneError {
        LaneError::Timeout { stream: self.stream, seconds: self.source.options.timeout.as_secs() }
    }

    pub(super) fn fatal(&self, source: impl Into<FatalError>) -> LaneError {
        LaneError::Fatal { stream: self.stream, source: source.into() }
    }

    pub(super) fn end(&self, fold: u64) -> LaneEnd {
        let mut flight = self.flight();
        let stream = self.stream;
        let result = match flight.error.take() {
            Some(error) => Err(error),
            None if !flight.frames.is_empty() => Err(LaneError::Stopped { stream }),
            None => Ok(StreamEnd { stream, frames: flight.total, fold }),
        };
        LaneEnd { stream, result, unreceipted: flight.frames.drain(..).collect() }
    }
}

/// Runs a thread of a stream. A panic ends its session, for what it was about to do is not known.
fn caught<T>(shared: &Shared, run: impl FnOnce() -> Result<T, LaneError>) -> Result<T, LaneError> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|payload| Err(shared.fatal(FatalError::Panicked { what: panic_text(&*payload) })))
}

/// The thread that encodes and sends.
pub(super) struct LaneSender<'a> {
    shared: &'a Shared,
    source: &'a PageSource,
    carrier: Box<dyn FrameSender>,
    encoder: ChunkEncoder,
    snapshot: Box<[u8]>,
    /// Headers and encoded sections that are not written yet.
    out: Vec<u8>,
    seq: u64,
    /// Frames before this one may have pages whose content is not known for sure, as long as they are under way.
    doubtful_before: u64,
    /// When the chooser was last told what sending takes; and for how long there has been nothing to do since.
    told_at: Option<u64>,
    idle_nanos: u64,
}

const CLOCKS: Clocks = Clocks { now: clock::nanos, worked: clock::worked_nanos };

impl<'a> LaneSender<'a> {
    pub(super) fn new(shared: &'a Shared, carrier: Box<dyn FrameSender>) -> Self {
        let source = &*shared.source;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let encoder = ChunkEncoder::new(source.options.codec, CLOCKS)
            .sharing(source.options.streams, cores, source.options.near)
            .referring(source.options.references);
        Self {
            shared,
            source,
            carrier,
            encoder: if source.log.expects_writes() { encoder } else { encoder.each_once() },
            snapshot: vec![0; CHUNK_SIZE].into(),
            out: Vec::with_capacity(2 * GATHER_BYTES + CHUNK_SIZE),
            seq: 0,
            doubtful_before: 0,
            told_at: None,
            idle_nanos: 0,
        }
    }

    fn run(&mut self, work: &Receiver<Batch>) -> Result<(), LaneError> {
        loop {
            match work.try_recv() {
                Ok(batch) => {
                    self.work_off(batch)?;
                    continue;
                }
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => self.flush()?,
            }
            let begun = clock::nanos();
            let received = work.recv_timeout(TICK);
            self.idle_nanos += clock::nanos() - begun;
            match received {
                Ok(batch) => self.work_off(batch)?,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => self.check()?,
            }
        }
        self.end()
    }

    /// Says that no more frames come.
    pub(super) fn end(&mut self) -> Result<(), LaneError> {
        self.out.extend_from_slice(&FrameHeader::end(self.seq).encode(&self.source.shared.hasher));
        let mut flight = self.shared.flight();
        (flight.ended, flight.total) = (true, self.seq);
        flight.waiting_since = self.source.now();
        drop(flight);
        self.flush()
    }

    /// Fails when the other thread did, or the session stopped.
    fn check(&self) -> Result<(), LaneError> {
        if self.source.stopped() || self.shared.flight().error.is_some() {
            return Err(LaneError::Stopped { stream: self.shared.stream });
        }
        Ok(())
    }

    #[allow(
        clippy::needless_pass_by_value,
        reason = "a batch counts as outstanding until it is dropped, which is here"
    )]
    pub(super) fn work_off(&mut self, batch: Batch) -> Result<(), LaneError> {
        self.send_batch(batch.span)
    }

    /// Claims the batch's chunks, re-arms the dirty log for their pages, and sends them. Chunks that belong to another stream
    /// stay pending.
    fn send_batch(&mut self, batch: Span) -> Result<(), LaneError> {
        let mut taken = [0u64; BATCH_CHUNKS as usize];
        let taken = &mut taken[..batch.count as usize];
        for (chunk, pages) in (batch.first..).zip(taken.iter_mut()) {
            if self.source.pending.get(chunk) != 0 && self.source.owners.claim(chunk, self.shared.stream) {
                *pages = self.source.pending.take(chunk);
                if *pages == 0 {
                    self.source.owners.release(chunk);
                }
            }
        }
        // Only now that the log is armed again may the pages be read: a write from here on is reported again.
        let cleared = self.source.log.clear(batch.first, taken);
        let mut result = cleared.map_err(|e: BackendError| self.shared.fatal(e));
        for (chunk, &pages) in (batch.first..).zip(taken.iter()) {
            if pages == 0 {
                continue;
            }
            if result.is_ok() {
                result = self.wait_pace();
            }
            if result.is_ok() {
                result = self.send_chunk(chunk, pages);
            } else {
                // Taken but not sent: nothing of it is lost.
                self.source.pending.insert(chunk, pages);
                self.source.owners.release(chunk);
            }
        }
        result
    }

    /// Waits until the bandwidth limit lets a frame go.
    fn wait_pace(&mut self) -> Result<(), LaneError> {
        let (source, shared) = (self.source, self.shared);
        if source.pace.is_open() {
            return Ok(());
        }
        // What is gathered is paid for.
        self.flush()?;
        // A limit is a slow link: what it holds back may be spent on encoding.
        source.pace.wait(|| source.stopped() || shared.flight().error.is_some());
        self.check()
    }

    /// Sends the pages of a claimed chunk. On failure they are among the unreceipted frames, or pending.
    fn send_chunk(&mut self, chunk: u32, pages: u64) -> Result<(), LaneError> {
        let source = self.source;
        let first_pass = source.carried.get(chunk) & pages == 0;
        let plan = self.encoder.plan(chunk);
        // A page that was torn by being sent from where it lies is not in its first pass any more: it goes from a copy.
        let in_place = plan.in_place(first_pass);
        let (spent, mut lap) = (&source.counters.spent, Lap::start());
        let mut lent = Vec::new();
        // What this stream has under way is what the destination will have, unless it was sent from where it lies.
        let own = plan.references && !self.doubts();
        let encoded = if in_place {
            let encoded = self.encoder.survey(&source.shared, chunk, &source.ram.chunk(chunk), pages);
            lap.to(&spent.scan);
            encoded
        } else {
            take_snapshot(&source.ram.chunk(chunk), pages, &mut self.snapshot);
            lap.to(&spent.copy);
            let job = Job { chunk, snapshot: &self.snapshot, pages, first_pass };
            let stream = self.shared.stream;
            let encoded = self.encoder.encode_as(plan, &source.shared, job, &mut |reference, pages| {
                let lends = lend(source, stream, own, reference, pages);
                lent.extend(lends.then_some(reference.chunk));
                lends
            });
            // What was written since it was sent is of no use.
            lent.retain(|&chunk| {
                let used = encoded.references.iter().any(|reference| reference.chunk == chunk);
                if !used {
                    source.return_lent(chunk);
                }
                used
            });
            lap.to(&spent.encode);
            encoded
        };
        count_pages(&self.source.counters, &encoded);
        let sent = pages & !encoded.unchanged;
        if sent == 0 {
            self.source.owners.release(chunk);
            return Ok(());
        }
        let placement = match place(self.shared, &mut *self.carrier, chunk, encoded.raw, sent) {
            Ok(placement) => placement,
            Err(e) => {
                lent.iter().for_each(|&chunk| source.return_lent(chunk));
                return Err(e);
            }
        };
        let header = FrameHeader {
            kind: FrameKind::Pages,
            seq: self.seq,
            chunk,
            encoded_len: encoded.encoded.len() as u32,
            raw: encoded.raw,
            zero: encoded.zero,
            delta: encoded.delta,
            zstd: encoded.zstd,
            encoded_checksum: checksum_of(&self.source.shared, encoded.encoded),
            placed: placement.is_some(),
            references: !encoded.references.is_empty(),
        };
        self.seq += 1;
        self.out.extend_from_slice(&header.encode(&self.source.shared.hasher));
        self.out.extend_from_slice(encoded.encoded);
        let placed = if header.placed { header.raw } else { 0 };
        let doubtful = if !source.log.expects_writes() {
            0
        } else if in_place {
            header.raw
        } else if self.carrier.places() {
            placed | header.delta
        } else {
            0
        };
        let frame = Unreceipted {
            chunk,
            pages: sent,
            seq: header.seq,
            wire_bytes: header.wire_bytes(),
            sent_at: source.now(),
            digests: receipts_of(sent, encoded.digests),
            doubtful,
            references: lent.into(),
            _placement: placement,
        };
        if doubtful != 0 {
            self.doubtful_before = self.seq;
        }
        let wire_bytes = frame.wire_bytes;
        self.source.carried.insert(chunk, sent);
        source.pace.spend(wire_bytes);
        self.launch(frame)?;
        // A carrier that places gathers by itself, so that it knows what it has to send before it waits for room to place.
        if header.raw != 0 || self.carrier.places() || self.out.len() >= GATHER_BYTES {
            self.write(header.raw & !placed, in_place.then_some(chunk))?;
        }
        lap.to(&spent.send);
        let now = clock::nanos();
        let idle = std::mem::take(&mut self.idle_nanos);
        let passed = self.told_at.map_or(0, |before| now.saturating_sub(before).saturating_sub(idle));
        self.told_at = Some(now);
        let delivered = Delivered {
            own: self.shared.delivered.load(Ordering::Relaxed),
            all: source.counters.wire_acked.load(Ordering::Relaxed),
        };
        self.encoder.chooser().observe_link(wire_bytes, passed, delivered, clock::busy);
        Ok(())
    }

    /// Whether a frame under way has pages that may arrive other than they were hashed.
    fn doubts(&self) -> bool {
        self.shared.flight().frames.front().is_some_and(|oldest| oldest.seq < self.doubtful_before)
    }

    /// Puts a frame among those under way, and waits until the window has room for it.
    fn launch(&mut self, frame: Unreceipted) -> Result<(), LaneError> {
        let (bytes, logical) = (frame.wire_bytes, u64::from(frame.pages.count_ones()) * PAGE_SIZE as u64);
        Counters::add(&self.source.counters.logical_under_way, logical);
        let mut flight = self.shared.flight();
        if flight.frames.is_empty() {
            flight.waiting_since = frame.sent_at;
            flight.window.restart(frame.sent_at);
        }
        flight.frames.push_back(frame);
        flight.bytes += bytes;
        let frames_max = self.carrier.frames_max();
        let source = self.source;
        let full = |flight: &Flight| {
            let most = flight.window.limit(source.now());
            (flight.bytes > most && flight.bytes > bytes) || flight.frames.len() > frames_max
        };
        if !full(&flight) {
            return Ok(());
        }
        // What is gathered must be on its way, or the receipts waited for would never come. The newest frame's header goes
        // ahead of its raw pages, for which the destination then waits; the others' receipts make the room.
        drop(flight);
        self.flush()?;
        let mut flight = self.shared.flight();
        while full(&flight) {
            if flight.error.is_some() || self.source.stopped() {
                return Err(LaneError::Stopped { stream: self.shared.stream });
            }
            let wait = flight.window.opens_in(source.now()).unwrap_or(TICK).min(TICK);
            flight = self.shared.room.wait_timeout(flight, wait).unwrap_or_else(|e| e.into_inner()).0;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<(), LaneError> {
        if self.out.is_empty() {
            self.check()?;
        } else {
            self.write(0, None)?;
        }
        self.carrier.flush().map_err(|e| self.shared.io_error(e))
    }

    /// Writes what is gathered and then raw pages: from where they lie in a chunk, or from the snapshot.
    fn write(&mut self, raw: u64, in_place: Option<u32>) -> Result<(), LaneError> {
        let source = self.source;
        let memory = in_place.map(|chunk| source.ram.chunk(chunk));
        let mut list = SendList::new();
        list.push(&self.out);
        for (first, count) in runs(raw) {
            let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
            match &memory {
                Some(memory) => {
                    list.push_guest(&memory.subslice(at, len).expect("pages of a chunk lie in its mapping"));
                }
                None => list.push(&self.snapshot[at..at + len]),
            }
        }
        let bytes = self.carrier.send(list).map_err(|e| self.shared.io_error(e))?;
        self.out.clear();
        Counters::add(&self.source.counters.wire_sent, bytes);
        Ok(())
    }
}

/// Has the carrier place these raw pages, of those that a frame is to carry. Pages whose receipt differed when they were placed
/// last time are sent from the snapshot.
fn place(
    shared: &Shared,
    carrier: &mut dyn FrameSender,
    chunk: u32,
    raw: u64,
    sent: u64,
) -> Result<Option<Placement>, LaneError> {
    let source = &shared.source;
    if raw == 0 || source.by_copy.get(chunk) & raw != 0 {
        return Ok(None);
    }
    carrier.place(chunk, raw).map_err(|e| {
        // There is no frame yet that would be taken back with the stream: the pages wait again, and are no base for anything.
        source.shared.void(chunk, sent);
        source.pending.insert(chunk, sent);
        source.owners.release(chunk);
        shared.io_error(e)
    })
}

/// Holds a chunk for a frame that refers to pages of it, and copies these. A chunk that waits to be sent again is not lent: it would
/// have to wait for as long as somebody refers to it.
fn lend(source: &PageSource, stream: u16, own: bool, reference: Reference, pages: &mut [Page]) -> bool {
    let chunk = reference.chunk;
    if source.pending.get(chunk) != 0 || !source.owners.lend(chunk, stream, own) {
        return false;
    }
    reference.copy(&source.ram.chunk(chunk), pages);
    true
}

/// Copies the pages, and only these, out of guest memory.
fn take_snapshot(memory: &VolatileSlice<'_>, pages: u64, snapshot: &mut [u8]) {
    for (first, count) in runs(pages) {
        let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
        let piece = memory.subslice(at, len).expect("pages of a chunk lie in its mapping");
        piece.copy_to(&mut snapshot[at..at + len]);
    }
}

/// What the receipt of these pages must say.
fn receipts_of(pages: u64, digests: &[PageDigest; 64]) -> [u64; 64] {
    let mut receipts = [0; 64];
    for (slot, bit) in receipts.iter_mut().zip(bits(pages)) {
        *slot = receipt(digests[bit as usize]);
    }
    receipts
}

fn checksum_of(shared: &pagecopy::chunk::Shared, encoded: &[u8]) -> u64 {
    if encoded.is_empty() { 0 } else { shared.hasher.checksum(encoded) }
}

fn count_pages(counters: &Counters, encoded: &EncodedChunk<'_>) {
    for (counter, pages) in [
        (&counters.zero, encoded.zero),
        (&counters.unchanged, encoded.unchanged),
        (&counters.delta, encoded.delta),
        (&counters.compressed, encoded.zstd),
        (&counters.raw, encoded.raw),
    ] {
        if pages != 0 {
            Counters::add(counter, pages.count_ones().into());
        }
    }
    let referred: u32 = encoded.references.iter().map(|reference| reference.pages.count_ones()).sum();
    if referred != 0 {
        Counters::add(&counters.referred, referred.into());
        Counters::add(&counters.similar, encoded.zstd.count_ones().into());
        Counters::add(&counters.similar_bytes, encoded.encoded.len() as u64);
    }
    Counters::add(&counters.logical_acked, u64::from(encoded.unchanged.count_ones()) * PAGE_SIZE as u64);
}
