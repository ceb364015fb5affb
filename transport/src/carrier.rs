//! What a stream needs of whatever carries it: bytes in order both ways.
//!
//! The workers of [`crate::source`] and [`crate::destination`] know no more of a socket than this.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::socket::Connection;
use crate::sys::{ReceiveList, SendList};

/// How often a thread that waits for bytes looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);

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
}

/// The source's receiving end: receipts.
pub(crate) trait ReceiptReader: Send {
    /// Reads some bytes; 0 after the destination's last. `WouldBlock` when nothing came for a moment.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
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
}

/// What a stream is at the source: an end to give to [`crate::source::Lane::spawn`].
pub struct SourceEnd {
    pub(crate) frames: Box<dyn FrameSender>,
    pub(crate) receipts: Box<dyn ReceiptReader>,
    pub(crate) breaker: Arc<dyn Breaker>,
}

impl SourceEnd {
    /// A stream over a socket on which ATTACHED has come. `timeout` bounds the wait for room to write.
    pub fn socket(connection: Connection, timeout: Duration) -> io::Result<Self> {
        connection.set_timeouts(Some(TICK), Some(timeout))?;
        let socket = Arc::new(connection);
        Ok(Self {
            frames: Box::new(SocketSender(socket.clone())),
            receipts: Box::new(SocketReader(socket.clone())),
            breaker: socket,
        })
    }
}

/// What a stream is at the destination: an end to give to [`crate::destination::receive_stream`].
pub struct DestinationEnd {
    pub(crate) frames: Box<dyn FrameReceiver>,
    breaker: Arc<dyn Breaker>,
}

impl DestinationEnd {
    /// A stream over a socket whose preamble was answered. `timeout` bounds the wait for room to write.
    pub fn socket(connection: Connection, timeout: Duration) -> io::Result<Self> {
        connection.set_timeouts(Some(TICK), Some(timeout))?;
        let socket = Arc::new(connection);
        Ok(Self { frames: Box::new(SocketReceiver(socket.clone())), breaker: socket })
    }

    /// What ends the stream from outside.
    pub fn breaker(&self) -> Arc<dyn Breaker> {
        self.breaker.clone()
    }
}

impl Breaker for Connection {
    fn shutdown(&self) {
        Connection::shutdown(self);
    }
}

struct SocketSender(Arc<Connection>);

impl FrameSender for SocketSender {
    fn send(&mut self, mut list: SendList<'_>) -> io::Result<u64> {
        let mut bytes = 0;
        while !list.is_empty() {
            match list.send(self.0.as_fd()) {
                Ok(sent) => bytes += sent as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(bytes)
    }
}

struct SocketReader(Arc<Connection>);

impl ReceiptReader for SocketReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &*self.0, buffer)
    }
}

struct SocketReceiver(Arc<Connection>);

impl FrameReceiver for SocketReceiver {
    fn receive(&mut self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize> {
        list.receive(self.0.as_fd(), wait)
    }

    fn send(&mut self, receipts: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut &*self.0, receipts)
    }

    fn finish(&mut self) -> io::Result<()> {
        // Fails only when the peer closed first, which it then knows.
        self.0.shutdown_write();
        Ok(())
    }
}
