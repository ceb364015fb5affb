//! Which stream a chunk belongs to, or who reads it: rule 1, all versions of a page travel in order.

use std::sync::atomic::{AtomicU32, Ordering};

#[cfg(test)]
use crate::simulation::fault;

/// For every chunk, the stream that has frames of it under way, and how many.
///
/// A chunk with nothing under way belongs to nobody and may be claimed by any stream; one with frames under way only by
/// the stream that sent them. So two versions of a page are never under way on two streams, and rounds need no
/// barrier.
///
/// Frames also refer to pages of other chunks ([`pagecopy::chunk::Reference`]), which must stay what they are until the destination has
/// decoded the frame. That counts as one more under way, of the stream that owns the chunk, or else of *readers* together: any
/// stream may join these, and none may send pages of the chunk while they are there.
pub(crate) struct Owners {
    /// Stream in the high half, unless [`READERS`] are there; frames under way, [`COUNT`].
    chunks: Box<[AtomicU32]>,
}

/// What is under way refers to the chunk, and is of any streams.
const READERS: u32 = 1 << 15;
/// Frames under way.
const COUNT: u32 = READERS - 1;
/// Frames that may refer to a chunk at a time: what is left of the count is for frames of the chunk itself.
const LENT_MAX: u32 = COUNT / 2;

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
                let under_way = word & COUNT;
                let anothers = under_way != 0 && (word & READERS != 0 || word >> 16 != u32::from(stream));
                #[cfg(test)]
                let anothers = anothers && !fault::is(fault::Fault::NoChunkAffinity);
                if anothers {
                    return None;
                }
                assert!(under_way < COUNT, "the window bounds frames far below this");
                Some(u32::from(stream) << 16 | (under_way + 1))
            })
            .is_ok()
    }

    /// Counts one more frame under way, on `stream`, that refers to pages of `chunk`, unless another stream owns it; of a chunk of its
    /// own only where `own` allows it.
    pub(crate) fn lend(&self, chunk: u32, stream: u16, own: bool) -> bool {
        let lent = |word: u32| match word & COUNT {
            0 => Some(READERS | 1),
            LENT_MAX.. => None,
            _ => {
                let joins = word & READERS != 0 || own && word >> 16 == u32::from(stream);
                joins.then_some(word + 1)
            }
        };
        let word = &self.chunks[chunk as usize];
        #[cfg(test)]
        if fault::is(fault::Fault::ReferenceNotHeld) {
            return lent(word.load(Ordering::Acquire)).is_some();
        }
        word.fetch_update(Ordering::AcqRel, Ordering::Acquire, lent).is_ok()
    }

    /// One frame of `chunk` less, or one that refers to it, is under way.
    pub(crate) fn release(&self, chunk: u32) {
        let before = self.chunks[chunk as usize].fetch_sub(1, Ordering::Release);
        assert_ne!(before & COUNT, 0, "a release follows a claim");
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

    #[test]
    fn what_is_referred_to_is_not_sent_by_another_stream() {
        let owners = Owners::new(1);
        // Of a chunk that nobody owns any stream may be a reader, and nobody may send it.
        assert!(owners.lend(0, 1, false) && owners.lend(0, 2, true));
        assert!(!owners.claim(0, 1) && !owners.claim(0, 2));
        owners.release(0);
        assert!(!owners.claim(0, 1));
        owners.release(0);
        // Of one that a stream owns only that stream, if it may; its frames and references count together.
        assert!(owners.claim(0, 1));
        assert!(!owners.lend(0, 2, true) && !owners.lend(0, 1, false) && owners.lend(0, 1, true));
        owners.release(0);
        assert!(owners.claim(0, 1) && !owners.claim(0, 2));
        owners.release(0);
        owners.release(0);
        assert!(owners.claim(0, 2));
    }

    #[test]
    fn there_is_a_limit_to_references() {
        let owners = Owners::new(1);
        assert!((0..LENT_MAX).all(|_| owners.lend(0, 1, true)));
        assert!(!owners.lend(0, 1, true));
        owners.release(0);
        assert!(owners.lend(0, 1, true));
        // The highest id there is.
        let owners = Owners::new(1);
        assert!(owners.claim(0, u16::MAX) && !owners.claim(0, 1) && !owners.lend(0, 1, true));
        owners.release(0);
        assert!(owners.lend(0, 1, true) && !owners.claim(0, u16::MAX));
    }
}
