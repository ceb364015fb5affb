//! Data frames and receipts: the flat, batched data plane.
//!
//! A frame carries pages of one chunk:
//! ```text
//! header (72 bytes) | encoded section (encoded_len bytes) | raw pages (4096 bytes for each bit of raw, ascending)
//! ```
//! The encoded section is laid out by [`pagecopy::chunk`]. The masks name pages by their bit in the chunk and do not overlap.
//! The destination answers every frame with a receipt, in order, on the same connection.

use pagecopy::choose::Load;
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE};

use super::{Reader, WireError};

/// First word of a frame, `PGF1`.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"PGF1");
/// First word of a receipt, `PGR1`.
pub const RECEIPT_MAGIC: u32 = u32::from_le_bytes(*b"PGR1");
/// First word of what says how a thread spent its time, `PGL1`.
pub const LOAD_MAGIC: u32 = u32::from_le_bytes(*b"PGL1");
/// Longest encoded section: as long as the pages in it are.
pub const ENCODED_MAX: usize = CHUNK_SIZE;

/// The flag of a frame whose raw pages were placed.
const FLAG_PLACED: u16 = 1;
/// The flag of a frame whose encoded section has references.
const FLAG_REFERENCES: u16 = 2;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// Pages of one chunk.
    Pages = 1,
    /// The source sends no more frames on this stream; no receipt follows.
    End = 2,
    /// Pages of one chunk, all of them in `raw`, that are as in the destination's base: nothing follows.
    Same = 3,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What it is.
    pub kind: FrameKind,
    /// Number of the frame on its stream, from 0.
    pub seq: u64,
    /// The chunk.
    pub chunk: u32,
    /// Bytes in the encoded section.
    pub encoded_len: u32,
    /// Pages that follow as they are, or were placed; of a frame of pages that are as in the base, all of these.
    pub raw: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages as XBZRLE deltas against what this stream delivered before.
    pub delta: u64,
    /// Pages in the zstd frame.
    pub zstd: u64,
    /// xxh3-64 of the encoded section under the session's seed; 0 where there is none.
    pub encoded_checksum: u64,
    /// The raw pages do not follow: the carrier has placed them in the destination's memory. Carriers that place only.
    pub placed: bool,
    /// The encoded section's zstd frame refers to pages that were sent before.
    pub references: bool,
}

