//! Sealed frames: made of memory that nobody writes any more, and opened before anything of them reaches memory.

use std::time::Duration;

use pagecopy::bitmap::bits;
use pagecopy::choose::Chooser;
use pagecopy::chunk::{ChunkDecoder, ChunkEncoder, DecodeError};
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::xbzrle::Page;

use super::PageServer;
use crate::wire::WireError;
use crate::wire::frame::{FrameHeader, FrameKind};
use crate::wire::postcopy::{SEAL_LEN, sealed_receipt};

/// Makes frames.
pub(crate) struct Sealer {
    encoder: ChunkEncoder,
    snapshot: Box<[u8]>,
    receipt: Vec<u8>,
}

/// A frame; its raw pages are sent from where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Sealed<'a> {
    pub(crate) header: FrameHeader,
    pub(crate) seal: u64,
    pub(crate) encoded: &'a [u8],
}

impl Sealed<'_> {
    /// Bytes of the frame on the wire.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.header.wire_bytes() + SEAL_LEN as u64
    }

    /// Appends what goes before the raw pages.
    pub(crate) fn head(&self, out: &mut Vec<u8>, hasher: &PageHasher) {
        out.extend_from_slice(&self.header.encode(hasher));
        out.extend_from_slice(&self.seal.to_le_bytes());
        out.extend_from_slice(self.encoded);
    }
}

impl Sealer {
    /// With an encoder of its own.
    pub(crate) fn new(encoder: ChunkEncoder) -> Self {
        Self { encoder: encoder.each_once(), snapshot: vec![0; CHUNK_SIZE].into(), receipt: Vec::new() }
    }

    /// What chooses the codec.
    pub(crate) fn chooser(&mut self) -> &mut Chooser {
        self.encoder.chooser()
    }

    /// The frame number `seq` of a connection, which has so much ahead, with these pages of a chunk.
    pub(crate) fn seal(
        &mut self,
        server: &PageServer,
        (seq, ahead): (u64, Duration),
        chunk: u32,
        pages: u64,
    ) -> Sealed<'_> {
        let (memory, hasher) = (server.ram.chunk(chunk), &server.hasher);
        let holes = pages & server.holes(chunk);
        let plan = self.encoder.plan(chunk, ahead.as_nanos() as u64);
        let encoded = self.encoder.encode_alone(plan, hasher, &memory, &mut self.snapshot, pages & !holes);
        let zero = encoded.zero | holes;
        let mut digests = [0; 64];
        for (slot, bit) in digests.iter_mut().zip(bits(pages)) {
            let digest = if zero >> bit & 1 != 0 { hasher.zero() } else { encoded.digests[bit as usize] };
            *slot = receipt(digest);
        }
        self.receipt.clear();
        let digests = &digests[..pages.count_ones() as usize];
        let seal = sealed_receipt(&mut self.receipt, seq, digests, hasher);
        let section = encoded.encoded;
        let header = FrameHeader {
            kind: FrameKind::Pages,
            chunk,
            raw: encoded.raw,
            zero,
            zstd: encoded.zstd,
            encoded_len: section.len() as u32,
            encoded_checksum: if section.is_empty() { 0 } else { hasher.checksum(section) },
            ..FrameHeader::end(seq)
        };
        Sealed { header, seal, encoded: section }
    }
}

/// Checks that a frame, which is one of the layout, may come in postcopy; `encoded` says that encoded pages were agreed on.
pub(crate) fn check_sealed(header: &FrameHeader, encoded: bool) -> Result<(), WireError> {
    let bad = |field, value| Err(WireError::BadValue { field, value });
    if header.kind != FrameKind::Pages {
        return bad("frame kind (in postcopy)", header.kind as u64);
    }
    if header.placed || header.references {
        return bad(
            "frame flags (in postcopy)",
            u64::from(header.placed) | u64::from(header.references) << 1,
        );
    }
    if header.delta != 0 {
        return bad("delta pages (in postcopy)", header.delta);
    }
    if header.zstd != 0 && !encoded {
        return bad("zstd pages (in postcopy, not agreed on)", header.zstd);
    }
    let max = u64::from(header.zstd.count_ones()) * PAGE_SIZE as u64;
    if u64::from(header.encoded_len) > max {
        return Err(WireError::TooLong { field: "encoded_len", len: header.encoded_len.into(), max });
    }
    Ok(())
}

