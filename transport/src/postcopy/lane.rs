//! A connection at the source: one thread that sends pages and takes receipts and requests.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::Sender;
use pagecopy::bitmap::runs;
use pagecopy::choose::CodecMode;
use pagecopy::chunk::{ChunkEncoder, Clocks};
use pagecopy::layout::PAGE_SIZE;

use super::channel::{Channel, send_all};
use super::pace::Pace;
use super::sealed::Sealer;
use super::{PageServer, PostcopyError};
use crate::clock;
use crate::dial::{Route, open_attached};
use crate::local::guarded;
use crate::socket::Connection;
use crate::source::held_back;
use crate::sys::{self, ReceiveList, SendList, Soon};
use crate::uri::Uri;
use crate::wire::frame::{RECEIPT_HEADER_LEN, RECEIPT_MAGIC, check_receipt, decode_receipt_header};
use crate::wire::postcopy::{PageRequest, REQUEST_MAGIC};
use crate::wire::{Preamble, Role, SessionId, WireError};

/// The connection that carries what the guest asks for.
pub(super) const FAULTS: u16 = 0;
/// How often a thread that waits looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);
/// Most frames without a receipt, of what nobody asked for.
const FRAMES_MAX: usize = 4096;
/// Most frames without a receipt, of what the guest asked for: far more than threads that can wait, each for one page. Past that the
/// destination asks and does not receive.
pub(super) const ANSWERS_MAX: usize = 1 << 16;
const CLOCKS: Clocks = Clocks { now: clock::nanos, worked: clock::worked_nanos };
/// Receipts and requests are read through a buffer of this size.
const BUFFER_BYTES: usize = 16 << 10;

/// A connection that has ended. What it had under way waits again.
#[derive(Debug)]
pub struct LaneEnd {
    /// Which.
    pub stream: u16,
    /// Why.
    pub error: PostcopyError,
}

/// A running connection. Dropping it breaks the connection and waits for its thread.
#[derive(Debug)]
pub struct Lane {
    connection: Arc<Connection>,
    thread: Option<JoinHandle<()>>,
}

impl Lane {
    /// Opens connection `stream` of a session with the destination at `uri`, which speaks `version`; 0 is the one for requests. Ends
    /// soon once `cancelled` says yes.
    pub fn dial(
        route: &Route,
        uri: &Uri,
        session: SessionId,
        version: u16,
        stream: u16,
        timeout: Duration,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Connection, PostcopyError> {
        let io = |source| PostcopyError::Io { stream, source };
        let preamble =
            Preamble { version_min: version, version_max: version, role: Role::Postcopy, stream, session };
        let (connection, _) = open_attached::<PostcopyError>(route, uri, &preamble, timeout, cancelled)?;
        connection.set_timeouts(Some(TICK), Some(timeout)).map_err(io)?;
        Ok(connection)
    }

    /// Serves pages over a connection that was [opened](Self::dial). Its end is told to `ends`.
    pub fn spawn(
        server: &Arc<PageServer>,
        connection: Connection,
        stream: u16,
        ends: Sender<LaneEnd>,
    ) -> io::Result<Self> {
        let connection = Arc::new(connection);
        let mut worker = Worker::new(server.clone(), connection.clone(), stream);
        let thread = std::thread::Builder::new().name(format!("postcopy-{stream}")).spawn(move || {
            let error =
                guarded(|| worker.run()).unwrap_or_else(|what| PostcopyError::Panicked { stream, what });
            // Whoever opened it may have gone.
            let _ = ends.send(worker.end(error));
        })?;
        Ok(Self { connection, thread: Some(thread) })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.connection.shutdown();
        if let Some(thread) = self.thread.take() {
            // Its panics were caught.
            let _ = thread.join();
        }
    }
}

/// A frame without a receipt.
struct Sent {
    seq: u64,
    chunk: u32,
    pages: u64,
    seal: u64,
    wire_bytes: u64,
    at: Duration,
}

/// What serves pages over a connection.
pub(super) struct Worker {
    server: Arc<PageServer>,
    connection: Arc<dyn Channel>,
    stream: u16,
    /// By the clock.
    began: Duration,
    pace: Pace,
    flight: VecDeque<Sent>,
    /// Bytes under way.
    bytes: u64,
    seq: u64,
    sealer: Sealer,
    /// What goes before the raw pages of the frame that is built.
    out: Vec<u8>,
    buffer: Box<[u8]>,
    len: usize,
    /// When what chooses the codec was last told what this connection does; and for how long there has been nothing to do since.
    told_at: Option<u64>,
    idle_nanos: u64,
    /// How long limits of bandwidth have held the next frame back.
    held_back: Duration,
}

impl Worker {
    pub(super) fn new(server: Arc<PageServer>, connection: Arc<dyn Channel>, stream: u16) -> Self {
        let encoder = if stream == FAULTS {
            // Somebody waits for each of these pages: nothing is faster on a path that is worth the name.
            ChunkEncoder::new(CodecMode::Raw, CLOCKS)
        } else {
            ChunkEncoder::of(server.effort.clone(), CLOCKS)
        };
        Self {
            server,
            connection,
            stream,
            began: clock::now(),
            pace: Pace::new(Duration::ZERO),
            flight: VecDeque::new(),
            bytes: 0,
            seq: 0,
            sealer: Sealer::new(encoder),
            out: Vec::new(),
            buffer: vec![0; BUFFER_BYTES].into(),
            len: 0,
            told_at: None,
            idle_nanos: 0,
            held_back: Duration::ZERO,
        }
    }

