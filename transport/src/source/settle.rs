//! What settles the frames of a stream, and what follows once one is.

use std::sync::Arc;

use pagecopy::layout::PAGE_SIZE;

use super::doubt::Verdict;
use super::durable::Durables;
use super::flight::{LaneError, StreamState, Unreceipted};
use super::receipts::Receipts;
use super::{Counters, PageSource};
use crate::carrier::{Breaker, Durable, FrameSender, ReceiptReader, SourceEnd};

/// Whose word it is that a frame is where it was sent.
pub(super) enum Settles {
    /// A destination's, which says what its memory holds.
    ByReceipt(Box<dyn ReceiptReader>),
    /// That of a place which only keeps it.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "nothing that a guest can be moved to is of this kind yet")
    )]
    WhenDurable(Box<dyn Durable>),
}

impl Settles {
    /// Settles frames until the stream ends, in order or not.
    pub(super) fn run(self, stream: &StreamState) -> Result<(), LaneError> {
        match self {
            Self::ByReceipt(reader) => Receipts::new(stream, reader).run(),
            Self::WhenDurable(durable) => Durables::new(stream, durable).run(),
        }
    }
}

/// What carries a stream.
pub(super) struct Carrier {
    pub(super) frames: Box<dyn FrameSender>,
    pub(super) settles: Settles,
    pub(super) breaker: Arc<dyn Breaker>,
}

impl From<SourceEnd> for Carrier {
    fn from(end: SourceEnd) -> Self {
        let SourceEnd { frames, receipts, breaker } = end;
        Self { frames, settles: Settles::ByReceipt(receipts), breaker }
    }
}

impl PageSource {
    /// A frame is settled, and has arrived as it was sent but for what the verdict names.
    pub(super) fn deliver(&self, sent: &Unreceipted, verdict: Verdict) {
        let (wrong, no_base) = (verdict.wrong(), verdict.no_base());
        if no_base != 0 {
            // What lies there is not what was sent, or may not be.
            self.shared.void(sent.chunk, no_base);
        }
        if wrong != 0 {
            Counters::add(&self.counters.mismatches, verdict.damaged.count_ones().into());
            Counters::add(&self.counters.torn, verdict.torn.count_ones().into());
            if !self.log.expects_writes() {
                Counters::add(&self.counters.written, self.written_since(sent, wrong));
            }
            self.pending.insert(sent.chunk, wrong);
        }
        Counters::add(&self.counters.wire_acked, sent.wire_bytes);
        self.bandwidth.delivered(sent.wire_bytes);
        let pages = u64::from(sent.pages.count_ones());
        Counters::add(&self.counters.logical_acked, pages * PAGE_SIZE as u64);
        self.settle(sent);
    }
}
