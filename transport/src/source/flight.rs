//! What is under way on a stream, which the thread that sends and the one that settles share; and how a stream ends.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use pagecopy::layout::PAGE_SIZE;

use super::window::Window;
use super::{Counters, FatalError, PageSource, ReceiptError};
use crate::carrier::{Breaker, Placement};
use crate::local::is_local;
use crate::wire::control::StreamEnd;
use crate::wire::frame::{encode_receipt, fold_receipt};
use crate::wire::stream_number;

/// How often a thread that waits for room looks whether it should stop.
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

/// A frame that was sent, or was to be sent, and is not settled: where a destination answers, it has no receipt.
pub struct Unreceipted {
    pub(super) chunk: u32,
    pub(super) pages: u64,
    pub(super) seq: u64,
    pub(super) wire_bytes: u64,
    pub(super) sent_at: Duration,
    pub(super) digests: [u64; 64],
    /// Pages whose receipt may differ without damage: see [`super::doubt`].
    pub(super) doubtful: u64,
    /// Pages that the destination is to take from its base.
    pub(super) same: u64,
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

    /// What it counts in the window. Of pages that the destination takes from its base the wire has next to nothing, and the destination
    /// as much to do as ever: what is under way of them is bounded by the same time.
    pub(super) fn weight(&self) -> u64 {
        if self.same == 0 { self.wire_bytes } else { u64::from(self.same.count_ones()) * PAGE_SIZE as u64 }
    }
}

/// How a stream ended.
pub struct LaneEnd {
    /// Which stream, by its id.
    pub stream: u16,
    /// Its account if it ended in order.
    pub result: Result<StreamEnd, LaneError>,
    /// Frames that are not settled: for [`PageSource::take_back`], once the destination has stopped the stream's worker.
    pub unreceipted: Vec<Unreceipted>,
}

/// What a stream's thread tells of it.
pub enum LaneNews {
    /// Everything is on its way, its end too. This will be its account, if it ends in order and nothing is damaged.
    Sent(StreamEnd),
    /// It has ended.
    Ended(LaneEnd),
}

/// Frames under way on a stream.
struct Flight {
    frames: VecDeque<Unreceipted>,
    bytes: u64,
    window: Window,
    /// When the wait for the destination began: at its last receipt, the first frame sent after silence, or END.
    waiting_since: Duration,
    /// The sender has sent END: nothing will be added.
    ended: bool,
    /// Frames sent in all, once `ended`.
    total: u64,
    /// Of the receipts that came.
    fold: u64,
    /// Set by whichever thread fails first.
    error: Option<LaneError>,
}

impl Flight {
    /// Whether the newest frame, of so many bytes, is one too many. One alone never is.
    fn is_full(&self, now: Duration, bytes: u64, frames_max: usize) -> bool {
        let most = self.window.limit(now);
        (self.bytes > most && self.bytes > bytes) || self.frames.len() > frames_max
    }
}

/// What both threads of a stream know.
pub(super) struct StreamState {
    source: Arc<PageSource>,
    stream: u16,
    breaker: Arc<dyn Breaker>,
    flight: Mutex<Flight>,
    room: Condvar,
}

