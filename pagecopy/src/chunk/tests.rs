//! Chunks: what is encoded, and that it decodes to the same.

use testkit::Rng;

use super::*;
use crate::xbzrle::DeltaError;

pub(super) fn clocks() -> Clocks {
    Clocks { now: || 0, worked: || 0 }
}

fn shared() -> Shared {
    Shared::new(PageHasher::new(9), 4, 8 << 20)
}

/// Page 0 zeros, 1 text, 2 random, 3 text.
pub(super) fn snapshot() -> Vec<u8> {
    let mut bytes = vec![0; CHUNK_SIZE];
    let text = include_bytes!("../chunk.rs");
    bytes[PAGE_SIZE..2 * PAGE_SIZE].copy_from_slice(&text[..PAGE_SIZE]);
    bytes[3 * PAGE_SIZE..4 * PAGE_SIZE].copy_from_slice(&text[PAGE_SIZE..2 * PAGE_SIZE]);
    bytes[2 * PAGE_SIZE..3 * PAGE_SIZE].copy_from_slice(&Rng::new(1).bytes(PAGE_SIZE));
    bytes
}

#[test]
fn a_survey_finds_what_encoding_finds() {
    let (a, b) = (shared(), shared());
    let mut bytes = snapshot();
    let mut encoder = ChunkEncoder::new(CodecMode::Raw, clocks());
    let plan = encoder.plan(1, 0);
    assert!(plan.in_place(true) && !plan.in_place(false));
    let job = Job { chunk: 1, snapshot: &bytes, pages: 0b1110, first_pass: true };
    let encoded = encoder.encode_as(plan, &a, job, &mut |_, _| false);
    let (masks, digests) = ((encoded.zero, encoded.raw, encoded.unchanged), *encoded.digests);
    let memory = VolatileSlice::from(&mut bytes[..]);
    let surveyed = encoder.survey(&b, 1, &memory, 0b1110);
    assert_eq!((surveyed.zero, surveyed.raw, surveyed.unchanged), masks);
    assert_eq!(surveyed.digests[1..4], digests[1..4]);
    // What it found counts as sent.
    let again = encoder.survey(&b, 1, &memory, 0b1111);
    assert_eq!((again.zero, again.raw, again.unchanged), (1, 0, 0b1110));
    assert!(again.encoded.is_empty());
}

#[test]
fn every_page_goes_its_way() {
    let shared = shared();
    let mut encoder = ChunkEncoder::new(CodecMode::Zstd { level: Some(1) }, clocks());
    let mut bytes = snapshot();
    let first = encoder.encode(&shared, 1, &bytes, 0b1111, true);
    assert_eq!((first.zero, first.unchanged, first.delta), (1, 0, 0));
    assert_eq!((first.zstd, first.raw), (0b1010, 0b100));
    assert_eq!(first.digests[2], shared.hasher.page(&bytes.as_chunks().0[2]));
    let mut decoder = ChunkDecoder::new();
    let decoded = decoder.decode(0, first.zstd, first.encoded, |_, _| unreachable!()).unwrap();
    assert_eq!(decoded.page(3).unwrap()[..], bytes[3 * PAGE_SIZE..4 * PAGE_SIZE]);
    assert_eq!(decoded.page(2), None);

    // All as last sent, also the zeros; then only what changed.
    let second = encoder.encode(&shared, 1, &bytes, 0b1111, false);
    assert_eq!((second.unchanged, second.encoded.len()), (0b1111, 0));
    bytes[0] = 1;
    bytes[3 * PAGE_SIZE..4 * PAGE_SIZE].fill(0);
    let third = encoder.encode(&shared, 1, &bytes, 0b1111, false);
    assert_eq!((third.zero, third.unchanged, third.zstd), (0b1000, 0b0110, 1));
    // Void pages are sent again whatever they hold.
    shared.void(1, 0b1100);
    let fourth = encoder.encode(&shared, 1, &bytes, 0b1111, false);
    assert_eq!((fourth.zero, fourth.unchanged, fourth.raw), (0b1000, 0b0011, 0b100));
}

