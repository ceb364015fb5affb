//! Reading archives: a file by its index, anything else from its beginning to its end.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pagecopy::backend::StateBlob;
use pagecopy::digest::{PageHasher, RunningChecksum};
use pagecopy::layout::Layout;

use super::error::{ArchiveError, Damage, Place};
use super::format::{
    FRAME_MAGIC, Footer, FrameHeader, FrameKind, HEADER_LEN_MAX, Header, INDEX_LEN_MAX, IndexEntry, MAGIC,
    PAD_HEAD, PAD_MAGIC, PAD_MAX, Record, RecordKind, STATE_MAX, VERSION, decode_state_payload, feature,
};
use super::frames::{FRAME_MAX, Opened, Opener};
use crate::local::zeroed;
use crate::wire::WireError;

/// Bytes of an index that are read at a time, where it is compared and not kept.
const PIECE: usize = 1 << 20;

/// What every archive begins with, as far as one has to have read it to read on.
pub struct Start {
    /// The header.
    pub header: Header,
    /// The guest's memory.
    pub layout: Layout,
    /// Of its digests and checksums.
    pub hasher: PageHasher,
    /// Where the first frame begins.
    pub end: u64,
}

/// A whole archive in a file, whose frames can be had in any order.
pub struct Archive {
    path: PathBuf,
    file: File,
    start: Start,
    footer: Footer,
    entries: Vec<IndexEntry>,
}

/// Reads magic and header record by `read`.
fn read_start(
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), ArchiveError>,
) -> Result<Start, ArchiveError> {
    let mut magic = [0; MAGIC.len()];
    read(0, &mut magic)?;
    if magic != MAGIC {
        return Err(ArchiveError::Foreign { found: magic.escape_ascii().to_string() });
    }
    let offset = MAGIC.len() as u64;
    let unseeded = PageHasher::new(0);
    let (record, payload) = read_record(offset, &unseeded, HEADER_LEN_MAX, &mut read)?;
    if record.kind != RecordKind::Header {
        let value = record.kind as u64;
        return Err(ArchiveError::damaged(offset, WireError::BadValue { field: "record kind", value }));
    }
    let header = Header::decode(&payload).map_err(|error| match error {
        WireError::BadValue { field: "version", value } if value > u64::from(VERSION) => {
            ArchiveError::Version { version: value as u16 }
        }
        WireError::BadValue { field: "features", value } if value & !feature::KNOWN != 0 => {
            ArchiveError::Features { features: value }
        }
        error => ArchiveError::damaged(offset, error),
    })?;
    let layout = Layout::new(header.regions.clone());
    let layout = layout.map_err(|error| ArchiveError::Guest { why: error.to_string() })?;
    let hasher = PageHasher::new(header.seed);
    Ok(Start { header, layout, hasher, end: offset + Record::LEN as u64 + record.len })
}

/// Reads a record with a payload of at most so many bytes.
fn read_record(
    offset: u64,
    hasher: &PageHasher,
    len_max: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), ArchiveError>,
) -> Result<(Record, Vec<u8>), ArchiveError> {
    let mut head = [0; Record::LEN];
    read(offset, &mut head)?;
    let wrong = |error: WireError| ArchiveError::damaged(offset, error);
    let record = Record::decode(&head, offset, hasher).map_err(wrong)?;
    let payload = read_payload(&record, hasher, len_max, read, |_| Ok(()))?;
    Ok((record, payload))
}

