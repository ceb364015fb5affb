//! The codec of one chunk: which pages travel how, and the encoded section that carries them.
//!
//! Five masks say how each page that is to be sent travels; they are disjoint, and bit `i` is page `i` of the chunk:
//!
//! | mask | travels as |
//! |---|---|
//! | `zero` | nothing: the page is all zeros |
//! | `unchanged` | not at all: the same content was the last one sent for it |
//! | `delta` | XBZRLE against the content last sent, or against zeros if that was last sent ([`crate::xbzrle`]) |
//! | `zstd` | in one zstd frame with the chunk's other such pages |
//! | `raw` | 4096 bytes, after the encoded section |
//!
//! # The encoded section
//!
//! ```text
//! for every bit of `delta`, ascending:
//!     u16, little-endian        length of the delta, 1..=2730
//!     that many bytes           XBZRLE
//! if `zstd` is not 0:
//!     the rest of the section   one zstd frame that says the size of its content, 4096 * (bits of `zstd`):
//!                               the pages, ascending, one after the other
//! ```
//!
//! The section ends where these end, and is never longer than the pages it stands for. Its length, the masks, its
//! checksum and the raw pages belong to the frame around it.

use vm_memory::volatile_memory::VolatileSlice;

use crate::bitmap::{bits, runs};
use crate::cache::{CachedChunk, PageCache};
use crate::choose::{Chooser, CodecMode, DELTA_BYTES_MAX, EncodeKind, Plan};
use crate::compress::{Compress, Decompress, DecompressError, looks_compressible};
use crate::digest::{PageDigest, PageHasher};
use crate::layout::{CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE};
use crate::table::DigestTable;
use crate::xbzrle::{self, DeltaError, Encoded, Page};
use crate::zero::zero_pages;

/// Bytes of a delta's length in the section.
const LENGTH_BYTES: usize = 2;
/// Most pages that a trial of another level compresses.
const PROBE_PAGES: usize = 4;
/// A zstd frame is used when it takes at most this much of the pages' bytes, in percent.
const FRAME_PERCENT_MAX: usize = 90;
const ZERO_PAGE: Page = [0; PAGE_SIZE];

// What a section can take: each page stands for at most FRAME_PERCENT_MAX of its bytes in a frame or for one delta.
const _: () = assert!(LENGTH_BYTES + DELTA_BYTES_MAX <= PAGE_SIZE * FRAME_PERCENT_MAX / 100);

/// What all stream workers of a source share.
#[derive(Debug)]
pub struct Shared {
    /// Hashes pages under the session's secret.
    pub hasher: PageHasher,
    /// What was last sent for each page.
    pub table: DigestTable,
    /// Content last sent, as delta bases.
    pub cache: PageCache,
}

impl Shared {
    /// For a layout of `chunks` chunks, with at most `cache_bytes` of memory for delta bases.
    pub fn new(hasher: PageHasher, chunks: u32, cache_bytes: u64) -> Self {
        let table = DigestTable::new(chunks, hasher.zero());
        Self { hasher, table, cache: PageCache::new(cache_bytes) }
    }

    /// Forgets what the destination holds for these pages: they are sent whole the next time.
    ///
    /// Due for every page of a frame that was not acknowledged when its stream died, and for every page whose receipt
    /// does not match what was meant, *also* when the page was dirtied since: otherwise a page that returns to its
    /// former content would count as unchanged. The chunk must belong to the caller, as for encoding.
    pub fn void(&self, chunk: u32, pages: u64) {
        self.table.void(chunk, pages);
        self.cache.void(chunk, pages);
    }
}

/// A chunk, encoded. The masks are disjoint, and together they are the pages that were asked for.
#[derive(Clone, Copy, Debug)]
pub struct EncodedChunk<'a> {
    /// Pages of zeros.
    pub zero: u64,
    /// Pages whose content is the one last sent.
    pub unchanged: u64,
    /// Pages sent as deltas.
    pub delta: u64,
    /// Pages in the zstd frame.
    pub zstd: u64,
    /// Pages that the caller writes after the section, from its snapshot or from where they were looked at.
    pub raw: u64,
    /// The encoded section.
    pub encoded: &'a [u8],
    /// Digest of every page that was asked for, by bit; others are undefined.
    pub digests: &'a [PageDigest; CHUNK_PAGES],
}

