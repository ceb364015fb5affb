//! XBZRLE: a page as the difference to its previous version, bit-compatible with QEMU's format.
//!
//! ```text
//! page  = (zrun nzrun)+
//! zrun  = ULEB128 count of bytes that stay; 0 only in the first pair
//! nzrun = ULEB128 count, not 0, and that many new bytes (the bytes themselves, not their XOR)
//! ```
//!
//! A ULEB128 here has at most 14 bits: one byte, or two of which the second has bit 7 clear. What follows the last
//! nzrun stays as it is. The encoder makes every run as long as the bytes allow, so the encoding of a pair of pages is
//! unique. Source: QEMU `docs/xbzrle.txt`, and the facts observed on its streams.

mod decode;
#[allow(unsafe_code)]
mod simd;

use std::ops::Range;

use crate::layout::PAGE_SIZE;
use crate::simd::{BORDERS_MAX, Difference, Level, borders, compare};

/// A page's content.
pub type Page = [u8; PAGE_SIZE];

/// A copy this long is done with two fixed moves instead of a call.
const SHORT_COPY: usize = 32;
/// A run this long, after fewer than 128 bytes that stay, is written in one go.
const SHORT_RUN: usize = 16;
/// With so many runs their borders are listed first, which costs as much as finding a few one by one.
const MANY_RUNS: u32 = 16;

/// What [`encode`] made of a pair of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// The pages are alike; there is nothing to send.
    Unchanged,
    /// The encoding is this many bytes long, at the start of the output.
    Len(usize),
    /// The encoding would not fit the output, whose content is now undefined.
    Overflow,
}

/// Why bytes are no encoding of a page. Offsets count from the start of the encoding, positions from the page's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// No byte at all: pages that are alike are not sent.
    #[error("the delta is empty")]
    Empty,
    /// The encoding ends where more must follow.
    #[error("the delta ends at offset {offset}, inside a run")]
    Truncated {
        /// Where it ends.
        offset: usize,
    },
    /// A length of more than two bytes.
    #[error("the length at offset {offset} of the delta takes more than two bytes")]
    LongLength {
        /// Where the length starts.
        offset: usize,
    },
    /// A run of length 0 where none may be.
    #[error("the run at offset {offset} of the delta is empty")]
    EmptyRun {
        /// Where its length starts.
        offset: usize,
    },
    /// A run that leaves the page.
    #[error(
        "the run at offset {offset} of the delta covers {length} bytes from {position}, past the page's end"
    )]
    PastEnd {
        /// Where its length starts.
        offset: usize,
        /// Where in the page it starts.
        position: usize,
        /// Its length.
        length: usize,
    },
}

/// Encodes `new` as the difference to `old` into the start of `out`, whose length is the most the encoding may take.
/// Bytes of `out` past the encoding are undefined afterwards.
pub fn encode(old: &Page, new: &Page, out: &mut [u8]) -> Encoded {
    encode_at(Level::best(), old, new, out)
}

/// [`encode`] with the CPU features named by `level`; the output is the same at every level.
pub fn encode_at(level: Level, old: &Page, new: &Page, out: &mut [u8]) -> Encoded {
    let mut difference = Difference::none();
    compare(level, old, new, &mut difference);
    if difference.touched == 0 {
        return Encoded::Unchanged;
    }
    // Every run costs its bytes and two lengths of at least one byte: refuse the hopeless before writing anything.
    if (difference.bytes + 2 * difference.runs) as usize > out.len() {
        return Encoded::Overflow;
    }
    if difference.runs < MANY_RUNS {
        return emit(&difference, new, out);
    }
    let mut list = [0; BORDERS_MAX];
    let count = borders(level, &difference, &mut list);
    emit_many(&list[..count], new, out)
}

/// Writes runs that are found one by one.
fn emit(difference: &Difference, new: &Page, out: &mut [u8]) -> Encoded {
    let (mut position, mut length) = (0, 0);
    while let Some(start) = next_changed(difference, position) {
        let end = next_same(difference, start);
        let Some(after) = put_run(new, position, start..end, out, length) else { return Encoded::Overflow };
        (position, length) = (end, after);
    }
    Encoded::Len(length)
}

/// Writes runs whose borders are listed.
fn emit_many(borders: &[u16], new: &Page, out: &mut [u8]) -> Encoded {
    let (mut position, mut length) = (0, 0);
    for &[start, end] in borders.as_chunks::<2>().0 {
        let (start, end) = (usize::from(start), usize::from(end));
        let (stay, change) = (start - position, end - start);
        // Most runs are short and near: nothing in here depends on how short.
        let after = match (
            out[length..].first_chunk_mut::<{ 2 + SHORT_RUN }>(),
            new[start..].first_chunk::<SHORT_RUN>(),
        ) {
            (Some(to), Some(from)) if stay < 0x80 && change <= SHORT_RUN => {
                (to[0], to[1]) = (stay as u8, change as u8);
                // What is written too much is overwritten by the next run.
                to[2..].copy_from_slice(from);
                length + 2 + change
            }
            _ => match put_run(new, position, start..end, out, length) {
                Some(after) => after,
                None => return Encoded::Overflow,
            },
        };
        (position, length) = (end, after);
    }
    Encoded::Len(length)
}

