//! Decodes the encoded sections of chunks, whoever made them.

use super::{Dictionary, LENGTH_BYTES, REFERENCE_BYTES, REFERENCES_MAX, Reference, ZERO_PAGE};
use crate::bitmap::bits;
use crate::choose::DELTA_BYTES_MAX;
use crate::compress::{Decompress, DecompressError};
use crate::layout::{CHUNK_PAGES, PAGE_SIZE};
use crate::xbzrle::{self, DeltaError, Page};

/// Why a section is not the encoding of the pages that its frame announces.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A page is in two masks.
    #[error("pages {pages:#x} of the chunk are announced both as deltas and in the zstd frame")]
    MasksOverlap {
        /// The pages in both.
        pages: u64,
    },
    /// The section is longer than the pages it stands for.
    #[error("the encoded section has {bytes} bytes; at most {most} can stand for the announced pages")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// What is allowed.
        most: usize,
    },
    /// The section ends before its last delta does.
    #[error("the encoded section ends at byte {end}, inside the delta of page {bit}")]
    Truncated {
        /// The page.
        bit: u32,
        /// Where the section ends.
        end: usize,
    },
    /// A delta of a length that no encoder makes.
    #[error("the delta of page {bit} has {length} bytes; it must have 1 to {DELTA_BYTES_MAX}")]
    DeltaLength {
        /// The page.
        bit: u32,
        /// The length.
        length: usize,
    },
    /// A delta that is malformed.
    #[error("the delta of page {bit} is malformed")]
    Delta {
        /// The page.
        bit: u32,
        /// What is wrong with it.
        #[source]
        source: DeltaError,
    },
    /// Bytes after the last delta, with no page announced in a frame.
    #[error("{bytes} bytes follow the last delta, but no page is announced as compressed")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// A number of references, or of pages in them, that no encoder makes.
    #[error("the encoded section refers to {count} {what}; it must be 1 to {REFERENCES_MAX}")]
    ReferenceCount {
        /// How many.
        count: usize,
        /// `chunks` or `pages`.
        what: &'static str,
    },
    /// The section ends before its references do, or has them without a frame that they are for.
    #[error("the encoded section ends inside its references, or has no zstd frame that they are for")]
    ReferencesCut,
    /// References that are not in order, or to no page.
    #[error(
        "the reference to pages {pages:#x} of chunk {chunk} names no page, or is not behind the one before it"
    )]
    ReferenceOrder {
        /// The chunk.
        chunk: u32,
        /// The pages.
        pages: u64,
    },
    /// References to what the destination does not hold.
    #[error("pages {pages:#x} of chunk {chunk} are referred to, and not all of them were sent")]
    ReferenceUnknown {
        /// The chunk.
        chunk: u32,
        /// The pages.
        pages: u64,
    },
    /// The zstd frame is wrong.
    #[error("the zstd frame of pages {pages:#x} cannot be used")]
    Frame {
        /// The pages announced in it.
        pages: u64,
        /// What is wrong with it.
        #[source]
        source: DecompressError,
    },
}

/// Decodes the encoded sections of chunks; one a stream worker.
#[derive(Debug)]
pub struct ChunkDecoder {
    decompress: Decompress,
    /// Pages decoded from deltas, each at its place in the chunk.
    deltas: Box<[Page]>,
    /// And behind it the pages decoded from the frame, one after the other: from there zstd copies out of both alike.
    dictionary: Dictionary,
}

impl Default for ChunkDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl ChunkDecoder {
    /// A decoder.
    pub fn new() -> Self {
        Self {
            decompress: Decompress::new(),
            deltas: vec![ZERO_PAGE; CHUNK_PAGES].into_boxed_slice(),
            dictionary: Dictionary::new(),
        }
    }

    /// Decodes a section without references; see [`decode_with`](Self::decode_with).
    pub fn decode(
        &mut self,
        delta: u64,
        zstd: u64,
        encoded: &[u8],
        base: impl FnMut(u32, &mut Page),
    ) -> Result<Decoded<'_>, DecodeError> {
        self.decode_with(Announced { delta, zstd, references: false }, encoded, base, |_, _| false)
    }

    /// Decodes a section that announces pages, whole, before anything of it is to be used. `base`
    /// fills in what the destination holds for the page of a bit; it is asked once for each bit of `delta` up to the
    /// first that is malformed. `refer` does the same for pages of any chunk, ascending, one after the other, and returns false
    /// where they are not pages that were sent: what it is asked for may be outside the layout.
    pub fn decode_with(
        &mut self,
        announced: Announced,
        encoded: &[u8],
        mut base: impl FnMut(u32, &mut Page),
        refer: impl FnMut(Reference, &mut [Page]) -> bool,
    ) -> Result<Decoded<'_>, DecodeError> {
        let Announced { delta, zstd, references } = announced;
        if delta & zstd != 0 {
            return Err(DecodeError::MasksOverlap { pages: delta & zstd });
        }
        let most = (delta | zstd).count_ones() as usize * PAGE_SIZE;
        if encoded.len() > most {
            return Err(DecodeError::TooLong { bytes: encoded.len(), most });
        }
        let mut rest = encoded;
        for bit in bits(delta) {
            let bytes = take_delta(&mut rest, bit, encoded.len())?;
            let page = &mut self.deltas[bit as usize];
            base(bit, page);
            xbzrle::decode(bytes, page).map_err(|source| DecodeError::Delta { bit, source })?;
        }
        self.dictionary.pages = 0;
        if references {
            take_references(&mut rest, &mut self.dictionary, refer)?;
        }
        let (dictionary, frame) = self.dictionary.split();
        if zstd != 0 {
            let dictionary = if references { dictionary } else { &[] };
            self.decompress
                .decompress(dictionary, rest, frame[..zstd.count_ones() as usize].as_flattened_mut())
                .map_err(|source| DecodeError::Frame { pages: zstd, source })?;
        } else if !rest.is_empty() {
            return Err(DecodeError::Trailing { bytes: rest.len() });
        }
        Ok(Decoded { delta, zstd, deltas: &self.deltas, frame })
    }
}

