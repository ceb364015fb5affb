//! What an archive is made of, byte by byte; `docs/archive.md` is the same in words.
//!
//! ```text
//! magic (8) | header record | frames, in any order but for those of one chunk | state record | index record | footer record
//! ```
//! Between frames there may be pads of zeros, where whoever wrote it had to write whole pages of the file. All of it is covered by a
//! checksum or a seal. Everything is little-endian.

use pagecopy::backend::StateBlob;
use pagecopy::bitmap::bits;
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_PAGES, Layout, PAGE_SIZE, Region};

use crate::wire::control::{
    MACHINE_MAX, STATE_LEN_MAX, decode_state, encode_state, read_regions, write_regions,
};
use crate::wire::{Reader, SessionId, WireError, Writer};

/// The first bytes of an archive.
pub const MAGIC: [u8; 8] = *b"PGFARCH1";
/// The version that this release writes. It reads all up to this one.
pub const VERSION: u16 = 1;
/// First word of a record, `PGA1`.
pub const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"PGA1");
/// First word of a frame, `PGS1`.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"PGS1");
/// Longest name of a base, in bytes.
pub const BASE_NAME_MAX: usize = 4096;
/// Longest payload of a header record.
pub const HEADER_LEN_MAX: u64 = (4 * MACHINE_MAX) as u64;
/// Most bytes of an index that are believed: of a guest of 16 TiB that was saved in some thirty rounds.
pub const INDEX_LEN_MAX: u64 = 48 << 30;

/// First word of a pad, `PGP1`; the number of zeros that follow comes next.
pub const PAD_MAGIC: u32 = u32::from_le_bytes(*b"PGP1");
/// Bytes of a pad before its zeros.
pub const PAD_HEAD: usize = 8;
/// Most bytes of a pad.
pub const PAD_MAX: usize = 2 * PAGE_SIZE;

/// Appends a pad, so that `out` has a multiple of the page size.
pub fn pad(out: &mut Vec<u8>) {
    let whole = (out.len() + PAD_HEAD).next_multiple_of(PAGE_SIZE);
    let zeros = whole - out.len() - PAD_HEAD;
    out.extend_from_slice(&PAD_MAGIC.to_le_bytes());
    out.extend_from_slice(&(zeros as u32).to_le_bytes());
    out.resize(whole, 0);
}

/// Checks a pad's head, and says how many zeros follow.
pub fn pad_zeros(head: &[u8; PAD_HEAD]) -> Result<usize, WireError> {
    let mut r = Reader::new(head);
    let magic = r.u32("pad magic")?;
    if magic != PAD_MAGIC {
        return Err(WireError::BadMagic { what: "pad", found: magic.into() });
    }
    r.count(PAD_MAX - PAD_HEAD, "pad length")
}

/// What a reader must know to read an archive; it refuses those that have more.
pub mod feature {
    /// Pages in zstd frames.
    pub const ZSTD: u64 = 1;
    /// Pages that are as in a base.
    pub const BASE: u64 = 2;
    /// All that this release reads.
    pub const KNOWN: u64 = ZSTD | BASE;
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum RecordKind {
    /// What the archive is of; the first.
    Header = 1,
    /// Device state.
    State = 2,
    /// Where the frames are.
    Index = 3,
    /// The end; an archive without is not whole.
    Footer = 4,
}

/// What stands before a record's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: RecordKind,
    /// Where it begins, from the archive's first byte.
    pub offset: u64,
    /// Bytes of its payload.
    pub len: u64,
    /// xxh3-64 of the payload.
    pub payload: u64,
}

impl Record {
    /// Bytes before the payload.
    pub const LEN: usize = 40;

    /// That of a payload. `hasher` is the archive's; for the header record, which has the seed in it, that of seed 0.
    pub fn of(kind: RecordKind, offset: u64, payload: &[u8], hasher: &PageHasher) -> Self {
        Self { kind, offset, len: payload.len() as u64, payload: hasher.checksum(payload) }
    }