/// Reads a record's payload, in steps, so that no more memory is taken than there are bytes. `look` sees what has come after each: a hole
/// of a file is bytes, too, and whoever can tell earlier that it is no payload does not take memory for all of it.
fn read_payload(
    record: &Record,
    hasher: &PageHasher,
    len_max: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), ArchiveError>,
    mut look: impl FnMut(&[u8]) -> Result<(), ArchiveError>,
) -> Result<Vec<u8>, ArchiveError> {
    const STEP: u64 = 4 << 20;
    let wrong = |error: WireError| ArchiveError::damaged(record.offset, error);
    if record.len > len_max {
        return Err(wrong(WireError::TooLong { field: "record length", len: record.len, max: len_max }));
    }
    let mut payload = Vec::new();
    while (payload.len() as u64) < record.len {
        let (at, step) = (payload.len(), STEP.min(record.len - payload.len() as u64) as usize);
        payload.try_reserve_exact(step).map_err(|_| ArchiveError::Read {
            offset: record.offset,
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        payload.resize(at + step, 0);
        read(record.offset + (Record::LEN + at) as u64, &mut payload[at..])?;
        look(&payload)?;
    }
    record.check(&payload, hasher).map_err(wrong)?;
    Ok(payload)
}

/// Fills a buffer from a place in a file.
fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> Result<(), ArchiveError> {
    file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => {
            let offset = file.metadata().map_or(offset, |data| data.len());
            ArchiveError::Truncated { offset, what: "a record or frame" }
        }
        _ => ArchiveError::Read { offset, source },
    })
}

impl Archive {
    /// Opens one, and reads all but frames and state.
    ///
    /// # Errors
    /// When it is none, is not whole, or its header, index or footer is damaged.
    pub fn open(path: &Path) -> Result<Self, ArchiveError> {
        let fail = |source| ArchiveError::Open { path: path.into(), source };
        // Of a pipe this would wait for its other end, before it is known to be one.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(fail)?;
        let data = file.metadata().map_err(fail)?;
        if !data.is_file() {
            let text = "it is no regular file; read it as exec:'cat FILE', or fd:N";
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        let len = data.len();
        let start = read_start(|offset, buffer| read_at(&file, offset, buffer))?;
        let (footer, entries) = read_end(&file, &start, len)?;
        Ok(Self { path: path.into(), file, start, footer, entries })
    }

    /// Its path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.start.header
    }

    /// The guest's memory.
    pub fn layout(&self) -> &Layout {
        &self.start.layout
    }

    /// Of its digests.
    pub fn hasher(&self) -> &PageHasher {
        &self.start.hasher
    }

