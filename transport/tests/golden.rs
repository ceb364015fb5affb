//! Golden vectors of the wire format: literal bytes that the code must produce and accept, and that `docs/protocol.md`
//! must show. A change of either is a change of the protocol and needs a new version.

use pagecopy::backend::StateBlob;
use pagecopy::choose::Load;
use pagecopy::chunk::{Announced, ChunkDecoder, Reference};
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{Layout, PAGE_SIZE, Region};
use transport::wire::control::{
    Arrived, Base, BaseChunk, ChunkRun, ErrorCode, HEADER_LEN, Hello, Message, SessionStatus, StreamEnd,
    Totals, Welcome, state_digest,
};
use transport::wire::frame::{
    FrameHeader, FrameKind, RECEIPT_HEADER_LEN, check_receipt, decode_load, decode_receipt_header,
    encode_load, encode_receipt, fold_receipt,
};
use transport::wire::postcopy::{PageRequest, sealed_receipt};
use transport::wire::queue::{Accept, Kind, MessageHeader, Range, Refusal, Registered, Request};
use transport::wire::{Preamble, Role};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

const DOCUMENT: &str = include_str!("../../docs/protocol.md");
const SEED: u64 = 0x1122_3344_5566_7788;
const SESSION: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

fn preambles() -> Vec<(&'static str, Preamble)> {
    let preamble = |role, stream| Preamble { version_min: 1, version_max: 1, role, stream, session: SESSION };
    vec![
        ("8f504746455252590100010001000000000102030405060708090a0b0c0d0e0f", preamble(Role::Control, 0)),
        ("8f504746455252590100010002000200000102030405060708090a0b0c0d0e0f", preamble(Role::Stream, 2)),
        ("8f504746455252590100010003000000000102030405060708090a0b0c0d0e0f", preamble(Role::Query, 0)),
        ("8f504746455252590100010004000000000102030405060708090a0b0c0d0e0f", preamble(Role::Resume, 0)),
        ("8f504746455252590100010002000203000102030405060708090a0b0c0d0e0f", preamble(Role::Stream, 0x302)),
        ("8f504746455252590100010005000100000102030405060708090a0b0c0d0e0f", preamble(Role::Postcopy, 1)),
    ]
}

fn state() -> Vec<StateBlob> {
    vec![StateBlob { name: "vcpu/0".into(), version: 1, bytes: vec![0xaa, 0xbb] }]
}

fn totals() -> Totals {
    let end = StreamEnd { stream: 2, frames: 8, fold: 0x0123_4567_89ab_cdef };
    Totals { streams: vec![end], pages: 5, state: state_digest(&state()) }
}

fn base() -> Base {
    Base { seed: 7, chunks: vec![BaseChunk { chunk: 3, pages: 0b101, seals: vec![8, 9] }] }
}