/// Writes the bytes from `position` to the run, which stay, and the run itself, at `length` of `out`; returns where it ends, or `None`
/// where it does not fit.
#[inline]
fn put_run(new: &Page, position: usize, run: Range<usize>, out: &mut [u8], length: usize) -> Option<usize> {
    let change = run.len();
    // Two lengths of at most two bytes each.
    let mut lengths = [0u8; 4];
    let first = put_uleb(&mut lengths, 0, run.start - position);
    let head = put_uleb(&mut lengths, first, change);
    let total = length + head + change;
    if total > out.len() {
        return None;
    }
    let short = change <= SHORT_COPY;
    if let (true, Some(to), Some(from)) = (
        short,
        out[length..].first_chunk_mut::<{ 4 + SHORT_COPY }>(),
        new[run.start..].first_chunk::<SHORT_COPY>(),
    ) {
        // Fixed sizes: what is written too much is overwritten by the next run.
        to[..4].copy_from_slice(&lengths);
        to[head..head + SHORT_COPY].copy_from_slice(from);
    } else {
        out[length..length + head].copy_from_slice(&lengths[..head]);
        out[length + head..total].copy_from_slice(&new[run]);
    }
    Some(total)
}

/// The first byte at or after `position` that differs.
#[inline]
fn next_changed(difference: &Difference, position: usize) -> Option<usize> {
    let line = position / 64;
    let here = difference.masks.get(line)? >> (position % 64);
    if here != 0 {
        return Some(position + here.trailing_zeros() as usize);
    }
    let later = difference.touched & u64::MAX.checked_shl(line as u32 + 1).unwrap_or(0);
    let line = later.trailing_zeros() as usize;
    (later != 0).then(|| line * 64 + difference.masks[line].trailing_zeros() as usize)
}

/// The first byte after `start`, which differs, that does not; the page's end if all do.
#[inline]
fn next_same(difference: &Difference, start: usize) -> usize {
    let line = start / 64;
    let run = (difference.masks[line] >> (start % 64)).trailing_ones() as usize;
    if start % 64 + run < 64 {
        return start + run;
    }
    let open = !difference.full & u64::MAX.checked_shl(line as u32 + 1).unwrap_or(0);
    if open == 0 {
        return PAGE_SIZE;
    }
    let line = open.trailing_zeros() as usize;
    line * 64 + difference.masks[line].trailing_ones() as usize
}

/// Writes a length of at most 14 bits at `at`; returns where it ends.
#[inline]
fn put_uleb(out: &mut [u8; 4], at: usize, value: usize) -> usize {
    if value < 0x80 {
        out[at] = value as u8;
        at + 1
    } else {
        out[at] = value as u8 | 0x80;
        out[at + 1] = (value >> 7) as u8;
        at + 2
    }
}

/// Applies an encoding to `page`, which holds the old version; returns the position after the last byte written.
///
/// After an error the page holds some mixture of both versions: decode into scratch.
#[inline]
pub fn decode(encoded: &[u8], page: &mut Page) -> Result<usize, DeltaError> {
    match decode::one_byte(encoded, page) {
        Some(end) => Ok(end),
        None => decode_at(Level::best(), encoded, page),
    }
}

/// [`decode()`] with the CPU features named by `level`; the page and the result are the same at every level, but for the page after
/// an error.
pub fn decode_at(level: Level, encoded: &[u8], page: &mut Page) -> Result<usize, DeltaError> {
    simd::decode(level, encoded, page)
}

/// The encoder as a plain loop over bytes: what [`encode`] must equal, and what benches compare it to.
pub fn encode_reference(old: &Page, new: &Page, out: &mut [u8]) -> Encoded {
    let (mut position, mut length) = (0, 0);
    while position < PAGE_SIZE {
        let start = position;
        while position < PAGE_SIZE && old[position] == new[position] {
            position += 1;
        }
        let stay = position - start;
        let start = position;
        while position < PAGE_SIZE && old[position] != new[position] {
            position += 1;
        }
        if position == start {
            break;
        }
        let mut lengths = [0u8; 4];
        let first = put_uleb(&mut lengths, 0, stay);
        let head = put_uleb(&mut lengths, first, position - start);
        let total = length + head + (position - start);
        if total > out.len() {
            return Encoded::Overflow;
        }
        out[length..length + head].copy_from_slice(&lengths[..head]);
        out[length + head..total].copy_from_slice(&new[start..position]);
        length = total;
    }
    if length == 0 { Encoded::Unchanged } else { Encoded::Len(length) }
}

#[cfg(test)]
mod tests {
    use super::decode::get_uleb;
    use super::*;

    fn encode_vec(old: &Page, new: &Page) -> Option<Vec<u8>> {
        let mut out = [0; PAGE_SIZE];
        match encode(old, new, &mut out) {
            Encoded::Len(length) => Some(out[..length].to_vec()),
            Encoded::Unchanged | Encoded::Overflow => None,
        }
    }

