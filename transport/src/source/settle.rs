//! What settles the frames of a stream, and what follows once one is.

use std::sync::Arc;

use pagecopy::layout::PAGE_SIZE;

use super::doubt::Verdict;
use super::durable::Durables;
use super::flight::{LaneError, StreamState, Unreceipted};
use super::receipts::Receipts;
use super::{Counters, PageSource};
use crate::carrier::{Breaker, Durable, FrameSender, ReceiptReader, SourceEnd};
#[cfg(test)]
use crate::simulation::fault;

/// Whose word it is that a frame is where it was sent.
pub(crate) enum Settles {
    /// A destination's, which says what its memory holds.
    ByReceipt(Box<dyn ReceiptReader>),
    /// That of a place which only keeps it.
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
pub(crate) struct Carrier {
    pub(crate) frames: Box<dyn FrameSender>,
    pub(crate) settles: Settles,
    pub(crate) breaker: Arc<dyn Breaker>,
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
        #[cfg(test)]
        let verdict = if sent.same != 0 && fault::is(fault::Fault::BaseBelieved) {
            Verdict::default()
        } else {
            verdict
        };
        let (wrong, no_base) = (verdict.wrong(), verdict.no_base());
        if no_base != 0 {
            // What lies there is not what was sent, or may not be.
            self.shared.void(sent.chunk, no_base);
        }
        if wrong != 0 {
            Counters::add(&self.counters.mismatches, verdict.damaged.count_ones().into());
            Counters::add(&self.counters.torn, (verdict.torn & !sent.same).count_ones().into());
            if !self.log.expects_writes() {
                Counters::add(&self.counters.written, self.written_since(sent, wrong));
            }
            self.pending.insert(sent.chunk, wrong);
        }
        if let Some(settled) = self.settled.get() {
            settled(sent.chunk, sent.pages);
        }
        Counters::add(&self.counters.wire_acked, sent.wire_bytes);
        if sent.same != 0 {
            Counters::add(&self.counters.unchanged, (sent.same & !wrong).count_ones().into());
            Counters::add(&self.counters.same_lacking, (sent.same & wrong).count_ones().into());
            Counters::add(&self.counters.same_acked, u64::from(sent.same.count_ones()) * PAGE_SIZE as u64);
        }
        let pages = u64::from(sent.pages.count_ones());
        Counters::add(&self.counters.logical_acked, pages * PAGE_SIZE as u64);
        self.settle(sent);
    }
}