#[test]
fn a_delta_is_literal_and_needs_a_base_that_was_sent() {
    let shared = shared();
    let mut encoder = ChunkEncoder::new(CodecMode::Delta, clocks());
    let mut bytes = snapshot();
    encoder.encode(&shared, 0, &bytes, 0b101, true);
    bytes[2] = 7;
    bytes[2 * PAGE_SIZE + 300] ^= 1;
    let changed = bytes[2 * PAGE_SIZE + 300];
    let second = encoder.encode(&shared, 0, &bytes, 0b101, false);
    assert_eq!((second.delta, second.raw), (0b101, 0));
    assert_eq!(second.encoded, [3, 0, 2, 1, 7, 4, 0, 0x80 | 44, 2, 1, changed]);
    shared.void(0, u64::MAX);
    bytes[2] = 8;
    bytes[2 * PAGE_SIZE] ^= 1;
    let third = encoder.encode(&shared, 0, &bytes, 0b101, false);
    assert_eq!((third.delta, third.raw), (0, 0b101));
}

/// A chunk whose page 5 is half of page 2 of chunk 3, and what chunk 3 is.
fn alike() -> (Vec<u8>, Vec<u8>) {
    let text: Vec<u8> =
        (0..2 * PAGE_SIZE as u32).flat_map(|i| [b'a' + (i * i % 23) as u8, (i / 7) as u8]).collect();
    let mut rng = Rng::new(9);
    let mixed: Vec<u8> = text.iter().map(|byte| byte ^ rng.below(4) as u8).collect();
    let (mut held, mut sent) = (vec![0; CHUNK_SIZE], vec![0; CHUNK_SIZE]);
    held[2 * PAGE_SIZE..3 * PAGE_SIZE].copy_from_slice(&mixed[..PAGE_SIZE]);
    sent[5 * PAGE_SIZE..6 * PAGE_SIZE].copy_from_slice(&mixed[PAGE_SIZE / 2..PAGE_SIZE / 2 + PAGE_SIZE]);
    (held, sent)
}

