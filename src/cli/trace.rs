//! Traces of dirty pages: which pages a guest wrote, interval after interval, in a file.
//!
//! All numbers are little-endian. The file is a header of 32 bytes and then the intervals, one after another:
//!
//! ```text
//! header    magic "PFTRACE1" (8) | page size (u32) | chunks (u32) | guest bytes (u64) | intervals (u32) | reserved, 0 (u32)
//! interval  microseconds (u32) | entries (u32) | entries times: chunk (u32), pages (u64)
//! ```
//!
//! An interval says how long it lasted and which pages were written in it: for each chunk with such pages, in ascending order, its
//! number and a word whose bit `i` is page `i` of the chunk's 64. `docs/operations.md` describes the same for users.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use crate::cli::words::explain;
use pageferry::pagecopy::bitmap::PageBitmap;
use pageferry::pagecopy::layout::{CHUNK_PAGES, GUEST_BYTES_MAX, Layout, PAGE_SIZE};

use super::file;

const MAGIC: &[u8; 8] = b"PFTRACE1";
const HEADER_BYTES: usize = 32;
const ENTRY_BYTES: usize = 12;
/// Longest file that is read: some hours of a busy guest.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// Longest interval.
const INTERVAL_MAX: Duration = Duration::from_secs(3600);

/// What was written in one interval.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interval {
    /// How long it lasted; not 0.
    pub took: Duration,
    /// Chunks in ascending order, with the pages of each that were written.
    pub written: Vec<(u32, u64)>,
}

impl Interval {
    /// Pages that were written.
    pub(super) fn pages(&self) -> u64 {
        self.written.iter().map(|(_, pages)| u64::from(pages.count_ones())).sum()
    }
}

/// A whole trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Trace {
    /// Bytes of the guest's memory.
    pub guest_bytes: u64,
    /// Chunks of the guest's memory.
    pub chunks: u32,
    /// At least one, with at least one page in one of them.
    pub intervals: Vec<Interval>,
}

/// A file that is no trace.
#[derive(Debug, thiserror::Error)]
pub(super) enum TraceError {
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    #[error("it has {found} bytes, and a trace {FILE_BYTES_MAX} at most")]
    TooLong { found: u64 },
    #[error("it does not begin as a trace of this version does; `pageferry ctl ... record-trace` makes one")]
    NoTrace,
    #[error("its {field} is {found}, which cannot be")]
    Field { field: &'static str, found: u64 },
    #[error("it ends within interval {interval} of {intervals}")]
    Short { interval: u32, intervals: u32 },
    #[error("{left} bytes follow its last interval")]
    Long { left: usize },
    #[error("interval {interval}: {what}")]
    Interval { interval: u32, what: &'static str },
    #[error("no page was written while it was recorded")]
    Empty,
}

impl Trace {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or is no trace; the text names the file.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        Self::open(path).map_err(|e| format!("trace {}: {}", path.display(), explain(&e)))
    }

    fn open(path: &Path) -> Result<Self, TraceError> {
        let mut file = file::open(path)?;
        let found = file.metadata()?.len();
        if found > FILE_BYTES_MAX {
            return Err(TraceError::TooLong { found });
        }
        let mut bytes = Vec::new();
        // A file may grow while it is read.
        (&mut file).take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Self::decode(&bytes)
    }

    /// Reads a trace from the bytes of its file.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, TraceError> {
        let mut input = Input(bytes);
        let (Some(magic), Some(page_size), Some(chunks), Some(guest_bytes), Some(intervals), Some(reserved)) =
            (input.take::<8>(), input.u32(), input.u32(), input.u64(), input.u32(), input.u32())
        else {
            return Err(TraceError::NoTrace);
        };
        if magic != *MAGIC {
            return Err(TraceError::NoTrace);
        }
        let field = |field, found: u64| Err(TraceError::Field { field, found });
        if u64::from(page_size) != PAGE_SIZE as u64 {
            return field("page size", page_size.into());
        }
        if guest_bytes == 0 || guest_bytes > GUEST_BYTES_MAX || !guest_bytes.is_multiple_of(PAGE_SIZE as u64)
        {
            return field("number of guest bytes", guest_bytes);
        }
        // Regions end with a chunk that may be short, so there may be more chunks than bytes make up.
        if u64::from(chunks) < guest_bytes.div_ceil((CHUNK_PAGES * PAGE_SIZE) as u64) {
            return field("number of chunks", chunks.into());
        }
        if reserved != 0 {
            return field("reserved field", reserved.into());
        }
        let mut trace = Self { guest_bytes, chunks, intervals: Vec::new() };
        for interval in 1..=intervals {
            trace.intervals.push(input.interval(chunks, interval, intervals)?);
        }
        match input.0.len() {
            0 if trace.pages() == 0 => Err(TraceError::Empty),
            0 => Ok(trace),
            left => Err(TraceError::Long { left }),
        }
    }

    /// Pages that were written in all intervals together.
    pub(super) fn pages(&self) -> u64 {
        self.intervals.iter().map(Interval::pages).sum()
    }

    /// Time that all intervals took together.
    pub(super) fn took(&self) -> Duration {
        self.intervals.iter().map(|interval| interval.took).sum()
    }
}