/// Encodes chunks; one a stream worker, with its contexts, its scratch and its [`Chooser`].
#[derive(Debug)]
pub struct ChunkEncoder {
    chooser: Chooser,
    compress: Compress,
    /// A monotonic clock in nanoseconds, which only the chooser's measurements use.
    clock: fn() -> u64,
    section: Box<[u8]>,
    /// Pages that lie apart, brought together for the compressor.
    gathered: Box<[u8]>,
    digests: [PageDigest; CHUNK_PAGES],
}

impl ChunkEncoder {
    /// An encoder. `clock` gives nanoseconds from any start, never going back; it decides only between codecs.
    pub fn new(mode: CodecMode, clock: fn() -> u64) -> Self {
        Self {
            chooser: Chooser::new(mode),
            compress: Compress::new(),
            clock,
            section: vec![0; CHUNK_SIZE].into_boxed_slice(),
            gathered: vec![0; CHUNK_SIZE].into_boxed_slice(),
            digests: [0; CHUNK_PAGES],
        }
    }

    /// For memory that nobody writes; see [`Chooser::each_once`].
    pub fn each_once(self) -> Self {
        Self { chooser: self.chooser.each_once(), ..self }
    }

    /// For one of several workers; see [`Chooser::sharing`].
    pub fn sharing(self, workers: u32, cores: u32) -> Self {
        Self { chooser: self.chooser.sharing(workers, cores), ..self }
    }

    /// What chooses the codec.
    pub fn chooser(&self) -> &Chooser {
        &self.chooser
    }

    /// Notes that writing `wire_bytes` kept the worker waiting for `nanos`; see [`Chooser::observe_link`].
    pub fn observe_link(&mut self, wire_bytes: u64, nanos: u64) {
        self.chooser.observe_link(wire_bytes, nanos);
    }

