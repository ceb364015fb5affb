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
//!     if there are references:
//!         u8                    how many, 1..=64
//!         for each, by ascending chunk:
//!             u32               a chunk
//!             u64               mask of its pages, not 0; at most 64 pages in all
//!     the rest of the section   one zstd frame that says the size of its content, 4096 * (bits of `zstd`):
//!                               the pages, ascending, one after the other
//! ```
//!
//! The section ends where these end, and is never longer than the pages it stands for. Its length, the masks, whether there are
//! references, its checksum and the raw pages belong to the frame around it.
//!
//! The frame's dictionary is 8 bytes of zeros and then the referenced pages, in this order, as the destination holds them when it
//! decodes the section. Without references it has none.

mod alone;
mod decoder;

use std::sync::Arc;

use vm_memory::volatile_memory::VolatileSlice;

use crate::bitmap::{bits, runs};
use crate::cache::{CachedChunk, PageCache};
use crate::choose::{Chooser, CodecMode, DELTA_BYTES_MAX, Effort, EncodeKind, Plan, Took};
use crate::compress::{Compress, RAW_CONTENT, looks_compressible};
use crate::digest::{PageDigest, PageHasher};
use crate::layout::{CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE};
use crate::similar::{SimilarPages, best_of};
use crate::table::DigestTable;
use crate::xbzrle::{self, Encoded, Page};
use crate::zero::zero_pages;

pub use decoder::{Announced, ChunkDecoder, DecodeError, Decoded};

/// Bytes of a delta's length in the section.
const LENGTH_BYTES: usize = 2;
/// A zstd frame is used when it takes at most this much of the pages' bytes, in percent.
const FRAME_PERCENT_MAX: usize = 90;
/// Most pages that a section may refer to: with those it stands for, all fits the window of the levels that are worth it.
pub const REFERENCES_MAX: usize = CHUNK_PAGES;
/// Bytes of a reference in the section.
const REFERENCE_BYTES: usize = 12;
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
    /// Which pages resemble one another.
    pub similar: SimilarPages,
}

impl Shared {
    /// For a layout of `chunks` chunks, with at most `cache_bytes` of memory for delta bases.
    pub fn new(hasher: PageHasher, chunks: u32, cache_bytes: u64) -> Self {
        let table = DigestTable::new(chunks, hasher.zero());
        Self { hasher, table, cache: PageCache::new(cache_bytes), similar: SimilarPages::new() }
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

/// Pages of a chunk which are to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The chunk.
    pub chunk: u32,
    /// A stable copy of it, in which page `i` lies at `i * PAGE_SIZE`; it may end after the last page of `pages`.
    pub snapshot: &'a [u8],
    /// The pages.
    pub pages: u64,
    /// They were not sent before in this migration.
    pub first_pass: bool,
}

/// Pages of another chunk that a section refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The chunk.
    pub chunk: u32,
    /// The pages.
    pub pages: u64,
}

impl Reference {
    /// Copies the pages out of the chunk's memory, ascending, one after the other.
    ///
    /// # Panics
    /// When a page lies beyond the end of `memory`.
    pub fn copy(self, memory: &VolatileSlice<'_>, pages: &mut [Page]) {
        for (page, bit) in pages.iter_mut().zip(bits(self.pages)) {
            let piece = memory.subslice(bit as usize * PAGE_SIZE, PAGE_SIZE);
            piece.expect("the page lies in the chunk's memory").copy_to(&mut page[..]);
        }
    }
}

/// Copies pages of another chunk, ascending, one after the other, and answers for it that the destination keeps what it
/// holds for them until it has decoded the section; or returns false, and answers for nothing.
pub type Lend<'a> = &'a mut dyn FnMut(Reference, &mut [Page]) -> bool;

/// Where pages are looked for that resemble a chunk's.
struct Kin<'a> {
    shared: &'a Shared,
    chunk: u32,
    lend: Lend<'a>,
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
    /// What the zstd frame refers to, of what was lent.
    pub references: &'a [Reference],
    /// The encoded section.
    pub encoded: &'a [u8],
    /// Digest of every page that was asked for, by bit; others are undefined.
    pub digests: &'a [PageDigest; CHUNK_PAGES],
}

/// Clocks in nanoseconds from any start, never going back, by which the chooser measures.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// The time.
    pub now: fn() -> u64,
    /// For how long the calling thread has run.
    pub worked: fn() -> u64,
}