    /// What it comes to.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Its frames, in the order in which they lie.
    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }

    /// Of each frame, the pages that no later one has.
    pub fn newest(&self) -> Vec<u64> {
        let mut later = HashMap::new();
        let newest = self.entries.iter().rev().map(|entry| {
            let later = later.entry(entry.chunk).or_insert(0);
            let fresh = entry.pages & !*later;
            *later |= entry.pages;
            fresh
        });
        let mut newest: Vec<u64> = newest.collect();
        newest.reverse();
        newest
    }

    /// The device state; none where memory alone was saved.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn state(&self) -> Result<Vec<StateBlob>, ArchiveError> {
        let Footer { state_at, .. } = self.footer;
        if state_at == 0 {
            return Ok(Vec::new());
        }
        let read = |offset, buffer: &mut [u8]| read_at(&self.file, offset, buffer);
        let (record, payload) = read_record(state_at, &self.start.hasher, STATE_MAX, read)?;
        if record.kind != RecordKind::State || record.end() != Some(self.footer.index_at) {
            let what = "the state does not end where the index begins";
            return Err(ArchiveError::damaged(state_at, Damage::Index { what }));
        }
        decode_state_payload(&payload).map_err(|error| ArchiveError::damaged(state_at, error))
    }

    /// The error of pages of a frame that are damaged.
    pub fn damaged(&self, entry: &IndexEntry, source: Damage, pages: u64) -> ArchiveError {
        let place = Place::of(&self.start.layout, entry.chunk, pages);
        ArchiveError::Damaged { offset: entry.offset, place, source }
    }

    /// Checks a pad.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub fn check_pad(&self, entry: &IndexEntry, opener: &mut Opener) -> Result<(), ArchiveError> {
        let mut head = [0; PAD_HEAD];
        read_at(&self.file, entry.offset, &mut head)?;
        let read = |offset, buffer: &mut [u8]| read_at(&self.file, offset, buffer);
        if opener.pad(entry.offset, &head, read)? == entry.len as usize {
            return Ok(());
        }
        Err(ArchiveError::damaged(entry.offset, Damage::Index { what: "a pad is of another length" }))
    }

    /// Reads header and seals of a frame, and checks them.
    ///
    /// # Errors
    /// When they cannot be read, or are damaged.
    pub fn head(&self, entry: &IndexEntry) -> Result<(FrameHeader, Vec<u64>), ArchiveError> {
        let wrong = |error: WireError| ArchiveError::damaged(entry.offset, error);
        let mut bytes = [0; FrameHeader::SEALED_MAX];
        let bytes = &mut bytes[..FrameHeader::SEALED_MAX.min(entry.len as usize)];
        read_at(&self.file, entry.offset, bytes)?;
        let truncated = || wrong(WireError::Truncated { field: "frame header" });
        let header = FrameHeader::decode(bytes.first_chunk().ok_or_else(truncated)?).map_err(wrong)?;
        header.check_layout(&self.start.layout).map_err(wrong)?;
        let sealed = bytes.get(..FrameHeader::LEN + header.seals_len()).ok_or_else(truncated)?;
        let seals = header.check_seals(sealed, &self.start.hasher).map_err(wrong)?;
        check_entry(entry, &header)?;
        check_base(&self.start, &header, entry.offset)?;
        Ok((header, seals))
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// When it cannot be read, or its header is damaged. Pages that are damaged are told of in what is returned.
    pub fn read<'a>(&self, entry: &IndexEntry, opener: &'a mut Opener) -> Result<Opened<'a>, ArchiveError> {
        let Start { layout, hasher, .. } = &self.start;
        let limit = entry.offset + u64::from(entry.len);
        let opened = opener.open(entry.offset, &[], layout, hasher, |offset, buffer| {
            if offset + buffer.len() as u64 > limit {
                let what = "a frame is longer than it says";
                return Err(ArchiveError::damaged(entry.offset, Damage::Index { what }));
            }
            read_at(&self.file, offset, buffer)
        })?;
        check_entry(entry, &opened.header)?;
        check_base(&self.start, &opened.header, entry.offset)?;
        Ok(opened)
    }
}

/// Checks that a frame of pages that are as in the base has one.
fn check_base(start: &Start, header: &FrameHeader, offset: u64) -> Result<(), ArchiveError> {
    if header.kind == FrameKind::Same && start.header.base.is_none() {
        let value = header.kind as u64;
        let wrong = WireError::BadValue { field: "frame kind (without a base)", value };
        return Err(ArchiveError::damaged(offset, wrong));
    }
    Ok(())
}

/// Checks that a frame is the one that the index says.
fn check_entry(entry: &IndexEntry, header: &FrameHeader) -> Result<(), ArchiveError> {
    if (header.chunk, header.pages(), header.frame_len()) == (entry.chunk, entry.pages, entry.len as usize) {
        return Ok(());
    }
    let what = "a frame is of other pages";
    Err(ArchiveError::damaged(entry.offset, Damage::Index { what }))
}

/// Reads footer and index of a file of so many bytes.
fn read_end(file: &File, start: &Start, len: u64) -> Result<(Footer, Vec<IndexEntry>), ArchiveError> {
    let read = |offset, buffer: &mut [u8]| read_at(file, offset, buffer);
    let footer_at = len.checked_sub(Footer::RECORD_LEN as u64).filter(|&at| at >= start.end);
    let cut = || ArchiveError::Truncated { offset: len, what: "its frames" };
    let footer_at = footer_at.ok_or_else(cut)?;
    // What is cut off ends with anything, and so does what was appended to.
    let footer = read_record(footer_at, &start.hasher, Footer::LEN as u64, read);
    let (record, payload) = footer.map_err(|error| match error {
        ArchiveError::Damaged { source: Damage::Structure(WireError::BadMagic { .. }), .. } => {
            earlier_end(file, start, len).map_or_else(cut, |offset| ArchiveError::Trailing { offset })
        }
        error => error,
    })?;
    let wrong = |error: WireError| ArchiveError::damaged(footer_at, error);
    if record.kind != RecordKind::Footer {
        return Err(wrong(WireError::BadValue { field: "record kind", value: record.kind as u64 }));
    }
    let footer = Footer::decode(&payload).map_err(wrong)?;
    if footer.bytes != len {
        return Err(wrong(WireError::BadValue { field: "bytes", value: footer.bytes }));
    }
    let entries = read_index(file, start, &footer, len)?;
    let index_len = (entries.len() * IndexEntry::LEN + Record::LEN) as u64;
    if footer.index_at.checked_add(index_len) != Some(footer_at) {
        return Err(wrong(WireError::BadValue { field: "index_at", value: footer.index_at }));
    }
    Ok((footer, entries))
}

