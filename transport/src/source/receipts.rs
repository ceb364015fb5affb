//! The thread of a stream that takes receipts and settles frames.

use std::io;
use std::sync::atomic::Ordering;

use super::flight::{LaneError, StreamState};
use super::{FatalError, ReceiptError};
use crate::carrier::ReceiptReader;
use crate::wire::WireError;
use crate::wire::frame::{self, LOAD_LEN, LOAD_MAGIC, RECEIPT_HEADER_LEN};

/// More than one between two receipts is too many; the first may come before any.
const LOADS_MAX: u8 = 1;

/// The thread that takes receipts.
pub(super) struct Receipts<'a> {
    stream: &'a StreamState,
    carrier: Box<dyn ReceiptReader>,
    buffer: Vec<u8>,
    len: usize,
    /// What the destination has said of its thread since the last receipt, how often.
    loads: u8,
}

impl<'a> Receipts<'a> {
    pub(super) fn new(stream: &'a StreamState, carrier: Box<dyn ReceiptReader>) -> Self {
        Self { stream, carrier, buffer: vec![0; 64 << 10], len: 0, loads: 0 }
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
            if buffer[at..self.len].starts_with(&LOAD_MAGIC.to_le_bytes()) {
                let Some(load) = buffer[at..self.len].first_chunk::<LOAD_LEN>() else { break Ok(()) };
                if let Err(e) = self.note_load(load) {
                    break Err(e);
                }
                at += LOAD_LEN;
                continue;
            }
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
            (at, self.loads) = (end, 0);
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

    /// The destination says what its thread did. It says so beside receipts: one that says nothing else is none.
    fn note_load(&mut self, bytes: &[u8; LOAD_LEN]) -> Result<(), ReceiptError> {
        let source = self.stream.source();
        let load = frame::decode_load(bytes, &source.shared.hasher)?;
        self.loads += 1;
        if self.loads > LOADS_MAX {
            return Err(
                WireError::BadValue { field: "loads without a receipt", value: self.loads.into() }.into()
            );
        }
        source.effort.observe_destination(load);
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use pagecopy::backend::StaticLog;
    use pagecopy::choose::Load;
    use pagecopy::digest::PageHasher;

    use super::super::doubles::{Sink, source, stream};
    use super::*;

    /// What a destination sends, piece by piece.
    struct Pieces(VecDeque<Vec<u8>>);

    impl ReceiptReader for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let piece = self.0.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
            buffer[..piece.len()].copy_from_slice(&piece);
            Ok(piece.len())
        }
    }

    /// Takes the pieces in; returns the error that ended it, if one did.
    fn take(pieces: &[&[u8]]) -> Option<LaneError> {
        let source = std::sync::Arc::new(source(1, std::sync::Arc::new(StaticLog)));
        let stream = stream(&source, &Sink::default());
        let pieces = Pieces(pieces.iter().map(|piece| piece.to_vec()).collect());
        let mut receipts = Receipts::new(&stream, Box::new(pieces));
        (0..10).find_map(|_| receipts.turn().err())
    }

    #[test]
    fn a_load_comes_beside_receipts_and_alone_once() {
        let load = Load { passed_nanos: u64::MAX, worked_nanos: u64::MAX, ready_nanos: 1 };
        let mut bytes = Vec::new();
        frame::encode_load(&mut bytes, load, &PageHasher::new(1));
        // Cut anywhere it is taken as one.
        for at in [0, 1, 4, 16, 39] {
            assert!(take(&[&bytes[..at], &bytes[at..]][usize::from(at == 0)..]).is_none(), "cut at {at}");
        }
        let twice = take(&[&bytes, &bytes]).map(|error| crate::engine::explain(&error)).unwrap_or_default();
        assert!(twice.contains("loads without a receipt"), "{twice}");
        for bit in 32..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(take(&[&bad]).is_some(), "bit {bit}");
        }
    }
}
