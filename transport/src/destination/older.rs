//! What an older copy of a guest is to the destination's workers.

use std::io;
use std::sync::Arc;

use pagecopy::layout::CHUNK_PAGES;
use pagecopy::xbzrle::Page;

/// An older copy of a guest, whose memory was laid out as it is now.
pub(crate) trait BaseCopy: Send + Sync {
    /// Of its seals.
    fn seed(&self) -> u64;

    /// Pages of a chunk that it holds and that are no zeros, with the seal of each: the low half of its digest under the seed. Asked once
    /// for each chunk, ascending, before anything of it is read.
    ///
    /// # Errors
    /// Why it cannot be read.
    fn seals(&self, chunk: u32) -> Result<(u64, [u64; CHUNK_PAGES]), String>;

    /// What reads it; one for each thread.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn reader(self: Arc<Self>) -> io::Result<Box<dyn BaseReader>>;
}

/// Reads a copy.
pub(crate) trait BaseReader {
    /// Reads pages of a chunk, each to its place. Returns which it has: those that cannot be read, or are not what their seals say, it
    /// has not.
    fn read(&mut self, chunk: u32, pages: u64) -> (u64, &[Page]);
}