fn messages() -> Vec<(&'static str, Message)> {
    let hello = Hello {
        seed: SEED,
        capabilities: 3,
        streams: 4,
        live: true,
        timeout_ms: 10_000,
        reconnect_ms: 300_000,
        regions: vec![Region::new("low", 0, 0x10_0000), Region::new("high", 0x1_0000_0000, 0x3000)],
        presence: vec![0b1],
        dense: vec![0b0],
        data_bytes: 0x3000,
        machine: "m".into(),
    };
    vec![
        (
            "010000006e000000887766554433221103000000000000000400010010270000e093040000100000400000000200000000000000000000000000100000000000030000006c6f77000000000100000000300000000000000400000068696768010000000101000000000030000000000000010000006df35be90f6c274649",
            Message::Hello(hello),
        ),
        (
            "02000000140000000100040010270000e093040003000000000000007e7136458f10e5bb",
            Message::Welcome(Welcome {
                version: 1,
                capabilities: 3,
                streams: 4,
                timeout_ms: 10_000,
                reconnect_ms: 300_000,
            }),
        ),
        (
            "030000000a00000003000000020000006e6f2cce08a3f1bce9a3",
            Message::Error { code: ErrorCode::Busy, text: "no".into() },
        ),
        ("0400000008000000010000000000000023feae3fa68910ba", Message::Ping(1)),
        ("05000000080000000100000000000000eb6ae7228bf7ae2a", Message::Pong(1)),
        ("06000000000000003b676347da4b996b", Message::Prepared),
        ("07000000020000000200bdaca05522656e4d", Message::Attached { stream: 2 }),
        ("080000000200000002008f3f7fa76c21a28f", Message::StreamLost { stream: 2 }),
        (
            "090000000900000002000300000063757462136a905be9d507",
            Message::StreamStopped { stream: 2, reason: "cut".into() },
        ),
        (
            "0a000000180000000100000006000000766370752f300100000002000000aabb5c3e9704478f13fa",
            Message::State(state()),
        ),
        (
            "0b000000260000000100000002000800000000000000efcdab89674523010500000000000000f7f9d7704c6730d5fb82d47682c6bd44",
            Message::Finish(totals()),
        ),
        (
            "0c000000260000000100000002000800000000000000efcdab89674523010500000000000000f7f9d7704c6730d53bd9a2d480b3f82d",
            Message::Ready(totals()),
        ),
        ("0d0000000000000089d39c655291cedb", Message::Go),
        ("0e000000000000003678e5c6a7791431", Message::Running),
        ("0f0000000000000063f47101c156cee5", Message::Query),
        ("1000000002000000020014407092abcab33c", Message::Status(SessionStatus::Ready)),
        ("110000000400000001000000dfecaed75b3c1f66", Message::Resume { epoch: 1 }),
        ("120000000400000001000000f0d1ab73e2ed3544", Message::Resumed { epoch: 1 }),
        ("13000000080000000010000000000000e454fa3a1d32a82b", Message::Resent { bytes: 4096 }),
        (
            "1400000028000000070000000000000001000000030000000500000000000000080000000000000009000000000000000731b4998a607af3",
            Message::Base(base()),
        ),
        ("180000000000000049092da506957fbe", Message::Postcopy),
        ("1900000004000000080000004417bb3811b577cb", Message::PostcopyReady { unit_chunks: 8 }),
        (
            "1a0000001400000001000000030000000200000001000000000000801605165d86a9ae11",
            Message::Missing(vec![ChunkRun { first: 3, count: 2, pages: 1 << 63 | 1 }]),
        ),
        ("1b000000080000000400000000000000407584515bfe645e", Message::Sent { pages: 4 }),
        (
            "1c0000002800000004000000000000000300000000000000050000000000000009000000000000001000000000000000bc3517edac48b24e",
            Message::Arrived(Arrived { pages: 4, faults: 3, p50_us: 5, p99_us: 9, blocked_us: 16 }),
        ),
    ]
}

/// A delta of page 2, whose base is zeros, and a zstd frame of pages 3 (all `a`) and 4 (all `b`).
const SECTION: &str = "0800000109c70102070828b52ffd60001f0280006103800062";
/// The frame of chunk 3 around [`SECTION`], with page 0 raw and page 1 zero.
const FRAME_HEADER: &str = "504746310100000007000000000000000300000019000000010000000000000002000000000000000400000000000000180000000000000014e8329e4c5bce2a3b6d43d27efcddfe";
const END_HEADER: &str = "5047463102000000080000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000028196a04b64d059a";
/// Pages 0 and 2 of chunk 3 are as in the base.
const SAME_HEADER: &str = "50474631030000000900000000000000030000000000000005000000000000000000000000000000000000000000000000000000000000000000000000000000d3a0bdda79a70ac3";
/// A section of page 4 alone, whose zstd frame refers to page 1 of chunk 9.
const REFERRING: &str = "0109000000020000000000000028b52ffd60000f6d000000020005d89fe343fdfbff1908";
/// The frame of chunk 3 around [`REFERRING`].
const REFERRING_HEADER: &str = "50474631010002000800000000000000030000002400000000000000000000000000000000000000000000000000000010000000000000006afa05785d8ae6522c7aa610992907b3";
/// The receipt of the frame around [`SECTION`].
const RECEIPT: &str = "50475231050000000700000000000000c101e567d17a51f045e7961452e8eac4a4af2ab1fa936c50a71019b6e72db1bc2cbf9bb4d1c51f4e7ec6862318fd1281";
/// The fold of a stream whose only receipt is [`RECEIPT`].
const FOLD: &str = "2708e06134234f89";
/// What a thread of the destination did.
const LOAD: &str = "50474c31000000008096980000000000a025260000000000010000000000000052cfde62a6b85782";
/// xxh3-128 of a page of zeros, the high half first as it is printed.
const ZERO_PAGE_DIGEST: &str = "8091490f33f435fdc4eae8521496e745";