/// Bytes that are not read yet.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn interval(&mut self, chunks: u32, interval: u32, intervals: u32) -> Result<Interval, TraceError> {
        let short = TraceError::Short { interval, intervals };
        let (Some(micros), Some(entries)) = (self.u32(), self.u32()) else { return Err(short) };
        let wrong = |what| Err(TraceError::Interval { interval, what });
        let took = Duration::from_micros(micros.into());
        if took.is_zero() || took > INTERVAL_MAX {
            return wrong("it lasted not at all, or for more than an hour");
        }
        // Before anything is allocated for them.
        if entries as usize > self.0.len() / ENTRY_BYTES {
            return Err(short);
        }
        let mut written = Vec::with_capacity(entries as usize);
        for _ in 0..entries {
            let (Some(chunk), Some(pages)) = (self.u32(), self.u64()) else { return Err(short) };
            if chunk >= chunks {
                return wrong("a chunk lies beyond the guest's memory");
            }
            if pages == 0 || written.last().is_some_and(|&(last, _)| last >= chunk) {
                return wrong("a chunk has no page, or does not come in order");
            }
            written.push((chunk, pages));
        }
        Ok(Interval { took, written })
    }
}

/// Writes a trace, interval by interval.
pub(super) struct Recorder {
    file: BufWriter<File>,
    intervals: u32,
}

impl Recorder {
    /// Makes the file, emptying one that is there.
    pub(super) fn create(path: &Path, layout: &Layout) -> io::Result<Self> {
        let mut file = BufWriter::new(file::write(path, false)?);
        file.write_all(&header(layout, 0))?;
        Ok(Self { file, intervals: 0 })
    }

    /// Adds an interval in which the pages of `dirty` were written.
    pub(super) fn add(&mut self, took: Duration, dirty: &PageBitmap) -> io::Result<()> {
        let micros = u32::try_from(took.as_micros()).map_err(|_| io::ErrorKind::InvalidInput)?.max(1);
        let written: Vec<_> = dirty.iter().collect();
        self.file.write_all(&micros.to_le_bytes())?;
        self.file.write_all(&(written.len() as u32).to_le_bytes())?;
        for (chunk, pages) in written {
            self.file.write_all(&chunk.to_le_bytes())?;
            self.file.write_all(&pages.to_le_bytes())?;
        }
        self.intervals += 1;
        Ok(())
    }

    /// Makes the file whole.
    pub(super) fn finish(mut self, layout: &Layout) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&header(layout, self.intervals))?;
        self.file.flush()
    }
}

fn header(layout: &Layout, intervals: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
    header[12..16].copy_from_slice(&layout.chunks().to_le_bytes());
    header[16..24].copy_from_slice(&layout.bytes().to_le_bytes());
    header[24..28].copy_from_slice(&intervals.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trace of two intervals, as its file has it.
    fn file() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        let layout = Layout::flat(1 << 20).unwrap();
        let mut recorder = Recorder::create(&path, &layout).unwrap();
        let dirty = PageBitmap::new(4);
        recorder.add(Duration::from_micros(7), &dirty).unwrap();
        dirty.insert(1, 0b101);
        dirty.insert(3, u64::MAX);
        recorder.add(Duration::from_millis(100), &dirty).unwrap();
        recorder.finish(&layout).unwrap();
        std::fs::read(&path).unwrap()
    }

    #[test]
    fn a_trace_is_these_bytes_and_read_back() {
        let bytes = file();
        let expected = [
            &b"PFTRACE1\x00\x10\x00\x00\x04\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"[..],
            b"\x07\x00\x00\x00\x00\x00\x00\x00",
            b"\xa0\x86\x01\x00\x02\x00\x00\x00",
            b"\x01\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00",
            b"\x03\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff",
        ];
        assert_eq!(bytes, expected.concat());
        let trace = Trace::decode(&bytes).unwrap();
        assert_eq!((trace.guest_bytes, trace.chunks, trace.pages()), (1 << 20, 4, 66));
        assert_eq!(trace.took(), Duration::from_micros(100_007));
        assert_eq!(trace.intervals[1].written, [(1, 5), (3, u64::MAX)]);
    }

    #[test]
    fn no_other_bytes_are_a_trace() {
        let good = file();
        for len in 0..good.len() {
            assert!(Trace::decode(&good[..len]).is_err(), "{len} bytes");
        }
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Trace::decode(&bytes).unwrap_err().to_string()
        };
        for (at, byte, word) in [
            (0, b'Q', "does not begin"),
            (9, 0x20, "page size"),
            (12, 3, "number of chunks"),
            (16, 1, "guest bytes"),
            (23, 1, "guest bytes"),
            (24, 1, "bytes follow"),
            (24, 3, "within interval 3 of 3"),
            (27, 0xff, "within interval 3 of"),
            (28, 1, "reserved"),
            (32, 0, "lasted not at all"),
            (39, 0xff, "within interval 1 of 2"),
            (48, 4, "beyond the guest's memory"),
            (48, 3, "in order"),
            (52, 0, "has no page"),
        ] {
            let text = changed(at, byte);
            assert!(text.contains(word), "byte {at} = {byte}: {text}");
        }
        let mut long = good.clone();
        long.push(0);
        assert!(Trace::decode(&long).is_err());
        let mut empty = good[..40].to_vec();
        empty[24] = 1;
        assert!(Trace::decode(&empty).unwrap_err().to_string().contains("no page was written"));
    }
}
