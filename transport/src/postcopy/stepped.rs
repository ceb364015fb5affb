//! Both ends of a connection of postcopy without their threads: the simulation drives them turn by turn.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::BackendError;

use super::channel::Channel;
use super::lane::Worker as Lane;
use super::receiver::Worker as Receiver;
use super::{LaneEnd, MissingSink, PageServer, PostcopyError};
use crate::wire::frame::FrameHeader;
use crate::wire::postcopy::SEAL_LEN;

/// The source's end.
pub(crate) struct SteppedServer(Lane);

impl SteppedServer {
    pub(crate) fn new(server: &Arc<PageServer>, channel: Arc<dyn Channel>, stream: u16) -> Self {
        Self(Lane::new(server.clone(), channel, stream))
    }

    /// Takes what has come, and sends a frame at most. Says whether there is something to do soon.
    pub(crate) fn turn(&mut self) -> Result<bool, LaneEnd> {
        self.0.turn().map_err(|error| self.0.end(error))
    }

    /// The connection is given up.
    pub(crate) fn stop(&mut self) {
        self.0.end(PostcopyError::Stopped { stream: 0 });
    }
}

/// Bytes before those of a frame's pages.
pub(crate) const HEAD_LEN: usize = FrameHeader::LEN + SEAL_LEN;

/// The destination's end.
pub(crate) struct SteppedReceiver {
    sink: Arc<MissingSink>,
    receiver: Receiver,
}

impl SteppedReceiver {
    pub(crate) fn new(sink: &Arc<MissingSink>, channel: Arc<dyn Channel>, stream: u16) -> Self {
        Self { sink: sink.clone(), receiver: Receiver::new(sink, channel, stream) }
    }

    /// Length of the frame that begins so.
    pub(crate) fn frame_len(&self, head: &[u8; HEAD_LEN]) -> usize {
        let header = head.first_chunk().expect("a header's length");
        let header = FrameHeader::decode(header, &self.sink.hasher).expect("no header is damaged");
        HEAD_LEN + header.encoded_len as usize + header.raw_len()
    }

    /// Takes one frame, all of which is there, or the end.
    pub(crate) fn frame(&mut self) -> Result<(), PostcopyError> {
        self.receiver.frame(&self.sink)
    }
}

impl PageServer {
    /// Pages that nobody has taken.
    pub(crate) fn waiting(&self) -> u64 {
        self.pending.count()
    }
}

impl MissingSink {
    /// Asks for what was touched.
    pub(crate) fn step_faults(&self) -> Result<(), BackendError> {
        self.serve(&mut Vec::new(), Duration::ZERO)
    }
}