#[test]
fn pages_refer_to_what_resembles_them_and_was_sent_as_it_is() {
    let (mut held, sent) = alike();
    let mode = CodecMode::Zstd { level: Some(2) };
    let first = Job { chunk: 3, snapshot: &held, pages: 0b10_0100, first_pass: true };
    let job = Job { chunk: 0, snapshot: &sent, pages: 0b10_0000, first_pass: true };
    // Chunk 3 was sent.
    let begun = || {
        let (shared, mut encoder) = (shared(), ChunkEncoder::new(mode, clocks()).referring(true));
        let plan = encoder.plan(3, 0);
        encoder.encode_as(plan, &shared, first, &mut |_, _| panic!("nothing is known yet"));
        (shared, encoder, plan)
    };
    let lend = |held: &[u8], reference: Reference, pages: &mut [Page]| {
        for (page, bit) in pages.iter_mut().zip(bits(reference.pages)) {
            page.copy_from_slice(&held[bit as usize * PAGE_SIZE..][..PAGE_SIZE]);
        }
        true
    };
    let (shared, mut encoder, plan) = begun();
    let mut refused = Vec::new();
    let encoded = encoder.encode_as(plan, &shared, job, &mut |reference, _| {
        refused.push(reference);
        false
    });
    let alone = encoded.encoded.len();
    assert_eq!(refused, [Reference { chunk: 3, pages: 0b100 }]);
    assert!(encoded.references.is_empty());

    let (shared, mut encoder, plan) = begun();
    let encoded = encoder.encode_as(plan, &shared, job, &mut |r, pages| lend(&held, r, pages));
    assert_eq!(encoded.references, [Reference { chunk: 3, pages: 0b100 }]);
    assert_eq!(encoded.encoded[..13], [1, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    assert!(encoded.encoded.len() < alone * 3 / 4, "{} of {alone}", encoded.encoded.len());
    let mut decoder = ChunkDecoder::new();
    let announced = Announced { delta: 0, zstd: encoded.zstd, references: true };
    let decoded = decoder
        .decode_with(announced, encoded.encoded, |_, _| unreachable!(), |r, pages| lend(&held, r, pages))
        .unwrap();
    assert!(decoded.page(5).unwrap()[..] == sent[5 * PAGE_SIZE..6 * PAGE_SIZE]);
    let refuse = decoder.decode_with(announced, encoded.encoded, |_, _| unreachable!(), |_, _| false);
    assert_eq!(refuse.unwrap_err(), DecodeError::ReferenceUnknown { chunk: 3, pages: 4 });

    // What may have got lost is not asked for.
    let (shared, mut encoder, plan) = begun();
    shared.void(3, u64::MAX);
    encoder.encode_as(plan, &shared, job, &mut |_, _| panic!("nothing is known any more"));

    // The guest has written since: what is lent is not what the destination has.
    let (shared, mut encoder, plan) = begun();
    held[2 * PAGE_SIZE] ^= 1;
    let encoded = encoder.encode_as(plan, &shared, job, &mut |r, pages| lend(&held, r, pages));
    assert!(encoded.references.is_empty());
    assert_eq!(encoded.encoded.len(), alone);
}

#[test]
fn references_that_no_encoder_makes_are_named() {
    let mut decoder = ChunkDecoder::new();
    let mut error = |bytes: &[u8]| {
        let announced = Announced { delta: 0, zstd: u64::MAX, references: true };
        decoder.decode_with(announced, bytes, |_, _| unreachable!(), |_, _| true).unwrap_err()
    };
    let list = |entries: &[(u32, u64)]| {
        let mut list = vec![entries.len() as u8];
        for (chunk, pages) in entries {
            list.extend_from_slice(&chunk.to_le_bytes());
            list.extend_from_slice(&pages.to_le_bytes());
        }
        list.push(0);
        list
    };
    assert_eq!(error(&[]), DecodeError::ReferencesCut);
    assert_eq!(error(&[0, 1]), DecodeError::ReferenceCount { count: 0, what: "chunks" });
    assert_eq!(error(&[65, 1]), DecodeError::ReferenceCount { count: 65, what: "chunks" });
    let one = list(&[(1, 1)]);
    assert_eq!(error(&one[..12]), DecodeError::ReferencesCut);
    assert_eq!(error(&one[..13]), DecodeError::ReferencesCut);
    assert!(matches!(error(&one), DecodeError::Frame { .. }));
    assert_eq!(error(&list(&[(1, 0)])), DecodeError::ReferenceOrder { chunk: 1, pages: 0 });
    assert_eq!(error(&list(&[(1, 2), (1, 4)])), DecodeError::ReferenceOrder { chunk: 1, pages: 4 });
    assert_eq!(error(&list(&[(2, 2), (1, 4)])), DecodeError::ReferenceOrder { chunk: 1, pages: 4 });
    let many = error(&list(&[(1, u64::MAX), (2, 1)]));
    assert_eq!(many, DecodeError::ReferenceCount { count: 65, what: "pages" });
    // Without a frame there is nothing that they are for.
    let announced = Announced { delta: 0, zstd: 0, references: true };
    let result = decoder.decode_with(announced, &[], |_, _| unreachable!(), |_, _| true);
    assert_eq!(result.unwrap_err(), DecodeError::ReferencesCut);
}

#[test]
fn refuses_what_no_encoder_makes() {
    let mut decoder = ChunkDecoder::new();
    let mut error =
        |delta, zstd, bytes: &[u8]| decoder.decode(delta, zstd, bytes, |_, p| p.fill(0)).unwrap_err();
    assert_eq!(error(3, 2, &[]), DecodeError::MasksOverlap { pages: 2 });
    assert_eq!(error(0, 0, &[1]), DecodeError::TooLong { bytes: 1, most: 0 });
    assert_eq!(error(1, 0, &[]), DecodeError::Truncated { bit: 0, end: 0 });
    assert_eq!(error(2, 0, &[4, 0, 0, 1, 9]), DecodeError::Truncated { bit: 1, end: 5 });
    assert_eq!(error(1, 0, &[0, 0]), DecodeError::DeltaLength { bit: 0, length: 0 });
    let long = [&2731u16.to_le_bytes()[..], &[0; 2731]].concat();
    assert_eq!(error(1, 0, &long), DecodeError::DeltaLength { bit: 0, length: 2731 });
    assert_eq!(error(1, 0, &[3, 0, 0, 1, 9, 9]), DecodeError::Trailing { bytes: 1 });
    let source = DeltaError::EmptyRun { offset: 1 };
    assert_eq!(error(1, 0, &[2, 0, 0, 0]), DecodeError::Delta { bit: 0, source });
    assert!(matches!(error(0, 4, &[]), DecodeError::Frame { pages: 4, .. }));
    assert!(matches!(error(0, 4, &[9; 100]), DecodeError::Frame { pages: 4, .. }));
}
