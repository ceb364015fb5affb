//! Fields of the message by which a destination says what an older copy of the guest holds.

use super::limits::at_most;
use crate::wire::{Reader, WireError, Writer};

/// Most chunks in a message; more take several.
pub const BASE_CHUNKS_MAX: usize = 1024;
/// Longest fields of a message.
pub(super) const BASE_LEN_MAX: usize = 12 + BASE_CHUNKS_MAX * (12 + 64 * 8);

/// What an older copy holds of some chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Of the seals.
    pub seed: u64,
    /// The chunks, ascending.
    pub chunks: Vec<BaseChunk>,
}

/// What it holds of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseChunk {
    /// The chunk.
    pub chunk: u32,
    /// Pages that it holds, at least one.
    pub pages: u64,
    /// The seal of each of them, ascending: the low half of the page's digest under the seed.
    pub seals: Vec<u64>,
}

impl Base {
    pub(super) fn encode(&self, w: &mut Writer) {
        w.u64(self.seed);
        w.u32(self.chunks.len() as u32);
        for BaseChunk { chunk, pages, seals } in &self.chunks {
            w.u32(*chunk);
            w.u64(*pages);
            seals.iter().for_each(|&seal| w.u64(seal));
        }
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let seed = r.u64("seed")?;
        let mut chunks = Vec::new();
        for _ in 0..r.count(BASE_CHUNKS_MAX, "chunks of a base")? {
            let (chunk, pages) = (r.u32("chunk")?, r.u64("pages")?);
            let seals = (0..pages.count_ones()).map(|_| r.u64("seal")).collect::<Result<_, _>>()?;
            chunks.push(BaseChunk { chunk, pages, seals });
        }
        Ok(Self { seed, chunks })
    }

    /// Whether it keeps within the limits.
    pub(super) fn check(&self) -> Result<(), WireError> {
        at_most(self.chunks.len(), BASE_CHUNKS_MAX, "chunks of a base")?;
        let wrong = |field, chunk: u32| Err(WireError::BadValue { field, value: chunk.into() });
        for one in &self.chunks {
            if one.pages == 0 || one.seals.len() != one.pages.count_ones() as usize {
                return wrong("chunk of a base (without pages)", one.chunk);
            }
        }
        match self.chunks.windows(2).find(|two| two[0].chunk >= two[1].chunk) {
            Some(two) => wrong("chunk of a base (out of order)", two[1].chunk),
            None => Ok(()),
        }
    }
}
