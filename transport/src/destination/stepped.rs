//! A stream's worker without its thread: the simulation drives it frame by frame.

use super::PageSink;
use super::receiver::{ReceiveError, Worker};
use crate::carrier::FrameReceiver;
use crate::wire::control::StreamEnd;

/// A worker that takes a frame when it is told to.
pub(crate) struct SteppedWorker<'a>(Worker<'a>);

impl<'a> SteppedWorker<'a> {
    pub(crate) fn new(sink: &'a PageSink, carrier: Box<dyn FrameReceiver>, stream: u16) -> SteppedWorker<'a> {
        SteppedWorker(Worker::new(sink, carrier, stream).expect("there is memory for a test"))
    }

    /// Whether bytes were read that no frame has taken.
    pub(crate) fn buffered(&self) -> bool {
        self.0.buffered()
    }

    /// Takes one frame, all of which is there, or the end; returns the account after the stream's last.
    pub(crate) fn frame(&mut self) -> Result<Option<StreamEnd>, ReceiveError> {
        self.0.frame()
    }

    /// There is nothing to read: receipts that wait are sent.
    pub(crate) fn idle(&mut self) -> Result<(), ReceiveError> {
        self.0.send_receipts()
    }
}