    /// Encodes `pages` of a chunk from a stable copy of it, in which page `i` lies at `i * PAGE_SIZE` (it may end after
    /// the last page of `pages`), and notes them as sent: what then does not arrive is [`Shared::void`]ed by the caller.
    /// The chunk must belong to this worker. `first_pass`: the pages were not sent before in this migration.
    ///
    /// # Panics
    /// When a page lies beyond the end of `snapshot`, or the chunk beyond the layout of `shared`.
    pub fn encode(
        &mut self,
        shared: &Shared,
        chunk: u32,
        snapshot: &[u8],
        pages: u64,
        first_pass: bool,
    ) -> EncodedChunk<'_> {
        let plan = self.plan(chunk);
        self.encode_as(plan, shared, chunk, snapshot, pages, first_pass)
    }

    /// How to encode the next chunk, which is this one; for [`encode_as`](Self::encode_as) or [`survey`](Self::survey).
    pub fn plan(&mut self, chunk: u32) -> Plan {
        self.chooser.plan(chunk)
    }

    /// [`encode`](Self::encode) by a plan that was made for this chunk.
    pub fn encode_as(
        &mut self,
        plan: Plan,
        shared: &Shared,
        chunk: u32,
        snapshot: &[u8],
        pages: u64,
        first_pass: bool,
    ) -> EncodedChunk<'_> {
        let snapshot = snapshot.as_chunks::<PAGE_SIZE>().0;
        let start = (self.clock)();
        let (zero, unchanged) = self.scan(shared, chunk, snapshot, pages);
        let rest = pages & !zero & !unchanged;
        let bytes = |pages: u64| u64::from(pages.count_ones()) * PAGE_SIZE as u64;
        let scanned = (self.clock)();
        self.observe(EncodeKind::Scan, bytes(pages), bytes(rest), start, scanned);

        let (delta, deltas_end) = self.deltas(shared, chunk, snapshot, zero, rest, plan, first_pass);
        if !first_pass && plan.delta {
            let out = bytes(rest & !delta) + deltas_end as u64;
            self.observe(EncodeKind::Delta { chunk }, bytes(rest), out, scanned, (self.clock)());
        }
        let (zstd, end) = self.frame(snapshot, rest & !delta, plan, deltas_end);

        shared.table.set_zeros(chunk, zero);
        shared.table.set_pages(chunk, rest, &self.digests);
        EncodedChunk {
            zero,
            unchanged,
            delta,
            zstd,
            raw: rest & !delta & !zstd,
            encoded: &self.section[..end],
            digests: &self.digests,
        }
    }

    /// Looks at `pages` of a chunk where they lie, by a plan that [is in place](Plan::in_place): each is read once, from
    /// `memory`, which is the chunk's. Those that are neither zero nor unchanged are `raw`, and the caller sends them from
    /// there. The guest may write meanwhile: then what is sent is newer than its digest, whose receipt will tell, and the page
    /// is dirty anyway.
    ///
    /// # Panics
    /// When a page lies beyond the end of `memory`, or the chunk beyond the layout of `shared`.
    pub fn survey(
        &mut self,
        shared: &Shared,
        chunk: u32,
        memory: &VolatileSlice<'_>,
        pages: u64,
    ) -> EncodedChunk<'_> {
        let start = (self.clock)();
        let mut zero = 0;
        for bit in bits(pages) {
            let page = memory.subslice(bit as usize * PAGE_SIZE, PAGE_SIZE);
            let digest = shared.hasher.memory(&page.expect("the page lies in the chunk's memory"));
            self.digests[bit as usize] = digest;
            zero |= u64::from(digest == shared.hasher.zero()) << bit;
        }
        let (zero, unchanged) = self.known(shared, chunk, pages, zero);
        let raw = pages & !zero & !unchanged;
        let bytes = |pages: u64| u64::from(pages.count_ones()) * PAGE_SIZE as u64;
        self.observe(EncodeKind::Scan, bytes(pages), bytes(raw), start, (self.clock)());
        shared.table.set_zeros(chunk, zero);
        shared.table.set_pages(chunk, raw, &self.digests);
        EncodedChunk { zero, unchanged, delta: 0, zstd: 0, raw, encoded: &[], digests: &self.digests }
    }

    /// Hashes the pages; returns those that are zero and must be said to be, and those that are as last sent.
    fn scan(&mut self, shared: &Shared, chunk: u32, snapshot: &[Page], pages: u64) -> (u64, u64) {
        let zero = zero_pages(snapshot.as_flattened(), pages);
        for bit in bits(zero) {
            self.digests[bit as usize] = shared.hasher.zero();
        }
        for bit in bits(pages & !zero) {
            self.digests[bit as usize] = shared.hasher.page(&snapshot[bit as usize]);
        }
        self.known(shared, chunk, pages, zero)
    }

    /// Of hashed pages, those that are zero and must be said to be, and those that are as last sent.
    fn known(&self, shared: &Shared, chunk: u32, pages: u64, zero: u64) -> (u64, u64) {
        let known = shared.table.known(chunk);
        let mut unchanged = zero & shared.table.zeros(chunk);
        for bit in bits(pages & !zero & known) {
            if shared.table.get(chunk, bit) == Some(self.digests[bit as usize]) {
                unchanged |= 1 << bit;
            }
        }
        (zero & !unchanged, unchanged)
    }

    /// Writes deltas to the section's start, and brings the cache to what is sent; returns the pages that got one, and
    /// where the deltas end.
    #[allow(clippy::too_many_arguments)]
    fn deltas(
        &mut self,
        shared: &Shared,
        chunk: u32,
        snapshot: &[Page],
        zero: u64,
        rest: u64,
        plan: Plan,
        first_pass: bool,
    ) -> (u64, usize) {
        let mut cached = shared.cache.chunk(chunk);
        cached.remove(zero);
        if !plan.delta {
            cached.remove(rest);
            return (0, 0);
        }
        let known = shared.table.known(chunk);
        let zeros = shared.table.zeros(chunk);
        let (mut delta, mut end) = (0, 0);
        for bit in bits(rest) {
            let page = &snapshot[bit as usize];
            // A base counts only where the table vouches that its content was sent.
            if known >> bit & 1 != 0
                && let Some(length) = delta_of(&cached, zeros, bit, page, &mut self.section[end..], plan)
            {
                delta |= 1 << bit;
                end += length;
            }
            if first_pass && !plan.fill {
                cached.remove(1 << bit);
            } else {
                cached.store(bit, page, first_pass);
            }
        }
        (delta, end)
    }

    /// Writes the zstd frame at `start` of the section if it pays; returns its pages, and where the section ends.
    fn frame(&mut self, snapshot: &[Page], rest: u64, plan: Plan, start: usize) -> (u64, usize) {
        if plan.zstd_level.is_none() && plan.probe.is_none() {
            return (0, start);
        }
        let begin = (self.clock)();
        let likely = bits(rest)
            .filter(|&bit| looks_compressible(&snapshot[bit as usize]))
            .fold(0, |pages, bit| pages | 1u64 << bit);
        let guessed = (self.clock)();
        self.observe(EncodeKind::Scan, 0, 0, begin, guessed);
        if likely == 0 {
            return (0, start);
        }
        if let Some(level) = plan.probe {
            let few = bits(likely).take(PROBE_PAGES).fold(0, |pages, bit| pages | 1u64 << bit);
            self.squeeze(snapshot, few, level, start, EncodeKind::Probe { level });
        }
        let Some(level) = plan.zstd_level else { return (0, start) };
        match self.squeeze(snapshot, likely, level, start, EncodeKind::Zstd { level }) {
            Some(length) => (likely, start + length),
            None => (0, start),
        }
    }

    /// Compresses pages to the section from `start`, with the time taken; `None` where it does not pay.
    fn squeeze(
        &mut self,
        snapshot: &[Page],
        pages: u64,
        level: i32,
        start: usize,
        kind: EncodeKind,
    ) -> Option<usize> {
        let begin = (self.clock)();
        let bytes = pages.count_ones() as usize * PAGE_SIZE;
        let most = bytes * FRAME_PERCENT_MAX / 100;
        let source = together(snapshot, pages, &mut self.gathered);
        let length = self.compress.compress(level, source, &mut self.section[start..start + most]);
        let out = length.unwrap_or(bytes);
        self.observe(kind, bytes as u64, out as u64, begin, (self.clock)());
        length
    }

    fn observe(&mut self, kind: EncodeKind, bytes_in: u64, bytes_out: u64, from: u64, to: u64) {
        self.chooser.observe_encode(kind, bytes_in, bytes_out, to.saturating_sub(from));
    }
}

