//! Decoding, in safe Rust: one body for all levels, into which they put what they do better.

use std::hint::select_unpredictable;

use super::{DeltaError, Page};
use crate::layout::PAGE_SIZE;

/// A run this long can be copied in one step by the level that has one.
pub(super) const SHORT: usize = 64;
/// Bytes of eight runs of a single byte after fewer than 128 that stay.
const EIGHT_RUNS: usize = 8 * 3;
/// The same, with as many more as are loaded with them.
pub(super) const EIGHT: usize = EIGHT_RUNS + 4;
/// So many single bytes in a row, and the next eight are likely to be such. Fewer, and guessing wrong costs more than it gains where
/// one run in ten is longer.
const ROW: usize = 16;

/// How far decoding is.
#[derive(Clone, Copy)]
struct Place {
    /// In the encoding: where the next run's lengths are.
    offset: usize,
    /// In the page: the end of the last run.
    position: usize,
    /// How many bytes must stay before the next run: none before the first one, then one.
    least: usize,
}

impl Place {
    /// After a run.
    #[inline(always)]
    fn after(offset: usize, position: usize) -> Self {
        Self { offset, position, least: 1 }
    }
}

/// Applies what the delta of a page amounts to of which one byte changed, such as a counter; `None` for every other. Few enough
/// instructions to be put where it is called.
#[inline(always)]
pub(super) fn one_byte(encoded: &[u8], page: &mut Page) -> Option<usize> {
    /// Of four bytes: bit 7 of the first, those bits of the second that would lead out of the page, the third.
    const FIXED: u32 = 0x00ff_e080;
    let (at, byte) = if let Ok(four) = <[u8; 4]>::try_from(encoded) {
        let word = u32::from_le_bytes(four);
        if word & FIXED != 0x0001_0080 {
            return None;
        }
        ((word & 0x7f | word >> 1 & 0xf80) as usize, four[3])
    } else if let [stay @ 0..0x80, 1, byte] = *encoded {
        (stay.into(), byte)
    } else {
        return None;
    };
    page[at] = byte;
    Some(at + 1)
}

/// Applies an encoding to `page`. `copy` copies up to [`SHORT`] bytes between slices of one length, in the same time whatever that
/// is. `eight` applies eight runs of a single byte, each after 1 to 127 bytes that stay, at the start of what it is given, from a
/// position in the page on, and returns the position after the last; or nothing, and leaves the page alone, where they are not such.
#[inline(always)]
pub(super) fn body(
    encoded: &[u8],
    page: &mut Page,
    copy: Option<&impl Fn(&mut [u8], &[u8])>,
    eight: impl Fn(&[u8; EIGHT], &mut Page, usize) -> Option<usize>,
) -> Result<usize, DeltaError> {
    if encoded.is_empty() {
        return Err(DeltaError::Empty);
    }
    let mut place = Place { offset: 0, position: 0, least: 0 };
    while place.offset < encoded.len() {
        let likely = match copy {
            Some(copy) => short_run(encoded, page, place, copy),
            None => single(encoded, page, place).map(|after| (after, 1)),
        };
        let Some((after, change)) = likely else {
            place = any_run(encoded, page, place)?;
            continue;
        };
        place = after;
        let mut row = 0;
        while change == 1
            && let Some(after) = single(encoded, page, place)
        {
            place = after;
            row += 1;
            while row >= ROW {
                let runs = encoded[place.offset..].first_chunk();
                match runs.and_then(|runs| eight(runs, page, place.position)) {
                    Some(position) => place = Place::after(place.offset + EIGHT_RUNS, position),
                    None => row = 0,
                }
            }
        }
    }
    Ok(place.position)
}

/// Applies a run of a single byte; `None` for any other, and for what is malformed.
///
/// When it is guessed to be one, the next run's place is known before this one's lengths are read.
#[inline(always)]
fn single(encoded: &[u8], page: &mut Page, at: Place) -> Option<Place> {
    let (stay, byte, length) = match encoded[at.offset..] {
        [stay @ 0..0x80, 1, byte, ..] => (usize::from(stay), byte, 3),
        [low @ 0x80..=0xff, high @ 0..0x80, 1, byte, ..] => {
            (usize::from(low & 0x7f) | usize::from(high) << 7, byte, 4)
        }
        _ => return None,
    };
    if stay < at.least {
        return None;
    }
    *page.get_mut(at.position + stay)? = byte;
    Some(Place::after(at.offset + length, at.position + stay + 1))
}

