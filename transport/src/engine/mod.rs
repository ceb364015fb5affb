//! The engine: drives a migration from end to end over the three crates.

mod awaited;
pub mod destination;
pub mod events;
pub mod migration;
pub mod plan;
pub mod progress;
pub mod report;
mod runtime;
pub mod source;
pub mod tuning;
mod usage;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::rdma::RdmaOptions;
use crate::socket::Tls;
use crate::source::HostShare;
use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::choose::CodecMode;
use pagecopy::digest::ContentHasher;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use tokio::runtime::Handle;

/// Chunks that are scanned for holes at a time (64 GiB): each scan of a full file walks it to its end, so there should be few.
const SCAN_CHUNKS: u32 = 1 << 18;

/// Data streams at most.
const STREAMS_MAX: u16 = 256;

/// What a user may set once and for all, of both sides; the builders have it. What may change while a migration runs is
/// [`Tuning`](tuning::Tuning).
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Data streams, 1 to 256.
    pub(crate) streams: u16,
    /// Codec choice.
    pub(crate) codec: CodecMode,
    /// Rounds after which postcopy begins, if the guest was not handed over by then.
    pub(crate) postcopy_after_rounds: Option<u64>,
    /// The archive that one stands on which is saved; or which is loaded, where that is not where it says; or an older copy of a guest that
    /// comes from a peer.
    pub(crate) base: Option<PathBuf>,
    /// A guest that is loaded from a file is to run before its pages are here.
    pub(crate) on_demand: bool,
    /// The guest is saved as of one instant, while it runs on.
    pub(crate) snapshot: bool,
    /// Source: all of memory is compared with what was sent, once the guest stands still.
    pub(crate) final_check: bool,
    /// Source: the destination is told which of the guest's memory is dense.
    pub(crate) dense: bool,
    /// A guest that was saved runs on.
    pub(crate) resume_after_save: bool,
    /// Silence after which a peer, or a stream, is given up.
    pub(crate) timeout: Duration,
    /// How long connections that were lost may take to be made anew before the migration fails; zero: it fails at once. A
    /// destination waits as long as its source, and no longer than this.
    pub(crate) reconnect_timeout: Duration,
    /// Bound of the delta cache, in bytes.
    pub(crate) cache_bytes: u64,
    /// How long a destination that is READY waits for GO after it lost its source.
    pub(crate) handover_timeout: Duration,
    /// How long a destination whose guest misses pages waits for a source that it lost, before it gives the guest up.
    pub(crate) postcopy_timeout: Duration,
    /// What protects the connections of a session.
    pub(crate) tls: Option<Tls>,
    /// A destination may listen without that where others can reach it.
    pub(crate) insecure: bool,
    /// How memory is registered for RDMA.
    pub(crate) rdma: RdmaOptions,
    /// What a source shares with the host's other migrations, which are given the same; `None`: nothing.
    pub(crate) shared: Option<Arc<HostShare>>,
    /// The runtime for control links, where the process has one already: with I/O and time enabled, and there for longer than the
    /// migration, which blocks its thread: none of this runtime's own may be that one. `None`: all sources of the process share one, and
    /// a destination has its own.
    pub(crate) runtime: Option<Handle>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            streams: 4,
            codec: CodecMode::Auto,
            postcopy_after_rounds: None,
            base: None,
            on_demand: false,
            snapshot: false,
            final_check: false,
            dense: false,
            resume_after_save: false,
            timeout: Duration::from_secs(10),
            reconnect_timeout: Duration::from_secs(300),
            cache_bytes: 64 << 20,
            handover_timeout: Duration::from_secs(60),
            postcopy_timeout: Duration::from_secs(600),
            tls: None,
            insecure: false,
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
