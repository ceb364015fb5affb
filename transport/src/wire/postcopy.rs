//! What travels on the connections of postcopy.
//!
//! From the source come frames as on data streams ([`super::frame`]), without deltas and references, each with a *seal* behind its
//! header:
//! ```text
//! header (72 bytes) | seal (8 bytes) | encoded section (encoded_len bytes) | raw pages (4096 bytes for each bit of raw, ascending)
//! ```
//! The guest may use a page as soon as it is there, so damage must be found before: the seal is the checksum of the receipt that
//! the frame must get if it arrives as it was sent. What does not fit its seal is not placed, and its receipt tells the source.
//! From the destination come these receipts and, on stream 0, [`PageRequest`]s between them.

use pagecopy::digest::PageHasher;
use pagecopy::layout::Layout;

use super::frame::encode_receipt;
use super::{Reader, WireError};

/// First word of a request, `PGQ1`.
pub const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"PGQ1");
/// Bytes of a seal.
pub const SEAL_LEN: usize = 8;

/// The guest waits for these pages: send them now, by themselves, unless they are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Their chunk.
    pub chunk: u32,
    /// Which of its pages, at least one.
    pub pages: u64,
}

impl PageRequest {
    /// Bytes on the wire.
    pub const LEN: usize = 24;

    /// Offsets: 0 magic, 4 chunk, 8 pages, 16 checksum of bytes 0..16.
    pub fn encode(&self, hasher: &PageHasher) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&self.chunk.to_le_bytes());
        out[8..16].copy_from_slice(&self.pages.to_le_bytes());
        let checksum = hasher.checksum(&out[..16]);
        out[16..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads a request and checks it for itself and against the layout.
    pub fn decode(bytes: &[u8; Self::LEN], hasher: &PageHasher, layout: &Layout) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        let magic = r.u32("request magic")?;
        if magic != REQUEST_MAGIC {
            return Err(WireError::BadMagic { what: "page request", found: magic.into() });
        }
        let request = Self { chunk: r.u32("chunk")?, pages: r.u64("pages")? };
        let (expected, found) = (r.u64("checksum")?, hasher.checksum(&bytes[..16]));
        if expected != found {
            return Err(WireError::Checksum { what: "page request", expected, found });
        }
        if request.pages == 0 || request.pages & !layout.valid(request.chunk) != 0 {
            return Err(WireError::BadValue { field: "requested pages", value: request.pages });
        }
        Ok(request)
    }
}

/// The receipt of a frame whose pages have these digests, ascending, appended to `out`; returns its checksum, the frame's seal.
pub fn sealed_receipt(out: &mut Vec<u8>, seq: u64, digests: &[u64], hasher: &PageHasher) -> u64 {
    encode_receipt(out, seq, digests, hasher);
    u64::from_le_bytes(*out.last_chunk().expect("a receipt ends with its checksum"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_and_every_flipped_bit_is_found() {
        let (hasher, layout) = (PageHasher::new(3), Layout::flat(65 * 4096).unwrap());
        let request = PageRequest { chunk: 1, pages: 1 };
        let bytes = request.encode(&hasher);
        assert_eq!(PageRequest::decode(&bytes, &hasher, &layout), Ok(request));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(PageRequest::decode(&bad, &hasher, &layout).is_err(), "bit {bit}");
        }
        for (chunk, pages) in [(1, 0), (1, 2), (2, 1), (u32::MAX, 1)] {
            let bytes = PageRequest { chunk, pages }.encode(&hasher);
            assert!(PageRequest::decode(&bytes, &hasher, &layout).is_err(), "{chunk} {pages}");
        }
    }

    #[test]
    fn a_seal_is_the_checksum_of_the_receipt() {
        let hasher = PageHasher::new(3);
        let mut receipt = Vec::new();
        let seal = sealed_receipt(&mut receipt, 7, &[1, 2], &hasher);
        assert!(super::super::frame::check_receipt(&receipt, &hasher).is_ok());
        assert_eq!(receipt[receipt.len() - 8..], seal.to_le_bytes());
        let mut other = Vec::new();
        assert_ne!(sealed_receipt(&mut other, 7, &[1, 3], &hasher), seal);
    }
}