/// Writes the delta of one page, with its length before it; returns the length of both, or `None` without a base or
/// where the delta would be too long.
fn delta_of(
    cached: &CachedChunk<'_>,
    zeros: u64,
    bit: u32,
    page: &Page,
    section: &mut [u8],
    plan: Plan,
) -> Option<usize> {
    let base = if zeros >> bit & 1 != 0 { &ZERO_PAGE } else { cached.base(bit)? };
    let (length, delta) = section.split_at_mut(LENGTH_BYTES);
    match xbzrle::encode(base, page, &mut delta[..plan.delta_bytes_max]) {
        Encoded::Len(bytes) => {
            length.copy_from_slice(&(bytes as u16).to_le_bytes());
            Some(LENGTH_BYTES + bytes)
        }
        // Unchanged: a page that equals its base has the base's digest, and was not sent here. It goes whole.
        Encoded::Unchanged | Encoded::Overflow => None,
    }
}

/// The pages as one slice: where they lie, if they lie together, or copied together.
fn together<'a>(snapshot: &'a [Page], pages: u64, gathered: &'a mut [u8]) -> &'a [u8] {
    let mut end = 0;
    for (first, length) in runs(pages) {
        let run = snapshot[first as usize..(first + length) as usize].as_flattened();
        if length == pages.count_ones() {
            return run;
        }
        gathered[end..end + run.len()].copy_from_slice(run);
        end += run.len();
    }
    &gathered[..end]
}

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
    /// Pages decoded from the frame, one after the other.
    frame: Box<[Page]>,
}

