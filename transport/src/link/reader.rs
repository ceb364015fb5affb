//! What comes in on a link: messages from bytes, and where they wait.

use std::io;
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;

use super::pace::{PIECE, time_for};
use super::{LinkError, LinkEvent};
use crate::wire::WireError;
use crate::wire::control::{CHECKSUM_LEN, FIRST_LEN_MAX, HEADER_LEN, Message};

/// Messages that may wait to be handled; a peer that sends more is cut off.
const UNHANDLED_MAX: usize = 4096;
/// Bytes of messages that may wait to be handled while more is read: the longest message, and one of the next longest.
const UNHANDLED_BYTES_MAX: usize = 80 << 20;
/// How often a reader that is ahead looks whether the others have caught up.
const BEHIND_TICK: Duration = Duration::from_millis(5);

/// Where messages go that come in.
pub(super) struct Inbox<E, W> {
    /// Unbounded, as the runtime must not be blocked; what waits is bounded all the same.
    pub(super) events: Sender<E>,
    pub(super) wrap: W,
    /// Told how long a message is to be.
    pub(super) announced: Box<dyn Fn(usize) + Send + Sync>,
    /// Bytes of messages since nothing waited.
    pub(super) unhandled_bytes: usize,
}

impl<E, W: Fn(LinkEvent) -> E> Inbox<E, W> {
    /// Hands something over; says whether more may follow.
    pub(super) fn deliver(&mut self, message: Message) -> Result<(), Option<LinkError>> {
        if self.events.len() > UNHANDLED_MAX {
            return Err(Some(LinkError::Flood));
        }
        self.events.send((self.wrap)(LinkEvent::Message(message))).map_err(|_| None)
    }

    /// Waits until there is room for a message of so many bytes.
    pub(super) async fn room(&mut self, len: usize) {
        loop {
            if self.events.is_empty() {
                self.unhandled_bytes = 0;
            }
            if self.unhandled_bytes + len <= UNHANDLED_BYTES_MAX {
                self.unhandled_bytes += len;
                return;
            }
            // The peer waits meanwhile: nothing is read.
            tokio::time::sleep(BEHIND_TICK).await;
        }
    }
}

/// Reads messages. Any byte is a sign of life, for a message may take long on a slow path; but not longer than [`time_for`] it.
pub(super) struct MessageReader<R> {
    pub(super) reader: R,
    pub(super) timeout: Duration,
    pub(super) buffer: Vec<u8>,
    /// The first message has come.
    pub(super) opened: bool,
}

impl<R: AsyncRead + Unpin> MessageReader<R> {
    /// Reads a header; says how many bytes of fields follow.
    pub(super) async fn header(&mut self) -> Result<usize, LinkError> {
        if self.buffer.capacity() > PIECE {
            self.buffer = Vec::new();
        }
        self.buffer.clear();
        self.fill(1, Instant::now() + self.timeout).await?;
        self.fill(HEADER_LEN, Instant::now() + self.timeout).await?;
        let (_, len) = Message::decode_header(self.buffer.first_chunk().expect("a header's length"))?;
        if !self.opened && len > FIRST_LEN_MAX {
            let (len, max) = (len as u64, FIRST_LEN_MAX as u64);
            return Err(WireError::TooLong { field: "first message", len, max }.into());
        }
        Ok(len)
    }

    /// Reads the rest of a message.
    pub(super) async fn fields(&mut self, len: usize) -> Result<Message, LinkError> {
        let len = HEADER_LEN + len + CHECKSUM_LEN;
        self.fill(len, Instant::now() + time_for(len, self.timeout)).await?;
        let message = Message::decode(&self.buffer)?;
        self.opened |= !matches!(message, Message::Ping(_) | Message::Pong(_));
        Ok(message)
    }

    /// Reads until the buffer holds so many bytes.
    async fn fill(&mut self, want: usize, deadline: Instant) -> Result<(), LinkError> {
        let mut heard = None;
        while self.buffer.len() < want {
            let until = deadline.min(Instant::now() + self.timeout);
            let room = (want - self.buffer.len()).min(self.buffer.len().max(PIECE));
            self.buffer.reserve(room);
            let mut piece = (&mut self.reader).take(room as u64);
            match tokio::time::timeout_at(until, piece.read_buf(&mut self.buffer)).await {
                Ok(Ok(0)) => return Err(LinkError::Closed),
                Ok(Ok(_)) => {
                    heard = Some(Instant::now());
                    if !self.opened {
                        // Somebody who may be anybody: whoever else is served by this thread has a turn after every piece.
                        tokio::task::yield_now().await;
                    }
                }
                Ok(Err(error)) => return Err(LinkError::Io(error)),
                // Not a byte.
                Err(_) if heard.is_none_or(|at| at.elapsed() >= self.timeout) => {
                    return Err(LinkError::Timeout(self.timeout.as_secs()));
                }
                Err(_) => {
                    let text = format!("a message of {want} bytes comes too slowly");
                    return Err(LinkError::Io(io::Error::new(io::ErrorKind::TimedOut, text)));
                }
            }
        }
        Ok(())
    }

    /// Reads until the peer closes.
    pub(super) async fn discard(&mut self) {
        let mut scrap = [0; 4096];
        while let Ok(1..) = self.reader.read(&mut scrap).await {}
    }
}
