//! Fields of the messages of postcopy.

use super::limits::at_most;
use crate::wire::{Reader, WireError, Writer};

/// Most connections of postcopy besides the one for requests.
pub const STREAMS_PUSHING_MAX: u16 = 255;
/// Most runs of missing pages in a message; more take several.
pub const MISSING_RUNS_MAX: usize = 1 << 16;

/// The same pages of some chunks that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRun {
    /// First chunk.
    pub first: u32,
    /// Number of chunks, not 0.
    pub count: u32,
    /// The pages in each of them.
    pub pages: u64,
}

/// How postcopy went, from the destination's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Pages that came after the guest.
    pub pages: u64,
    /// Times that a thread had to wait for one of them.
    pub faults: u64,
    /// Microseconds that half of these waits did not exceed.
    pub p50_us: u64,
    /// Microseconds that all but one in a hundred did not exceed.
    pub p99_us: u64,
    /// Microseconds that threads waited, all of them together.
    pub blocked_us: u64,
}

impl Arrived {
    pub(super) fn encode(&self, w: &mut Writer) {
        let Self { pages, faults, p50_us, p99_us, blocked_us } = *self;
        [pages, faults, p50_us, p99_us, blocked_us].into_iter().for_each(|value| w.u64(value));
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            pages: r.u64("pages")?,
            faults: r.u64("faults")?,
            p50_us: r.u64("p50")?,
            p99_us: r.u64("p99")?,
            blocked_us: r.u64("blocked")?,
        })
    }
}

pub(super) fn encode_runs(runs: &[ChunkRun], w: &mut Writer) {
    w.u32(runs.len() as u32);
    for run in runs {
        w.u32(run.first);
        w.u32(run.count);
        w.u64(run.pages);
    }
}

pub(super) fn decode_runs(r: &mut Reader<'_>) -> Result<Vec<ChunkRun>, WireError> {
    let mut runs = Vec::new();
    for _ in 0..r.count(MISSING_RUNS_MAX, "runs of missing pages")? {
        runs.push(ChunkRun { first: r.u32("first chunk")?, count: r.u32("chunks")?, pages: r.u64("pages")? });
    }
    Ok(runs)
}

/// Whether they keep within the limits.
pub(super) fn check_runs(runs: &[ChunkRun]) -> Result<(), WireError> {
    at_most(runs.len(), MISSING_RUNS_MAX, "runs of missing pages")?;
    match runs.iter().find(|run| run.count == 0 || run.pages == 0) {
        None => Ok(()),
        Some(run) => {
            Err(WireError::BadValue { field: "run of missing pages (empty)", value: run.first.into() })
        }
    }
}
