//! What a stream needs of whatever carries it: bytes in order both ways and, where the carrier can, pages that it places straight
//! into the destination's memory.
//!
//! The workers of [`crate::source`] and [`crate::destination`] know no more of a socket or a queue pair than this, and a carrier
//! knows no more of them. What opens streams is in [`crate::dial`] and [`crate::accept`].

use std::io;
use std::sync::Arc;

use pagecopy::backend::GuestRam;
use pagecopy::digest::PageHasher;

use crate::sys::{ReceiveList, SendList};
use crate::wire::frame::FrameHeader;

/// Bytes that may be under way at any rate, of a carrier that asks for no more: two whole chunks, so that one can be built while the
/// other travels.
pub(crate) const WINDOW_BYTES_MIN: u64 = 768 << 10;

/// Ends a stream from outside: threads that wait on it wake up with errors.
pub trait Breaker: Send + Sync + std::fmt::Debug {
    /// Ends both directions at once. Harmless when they have ended.
    fn shutdown(&self);
}

/// The source's sending end: frames.
pub(crate) trait FrameSender: Send {
    /// Queues all bytes of the list, in order, and says how many there were. Those of a carrier that gathers may wait for
    /// [`Self::flush`].
    fn send(&mut self, list: SendList<'_>) -> io::Result<u64>;

    /// Sends what was gathered.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Most frames that may be without a receipt.
    fn frames_max(&self) -> usize {
        usize::MAX
    }

    /// Bytes that may be under way at any rate.
    fn window_min(&self) -> u64 {
        WINDOW_BYTES_MIN
    }

    /// Whether raw pages may be placed at all.
    fn places(&self) -> bool {
        false
    }

    /// Whether it keeps frames in a form of its own, each of which stands for itself: with what memory must hold after it, and with no base
    /// in another. There is no end of a stream then.
    fn seals(&self) -> bool {
        false
    }

    /// Appends a frame in that form to `out`, up to its encoded section; returns the bytes of the whole. `seals` are what receipts would
    /// say, and `out` is what the next [`send`](Self::send) begins with. `None`: the frame goes as it is on the wire.
    fn seal(&mut self, header: &FrameHeader, seals: &[u64], out: &mut Vec<u8>) -> Option<u64> {
        let _ = (header, seals, out);
        None
    }

    /// Queues these pages of a chunk to be placed, before the header that is sent next; `None` if they must travel with
    /// it. What is returned is kept until the frame is receipted, or its stream dead on both sides.
    fn place(&mut self, chunk: u32, pages: u64) -> io::Result<Option<Placement>> {
        let _ = (chunk, pages);
        Ok(None)
    }
}

/// Holds what a placed frame needs for as long as it is under way.
pub(crate) type Placement = Box<dyn std::any::Any + Send>;

/// The source's receiving end: receipts.
pub(crate) trait ReceiptReader: Send {
    /// Reads some bytes; 0 after the destination's last. `WouldBlock` when nothing came for a moment.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// The word of a place that keeps frames and answers nothing, such as a file: how far they are durable.
pub(crate) trait Durable: Send {
    /// Bytes from the stream's start that are durable; what is, stays so. `WouldBlock` when no more became so for a moment.
    fn durable(&mut self) -> io::Result<u64>;
}

/// The destination's end: frames in, receipts out.
pub(crate) trait FrameReceiver: Send {
    /// Receives some bytes into the list; 0 when the source closed the stream. `WouldBlock` when there are none, at once without
    /// `wait`, else after a moment.
    fn receive(&mut self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize>;

    /// Sends receipts, all of them.
    fn send(&mut self, receipts: &[u8]) -> io::Result<()>;

    /// Says that nothing more will be sent, once what was is on its way.
    fn finish(&mut self) -> io::Result<()>;

    /// Whether frames may come whose raw pages were placed.
    fn places(&self) -> bool {
        false
    }
}

/// The destination's memory, as a carrier sees it that places pages there by itself.
pub trait Landing: Send + Sync {
    /// The memory.
    fn ram(&self) -> &Arc<dyn GuestRam>;

    /// Hashes the session's pages, and checks what is said about them.
    fn hasher(&self) -> &PageHasher;

    /// Brings the pages of a chunk in that are not there. Called before anything is placed in it.
    ///
    /// # Errors
    /// Where there is no room for them: none of them may be touched.
    fn bring_in(&self, chunk: u32) -> io::Result<()>;

    /// From here on anything may come to lie in the chunk, announced by a frame or not: it is not known to be zero any more.
    fn touch(&self, chunk: u32);
}

/// What a stream is at the source: an end to give to [`crate::source::Lane::spawn`].
pub struct SourceEnd {
    pub(crate) frames: Box<dyn FrameSender>,
    pub(crate) receipts: Box<dyn ReceiptReader>,
    pub(crate) breaker: Arc<dyn Breaker>,
}

/// What a stream is at the destination: an end to give to [`crate::destination::receive_stream`].
pub struct DestinationEnd {
    pub(crate) frames: Box<dyn FrameReceiver>,
    breaker: Arc<dyn Breaker>,
}

impl DestinationEnd {
    pub(crate) fn new(frames: Box<dyn FrameReceiver>, breaker: Arc<dyn Breaker>) -> Self {
        Self { frames, breaker }
    }

    /// What ends the stream from outside.
    pub fn breaker(&self) -> Arc<dyn Breaker> {
        self.breaker.clone()
    }
}
