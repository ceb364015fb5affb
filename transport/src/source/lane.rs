//! A stream at the source: one thread that encodes and sends, one that settles what was sent.

mod same;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use pagecopy::backend::BackendError;
use pagecopy::bitmap::{bits, runs};
use pagecopy::choose::{CodecMode, Plan};
use pagecopy::chunk::{ChunkEncoder, Clocks, EncodedChunk, Job, Reference};
use pagecopy::digest::{PageDigest, PageHasher, receipt};
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::xbzrle::Page;
use vm_memory::volatile_memory::VolatileSlice;

use super::bandwidth::held_back;
use super::doubt::{Doubts, LastDoubt, Leaves};
use super::flight::{LaneError, LaneNews, StreamState, Unreceipted};
use super::settle::Carrier;
use super::window::Window;
use super::{BATCH_CHUNKS, Batch, Counters, FatalError, PageSource, Span};
use crate::carrier::{FrameSender, Placement, SourceEnd};
use crate::clock;
use crate::local::guarded;
use crate::spent::Lap;
use crate::sys::SendList;
use crate::wire::control::StreamEnd;
use crate::wire::frame::{FrameHeader, FrameKind};

/// Small frames are gathered up to this many bytes before they are written.
const GATHER_BYTES: usize = 64 << 10;
/// A thread may lose its core for so long, and is not blocked by its stream for that.
const SLICE: Duration = Duration::from_millis(4);
/// Where it is written by the thread that encodes, and that thread waits all the time, so much counts as ahead of it: twice what is wanted,
/// so that half of the time is.
const WAITS_ALL: Duration = Duration::from_millis(20);
/// Weight of a frame in how much of its time a thread waits.
const WAITS_WEIGHT: f64 = 1.0 / 16.0;
/// How often an idle thread looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);

/// A running stream. Dropping it does not stop it; its end is reported on the channel given to [`Lane::spawn`].
pub struct Lane {
    stream: Arc<StreamState>,
    /// The thread that settles, which ends last.
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
        ends: Sender<LaneNews>,
    ) -> io::Result<Self> {
        Self::start(source, carrier.into(), stream, work, ends)
    }

    /// The same, whatever settles its frames.
    pub(crate) fn start(
        source: Arc<PageSource>,
        carrier: Carrier,
        stream: u16,
        work: Receiver<Batch>,
        ends: Sender<LaneNews>,
    ) -> io::Result<Self> {
        let Carrier { frames, settles, breaker } = carrier;
        let chooses = matches!(source.options.codec, CodecMode::Auto | CodecMode::Zstd { level: None });
        let window = Window::new(frames.window_min(), source.options.streams, !chooses);
        let state = Arc::new(StreamState::new(source, stream, breaker, window));
        let (sending, sent) = (state.clone(), ends.clone());
        let sender =
            std::thread::Builder::new().name(format!("send-{stream}")).spawn(move || {
                match caught(&sending, || LaneSender::new(&sending, frames).run(&work)) {
                    Ok(Some(account)) => drop(sent.send(LaneNews::Sent(account))),
                    Ok(None) => {}
                    Err(error) => sending.fail(error),
                }
            })?;
        let lane = state.clone();
        let thread = std::thread::Builder::new().name(format!("receipts-{stream}")).spawn(move || {
            if let Err(error) = caught(&state, || settles.run(&state)) {
                state.fail(error);
            }
            // Its panics were caught.
            let _ = sender.join();
            let _ = ends.send(LaneNews::Ended(state.end()));
            state.source().notify();
        })?;
        Ok(Self { stream: lane, thread })
    }

    /// Breaks the connection, so that both threads end at once, wherever they wait.
    pub fn abort(&self) {
        self.stream.fail(self.stream.stopped());
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

/// Runs a thread of a stream. A panic ends its session, for what it was about to do is not known.
fn caught<T>(stream: &StreamState, run: impl FnOnce() -> Result<T, LaneError>) -> Result<T, LaneError> {
    guarded(run).unwrap_or_else(|what| Err(stream.fatal(FatalError::Panicked { what })))
}

/// The thread that encodes and sends.
pub(super) struct LaneSender<'a> {
    stream: &'a StreamState,
    source: &'a PageSource,
    carrier: Box<dyn FrameSender>,
    encoder: ChunkEncoder,
    snapshot: Box<[u8]>,
    /// Headers and encoded sections that are not written yet.
    out: Vec<u8>,
    seq: u64,
    last_doubt: LastDoubt,
    /// When the chooser was last told what sending takes; and for how long there has been nothing to do since.
    told_at: Option<u64>,
    idle_nanos: u64,
    /// How long the last frame waited for room, in the window and in what carries it.
    blocked: Duration,
    /// Of what keeps frames: the part of its time that the thread waits for it, lately.
    waits: f64,
    /// How long limits of bandwidth have held this frame back.
    held_back: Duration,
}

