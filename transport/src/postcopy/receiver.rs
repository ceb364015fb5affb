//! A connection at the destination: reads frames, checks them against their seals, places their pages, and receipts them.

use std::io::{self, Read};
use std::sync::atomic::Ordering;
use std::time::Instant;

use pagecopy::bitmap::bits;
use pagecopy::digest::receipt;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};

use super::{MissingSink, PostcopyError};
use crate::socket::Connection;
use crate::wire::WireError;
use crate::wire::frame::{FrameHeader, FrameKind};
use crate::wire::postcopy::{SEAL_LEN, sealed_receipt};

/// Receives until the connection ends.
pub(super) fn run(sink: &MissingSink, connection: &Connection, stream: u16) -> Result<(), PostcopyError> {
    let mut worker = Worker { sink, connection, stream, frames: 0, receipt: Vec::new() };
    let mut raw: Box<[u8]> = vec![0; CHUNK_SIZE].into();
    loop {
        worker.frame(&mut raw)?;
    }
}

struct Worker<'a> {
    sink: &'a MissingSink,
    connection: &'a Connection,
    stream: u16,
    /// Number of the next frame.
    frames: u64,
    receipt: Vec<u8>,
}

impl Worker<'_> {
    /// One frame. What does not fit its seal is not placed; the receipt tells the source.
    fn frame(&mut self, raw: &mut [u8]) -> Result<(), PostcopyError> {
        let mut head = [0; FrameHeader::LEN + SEAL_LEN];
        self.read(&mut head, false)?;
        let (header, seal) = head.split_last_chunk().expect("a seal's length");
        let header = self.header(header.first_chunk().expect("a header's length"))?;
        let raw = &mut raw[..header.raw_len()];
        self.read(raw, true)?;
        let mut digests = [0; 64];
        let mut pages = raw.as_chunks::<PAGE_SIZE>().0.iter();
        let mut count = 0;
        for bit in bits(header.pages()) {
            let page = if header.raw >> bit & 1 != 0 { pages.next() } else { None };
            digests[count] =
                receipt(page.map_or(self.sink.hasher.zero(), |page| self.sink.hasher.page(page)));
            count += 1;
        }
        self.receipt.clear();
        let found = sealed_receipt(&mut self.receipt, header.seq, &digests[..count], &self.sink.hasher);
        if found == u64::from_le_bytes(*seal) {
            let failed = |source| PostcopyError::Memory { stream: self.stream, source };
            self.sink.place(&header, raw).map_err(failed)?;
        } else {
            self.sink.damaged.fetch_add(count as u64, Ordering::Relaxed);
        }
        self.frames += 1;
        self.sink
            .send_receipt(self.connection, self.stream, &self.receipt)
            .map_err(|source| PostcopyError::Io { stream: self.stream, source })
    }

    /// Checks a header for itself, against the connection and the layout.
    fn header(&self, bytes: &[u8; FrameHeader::LEN]) -> Result<FrameHeader, PostcopyError> {
        let wrong = |source| PostcopyError::Wire { stream: self.stream, source };
        let header = FrameHeader::decode(bytes, &self.sink.hasher).map_err(wrong)?;
        header.check_layout(self.sink.ram.layout()).map_err(wrong)?;
        let bad = |field, value| Err(wrong(WireError::BadValue { field, value }));
        if header.kind != FrameKind::Pages {
            return bad("frame kind (in postcopy)", header.kind as u64);
        }
        if header.placed || header.encoded_len != 0 {
            return bad("encoded_len (in postcopy)", header.encoded_len.into());
        }
        if header.seq != self.frames {
            return bad("seq", header.seq);
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
