//! Chunks that are encoded by themselves: of memory that nobody writes any more, each page once.

use vm_memory::volatile_memory::VolatileSlice;

use super::{ChunkEncoder, EncodedChunk};
use crate::bitmap::runs;
use crate::choose::{EncodeKind, Plan, Took};
use crate::digest::PageHasher;
use crate::layout::PAGE_SIZE;

impl ChunkEncoder {
    /// [`encode_as`](Self::encode_as), or where the plan is [in place](Plan::in_place) [`survey`](Self::survey), for pages that nobody
    /// writes any more and that are sent once: without deltas and references. What was sent before does not matter, and nothing is
    /// noted. `snapshot` has room for the chunk; the pages are copied there where they are not looked at in place.
    ///
    /// # Panics
    /// When a page lies beyond the end of `memory` or of `snapshot`.
    pub fn encode_alone(
        &mut self,
        plan: Plan,
        hasher: &PageHasher,
        memory: &VolatileSlice<'_>,
        snapshot: &mut [u8],
        pages: u64,
    ) -> EncodedChunk<'_> {
        let start = (self.clocks.now)();
        let in_place = plan.in_place(true);
        let zero = if in_place {
            self.hash_memory(hasher, memory, pages)
        } else {
            for (first, count) in runs(pages) {
                let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
                let piece = memory.subslice(at, len).expect("the pages lie in the chunk's memory");
                piece.copy_to(&mut snapshot[at..at + len]);
            }
            self.hash(hasher, snapshot.as_chunks().0, pages)
        };
        let rest = pages & !zero;
        let bytes = |pages: u64| u64::from(pages.count_ones()) * PAGE_SIZE as u64;
        let took = Took::ran(start, (self.clocks.now)());
        self.observe(EncodeKind::Scan, bytes(pages), bytes(rest), took);
        self.references.clear();
        let (zstd, end) =
            if in_place { (0, 0) } else { self.frame(None, snapshot.as_chunks().0, rest, plan, 0) };
        EncodedChunk {
            zero,
            unchanged: 0,
            delta: 0,
            zstd,
            raw: rest & !zstd,
            references: &[],
            encoded: &self.section[..end],
            digests: &self.digests,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{clocks, snapshot};
    use super::*;
    use crate::choose::CodecMode;
    use crate::chunk::ChunkDecoder;
    use crate::layout::CHUNK_SIZE;

    #[test]
    fn alone_every_page_goes_its_way_whatever_was_sent_before() {
        let hasher = PageHasher::new(9);
        let mut bytes = snapshot();
        let original = bytes.clone();
        let memory = VolatileSlice::from(&mut bytes[..]);
        for (mode, zstd) in [(CodecMode::Raw, 0), (CodecMode::Zstd { level: Some(3) }, 0b1010)] {
            let mut encoder = ChunkEncoder::new(mode, clocks()).referring(true).each_once();
            let mut scratch = vec![7; CHUNK_SIZE];
            for _ in 0..2 {
                let plan = encoder.plan(1, 0);
                let encoded = encoder.encode_alone(plan, &hasher, &memory, &mut scratch, 0b1111);
                assert_eq!((encoded.zero, encoded.zstd, encoded.raw), (1, zstd, 0b1110 & !zstd), "{mode}");
                assert_eq!((encoded.unchanged, encoded.delta, encoded.references), (0, 0, &[][..]));
                for (digest, page) in encoded.digests.iter().zip(original.as_chunks().0).take(4) {
                    assert_eq!(*digest, hasher.page(page), "{mode}");
                }
                let mut decoder = ChunkDecoder::new();
                let decoded = decoder.decode(0, zstd, encoded.encoded, |_, _| unreachable!()).unwrap();
                for (bit, page) in decoded.iter() {
                    assert!(page[..] == original[bit as usize * PAGE_SIZE..][..PAGE_SIZE], "{mode}");
                }
                assert_eq!(decoded.compressed().len() as u32, zstd.count_ones());
            }
        }
    }
}