    /// Offsets: 0 magic, 4 kind, 6 zero, 8 offset, 16 len, 24 payload's checksum, 32 checksum of bytes 0..32.
    pub fn encode(&self, hasher: &PageHasher) -> [u8; Self::LEN] {
        let mut w = Writer::default();
        w.u32(RECORD_MAGIC);
        w.u16(self.kind as u16);
        w.u16(0);
        w.u64(self.offset);
        w.u64(self.len);
        w.u64(self.payload);
        let mut bytes = w.into_vec();
        bytes.extend_from_slice(&hasher.checksum(&bytes).to_le_bytes());
        bytes.try_into().expect("the encoder wrote the structure's fixed length")
    }

    /// Reads what stands at `offset`, and checks it for itself.
    pub fn decode(bytes: &[u8; Self::LEN], offset: u64, hasher: &PageHasher) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        let magic = r.u32("record magic")?;
        if magic != RECORD_MAGIC {
            return Err(WireError::BadMagic { what: "record", found: magic.into() });
        }
        let (kind, zero) = (r.u16("record kind")?, r.u16("record flags")?);
        let (at, len, payload) =
            (r.u64("record offset")?, r.u64("record length")?, r.u64("payload's checksum")?);
        let (expected, found) = (r.u64("checksum")?, hasher.checksum(&bytes[..32]));
        if expected != found {
            return Err(WireError::Checksum { what: "record", expected, found });
        }
        let kind = match kind {
            1 => RecordKind::Header,
            2 => RecordKind::State,
            3 => RecordKind::Index,
            4 => RecordKind::Footer,
            value => return Err(WireError::BadValue { field: "record kind", value: value.into() }),
        };
        if zero != 0 {
            return Err(WireError::BadValue { field: "record flags", value: zero.into() });
        }
        if at != offset {
            return Err(WireError::BadValue { field: "record offset", value: at });
        }
        Ok(Self { kind, offset, len, payload })
    }

    /// Where the record ends, unless that is beyond all numbers.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(Self::LEN as u64)?.checked_add(self.len)
    }

    /// Checks the payload.
    pub fn check(&self, payload: &[u8], hasher: &PageHasher) -> Result<(), WireError> {
        let found = hasher.checksum(payload);
        if found != self.payload {
            return Err(WireError::Checksum { what: "record's payload", expected: self.payload, found });
        }
        Ok(())
    }
}

/// The archive that another one is the difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its id.
    pub id: SessionId,
    /// Its file, as it was named; relative to the folder of the archive that says so.
    pub name: String,
}

/// What an archive is of.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: u16,
    /// What its reader must know: [`feature`] bits.
    pub features: u64,
    /// Which archive it is.
    pub id: SessionId,
    /// Seed of every digest and checksum behind the header.
    pub seed: u64,
    /// When it was begun, in seconds since 1970.
    pub created: u64,
    /// It has a guest's device state, and not memory alone.
    pub live: bool,
    /// Bytes of all pages that were no holes.
    pub data_bytes: u64,
    /// The guest's memory.
    pub regions: Vec<Region>,
    /// The machine, for who loads it to compare with its own.
    pub machine: String,
    /// What it is the difference to.
    pub base: Option<Base>,
}

/// Without the seed.
impl std::fmt::Debug for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut f = f.debug_struct("Header");
        f.field("version", &self.version).field("features", &self.features).field("live", &self.live);
        f.field("regions", &self.regions).field("base", &self.base).finish_non_exhaustive()
    }
}