/// Reads the index of a file of so many bytes, and checks each entry as it comes: an index that is none takes no memory to speak of,
/// however long it says that it is.
fn read_index(
    file: &File,
    start: &Start,
    footer: &Footer,
    len: u64,
) -> Result<Vec<IndexEntry>, ArchiveError> {
    let offset = footer.index_at;
    let mut head = [0; Record::LEN];
    read_at(file, offset, &mut head)?;
    let record = Record::decode(&head, offset, &start.hasher);
    let record = record.map_err(|error| ArchiveError::damaged(offset, error))?;
    let whole = record.len.is_multiple_of(IndexEntry::LEN as u64);
    if record.kind != RecordKind::Index || !whole || record.len / IndexEntry::LEN as u64 != footer.frames {
        let what = "its length, or their number";
        return Err(ArchiveError::damaged(offset, Damage::Index { what }));
    }
    let (mut entries, mut checked) = (Vec::new(), Checked::new(start));
    let read = |offset, buffer: &mut [u8]| read_at(file, offset, buffer);
    read_payload(&record, &start.hasher, len.min(INDEX_LEN_MAX), read, |payload| {
        for bytes in &payload.as_chunks::<{ IndexEntry::LEN }>().0[entries.len()..] {
            let entry = IndexEntry::decode(bytes);
            let wrong = |what| ArchiveError::damaged(offset, Damage::Index { what });
            checked.add(&entry, &start.layout).map_err(wrong)?;
            entries.push(entry);
        }
        Ok(())
    })?;
    checked.finish(start, footer)?;
    Ok(entries)
}

/// Where an archive ends of which the file has so many bytes, and some of them behind its end; looked for among the last.
fn earlier_end(file: &File, start: &Start, len: u64) -> Option<u64> {
    const LOOKED_AT: u64 = 64 << 10;
    let first = len.saturating_sub(LOOKED_AT).max(start.end);
    let mut bytes = vec![0; (len - first) as usize];
    read_at(file, first, &mut bytes).ok()?;
    let footers = (first..).zip(bytes.windows(Record::LEN)).filter(|(offset, bytes)| {
        let record = bytes.first_chunk().map(|bytes| Record::decode(bytes, *offset, &start.hasher));
        record.is_some_and(|record| record.is_ok_and(|record| record.kind == RecordKind::Footer))
    });
    footers.last().map(|(offset, _)| offset + Footer::RECORD_LEN as u64).filter(|&end| end <= len)
}

/// An index, as far as it was looked at: frames lie one behind the other, with nothing between them, and are of the guest.
struct Checked {
    end: u64,
    frames: u64,
    /// By what came, and not by what the header says of the guest: it may say anything.
    carried: HashMap<u32, u64>,
}

impl Checked {
    fn new(start: &Start) -> Self {
        Self { end: start.end, frames: 0, carried: HashMap::new() }
    }