impl FrameHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 72;

    /// The end of a stream.
    pub fn end(seq: u64) -> Self {
        Self {
            kind: FrameKind::End,
            seq,
            chunk: 0,
            encoded_len: 0,
            raw: 0,
            zero: 0,
            delta: 0,
            zstd: 0,
            encoded_checksum: 0,
            placed: false,
            references: false,
        }
    }

    /// Pages of a chunk that are as in the destination's base.
    pub fn same(seq: u64, chunk: u32, pages: u64) -> Self {
        Self { kind: FrameKind::Same, chunk, raw: pages, ..Self::end(seq) }
    }

    /// All pages of the frame.
    pub fn pages(&self) -> u64 {
        self.raw | self.zero | self.delta | self.zstd
    }

    /// Bytes of raw pages that follow.
    pub fn raw_len(&self) -> usize {
        if self.placed || self.kind == FrameKind::Same {
            0
        } else {
            self.raw.count_ones() as usize * PAGE_SIZE
        }
    }

    /// Bytes of the frame on the wire, whichever way its raw pages go.
    pub fn wire_bytes(&self) -> u64 {
        let raw = if self.kind == FrameKind::Same { 0 } else { u64::from(self.raw.count_ones()) };
        Self::LEN as u64 + u64::from(self.encoded_len) + raw * PAGE_SIZE as u64
    }

    /// Offsets: 0 magic, 4 kind, 6 flags (1 placed, 2 references), 8 seq, 16 chunk, 20 encoded_len, 24 raw, 32 zero, 40 delta, 48 zstd,
    /// 56 encoded_checksum, 64 checksum of bytes 0..64.
    pub fn encode(&self, hasher: &PageHasher) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        let flag = |set: bool, flag: u16| if set { flag } else { 0 };
        let flags = flag(self.placed, FLAG_PLACED) | flag(self.references, FLAG_REFERENCES);
        out[6..8].copy_from_slice(&flags.to_le_bytes());
        out[8..16].copy_from_slice(&self.seq.to_le_bytes());
        out[16..20].copy_from_slice(&self.chunk.to_le_bytes());
        out[20..24].copy_from_slice(&self.encoded_len.to_le_bytes());
        out[24..32].copy_from_slice(&self.raw.to_le_bytes());
        out[32..40].copy_from_slice(&self.zero.to_le_bytes());
        out[40..48].copy_from_slice(&self.delta.to_le_bytes());
        out[48..56].copy_from_slice(&self.zstd.to_le_bytes());
        out[56..64].copy_from_slice(&self.encoded_checksum.to_le_bytes());
        let checksum = hasher.checksum(&out[..64]);
        out[64..72].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads a header and checks it for itself: magic, checksum, kind, masks that do not overlap, lengths.
    pub fn decode(bytes: &[u8; Self::LEN], hasher: &PageHasher) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        let magic = r.u32("frame magic")?;
        if magic != FRAME_MAGIC {
            return Err(WireError::BadMagic { what: "frame", found: magic.into() });
        }
        let (kind, flags) = (r.u16("kind")?, r.u16("flags")?);
        let header = Self {
            kind: match kind {
                2 => FrameKind::End,
                3 => FrameKind::Same,
                _ => FrameKind::Pages,
            },
            seq: r.u64("seq")?,
            chunk: r.u32("chunk")?,
            encoded_len: r.u32("encoded_len")?,
            raw: r.u64("raw")?,
            zero: r.u64("zero")?,
            delta: r.u64("delta")?,
            zstd: r.u64("zstd")?,
            encoded_checksum: r.u64("encoded_checksum")?,
            placed: flags & FLAG_PLACED != 0,
            references: flags & FLAG_REFERENCES != 0,
        };
        let (expected, found) = (r.u64("checksum")?, hasher.checksum(&bytes[..64]));
        if expected != found {
            return Err(WireError::Checksum { what: "frame header", expected, found });
        }
        if !(1..=3).contains(&kind) {
            return Err(WireError::BadValue { field: "frame kind", value: kind.into() });
        }
        if flags & !(FLAG_PLACED | FLAG_REFERENCES) != 0
            || (header.placed && header.raw == 0)
            || (header.references && header.zstd == 0)
        {
            return Err(WireError::BadValue { field: "frame flags", value: flags.into() });
        }
        header.check_shape()?;
        Ok(header)
    }

    fn check_shape(&self) -> Result<(), WireError> {
        let pages: u32 = [self.raw, self.zero, self.delta, self.zstd].iter().map(|m| m.count_ones()).sum();
        if pages != self.pages().count_ones() {
            return Err(WireError::BadValue { field: "page masks (they overlap)", value: self.pages() });
        }
        if (self.kind == FrameKind::End) != (pages == 0) {
            return Err(WireError::BadValue { field: "page masks", value: self.pages() });
        }
        if self.kind == FrameKind::Same && (self.raw != self.pages() || self.placed) {
            return Err(WireError::BadValue { field: "page masks (as in the base)", value: self.pages() });
        }
        let max = u64::from((self.delta | self.zstd).count_ones()) * PAGE_SIZE as u64;
        if max != 0 && u64::from(self.encoded_len) > max {
            return Err(WireError::TooLong { field: "encoded_len", len: self.encoded_len.into(), max });
        }
        if (self.encoded_len == 0) != (self.delta | self.zstd == 0) {
            return Err(WireError::BadValue { field: "encoded_len", value: self.encoded_len.into() });
        }
        Ok(())
    }

    /// Checks the addresses against the session's layout.
    pub fn check_layout(&self, layout: &Layout) -> Result<(), WireError> {
        if self.kind != FrameKind::End {
            if self.chunk >= layout.chunks() {
                return Err(WireError::BadValue { field: "chunk", value: self.chunk.into() });
            }
            let beyond = self.pages() & !layout.valid(self.chunk);
            if beyond != 0 {
                return Err(WireError::BadValue { field: "page masks (beyond the region)", value: beyond });
            }
        }
        Ok(())
    }
}