impl Header {
    /// The header record's payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.u16(self.version);
        w.u16(u16::from(self.live));
        w.u32(PAGE_SIZE as u32);
        w.u32(CHUNK_PAGES as u32);
        w.u64(self.features);
        w.bytes(&self.id);
        w.u64(self.seed);
        w.u64(self.created);
        w.u64(self.data_bytes);
        write_regions(&self.regions, &mut w);
        w.blob(self.machine.as_bytes());
        match &self.base {
            None => w.u16(0),
            Some(base) => {
                w.u16(1);
                w.bytes(&base.id);
                w.blob(base.name.as_bytes());
            }
        }
        w.into_vec()
    }

    /// Reads it. A version or feature that this release does not know is an error by itself.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(payload);
        let version = r.u16("version")?;
        if !(1..=VERSION).contains(&version) {
            return Err(WireError::BadValue { field: "version", value: version.into() });
        }
        let live = flag(&mut r, "live")?;
        for (field, expected) in [("page_size", PAGE_SIZE), ("chunk_pages", CHUNK_PAGES)] {
            let value = r.u32(field)?;
            if value as usize != expected {
                return Err(WireError::BadValue { field, value: value.into() });
            }
        }
        let features = r.u64("features")?;
        if features & !feature::KNOWN != 0 {
            return Err(WireError::BadValue { field: "features", value: features });
        }
        let (id, seed, created, data_bytes) =
            (r.array("id")?, r.u64("seed")?, r.u64("created")?, r.u64("data_bytes")?);
        let regions = read_regions(&mut r)?;
        let machine = r.string(MACHINE_MAX, "machine")?;
        let base = match flag(&mut r, "base")? {
            false => None,
            true => Some(Base { id: r.array("base id")?, name: r.string(BASE_NAME_MAX, "base name")? }),
        };
        if base.is_some() != (features & feature::BASE != 0) {
            return Err(WireError::BadValue { field: "features (of a base)", value: features });
        }
        r.end("header")?;
        Ok(Self { version, features, id, seed, created, live, data_bytes, regions, machine, base })
    }
}

fn flag(r: &mut Reader<'_>, field: &'static str) -> Result<bool, WireError> {
    match r.u16(field)? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(WireError::BadValue { field, value: value.into() }),
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// Pages of one chunk.
    Pages = 1,
    /// Pages of one chunk that are as in the base: `raw` names them, and nothing follows the seals.
    Same = 2,
}

/// What a sealed frame begins with. Its seals follow, one for each page, ascending: the low half of the page's digest; and, where there is
/// an encoded section, one of that: its checksum, for not every bit of it shows in the pages. Then come the encoded section, which is one
/// zstd frame of the pages in `zstd`, and the raw pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What it is.
    pub kind: FrameKind,
    /// The chunk.
    pub chunk: u32,
    /// Bytes of the encoded section.
    pub encoded_len: u32,
    /// Pages as they are.
    pub raw: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages in the encoded section.
    pub zstd: u64,
}

impl FrameHeader {
    /// Bytes before the seals.
    pub const LEN: usize = 48;
    /// Bytes of header and seals at most.
    pub const SEALED_MAX: usize = Self::LEN + 8 * (CHUNK_PAGES + 1);

    /// All pages of the frame.
    pub fn pages(&self) -> u64 {
        self.raw | self.zero | self.zstd
    }

    /// Bytes of the seals.
    pub fn seals_len(&self) -> usize {
        8 * (self.pages().count_ones() as usize + usize::from(self.encoded_len != 0))
    }

    /// Bytes of the raw pages that follow.
    pub fn raw_len(&self) -> usize {
        match self.kind {
            FrameKind::Pages => self.raw.count_ones() as usize * PAGE_SIZE,
            FrameKind::Same => 0,
        }
    }

    /// Bytes of the whole frame.
    pub fn frame_len(&self) -> usize {
        Self::LEN + self.seals_len() + self.encoded_len as usize + self.raw_len()
    }

