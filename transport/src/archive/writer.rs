//! An archive that is being written, by several streams at once.
//!
//! On a disk bytes go past the page cache (`O_DIRECT`): what is under way is then what is, and the codec is chosen by what the disk takes.
//! Frames are gathered for it into blocks of whole pages, with a pad at the end of each.
//!
//! Each stream gives its frames, whole, and they get the next place in the archive: so no two overlap, nothing lies between them, and a
//! chunk's later version lies behind its earlier one, because no stream is given a chunk before what another wrote of it is written. In a
//! file all streams write at the same time; what is written in order is written one at a time.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use pagecopy::backend::StateBlob;
use pagecopy::bitmap::{bits, runs};
use pagecopy::chunk::EncodedChunk;
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use rustix::fs::OFlags;
use vm_memory::volatile_memory::VolatileSlice;

use super::ArchiveError;
use super::format::{
    self, Footer, FrameHeader, FrameKind, Header, IndexEntry, MAGIC, PAD_MAX, Record, RecordKind,
    encode_state_payload,
};
use super::kept::KeptFile;
use super::oneway::OneWayWriter;
use crate::carrier::{Breaker, Durable, FrameSender};
use crate::local::lock;
use crate::source::{Carrier, Settles};
use crate::sys::SendList;
use crate::uri::Uri;
use crate::wire::frame;

/// How long a thread waits for more to be written before it looks around.
const TICK: Duration = Duration::from_millis(100);
/// What is written in order goes out in pieces of this size.
const PIECE_BYTES: usize = CHUNK_SIZE + (128 << 10);
/// Past the page cache frames are written once there are so many bytes of them.
const BLOCK_BYTES: usize = 1 << 20;

/// Where it goes.
enum Out {
    File(KeptFile),
    /// Past the page cache.
    Direct(KeptFile),
    InOrder(Mutex<OneWayWriter>),
    /// Nowhere any more.
    Ended,
}

/// An archive that is being written.
pub(crate) struct ArchiveWriter {
    out: Out,
    hasher: PageHasher,
    /// Where the next bytes go.
    next: AtomicU64,
    entries: Mutex<Vec<IndexEntry>>,
    /// Whoever waits for a slow reader waits no longer.
    stop: AtomicBool,
    /// Why it cannot be written, by whoever found out first.
    error: Mutex<Option<ArchiveError>>,
}

impl ArchiveWriter {
    /// Begins one: nothing but its header is written.
    pub(crate) fn create(uri: &Uri, header: &Header) -> Result<Self, ArchiveError> {
        let out = match uri {
            Uri::File(path) => {
                let file = KeptFile::create(path)?;
                if goes_past_the_cache(file.file()) { Out::Direct(file) } else { Out::File(file) }
            }
            uri => Out::InOrder(Mutex::new(OneWayWriter::open(uri)?)),
        };
        let mut writer = Self {
            out,
            hasher: PageHasher::new(header.seed),
            next: AtomicU64::new(0),
            entries: Mutex::default(),
            stop: AtomicBool::new(false),
            error: Mutex::default(),
        };
        writer.begin(header)?;
        Ok(writer)
    }

    /// Writes magic and header.
    fn begin(&mut self, header: &Header) -> Result<(), ArchiveError> {
        let (payload, mut start) = (header.encode(), MAGIC.to_vec());
        // Its seed is not known to who reads it.
        let hasher = PageHasher::new(0);
        let record = Record::of(RecordKind::Header, MAGIC.len() as u64, &payload, &hasher);
        start.extend_from_slice(&record.encode(&hasher));
        start.extend_from_slice(&payload);
        if !matches!(self.out, Out::Direct(_)) {
            return self.append(&start);
        }
        let end = start.len();
        format::pad(&mut start);
        let pad = IndexEntry { offset: end as u64, pages: 0, chunk: 0, len: (start.len() - end) as u32 };
        let mut block = Block::new(start.len());
        block.bytes(start.len()).copy_from_slice(&start);
        let refused = match self.append(block.filled()) {
            Err(error) if error.system().raw_os_error() == Some(libc::EINVAL) => true,
            result => {
                result?;
                false
            }
        };
        if refused && let Out::Direct(file) = std::mem::replace(&mut self.out, Out::Ended) {
            // A file system that says it can, and cannot.
            go_through_the_cache(file.file()).map_err(|e| file.failed("write", e))?;
            (self.out, self.next) = (Out::File(file), AtomicU64::new(0));
            self.append(&start)?;
        }
        lock(&self.entries).push(pad);
        Ok(())
    }

