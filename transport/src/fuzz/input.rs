//! What inputs of several fuzz targets are made of.

use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};

use crate::wire::frame::{FRAME_MAGIC, FrameHeader};

/// Seed of every session here.
pub(super) const SEED: u64 = 1;

/// A guest of two regions, each of which ends with a short chunk: chunks 0 to 2 and 3.
pub(super) fn layout() -> Layout {
    let region = |gpa, len, name: &str| Region::new(name, gpa, len);
    let short = 3 * PAGE_SIZE as u64;
    let first = region(0, 2 * CHUNK_SIZE as u64 + short, "low");
    Layout::new(vec![first, region(1 << 32, short, "high")]).expect("a layout")
}

/// Bytes of input for a frame's header.
const FIELDS: usize = 40;

/// What an input says of a frame.
pub(super) struct Frame<'a> {
    pub(super) chunk: u32,
    pub(super) what: u8,
    /// Its pages are as in the base.
    same: bool,
    fill: u8,
    pub(super) masks: [u64; 4],
    pub(super) section: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The next of an input: chunk, what is special, length of the encoded section, what raw pages are filled with, 1 for pages as in the
    /// base, 2 spare, and four masks; then the section.
    pub(super) fn take(input: &mut &'a [u8]) -> Option<Self> {
        let (fields, rest) = input.split_first_chunk::<FIELDS>()?;
        let [chunk, what, l0, l1, fill, same, ..] = *fields;
        let (section, rest) = rest.split_at(rest.len().min(u16::from_le_bytes([l0, l1]).into()));
        *input = rest;
        let (masks, _) = fields[8..].as_chunks::<8>();
        let masks = std::array::from_fn(|i| u64::from_le_bytes(masks[i]));
        Some(Self { chunk: chunk.into(), what, same: same == 1, fill, masks, section })
    }

    /// The header, with right checksums unless it says otherwise.
    pub(super) fn header(&self, seq: u64, hasher: &PageHasher) -> [u8; FrameHeader::LEN] {
        let is = |bit: u8| self.what & bit != 0;
        let [raw, zero, delta, zstd] = self.masks;
        let kind: u16 = if is(8) { 2 } else { 1 + 2 * u16::from(self.same) };
        let checksum = hasher.checksum(self.section) ^ u64::from(is(32));
        let mut header = Vec::with_capacity(FrameHeader::LEN);
        header.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
        header.extend_from_slice(&(kind ^ u16::from(is(4)) << 8).to_le_bytes());
        header.extend_from_slice(&(u16::from(self.what & 3) | u16::from(is(128)) << 7).to_le_bytes());
        header.extend_from_slice(&(seq + u64::from(is(64))).to_le_bytes());
        header.extend_from_slice(&self.chunk.to_le_bytes());
        header.extend_from_slice(&(self.section.len() as u32).to_le_bytes());
        [raw, zero, delta, zstd, if self.section.is_empty() { 0 } else { checksum }]
            .iter()
            .for_each(|field| header.extend_from_slice(&field.to_le_bytes()));
        let checksum = hasher.checksum(&header) ^ u64::from(is(16));
        header.extend_from_slice(&checksum.to_le_bytes());
        header.try_into().expect("a header's length")
    }

    pub(super) fn raw(&self) -> Vec<u8> {
        let pages = if self.same { 0 } else { self.masks[0].count_ones() as usize };
        (0..pages * PAGE_SIZE).map(|at| self.fill.wrapping_add((at / PAGE_SIZE) as u8)).collect()
    }

    pub(super) fn placed(&self) -> bool {
        self.what & 1 != 0
    }
}