/// A reading of both.
#[derive(Clone, Copy, Debug)]
struct Reading {
    now: u64,
    worked: u64,
}

impl Clocks {
    fn read(self) -> Reading {
        Reading { now: (self.now)(), worked: (self.worked)() }
    }
}

impl Reading {
    fn until(self, end: Self) -> Took {
        Took { nanos: end.now.saturating_sub(self.now), worked_nanos: end.worked.saturating_sub(self.worked) }
    }
}

/// Encodes chunks; one a stream worker, with its contexts, its scratch and its [`Chooser`].
#[derive(Debug)]
pub struct ChunkEncoder {
    chooser: Chooser,
    compress: Compress,
    clocks: Clocks,
    section: Box<[u8]>,
    /// Pages that lie apart, brought together for the compressor.
    gathered: Box<[u8]>,
    /// Pages that resemble the chunk's, by number, before the best are taken.
    found: Vec<u64>,
    references: Vec<Reference>,
    dictionary: Dictionary,
    digests: [PageDigest; CHUNK_PAGES],
}

impl ChunkEncoder {
    /// An encoder that chooses by itself. `clocks` decide only between codecs.
    pub fn new(mode: CodecMode, clocks: Clocks) -> Self {
        Self::of(Arc::new(Effort::new(mode)), clocks)
    }

    /// An encoder of one of a session's streams, which choose together.
    pub fn of(effort: Arc<Effort>, clocks: Clocks) -> Self {
        Self {
            chooser: Chooser::new(effort),
            compress: Compress::new(),
            clocks,
            section: vec![0; CHUNK_SIZE].into_boxed_slice(),
            gathered: vec![0; CHUNK_SIZE].into_boxed_slice(),
            found: Vec::new(),
            references: Vec::new(),
            dictionary: Dictionary::new(),
            digests: [0; CHUNK_PAGES],
        }
    }

    /// For memory that nobody writes; see [`Chooser::each_once`].
    pub fn each_once(self) -> Self {
        Self { chooser: self.chooser.each_once(), ..self }
    }

    /// For a destination that takes references; see [`Effort::refer`].
    pub fn referring(mut self, references: bool) -> Self {
        self.chooser.refer(references);
        self
    }

    /// What chooses the codec, to be told what sending takes.
    pub fn chooser(&mut self) -> &mut Chooser {
        &mut self.chooser
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
        let plan = self.plan(chunk, 0);
        self.encode_as(plan, shared, Job { chunk, snapshot, pages, first_pass }, &mut |_, _| false)
    }

    /// How to encode the next chunk, which is this one; for [`encode_as`](Self::encode_as) or [`survey`](Self::survey).
    /// See [`Chooser::plan`].
    pub fn plan(&mut self, chunk: u32, ahead_nanos: u64) -> Plan {
        self.chooser.plan(chunk, ahead_nanos)
    }

    /// [`encode`](Self::encode) by a plan that was made for this chunk. `lend` is asked for pages that resemble the chunk's, of
    /// other chunks, where the plan has references; what it lends is used only if it is what was last sent for these pages.
    pub fn encode_as(
        &mut self,
        plan: Plan,
        shared: &Shared,
        job: Job<'_>,
        lend: Lend<'_>,
    ) -> EncodedChunk<'_> {
        let Job { chunk, snapshot, pages, first_pass } = job;
        let snapshot = snapshot.as_chunks::<PAGE_SIZE>().0;
        let start = (self.clocks.now)();
        let (zero, unchanged) = self.scan(shared, chunk, snapshot, pages);
        let rest = pages & !zero & !unchanged;
        let bytes = |pages: u64| u64::from(pages.count_ones()) * PAGE_SIZE as u64;
        let scanned = (self.clocks.now)();
        self.observe(EncodeKind::Scan, bytes(pages), bytes(rest), Took::ran(start, scanned));

        let (delta, deltas_end) = self.deltas(shared, chunk, snapshot, zero, rest, plan, first_pass);
        if !first_pass && plan.delta {
            let out = bytes(rest & !delta) + deltas_end as u64;
            let took = Took::ran(scanned, (self.clocks.now)());
            self.observe(EncodeKind::Delta { chunk }, bytes(rest), out, took);
        }
        self.references.clear();
        let (zstd, end) =
            self.frame(Some(Kin { shared, chunk, lend }), snapshot, rest & !delta, plan, deltas_end);

