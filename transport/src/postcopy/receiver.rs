//! A connection at the destination: reads frames, opens them, places the pages of those that fit their seals, and receipts them.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pagecopy::layout::CHUNK_SIZE;

use super::lane::FAULTS;
use super::sealed::{Opener, check_sealed};
use super::sink::TICK;
use super::{MissingSink, PostcopyError};
use crate::socket::Connection;
use crate::sys::{self, Soon};
use crate::wire::WireError;
use crate::wire::frame::FrameHeader;
use crate::wire::postcopy::SEAL_LEN;

impl MissingSink {
    /// Receives pages on connection `stream` until it ends. Blocks. The connection's preamble was answered.
    pub fn receive(&self, connection: &Arc<Connection>, stream: u16) -> Result<(), PostcopyError> {
        let failed = |source| PostcopyError::Io { stream, source };
        connection.set_timeouts(Some(TICK), Some(self.timeout)).map_err(failed)?;
        sys::run_soon(if stream == FAULTS { Soon::Urgent } else { Soon::Bulk });
        if stream == FAULTS {
            *self.writer() = Some(connection.clone());
            // What was asked for on one that is gone.
            let waiting: Vec<_> = self.waits().pages.keys().copied().collect();
            waiting.into_iter().for_each(|(chunk, page)| self.request(chunk, page));
        }
        let result = run(self, connection, stream);
        connection.shutdown();
        if stream == FAULTS {
            // Only if there is no newer one.
            self.writer().take_if(|current| Arc::ptr_eq(current, connection));
        }
        result
    }
}

/// Receives until the connection ends.
fn run(sink: &MissingSink, connection: &Connection, stream: u16) -> Result<(), PostcopyError> {
    let mut worker = Worker { sink, connection, stream, frames: 0 };
    let (mut opener, mut body) = (Opener::new(), vec![0; CHUNK_SIZE]);
    loop {
        worker.frame(&mut opener, &mut body)?;
    }
}

struct Worker<'a> {
    sink: &'a MissingSink,
    connection: &'a Connection,
    stream: u16,
    /// Number of the next frame.
    frames: u64,
}

impl Worker<'_> {
    /// One frame, whose section and raw pages have room in `body`. What does not fit its seal is not placed; the receipt tells the source.
    fn frame(&mut self, opener: &mut Opener, body: &mut [u8]) -> Result<(), PostcopyError> {
        let (sink, stream) = (self.sink, self.stream);
        let mut head = [0; FrameHeader::LEN + SEAL_LEN];
        self.read(&mut head, false)?;
        let (header, seal) = head.split_last_chunk().expect("a seal's length");
        let header = self.header(header.first_chunk().expect("a header's length"))?;
        // Both were checked: a section is no longer than its pages.
        let encoded_len = header.encoded_len as usize;
        let body = &mut body[..encoded_len + header.raw_len()];
        self.read(body, true)?;
        let (encoded, raw) = body.split_at(encoded_len);
        let opened = opener
            .open(&header, u64::from_le_bytes(*seal), encoded, raw, &sink.hasher)
            .map_err(|source| PostcopyError::Decode { stream, chunk: header.chunk, source })?;
        if opened.fits {
            sink.place(&header, raw, opened.compressed)
                .map_err(|source| PostcopyError::Memory { stream, source })?;
        } else {
            sink.damaged.fetch_add(header.pages().count_ones().into(), Ordering::Relaxed);
        }
        self.frames += 1;
        sink.send_receipt(self.connection, stream, opened.receipt)
            .map_err(|source| PostcopyError::Io { stream, source })
    }

    /// Checks a header for itself, against the connection and the layout.
    fn header(&self, bytes: &[u8; FrameHeader::LEN]) -> Result<FrameHeader, PostcopyError> {
        let wrong = |source| PostcopyError::Wire { stream: self.stream, source };
        let header = FrameHeader::decode(bytes, &self.sink.hasher).map_err(wrong)?;
        header.check_layout(self.sink.ram.layout()).map_err(wrong)?;
        check_sealed(&header, self.sink.encoded).map_err(wrong)?;
        if header.seq != self.frames {
            return Err(wrong(WireError::BadValue { field: "seq", value: header.seq }));
        }
        Ok(header)
    }

    fn read(&self, mut bytes: &mut [u8], in_frame: bool) -> Result<(), PostcopyError> {
        let stream = self.stream;
        let (mut waited, mut begun) = (Instant::now(), in_frame);
        while !bytes.is_empty() {
            match (&mut &*self.connection).read(bytes) {
                Ok(0) => return Err(PostcopyError::Closed { stream }),
                Ok(got) => {
                    self.sink.count_wire(got);
                    bytes = &mut bytes[got..];
                    (waited, begun) = (Instant::now(), true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.sink.stopped() {
                        return Err(PostcopyError::Stopped { stream });
                    }
                    if begun && waited.elapsed() > self.sink.timeout {
                        return Err(PostcopyError::Timeout { stream, seconds: self.sink.timeout.as_secs() });
                    }
                }
                Err(source) => return Err(PostcopyError::Io { stream, source }),
            }
        }
        Ok(())
    }
}