/// Bytes of a receipt's header.
pub const RECEIPT_HEADER_LEN: usize = 16;

/// Appends the receipt of frame `seq`: offsets 0 magic, 4 count, 8 seq, 16 one u64 for each page of the frame in ascending
/// order (the low half of the page's digest, of what memory holds after the frame was applied), then the checksum of it all.
pub fn encode_receipt(out: &mut Vec<u8>, seq: u64, digests: &[u64], hasher: &PageHasher) {
    let start = out.len();
    out.extend_from_slice(&RECEIPT_MAGIC.to_le_bytes());
    out.extend_from_slice(&(digests.len() as u32).to_le_bytes());
    out.extend_from_slice(&seq.to_le_bytes());
    for digest in digests {
        out.extend_from_slice(&digest.to_le_bytes());
    }
    let checksum = hasher.checksum(&out[start..]);
    out.extend_from_slice(&checksum.to_le_bytes());
}

/// Reads a receipt's header: how many digests follow (at most 64), and the frame's number.
pub fn decode_receipt_header(bytes: &[u8; RECEIPT_HEADER_LEN]) -> Result<(usize, u64), WireError> {
    let mut r = Reader::new(bytes);
    let magic = r.u32("receipt magic")?;
    if magic != RECEIPT_MAGIC {
        return Err(WireError::BadMagic { what: "receipt", found: magic.into() });
    }
    let count = r.count(64, "receipt count")?;
    Ok((count, r.u64("receipt seq")?))
}

/// Checks a whole receipt (header, digests, checksum) and returns the digests' bytes.
pub fn check_receipt<'a>(bytes: &'a [u8], hasher: &PageHasher) -> Result<&'a [u8], WireError> {
    let (body, checksum) = bytes.split_last_chunk::<8>().ok_or(WireError::Truncated { field: "receipt" })?;
    let (expected, found) = (u64::from_le_bytes(*checksum), hasher.checksum(body));
    if expected != found {
        return Err(WireError::Checksum { what: "receipt", expected, found });
    }
    body.get(RECEIPT_HEADER_LEN..).ok_or(WireError::Truncated { field: "receipt" })
}

/// Bytes of what says how the destination's thread of a stream spent its time.
pub const LOAD_LEN: usize = 40;

/// Appends it: offsets 0 magic, 4 zero, 8 nanoseconds that have passed since it was last said, 16 in which the thread ran, 24 in which it
/// was ready and had no core, 32 checksum.
pub fn encode_load(out: &mut Vec<u8>, load: Load, hasher: &PageHasher) {
    let start = out.len();
    out.extend_from_slice(&u64::from(LOAD_MAGIC).to_le_bytes());
    for nanos in [load.passed_nanos, load.worked_nanos, load.ready_nanos] {
        out.extend_from_slice(&nanos.to_le_bytes());
    }
    let checksum = hasher.checksum(&out[start..]);
    out.extend_from_slice(&checksum.to_le_bytes());
}

/// Reads it. Whatever a peer says is possible: it only decides how hard pages are compressed.
pub fn decode_load(bytes: &[u8; LOAD_LEN], hasher: &PageHasher) -> Result<Load, WireError> {
    let mut r = Reader::new(bytes);
    let magic = r.u64("load magic")?;
    if magic != u64::from(LOAD_MAGIC) {
        return Err(WireError::BadMagic { what: "load", found: magic });
    }
    let load = Load {
        passed_nanos: r.u64("load passed")?,
        worked_nanos: r.u64("load worked")?,
        ready_nanos: r.u64("load ready")?,
    };
    let (expected, found) = (r.u64("load checksum")?, hasher.checksum(&bytes[..LOAD_LEN - 8]));
    if expected != found {
        return Err(WireError::Checksum { what: "load", expected, found });
    }
    Ok(load)
}