        shared.table.set_zeros(chunk, zero);
        shared.table.set_pages(chunk, rest, &self.digests);
        EncodedChunk {
            zero,
            unchanged,
            delta,
            zstd,
            raw: rest & !delta & !zstd,
            references: &self.references,
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
        let start = (self.clocks.now)();
        let zero = self.hash_memory(&shared.hasher, memory, pages);
        let (zero, unchanged) = self.known(shared, chunk, pages, zero);
        let raw = pages & !zero & !unchanged;
        let bytes = |pages: u64| u64::from(pages.count_ones()) * PAGE_SIZE as u64;
        let took = Took::ran(start, (self.clocks.now)());
        self.observe(EncodeKind::Scan, bytes(pages), bytes(raw), took);
        shared.table.set_zeros(chunk, zero);
        shared.table.set_pages(chunk, raw, &self.digests);
        EncodedChunk {
            zero,
            unchanged,
            delta: 0,
            zstd: 0,
            raw,
            references: &[],
            encoded: &[],
            digests: &self.digests,
        }
    }

    /// Hashes pages where they lie; returns those of zeros.
    fn hash_memory(&mut self, hasher: &PageHasher, memory: &VolatileSlice<'_>, pages: u64) -> u64 {
        let mut zero = 0;
        for bit in bits(pages) {
            let page = memory.subslice(bit as usize * PAGE_SIZE, PAGE_SIZE);
            let digest = hasher.memory(&page.expect("the page lies in the chunk's memory"));
            self.digests[bit as usize] = digest;
            zero |= u64::from(digest == hasher.zero()) << bit;
        }
        zero
    }

    /// Hashes pages of a copy; returns those of zeros.
    fn hash(&mut self, hasher: &PageHasher, snapshot: &[Page], pages: u64) -> u64 {
        let zero = zero_pages(snapshot.as_flattened(), pages);
        for bit in bits(zero) {
            self.digests[bit as usize] = hasher.zero();
        }
        for bit in bits(pages & !zero) {
            self.digests[bit as usize] = hasher.page(&snapshot[bit as usize]);
        }
        zero
    }