fn frame() -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Pages,
        seq: 7,
        chunk: 3,
        encoded_len: unhex(SECTION).len() as u32,
        raw: 0b1,
        zero: 0b10,
        delta: 0b100,
        zstd: 0b1_1000,
        encoded_checksum: PageHasher::new(SEED).checksum(&unhex(SECTION)),
        placed: false,
        references: false,
    }
}

fn referring_frame() -> FrameHeader {
    let section = unhex(REFERRING);
    FrameHeader {
        kind: FrameKind::Pages,
        seq: 8,
        chunk: 3,
        encoded_len: section.len() as u32,
        zstd: 0b1_0000,
        encoded_checksum: PageHasher::new(SEED).checksum(&section),
        references: true,
        ..FrameHeader::end(0)
    }
}

/// Page 1 of chunk 9, and page 4 of chunk 3: the same, from byte 8 on, and then its first 8 bytes.
fn referred() -> [[u8; PAGE_SIZE]; 2] {
    let held: [u8; PAGE_SIZE] = std::array::from_fn(|i| (i * i / 8) as u8);
    let mut sent = held;
    sent.rotate_left(8);
    [held, sent]
}

/// A request of page 1 of chunk 3.
const REQUEST: &str = "504751310300000002000000000000001137ce4192175631";
/// The head of frame 7 of postcopy, chunk 3, with page 0 raw and all 5a, and page 1 zero: header and seal.
const SEALED: &str = "504746310100000007000000000000000300000000000000010000000000000002000000000000000000000000000000000000000000000000000000000000007ceb42bc5bcabd6e395ccc07c7cae4c7";

/// The head of frame 8 of postcopy, chunk 3, with pages 3 (all `a`) and 4 (all `b`) in a zstd frame: header and seal; and that section.
const SEALED_ZSTD: &str = "50474631010000000800000000000000030000000f00000000000000000000000000000000000000000000000000000018000000000000003e84bcf9f873dc2a061433d5bc252b1fb5a374712fa81a73";
const SEALED_SECTION: &str = "28b52ffd60001f0280006103800062";