    /// Bytes that there is room for, where that is known.
    pub(crate) fn room(&self) -> Option<u64> {
        match &self.out {
            Out::File(file) | Out::Direct(file) => file.room().ok(),
            Out::InOrder(_) | Out::Ended => None,
        }
    }

    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// What gives it frames.
    pub(crate) fn sender(self: &Arc<Self>) -> Sender {
        Sender {
            archive: self.clone(),
            written: Arc::default(),
            entries: Vec::new(),
            block: matches!(self.out, Out::Direct(_)).then(|| Block::new(BLOCK_BYTES + PIECE_BYTES)),
            buffer: Vec::new(),
        }
    }

    /// The end of one of its streams that frames are given to.
    pub(crate) fn carrier(self: &Arc<Self>) -> Carrier {
        let frames = self.sender();
        let settled = Settled { written: frames.written.clone(), seen: Now::default() };
        let settles = Settles::WhenDurable(Box::new(settled));
        Carrier { frames: Box::new(frames), settles, breaker: Arc::new(Stops(self.clone())) }
    }

    /// Whoever waits for a slow reader is to wait no longer.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Why it cannot be written, once.
    pub(crate) fn take_error(&self) -> Option<ArchiveError> {
        lock(&self.error).take()
    }

    /// Writes the end of it, with `pages` distinct pages in its frames, and makes all of it durable; returns how many bytes it has. Nobody
    /// else writes any more. `go_on` is asked while somebody is waited for.
    pub(crate) fn finish(
        self,
        state: &[StateBlob],
        pages: u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<u64, ArchiveError> {
        if let Out::Direct(file) = &self.out {
            // What follows is no whole pages.
            go_through_the_cache(file.file()).map_err(|e| file.failed("write", e))?;
        }
        let state_at = match state {
            [] => 0,
            state => self.record(RecordKind::State, &encode_state_payload(state), &self.hasher)?,
        };
        let mut entries = std::mem::take(&mut *lock(&self.entries));
        entries.sort_unstable_by_key(|entry| entry.offset);
        let mut index = Vec::with_capacity(entries.len() * IndexEntry::LEN);
        entries.iter().for_each(|entry| index.extend_from_slice(&entry.encode()));
        let index_at = self.record(RecordKind::Index, &index, &self.hasher)?;
        let bytes = self.bytes() + Footer::RECORD_LEN as u64;
        let footer = Footer { state_at, index_at, frames: entries.len() as u64, pages, bytes };
        self.record(RecordKind::Footer, &footer.encode(), &self.hasher)?;
        match self.out {
            Out::File(file) | Out::Direct(file) => file.commit()?,
            Out::Ended => {}
            Out::InOrder(out) => {
                let out = out.into_inner().unwrap_or_else(PoisonError::into_inner);
                out.finish(go_on)?;
            }
        }
        Ok(bytes)
    }

    /// Writes a record at the end, and returns where it begins.
    fn record(&self, kind: RecordKind, payload: &[u8], hasher: &PageHasher) -> Result<u64, ArchiveError> {
        let offset = self.bytes();
        self.append(&Record::of(kind, offset, payload, hasher).encode(hasher))?;
        self.append(payload)?;
        Ok(offset)
    }

    /// Writes bytes at the end.
    fn append(&self, bytes: &[u8]) -> Result<(), ArchiveError> {
        let mut list = SendList::new();
        list.push(bytes);
        self.write(list, &mut Vec::new(), |_| {})
    }

    /// Writes the list, whose place `placed` is told, at the end.
    fn write(
        &self,
        mut list: SendList<'_>,
        buffer: &mut Vec<u8>,
        placed: impl FnOnce(u64),
    ) -> Result<(), ArchiveError> {
        let len = list.len() as u64;
        match &self.out {
            Out::Ended => {}
            Out::File(file) | Out::Direct(file) => {
                let mut at = self.next.fetch_add(len, Ordering::Relaxed);
                placed(at);
                while !list.is_empty() {
                    match list.write_at(file.file().as_fd(), at) {
                        Ok(0) => return Err(file.failed("write", io::ErrorKind::WriteZero.into()).into()),
                        Ok(written) => at += written as u64,
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(file.failed("write", e).into()),
                    }
                }
            }
            Out::InOrder(out) => {
                let mut out = lock(out);
                placed(self.next.fetch_add(len, Ordering::Relaxed));
                buffer.resize(PIECE_BYTES, 0);
                while !list.is_empty() {
                    let piece = list.copy_to(buffer);
                    out.write_all(&buffer[..piece], &|| !self.stop.load(Ordering::Relaxed))?;
                }
            }
        }
        Ok(())
    }

    /// Takes note of why it cannot be written; what a stream's thread says of it is the system's word.
    fn fail(&self, error: ArchiveError) -> io::Error {
        let said = error.system();
        self.stop();
        lock(&self.error).get_or_insert(error);
        said
    }
}

/// What of a stream is written.
#[derive(Default)]
struct Written {
    now: Mutex<Now>,
    more: Condvar,
}

/// Bytes that are written, and how often there was nothing more to write.
#[derive(Clone, Copy, Default, PartialEq)]
struct Now {
    bytes: u64,
    pauses: u64,
}

/// Gives the frames of a stream to an archive.
pub(crate) struct Sender {
    archive: Arc<ArchiveWriter>,
    written: Arc<Written>,
    /// Frames that the next list holds, with their places in it.
    entries: Vec<IndexEntry>,
    /// Gathers frames where whole pages are written.
    block: Option<Block>,
    buffer: Vec<u8>,
}

/// Bytes that are gathered in memory that begins at a page.
struct Block {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Block {
    /// With room for so many bytes, and what makes them whole pages.
    fn new(room: usize) -> Self {
        let memory = vec![0u8; room + 4 * PAGE_SIZE];
        let start = memory.as_ptr().align_offset(PAGE_SIZE);
        Self { memory, start, len: 0 }
    }

