//! Opening sealed frames: nothing of one is used before it is known to be what was saved.

use std::io;

use pagecopy::bitmap::bits;
use pagecopy::chunk::ChunkDecoder;
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE};
use pagecopy::xbzrle::Page;

use super::error::{ArchiveError, Damage, Place};
use super::format::{FrameHeader, FrameKind, PAD_HEAD, pad_zeros};
use crate::local::zeroed;
use crate::wire::WireError;

/// Longest frame: all pages of a chunk, in whatever way, and their seals.
pub const FRAME_MAX: usize = FrameHeader::SEALED_MAX + CHUNK_SIZE;

/// Opens frames, one after the other; it has room for one.
pub struct Opener {
    decoder: ChunkDecoder,
    /// The frame's bytes.
    bytes: Box<[u8]>,
}

/// A frame that was opened.
pub struct Opened<'a> {
    /// Its header.
    pub header: FrameHeader,
    /// What each page's digest is to be, ascending.
    pub seals: Vec<u64>,
    /// Pages that are not what was saved.
    pub damaged: u64,
    /// Why the encoded section is of no use, where it is not.
    section: Option<Damage>,
    raw: &'a [Page],
    compressed: &'a [Page],
}

impl Opener {
    /// With its memory.
    ///
    /// # Errors
    /// When there is none.
    pub fn new() -> io::Result<Self> {
        Ok(Self { decoder: ChunkDecoder::new(), bytes: zeroed(FRAME_MAX)? })
    }

    /// Reads the frame that begins at `offset` by `read`, which fills a buffer, and opens it. The first bytes of it may have been read:
    /// `begun`.
    ///
    /// # Errors
    /// Those of `read`, and where header or seals are damaged: nothing is known of the frame then. Pages that are damaged are no error
    /// here: see [`Opened::damaged`].
    pub fn open(
        &mut self,
        offset: u64,
        begun: &[u8],
        layout: &Layout,
        hasher: &PageHasher,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), ArchiveError>,
    ) -> Result<Opened<'_>, ArchiveError> {
        let wrong = |source: WireError| ArchiveError::damaged(offset, source);
        self.bytes[..begun.len()].copy_from_slice(begun);
        read(offset + begun.len() as u64, &mut self.bytes[begun.len()..FrameHeader::LEN])?;
        let head = self.bytes.first_chunk().expect("there is room for a frame");
        let header = FrameHeader::decode(head).map_err(wrong)?;
        header.check_layout(layout).map_err(wrong)?;
        let sealed = FrameHeader::LEN + header.seals_len();
        let end = header.frame_len();
        read(offset + FrameHeader::LEN as u64, &mut self.bytes[FrameHeader::LEN..end])?;
        let mut seals = header.check_seals(&self.bytes[..sealed], hasher).map_err(wrong)?;
        let (encoded, raw) = self.bytes[sealed..end].split_at(header.encoded_len as usize);
        let (mut compressed, mut section) = (&[][..], None);
        if header.encoded_len != 0 {
            match decode(&mut self.decoder, &header, encoded, seals.pop(), hasher) {
                Ok(pages) => compressed = pages,
                Err(damage) => section = Some(damage),
            }
        }
        let mut opened = Opened { header, seals, damaged: 0, section, raw: raw.as_chunks().0, compressed };
        opened.check(hasher);
        Ok(opened)
    }
}

/// The pages of an encoded section, which has this seal. One that has another is not decoded.
fn decode<'a>(
    decoder: &'a mut ChunkDecoder,
    header: &FrameHeader,
    encoded: &[u8],
    seal: Option<u64>,
    hasher: &PageHasher,
) -> Result<&'a [Page], Damage> {
    let (expected, found) = (seal.unwrap_or_default(), hasher.checksum(encoded));
    if expected != found {
        return Err(WireError::Checksum { what: "encoded section", expected, found }.into());
    }
    Ok(decoder.decode(0, header.zstd, encoded, |_, _| {})?.compressed())
}