    /// Appends header and seals. Offsets: 0 magic, 4 kind, 6 zero, 8 chunk, 12 encoded_len, 16 raw, 24 zero pages, 32 zstd, 40 checksum of
    /// bytes 0..40 and all seals, 48 seals.
    pub fn encode(&self, seals: impl IntoIterator<Item = u64>, hasher: &PageHasher, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
        out.extend_from_slice(&(self.kind as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.chunk.to_le_bytes());
        out.extend_from_slice(&self.encoded_len.to_le_bytes());
        for mask in [self.raw, self.zero, self.zstd, 0] {
            out.extend_from_slice(&mask.to_le_bytes());
        }
        for seal in seals {
            out.extend_from_slice(&seal.to_le_bytes());
        }
        debug_assert_eq!(
            out.len() - start,
            Self::LEN + self.seals_len(),
            "every page has its seal, and the section"
        );
        let checksum = seal_checksum(&out[start..], hasher);
        out[start + 40..start + Self::LEN].copy_from_slice(&checksum.to_le_bytes());
    }

    /// Reads a header, and checks it for itself; its checksum, which covers the seals, is [checked](Self::check_seals) with them.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        let magic = r.u32("frame magic")?;
        if magic != FRAME_MAGIC {
            return Err(WireError::BadMagic { what: "frame", found: magic.into() });
        }
        let (kind, zero) = (r.u16("frame kind")?, r.u16("frame flags")?);
        let kind = match kind {
            1 => FrameKind::Pages,
            2 => FrameKind::Same,
            value => return Err(WireError::BadValue { field: "frame kind", value: value.into() }),
        };
        if zero != 0 {
            return Err(WireError::BadValue { field: "frame flags", value: zero.into() });
        }
        let header = Self {
            kind,
            chunk: r.u32("chunk")?,
            encoded_len: r.u32("encoded_len")?,
            raw: r.u64("raw")?,
            zero: r.u64("zero")?,
            zstd: r.u64("zstd")?,
        };
        header.check_shape()?;
        Ok(header)
    }

    fn check_shape(&self) -> Result<(), WireError> {
        let pages: u32 = [self.raw, self.zero, self.zstd].iter().map(|mask| mask.count_ones()).sum();
        if pages == 0 || pages != self.pages().count_ones() {
            return Err(WireError::BadValue { field: "page masks", value: self.pages() });
        }
        if self.kind == FrameKind::Same && self.zero | self.zstd != 0 {
            return Err(WireError::BadValue {
                field: "page masks (of a base)",
                value: self.zero | self.zstd,
            });
        }
        let max = u64::from(self.zstd.count_ones()) * PAGE_SIZE as u64;
        if u64::from(self.encoded_len) > max {
            return Err(WireError::TooLong { field: "encoded_len", len: self.encoded_len.into(), max });
        }
        if (self.encoded_len == 0) != (self.zstd == 0) {
            return Err(WireError::BadValue { field: "encoded_len", value: self.encoded_len.into() });
        }
        Ok(())
    }

    /// Checks `sealed`, which is header and seals, and reads the seals: those of the pages, and behind them the encoded section's, where
    /// there is one.
    pub fn check_seals(&self, sealed: &[u8], hasher: &PageHasher) -> Result<Vec<u64>, WireError> {
        let truncated = WireError::Truncated { field: "seals" };
        let (head, seals) = sealed.split_at_checked(Self::LEN).ok_or_else(|| truncated.clone())?;
        if seals.len() != self.seals_len() {
            return Err(truncated);
        }
        let expected = u64::from_le_bytes(*head.last_chunk().expect("a header ends with its checksum"));
        let found = seal_checksum(sealed, hasher);
        if expected != found {
            return Err(WireError::Checksum { what: "frame header", expected, found });
        }
        Ok(seals.as_chunks().0.iter().map(|seal| u64::from_le_bytes(*seal)).collect())
    }

    /// Checks the addresses against the archive's layout.
    pub fn check_layout(&self, layout: &Layout) -> Result<(), WireError> {
        if self.chunk >= layout.chunks() {
            return Err(WireError::BadValue { field: "chunk", value: self.chunk.into() });
        }
        match self.pages() & !layout.valid(self.chunk) {
            0 => Ok(()),
            beyond => Err(WireError::BadValue { field: "page masks (beyond the region)", value: beyond }),
        }
    }

