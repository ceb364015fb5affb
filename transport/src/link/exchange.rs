//! A control connection used by blocking calls.

use std::io;
use std::time::Duration;

use super::LinkError;
use crate::limit::{Limit, STEP, is_cancelled};
use crate::socket::Connection;
use crate::wire::control::{CHECKSUM_LEN, HEADER_LEN, Message};

/// A control connection used by blocking calls, for short exchanges: attaching a stream, asking after a session.
///
/// Waiting for a whole message takes at most the timeout, however its bytes come. `cancelled` is asked several times a second
/// meanwhile; once it says yes the wait ends with [`LinkError::Cancelled`].
pub struct Exchange<'a> {
    connection: &'a Connection,
    timeout: Duration,
    cancelled: &'a dyn Fn() -> bool,
}

impl<'a> Exchange<'a> {
    /// An exchange over a connection whose preamble was sent.
    pub fn new(
        connection: &'a Connection,
        timeout: Duration,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Self, LinkError> {
        connection.set_timeouts(Some(STEP.min(timeout)), Some(timeout)).map_err(LinkError::Io)?;
        Ok(Self { connection, timeout, cancelled })
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> Result<(), LinkError> {
        self.write(&message.encode())
    }

    /// Waits for a message; an ERROR becomes an error.
    pub fn receive(&self) -> Result<Message, LinkError> {
        let limit = Limit::new(self.timeout, self.cancelled);
        let mut bytes = vec![0; HEADER_LEN];
        self.read(&mut bytes, limit)?;
        let (_, len) = Message::decode_header(bytes.first_chunk().expect("a header's length"))?;
        bytes.resize(HEADER_LEN + len + CHECKSUM_LEN, 0);
        self.read(&mut bytes[HEADER_LEN..], limit)?;
        match Message::decode(&bytes)? {
            Message::Error { text, .. } => Err(LinkError::Refused(text)),
            message => Ok(message),
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), LinkError> {
        io::Write::write_all(&mut &*self.connection, bytes).map_err(|e| self.error(e))
    }

    fn read(&self, mut bytes: &mut [u8], limit: Limit<'_>) -> Result<(), LinkError> {
        while !bytes.is_empty() {
            limit.step().map_err(|e| self.error(e))?;
            match io::Read::read(&mut &*self.connection, bytes) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(read) => bytes = &mut bytes[read..],
                // Nothing came for one step.
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(self.error(e)),
            }
        }
        Ok(())
    }

    /// What an error of its connection is.
    pub(crate) fn error(&self, error: io::Error) -> LinkError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => LinkError::Closed,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => LinkError::Timeout(self.timeout.as_secs()),
            _ if is_cancelled(&error) => LinkError::Cancelled,
            _ => LinkError::Io(error),
        }
    }
}
