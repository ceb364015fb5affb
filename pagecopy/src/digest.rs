//! Content digests: seeded xxh3-128 of pages, and the checksum of frames and messages.
//!
//! The guest chooses the bytes, so the hash is seeded per session with a value the guest never sees: pages that hash
//! alike cannot be built in advance. Source: xxHash, <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>.

#[allow(unsafe_code)]
mod simd;

use vm_memory::volatile_memory::VolatileSlice;
use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::{Xxh3, Xxh3Default, xxh3_64_with_seed};

use crate::layout::PAGE_SIZE;
use crate::simd::Level;

/// Digest of a page's content: xxh3-128 under the session's secret.
pub type PageDigest = u128;

/// Hashes pages under one session's secret.
#[derive(Clone)]
pub struct PageHasher {
    secret: [u8; simd::SECRET],
    seed: u64,
    zero: PageDigest,
}

impl std::fmt::Debug for PageHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The seed stays out of logs: it is what keeps a guest from building collisions.
        f.debug_struct("PageHasher").finish_non_exhaustive()
    }
}

impl PageHasher {
    /// A hasher for the session with this seed; both sides derive the same one.
    pub fn new(seed: u64) -> Self {
        let secret = const_custom_default_secret(seed);
        let zero = simd::slice(Level::best_to_hash(), &[0; PAGE_SIZE], &secret);
        Self { secret, seed, zero }
    }

    /// Digest of one page.
    pub fn page(&self, page: &[u8; PAGE_SIZE]) -> PageDigest {
        self.page_at(Level::best_to_hash(), page)
    }

    /// [`page`](Self::page) with the CPU features named by `level`.
    pub fn page_at(&self, level: Level, page: &[u8; PAGE_SIZE]) -> PageDigest {
        simd::slice(level, page, &self.secret)
    }

    /// Digest of one page of guest memory, read once where it lies. Of a page that is written meanwhile it is some digest,
    /// which may be that of no content it ever had.
    ///
    /// # Panics
    /// When the memory is not one page.
    pub fn memory(&self, page: &VolatileSlice<'_>) -> PageDigest {
        simd::memory(Level::best_to_hash(), page, &self.secret)
    }

    /// Digest of a page of zeros.
    pub fn zero(&self) -> PageDigest {
        self.zero
    }

    /// Checksum of a frame or message, under the session's seed.
    pub fn checksum(&self, bytes: &[u8]) -> u64 {
        xxh3_64_with_seed(bytes, self.seed)
    }

    /// The same of bytes that come in pieces.
    pub fn running_checksum(&self) -> RunningChecksum {
        RunningChecksum(Box::new(Xxh3::with_seed(self.seed)))
    }
}

/// A [checksum](PageHasher::checksum) of bytes that come in pieces.
#[derive(Clone)]
pub struct RunningChecksum(Box<Xxh3>);

impl RunningChecksum {
    /// More bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Of all bytes so far.
    pub fn digest(&self) -> u64 {
        self.0.digest()
    }
}

/// xxh3-128 of content that comes in pieces, unseeded: what `xxhsum -H128` prints.
#[derive(Clone, Default)]
pub struct ContentHasher(Xxh3Default);

impl ContentHasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// The hash of all bytes so far.
    pub fn digest(&self) -> u128 {
        self.0.digest128()
    }
}

/// The part of a page's digest that travels in receipts.
pub fn receipt(digest: PageDigest) -> u64 {
    digest as u64
}

#[cfg(test)]
mod tests {
    use testkit::Rng;

    use super::*;

    #[test]
    fn seed_changes_every_digest() {
        let (a, b) = (PageHasher::new(1), PageHasher::new(2));
        let page = [7u8; PAGE_SIZE];
        assert_ne!(a.page(&page), b.page(&page));
        assert_ne!(a.zero(), b.zero());
        assert_ne!(a.checksum(b"x"), b.checksum(b"x"));
        assert_eq!(a.zero(), a.page(&[0; PAGE_SIZE]));
    }

    #[test]
    fn a_checksum_of_pieces_is_that_of_the_whole() {
        let hasher = PageHasher::new(11);
        let bytes = Rng::new(3).bytes(5000);
        for cut in [0, 1, 24, 240, 241, 1024, 4999, 5000] {
            let mut running = hasher.running_checksum();
            running.update(&bytes[..cut]);
            running.update(&bytes[cut..]);
            assert_eq!(running.digest(), hasher.checksum(&bytes), "cut at {cut}");
        }
        assert_eq!(hasher.running_checksum().digest(), hasher.checksum(&[]));
    }

    #[test]
    fn every_level_agrees_with_xxhash() {
        let mut rng = Rng::new(7);
        for seed in 0..64 {
            let hasher = PageHasher::new(seed * 0x0123_4567_89ab_cdef);
            let mut page = [0u8; PAGE_SIZE];
            for byte in &mut page {
                *byte = rng.next() as u8 & if seed % 4 == 0 { 1 } else { 0xff };
            }
            let expected = xxhash_rust::xxh3::xxh3_128_with_secret(&page, &hasher.secret);
            for level in Level::all() {
                assert_eq!(hasher.page_at(level, &page), expected, "{}", level.name());
            }
            // Neither needs alignment.
            let mut shifted = vec![0; PAGE_SIZE + 1];
            shifted[1..].copy_from_slice(&page);
            assert_eq!(hasher.memory(&VolatileSlice::from(&mut shifted[1..])), expected);
        }
    }

    #[test]
    #[should_panic(expected = "one page")]
    fn part_of_a_page_has_no_digest() {
        PageHasher::new(1).memory(&VolatileSlice::from(&mut [0u8; PAGE_SIZE - 1][..]));
    }
}
