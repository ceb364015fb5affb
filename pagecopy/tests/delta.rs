//! XBZRLE against its plain scalar form, over many random pairs of pages, and against arbitrary bytes.

use pagecopy::layout::PAGE_SIZE;
use pagecopy::simd::Level;
use pagecopy::xbzrle::{DeltaError, Encoded, Page, decode, decode_at, encode, encode_at, encode_reference};
use proptest::prelude::*;
use testkit::Rng;

/// Changes some of a page: mostly a few short runs, now and then long ones, and sometimes bytes to what they were.
fn change(random: &mut Rng, page: &mut Page) {
    let longest = [1, 2, 9, 40, 64, 130, 700, PAGE_SIZE][random.index(8)];
    let most = [2, 4, 30, 80][random.index(4)];
    for _ in 0..=random.index(most) {
        let start = random.index(PAGE_SIZE);
        let end = (start + 1 + random.index(longest)).min(PAGE_SIZE);
        let (xor, step) = (random.next() as u8, 1 + random.index(3));
        page[start..end].iter_mut().step_by(step).for_each(|byte| *byte ^= xor);
    }
}

/// Decodes at every level, which must agree.
fn decode_everywhere(encoded: &[u8], page: &mut Page) -> Result<usize, DeltaError> {
    let old = *page;
    let result = decode(encoded, page);
    for level in Level::all() {
        let mut other = old;
        assert_eq!(decode_at(level, encoded, &mut other), result, "{} on {encoded:?}", level.name());
        assert!(result.is_err() || other == *page, "{} makes another page of {encoded:?}", level.name());
    }
    result
}

/// One pair at every level against the reference; and back.
fn check(old: &Page, new: &Page, max: usize) {
    let (mut want, mut got) = ([0u8; 2 * PAGE_SIZE], [0u8; 2 * PAGE_SIZE]);
    let reference = encode_reference(old, new, &mut want[..max]);
    for level in Level::all() {
        let encoded = encode_at(level, old, new, &mut got[..max]);
        assert_eq!(encoded, reference, "{} limit {max}", level.name());
        if let Encoded::Len(length) = encoded {
            assert!(got[..length] == want[..length], "{} differs from the reference", level.name());
        }
    }
    match reference {
        Encoded::Unchanged => assert!(old == new),
        Encoded::Overflow => {}
        Encoded::Len(length) => {
            let mut page = *old;
            let end = decode_everywhere(&want[..length], &mut page).expect("an encoding decodes");
            assert!(page == *new, "the delta does not make the new page");
            assert!(old[end..] == new[end..]);
        }
    }
}

#[test]
fn equals_the_reference_on_many_pairs() {
    let mut random = Rng::new(42);
    let mut old = [0u8; PAGE_SIZE];
    for round in 0..100_000 {
        let mut new = old;
        change(&mut random, &mut new);
        let max = if round % 3 == 0 { 1 + random.index(PAGE_SIZE) } else { 2 * PAGE_SIZE };
        check(&old, &new, max);
        old = new;
    }
}

#[test]
fn a_million_pairs_come_back() {
    let mut random = Rng::new(7);
    let mut out = [0u8; 2 * PAGE_SIZE];
    let (mut old, mut deltas) = ([0u8; PAGE_SIZE], 0);
    for _ in 0..1_000_000 {
        let mut new = old;
        change(&mut random, &mut new);
        if let Encoded::Len(length) = encode(&old, &new, &mut out) {
            let mut page = old;
            decode(&out[..length], &mut page).expect("an encoding decodes");
            assert!(page == new);
            deltas += 1;
        } else {
            assert!(old == new);
        }
        old = new;
    }
    assert!(deltas > 900_000);
}

/// The shapes of QEMU's own unit test: one range of random bytes in a page, anywhere.
#[test]
fn one_random_range() {
    let mut random = Rng::new(3);
    for _ in 0..10_000 {
        let mut old = [0u8; PAGE_SIZE];
        old[..1000].iter_mut().for_each(|byte| *byte = random.next() as u8);
        let mut new = old;
        let start = random.index(PAGE_SIZE);
        let end = start + random.index(PAGE_SIZE - start);
        new[start..end].iter_mut().for_each(|byte| *byte = random.next() as u8);
        check(&old, &new, PAGE_SIZE);
    }
}

#[test]
fn every_single_byte_and_every_single_run() {
    let old = [0x55u8; PAGE_SIZE];
    for at in 0..PAGE_SIZE {
        let mut new = old;
        new[at] ^= 1;
        check(&old, &new, PAGE_SIZE);
        new[..at].fill(9);
        check(&old, &new, 2 * PAGE_SIZE);
    }
}

/// Single bytes, each distance apart for which a length takes one byte or just two, also with one more among them or some missing.
#[test]
fn rows_of_single_bytes() {
    for step in 2..140 {
        let (old, mut new) = ([0x55u8; PAGE_SIZE], [0x55u8; PAGE_SIZE]);
        new.iter_mut().skip(step % 7).step_by(step).for_each(|byte| *byte ^= 1);
        check(&old, &new, 2 * PAGE_SIZE);
        for at in (0..PAGE_SIZE).step_by(61) {
            let mut odd = new;
            odd[at] ^= 2;
            check(&old, &odd, 2 * PAGE_SIZE);
            odd[at..PAGE_SIZE.min(at + 130)].copy_from_slice(&old[at..PAGE_SIZE.min(at + 130)]);
            check(&old, &odd, 2 * PAGE_SIZE);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn any_bytes_are_an_error_or_a_page(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut page = [0u8; PAGE_SIZE];
        if let Ok(end) = decode_everywhere(&bytes, &mut page) {
            prop_assert!(end <= PAGE_SIZE && page[end..].iter().all(|&byte| byte == 0));
        }
    }

    /// Bytes with small lengths get further into the decoder.
    #[test]
    fn likely_bytes_are_an_error_or_a_page(bytes in prop::collection::vec(0u8..6, 0..300)) {
        let mut page = [9u8; PAGE_SIZE];
        if let Ok(end) = decode_everywhere(&bytes, &mut page) {
            prop_assert!(end <= PAGE_SIZE && page[end..].iter().all(|&byte| byte == 9));
        }
    }

    /// Runs that are nearly all of a single byte, as many as there are in a row, and what does not belong among them.
    #[test]
    fn rows_of_single_bytes_are_an_error_or_a_page(
        runs in prop::collection::vec((0u32..60, 1u8..0x80, any::<u8>(), any::<[u8; 3]>()), 0..200),
        cut in 0usize..4,
    ) {
        let mut bytes = vec![0, 1, 7];
        for (kind, stay, byte, odd) in runs {
            match kind {
                0 => bytes.extend(odd),
                1 => bytes.extend([stay, 2, byte, odd[0]]),
                2 => bytes.extend([stay | 0x80, odd[0] % 4, 1, byte]),
                3 if odd[0] < 64 => bytes.extend([stay | 0x80, odd[1], 2, byte, odd[2]]),
                4 if odd[0] < 64 => bytes.extend([0, 1, byte]),
                _ => bytes.extend([stay % 24 + 1, 1, byte]),
            }
        }
        bytes.truncate(bytes.len() - cut);
        let mut page = [9u8; PAGE_SIZE];
        if let Ok(end) = decode_everywhere(&bytes, &mut page) {
            prop_assert!(end <= PAGE_SIZE && page[end..].iter().all(|&byte| byte == 9));
        }
    }
}
