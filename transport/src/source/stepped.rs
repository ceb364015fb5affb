//! A source's streams without threads: the simulation drives them step by step.

use std::sync::{Arc, OnceLock};

use pagecopy::layout::CHUNK_PAGES;

use super::flight::StreamState;
use super::lane::LaneSender;
use super::receipts::Receipts;
use super::window::Window;
use super::{Batch, LaneEnd, LaneError, PageSource};
use crate::carrier::SourceEnd;
use crate::wire::control::StreamEnd;

/// Where what a stream's threads share lives for as long as either of them.
#[derive(Default)]
pub(crate) struct LaneSlot(OnceLock<StreamState>);

/// A stream at the source, whose two threads take turns when they are told to.
pub(crate) struct SteppedLane<'a> {
    state: &'a StreamState,
    sender: LaneSender<'a>,
    receipts: Receipts<'a>,
    ended: bool,
}

impl<'a> SteppedLane<'a> {
    pub(crate) fn new(
        slot: &'a LaneSlot,
        source: &Arc<PageSource>,
        carrier: SourceEnd,
        stream: u16,
    ) -> SteppedLane<'a> {
        let SourceEnd { frames, receipts, breaker } = carrier;
        let state = slot.0.get_or_init(|| {
            StreamState::new(source.clone(), stream, breaker, Window::new(frames.window_min(), 1, true))
        });
        assert!(Arc::ptr_eq(state.source(), source) && state.id() == stream, "a slot serves one lane");
        SteppedLane {
            state,
            sender: LaneSender::new(state, frames),
            receipts: Receipts::new(state, receipts),
            ended: false,
        }
    }

    /// Pages that one batch can hold at most.
    pub(crate) fn pages(&self) -> u64 {
        let most = u64::from(super::BATCH_CHUNKS) * CHUNK_PAGES as u64;
        self.state.source().ram.layout().pages().min(most)
    }

    /// Whether a whole batch may be sent without a wait for receipts.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.state.has_room(bytes)
    }

    /// The sending thread's turn: works a batch off and, with `flush`, sends what was gathered. False when the stream is dead.
    pub(crate) fn send(&mut self, batch: Batch, flush: bool) -> bool {
        let mut result = self.sender.work_off(batch);
        if flush && result.is_ok() {
            result = self.sender.flush();
        }
        self.note(result)
    }

    /// The sending thread finds nothing to do.
    pub(crate) fn idle(&mut self) -> bool {
        let result = self.sender.flush();
        self.note(result)
    }

    /// Ends the stream in order: no batch will come. Returns what its account will be, once; false when the stream is dead.
    pub(crate) fn end_sending(&mut self) -> (Option<StreamEnd>, bool) {
        if std::mem::replace(&mut self.ended, true) {
            return (None, true);
        }
        match self.sender.end() {
            Ok(account) => (account, true),
            Err(error) => (None, self.note(Err(error))),
        }
    }

    /// The receipt thread's turn: `Ok(true)` when the stream is over in order.
    pub(crate) fn receive(&mut self) -> Result<bool, ()> {
        let result = self.receipts.turn();
        let over = matches!(result, Ok(true));
        if self.note(result.map(drop)) { Ok(over) } else { Err(()) }
    }

    /// Breaks the stream.
    pub(crate) fn abort(&self) {
        self.state.fail(self.state.stopped());
    }

    /// How the stream ended, once either thread has.
    pub(crate) fn into_end(self) -> LaneEnd {
        self.state.end()
    }

    fn note(&self, result: Result<(), LaneError>) -> bool {
        result.map_err(|error| self.state.fail(error)).is_ok()
    }
}
