//! What a transfer came to, which both sides compare before the handover.

use super::limits::at_most;
use crate::wire::{Reader, STREAMS_MAX, WireError, Writer};

/// Where one stream ended: the source says what it sent, the destination what it applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamEnd {
    /// Which stream.
    pub stream: u16,
    /// Frames, without the end frame.
    pub frames: u64,
    /// [`fold_receipt`](crate::wire::frame::fold_receipt) over all receipts.
    pub fold: u64,
}

/// What a whole transfer came to; equal on both sides or the handover does not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Every stream that ended in order.
    pub streams: Vec<StreamEnd>,
    /// Distinct pages that were carried at least once.
    pub pages: u64,
    /// xxh3-64 of the encoded device state, 0 where there is none.
    pub state: u64,
}

impl Totals {
    pub(super) fn encode(&self, w: &mut Writer) {
        w.u32(self.streams.len() as u32);
        for end in &self.streams {
            w.u16(end.stream);
            w.u64(end.frames);
            w.u64(end.fold);
        }
        w.u64(self.pages);
        w.u64(self.state);
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut streams = Vec::new();
        for _ in 0..r.count(STREAMS_MAX.into(), "streams")? {
            streams.push(StreamEnd {
                stream: r.u16("stream")?,
                frames: r.u64("frames")?,
                fold: r.u64("fold")?,
            });
        }
        Ok(Self { streams, pages: r.u64("pages")?, state: r.u64("state digest")? })
    }

    /// Whether they keep within the limits.
    pub(super) fn check(&self) -> Result<(), WireError> {
        at_most(self.streams.len(), STREAMS_MAX.into(), "streams")
    }
}