/// What travels over queue pairs, with its bytes.
fn queue_pair() -> Vec<(&'static str, Vec<u8>)> {
    let hasher = PageHasher::new(SEED);
    let preamble =
        Preamble { version_min: 1, version_max: 1, role: Role::Stream, stream: 2, session: SESSION };
    let range = Range { first: 256, count: 64 };
    let message = |kind, taken, payload: &[u8]| {
        let header = MessageHeader { kind, len: payload.len() as u32, taken };
        [&header.encode(&hasher)[..], payload].concat()
    };
    let registered = Registered { range, place: Some((0x7f00_1234_5000, 0x1d6c)) };
    let refused = Registered { range, place: None };
    let placed = FrameHeader {
        placed: true,
        raw: u64::MAX,
        chunk: 3,
        seq: 7,
        kind: FrameKind::Pages,
        ..FrameHeader::end(0)
    };
    vec![
        (
            "8f504746455252590100010002000200000102030405060708090a0b0c0d0e0f3125a5142856332a",
            Request { preamble }.encode().to_vec(),
        ),
        (
            "50474131020000002000000001000000ffffffffffffffffa0d6a66535d62dda",
            Accept { stream: 2, buffers: 32, adapter: 1, pinned_max: u64::MAX }.encode().to_vec(),
        ),
        (
            "5047583108000000020000006e6f000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000b7cbcd76478f12c9",
            Refusal::new(ErrorCode::UnknownSession, "no").encode().to_vec(),
        ),
        (
            "50474d310100000048000000000000000000000000000000bbb7d270510fcc34504746310100010007000000000000000300000000000000ffffffffffffffff0000000000000000000000000000000000000000000000000000000000000000de04950400b98d29",
            message(Kind::Data, 0, &placed.encode(&hasher)),
        ),
        (
            "50474d3102000000100000000000000000000000000000006a76f837ccafa9f000010000400000006c45260dc79d2596",
            message(Kind::Register, 0, &range.encode(&hasher)),
        ),
        (
            "50474d3102000000200000000000000005000000000000004c00c72befd660a00001000040000000000000006c1d000000503412007f0000799d1964cf943ca9",
            message(Kind::Register, 5, &registered.encode(&hasher)),
        ),
        (
            "50474d3102000000200000000000000005000000000000004c00c72befd660a00001000040000000010000000000000000000000000000008d69e81cfb373bfe",
            message(Kind::Register, 5, &refused.encode(&hasher)),
        ),
        (
            "50474d3103000000100000000000000000000000000000005007914aa8040fbc00010000400000006c45260dc79d2596",
            message(Kind::Release, 0, &range.encode(&hasher)),
        ),
        ("50474d3104000000000000000000000009000000000000005c96c02483974014", message(Kind::End, 9, &[])),
    ]
}

/// What the five pages of the golden frame hold once it was applied.
fn pages() -> [[u8; PAGE_SIZE]; 5] {
    let mut delta = [0; PAGE_SIZE];
    delta[0] = 9;
    delta[200..202].copy_from_slice(&[7, 8]);
    [[0x5a; PAGE_SIZE], [0; PAGE_SIZE], delta, [b'a'; PAGE_SIZE], [b'b'; PAGE_SIZE]]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().map(|b| (b as char).to_digit(16).unwrap_or(0) as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0)).collect()
}

#[test]
fn preambles_are_these_bytes() {
    for (golden, preamble) in preambles() {
        assert_eq!(hex(&preamble.encode()), golden, "{:?}", preamble.role);
        assert_eq!(Preamble::decode(unhex(golden)[..].try_into().unwrap()), Ok(preamble));
    }
}

#[test]
fn messages_are_these_bytes() {
    let messages = messages();
    for (golden, message) in &messages {
        assert_eq!(hex(&message.encode()), *golden, "{}", message.name());
        let bytes = unhex(golden);
        assert_eq!(Message::decode(&bytes).as_ref(), Ok(message), "{}", message.name());
        let fields = bytes.len() - HEADER_LEN - 8;
        assert_eq!(
            Message::decode_header(bytes.first_chunk().unwrap()),
            Ok((message.kind(), fields)),
            "{}",
            message.name()
        );
    }
    let kinds: Vec<u16> = messages.iter().map(|(_, message)| message.kind()).collect();
    assert_eq!(kinds, Vec::from_iter((1..=20).chain(24..=28)), "every kind has its vector");
}

