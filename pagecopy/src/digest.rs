//! Content digests: seeded xxh3-128 of pages, and the checksum of frames and messages.
//!
//! The guest chooses the bytes, so the hash is seeded per session with a value the guest never sees: pages that hash
//! alike cannot be built in advance. Source: xxHash, <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>.

use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64_with_seed, xxh3_128_with_secret};

use crate::layout::PAGE_SIZE;

/// Digest of a page's content: xxh3-128 under the session's secret.
pub type PageDigest = u128;

/// Hashes pages under one session's secret.
#[derive(Clone)]
pub struct PageHasher {
    secret: [u8; 192],
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
        let zero = xxh3_128_with_secret(&[0; PAGE_SIZE], &secret);
        Self { secret, seed, zero }
    }

    /// Digest of one page.
    pub fn page(&self, page: &[u8]) -> PageDigest {
        debug_assert_eq!(page.len(), PAGE_SIZE);
        xxh3_128_with_secret(page, &self.secret)
    }

    /// Digest of a page of zeros.
    pub fn zero(&self) -> PageDigest {
        self.zero
    }

    /// Checksum of a frame or message, under the session's seed.
    pub fn checksum(&self, bytes: &[u8]) -> u64 {
        xxh3_64_with_seed(bytes, self.seed)
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
}