/// Applies a run of up to [`SHORT`] bytes and returns how many; `None` for any other, and for what is malformed.
///
/// Neither length is guessed: that a stay takes one byte or two is as good as random, and so is how long a run is.
#[inline(always)]
fn short_run(
    encoded: &[u8],
    page: &mut Page,
    at: Place,
    copy: impl Fn(&mut [u8], &[u8]),
) -> Option<(Place, usize)> {
    let &[first, second, third, _] = encoded[at.offset..].first_chunk()?;
    let small = first < 0x80;
    // The end of the run is what the next one waits for: both are reckoned, and then one is taken.
    let (change, end) = select_unpredictable(
        small,
        (second, at.offset + 2 + usize::from(second)),
        (third, at.offset + 3 + usize::from(third)),
    );
    let low = usize::from(first & 0x7f);
    let stay = select_unpredictable(small, low, low | usize::from(second) << 7);
    let (start, change) = (at.position + stay, usize::from(change));
    if change.wrapping_sub(1) >= SHORT || stay < at.least {
        return None;
    }
    let from = encoded.get(end - change..end)?;
    // A stay of more than two bytes, whose second has bit 7 set, leads out of the page too.
    copy(page.get_mut(start..start + change)?, from);
    Some((Place::after(end, start + change), change))
}

/// Applies whatever run there is, and says what is wrong with it.
#[inline(always)]
fn any_run(encoded: &[u8], page: &mut Page, at: Place) -> Result<Place, DeltaError> {
    let Place { offset, position, least } = at;
    let (stay, after) = get_uleb(encoded, offset)?;
    if stay < least {
        return Err(DeltaError::EmptyRun { offset });
    }
    if stay > PAGE_SIZE - position {
        return Err(DeltaError::PastEnd { offset, position, length: stay });
    }
    let (offset, position) = (after, position + stay);
    let (change, after) = get_uleb(encoded, offset)?;
    if change == 0 {
        return Err(DeltaError::EmptyRun { offset });
    }
    if change > PAGE_SIZE - position {
        return Err(DeltaError::PastEnd { offset, position, length: change });
    }
    let bytes = encoded.get(after..after + change).ok_or(DeltaError::Truncated { offset: encoded.len() })?;
    copy_run(&mut page[position..position + change], bytes);
    Ok(Place::after(after + change, position + change))
}

/// Reads a length at `at`; returns it and where it ends.
#[inline]
pub(super) fn get_uleb(encoded: &[u8], at: usize) -> Result<(usize, usize), DeltaError> {
    let low = *encoded.get(at).ok_or(DeltaError::Truncated { offset: at })?;
    if low & 0x80 == 0 {
        return Ok((low.into(), at + 1));
    }
    let high = *encoded.get(at + 1).ok_or(DeltaError::Truncated { offset: at + 1 })?;
    if high & 0x80 != 0 {
        return Err(DeltaError::LongLength { offset: at });
    }
    Ok((usize::from(low & 0x7f) | usize::from(high) << 7, at + 2))
}

/// Copies a run: a short one by two moves that may overlap, instead of a call.
#[inline(always)]
fn copy_run(to: &mut [u8], from: &[u8]) {
    #[inline(always)]
    fn ends<const N: usize>(to: &mut [u8], from: &[u8]) {
        if let (Some(to), Some(from)) = (to.first_chunk_mut::<N>(), from.first_chunk::<N>()) {
            *to = *from;
        }
        if let (Some(to), Some(from)) = (to.last_chunk_mut::<N>(), from.last_chunk::<N>()) {
            *to = *from;
        }
    }
    match to.len() {
        2..4 => ends::<2>(to, from),
        4..8 => ends::<4>(to, from),
        8..=16 => ends::<8>(to, from),
        _ => to.copy_from_slice(from),
    }
}