#[test]
fn frame_headers_are_these_bytes() {
    let hasher = PageHasher::new(SEED);
    for (golden, header) in [
        (FRAME_HEADER, frame()),
        (REFERRING_HEADER, referring_frame()),
        (END_HEADER, FrameHeader::end(8)),
        (SAME_HEADER, FrameHeader::same(9, 3, 0b101)),
    ] {
        assert_eq!(hex(&header.encode(&hasher)), golden, "{:?}", header.kind);
        assert_eq!(FrameHeader::decode(unhex(golden)[..].try_into().unwrap(), &hasher), Ok(header));
    }
    // The layout of the golden HELLO has no chunk 3 with these pages; one region of 1 MiB has.
    assert_eq!(frame().check_layout(&Layout::flat(1 << 20).unwrap()), Ok(()));
}

/// Only decoding is held: other releases of zstd may make other bytes of the same pages.
#[test]
fn the_encoded_section_decodes_to_its_pages() {
    let section = unhex(SECTION);
    let header = frame();
    let mut decoder = ChunkDecoder::new();
    let mut asked = Vec::new();
    let decoded = decoder
        .decode(header.delta, header.zstd, &section, |bit, base| {
            asked.push(bit);
            base.fill(0);
        })
        .unwrap();
    let expected = pages();
    let found: Vec<u32> = decoded.iter().map(|(bit, _)| bit).collect();
    assert_eq!(found, [2, 3, 4]);
    for (bit, page) in decoded.iter() {
        assert!(*page == expected[bit as usize], "page {bit}");
    }
    assert_eq!(asked, [2], "only a delta has a base");
}

#[test]
fn a_section_that_refers_to_another_page_decodes_to_its_page() {
    let (header, section, [held, sent]) = (referring_frame(), unhex(REFERRING), referred());
    let announced = Announced { delta: header.delta, zstd: header.zstd, references: header.references };
    let mut decoder = ChunkDecoder::new();
    let base = |_: u32, _: &mut [u8; PAGE_SIZE]| panic!("only a delta has a base");
    let decoded = decoder
        .decode_with(announced, &section, base, |reference, pages| {
            assert_eq!(reference, Reference { chunk: 9, pages: 0b10 });
            pages.copy_from_slice(&[held]);
            true
        })
        .unwrap();
    assert_eq!(decoded.pages(), 0b1_0000);
    assert!(decoded.page(4) == Some(&sent));
}

#[test]
fn private_data_and_messages_are_these_bytes() {
    for (golden, bytes) in queue_pair() {
        assert_eq!(hex(&bytes), golden);
    }
}

#[test]
fn requests_and_seals_are_these_bytes() {
    let (hasher, layout) = (PageHasher::new(SEED), Layout::flat(1 << 20).unwrap());
    let request = PageRequest { chunk: 3, pages: 2 };
    assert_eq!(hex(&request.encode(&hasher)), REQUEST);
    assert_eq!(PageRequest::decode(unhex(REQUEST)[..].try_into().unwrap(), &hasher, &layout), Ok(request));
    let header =
        FrameHeader { kind: FrameKind::Pages, chunk: 3, raw: 0b1, zero: 0b10, ..FrameHeader::end(7) };
    let digests = [receipt(hasher.page(&pages()[0])), receipt(hasher.zero())];
    let seal = sealed_receipt(&mut Vec::new(), 7, &digests, &hasher);
    assert_eq!(hex(&[&header.encode(&hasher)[..], &seal.to_le_bytes()].concat()), SEALED);
    let section = unhex(SEALED_SECTION);
    let header = FrameHeader {
        kind: FrameKind::Pages,
        chunk: 3,
        zstd: 0b1_1000,
        encoded_len: section.len() as u32,
        encoded_checksum: hasher.checksum(&section),
        ..FrameHeader::end(8)
    };
    let digests = [3, 4].map(|page: usize| receipt(hasher.page(&pages()[page])));
    let seal = sealed_receipt(&mut Vec::new(), 8, &digests, &hasher);
    assert_eq!(hex(&[&header.encode(&hasher)[..], &seal.to_le_bytes()].concat()), SEALED_ZSTD);
    let mut decoder = ChunkDecoder::new();
    let decoded = decoder.decode(0, header.zstd, &section, |_, _| unreachable!()).unwrap();
    assert!(decoded.compressed() == &pages()[3..5]);
}