impl Opener {
    /// Reads the zeros of a pad that begins at `offset` with `head`, and checks them; returns the pad's bytes.
    ///
    /// # Errors
    /// Those of `read`, and where it is none.
    pub fn pad(
        &mut self,
        offset: u64,
        head: &[u8; PAD_HEAD],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), ArchiveError>,
    ) -> Result<usize, ArchiveError> {
        let zeros = pad_zeros(head).map_err(|source| ArchiveError::damaged(offset, source))?;
        read(offset + PAD_HEAD as u64, &mut self.bytes[..zeros])?;
        match self.bytes[..zeros].iter().find(|&&byte| byte != 0) {
            None => Ok(PAD_HEAD + zeros),
            Some(&byte) => {
                let source = WireError::BadValue { field: "pad", value: byte.into() };
                Err(ArchiveError::damaged(offset, source))
            }
        }
    }
}

impl Opened<'_> {
    /// The content of a page that the frame holds; pages of zeros and of the base have none.
    pub fn page(&self, bit: u32) -> Option<&Page> {
        let page = 1u64.checked_shl(bit)?;
        let at = |mask: u64| (mask & (page - 1)).count_ones() as usize;
        if self.header.raw & page != 0 {
            self.raw.get(at(self.header.raw))
        } else if self.header.zstd & page != 0 {
            self.compressed.get(at(self.header.zstd))
        } else {
            None
        }
    }

    /// Raw pages that lie together in a chunk, from `first` on.
    pub fn raw_run(&self, first: u32, count: u32) -> &[u8] {
        let at = (self.header.raw & !(u64::MAX << first)).count_ones() as usize;
        self.raw[at..at + count as usize].as_flattened()
    }

    /// Pages with content of their own.
    pub fn filled(&self) -> u64 {
        match self.header.kind {
            FrameKind::Pages => self.header.raw | self.header.zstd,
            FrameKind::Same => 0,
        }
    }

    /// Pages that are as in the base.
    pub fn same(&self) -> u64 {
        match self.header.kind {
            FrameKind::Pages => 0,
            FrameKind::Same => self.header.raw,
        }
    }

    /// The seal of a page of the frame.
    pub fn seal(&self, bit: u32) -> Option<u64> {
        let pages = self.header.pages();
        let page = 1u64.checked_shl(bit).filter(|page| pages & page != 0)?;
        self.seals.get((pages & (page - 1)).count_ones() as usize).copied()
    }

    fn check(&mut self, hasher: &PageHasher) {
        let mut damaged = 0;
        for (&seal, bit) in self.seals.iter().zip(bits(self.header.pages())) {
            let digest = match self.page(bit) {
                Some(page) => hasher.page(page),
                None if self.header.zero >> bit & 1 != 0 => hasher.zero(),
                // Of the base, which is compared when it is read.
                None if self.header.kind == FrameKind::Same => continue,
                None => {
                    damaged |= 1 << bit;
                    continue;
                }
            };
            damaged |= u64::from(receipt(digest) != seal) << bit;
        }
        self.damaged = damaged;
    }

    /// Fails where a page is damaged.
    ///
    /// # Errors
    /// With the first of them.
    pub fn whole(&self, offset: u64, layout: &Layout) -> Result<(), ArchiveError> {
        if self.damaged == 0 {
            return Ok(());
        }
        let source = self.section.clone().unwrap_or(Damage::Pages { pages: self.damaged });
        let place = Place::of(layout, self.header.chunk, self.damaged);
        Err(ArchiveError::Damaged { offset, place, source })
    }

    /// In what ways it is damaged, each with the pages that are.
    pub fn damages(&self) -> impl Iterator<Item = (Damage, u64)> {
        let of_section = if self.section.is_some() { self.header.zstd } else { 0 };
        let others = self.damaged & !of_section;
        let pages = (others != 0).then_some((Damage::Pages { pages: others }, others));
        self.section.clone().map(|damage| (damage, of_section)).into_iter().chain(pages)
    }

    /// Bytes of pages that it stands for.
    pub fn logical_bytes(&self) -> u64 {
        u64::from(self.header.pages().count_ones()) * PAGE_SIZE as u64
    }
}