    /// The next bytes, to be filled in.
    fn bytes(&mut self, len: usize) -> &mut [u8] {
        let at = self.start + self.len;
        self.len += len;
        &mut self.memory[at..at + len]
    }

    fn filled(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

/// Whether a file's bytes go past the page cache from now on; in memory there is nothing else.
fn goes_past_the_cache(file: &File) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    let kind = rustix::fs::fstatfs(file).map_or(TMPFS, |stat| stat.f_type as u64);
    let flags = rustix::fs::fcntl_getfl(file);
    kind != TMPFS
        && kind != RAMFS
        && flags.and_then(|flags| rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)).is_ok()
}

/// They go through it.
fn go_through_the_cache(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?)
}

impl Sender {
    /// Appends a frame of pages that are as in the base to `out`, which holds what was appended since it was written.
    pub(crate) fn seal_same(
        &mut self,
        chunk: u32,
        pages: u64,
        seals: impl Iterator<Item = u64>,
        out: &mut Vec<u8>,
    ) {
        let header =
            FrameHeader { kind: FrameKind::Same, chunk, encoded_len: 0, raw: pages, zero: 0, zstd: 0 };
        self.note(&header, out.len());
        header.encode(seals, &self.archive.hasher, out);
    }

    /// Writes the frame of a chunk, whose raw pages are in `memory`; `out` is empty.
    pub(crate) fn save(
        &mut self,
        chunk: u32,
        encoded: &EncodedChunk<'_>,
        memory: &VolatileSlice<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), ArchiveError> {
        let &EncodedChunk { raw, zero, zstd, .. } = encoded;
        let encoded_len = encoded.encoded.len() as u32;
        let header = FrameHeader { kind: FrameKind::Pages, chunk, encoded_len, raw, zero, zstd };
        let section = (encoded_len != 0).then(|| self.archive.hasher.checksum(encoded.encoded));
        let seals = bits(header.pages()).map(|bit| receipt(encoded.digests[bit as usize]));
        self.note(&header, 0);
        header.encode(seals.chain(section), &self.archive.hasher, out);
        out.extend_from_slice(encoded.encoded);
        let mut list = SendList::new();
        list.push(out);
        for (first, count) in runs(raw) {
            let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
            list.push_guest(&memory.subslice(at, len).expect("pages of a chunk lie in its mapping"));
        }
        let sent = self.send(list);
        out.clear();
        sent.map(drop).map_err(|said| self.error(said))
    }

    /// Takes note of a frame that will begin at `at` in what is sent next. Returns its bytes.
    fn note(&mut self, header: &FrameHeader, at: usize) -> u64 {
        // Behind what was gathered before.
        let gathered = self.block.as_ref().map_or(0, |block| block.len);
        let (offset, len) = ((gathered + at) as u64, header.frame_len());
        self.entries.push(IndexEntry { offset, pages: header.pages(), chunk: header.chunk, len: len as u32 });
        len as u64
    }