impl StreamState {
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
            fold: 0,
            error: None,
        };
        Self { source, stream, breaker, flight: Mutex::new(flight), room: Condvar::new() }
    }

    /// The pages that it carries.
    pub(super) fn source(&self) -> &Arc<PageSource> {
        &self.source
    }

    /// The stream's id.
    pub(super) fn id(&self) -> u16 {
        self.stream
    }

    fn flight(&self) -> MutexGuard<'_, Flight> {
        self.flight.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Puts a frame among those under way; says whether the window has room for it.
    pub(super) fn launch(&self, frame: Unreceipted, frames_max: usize) -> bool {
        let (bytes, logical) = (frame.weight(), u64::from(frame.pages.count_ones()) * PAGE_SIZE as u64);
        Counters::add(&self.source.counters.logical_under_way, logical);
        Counters::add(&self.source.doubtful, u64::from(frame.doubtful != 0));
        let mut flight = self.flight();
        if flight.frames.is_empty() {
            flight.waiting_since = frame.sent_at;
            flight.window.restart(frame.sent_at);
        }
        flight.frames.push_back(frame);
        flight.bytes += bytes;
        !flight.is_full(self.source.now(), bytes, frames_max)
    }

    /// Waits until there is room for the newest frame, of so many bytes.
    pub(super) fn wait_room(&self, bytes: u64, frames_max: usize) -> Result<(), LaneError> {
        let mut flight = self.flight();
        while flight.is_full(self.source.now(), bytes, frames_max) {
            if flight.error.is_some() || self.source.stopped() {
                return Err(self.stopped());
            }
            let wait = flight.window.opens_in(self.source.now()).unwrap_or(TICK).min(TICK);
            flight = self.room.wait_timeout(flight, wait).unwrap_or_else(|e| e.into_inner()).0;
        }
        Ok(())
    }

    /// How long what is on its way before the newest frame will take to arrive, beyond the time that the path takes in any case.
    pub(super) fn ahead(&self) -> Duration {
        let flight = self.flight();
        let newest = flight.frames.back().map_or(0, Unreceipted::weight);
        flight.window.ahead(self.source.now(), flight.bytes.saturating_sub(newest))
    }

    /// Whether so many bytes more may be sent without a wait for receipts.
    #[cfg(test)]
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let flight = self.flight();
        flight.bytes + bytes <= flight.window.limit(self.source.now())
    }

    /// The number of the oldest frame under way.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.flight().frames.front().map(|oldest| oldest.seq)
    }

    /// No frame follows the `total` that were sent. Returns what the stream's account will be if all arrives as it was sent; nothing where
    /// that cannot be told, for a page under way is in doubt.
    pub(super) fn end_sending(&self, total: u64) -> Option<StreamEnd> {
        let mut flight = self.flight();
        (flight.ended, flight.total) = (true, total);
        flight.waiting_since = self.source.now();
        let (mut fold, mut receipt) = (flight.fold, Vec::new());
        for frame in &flight.frames {
            if frame.doubtful != 0 {
                return None;
            }
            receipt.clear();
            let hasher = &self.source.shared.hasher;
            let digests = &frame.digests[..frame.pages.count_ones() as usize];
            encode_receipt(&mut receipt, frame.seq, digests, hasher);
            fold = fold_receipt(fold, &receipt, hasher);
        }
        Some(StreamEnd { stream: self.stream, frames: total, fold })
    }

    /// Takes the frame off that a receipt must be for: the oldest.
    pub(super) fn receipted(
        &self,
        seq: u64,
        receipt: &[u8],
        now: Duration,
    ) -> Result<Unreceipted, ReceiptError> {
        let sent = self.take_oldest(now, receipt, |oldest| oldest.seq == seq);
        sent.ok_or_else(|| ReceiptError::OutOfOrder { found: seq, expected: self.oldest() })
    }

    /// Takes the oldest frame off if it is settled now, by a receipt where that is not empty.
    pub(super) fn take_oldest(
        &self,
        now: Duration,
        receipt: &[u8],
        is_settled: impl FnOnce(&Unreceipted) -> bool,
    ) -> Option<Unreceipted> {
        let mut flight = self.flight();
        if !flight.frames.front().is_some_and(is_settled) {
            return None;
        }
        let sent = flight.frames.pop_front()?;
        if !receipt.is_empty() {
            flight.fold = fold_receipt(flight.fold, receipt, &self.source.shared.hasher);
        }
        flight.bytes -= sent.weight();
        flight.waiting_since = now;
        let idle = flight.frames.is_empty();
        let travelled = now.saturating_sub(sent.sent_at);
        flight.window.on_receipt(now, sent.weight(), travelled, idle);
        drop(flight);
        self.source.counters.travelled(travelled);
        Some(sent)
    }

    /// Frames were settled: whoever waits for room looks again.
    pub(super) fn made_room(&self) {
        self.room.notify_all();
        self.source.notify();
    }

    /// Whether all frames are settled of an account that is closed.
    pub(super) fn is_settled(&self) -> bool {
        let flight = self.flight();
        flight.ended && flight.frames.is_empty()
    }

    /// Whether the stream has failed already.
    ///
    /// # Errors
    /// When the destination is silent for too long.
    pub(super) fn check(&self) -> Result<bool, LaneError> {
        let flight = self.flight();
        if flight.error.is_some() {
            return Ok(true);
        }
        let waited = self.source.now().saturating_sub(flight.waiting_since);
        let silent = (!flight.frames.is_empty() || flight.ended) && waited > self.source.options.timeout;
        if silent { Err(self.timeout()) } else { Ok(false) }
    }

    /// Whether either thread has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.flight().error.is_some()
    }

    /// Notes the first error and wakes the other thread.
    pub(super) fn fail(&self, error: LaneError) {
        let mut flight = self.flight();
        flight.error.get_or_insert(error);
        drop(flight);
        self.breaker.shutdown();
        self.made_room();
    }

    pub(super) fn stopped(&self) -> LaneError {
        LaneError::Stopped { stream: self.stream }
    }

    pub(super) fn io_error(&self, source: io::Error) -> LaneError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.timeout(),
            // Another stream would lack the same.
            _ if is_local(&source) => self.fatal(FatalError::Local { source }),
            _ => LaneError::Io { stream: self.stream, source },
        }
    }

    fn timeout(&self) -> LaneError {
        LaneError::Timeout { stream: self.stream, seconds: self.source.options.timeout.as_secs() }
    }

    pub(super) fn fatal(&self, source: impl Into<FatalError>) -> LaneError {
        LaneError::Fatal { stream: self.stream, source: source.into() }
    }

    /// How the stream ended, once both threads have.
    pub(super) fn end(&self) -> LaneEnd {
        let mut flight = self.flight();
        let stream = self.stream;
        let result = match flight.error.take() {
            Some(error) => Err(error),
            None if !flight.frames.is_empty() => Err(LaneError::Stopped { stream }),
            None => Ok(StreamEnd { stream, frames: flight.total, fold: flight.fold }),
        };
        LaneEnd { stream, result, unreceipted: flight.frames.drain(..).collect() }
    }
}