#[test]
fn receipts_and_folds_are_these_bytes() {
    let hasher = PageHasher::new(SEED);
    let digests: Vec<u64> = pages().iter().map(|page| receipt(hasher.page(page))).collect();
    let mut bytes = Vec::new();
    encode_receipt(&mut bytes, 7, &digests, &hasher);
    assert_eq!(hex(&bytes), RECEIPT);
    let golden = unhex(RECEIPT);
    assert_eq!(decode_receipt_header(golden.first_chunk::<RECEIPT_HEADER_LEN>().unwrap()), Ok((5, 7)));
    let body: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
    assert_eq!(check_receipt(&golden, &hasher), Ok(&body[..]));
    assert_eq!(hex(&fold_receipt(0, &golden, &hasher).to_le_bytes()), FOLD);
    let load = Load { passed_nanos: 10_000_000, worked_nanos: 2_500_000, ready_nanos: 1 };
    let mut bytes = Vec::new();
    encode_load(&mut bytes, load, &hasher);
    assert_eq!(hex(&bytes), LOAD);
    assert_eq!(decode_load(unhex(LOAD)[..].try_into().unwrap(), &hasher), Ok(load));
}

/// The document promises that stock xxHash with a seed gives the same values.
#[test]
fn digests_are_those_of_stock_xxhash() {
    let hasher = PageHasher::new(SEED);
    for page in pages() {
        assert_eq!(hasher.page(&page), xxh3_128_with_seed(&page, SEED));
    }
    assert_eq!(hasher.checksum(b"bytes"), xxh3_64_with_seed(b"bytes", SEED));
    assert_eq!(format!("{:032x}", hasher.zero()), ZERO_PAGE_DIGEST);
}

#[test]
fn the_document_shows_every_vector() {
    let shown: String = DOCUMENT.chars().filter(|c| !c.is_whitespace()).collect();
    let named = [
        REQUEST,
        SEALED,
        SEALED_ZSTD,
        SEALED_SECTION,
        SECTION,
        FRAME_HEADER,
        REFERRING,
        REFERRING_HEADER,
        END_HEADER,
        RECEIPT,
        FOLD,
        ZERO_PAGE_DIGEST,
    ];
    let messages = messages();
    let preambles = preambles();
    let queue_pair = queue_pair();
    let all = named
        .iter()
        .chain(queue_pair.iter().map(|(hex, _)| hex))
        .chain(messages.iter().map(|(hex, _)| hex))
        .chain(preambles.iter().map(|(hex, _)| hex));
    for vector in all {
        assert!(shown.contains(vector), "docs/protocol.md does not show {vector}");
    }
}

/// The tables of the document name every message and error code with its number.
#[test]
fn the_document_names_every_message_and_code() {
    for (_, message) in messages() {
        let row = format!("| {} | {} |", message.kind(), message.name());
        assert!(DOCUMENT.contains(&row), "docs/protocol.md has no row {row:?}");
    }
    for code in [
        ErrorCode::Protocol,
        ErrorCode::Version,
        ErrorCode::Busy,
        ErrorCode::Layout,
        ErrorCode::Integrity,
        ErrorCode::Local,
        ErrorCode::Cancelled,
        ErrorCode::UnknownSession,
        ErrorCode::Timeout,
    ] {
        let row = format!("| {} | {code:?} |", code as u32);
        assert!(DOCUMENT.contains(&row), "docs/protocol.md has no row {row:?}");
    }
    for status in
        [SessionStatus::Moving, SessionStatus::Ready, SessionStatus::Running, SessionStatus::Abandoned]
    {
        let row = format!("| {} | {status:?} |", status as u16);
        assert!(DOCUMENT.contains(&row), "docs/protocol.md has no row {row:?}");
    }
}