impl Default for ChunkDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl ChunkDecoder {
    /// A decoder.
    pub fn new() -> Self {
        let scratch = || vec![ZERO_PAGE; CHUNK_PAGES].into_boxed_slice();
        Self { decompress: Decompress::new(), deltas: scratch(), frame: scratch() }
    }

    /// Decodes a section that announces pages `delta` and `zstd`, whole, before anything of it is to be used. `base`
    /// fills in what the destination holds for the page of a bit; it is asked once for each bit of `delta` up to the
    /// first that is malformed.
    pub fn decode(
        &mut self,
        delta: u64,
        zstd: u64,
        encoded: &[u8],
        mut base: impl FnMut(u32, &mut Page),
    ) -> Result<Decoded<'_>, DecodeError> {
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
        if zstd != 0 {
            let pages = &mut self.frame[..zstd.count_ones() as usize];
            self.decompress
                .decompress(rest, pages.as_flattened_mut())
                .map_err(|source| DecodeError::Frame { pages: zstd, source })?;
        } else if !rest.is_empty() {
            return Err(DecodeError::Trailing { bytes: rest.len() });
        }
        Ok(Decoded { delta, zstd, deltas: &self.deltas, frame: &self.frame })
    }
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

    /// All pages that the section held, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &'a Page)> + use<'a> {
        let decoded = *self;
        bits(self.pages()).filter_map(move |bit| Some((bit, decoded.page(bit)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock() -> u64 {
        0
    }

    fn shared() -> Shared {
        Shared::new(PageHasher::new(9), 4, 8 << 20)
    }

    /// Page 0 zeros, 1 text, 2 random, 3 text.
    fn snapshot() -> Vec<u8> {
        let mut bytes = vec![0; CHUNK_SIZE];
        let text = include_bytes!("chunk.rs");
        bytes[PAGE_SIZE..2 * PAGE_SIZE].copy_from_slice(&text[..PAGE_SIZE]);
        bytes[3 * PAGE_SIZE..4 * PAGE_SIZE].copy_from_slice(&text[PAGE_SIZE..2 * PAGE_SIZE]);
        let mut state = 1u64;
        for byte in &mut bytes[2 * PAGE_SIZE..3 * PAGE_SIZE] {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
        bytes
    }

    #[test]
    fn a_survey_finds_what_encoding_finds() {
        let (a, b) = (shared(), shared());
        let mut bytes = snapshot();
        let mut encoder = ChunkEncoder::new(CodecMode::Raw, clock);
        let plan = encoder.plan(1);
        assert!(plan.in_place(true) && !plan.in_place(false));
        let encoded = encoder.encode_as(plan, &a, 1, &bytes, 0b1110, true);
        let (masks, digests) = ((encoded.zero, encoded.raw, encoded.unchanged), *encoded.digests);
        let memory = VolatileSlice::from(&mut bytes[..]);
        let surveyed = encoder.survey(&b, 1, &memory, 0b1110);
        assert_eq!((surveyed.zero, surveyed.raw, surveyed.unchanged), masks);
        assert_eq!(surveyed.digests[1..4], digests[1..4]);
        // What it found counts as sent.
        let again = encoder.survey(&b, 1, &memory, 0b1111);
        assert_eq!((again.zero, again.raw, again.unchanged), (1, 0, 0b1110));
        assert!(again.encoded.is_empty());
    }

    #[test]
    fn every_page_goes_its_way() {
        let shared = shared();
        let mut encoder = ChunkEncoder::new(CodecMode::Zstd { level: Some(1) }, clock);
        let mut bytes = snapshot();
        let first = encoder.encode(&shared, 1, &bytes, 0b1111, true);
        assert_eq!((first.zero, first.unchanged, first.delta), (1, 0, 0));
        assert_eq!((first.zstd, first.raw), (0b1010, 0b100));
        assert_eq!(first.digests[2], shared.hasher.page(&bytes.as_chunks().0[2]));
        let mut decoder = ChunkDecoder::new();
        let decoded = decoder.decode(0, first.zstd, first.encoded, |_, _| unreachable!()).unwrap();
        assert_eq!(decoded.page(3).unwrap()[..], bytes[3 * PAGE_SIZE..4 * PAGE_SIZE]);
        assert_eq!(decoded.page(2), None);

        // All as last sent, also the zeros; then only what changed.
        let second = encoder.encode(&shared, 1, &bytes, 0b1111, false);
        assert_eq!((second.unchanged, second.encoded.len()), (0b1111, 0));
        bytes[0] = 1;
        bytes[3 * PAGE_SIZE..4 * PAGE_SIZE].fill(0);
        let third = encoder.encode(&shared, 1, &bytes, 0b1111, false);
        assert_eq!((third.zero, third.unchanged, third.zstd), (0b1000, 0b0110, 1));
        // Void pages are sent again whatever they hold.
        shared.void(1, 0b1100);
        let fourth = encoder.encode(&shared, 1, &bytes, 0b1111, false);
        assert_eq!((fourth.zero, fourth.unchanged, fourth.raw), (0b1000, 0b0011, 0b100));
    }

    #[test]
    fn a_delta_is_literal_and_needs_a_base_that_was_sent() {
        let shared = shared();
        let mut encoder = ChunkEncoder::new(CodecMode::Delta, clock);
        let mut bytes = snapshot();
        encoder.encode(&shared, 0, &bytes, 0b101, true);
        bytes[2] = 7;
        bytes[2 * PAGE_SIZE + 300] ^= 1;
        let changed = bytes[2 * PAGE_SIZE + 300];
        let second = encoder.encode(&shared, 0, &bytes, 0b101, false);
        assert_eq!((second.delta, second.raw), (0b101, 0));
        assert_eq!(second.encoded, [3, 0, 2, 1, 7, 4, 0, 0x80 | 44, 2, 1, changed]);
        shared.void(0, u64::MAX);
        bytes[2] = 8;
        bytes[2 * PAGE_SIZE] ^= 1;
        let third = encoder.encode(&shared, 0, &bytes, 0b101, false);
        assert_eq!((third.delta, third.raw), (0, 0b101));
    }

    #[test]
    fn refuses_what_no_encoder_makes() {
        let mut decoder = ChunkDecoder::new();
        let mut error =
            |delta, zstd, bytes: &[u8]| decoder.decode(delta, zstd, bytes, |_, p| p.fill(0)).unwrap_err();
        assert_eq!(error(3, 2, &[]), DecodeError::MasksOverlap { pages: 2 });
        assert_eq!(error(0, 0, &[1]), DecodeError::TooLong { bytes: 1, most: 0 });
        assert_eq!(error(1, 0, &[]), DecodeError::Truncated { bit: 0, end: 0 });
        assert_eq!(error(2, 0, &[4, 0, 0, 1, 9]), DecodeError::Truncated { bit: 1, end: 5 });
        assert_eq!(error(1, 0, &[0, 0]), DecodeError::DeltaLength { bit: 0, length: 0 });
        let long = [&2731u16.to_le_bytes()[..], &[0; 2731]].concat();
        assert_eq!(error(1, 0, &long), DecodeError::DeltaLength { bit: 0, length: 2731 });
        assert_eq!(error(1, 0, &[3, 0, 0, 1, 9, 9]), DecodeError::Trailing { bytes: 1 });
        let source = DeltaError::EmptyRun { offset: 1 };
        assert_eq!(error(1, 0, &[2, 0, 0, 0]), DecodeError::Delta { bit: 0, source });
        assert!(matches!(error(0, 4, &[]), DecodeError::Frame { pages: 4, .. }));
        assert!(matches!(error(0, 4, &[9; 100]), DecodeError::Frame { pages: 4, .. }));
    }
}
