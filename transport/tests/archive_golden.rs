//! Literal bytes of every structure of an archive: `docs/archive.md` and the code say the same.

use pagecopy::backend::StateBlob;
use pagecopy::digest::PageHasher;
use pagecopy::layout::Region;
use transport::archive::format::{
    Base, Footer, FrameHeader, FrameKind, Header, IndexEntry, MAGIC, Record, RecordKind,
    decode_state_payload, encode_state_payload, feature, pad, pad_zeros,
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn assert_bytes(what: &str, bytes: &[u8], golden: &str) {
    let golden = golden.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(hex(bytes), golden, "{what}");
    let page = include_str!("../../docs/archive.md").split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(page.contains(&golden), "docs/archive.md has no vector of {what}");
}

fn header() -> Header {
    Header {
        version: 1,
        features: feature::ZSTD | feature::BASE,
        id: [0x11; 16],
        seed: 7,
        created: 0x6a00_0000,
        live: true,
        data_bytes: 12288,
        regions: vec![Region::new("ram", 0, 16384)],
        machine: "m".into(),
        base: Some(Base { id: [0x22; 16], name: "b".into() }),
    }
}

#[test]
fn magic_header_and_its_record() {
    assert_bytes("magic", &MAGIC, "50 47 46 41 52 43 48 31");
    let payload = header().encode();
    assert_bytes(
        "the header",
        &payload,
        "01 00 01 00 00 10 00 00 40 00 00 00 03 00 00 00 00 00 00 00 11 11 11 11
         11 11 11 11 11 11 11 11 11 11 11 11 07 00 00 00 00 00 00 00 00 00 00 6a
         00 00 00 00 00 30 00 00 00 00 00 00 01 00 00 00 00 00 00 00 00 00 00 00
         00 40 00 00 00 00 00 00 03 00 00 00 72 61 6d 01 00 00 00 6d 01 00 22 22
         22 22 22 22 22 22 22 22 22 22 22 22 22 22 01 00 00 00 62",
    );
    assert_eq!(Header::decode(&payload), Ok(header()));
    let unseeded = PageHasher::new(0);
    let record = Record::of(RecordKind::Header, 8, &payload, &unseeded);
    let bytes = record.encode(&unseeded);
    assert_bytes(
        "the header's record",
        &bytes,
        "50 47 41 31 01 00 00 00 08 00 00 00 00 00 00 00 73 00 00 00 00 00 00 00
         93 01 e2 4c 45 70 fb fd a5 72 f7 5c a6 ed a2 d8",
    );
    assert_eq!(Record::decode(&bytes, 8, &unseeded), Ok(record));
    assert!(Record::decode(&bytes, 9, &unseeded).is_err(), "it says where it is");
}

#[test]
fn frames_and_pads() {
    let hasher = PageHasher::new(7);
    let frame =
        FrameHeader { kind: FrameKind::Pages, chunk: 3, encoded_len: 20, raw: 0b1, zero: 0b10, zstd: 0b1100 };
    let mut bytes = Vec::new();
    frame.encode([1, 2, 3, 4, 5], &hasher, &mut bytes);
    assert_bytes(
        "a frame's header and seals",
        &bytes,
        "50 47 53 31 01 00 00 00 03 00 00 00 14 00 00 00 01 00 00 00 00 00 00 00
         02 00 00 00 00 00 00 00 0c 00 00 00 00 00 00 00 bd 06 36 b8 6f 7c 32 b3
         01 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00
         04 00 00 00 00 00 00 00 05 00 00 00 00 00 00 00",
    );
    assert_eq!(FrameHeader::decode(bytes.first_chunk().unwrap()), Ok(frame));
    assert_eq!(frame.check_seals(&bytes, &hasher), Ok(vec![1, 2, 3, 4, 5]));
    assert_eq!(frame.frame_len(), 48 + 5 * 8 + 20 + 4096);
    let same = FrameHeader { kind: FrameKind::Same, encoded_len: 0, raw: 0b101, zero: 0, zstd: 0, ..frame };
    let mut bytes = Vec::new();
    same.encode([8, 9], &hasher, &mut bytes);
    assert_bytes(
        "a frame of pages that are as in the base",
        &bytes,
        "50 47 53 31 02 00 00 00 03 00 00 00 00 00 00 00 05 00 00 00 00 00 00 00
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 26 75 72 45 c4 56 3c b8
         08 00 00 00 00 00 00 00 09 00 00 00 00 00 00 00",
    );
    assert_eq!(same.frame_len(), bytes.len());
    let mut padded = vec![1; 4086];
    pad(&mut padded);
    assert_bytes("a pad", &padded[4086..4094], "50 47 50 31 02 00 00 00");
    assert_eq!(padded.len(), 4096);
    assert_eq!(pad_zeros(padded[4086..].first_chunk().unwrap()), Ok(2));
}

#[test]
fn state_index_and_footer() {
    let state = [StateBlob { name: "cpu".into(), version: 2, bytes: vec![0xaa, 0xbb] }];
    let payload = encode_state_payload(&state);
    assert_bytes("the state", &payload, "01 00 00 00 03 00 00 00 63 70 75 02 00 00 00 02 00 00 00 aa bb");
    assert_eq!(decode_state_payload(&payload).unwrap(), state);
    let entry = IndexEntry { offset: 0x1234, pages: 0b1111, chunk: 3, len: 4204 };
    assert_bytes(
        "an entry of the index",
        &entry.encode(),
        "34 12 00 00 00 00 00 00 0f 00 00 00 00 00 00 00 03 00 00 00 6c 10 00 00",
    );
    assert_eq!(IndexEntry::decode(&entry.encode()), entry);
    let footer = Footer { state_at: 1, index_at: 2, frames: 3, pages: 4, bytes: 5 };
    assert_bytes(
        "the footer",
        &footer.encode(),
        "01 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00
         04 00 00 00 00 00 00 00 05 00 00 00 00 00 00 00",
    );
    assert_eq!(Footer::decode(&footer.encode()), Ok(footer));
}
