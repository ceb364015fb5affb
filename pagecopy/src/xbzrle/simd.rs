//! What decoding does with vector instructions.

use super::decode::body;
#[cfg(target_arch = "x86_64")]
use super::decode::{EIGHT, SHORT};
use super::{DeltaError, Page};
#[cfg(target_arch = "x86_64")]
use crate::layout::PAGE_SIZE;
use crate::simd::{Kind, Level};

/// Applies an encoding to `page` with the CPU features named by `level`.
pub(super) fn decode(level: Level, encoded: &[u8], page: &mut Page) -> Result<usize, DeltaError> {
    match level.kind() {
        Kind::Portable => body(encoded, page, None::<&fn(&mut [u8], &[u8])>, |_, _, _| None),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => {
            // SAFETY: the function needs AVX2, and a level of this kind is only made where it was detected.
            unsafe { decode_avx2(encoded, page) }
        }
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => {
            // SAFETY: the function needs AVX2 and AVX-512 F and BW, and a level of this kind is only made where all were detected.
            unsafe { decode_avx512(encoded, page) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn decode_avx2(encoded: &[u8], page: &mut Page) -> Result<usize, DeltaError> {
    body(encoded, page, None::<&fn(&mut [u8], &[u8])>, |runs, page, position| eight(runs, page, position))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw")]
fn decode_avx512(encoded: &[u8], page: &mut Page) -> Result<usize, DeltaError> {
    let copy = |to: &mut [u8], from: &[u8]| copy_short(to, from);
    body(encoded, page, Some(&copy), |runs, page, position| eight(runs, page, position))
}

/// Copies 1 to [`SHORT`] bytes from a slice of the same length.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn copy_short(to: &mut [u8], from: &[u8]) {
    use std::arch::x86_64::{_mm512_mask_storeu_epi8, _mm512_maskz_loadu_epi8};

    let length = to.len();
    assert!(length == from.len() && length.wrapping_sub(1) < SHORT);
    let mask = u64::MAX >> (SHORT - length);
    // SAFETY: of the 64 bytes from either address only the first `length` are touched, which are in the slices.
    unsafe {
        let bytes = _mm512_maskz_loadu_epi8(mask, from.as_ptr().cast::<i8>());
        _mm512_mask_storeu_epi8(to.as_mut_ptr().cast::<i8>(), mask, bytes);
    }
}

/// Eight runs of a single byte, as [`body`] wants them: their positions are sums, which are made for all of them at once.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn eight(runs: &[u8; EIGHT], page: &mut Page, position: usize) -> Option<usize> {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi16, _mm_cvtsi128_si64, _mm_extract_epi16, _mm_extract_epi32, _mm_extract_epi64,
        _mm_loadu_si128, _mm_or_si128, _mm_set1_epi16, _mm_setr_epi8, _mm_setr_epi16, _mm_shuffle_epi8,
        _mm_slli_si128, _mm_sub_epi8, _mm_subs_epu8, _mm_testz_si128, _mm_unpacklo_epi64,
    };

    // SAFETY: unaligned loads of the bytes from 0 to 15 and from 12 to 27, of 28.
    let halves: [__m128i; 2] =
        unsafe { [0, 12].map(|from| _mm_loadu_si128(runs.as_ptr().add(from).cast::<__m128i>())) };
    // A stay may be 1 to 127, a change 1, a byte anything: how far each is above the least that it may be, and what of that is
    // above the most. Without comparisons, of which the compiler would make detours by way of mask registers.
    let least = _mm_setr_epi8(1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0);
    let range = _mm_setr_epi8(126, 0, -1, 126, 0, -1, 126, 0, -1, 126, 0, -1, -1, -1, -1, -1);
    let [first, second] = halves.map(|half| _mm_subs_epu8(_mm_sub_epi8(half, least), range));
    let wrong = _mm_or_si128(first, second);
    if _mm_testz_si128(wrong, wrong) == 0 {
        return None;
    }
    // Four stays as words, then the four bytes.
    let apart = _mm_setr_epi8(0, -1, 3, -1, 6, -1, 9, -1, 2, 5, 8, 11, -1, -1, -1, -1);
    let halves = halves.map(|half| _mm_shuffle_epi8(half, apart));
    let mut sums = _mm_unpacklo_epi64(halves[0], halves[1]);
    sums = _mm_add_epi16(sums, _mm_slli_si128(sums, 2));
    sums = _mm_add_epi16(sums, _mm_slli_si128(sums, 4));
    sums = _mm_add_epi16(sums, _mm_slli_si128(sums, 8));
    // From the sums alone: the next eight wait for this, and need not wait for the positions.
    let end = position + _mm_extract_epi16(sums, 7) as usize + 8;
    if end > PAGE_SIZE {
        return None;
    }
    sums = _mm_add_epi16(sums, _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
    sums = _mm_add_epi16(sums, _mm_set1_epi16(position as i16));
    let slots = [_mm_cvtsi128_si64(sums), _mm_extract_epi64(sums, 1)];
    let bytes = halves.map(|half| _mm_extract_epi32(half, 2));
    for (slots, bytes) in slots.into_iter().zip(bytes) {
        for i in 0..4 {
            // All are below `end`; the remainder spares a comparison.
            page[(slots >> (16 * i)) as u16 as usize % PAGE_SIZE] = (bytes >> (8 * i)) as u8;
        }
    }
    Some(end)
}