    /// Writes frames that were appended to `out`, and empties it.
    pub(crate) fn write_frames(&mut self, out: &mut Vec<u8>) -> Result<(), ArchiveError> {
        let mut list = SendList::new();
        list.push(out);
        let sent = self.send(list);
        out.clear();
        sent.map(drop).map_err(|said| self.error(said))
    }

    /// Writes what was gathered.
    pub(crate) fn write_rest(&mut self) -> Result<(), ArchiveError> {
        self.flush().map_err(|said| self.error(said))
    }

    /// Why the archive cannot be written, of which the system said so much.
    fn error(&self, said: io::Error) -> ArchiveError {
        self.archive.take_error().unwrap_or(ArchiveError::Write { source: said })
    }

    /// Writes the list, which holds the frames that were sealed last, of so many bytes.
    fn write(&mut self, list: SendList<'_>, frames: u64) -> io::Result<()> {
        let Self { archive, written, entries, buffer, .. } = self;
        let result = archive.write(list, buffer, |offset| {
            let mut all = lock(&archive.entries);
            all.extend(entries.drain(..).map(|entry| IndexEntry { offset: offset + entry.offset, ..entry }));
        });
        result.map_err(|error| archive.fail(error))?;
        lock(&written.now).bytes += frames;
        written.more.notify_one();
        Ok(())
    }

    /// Writes what was gathered, as whole pages.
    fn write_block(&mut self) -> io::Result<()> {
        let Some(mut block) = self.block.take() else { return Ok(()) };
        if block.len == 0 {
            self.block = Some(block);
            return Ok(());
        }
        let end = block.len;
        let mut pad = Vec::with_capacity(PAD_MAX);
        pad.resize(end % PAGE_SIZE, 0);
        format::pad(&mut pad);
        let pad = &pad[end % PAGE_SIZE..];
        block.bytes(pad.len()).copy_from_slice(pad);
        self.entries.push(IndexEntry { offset: end as u64, pages: 0, chunk: 0, len: pad.len() as u32 });
        let mut list = SendList::new();
        list.push(block.filled());
        let result = self.write(list, end as u64);
        block.len = 0;
        self.block = Some(block);
        result
    }
}

impl FrameSender for Sender {
    fn send(&mut self, mut list: SendList<'_>) -> io::Result<u64> {
        let len = list.len();
        let Some(block) = &mut self.block else {
            self.write(list, len as u64)?;
            return Ok(len as u64);
        };
        list.copy_to(block.bytes(len));
        if block.len >= BLOCK_BYTES {
            self.write_block()?;
        }
        Ok(len as u64)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_block()?;
        // Perhaps the end, of which the other thread is to hear at once.
        lock(&self.written.now).pauses += 1;
        self.written.more.notify_one();
        Ok(())
    }

    /// What is sent is written when that returns.
    fn window_min(&self) -> u64 {
        u64::MAX
    }

    fn seals(&self) -> bool {
        true
    }

    fn seal(&mut self, header: &frame::FrameHeader, seals: &[u64], out: &mut Vec<u8>) -> Option<u64> {
        let &frame::FrameHeader { chunk, encoded_len, raw, zero, zstd, encoded_checksum, .. } = header;
        let section = (encoded_len != 0).then_some(encoded_checksum);
        let sealed = FrameHeader { kind: FrameKind::Pages, chunk, encoded_len, raw, zero, zstd };
        let len = self.note(&sealed, out.len());
        sealed.encode(seals.iter().copied().chain(section), &self.archive.hasher, out);
        Some(len)
    }
}

/// Tells what of a stream is written.
struct Settled {
    written: Arc<Written>,
    seen: Now,
}

impl Durable for Settled {
    fn durable(&mut self) -> io::Result<u64> {
        let now = lock(&self.written.now);
        let waited = self.written.more.wait_timeout_while(now, TICK, |now| *now == self.seen);
        self.seen = *waited.unwrap_or_else(PoisonError::into_inner).0;
        Ok(self.seen.bytes)
    }
}

/// Ends an archive from outside.
struct Stops(Arc<ArchiveWriter>);

impl std::fmt::Debug for Stops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stops")
    }
}

impl Breaker for Stops {
    fn shutdown(&self) {
        self.0.stop();
    }
}
