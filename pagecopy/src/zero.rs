//! Finds pages of zeros.
//!
//! Most pages of a used guest are not zero and show it in their first bytes, and a page of zeros must be read to its
//! end: so a few samples first, then a wide loop that stops at the first fold that is not zero.

use crate::bitmap::bits;
use crate::layout::{CHUNK_PAGES, PAGE_SIZE};
use crate::simd::{self, Level};

/// Whether all bytes are zero (an empty slice counts as zero).
pub fn is_zero(bytes: &[u8]) -> bool {
    is_zero_at(Level::best(), bytes)
}

/// [`is_zero`] with the CPU features named by `level`.
pub fn is_zero_at(level: Level, bytes: &[u8]) -> bool {
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return true };
    if (first | bytes[bytes.len() / 2] | last) != 0 {
        return false;
    }
    // The first word decides for nearly all of what the samples let through; it costs no call.
    if bytes.first_chunk::<8>().is_some_and(|word| u64::from_ne_bytes(*word) != 0) {
        return false;
    }
    simd::all_zero(level, bytes)
}

/// Those of `pages` that are all zero in a chunk's snapshot: page `i` lies at `i * PAGE_SIZE`.
///
/// # Panics
/// When a page of `pages` lies beyond the end of `snapshot`.
pub fn zero_pages(snapshot: &[u8], pages: u64) -> u64 {
    zero_pages_at(Level::best(), snapshot, pages)
}

/// [`zero_pages`] with the CPU features named by `level`.
pub fn zero_pages_at(level: Level, snapshot: &[u8], pages: u64) -> u64 {
    const { assert!(CHUNK_PAGES == u64::BITS as usize) };
    let mut zero = 0;
    for bit in bits(pages) {
        let start = bit as usize * PAGE_SIZE;
        zero |= u64::from(is_zero_at(level, &snapshot[start..start + PAGE_SIZE])) << bit;
    }
    zero
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::CHUNK_SIZE;

    /// Every length up to 600, every place of a single non-zero byte, at several alignments.
    #[test]
    fn finds_one_byte_anywhere() {
        for level in Level::all() {
            for align in [0, 1, 7, 31, 63] {
                for length in (0..600).chain([PAGE_SIZE]) {
                    let mut buffer = vec![0u8; align + length + 1];
                    // What lies around the slice must not count.
                    buffer[align + length] = 1;
                    assert!(is_zero_at(level, &buffer[align..align + length]));
                    for at in (0..length).step_by(1 + length / 97) {
                        buffer[align + at] = 0x80;
                        assert!(!is_zero_at(level, &buffer[align..align + length]), "{length} {at}");
                        buffer[align + at] = 0;
                    }
                }
            }
        }
    }

    #[test]
    fn masks_the_asked_pages_only() {
        let mut snapshot = vec![0u8; CHUNK_SIZE];
        snapshot[3 * PAGE_SIZE + 4095] = 1;
        snapshot[63 * PAGE_SIZE + 77] = 1;
        for level in Level::all() {
            assert_eq!(zero_pages_at(level, &snapshot, u64::MAX), !(1 << 3 | 1 << 63));
            assert_eq!(zero_pages_at(level, &snapshot, 0b1111), 0b0111);
            assert_eq!(zero_pages_at(level, &snapshot[..4 * PAGE_SIZE], 0b1010), 0b0010);
            assert_eq!(zero_pages_at(level, &[], 0), 0);
        }
    }
}