    #[test]
    fn uleb_has_fourteen_bits() {
        for value in 0..=0x3fff {
            let mut out = [0; 4];
            let end = put_uleb(&mut out, 0, value);
            assert_eq!(end, if value < 0x80 { 1 } else { 2 });
            assert_eq!(get_uleb(&out[..end], 0), Ok((value, end)));
        }
        assert_eq!(get_uleb(&[0x80, 0x80], 0), Err(DeltaError::LongLength { offset: 0 }));
        assert_eq!(get_uleb(&[0x80], 0), Err(DeltaError::Truncated { offset: 1 }));
        assert_eq!(get_uleb(&[], 0), Err(DeltaError::Truncated { offset: 0 }));
        // Not the shortest form, and accepted, as QEMU does.
        assert_eq!(get_uleb(&[0x81, 0x00], 0), Ok((1, 2)));
    }

    #[test]
    fn literal_encodings() {
        let old = [0; PAGE_SIZE];
        let mut new = old;
        assert_eq!(encode(&old, &new, &mut [0; PAGE_SIZE]), Encoded::Unchanged);
        new[0] = 9;
        assert_eq!(encode_vec(&old, &new), Some(vec![0, 1, 9]));
        new[200] = 7;
        new[201] = 8;
        assert_eq!(encode_vec(&old, &new), Some(vec![0, 1, 9, 0x80 | 71, 1, 2, 7, 8]));
        let all = [3; PAGE_SIZE];
        // 3 bytes of lengths and 4096 of content do not fit a page.
        assert_eq!(encode(&old, &all, &mut [0; PAGE_SIZE]), Encoded::Overflow);
        let mut out = [0; PAGE_SIZE + 3];
        assert_eq!(encode(&old, &all, &mut out), Encoded::Len(PAGE_SIZE + 3));
        assert_eq!(out[..4], [0, 0x80, 0x20, 3]);
    }

    #[test]
    fn the_last_byte_alone() {
        let (old, mut new) = ([1; PAGE_SIZE], [1; PAGE_SIZE]);
        new[PAGE_SIZE - 1] = 2;
        assert_eq!(encode_vec(&old, &new), Some(vec![0xff, 0x1f, 1, 2]));
        let mut page = old;
        assert_eq!(decode(&[0xff, 0x1f, 1, 2], &mut page), Ok(PAGE_SIZE));
        assert_eq!(page, new);
    }

    #[test]
    fn a_run_whose_first_byte_looks_like_a_length() {
        // 2 stay, then 3 change, to 1, 7 and 8: not a length of two bytes and a single byte.
        let mut page = [0; PAGE_SIZE];
        assert_eq!(decode(&[2, 3, 1, 7, 8, 0x80, 1, 1, 9], &mut page), Ok(134));
        assert_eq!((&page[..6], page[133]), (&[0, 0, 1, 7, 8, 0][..], 9));
    }

    #[test]
    fn alternating_bytes_overflow() {
        let old = [0; PAGE_SIZE];
        let new: Page = std::array::from_fn(|i| (i % 2) as u8);
        for level in Level::all() {
            assert_eq!(encode_at(level, &old, &new, &mut [0; PAGE_SIZE]), Encoded::Overflow);
        }
        assert_eq!(encode_reference(&old, &new, &mut [0; PAGE_SIZE]), Encoded::Overflow);
    }

    #[test]
    fn the_limit_is_exact() {
        let old = [0; PAGE_SIZE];
        let mut new = old;
        new[10..30].fill(1);
        new[1000..1005].fill(2);
        let length = encode_vec(&old, &new).unwrap().len();
        for level in Level::all() {
            assert_eq!(encode_at(level, &old, &new, &mut vec![0; length]), Encoded::Len(length));
            assert_eq!(encode_at(level, &old, &new, &mut vec![0; length - 1]), Encoded::Overflow);
            assert_eq!(encode_at(level, &old, &new, &mut []), Encoded::Overflow);
        }
    }

    #[test]
    fn malformed_deltas_are_named() {
        let mut page = [0; PAGE_SIZE];
        let mut error = |bytes: &[u8]| decode(bytes, &mut page).unwrap_err();
        assert_eq!(error(&[]), DeltaError::Empty);
        assert_eq!(error(&[5]), DeltaError::Truncated { offset: 1 });
        assert_eq!(error(&[5, 2, 1]), DeltaError::Truncated { offset: 3 });
        assert_eq!(error(&[5, 0]), DeltaError::EmptyRun { offset: 1 });
        assert_eq!(error(&[0, 1, 7, 0, 1, 7]), DeltaError::EmptyRun { offset: 3 });
        assert_eq!(error(&[0x80, 0x80, 1, 1]), DeltaError::LongLength { offset: 0 });
        assert_eq!(error(&[0x81, 0x20, 1, 1]), DeltaError::PastEnd { offset: 0, position: 0, length: 4097 });
        assert_eq!(error(&[0x80, 0x20, 1, 1]), DeltaError::PastEnd { offset: 2, position: 4096, length: 1 });
        assert_eq!(
            error(&[0xff, 0x1f, 2, 1, 1]),
            DeltaError::PastEnd { offset: 2, position: 4095, length: 2 }
        );
    }
}