    /// The page whose seal is number `seal`.
    pub fn page_of_seal(&self, seal: usize) -> Option<u32> {
        bits(self.pages()).nth(seal)
    }
}

/// Checksum of a header, without its own checksum, and seals.
fn seal_checksum(sealed: &[u8], hasher: &PageHasher) -> u64 {
    let mut covered = [0; FrameHeader::SEALED_MAX];
    let covered = &mut covered[..sealed.len()];
    covered.copy_from_slice(sealed);
    covered[40..FrameHeader::LEN].fill(0);
    hasher.checksum(covered)
}

/// Where a frame is, or a pad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Where it begins.
    pub offset: u64,
    /// Its pages; a pad has none.
    pub pages: u64,
    /// Their chunk; of a pad 0.
    pub chunk: u32,
    /// Its bytes.
    pub len: u32,
}

impl IndexEntry {
    /// Bytes in the index record.
    pub const LEN: usize = 24;

    /// Offsets: 0 offset, 8 pages, 16 chunk, 20 len.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::default();
        w.u64(self.offset);
        w.u64(self.pages);
        w.u32(self.chunk);
        w.u32(self.len);
        w.array()
    }

    /// Reads it; nothing is checked.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let word =
            |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("the entry has 24 bytes"));
        let last = word(16);
        Self { offset: word(0), pages: word(8), chunk: last as u32, len: (last >> 32) as u32 }
    }
}

/// The last record's payload: what the archive comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where the state record begins; 0 for none.
    pub state_at: u64,
    /// Where the index record begins.
    pub index_at: u64,
    /// Frames and pads.
    pub frames: u64,
    /// Distinct pages in them.
    pub pages: u64,
    /// Bytes of the whole archive.
    pub bytes: u64,
}

impl Footer {
    /// Bytes of its payload.
    pub const LEN: usize = 40;
    /// Bytes of its record, which is the archive's end.
    pub const RECORD_LEN: usize = Record::LEN + Self::LEN;

    /// Offsets: 0 state_at, 8 index_at, 16 frames, 24 pages, 32 bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::default();
        for word in [self.state_at, self.index_at, self.frames, self.pages, self.bytes] {
            w.u64(word);
        }
        w.array()
    }

    /// Reads it.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(payload);
        let footer = Self {
            state_at: r.u64("state_at")?,
            index_at: r.u64("index_at")?,
            frames: r.u64("frames")?,
            pages: r.u64("pages")?,
            bytes: r.u64("bytes")?,
        };
        r.end("footer")?;
        Ok(footer)
    }
}

/// The state record's payload.
pub fn encode_state_payload(state: &[StateBlob]) -> Vec<u8> {
    let mut w = Writer::default();
    encode_state(state, &mut w);
    w.into_vec()
}

/// Reads it.
pub fn decode_state_payload(payload: &[u8]) -> Result<Vec<StateBlob>, WireError> {
    let mut r = Reader::new(payload);
    let state = decode_state(&mut r)?;
    r.end("state")?;
    Ok(state)
}

/// The piece of state that says whether the guest ran when it was saved: one byte, 1 or 0.
pub const RUN_STATE: &str = "pageferry/run-state";

/// Whether a guest with this state runs once it is loaded; `None` where the state does not say, and cannot be loaded.
pub fn runs_once_loaded(state: &[StateBlob]) -> Option<bool> {
    let piece = state.iter().find(|piece| piece.name == RUN_STATE)?;
    match piece.bytes[..] {
        [ran @ 0..=1] => Some(ran == 1),
        _ => None,
    }
}

/// The guest's own pieces of state, and whether it ran.
pub fn split_state(mut state: Vec<StateBlob>) -> Option<(Vec<StateBlob>, bool)> {
    let runs = runs_once_loaded(&state)?;
    state.retain(|piece| piece.name != RUN_STATE);
    Some((state, runs))
}

/// Longest payload of a state record.
pub const STATE_MAX: u64 = STATE_LEN_MAX as u64;
