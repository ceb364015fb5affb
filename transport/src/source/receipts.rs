//! The thread of a stream that takes receipts and settles frames.

use std::io;
use std::sync::atomic::Ordering;

use super::flight::{LaneError, StreamState};
use super::{FatalError, ReceiptError};
use crate::carrier::ReceiptReader;
use crate::wire::frame::{self, RECEIPT_HEADER_LEN};

/// The thread that takes receipts.
pub(super) struct Receipts<'a> {
    stream: &'a StreamState,
    carrier: Box<dyn ReceiptReader>,
    buffer: Vec<u8>,
    len: usize,
}

impl<'a> Receipts<'a> {
    pub(super) fn new(stream: &'a StreamState, carrier: Box<dyn ReceiptReader>) -> Self {
        Self { stream, carrier, buffer: vec![0; 64 << 10], len: 0 }
    }

    /// Takes receipts until the stream ends, in order or not.
    pub(super) fn run(mut self) -> Result<(), LaneError> {
        while !self.turn()? {}
        Ok(())
    }

    /// Settles what came and waits a moment for more; says whether the stream is over.
    pub(super) fn turn(&mut self) -> Result<bool, LaneError> {
        self.consume()?;
        if self.stream.check()? {
            return Ok(true);
        }
        if self.stream.source().stopped() {
            return Err(self.stream.stopped());
        }
        match self.carrier.read(&mut self.buffer[self.len..]) {
            Ok(0) => {
                // After END and the last receipt the destination closes the stream.
                let closed = LaneError::Closed { stream: self.stream.id() };
                if self.stream.is_settled() { Ok(true) } else { Err(closed) }
            }
            Ok(read) => {
                self.len += read;
                Ok(false)
            }
            // The carrier's time-out is the tick at which the conditions above are looked at.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(self.stream.io_error(e)),
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
            self.stream.made_room();
        }
        result.map_err(|source| LaneError::Receipt { stream: self.stream.id(), source })?;
        let source = self.stream.source();
        let mismatches = source.counters.mismatches.load(Ordering::Relaxed);
        if mismatches > source.options.mismatches_max {
            let written = source.counters.written.load(Ordering::Relaxed);
            let written = (written != 0).then_some(FatalError::Written { count: written });
            return Err(self.stream.fatal(written.unwrap_or(FatalError::Integrity { count: mismatches })));
        }
        Ok(())
    }

    fn settle(&mut self, bytes: &[u8], count: usize, seq: u64) -> Result<(), ReceiptError> {
        let source = self.stream.source();
        let hasher = &source.shared.hasher;
        let digests = frame::check_receipt(bytes, hasher)?;
        let sent = self.stream.receipted(seq, bytes, source.now())?;
        source.deliver(&sent, source.doubts.judge(&sent, digests));
        let pages = sent.pages.count_ones() as usize;
        if count == pages { Ok(()) } else { Err(ReceiptError::Count { seq, found: count, expected: pages }) }
    }
}