/// What a section is said to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Pages as deltas.
    pub delta: u64,
    /// Pages in the zstd frame.
    pub zstd: u64,
    /// The zstd frame refers to other pages.
    pub references: bool,
}

/// Takes the list of references off the front of the rest of a section, and fills the dictionary with what they name.
fn take_references(
    rest: &mut &[u8],
    dictionary: &mut Dictionary,
    mut refer: impl FnMut(Reference, &mut [Page]) -> bool,
) -> Result<(), DecodeError> {
    let (&count, list) = rest.split_first().ok_or(DecodeError::ReferencesCut)?;
    let count = usize::from(count);
    if !(1..=REFERENCES_MAX).contains(&count) {
        return Err(DecodeError::ReferenceCount { count, what: "chunks" });
    }
    let (list, after) = list.split_at_checked(count * REFERENCE_BYTES).ok_or(DecodeError::ReferencesCut)?;
    if after.is_empty() {
        return Err(DecodeError::ReferencesCut);
    }
    *rest = after;
    let mut before = None;
    for &[c0, c1, c2, c3, ref pages @ ..] in list.as_chunks::<REFERENCE_BYTES>().0 {
        let (chunk, pages) = (u32::from_le_bytes([c0, c1, c2, c3]), u64::from_le_bytes(*pages));
        if pages == 0 || before.is_some_and(|before| before >= chunk) {
            return Err(DecodeError::ReferenceOrder { chunk, pages });
        }
        before = Some(chunk);
        let more = pages.count_ones() as usize;
        let count = dictionary.pages + more;
        let Some(room) = dictionary.room().get_mut(..more) else {
            return Err(DecodeError::ReferenceCount { count, what: "pages" });
        };
        if !refer(Reference { chunk, pages }, room) {
            return Err(DecodeError::ReferenceUnknown { chunk, pages });
        }
        dictionary.pages = count;
    }
    Ok(())
}

/// Takes one delta off the front of the rest of a section that ends at `end`.
fn take_delta<'a>(rest: &mut &'a [u8], bit: u32, end: usize) -> Result<&'a [u8], DecodeError> {
    let truncated = DecodeError::Truncated { bit, end };
    let Some((length, after)) = rest.split_first_chunk::<LENGTH_BYTES>() else { return Err(truncated) };
    let length = usize::from(u16::from_le_bytes(*length));
    if length == 0 || length > DELTA_BYTES_MAX {
        return Err(DecodeError::DeltaLength { bit, length });
    }
    let Some((bytes, after)) = after.split_at_checked(length) else { return Err(truncated) };
    *rest = after;
    Ok(bytes)
}

/// The pages of a decoded section, in the decoder's scratch.
#[derive(Clone, Copy, Debug)]
pub struct Decoded<'a> {
    delta: u64,
    zstd: u64,
    deltas: &'a [Page],
    frame: &'a [Page],
}

impl<'a> Decoded<'a> {
    /// The pages that the section held.
    pub fn pages(&self) -> u64 {
        self.delta | self.zstd
    }

    /// The content of a page, if the section held it.
    pub fn page(&self, bit: u32) -> Option<&'a Page> {
        let page = 1u64.checked_shl(bit)?;
        if self.delta & page != 0 {
            self.deltas.get(bit as usize)
        } else if self.zstd & page != 0 {
            self.frame.get((self.zstd & (page - 1)).count_ones() as usize)
        } else {
            None
        }
    }

    /// The pages of its zstd frame, ascending, one after the other.
    pub fn compressed(&self) -> &'a [Page] {
        &self.frame[..self.zstd.count_ones() as usize]
    }

    /// All pages that the section held, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &'a Page)> + use<'a> {
        let decoded = *self;
        bits(self.pages()).filter_map(move |bit| Some((bit, decoded.page(bit)?)))
    }
}
