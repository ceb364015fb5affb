//! A connection at the destination: reads frames, opens them, places the pages of those that fit their seals, and receipts them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pagecopy::layout::CHUNK_SIZE;

use super::channel::Channel;
use super::lane::FAULTS;
use super::sealed::{Opener, check_sealed};
use super::sink::TICK;
use super::{MissingSink, PostcopyError};
use crate::clock;
use crate::socket::Connection;
use crate::sys::{self, ReceiveList, Soon};
use crate::wire::WireError;
use crate::wire::frame::FrameHeader;
use crate::wire::postcopy::SEAL_LEN;

impl MissingSink {
    /// Receives pages on connection `stream` until it ends. Blocks. The connection's preamble was answered.
    pub fn receive(&self, connection: &Arc<Connection>, stream: u16) -> Result<(), PostcopyError> {
        let failed = |source| PostcopyError::Io { stream, source };
        connection.set_timeouts(Some(TICK), Some(self.timeout)).map_err(failed)?;
        sys::run_soon(if stream == FAULTS { Soon::Urgent } else { Soon::Bulk });
        let mut worker = Worker::new(self, connection.clone(), stream);
        loop {
            worker.frame(self)?;
        }
    }

    /// A connection is open: who waits for pages asks for them on it, if it is for that.
    fn open(&self, connection: &Arc<dyn Channel>, stream: u16) {
        if stream == FAULTS {
            *self.writer() = Some(connection.clone());
            // What was asked for on one that is gone.
            let waiting: Vec<_> = self.waits().pages.keys().copied().collect();
            waiting.into_iter().for_each(|(chunk, page)| self.request(chunk, page));
        }
    }

    /// A connection is over.
    fn close(&self, connection: &Arc<dyn Channel>, stream: u16) {
        connection.shutdown();
        if stream == FAULTS {
            // Only if there is no newer one.
            self.writer().take_if(|current| Arc::as_ptr(current).addr() == Arc::as_ptr(connection).addr());
        }
    }
}

/// What brings pages in from a connection. Its end is the connection's.
pub(super) struct Worker {
    connection: Arc<dyn Channel>,
    stream: u16,
    /// Number of the next frame.
    frames: u64,
    opener: Opener,
    body: Vec<u8>,
}

impl Worker {
    pub(super) fn new(sink: &MissingSink, connection: Arc<dyn Channel>, stream: u16) -> Self {
        sink.open(&connection, stream);
        Self { connection, stream, frames: 0, opener: Opener::new(), body: vec![0; CHUNK_SIZE] }
    }

    /// One frame. What does not fit its seal is not placed; the receipt tells the source. An error ends the connection.
    pub(super) fn frame(&mut self, sink: &MissingSink) -> Result<(), PostcopyError> {
        self.try_frame(sink).inspect_err(|_| sink.close(&self.connection, self.stream))
    }

    fn try_frame(&mut self, sink: &MissingSink) -> Result<(), PostcopyError> {
        let stream = self.stream;
        let mut head = [0; FrameHeader::LEN + SEAL_LEN];
        self.read(sink, &mut head, false)?;
        let (header, seal) = head.split_last_chunk().expect("a seal's length");
        let header = self.header(sink, header.first_chunk().expect("a header's length"))?;
        // Both were checked: a section is no longer than its pages.
        let encoded_len = header.encoded_len as usize;
        let mut body = std::mem::take(&mut self.body);
        let read = self.read(sink, &mut body[..encoded_len + header.raw_len()], true);
        self.body = body;
        read?;
        let (encoded, raw) = self.body[..encoded_len + header.raw_len()].split_at(encoded_len);
        let opened = self
            .opener
            .open(&header, u64::from_le_bytes(*seal), encoded, raw, &sink.hasher)
            .map_err(|source| PostcopyError::Decode { stream, chunk: header.chunk, source })?;
        if opened.fits {
            sink.place(&header, raw, opened.compressed)
                .map_err(|source| PostcopyError::Memory { stream, source })?;
        } else {
            sink.damaged.fetch_add(header.pages().count_ones().into(), Ordering::Relaxed);
        }
        self.frames += 1;
        sink.send_receipt(&*self.connection, stream, opened.receipt)
            .map_err(|source| PostcopyError::Io { stream, source })
    }

    /// Checks a header for itself, against the connection and the layout.
    fn header(
        &self,
        sink: &MissingSink,
        bytes: &[u8; FrameHeader::LEN],
    ) -> Result<FrameHeader, PostcopyError> {
        let wrong = |source| PostcopyError::Wire { stream: self.stream, source };
        let header = FrameHeader::decode(bytes, &sink.hasher).map_err(wrong)?;
        header.check_layout(sink.ram.layout()).map_err(wrong)?;
        check_sealed(&header, sink.encoded).map_err(wrong)?;
        if header.seq != self.frames {
            return Err(wrong(WireError::BadValue { field: "seq", value: header.seq }));
        }
        Ok(header)
    }

    fn read(&self, sink: &MissingSink, mut bytes: &mut [u8], in_frame: bool) -> Result<(), PostcopyError> {
        let stream = self.stream;
        let (mut since, mut begun) = (None::<Duration>, in_frame);
        while !bytes.is_empty() {
            let mut list = ReceiveList::new();
            list.push(bytes);
            let received = self.connection.receive(&mut list, true);
            drop(list);
            match received {
                Ok(0) => return Err(PostcopyError::Closed { stream }),
                Ok(got) => {
                    sink.count_wire(got);
                    bytes = &mut bytes[got..];
                    (since, begun) = (None, true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if sink.stopped() {
                        return Err(PostcopyError::Stopped { stream });
                    }
                    let now = clock::now();
                    let waited = now - *since.get_or_insert(now);
                    if begun && waited > sink.timeout {
                        return Err(PostcopyError::Timeout { stream, seconds: sink.timeout.as_secs() });
                    }
                }
                Err(source) => return Err(PostcopyError::Io { stream, source }),
            }
        }
        Ok(())
    }
}