/// Opens frames.
pub(crate) struct Opener {
    decoder: ChunkDecoder,
    receipt: Vec<u8>,
}

/// What came of a frame.
pub(crate) struct Opened<'a> {
    /// What it holds is what was meant: its pages may be placed.
    pub(crate) fits: bool,
    /// The pages of its zstd frame, ascending.
    pub(crate) compressed: &'a [Page],
    /// What it is answered with.
    pub(crate) receipt: &'a [u8],
}

impl Opener {
    pub(crate) fn new() -> Self {
        Self { decoder: ChunkDecoder::new(), receipt: Vec::new() }
    }

    /// Opens a [checked](check_sealed) frame. A section that does not fit its checksum is not decoded: it was damaged on its way, and
    /// the receipt says so. One that fits and does not decode was never right.
    pub(crate) fn open(
        &mut self,
        header: &FrameHeader,
        seal: u64,
        encoded: &[u8],
        raw: &[u8],
        hasher: &PageHasher,
    ) -> Result<Opened<'_>, DecodeError> {
        let intact = encoded.is_empty() || hasher.checksum(encoded) == header.encoded_checksum;
        let compressed = if encoded.is_empty() || !intact {
            &[]
        } else {
            // Without deltas nobody asks for a base.
            self.decoder.decode(0, header.zstd, encoded, |_, _| {})?.compressed()
        };
        let (mut raw_pages, mut zstd_pages) = (raw.as_chunks().0.iter(), compressed.iter());
        let mut digests = [0; 64];
        for (slot, bit) in digests.iter_mut().zip(bits(header.pages())) {
            let page = if header.raw >> bit & 1 != 0 {
                raw_pages.next()
            } else if header.zstd >> bit & 1 != 0 {
                zstd_pages.next()
            } else {
                *slot = receipt(hasher.zero());
                continue;
            };
            // What was not decoded has no digest.
            *slot = page.map_or(0, |page| receipt(hasher.page(page)));
        }
        self.receipt.clear();
        let digests = &digests[..header.pages().count_ones() as usize];
        let found = sealed_receipt(&mut self.receipt, header.seq, digests, hasher);
        Ok(Opened { fits: intact && found == seal, compressed, receipt: &self.receipt })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: FrameHeader = FrameHeader {
        kind: FrameKind::Pages,
        seq: 5,
        chunk: 0,
        encoded_len: 4096,
        raw: 0b1,
        zero: 0b10,
        delta: 0,
        zstd: 0b1000,
        encoded_checksum: 0,
        placed: false,
        references: false,
    };

    #[test]
    fn only_what_postcopy_has_is_let_in() {
        assert_eq!(check_sealed(&HEADER, true), Ok(()));
        let named = |header, encoded| check_sealed(&header, encoded).unwrap_err().to_string();
        for (header, encoded, field) in [
            (HEADER, false, "zstd pages (in postcopy, not agreed on)"),
            (FrameHeader { kind: FrameKind::End, ..HEADER }, true, "frame kind"),
            (FrameHeader { placed: true, ..HEADER }, true, "frame flags"),
            (FrameHeader { references: true, ..HEADER }, true, "frame flags"),
            (FrameHeader { delta: 0b100, ..HEADER }, true, "delta pages"),
            // Not one byte more is read than the pages that it stands for have.
            (FrameHeader { encoded_len: 4097, ..HEADER }, true, "encoded_len"),
        ] {
            let error = named(header, encoded);
            assert!(error.contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn a_damaged_section_is_receipted_as_damaged_and_one_that_was_never_right_is_an_error() {
        let hasher = PageHasher::new(3);
        let mut opener = Opener::new();
        let encoded = [9; 100];
        let raw = [7; PAGE_SIZE];
        let header = FrameHeader { encoded_len: 100, encoded_checksum: hasher.checksum(&encoded), ..HEADER };
        assert!(opener.open(&header, 0, &encoded, &raw, &hasher).is_err());
        let damaged = FrameHeader { encoded_checksum: 1, ..header };
        // Not even where somebody knows what such a receipt comes to.
        let digests = [receipt(hasher.page(&raw)), receipt(hasher.zero()), 0];
        let mut expected = Vec::new();
        let seal = sealed_receipt(&mut expected, 5, &digests, &hasher);
        let opened = opener.open(&damaged, seal, &encoded, &raw, &hasher).unwrap();
        assert!(!opened.fits && opened.compressed.is_empty());
        assert_eq!(opened.receipt, expected);
    }
}