/// The running digest of a stream's receipts, which both sides compare at the handover: xxh3-64 of its last value and the
/// checksum of the next receipt (which covers the frame's number and its digests).
pub fn fold_receipt(fold: u64, receipt: &[u8], hasher: &PageHasher) -> u64 {
    let mut both = [0; 16];
    both[..8].copy_from_slice(&fold.to_le_bytes());
    both[8..].copy_from_slice(receipt.last_chunk::<8>().unwrap_or(&[0; 8]));
    hasher.checksum(&both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> FrameHeader {
        FrameHeader {
            kind: FrameKind::Pages,
            seq: 5,
            chunk: 3,
            encoded_len: 10,
            raw: 0b1,
            zero: 0b10,
            delta: 0b100,
            zstd: 0b1000,
            encoded_checksum: 77,
            placed: false,
            references: false,
        }
    }

    #[test]
    fn header_round_trip() {
        let hasher = PageHasher::new(1);
        assert_eq!(FrameHeader::decode(&header().encode(&hasher), &hasher), Ok(header()));
        for (placed, references) in [(true, false), (false, true), (true, true)] {
            let flagged = FrameHeader { placed, references, ..header() };
            assert_eq!(FrameHeader::decode(&flagged.encode(&hasher), &hasher), Ok(flagged));
        }
        for other in [FrameHeader::end(9), FrameHeader::same(9, 3, 0b101)] {
            assert_eq!(FrameHeader::decode(&other.encode(&hasher), &hasher), Ok(other));
            assert_eq!((other.raw_len(), other.wire_bytes()), (0, FrameHeader::LEN as u64));
        }
        // Another session's frame is not taken for one of ours.
        assert!(FrameHeader::decode(&header().encode(&PageHasher::new(2)), &hasher).is_err());
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let hasher = PageHasher::new(1);
        let good = header().encode(&hasher);
        for bit in 0..FrameHeader::LEN * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(FrameHeader::decode(&bad, &hasher).is_err(), "bit {bit}");
        }
        let mut receipt = Vec::new();
        encode_receipt(&mut receipt, 1, &[1, 2, 3], &hasher);
        for bit in 0..receipt.len() * 8 {
            let mut bad = receipt.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let head = decode_receipt_header(bad[..16].try_into().unwrap());
            assert!(head.is_err() || check_receipt(&bad, &hasher).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn refuses_impossible_shapes() {
        let hasher = PageHasher::new(1);
        let layout = Layout::flat(4 << 20).unwrap();
        let bad = |f: &dyn Fn(&mut FrameHeader)| {
            let mut h = header();
            f(&mut h);
            FrameHeader::decode(&h.encode(&hasher), &hasher).and_then(|h| h.check_layout(&layout)).is_err()
        };
        assert!(bad(&|h| h.zero = 1));
        assert!(bad(&|h| h.encoded_len = 0));
        assert!(bad(&|h| h.encoded_len = u32::MAX));
        // One page as a delta, one in the zstd frame: no longer than both.
        assert!(bad(&|h| h.encoded_len = 2 * PAGE_SIZE as u32 + 1));
        assert!(!bad(&|h| h.encoded_len = 2 * PAGE_SIZE as u32));
        assert!(bad(&|h| (h.delta, h.zstd) = (0, 0)));
        assert!(bad(&|h| h.kind = FrameKind::End));
        assert!(bad(&|h| (h.placed, h.raw) = (true, 0)));
        assert!(bad(&|h| (h.references, h.zstd) = (true, 0)));
        assert!(bad(&|h| *h = FrameHeader::same(1, 0, 0)));
        assert!(bad(&|h| *h = FrameHeader { zero: 2, ..FrameHeader::same(1, 0, 1) }));
        assert!(bad(&|h| *h = FrameHeader { placed: true, ..FrameHeader::same(1, 0, 1) }));
        assert!(bad(&|h| *h = FrameHeader::same(1, 16, 1)));
        assert!(!bad(&|h| *h = FrameHeader::same(1, 15, 1)));
        assert!(bad(&|h| h.chunk = 16));
        assert!(!bad(&|h| h.chunk = 15));
        let tail = Layout::flat(3 * 4096).unwrap();
        assert!(header().check_layout(&tail).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes: [u8; 32], more: [u8; 32], tail: [u8; 8]) {
            let all: [u8; FrameHeader::LEN] = [&bytes[..], &more[..], &tail[..]].concat().try_into().unwrap();
            let _ = FrameHeader::decode(&all, &PageHasher::new(0));
        }
    }
}