pub(crate) const CLOCKS: Clocks = Clocks { now: clock::nanos, worked: clock::worked_nanos };

impl<'a> LaneSender<'a> {
    pub(super) fn new(stream: &'a StreamState, carrier: Box<dyn FrameSender>) -> Self {
        let source = &**stream.source();
        let encoder = ChunkEncoder::of(source.effort.clone(), CLOCKS);
        let keeps_bases = source.keeps_bases && !carrier.seals();
        Self {
            stream,
            source,
            carrier,
            encoder: if keeps_bases { encoder } else { encoder.each_once() },
            snapshot: vec![0; CHUNK_SIZE].into(),
            out: Vec::with_capacity(2 * GATHER_BYTES + CHUNK_SIZE),
            seq: 0,
            last_doubt: LastDoubt::default(),
            told_at: None,
            idle_nanos: 0,
            blocked: Duration::ZERO,
            waits: 0.0,
            held_back: Duration::ZERO,
        }
    }

    fn run(&mut self, work: &Receiver<Batch>) -> Result<Option<StreamEnd>, LaneError> {
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

    /// Says that no more frames come. Returns what the stream's account will be, where that can be told.
    pub(super) fn end(&mut self) -> Result<Option<StreamEnd>, LaneError> {
        if !self.carrier.seals() {
            self.out.extend_from_slice(&FrameHeader::end(self.seq).encode(&self.source.shared.hasher));
        }
        let account = self.stream.end_sending(self.seq);
        self.flush()?;
        Ok(account)
    }

    /// Fails when the other thread did, or the session stopped.
    fn check(&self) -> Result<(), LaneError> {
        if self.source.stopped() || self.stream.has_failed() {
            return Err(self.stream.stopped());
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
            if self.source.pending.get(chunk) != 0 && self.source.owners.claim(chunk, self.stream.id()) {
                *pages = self.source.pending.take(chunk);
                if *pages == 0 {
                    self.source.owners.release(chunk);
                }
            }
        }
        // Only now that the log is armed again may the pages be read: a write from here on is reported again.
        let cleared = self.source.log.clear(batch.first, taken);
        let mut result = cleared.map_err(|e: BackendError| self.stream.fatal(e));
        for (chunk, &pages) in (batch.first..).zip(taken.iter()) {
            if pages == 0 {
                continue;
            }
            if result.is_ok() {
                result = self.wait_pace();
            }
            if result.is_ok() {
                result = self.send_pages(chunk, pages);
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
        let (source, stream) = (self.source, self.stream);
        if source.bandwidth.is_open() {
            return Ok(());
        }
        // What is gathered is paid for.
        self.flush()?;
        let begun = clock::now();
        source.bandwidth.wait(|| source.stopped() || stream.has_failed());
        self.held_back += clock::now() - begun;
        self.check()
    }

    /// How long what is under way will take.
    fn ahead(&mut self) -> Duration {
        let passed = self.told_at.map_or(0, |before| clock::nanos().saturating_sub(before));
        let held = held_back(std::mem::take(&mut self.held_back), Duration::from_nanos(passed));
        let ahead = if self.carrier.seals() {
            WAITS_ALL.mul_f64(self.waits)
        } else {
            self.stream.ahead().max(self.blocked.saturating_sub(SLICE))
        };
        ahead.max(held)
    }

    /// Sends the pages of a claimed chunk. On failure they are among the unreceipted frames, or pending.
    fn send_chunk(&mut self, chunk: u32, pages: u64) -> Result<(), LaneError> {
        let source = self.source;
        let first_pass = source.carried.get(chunk) & pages == 0;
        let ahead = self.ahead();
        let plan = self.encoder.plan(chunk, ahead.as_nanos() as u64);
        // Nobody reads back what is kept: a page that is torn would be found when it is too late.
        let in_place =
            Doubts::in_place(plan, first_pass) && !(self.carrier.seals() && source.doubts.may_tear());
        let mut lap = Lap::start();
        // What this stream has under way is what the destination will have, unless it was sent from where it lies.
        let own = plan.references && !self.last_doubt.is_under_way(self.stream.oldest());
        let (encoded, lent) = if in_place {
            let encoded = self.encoder.survey(&source.shared, chunk, &source.ram.chunk(chunk), pages);
            lap.to(&source.counters.spent.scan);
            (encoded, Vec::new())
        } else {
            take_snapshot(&source.ram.chunk(chunk), pages, &mut self.snapshot);
            lap.to(&source.counters.spent.copy);
            let job = Job { chunk, snapshot: &self.snapshot, pages, first_pass };
            let encoded = encode(source, &mut self.encoder, plan, job, (self.stream.id(), own));
            lap.to(&source.counters.spent.encode);
            encoded
        };
        count_pages(&source.counters, &encoded);
        let sent = pages & !encoded.unchanged;
        if sent == 0 {
            source.owners.release(chunk);
            return Ok(());
        }
        let placement = place(self.stream, &mut *self.carrier, chunk, encoded.raw, sent);
        let placement =
            placement.inspect_err(|_| lent.iter().for_each(|&chunk| source.return_lent(chunk)))?;
        let header = header_of(&encoded, chunk, self.seq, placement.is_some(), &source.shared.hasher);
        self.seq += 1;
        let digests = receipts_of(sent, encoded.digests);
        let sealed = self.carrier.seal(&header, &digests[..sent.count_ones() as usize], &mut self.out);
        if sealed.is_none() {
            self.out.extend_from_slice(&header.encode(&source.shared.hasher));
        }
        self.out.extend_from_slice(encoded.encoded);
        let placed = if header.placed { header.raw } else { 0 };
        let leaves = match in_place {
            true => Leaves::InPlace,
            false if self.carrier.places() => Leaves::Placed(placed),
            false => Leaves::Copied,
        };
        let frame = Unreceipted {
            chunk,
            pages: sent,
            seq: header.seq,
            wire_bytes: sealed.unwrap_or_else(|| header.wire_bytes()),
            sent_at: source.now(),
            digests,
            doubtful: source.doubts.of_frame(leaves, header.raw, header.delta),
            same: 0,
            references: lent.into(),
            _placement: placement,
        };
        self.last_doubt.note(frame.seq, frame.doubtful);
        let wire_bytes = frame.wire_bytes();
        source.carried.insert(chunk, sent);
        source.bandwidth.spend(wire_bytes);
        let (begun, worked) = (clock::now(), clock::worked_nanos());
        self.launch(frame)?;
        // A carrier that places gathers by itself, so that it knows what it has to send before it waits for room to place.
        if header.raw != 0 || self.carrier.places() || self.out.len() >= GATHER_BYTES {
            self.write(header.raw & !placed, in_place.then_some(chunk))?;
        }
        self.blocked = clock::now() - begun;
        lap.to(&source.counters.spent.send);
        if self.carrier.seals() {
            let waited = self.blocked.as_nanos() as f64 - (clock::worked_nanos() - worked) as f64;
            self.note_wait(waited.max(0.0));
        }
        self.tell();
        Ok(())
    }

    /// So many nanoseconds of those since the last frame the thread has waited for what keeps it.
    fn note_wait(&mut self, waited: f64) {
        let passed = self.told_at.map_or(0, |before| clock::nanos().saturating_sub(before));
        let part = waited / (passed.saturating_sub(self.idle_nanos) as f64).max(waited).max(1.0);
        self.waits += (part - self.waits) * WAITS_WEIGHT;
    }

    /// Tells what chooses the codec how a frame went.
    fn tell(&mut self) {
        let now = clock::nanos();
        let idle = std::mem::take(&mut self.idle_nanos);
        let passed = self.told_at.map_or(0, |before| now.saturating_sub(before).saturating_sub(idle));
        self.told_at = Some(now);
        self.encoder.chooser().observe_sent(now, passed, clock::busy);
    }

    /// Puts a frame among those under way, and waits until the window has room for it.
    fn launch(&mut self, frame: Unreceipted) -> Result<(), LaneError> {
        let frames_max = self.carrier.frames_max();
        let bytes = frame.weight();
        if self.stream.launch(frame, frames_max) {
            return Ok(());
        }
        // What is gathered must be on its way, or the receipts waited for would never come. The newest frame's header goes
        // ahead of its raw pages, for which the destination then waits; the others' receipts make the room.
        self.flush()?;
        self.stream.wait_room(bytes, frames_max)
    }

    pub(super) fn flush(&mut self) -> Result<(), LaneError> {
        if self.out.is_empty() {
            self.check()?;
        } else {
            self.write(0, None)?;
        }
        self.carrier.flush().map_err(|e| self.stream.io_error(e))
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
        let bytes = self.carrier.send(list).map_err(|e| self.stream.io_error(e))?;
        self.out.clear();
        Counters::add(&self.source.counters.wire_sent, bytes);
        Ok(())
    }
}

/// Encodes pages of a chunk for a stream, which may refer to what it has under way itself only where `own` allows it. Returns besides
/// which chunks are held for it.
fn encode<'a>(
    source: &PageSource,
    encoder: &'a mut ChunkEncoder,
    plan: Plan,
    job: Job<'_>,
    (stream, own): (u16, bool),
) -> (EncodedChunk<'a>, Vec<u32>) {
    let mut lent = Vec::new();
    let encoded = encoder.encode_as(plan, &source.shared, job, &mut |reference, pages| {
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
    (encoded, lent)
}

/// The header of a frame.
fn header_of(
    encoded: &EncodedChunk<'_>,
    chunk: u32,
    seq: u64,
    placed: bool,
    hasher: &PageHasher,
) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Pages,
        seq,
        chunk,
        encoded_len: encoded.encoded.len() as u32,
        raw: encoded.raw,
        zero: encoded.zero,
        delta: encoded.delta,
        zstd: encoded.zstd,
        encoded_checksum: if encoded.encoded.is_empty() { 0 } else { hasher.checksum(encoded.encoded) },
        placed,
        references: !encoded.references.is_empty(),
    }
}

/// Has the carrier place these raw pages, of those that a frame is to carry. Pages whose receipt differed when they were placed
/// last time are sent from the snapshot.
fn place(
    stream: &StreamState,
    carrier: &mut dyn FrameSender,
    chunk: u32,
    raw: u64,
    sent: u64,
) -> Result<Option<Placement>, LaneError> {
    let source = stream.source();
    if raw == 0 || !source.doubts.may_place(chunk, raw) {
        return Ok(None);
    }
    carrier.place(chunk, raw).map_err(|e| {
        // There is no frame yet that would be taken back with the stream: the pages wait again, and are no base for anything.
        source.shared.void(chunk, sent);
        source.pending.insert(chunk, sent);
        source.owners.release(chunk);
        stream.io_error(e)
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

pub(super) fn count_pages(counters: &Counters, encoded: &EncodedChunk<'_>) {
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
