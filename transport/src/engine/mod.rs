//! The engine: drives a migration from end to end over the three crates.

pub mod destination;
pub mod plan;
pub mod progress;
pub mod report;
mod runtime;
pub mod source;
pub mod tuning;
mod usage;

use std::sync::Arc;
use std::time::Duration;

use crate::rdma::RdmaOptions;
use crate::source::HostShare;
use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::choose::CodecMode;
use pagecopy::digest::ContentHasher;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use tokio::runtime::Handle;

/// Chunks that are scanned for holes at a time (64 GiB): each scan of a full file walks it to its end, so there should be few.
const SCAN_CHUNKS: u32 = 1 << 18;

/// What a user may set once and for all; the defaults serve. What may change while a migration runs is
/// [`Tuning`](tuning::Tuning).
#[derive(Clone, Debug)]
pub struct Options {
    /// Data streams, 1 to 256.
    pub streams: u16,
    /// Codec choice.
    pub codec: CodecMode,
    /// Rounds after which postcopy begins, if the guest was not handed over by then.
    pub postcopy_after_rounds: Option<u64>,
    /// Silence after which a peer, or a stream, is given up.
    pub timeout: Duration,
    /// How long connections that were lost may take to be made anew before the migration fails; zero: it fails at once. A
    /// destination waits as long as its source, and no longer than this.
    pub reconnect_timeout: Duration,
    /// Bound of the delta cache, in bytes.
    pub cache_bytes: u64,
    /// How long a destination that is READY waits for GO after it lost its source.
    pub handover_timeout: Duration,
    /// How long a destination whose guest misses pages waits for a source that it lost, before it gives the guest up.
    pub postcopy_timeout: Duration,
    /// How memory is registered for RDMA.
    pub rdma: RdmaOptions,
    /// What a source shares with the host's other migrations, which are given the same; `None`: nothing.
    pub shared: Option<Arc<HostShare>>,
    /// The runtime on which a source has its control link, where the process has one already: with I/O and time enabled, and there for
    /// longer than the migration. A migration blocks its thread, so none of this runtime's own may be that one, unless it is for such
    /// (`spawn_blocking`). `None`: one that all migrations of the process share.
    pub runtime: Option<Handle>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            streams: 4,
            codec: CodecMode::Auto,
            postcopy_after_rounds: None,
            timeout: Duration::from_secs(10),
            reconnect_timeout: Duration::from_secs(300),
            cache_bytes: 64 << 20,
            handover_timeout: Duration::from_secs(60),
            postcopy_timeout: Duration::from_secs(600),
            rdma: RdmaOptions::default(),
            shared: None,
            runtime: None,
        }
    }
}

/// Which pages of memory are not holes.
pub fn populated(ram: &dyn GuestRam) -> Result<PageBitmap, BackendError> {
    let chunks = ram.layout().chunks();
    let bitmap = PageBitmap::new(chunks);
    let mut words = vec![0; SCAN_CHUNKS.min(chunks) as usize];
    for first in (0..chunks).step_by(SCAN_CHUNKS as usize) {
        let words = &mut words[..SCAN_CHUNKS.min(chunks - first) as usize];
        words.fill(0);
        ram.populated(first, words)?;
        for (chunk, &pages) in (first..).zip(words.iter()) {
            bitmap.insert(chunk, pages);
        }
    }
    Ok(bitmap)
}

/// xxh3-128 of all of guest memory, region after region, as `xxhsum -H128` of a RAM file gives it. Holes count as zeros and are
/// not touched. Only for memory that nobody writes meanwhile.
pub fn content_digest(ram: &dyn GuestRam) -> Result<String, BackendError> {
    let mut hash = ContentHasher::new();
    let mut buffer = vec![0u8; CHUNK_SIZE];
    let populated = populated(ram)?;
    for chunk in 0..ram.layout().chunks() {
        let memory = ram.chunk(chunk);
        buffer.fill(0);
        for (first, count) in runs(populated.get(chunk)) {
            let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
            let piece = memory.subslice(at, len).expect("pages of a chunk lie in its mapping");
            piece.copy_to(&mut buffer[at..at + len]);
        }
        hash.update(&buffer[..memory.len()]);
    }
    Ok(format!("{:032x}", hash.digest()))
}

/// The text of an error with all its causes, and the limit that it met.
pub fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut limit = None;
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        limit = limit.or_else(|| usage::limit_of(inner.downcast_ref()?));
        cause = inner.source();
    }
    match limit {
        Some(limit) => format!("{text}; {limit}"),
        None => text,
    }
}
