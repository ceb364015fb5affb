//! One stream's worker at the destination.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pagecopy::backend::{BackendError, Placer};
use pagecopy::bitmap::{bits, runs};
use pagecopy::choose::{Busy, Load};
use pagecopy::chunk::{Announced, ChunkDecoder, DecodeError};
use pagecopy::digest::receipt;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::xbzrle::Page;

use super::PageSink;
use super::older::BaseReader;
use crate::carrier::{DestinationEnd, FrameReceiver};
use crate::clock;
use crate::local::{guarded, is_local, is_no_room, zeroed};
use crate::spent::Lap;
use crate::sys::ReceiveList;
use crate::wire::WireError;
use crate::wire::control::{StreamEnd, capability};
use crate::wire::frame::{self, ENCODED_MAX, FrameHeader, FrameKind};
use crate::wire::stream_number;

/// Headers and encoded sections are read through a buffer of this size.
const BUFFER_BYTES: usize = ENCODED_MAX + FrameHeader::LEN + AHEAD_BYTES;
/// How much is read ahead behind raw pages: the next headers, and not so much that raw pages are copied twice.
const AHEAD_BYTES: usize = 4096;
/// Receipts are sent when this many bytes of them wait, or when there is nothing to read.
const RECEIPTS_BYTES: usize = 4096;
/// How often the source is told what a thread does, in nanoseconds.
const LOAD_NANOS: u64 = 10_000_000;