    /// Hashes the pages; returns those that are zero and must be said to be, and those that are as last sent.
    fn scan(&mut self, shared: &Shared, chunk: u32, snapshot: &[Page], pages: u64) -> (u64, u64) {
        let zero = self.hash(&shared.hasher, snapshot, pages);
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

    /// Writes references, where there is somebody to lend them, and the zstd frame at `start` of the section if it pays; returns its
    /// pages, and where the section ends.
    fn frame(
        &mut self,
        kin: Option<Kin<'_>>,
        snapshot: &[Page],
        rest: u64,
        plan: Plan,
        start: usize,
    ) -> (u64, usize) {
        if plan.zstd_level.is_none() {
            return (0, start);
        }
        let begin = self.clocks.read();
        let likely = bits(rest)
            .filter(|&bit| looks_compressible(&snapshot[bit as usize]))
            .fold(0, |pages, bit| pages | 1u64 << bit);
        let guessed = self.clocks.read();
        self.observe(EncodeKind::Scan, 0, 0, begin.until(guessed));
        if likely == 0 {
            return (0, start);
        }
        let kin = kin.filter(|_| plan.references);
        let head = kin.map_or(0, |kin| self.refer(kin, snapshot, likely, start));
        // What references cost counts for every step that has them.
        let referring = guessed.until(self.clocks.read());
        if let Some((level, references)) = plan.probe {
            let kind = EncodeKind::Probe { level, references };
            self.squeeze(snapshot, likely, kind, start + head, referring);
        }
        let squeezed = plan.zstd_level.and_then(|level| {
            let kind = EncodeKind::Zstd { level, references: plan.references };
            self.squeeze(snapshot, likely, kind, start + head, referring)
        });
        match squeezed {
            Some(length) => (likely, start + head + length),
            None => {
                self.references.clear();
                (0, start)
            }
        }
    }

    /// Finds pages that resemble these, makes them the dictionary, and writes which they are at `start` of the section; returns how
    /// many bytes that took.
    fn refer(&mut self, kin: Kin<'_>, snapshot: &[Page], pages: u64, start: usize) -> usize {
        let Kin { shared, chunk, lend } = kin;
        self.found.clear();
        for bit in bits(pages) {
            shared.similar.note(chunk, bit, &snapshot[bit as usize], &mut self.found);
        }
        let (dictionary, references) = (&mut self.dictionary, &mut self.references);
        dictionary.pages = 0;
        best_of(&mut self.found, REFERENCES_MAX, |other, similar| {
            // Pages of zeros need no reference, and the destination may hold them as holes.
            let asked = similar & shared.table.known(other) & !shared.table.zeros(other);
            let room = &mut dictionary.room()[..asked.count_ones() as usize];
            if asked == 0 || !lend(Reference { chunk: other, pages: asked }, room) {
                return;
            }
            let (mut kept, mut to) = (0u64, 0);
            for (from, bit) in bits(asked).enumerate() {
                // What was written since is not what the destination has.
                if shared.table.get(other, bit) == Some(shared.hasher.page(&room[from])) {
                    room.copy_within(from..=from, to);
                    (kept, to) = (kept | 1 << bit, to + 1);
                }
            }
            if kept != 0 {
                dictionary.pages += to;
                references.push(Reference { chunk: other, pages: kept });
            }
        });
        if references.is_empty() {
            return 0;
        }
        let list = &mut self.section[start..];
        list[0] = references.len() as u8;
        for (entry, reference) in list[1..].as_chunks_mut::<REFERENCE_BYTES>().0.iter_mut().zip(references) {
            entry[..4].copy_from_slice(&reference.chunk.to_le_bytes());
            entry[4..].copy_from_slice(&reference.pages.to_le_bytes());
        }
        1 + REFERENCE_BYTES * self.references.len()
    }

    /// Compresses pages to the section from `start`, with the time taken; `None` where it does not pay.
    fn squeeze(
        &mut self,
        snapshot: &[Page],
        pages: u64,
        kind: EncodeKind,
        start: usize,
        referring: Took,
    ) -> Option<usize> {
        let (EncodeKind::Zstd { level, references } | EncodeKind::Probe { level, references }) = kind else {
            return None;
        };
        let begin = self.clocks.read();
        let bytes = pages.count_ones() as usize * PAGE_SIZE;
        // The list of references is paid for by what it saves.
        let head = match self.references.len() {
            count if count != 0 && references => 1 + REFERENCE_BYTES * count,
            _ => 0,
        };
        let referring = if references { referring } else { Took::default() };
        let most = (bytes * FRAME_PERCENT_MAX / 100).saturating_sub(head);
        let source = together(snapshot, pages, &mut self.gathered);
        let frame = &mut self.section[start..start + most];
        let length = if head == 0 {
            self.compress.compress(level, source, frame)
        } else {
            let (content, dictionary) = self.dictionary.before(source);
            self.compress.compress_behind(level, content, dictionary, frame)
        };
        let out = length.map_or(bytes, |length| length + head);
        self.observe(kind, bytes as u64, out as u64, begin.until(self.clocks.read()).and(referring));
        length
    }

    fn observe(&mut self, kind: EncodeKind, bytes_in: u64, bytes_out: u64, took: Took) {
        self.chooser.observe_encode(kind, bytes_in, bytes_out, took);
    }
}

/// Pages that a frame refers to, as zstd wants them, and behind them the frame's own.
#[derive(Debug)]
struct Dictionary {
    /// [`RAW_CONTENT`], then room for the pages of both.
    content: Box<[u8]>,
    pages: usize,
}

impl Dictionary {
    fn new() -> Self {
        let room = (REFERENCES_MAX + CHUNK_PAGES) * PAGE_SIZE;
        let mut content = vec![0; RAW_CONTENT.len() + room].into_boxed_slice();
        content[..RAW_CONTENT.len()].copy_from_slice(&RAW_CONTENT);
        Self { content, pages: 0 }
    }

    /// Room for more pages behind those that are there.
    fn room(&mut self) -> &mut [Page] {
        let pages = self.content[RAW_CONTENT.len()..].as_chunks_mut().0;
        &mut pages[self.pages..REFERENCES_MAX]
    }

    /// All that is referred to, and room for the frame's pages behind it.
    fn split(&mut self) -> (&[u8], &mut [Page]) {
        let (dictionary, rest) = self.content.split_at_mut(RAW_CONTENT.len() + self.pages * PAGE_SIZE);
        (dictionary, rest.as_chunks_mut().0)
    }

    /// The same with these pages behind it, as one, and where they begin.
    fn before(&mut self, pages: &[u8]) -> (&[u8], usize) {
        let (dictionary, rest) = self.split();
        let at = dictionary.len();
        rest.as_flattened_mut()[..pages.len()].copy_from_slice(pages);
        (&self.content[..at + pages.len()], at)
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

#[cfg(test)]
mod tests;
