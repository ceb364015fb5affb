//! A stream over a socket: the ends of [`crate::carrier`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::Connection;
use crate::carrier::{Breaker, DestinationEnd, FrameReceiver, FrameSender, ReceiptReader, SourceEnd};
use crate::sys::{ReceiveList, SendList};

/// How often a thread that waits for bytes looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);

impl Breaker for Connection {
    fn shutdown(&self) {
        Connection::shutdown(self);
    }
}

impl Connection {
    /// A stream at the source, once ATTACHED has come. `timeout` bounds the wait for room to write.
    pub(crate) fn into_source_end(self, timeout: Duration) -> io::Result<SourceEnd> {
        self.set_timeouts(Some(TICK), Some(timeout))?;
        let socket = Arc::new(self);
        Ok(SourceEnd {
            frames: Box::new(Sender(socket.clone())),
            receipts: Box::new(Receipts(socket.clone())),
            breaker: socket,
        })
    }

    /// A stream at the destination, once its preamble was answered. `timeout` bounds the wait for room to write.
    pub(crate) fn into_destination_end(self, timeout: Duration) -> io::Result<DestinationEnd> {
        self.set_timeouts(Some(TICK), Some(timeout))?;
        let socket = Arc::new(self);
        Ok(DestinationEnd::new(Box::new(Receiver(socket.clone())), socket))
    }
}

struct Sender(Arc<Connection>);

impl FrameSender for Sender {
    fn send(&mut self, mut list: SendList<'_>) -> io::Result<u64> {
        let mut bytes = 0;
        while !list.is_empty() {
            match self.0.send(&mut list) {
                Ok(sent) => bytes += sent as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(bytes)
    }
}

struct Receipts(Arc<Connection>);

impl ReceiptReader for Receipts {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &*self.0, buffer)
    }
}

struct Receiver(Arc<Connection>);

impl FrameReceiver for Receiver {
    fn receive(&mut self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize> {
        self.0.receive(list, wait)
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