    /// The next entry; or why it cannot be.
    fn add(&mut self, entry: &IndexEntry, layout: &Layout) -> Result<(), &'static str> {
        let fits = match entry.pages {
            0 => (PAD_HEAD..=PAD_MAX).contains(&(entry.len as usize)),
            _ => (FrameHeader::LEN..=FRAME_MAX).contains(&(entry.len as usize)),
        };
        if entry.offset != self.end || !fits {
            return Err("frames do not lie one behind the other");
        }
        if entry.chunk >= layout.chunks() || entry.pages & !layout.valid(entry.chunk) != 0 {
            return Err("a frame is of pages that the guest has not");
        }
        if entry.pages != 0 {
            *self.carried.entry(entry.chunk).or_insert(0) |= entry.pages;
        }
        self.end += u64::from(entry.len);
        self.frames += 1;
        Ok(())
    }

    /// There are no more.
    fn finish(&self, start: &Start, footer: &Footer) -> Result<(), ArchiveError> {
        let Footer { pages, state_at, index_at, .. } = *footer;
        let behind = if state_at == 0 { index_at } else { state_at };
        let distinct: u64 = self.carried.values().map(|pages| u64::from(pages.count_ones())).sum();
        let what = if distinct != pages {
            "the number of their pages"
        } else if self.end != behind || (state_at != 0) != start.header.live {
            "something lies between frames and what follows them"
        } else {
            return Ok(());
        };
        Err(ArchiveError::damaged(index_at, Damage::Index { what }))
    }
}

/// Takes note of a frame or pad that came.
fn note(
    came: &mut Checked,
    index: &mut RunningChecksum,
    entry: &IndexEntry,
    layout: &Layout,
) -> Result<(), ArchiveError> {
    let wrong = |what| ArchiveError::damaged(entry.offset, Damage::Index { what });
    came.add(entry, layout).map_err(wrong)?;
    index.update(&entry.encode());
    Ok(())
}

/// Something of an archive that is read in order.
pub enum Item<'a> {
    /// A frame, and where it lies.
    Frame(u64, Opened<'a>),
    /// Device state.
    State(Vec<StateBlob>),
    /// The end: it was whole.
    End(Footer),
}

/// An archive that is read from its beginning to its end, from whatever gives bytes.
pub struct Sequence<R> {
    read: R,
    start: Start,
    /// Where what follows begins.
    at: u64,
    /// The frames and pads that came, and the checksum that their index must have. They are not kept: nobody knows how many will come.
    came: Checked,
    index: RunningChecksum,
    state_at: u64,
    index_at: u64,
}

impl<R: FnMut(u64, &mut [u8]) -> Result<(), ArchiveError>> Sequence<R> {
    /// Reads its header. `read` fills a buffer with what lies at an offset, which only grows.
    ///
    /// # Errors
    /// When it is no archive, or of a newer release.
    pub fn begin(mut read: R) -> Result<Self, ArchiveError> {
        let start = read_start(&mut read)?;
        let (at, came, index) = (start.end, Checked::new(&start), start.hasher.running_checksum());
        Ok(Self { read, start, at, came, index, state_at: 0, index_at: 0 })
    }

    /// What it begins with.
    pub fn start(&self) -> &Start {
        &self.start
    }