    /// Works until the connection ends.
    fn run(&mut self) -> PostcopyError {
        sys::run_soon(if self.stream == FAULTS { Soon::Urgent } else { Soon::Bulk });
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => {
                    let begun = clock::nanos();
                    self.server.wait(TICK);
                    self.idle_nanos += clock::nanos() - begun;
                }
                Err(error) => return error,
            }
        }
    }

    /// Does what there is to do, or waits a moment for the peer; says whether there was something: false where nothing
    /// waits to be sent and nothing is under way.
    pub(super) fn turn(&mut self) -> Result<bool, PostcopyError> {
        let busy = if self.stream == FAULTS { self.answer() } else { self.push() }?;
        if self.server.stopped() { Err(PostcopyError::Stopped { stream: self.stream }) } else { Ok(busy) }
    }

    /// The connection is over: what it had under way waits again.
    pub(super) fn end(&mut self, error: PostcopyError) -> LaneEnd {
        self.connection.shutdown();
        self.take_back();
        LaneEnd { stream: self.stream, error }
    }

    /// Takes requests, and receipts of what they were answered with.
    fn answer(&mut self) -> Result<bool, PostcopyError> {
        self.read(true)?;
        Ok(true)
    }

    /// Sends one frame of what nobody asked for where there is room for it and the limit of bandwidth lets it go, and takes what receipts
    /// have come.
    fn push(&mut self) -> Result<bool, PostcopyError> {
        self.read(false)?;
        let room = self.bytes < self.pace.limit() && self.flight.len() < FRAMES_MAX;
        if self.flight.is_empty() || room {
            let begun = clock::now();
            let goes = self.server.wait_bandwidth();
            self.held_back += clock::now() - begun;
            if !goes {
                return Ok(true);
            }
            self.server.give_way();
            if let Some((chunk, pages)) = self.server.take_next(self.pace.frame_pages()) {
                if self.flight.is_empty() {
                    self.pace.restart(clock::now() - self.began);
                }
                self.send(chunk, pages)?;
                return Ok(true);
            }
        }
        if self.flight.is_empty() {
            return Ok(false);
        }
        self.read(true)?;
        Ok(true)
    }

    /// Sends pages, those that are raw from where they lie: nobody writes them any more.
    fn send(&mut self, chunk: u32, pages: u64) -> Result<(), PostcopyError> {
        let server = self.server.clone();
        let memory = server.ram.chunk(chunk);
        let newest = self.flight.back().map_or(0, |newest| newest.wire_bytes);
        let passed = self.told_at.map_or(0, |before| clock::nanos().saturating_sub(before));
        let held = held_back(std::mem::take(&mut self.held_back), Duration::from_nanos(passed));
        let ahead = self.pace.ahead(self.bytes.saturating_sub(newest)).max(held);
        let sealed = self.sealer.seal(&server, (self.seq, ahead), chunk, pages);
        self.out.clear();
        sealed.head(&mut self.out, &server.hasher);
        let (header, seal, wire_bytes) = (sealed.header, sealed.seal, sealed.wire_bytes());
        let at = clock::now() - self.began;
        // First, so that it is taken back if it cannot be sent.
        self.flight.push_back(Sent { seq: self.seq, chunk, pages, seal, wire_bytes, at });
        self.bytes += wire_bytes;
        self.seq += 1;
        self.pace.on_send(pages.count_ones(), wire_bytes);
        server.sends(&header, wire_bytes);
        let mut list = SendList::new();
        list.push(&self.out);
        for (first, count) in runs(header.raw) {
            let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
            list.push_guest(&memory.subslice(at, len).expect("pages of a chunk lie in its mapping"));
        }
        let sent = send_all(&*self.connection, list).map_err(|e| self.io_error(e))?;
        server.counters.wire.fetch_add(sent, Ordering::Relaxed);
        self.tell();
        Ok(())
    }

    /// Tells what chooses the codec how a frame went.
    fn tell(&mut self) {
        let now = clock::nanos();
        let idle = std::mem::take(&mut self.idle_nanos);
        let passed = self.told_at.map_or(0, |before| now.saturating_sub(before).saturating_sub(idle));
        self.told_at = Some(now);
        self.sealer.chooser().observe_sent(now, passed, clock::busy);
    }

    /// Reads what is there and acts on it; with `wait`, for a moment at least.
    fn read(&mut self, wait: bool) -> Result<(), PostcopyError> {
        let mut list = ReceiveList::new();
        list.push(&mut self.buffer[self.len..]);
        let result = self.connection.receive(&mut list, wait);
        drop(list);
        match result {
            Ok(0) => return Err(PostcopyError::Closed { stream: self.stream }),
            Ok(got) => self.len += got,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(self.io_error(e)),
        }
        self.consume()?;
        // Also while requests come: whoever asks and does not receive is given up.
        let oldest = self.flight.front().map_or(Duration::ZERO, |sent| clock::now() - self.began - sent.at);
        if oldest > self.server.options.timeout { Err(self.timeout()) } else { Ok(()) }
    }

    /// Acts on everything that is whole in the buffer.
    fn consume(&mut self) -> Result<(), PostcopyError> {
        let buffer = std::mem::take(&mut self.buffer);
        let mut at = 0;
        let result = loop {
            match self.take_one(&buffer[at..self.len]) {
                Ok(Some(len)) => at += len,
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.buffer = buffer;
        self.buffer.copy_within(at..self.len, 0);
        self.len -= at;
        result
    }

    /// Acts on a receipt or a request; returns its length, or nothing where it is not whole.
    fn take_one(&mut self, bytes: &[u8]) -> Result<Option<usize>, PostcopyError> {
        let server = self.server.clone();
        let stream = self.stream;
        let wrong = |source| PostcopyError::Wire { stream, source };
        let Some(&magic) = bytes.first_chunk() else { return Ok(None) };
        match u32::from_le_bytes(magic) {
            REQUEST_MAGIC if self.stream == FAULTS => {
                let Some(bytes) = bytes.first_chunk() else { return Ok(None) };
                let request =
                    PageRequest::decode(bytes, &server.hasher, server.ram.layout()).map_err(wrong)?;
                if self.flight.len() >= ANSWERS_MAX {
                    let (field, value) = ("requested pages (none is receipted)", request.pages);
                    return Err(wrong(WireError::BadValue { field, value }));
                }
                let _answering = server.answering();
                let mut taken = server.take_requested(request).into_iter();
                while let Some((chunk, pages)) = taken.next() {
                    if let Err(error) = self.send(chunk, pages) {
                        taken.for_each(|(chunk, pages)| server.give_back(chunk, pages));
                        return Err(error);
                    }
                }
                Ok(Some(PageRequest::LEN))
            }
            RECEIPT_MAGIC => {
                let Some(header) = bytes.first_chunk::<RECEIPT_HEADER_LEN>() else { return Ok(None) };
                let (count, seq) = decode_receipt_header(header).map_err(wrong)?;
                let len = RECEIPT_HEADER_LEN + count * 8 + 8;
                let Some(bytes) = bytes.get(..len) else { return Ok(None) };
                check_receipt(bytes, &server.hasher).map_err(wrong)?;
                self.settle(seq, u64::from_le_bytes(*bytes.last_chunk().expect("as long as this")))
                    .map_err(wrong)?;
                Ok(Some(len))
            }
            found => Err(wrong(WireError::BadMagic { what: "postcopy connection", found: found.into() })),
        }
    }

    /// A receipt came: what it stands for has arrived, or waits again.
    fn settle(&mut self, seq: u64, seal: u64) -> Result<(), WireError> {
        let expected = self.flight.front().is_some_and(|sent| sent.seq == seq);
        let Some(sent) = (if expected { self.flight.pop_front() } else { None }) else {
            return Err(WireError::BadValue { field: "receipt seq", value: seq });
        };
        self.bytes -= sent.wire_bytes;
        let now = clock::now() - self.began;
        self.pace.on_receipt(now, sent.wire_bytes, now.saturating_sub(sent.at));
        if seal == sent.seal {
            self.server.receipted(sent.pages.count_ones());
        } else {
            self.server.counters.mismatches.fetch_add(sent.pages.count_ones().into(), Ordering::Relaxed);
            self.server.give_back(sent.chunk, sent.pages);
        }
        Ok(())
    }

    fn take_back(&mut self) {
        for sent in self.flight.drain(..) {
            self.server.counters.taken_back.fetch_add(sent.pages.count_ones().into(), Ordering::Relaxed);
            self.server.give_back(sent.chunk, sent.pages);
        }
    }

    fn io_error(&self, source: io::Error) -> PostcopyError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.timeout(),
            _ => PostcopyError::Io { stream: self.stream, source },
        }
    }

    fn timeout(&self) -> PostcopyError {
        PostcopyError::Timeout { stream: self.stream, seconds: self.server.options.timeout.as_secs() }
    }
}
