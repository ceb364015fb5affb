//! Which stream a chunk belongs to: rule 1, all versions of a page travel in order.

use std::sync::atomic::{AtomicU32, Ordering};

#[cfg(test)]
use crate::simulation::fault;

/// For every chunk, the stream that has frames of it under way, and how many.
///
/// A chunk with nothing under way belongs to nobody and may be claimed by any stream; one with frames under way only by
/// the stream that sent them. So two versions of a page are never under way on two streams, and rounds need no
/// barrier.
pub(crate) struct Owners {
    /// Stream in the high half, frames under way in the low half.
    chunks: Box<[AtomicU32]>,
}

impl Owners {
    pub(crate) fn new(chunks: u32) -> Self {
        // Zeroed by the system, where it is touched: a large guest may be mostly holes.
        Self { chunks: bytemuck::zeroed_slice_box(chunks as usize) }
    }

    /// Counts one more frame of `chunk` under way on `stream`, unless another stream has some.
    pub(crate) fn claim(&self, chunk: u32, stream: u16) -> bool {
        // Acquire pairs with the release in `release`: what the last owner did to the chunk's digests is seen.
        self.chunks[chunk as usize]
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                let under_way = word & 0xffff;
                let anothers = under_way != 0 && word >> 16 != u32::from(stream);
                #[cfg(test)]
                let anothers = anothers && !fault::is(fault::Fault::NoChunkAffinity);
                if anothers {
                    return None;
                }
                assert!(under_way < 0xffff, "the window bounds frames far below this");
                Some(u32::from(stream) << 16 | (under_way + 1))
            })
            .is_ok()
    }

    /// One frame of `chunk` less is under way.
    pub(crate) fn release(&self, chunk: u32) {
        let before = self.chunks[chunk as usize].fetch_sub(1, Ordering::Release);
        assert_ne!(before & 0xffff, 0, "a release follows a claim");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_changes_stream_only_when_nothing_is_under_way() {
        let owners = Owners::new(2);
        assert!(owners.claim(0, 3));
        assert!(owners.claim(0, 3));
        assert!(!owners.claim(0, 1));
        assert!(owners.claim(1, 1));
        owners.release(0);
        assert!(!owners.claim(0, 1));
        owners.release(0);
        assert!(owners.claim(0, 1));
        assert!(!owners.claim(0, 3));
    }
}