    /// Where it has been read to.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next. After [`Item::End`] nothing follows.
    ///
    /// # Errors
    /// When it is cut off or damaged. Of a frame's pages that are damaged the frame tells.
    pub fn next<'a>(&mut self, opener: &'a mut Opener) -> Result<Item<'a>, ArchiveError> {
        let mut magic = [0; 4];
        (self.read)(self.at, &mut magic)?;
        while u32::from_le_bytes(magic) == PAD_MAGIC && self.state_at == 0 && self.index_at == 0 {
            self.pass_pad(opener)?;
            (self.read)(self.at, &mut magic)?;
        }
        let offset = self.at;
        if u32::from_le_bytes(magic) == FRAME_MAGIC && self.state_at == 0 && self.index_at == 0 {
            let Start { layout, hasher, .. } = &self.start;
            let opened = opener.open(offset, &magic, layout, hasher, &mut self.read)?;
            let header = &opened.header;
            check_base(&self.start, header, offset)?;
            let len = header.frame_len() as u32;
            let entry = IndexEntry { offset, pages: header.pages(), chunk: header.chunk, len };
            note(&mut self.came, &mut self.index, &entry, layout)?;
            self.at += u64::from(len);
            return Ok(Item::Frame(offset, opened));
        }
        self.record(offset, magic)
    }

    /// Reads a pad behind its magic.
    fn pass_pad(&mut self, opener: &mut Opener) -> Result<(), ArchiveError> {
        let offset = self.at;
        let mut head = [0; PAD_HEAD];
        head[..4].copy_from_slice(&PAD_MAGIC.to_le_bytes());
        (self.read)(offset + 4, &mut head[4..])?;
        let len = opener.pad(offset, &head, &mut self.read)?;
        let entry = IndexEntry { offset, pages: 0, chunk: 0, len: len as u32 };
        note(&mut self.came, &mut self.index, &entry, &self.start.layout)?;
        self.at += len as u64;
        Ok(())
    }

    fn record(&mut self, offset: u64, magic: [u8; 4]) -> Result<Item<'static>, ArchiveError> {
        let wrong = |error: WireError| ArchiveError::damaged(offset, error);
        let mut head = [0; Record::LEN];
        head[..magic.len()].copy_from_slice(&magic);
        (self.read)(offset + magic.len() as u64, &mut head[magic.len()..])?;
        let record = Record::decode(&head, offset, &self.start.hasher).map_err(wrong)?;
        let unexpected = WireError::BadValue { field: "record kind (here)", value: record.kind as u64 };
        let len_max = match record.kind {
            RecordKind::State if self.state_at == 0 && self.index_at == 0 => STATE_MAX,
            RecordKind::Index if self.index_at == 0 => return self.pass_index(&record),
            RecordKind::Footer if self.index_at != 0 => Footer::LEN as u64,
            _ => return Err(wrong(unexpected)),
        };
        let payload = read_payload(&record, &self.start.hasher, len_max, &mut self.read, |_| Ok(()))?;
        self.at = offset + (Record::LEN + payload.len()) as u64;
        match record.kind {
            RecordKind::State => {
                self.state_at = offset;
                Ok(Item::State(decode_state_payload(&payload).map_err(wrong)?))
            }
            _ => {
                let footer = Footer::decode(&payload).map_err(wrong)?;
                let Self { state_at, index_at, at: bytes, .. } = *self;
                let expected = Footer { state_at, index_at, bytes, frames: self.came.frames, ..footer };
                if footer != expected {
                    let what = "the footer is of another";
                    return Err(ArchiveError::damaged(offset, Damage::Index { what }));
                }
                self.came.finish(&self.start, &footer)?;
                Ok(Item::End(footer))
            }
        }
    }

    /// Reads the index: it is of the frames that came.
    fn pass_index(&mut self, record: &Record) -> Result<Item<'static>, ArchiveError> {
        let offset = record.offset;
        let other = || {
            let what = "it is not of the frames that came";
            Err(ArchiveError::damaged(offset, Damage::Index { what }))
        };
        let expected = self.index.digest();
        if record.payload != expected || record.len != self.came.frames * IndexEntry::LEN as u64 {
            return other();
        }
        let mut found = self.start.hasher.running_checksum();
        let (mut at, mut left) = (offset + Record::LEN as u64, record.len);
        let mut piece =
            zeroed::<u8>(PIECE.min(left as usize)).map_err(|source| ArchiveError::Read { offset, source })?;
        while left != 0 {
            let piece = &mut piece[..PIECE.min(left as usize)];
            (self.read)(at, piece)?;
            found.update(piece);
            (at, left) = (at + piece.len() as u64, left - piece.len() as u64);
        }
        if found.digest() != expected {
            return other();
        }
        (self.index_at, self.at) = (offset, at);
        self.next_record()
    }

    fn next_record(&mut self) -> Result<Item<'static>, ArchiveError> {
        let (offset, mut magic) = (self.at, [0; 4]);
        (self.read)(offset, &mut magic)?;
        self.record(offset, magic)
    }
}
