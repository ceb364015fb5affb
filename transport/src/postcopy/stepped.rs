//! What the threads of postcopy do to pages that wait and pages that are missing, for the simulation, which has no threads.

use pagecopy::xbzrle::Page;

use super::{MissingSink, PageServer};
use crate::wire::frame::FrameHeader;
use crate::wire::postcopy::PageRequest;

/// Somebody sends pages: see [`PageServer`].
impl PageServer {
    /// Takes pages that nobody asked for.
    pub(crate) fn step_next(&self, pages_max: u32) -> Option<(u32, u64)> {
        self.take_next(pages_max)
    }

    /// Takes what was asked for, as far as it still waits.
    pub(crate) fn step_requested(&self, request: PageRequest) -> Vec<(u32, u64)> {
        self.take_requested(request)
    }

    /// Pages of a frame that died with its connection, or that arrived damaged.
    pub(crate) fn step_back(&self, chunk: u32, pages: u64) {
        self.give_back(chunk, pages);
    }

    /// Pages that nobody has taken.
    pub(crate) fn waiting(&self) -> u64 {
        self.pending.count()
    }

    /// A frame's receipt fits.
    pub(crate) fn step_receipted(&self, pages: u32) {
        self.receipted(pages);
    }
}

/// Somebody has received a frame: see [`MissingSink`].
impl MissingSink {
    /// Places what is still missing of a frame that fits its seal.
    pub(crate) fn step_place(&self, header: &FrameHeader, raw: &[u8], compressed: &[Page]) {
        self.place(header, raw, compressed).expect("simulated memory takes every page");
    }
}