/// Why a stream ended out of order.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The socket failed.
    #[error("stream {}: the connection from the source broke", stream_number(*stream))]
    Io {
        /// Which stream.
        stream: u16,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The source closed the stream without ending it.
    #[error("stream {}: the source closed the connection in the middle of {place}", stream_number(*stream))]
    Closed {
        /// Which stream.
        stream: u16,
        /// `the session` or `a frame`.
        place: &'static str,
    },
    /// The rest of a frame did not come.
    #[error("stream {}: the source stopped in the middle of a frame for {seconds} s", stream_number(*stream))]
    Timeout {
        /// Which stream.
        stream: u16,
        /// How long.
        seconds: u64,
    },
    /// A frame that is not one.
    #[error("stream {}, frame {seq}", stream_number(*stream))]
    Frame {
        /// Which stream.
        stream: u16,
        /// Number of the frame that was expected.
        seq: u64,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// An encoded section that does not decode.
    #[error("stream {}, frame {seq}, chunk {chunk}", stream_number(*stream))]
    Decode {
        /// Which stream.
        stream: u16,
        /// The frame.
        seq: u64,
        /// Its chunk.
        chunk: u32,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
    /// Guest memory could not be had.
    #[error("stream {}", stream_number(*stream))]
    Memory {
        /// Which stream.
        stream: u16,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// This host lacks something.
    #[error("stream {}: this host cannot take it in", stream_number(*stream))]
    Local {
        /// Which stream.
        stream: u16,
        /// What.
        #[source]
        source: io::Error,
    },
    /// The worker panicked: pageferry or the backend has a fault.
    #[error("stream {}: its worker panicked: {what}", stream_number(*stream))]
    Panicked {
        /// Which stream.
        stream: u16,
        /// What it said.
        what: String,
    },
    /// Told to stop.
    #[error("stream {}: stopped", stream_number(*stream))]
    Stopped {
        /// Which stream.
        stream: u16,
    },
}

impl ReceiveError {
    /// A carrier that failed.
    fn carrier(stream: u16, source: io::Error) -> Self {
        if is_local(&source) { Self::Local { stream, source } } else { Self::Io { stream, source } }
    }

    /// Whether this is the end of the session: another stream would fare no better.
    pub fn ends_session(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::Local { .. } | Self::Panicked { .. })
    }

    /// Whether there is no room for the guest.
    pub fn is_no_room(&self) -> bool {
        match self {
            Self::Memory { source, .. } => source.io().is_some_and(is_no_room),
            Self::Local { source, .. } => is_no_room(source),
            _ => false,
        }
    }
}

/// Receives the frames of stream `stream` into `sink` until the source ends it. Blocks; returns early when the sink is stopped or the
/// carrier is shut down. The carrier is gone when this returns: nothing more of it reaches memory.
pub fn receive_stream(
    sink: &PageSink,
    carrier: DestinationEnd,
    stream: u16,
) -> Result<StreamEnd, ReceiveError> {
    let run = || Worker::new(sink, carrier.frames, stream)?.run();
    guarded(run).unwrap_or_else(|what| Err(ReceiveError::Panicked { stream, what }))
}

/// The carrier with its read buffer and the receipts that wait to be sent.
struct Input<'a> {
    carrier: Box<dyn FrameReceiver>,
    sink: &'a PageSink,
    stream: u16,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    receipts: Vec<u8>,
    /// When the source was last told what this thread does, and how busy it had been.
    told: Option<(u64, Busy)>,
}

impl Input<'_> {
    /// Makes sure that `len` bytes are buffered and returns where they start. `in_frame` tells whether a wait for them is one in
    /// the middle of a frame, which has a limit.
    fn need(&mut self, len: usize, in_frame: bool) -> Result<usize, ReceiveError> {
        if self.end - self.start < len && self.buffer.len() - self.start < len {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let mut waited = Instant::now();
        while self.end - self.start < len {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            }
            let end = self.end;
            let mut buffer = std::mem::take(&mut self.buffer);
            let mut list = ReceiveList::new();
            list.push(&mut buffer[end..]);
            let got = self.receive(&mut list, in_frame || self.start != self.end, &mut waited);
            drop(list);
            self.buffer = buffer;
            self.end += got?;
        }
        let start = self.start;
        self.start += len;
        Ok(start)
    }

    /// One read. Receipts that wait are sent before it blocks.
    fn receive(
        &mut self,
        list: &mut ReceiveList<'_>,
        in_frame: bool,
        waited: &mut Instant,
    ) -> Result<usize, ReceiveError> {
        let stream = self.stream;
        let mut wait = false;
        loop {
            match self.carrier.receive(list, wait) {
                Ok(0) => {
                    let place = if in_frame { "a frame" } else { "the session" };
                    return Err(ReceiveError::Closed { stream, place });
                }
                Ok(got) => {
                    *waited = Instant::now();
                    self.sink.received.wire.fetch_add(got as u64, Ordering::Relaxed);
                    return Ok(got);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.sink.stopped() {
                        return Err(ReceiveError::Stopped { stream });
                    }
                    if in_frame && waited.elapsed() > self.sink.timeout {
                        return Err(ReceiveError::Timeout { stream, seconds: self.sink.timeout.as_secs() });
                    }
                    self.send_receipts()?;
                    wait = true;
                }
                Err(source) if source.kind() == io::ErrorKind::OutOfMemory => {
                    let source = BackendError::new("guest memory cannot be received into", source);
                    return Err(ReceiveError::Memory { stream, source });
                }
                Err(source) => return Err(ReceiveError::carrier(stream, source)),
            }
        }
    }

    /// Reads `left` bytes into the pieces of `list`, and what follows into the empty buffer.
    fn read_list(&mut self, list: ReceiveList<'_>, mut left: usize) -> Result<(), ReceiveError> {
        if left == 0 {
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        // Another binding, since the buffer lives shorter than what is in the list.
        let mut list = list;
        list.push(&mut buffer[..AHEAD_BYTES]);
        let mut waited = Instant::now();
        let result = loop {
            match self.receive(&mut list, true, &mut waited) {
                Ok(got) if got < left => left -= got,
                Ok(got) => break Ok(got - left),
                Err(e) => break Err(e),
            }
        };
        drop(list);
        self.buffer = buffer;
        (self.start, self.end) = (0, result?);
        Ok(())
    }

    /// Says now and then, beside receipts, how this thread spent its time, where that is known and was agreed on.
    fn tell_load(&mut self) {
        let now = clock::nanos();
        let due = self.told.is_none_or(|(at, _)| now.saturating_sub(at) >= LOAD_NANOS);
        if !due || self.sink.capabilities & capability::LOAD == 0 {
            return;
        }
        let Some(busy) = clock::busy() else { return };
        if let Some((at, before)) = self.told.replace((now, busy)) {
            let load = Load {
                passed_nanos: now.saturating_sub(at),
                worked_nanos: busy.worked_nanos.saturating_sub(before.worked_nanos),
                ready_nanos: busy.ready_nanos.saturating_sub(before.ready_nanos),
            };
            frame::encode_load(&mut self.receipts, load, &self.sink.hasher);
        }
    }

    fn send_receipts(&mut self) -> Result<(), ReceiveError> {
        if !self.receipts.is_empty() {
            self.tell_load();
            self.carrier.send(&self.receipts).map_err(|source| ReceiveError::carrier(self.stream, source))?;
            self.receipts.clear();
        }
        Ok(())
    }
}

pub(super) struct Worker<'a> {
    pub(super) sink: &'a PageSink,
    input: Input<'a>,
    decoder: ChunkDecoder,
    /// Where the frame's encoded section lies in the input's buffer.
    encoded_at: usize,
    /// Fills fresh pages.
    pub(super) placer: Option<Arc<dyn Placer>>,
    /// Reads the older copy of the guest, once pages are to come from there.
    pub(super) base: Option<Box<dyn BaseReader>>,
    /// Raw pages on their way to be placed.
    raw: Box<[u8]>,
    frames: u64,
    fold: u64,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        sink: &'a PageSink,
        carrier: Box<dyn FrameReceiver>,
        stream: u16,
    ) -> Result<Self, ReceiveError> {
        let zeroed = |bytes| zeroed(bytes).map_err(|source| ReceiveError::Local { stream, source });
        Ok(Self {
            sink,
            input: Input {
                carrier,
                sink,
                stream,
                buffer: zeroed(BUFFER_BYTES)?,
                start: 0,
                end: 0,
                receipts: Vec::with_capacity(2 * RECEIPTS_BYTES),
                told: None,
            },
            decoder: ChunkDecoder::new(),
            encoded_at: 0,
            raw: zeroed(CHUNK_SIZE)?,
            placer: None,
            base: None,
            frames: 0,
            fold: 0,
        })
    }

    fn run(mut self) -> Result<StreamEnd, ReceiveError> {
        loop {
            if let Some(end) = self.frame()? {
                return Ok(end);
            }
        }
    }

    /// Takes the next frame; returns the stream's account when it was the last.
    pub(super) fn frame(&mut self) -> Result<Option<StreamEnd>, ReceiveError> {
        let stream = self.input.stream;
        let (spent, mut lap) = (&self.sink.received.spent, Lap::start());
        let header = self.header()?;
        lap.to(&spent.receive);
        if header.kind == FrameKind::End {
            self.input.send_receipts()?;
            // The source waits for this: all receipts are on their way.
            self.input.carrier.finish().map_err(|source| ReceiveError::carrier(stream, source))?;
            return Ok(Some(StreamEnd { stream, frames: self.frames, fold: self.fold }));
        }
        let written = header.pages() & !header.zero;
        if written != 0 {
            self.sink.await_announced(header.chunk);
            lap.to(&spent.fault_in);
        }
        if header.kind == FrameKind::Same {
            self.take_same(&header)?;
            self.send_many_receipts()?;
            return Ok(None);
        }
        let fresh = self.fresh(header.chunk, written);
        let by_stream = header.raw_len() != 0;
        // Raw pages are placed where all of them are fresh; encoded ones each for itself.
        let placed = match &self.placer {
            Some(_) if by_stream && header.raw & !fresh == 0 => fresh,
            Some(_) => fresh & (header.delta | header.zstd),
            None => 0,
        };
        self.bring_in(&header, fresh & !placed)?;
        self.sink.touched.insert(header.chunk, written & !placed);
        lap.to(&spent.fault_in);
        self.need_encoded(&header)?;
        lap.to(&spent.receive);
        self.apply_encoded(&header, fresh)?;
        lap.to(&spent.apply);
        if by_stream && header.raw & !placed == 0 {
            self.fetch_raw(&header)?;
            lap.to(&spent.receive);
            self.place_raw(&header)?;
            lap.to(&spent.fault_in);
        } else {
            self.read_raw(&header)?;
            lap.to(&spent.receive);
        }
        self.apply_zero(&header);
        lap.to(&spent.apply);
        self.count(&header);
        self.answer(&header, 0);
        lap.to(&spent.hash);
        self.send_many_receipts()?;
        lap.to(&spent.receive);
        Ok(None)
    }

    /// The stream's id.
    pub(super) fn stream(&self) -> u16 {
        self.input.stream
    }

    /// Of these pages, those that still have to be brought in.
    pub(super) fn fresh(&mut self, chunk: u32, pages: u64) -> u64 {
        let fresh = pages & !self.sink.touched.get(chunk) & !self.sink.there.get(chunk);
        if fresh != 0 && self.placer.is_none() {
            self.placer = self.sink.placing().clone();
        }
        fresh
    }

    /// A frame was applied, but for pages of it that are not to be had: gets its receipt ready.
    pub(super) fn answer(&mut self, header: &FrameHeader, lacking: u64) {
        self.sink.carried.insert(header.chunk, header.pages());
        self.receipt(header, lacking);
        self.frames += 1;
    }

    /// Sends receipts once there are many.
    fn send_many_receipts(&mut self) -> Result<(), ReceiveError> {
        if self.input.receipts.len() >= RECEIPTS_BYTES { self.input.send_receipts() } else { Ok(()) }
    }

    /// Whether bytes were read that no frame has taken yet.
    #[cfg(test)]
    pub(super) fn buffered(&self) -> bool {
        self.input.start != self.input.end
    }

    /// Sends the receipts that wait.
    #[cfg(test)]
    pub(super) fn send_receipts(&mut self) -> Result<(), ReceiveError> {
        self.input.send_receipts()
    }

    /// Brings fresh pages in that are written where they lie: nothing is touched that was not there before, for a first touch that
    /// finds no room ends the process. A whole chunk comes at once, where memory is not brought in ahead.
    pub(super) fn bring_in(&self, header: &FrameHeader, fresh: u64) -> Result<(), ReceiveError> {
        let ram = &self.sink.ram;
        if fresh == 0 {
            return Ok(());
        }
        let whole = fresh == ram.layout().valid(header.chunk) && !ram.populates_ahead();
        let brought = if whole { ram.populate(header.chunk, 1) } else { ram.bring_in(header.chunk, fresh) };
        brought.map_err(|source| self.memory_error(source))
    }

    fn memory_error(&self, source: BackendError) -> ReceiveError {
        ReceiveError::Memory { stream: self.input.stream, source }
    }

    /// The next header, validated against itself, the stream, the session's agreement and the layout.
    fn header(&mut self) -> Result<FrameHeader, ReceiveError> {
        let at = self.input.need(FrameHeader::LEN, false)?;
        let bytes = self.input.buffer[at..].first_chunk().expect("need() buffered a header");
        let wrong = |source| ReceiveError::Frame { stream: self.input.stream, seq: self.frames, source };
        let header = FrameHeader::decode(bytes, &self.sink.hasher).map_err(wrong)?;
        header.check_layout(self.sink.ram.layout()).map_err(wrong)?;
        if header.placed && !self.input.carrier.places() {
            return Err(wrong(WireError::BadValue { field: "frame flags", value: 1 }));
        }
        if header.seq != self.frames {
            return Err(wrong(WireError::BadValue { field: "seq", value: header.seq }));
        }
        let same = if header.kind == FrameKind::Same { header.raw } else { 0 };
        for (pages, bit, field) in [
            (same, capability::BASE, "pages as in the base (not agreed on)"),
            (header.delta, capability::DELTA, "delta pages (not agreed on)"),
            (header.zstd, capability::ZSTD, "zstd pages (not agreed on)"),
            (header.references.into(), capability::REFERENCES, "references (not agreed on)"),
        ] {
            if pages != 0 && self.sink.capabilities & bit == 0 {
                return Err(wrong(WireError::BadValue { field, value: pages }));
            }
        }
        Ok(header)
    }

    /// Reads the encoded section ahead.
    fn need_encoded(&mut self, header: &FrameHeader) -> Result<(), ReceiveError> {
        let len = header.encoded_len as usize;
        self.encoded_at = if len == 0 { 0 } else { self.input.need(len, true)? };
        Ok(())
    }

    /// Checks the encoded section that was read, decodes all of it, and only then writes guest memory.
    fn apply_encoded(&mut self, header: &FrameHeader, fresh: u64) -> Result<(), ReceiveError> {
        if header.encoded_len == 0 {
            return Ok(());
        }
        let (at, len) = (self.encoded_at, header.encoded_len as usize);
        let encoded = &self.input.buffer[at..at + len];
        let found = self.sink.hasher.checksum(encoded);
        if found != header.encoded_checksum {
            return Err(ReceiveError::Frame {
                stream: self.input.stream,
                seq: header.seq,
                source: WireError::Checksum {
                    what: "encoded section",
                    expected: header.encoded_checksum,
                    found,
                },
            });
        }
        let memory = self.sink.ram.chunk(header.chunk);
        let page_at = |bit: u32| {
            memory
                .subslice(bit as usize * PAGE_SIZE, PAGE_SIZE)
                .expect("the header was checked by the layout")
        };
        let base = |bit: u32, base: &mut Page| {
            if fresh >> bit & 1 != 0 {
                // Not there yet: reading it would bring it in.
                base.fill(0);
            } else {
                page_at(bit).copy_to(&mut base[..]);
            }
        };
        let FrameHeader { delta, zstd, references, .. } = *header;
        let decoded = self
            .decoder
            .decode_with(Announced { delta, zstd, references }, encoded, base, |reference, pages| {
                self.sink.refer(reference, pages)
            })
            .map_err(|source| ReceiveError::Decode {
                stream: self.input.stream,
                seq: header.seq,
                chunk: header.chunk,
                source,
            })?;
        for bit in bits(header.delta | header.zstd) {
            let page = decoded.page(bit).expect("what was asked for is decoded");
            match &self.placer {
                Some(placer) if fresh >> bit & 1 != 0 => {
                    placer
                        .place(header.chunk, bit, page)
                        .map_err(|source| ReceiveError::Memory { stream: self.input.stream, source })?;
                    self.sink.touched.insert(header.chunk, 1 << bit);
                }
                _ => page_at(bit).copy_from(&page[..]),
            }
        }
        Ok(())
    }

    /// Reads raw pages, all of which are fresh, into a buffer that stays in cache.
    fn fetch_raw(&mut self, header: &FrameHeader) -> Result<(), ReceiveError> {
        let len = header.raw_len();
        let mut raw = std::mem::take(&mut self.raw);
        let buffered = len.min(self.input.end - self.input.start);
        raw[..buffered].copy_from_slice(&self.input.buffer[self.input.start..self.input.start + buffered]);
        self.input.start += buffered;
        let mut list = ReceiveList::new();
        list.push(&mut raw[buffered..len]);
        let result = self.input.read_list(list, len - buffered);
        self.raw = raw;
        result
    }

    /// Places them.
    fn place_raw(&self, header: &FrameHeader) -> Result<(), ReceiveError> {
        let mut at = 0;
        for (first, count) in runs(header.raw) {
            let bytes = &self.raw[at..at + count as usize * PAGE_SIZE];
            self.place(header.chunk, first, bytes)?;
            at += bytes.len();
        }
        Ok(())
    }

    /// Places pages from `first` on, all of which are fresh.
    pub(super) fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), ReceiveError> {
        let Some(placer) = &self.placer else { return Ok(()) };
        placer.place(chunk, first, bytes).map_err(|source| self.memory_error(source))?;
        let placed = (u64::MAX >> (64 - bytes.len() / PAGE_SIZE)) << first;
        self.sink.touched.insert(chunk, placed);
        Ok(())
    }

    /// Reads raw pages straight into guest memory.
    fn read_raw(&mut self, header: &FrameHeader) -> Result<(), ReceiveError> {
        let mut left = header.raw_len();
        if left == 0 {
            return Ok(());
        }
        let memory = self.sink.ram.chunk(header.chunk);
        let mut list = ReceiveList::new();
        for (first, count) in runs(header.raw) {
            let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
            let run = memory.subslice(at, len).expect("the header was checked by the layout");
            // What was read ahead comes first.
            let buffered = len.min(self.input.end - self.input.start);
            run.copy_from(&self.input.buffer[self.input.start..self.input.start + buffered]);
            self.input.start += buffered;
            left -= buffered;
            list.push_guest(&run.offset(buffered).expect("not beyond the run's end"));
        }
        self.input.read_list(list, left)
    }

    /// Pages of zeros: memory that was never written is zero already and stays a hole.
    fn apply_zero(&self, header: &FrameHeader) {
        let written = header.zero & self.sink.touched.get(header.chunk);
        if written != 0 {
            let memory = self.sink.ram.chunk(header.chunk);
            for bit in bits(written) {
                let page = memory.subslice(bit as usize * PAGE_SIZE, PAGE_SIZE);
                page.expect("the header was checked by the layout").copy_from(&[0u8; PAGE_SIZE][..]);
            }
        }
    }

    /// Hashes what memory now holds, page by page; of pages that could not be had it says 0.
    fn receipt(&mut self, header: &FrameHeader, lacking: u64) {
        let memory = self.sink.ram.chunk(header.chunk);
        let touched = self.sink.touched.get(header.chunk);
        let mut digests = [0u64; 64];
        let mut count = 0;
        for bit in bits(header.pages()) {
            digests[count] = if lacking >> bit & 1 != 0 {
                0
            } else if touched & (1 << bit) == 0 {
                receipt(self.sink.hasher.zero())
            } else {
                let page = memory.subslice(bit as usize * PAGE_SIZE, PAGE_SIZE);
                receipt(self.sink.hasher.memory(&page.expect("the header was checked by the layout")))
            };
            count += 1;
        }
        let at = self.input.receipts.len();
        frame::encode_receipt(&mut self.input.receipts, header.seq, &digests[..count], &self.sink.hasher);
        self.fold = frame::fold_receipt(self.fold, &self.input.receipts[at..], &self.sink.hasher);
    }

    fn count(&self, header: &FrameHeader) {
        let received = &self.sink.received;
        let add = |counter: &AtomicU64, pages: u64| {
            if pages != 0 {
                counter.fetch_add(pages.count_ones().into(), Ordering::Relaxed);
            }
        };
        add(&received.raw, header.raw);
        add(&received.zero, header.zero);
        add(&received.delta, header.delta);
        add(&received.compressed, header.zstd);
        let bytes = u64::from(header.pages().count_ones()) * PAGE_SIZE as u64;
        received.logical.fetch_add(bytes, Ordering::Relaxed);
        if header.placed {
            let placed = u64::from(header.raw.count_ones()) * PAGE_SIZE as u64;
            received.wire.fetch_add(placed, Ordering::Relaxed);
        }
    }
}
