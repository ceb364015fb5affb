//! The thread of a stream that takes receipts and settles frames.

use std::io;
use std::sync::atomic::Ordering;

use pagecopy::bitmap::bits;
use pagecopy::layout::PAGE_SIZE;

use super::lane::{LaneError, Shared};
use super::{Counters, FatalError, ReceiptError};
use crate::carrier::ReceiptReader;
use crate::wire::frame::{self, RECEIPT_HEADER_LEN};

/// The thread that takes receipts.
pub(super) struct Receipts<'a> {
    shared: &'a Shared,
    carrier: Box<dyn ReceiptReader>,
    pub(super) fold: u64,
    buffer: Vec<u8>,
    len: usize,
}

impl<'a> Receipts<'a> {
    pub(super) fn new(shared: &'a Shared, carrier: Box<dyn ReceiptReader>) -> Self {
        Self { shared, carrier, fold: 0, buffer: vec![0; 64 << 10], len: 0 }
    }

    /// Takes receipts until the stream ends, in order or not; returns the fold of those that came.
    pub(super) fn run(mut self) -> (u64, Result<(), LaneError>) {
        let result = self.take();
        (self.fold, result)
    }

    fn take(&mut self) -> Result<(), LaneError> {
        while !self.turn()? {}
        Ok(())
    }

    /// Settles what came and waits a moment for more; says whether the stream is over.
    pub(super) fn turn(&mut self) -> Result<bool, LaneError> {
        self.consume()?;
        {
            let flight = self.shared.flight();
            if flight.error.is_some() {
                return Ok(true);
            }
            let waited = self.shared.source.now().saturating_sub(flight.waiting_since);
            if (!flight.frames.is_empty() || flight.ended) && waited > self.shared.source.options.timeout {
                return Err(self.shared.timeout());
            }
        }
        if self.shared.source.stopped() {
            return Err(LaneError::Stopped { stream: self.shared.stream });
        }
        match self.carrier.read(&mut self.buffer[self.len..]) {
            Ok(0) => {
                // After END and the last receipt the destination closes the stream.
                let flight = self.shared.flight();
                let in_order = flight.ended && flight.frames.is_empty();
                drop(flight);
                let closed = LaneError::Closed { stream: self.shared.stream };
                if in_order { Ok(true) } else { Err(closed) }
            }
            Ok(read) => {
                self.len += read;
                Ok(false)
            }
            // The carrier's time-out is the tick at which the conditions above are looked at.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(self.shared.io_error(e)),
        }
    }

    /// Settles every receipt that is whole.
    fn consume(&mut self) -> Result<(), LaneError> {
        let mut at = 0;
        let buffer = std::mem::take(&mut self.buffer);
        let result = loop {
            let Some(header) = buffer[at..self.len].first_chunk::<RECEIPT_HEADER_LEN>() else { break Ok(()) };
            let (count, seq) = match frame::decode_receipt_header(header) {
                Ok(header) => header,
                Err(e) => break Err(e.into()),
            };
            let end = at + RECEIPT_HEADER_LEN + count * 8 + 8;
            if end > self.len {
                break Ok(());
            }
            if let Err(e) = self.settle(&buffer[at..end], count, seq) {
                break Err(e);
            }
            at = end;
        };
        self.buffer = buffer;
        self.buffer.copy_within(at..self.len, 0);
        self.len -= at;
        if at != 0 {
            self.shared.room.notify_all();
            self.shared.source.notify();
        }
        result.map_err(|source| LaneError::Receipt { stream: self.shared.stream, source })?;
        let mismatches = self.shared.source.counters.mismatches.load(Ordering::Relaxed);
        if mismatches > self.shared.source.options.mismatches_max {
            let written = self.shared.source.counters.written.load(Ordering::Relaxed);
            let written = (written != 0).then_some(FatalError::Written { count: written });
            return Err(self.shared.fatal(written.unwrap_or(FatalError::Integrity { count: mismatches })));
        }
        Ok(())
    }

    fn settle(&mut self, bytes: &[u8], count: usize, seq: u64) -> Result<(), ReceiptError> {
        let source = &self.shared.source;
        let hasher = &source.shared.hasher;
        let digests = frame::check_receipt(bytes, hasher)?;
        self.fold = frame::fold_receipt(self.fold, bytes, hasher);
        let now = source.now();
        let mut flight = self.shared.flight();
        let expected = flight.frames.front().map(|f| f.seq);
        let Some(sent) = (if expected == Some(seq) { flight.frames.pop_front() } else { None }) else {
            return Err(ReceiptError::OutOfOrder { found: seq, expected });
        };
        flight.bytes -= sent.wire_bytes;
        flight.waiting_since = now;
        let idle = flight.frames.is_empty();
        let travelled = now.saturating_sub(sent.sent_at);
        flight.window.on_receipt(now, sent.wire_bytes, travelled, idle);
        drop(flight);
        Counters::add(&self.shared.delivered, sent.wire_bytes);
        source.counters.travelled(travelled);
        let pages = sent.pages.count_ones() as usize;
        let mut wrong = if count == pages { 0 } else { sent.pages };
        for ((theirs, ours), bit) in digests.as_chunks::<8>().0.iter().zip(sent.digests).zip(bits(sent.pages))
        {
            if u64::from_le_bytes(*theirs) != ours {
                wrong |= 1 << bit;
            }
        }
        if wrong != 0 {
            // What lies there is not what was sent: it is no base for anything, and the pages are dirty again. Those that were
            // sent from where they lie may be newer than what was hashed; sent from a copy next time, they have no excuse.
            Counters::add(&source.counters.mismatches, (wrong & !sent.doubtful).count_ones().into());
            Counters::add(&source.counters.torn, (wrong & sent.doubtful).count_ones().into());
            if !source.log.expects_writes() {
                Counters::add(&source.counters.written, source.written_since(&sent, wrong));
            }
            source.by_copy.insert(sent.chunk, wrong);
            source.shared.void(sent.chunk, wrong);
            source.pending.insert(sent.chunk, wrong);
        }
        let copied = source.by_copy.get(sent.chunk) & sent.pages & !wrong & !sent.doubtful;
        if copied != 0 {
            source.by_copy.remove(sent.chunk, copied);
        }
        Counters::add(&source.counters.wire_acked, sent.wire_bytes);
        Counters::add(&source.counters.logical_acked, (pages * PAGE_SIZE) as u64);
        source.settle(&sent);
        if count == pages { Ok(()) } else { Err(ReceiptError::Count { seq, found: count, expected: pages }) }
    }
}
