//! Archives that are built by hand, structure by structure: whatever no save writes can be one.

use std::path::{Path, PathBuf};

use pageferry::CodecMode;
use pageferry::archive::format::{
    self, Base, Footer, FrameHeader, FrameKind, Header, IndexEntry, MAGIC, Record, RecordKind, VERSION,
    feature,
};
use pageferry::backend::StateBlob;
use pageferry::layout::{CHUNK_SIZE, PAGE_SIZE, Region};
use pageferry::pagecopy::bitmap::bits;
use pageferry::pagecopy::chunk::{ChunkEncoder, Clocks};
use pageferry::pagecopy::digest::{PageHasher, receipt};
use testkit::Rng;
use vm_memory::volatile_memory::VolatileSlice;

/// A page's content.
pub(crate) type Page = [u8; PAGE_SIZE];

/// A page that no codec shrinks; the same for the same number.
pub(crate) fn noise(number: u64) -> Page {
    Rng::new(number).bytes(PAGE_SIZE).try_into().unwrap()
}

/// A page that shrinks; another for each number.
pub(crate) fn text(number: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    for (at, byte) in page.iter_mut().enumerate() {
        *byte = b"the quick brown fox jumps over the lazy dog "[at % 44] ^ ((at / 44) % 7) as u8;
    }
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

pub(crate) const ZERO: Page = [0; PAGE_SIZE];

/// A piece of state.
pub(crate) fn piece(name: &str, version: u32, bytes: &[u8]) -> StateBlob {
    StateBlob { name: name.into(), version, bytes: bytes.into() }
}

/// What says whether a guest ran.
pub(crate) fn ran(ran: u8) -> StateBlob {
    piece(format::RUN_STATE, 1, &[ran])
}

/// An archive that is being built.
pub(crate) struct Hand {
    pub(crate) header: Header,
    bytes: Vec<u8>,
    entries: Vec<IndexEntry>,
}

impl Hand {
    /// Of a guest with this memory, or of memory alone.
    pub(crate) fn new(id: u8, live: bool, regions: &[Region]) -> Self {
        let header = Header {
            version: VERSION,
            features: feature::ZSTD,
            id: [id; 16],
            seed: u64::from(id) * 0x0123_4567_89ab_cdef,
            created: 1_700_000_000,
            live,
            data_bytes: 0,
            regions: regions.to_vec(),
            machine: "a machine".into(),
            base: None,
        };
        Self { header, bytes: Vec::new(), entries: Vec::new() }
    }

    /// On top of another.
    pub(crate) fn on(mut self, id: u8, name: &str) -> Self {
        self.header.features |= feature::BASE;
        self.header.base = Some(Base { id: [id; 16], name: name.into() });
        self
    }

    fn hasher(&self) -> PageHasher {
        PageHasher::new(self.header.seed)
    }

    /// Begins, if it has not.
    fn begin(&mut self) {
        if self.bytes.is_empty() {
            self.bytes.extend_from_slice(&MAGIC);
            self.record(RecordKind::Header, &self.header.encode(), &PageHasher::new(0));
        }
    }

    fn record(&mut self, kind: RecordKind, payload: &[u8], hasher: &PageHasher) -> u64 {
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(&Record::of(kind, offset, payload, hasher).encode(hasher));
        self.bytes.extend_from_slice(payload);
        offset
    }

    fn entry(&mut self, offset: usize, chunk: u32, pages: u64) {
        let len = (self.bytes.len() - offset) as u32;
        self.entries.push(IndexEntry { offset: offset as u64, pages, chunk, len });
    }

    /// A frame of these pages of a chunk, those that shrink compressed.
    pub(crate) fn frame(&mut self, chunk: u32, pages: &[(u32, Page)]) -> &mut Self {
        self.begin();
        let hasher = self.hasher();
        let mut memory = vec![0; CHUNK_SIZE];
        let mut mask = 0u64;
        for (bit, page) in pages {
            memory[*bit as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(page);
            mask |= 1 << bit;
        }
        let clock = || 0;
        let clocks = Clocks { now: clock, worked: clock };
        let mut encoder = ChunkEncoder::new(CodecMode::Zstd { level: Some(1) }, clocks).each_once();
        let (plan, mut snapshot) = (encoder.plan(chunk, 0), memory.clone());
        let slice = VolatileSlice::from(&mut memory[..]);
        let encoded = encoder.encode_alone(plan, &hasher, &slice, &mut snapshot, mask);
        let header = FrameHeader {
            kind: FrameKind::Pages,
            chunk,
            encoded_len: encoded.encoded.len() as u32,
            raw: encoded.raw,
            zero: encoded.zero,
            zstd: encoded.zstd,
        };
        let seals = bits(mask).map(|bit| receipt(encoded.digests[bit as usize]));
        let section = (header.encoded_len != 0).then(|| hasher.checksum(encoded.encoded));
        let offset = self.bytes.len();
        header.encode(seals.chain(section), &hasher, &mut self.bytes);
        self.bytes.extend_from_slice(encoded.encoded);
        for bit in bits(encoded.raw) {
            self.bytes.extend_from_slice(&snapshot[bit as usize * PAGE_SIZE..][..PAGE_SIZE]);
        }
        self.entry(offset, chunk, mask);
        self
    }

    /// A frame of pages that the base has, with what they are to be there.
    pub(crate) fn same(&mut self, chunk: u32, pages: &[(u32, Page)]) -> &mut Self {
        self.begin();
        let hasher = self.hasher();
        let raw = pages.iter().fold(0, |mask, (bit, _)| mask | 1u64 << bit);
        let header = FrameHeader { kind: FrameKind::Same, chunk, encoded_len: 0, raw, zero: 0, zstd: 0 };
        let offset = self.bytes.len();
        let seals = pages.iter().map(|(_, page)| receipt(hasher.page(page)));
        header.encode(seals, &hasher, &mut self.bytes);
        self.entry(offset, chunk, raw);
        self
    }

    /// A pad up to the next page of the file.
    pub(crate) fn pad(&mut self) -> &mut Self {
        self.begin();
        let offset = self.bytes.len();
        format::pad(&mut self.bytes);
        self.entry(offset, 0, 0);
        self
    }

    /// The bytes of the whole, with this state.
    pub(crate) fn finish(&mut self, state: &[StateBlob]) -> Vec<u8> {
        self.begin();
        let hasher = self.hasher();
        let state_at = match self.header.live {
            true => self.record(RecordKind::State, &format::encode_state_payload(state), &hasher),
            false => 0,
        };
        let index: Vec<u8> = self.entries.iter().flat_map(IndexEntry::encode).collect();
        let index_at = self.record(RecordKind::Index, &index, &hasher);
        let mut held = std::collections::HashMap::new();
        self.entries.iter().for_each(|entry| *held.entry(entry.chunk).or_insert(0) |= entry.pages);
        let footer = Footer {
            state_at,
            index_at,
            frames: self.entries.len() as u64,
            pages: held.values().map(|pages: &u64| u64::from(pages.count_ones())).sum(),
            bytes: (self.bytes.len() + Footer::RECORD_LEN) as u64,
        };
        self.record(RecordKind::Footer, &footer.encode(), &hasher);
        std::mem::take(&mut self.bytes)
    }

    /// The same in a file of this folder.
    pub(crate) fn write(&mut self, folder: &Path, name: &str, state: &[StateBlob]) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, self.finish(state)).unwrap();
        path
    }

    /// Where frame or pad number `at` begins, and its bytes; before [`Self::finish`] or after.
    pub(crate) fn place(&self, at: usize) -> (usize, usize) {
        (self.entries[at].offset as usize, self.entries[at].len as usize)
    }
}
