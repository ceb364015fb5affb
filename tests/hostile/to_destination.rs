//! What a hostile source can do to a destination.

use std::ffi::OsStr;
use std::time::{Duration, Instant};

use pageferry::pagecopy::backend::GuestRam;
use pageferry::pagecopy::digest::PageHasher;
use pageferry::pagecopy::layout::Region;
use pageferry::transport::wire::control::{ErrorCode, Hello, Message, SessionStatus, StreamEnd, Totals};
use pageferry::transport::wire::frame::{FrameHeader, FrameKind};
use pageferry::transport::wire::{Preamble, Role};
use pageferry::vmm_shim::guest_memory::GuestMemory;

use crate::common::raw::{Peer, SEED, hello, open_session, open_stream, preamble};
use crate::common::{Image, Job, MIB, PAGE, Recv, blocks, send, turn};

/// `--link-timeout` of the destinations here.
const TIMEOUT: u64 = 1;
/// A timeout, and slack for a busy machine.
const LIMIT: Duration = Duration::from_secs(TIMEOUT + 5);

/// A good source is served after all that happened.
fn assert_serves(job: &Job, recv: Recv) -> crate::common::Ended {
    send(&recv.uri, &job.from, &[]).wait().code(0);
    let received = recv.ferry.wait();
    received.code(0);
    job.assert_arrived();
    received
}

/// A message with any fields and a right checksum.
fn message(kind: u16, fields: &[u8]) -> Vec<u8> {
    let mut bytes = [kind.to_le_bytes(), [0, 0]].concat();
    bytes.extend_from_slice(&(fields.len() as u32).to_le_bytes());
    bytes.extend_from_slice(fields);
    // xxh3-64 without a seed is that with the seed 0.
    let checksum = PageHasher::new(0).checksum(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn preambles_of_strangers_are_refused() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let good = preamble(Role::Control, 0);
    let altered = |at: usize, byte: u8| {
        let mut bytes = good.encode().to_vec();
        bytes[at] = byte;
        bytes
    };
    let version = |version_min, version_max| Preamble { version_min, version_max, ..good }.encode().to_vec();
    for (bytes, code, words) in [
        (b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n".to_vec(), ErrorCode::Protocol, "bad magic"),
        (vec![0; 32], ErrorCode::Protocol, "bad magic"),
        (version(2, 9), ErrorCode::Version, "no common protocol version: the peer offers 2 to 9"),
        (version(0, 0), ErrorCode::Version, "no common protocol version"),
        (version(3, 1), ErrorCode::Protocol, "version_min"),
        (altered(12, 0), ErrorCode::Protocol, "role"),
        (altered(13, 1), ErrorCode::Protocol, "role"),
        (altered(15, 0xff), ErrorCode::Protocol, "stream"),
        (altered(14, 1), ErrorCode::Protocol, "stream"),
        (preamble(Role::Stream, 0).encode().to_vec(), ErrorCode::UnknownSession, "no such session"),
        (preamble(Role::Query, 0).encode().to_vec(), ErrorCode::UnknownSession, "no such session"),
        (preamble(Role::Resume, 0).encode().to_vec(), ErrorCode::UnknownSession, "no such session"),
    ] {
        let mut peer = Peer::connect(recv.port());
        peer.write(&bytes);
        peer.expect_error(code, words);
        assert_eq!(peer.receive(), None, "the connection is closed");
    }
    // One that goes away in the middle.
    Peer::connect(recv.port()).write(&good.encode()[..9]);
    let received = assert_serves(&job, recv);
    received.says(&["refused a connection from 127.0.0.1"]);
}

fn region(name: &str, gpa: u64, len: u64) -> Region {
    Region::new(name, gpa, len)
}

#[test]
fn impossible_layouts_are_refused() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let page = PAGE as u64;
    for (regions, words) in [
        (vec![], "no region"),
        (vec![region("ram", 1, page)], "multiples of 4096"),
        (vec![region("ram", 0, page + 1)], "multiples of 4096"),
        (vec![region("ram", 0, 0)], "not 0"),
        (vec![region("ram", 0, 1 << 63)], "exceeds the supported guest size"),
        (vec![region("ram", 0, u64::MAX - 4095)], "exceeds the supported guest size"),
        (vec![region("ram", u64::MAX - 4095, 2 * page)], "exceeds the supported guest size"),
        (vec![region("a", 0, 1 << 62), region("b", 1 << 62, 1 << 62)], "exceeds the supported guest size"),
        (vec![region("a", 0, 2 * page), region("b", page, page)], "overlap"),
        (vec![region("a", 0, page), region("a", page, page)], "used twice"),
        (vec![region("", 0, page)], "empty"),
    ] {
        let mut peer = Peer::connect(recv.port());
        peer.write(&preamble(Role::Control, 0).encode());
        peer.send(&Message::Hello(Hello { regions, ..hello(page) }));
        peer.expect_error(ErrorCode::Layout, words);
        assert_eq!(peer.receive(), None);
    }
    // A running guest, which a file cannot take.
    let mut peer = Peer::connect(recv.port());
    peer.write(&preamble(Role::Control, 0).encode());
    peer.send(&Message::Hello(Hello { live: true, ..hello(page) }));
    peer.expect_error(ErrorCode::Layout, "memory alone");
    assert!(!job.to.exists(), "a refusal leaves no file behind");
    assert_serves(&job, recv).says(&["refused the guest offered by 127.0.0.1"]);
}

/// The fields of a HELLO before its regions.
fn hello_fields(streams: u16, live: u16, page_size: u32, chunk_pages: u32, regions: u32) -> Vec<u8> {
    let mut fields = [SEED.to_le_bytes(), 3u64.to_le_bytes()].concat();
    fields.extend_from_slice(&streams.to_le_bytes());
    fields.extend_from_slice(&live.to_le_bytes());
    for field in [1000u32, 0] {
        fields.extend_from_slice(&field.to_le_bytes());
    }
    for field in [page_size, chunk_pages, regions] {
        fields.extend_from_slice(&field.to_le_bytes());
    }
    fields
}

#[test]
fn malformed_first_messages_are_refused() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let good = Message::Hello(hello(PAGE as u64)).encode();
    let damaged = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        bytes
    };
    let long = |kind: u16| [&kind.to_le_bytes()[..], &[0, 0], &u32::MAX.to_le_bytes()].concat();
    let one_region = |tail: &[u8]| {
        let region = [&[0; 8][..], &4096u64.to_le_bytes(), &3u32.to_le_bytes(), b"ram"].concat();
        message(1, &[&hello_fields(1, 0, 4096, 64, 1), &region[..], tail].concat())
    };
    for (bytes, words) in [
        (vec![0; 16], "message kind"),
        (vec![0xff; 16], "message kind"),
        (long(1), "limit"),
        (long(4), "limit"),
        (long(10), "limit"),
        (damaged(2), "flags"),
        (damaged(30), "checksum of HELLO"),
        (message(1, &[]), "ends inside field seed"),
        (message(1, &hello_fields(0, 0, 4096, 64, 0)), "streams"),
        (message(1, &hello_fields(257, 0, 4096, 64, 0)), "streams"),
        (message(1, &hello_fields(1, 2, 4096, 64, 0)), "live"),
        (message(1, &hello_fields(1, 0, 8192, 64, 0)), "page_size"),
        (message(1, &hello_fields(1, 0, 4096, 65, 0)), "chunk_pages"),
        (message(1, &hello_fields(1, 0, 4096, 64, 513)), "regions"),
        (message(1, &hello_fields(1, 0, 4096, 64, u32::MAX)), "regions"),
        (message(1, &hello_fields(1, 0, 4096, 64, 1)), "ends inside field region gpa"),
        (one_region(&u32::MAX.to_le_bytes()), "presence map"),
        (one_region(&[4, 0, 0, 0, 1]), "ends inside field presence map"),
        (one_region(&[0, 0, 0, 0, 4, 0, 0, 0, 1]), "ends inside field dense map"),
        (one_region(&[0; 21]), "after the last field"),
        (Message::Go.encode(), "GO while this side was in state ExpectHello"),
        (Message::Prepared.encode(), "PREPARED while"),
        (Message::Query.encode(), "QUERY while"),
    ] {
        let mut peer = Peer::connect(recv.port());
        peer.write(&preamble(Role::Control, 0).encode());
        peer.write(&bytes);
        peer.expect_error(ErrorCode::Protocol, words);
    }
    // Cut in the middle of the message.
    let mut peer = Peer::connect(recv.port());
    peer.write(&preamble(Role::Control, 0).encode());
    peer.write(&good[..20]);
    drop(peer);
    let mut waits = Peer::connect(recv.port());
    waits.write(b"?");
    drop(waits);
    std::thread::sleep(Duration::from_millis(100));
    assert_serves(&job, recv);
}

#[test]
fn silent_and_slow_strangers_are_shown_out() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let began = Instant::now();
    let mut silent = Peer::connect(recv.port());
    let mut slow = Peer::connect(recv.port());
    slow.write(&[0x8f]);
    silent.expect_error(ErrorCode::Timeout, "said nothing for 1 s");
    slow.write(b"P");
    slow.expect_error(ErrorCode::Timeout, "said nothing for 1 s");
    assert!(began.elapsed() < LIMIT);
    // Control, and then nothing; and a HELLO by drops.
    for slowly in [false, true] {
        let began = Instant::now();
        let mut peer = Peer::connect(recv.port());
        peer.write(&preamble(Role::Control, 0).encode());
        let mut writer = Peer::over(peer.socket.try_clone().unwrap());
        let dripping = slowly.then(|| {
            std::thread::spawn(move || {
                for byte in Message::Hello(hello(4096)).encode().into_iter().take(15) {
                    writer.write(&[byte]);
                    std::thread::sleep(Duration::from_millis(200));
                }
            })
        });
        match peer.receive() {
            Some(Message::Error { text, .. }) => assert!(text.contains("no HELLO came"), "{text}"),
            other => panic!("{other:?}"),
        }
        assert!(began.elapsed() < LIMIT);
        if let Some(thread) = dripping {
            thread.join().unwrap();
        }
    }
    assert_serves(&job, recv);
}

/// PINGs do not make up for the HELLO that does not come.
#[test]
fn a_stranger_that_only_pings_is_shown_out() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let began = Instant::now();
    let mut peer = Peer::connect(recv.port());
    peer.write(&preamble(Role::Control, 0).encode());
    let mut pinging = Peer::over(peer.socket.try_clone().unwrap());
    let thread = std::thread::spawn(move || {
        for nonce in 0..15 {
            pinging.send(&Message::Ping(nonce));
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    peer.expect_error(ErrorCode::Timeout, "no HELLO came within 1 s");
    assert!(began.elapsed() < LIMIT);
    thread.join().unwrap();
    assert_serves(&job, recv);
}

#[test]
fn two_hundred_strangers_do_not_hinder() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 8 * MIB);
    let recv = Recv::to_file(&job.to, 10);
    let strangers: Vec<Peer> = (0..200)
        .map(|i| {
            let mut peer = Peer::connect(recv.port());
            peer.write(&preamble(Role::Control, 0).encode()[..i % 32]);
            peer
        })
        .collect();
    assert_serves(&job, recv);
    drop(strangers);
}

#[test]
fn a_second_session_and_a_second_stream_are_refused() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let mut control = open_session(recv.port(), hello(MIB as u64));
    let mut other = Peer::connect(recv.port());
    other.write(&Preamble { session: [1; 16], ..preamble(Role::Control, 0) }.encode());
    other.expect_error(ErrorCode::Busy, "already serves a session");
    let _first = open_stream(recv.port(), 0);
    for (stream, words) in [(0, "already connected"), (1, "not agreed on")] {
        let mut peer = Peer::connect(recv.port());
        peer.write(&preamble(Role::Stream, stream).encode());
        peer.expect_error(ErrorCode::Protocol, words);
    }
    control.send(&Message::Error { code: ErrorCode::Cancelled, text: "enough".into() });
    recv.ferry.wait_for(LIMIT).code(1).says(&["the source reports: enough"]);
}

/// A connection of role 4, with its first message.
fn resume(port: u16, first: &Message) -> Peer {
    let mut peer = Peer::connect(port);
    peer.write(&preamble(Role::Resume, 0).encode());
    peer.send(first);
    peer
}

#[test]
fn a_session_is_resumed_by_its_source_and_in_order_only() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let to = job.to.as_os_str();
    let recv = Recv::start("tcp:127.0.0.1:0", [OsStr::new("--json"), OsStr::new("--ram-file"), to]);
    let offer = Hello { capabilities: 7, reconnect_ms: 60_000, ..hello(MIB as u64) };
    let mut control = open_session(recv.port(), offer);
    let mut stream = open_stream(recv.port(), 0);
    let mut stranger = Peer::connect(recv.port());
    stranger.write(&Preamble { session: [1; 16], ..preamble(Role::Resume, 0) }.encode());
    stranger.expect_error(ErrorCode::UnknownSession, "no such session");
    resume(recv.port(), &Message::Query).expect_error(ErrorCode::Protocol, "QUERY while");
    let mut second = resume(recv.port(), &Message::Resume { epoch: 2 });
    assert_eq!(second.receive(), Some(Message::Resumed { epoch: 2 }));
    assert_eq!(stream.receive(), None, "its streams are broken");
    assert_eq!(control.receive(), None, "and so is the control connection");
    for epoch in [0, 1, 2] {
        let late = Message::Resume { epoch };
        resume(recv.port(), &late).expect_error(ErrorCode::Protocol, "in state Moving after attempt 2");
    }
    // An incarnation of the same number, and one of a number that was not agreed on.
    let mut again = open_stream(recv.port(), 0x100);
    for (id, words) in [(0, "already connected"), (0x100, "already connected"), (0x101, "not agreed on")] {
        let mut peer = Peer::connect(recv.port());
        peer.write(&preamble(Role::Stream, id).encode());
        peer.expect_error(ErrorCode::Protocol, words);
    }
    // A later one takes its place: this side may not have heard yet that it is lost.
    let _later = open_stream(recv.port(), 0x200);
    assert_eq!(again.receive(), None);
    assert!(matches!(second.receive(), Some(Message::StreamStopped { stream: 0x100, .. })));
    second.send(&Message::StreamLost { stream: 0x200 });
    assert!(matches!(second.receive(), Some(Message::StreamStopped { stream: 0x200, .. })));
    let totals = Totals { streams: vec![], pages: 0, state: 0 };
    second.send(&Message::Finish(totals.clone()));
    assert_eq!(second.receive(), Some(Message::Ready(totals)));
    second.send(&Message::Go);
    assert_eq!(second.receive(), Some(Message::Running));
    let over = Message::Resume { epoch: 3 };
    resume(recv.port(), &over).expect_error(ErrorCode::Protocol, "in state Running");
    second.send(&Message::Running);
    recv.ferry.wait_for(LIMIT).code(0);
}

/// Without the capability nothing is waited for, and there are no other incarnations.
#[test]
fn a_session_that_did_not_agree_on_it_is_not_resumed() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let offer = Hello { capabilities: 7, reconnect_ms: 60_000, ..hello(MIB as u64) };
    let control = open_session(recv.port(), offer);
    let _stream = open_stream(recv.port(), 0);
    let mut peer = Peer::connect(recv.port());
    peer.write(&preamble(Role::Stream, 0x100).encode());
    peer.expect_error(ErrorCode::Protocol, "not agreed on");
    drop(control);
    recv.ferry.wait_for(LIMIT).code(1).says(&["the source is gone"]);
}

/// A frame of raw pages.
pub(crate) fn raw_frame(seq: u64, chunk: u32, raw: u64) -> FrameHeader {
    FrameHeader { kind: FrameKind::Pages, seq, chunk, raw, ..FrameHeader::end(0) }
}

/// A frame with an encoded section.
pub(crate) fn encoded_frame(delta: u64, zstd: u64, section: &[u8], hasher: &PageHasher) -> Vec<u8> {
    let header = FrameHeader {
        encoded_len: section.len() as u32,
        delta,
        zstd,
        encoded_checksum: hasher.checksum(section),
        ..raw_frame(0, 0, 0)
    };
    [&header.encode(hasher)[..], section].concat()
}

/// A frame of page 0 of chunk 0 that refers to pages, and zstd for 4096 bytes of `a`.
fn referring_frame(references: &[(u32, u64)], hasher: &PageHasher) -> Vec<u8> {
    let mut section = vec![references.len() as u8];
    for (chunk, pages) in references {
        section.extend_from_slice(&chunk.to_le_bytes());
        section.extend_from_slice(&pages.to_le_bytes());
    }
    section.extend_from_slice(b"\x28\xb5\x2f\xfd\x60\x00\x0f\x03\x80\x00a");
    let header = FrameHeader {
        encoded_len: section.len() as u32,
        zstd: 1,
        encoded_checksum: hasher.checksum(&section),
        references: true,
        ..raw_frame(0, 0, 0)
    };
    [&header.encode(hasher)[..], &section].concat()
}

/// Frames that are none, or that must not come first, each with words of the reason that it is refused with.
pub(crate) fn bad_frames(hasher: &PageHasher) -> Vec<(Vec<u8>, &'static str)> {
    let encode = |header: FrameHeader| header.encode(hasher).to_vec();
    let flipped = |at: usize| {
        let mut bytes = encode(raw_frame(0, 0, 1));
        bytes[at] ^= 0x10;
        bytes
    };
    let resealed = |at: usize, byte: u8| {
        let mut bytes = encode(raw_frame(0, 0, 1));
        bytes[at] = byte;
        let checksum = hasher.checksum(&bytes[..64]);
        bytes[64..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    };
    let damaged_section = {
        let mut bytes = encoded_frame(1, 0, &[3, 0, 0, 1, 9], hasher);
        *bytes.last_mut().unwrap() ^= 1;
        bytes
    };
    let other_session = raw_frame(0, 0, 1).encode(&PageHasher::new(SEED + 1)).to_vec();
    vec![
        (vec![0; 72], "bad magic"),
        (flipped(0), "bad magic"),
        (flipped(20), "checksum of frame header"),
        (other_session, "checksum of frame header"),
        (resealed(4, 9), "frame kind"),
        (resealed(6, 1), "frame flags"),
        (resealed(6, 2), "frame flags"),
        (resealed(6, 4), "frame flags"),
        (encode(raw_frame(1, 0, 1)), "seq"),
        (encode(raw_frame(0, 5, 1)), "chunk"),
        (encode(raw_frame(0, u32::MAX, 1)), "chunk"),
        (encode(raw_frame(0, 4, 0b1000)), "beyond the region"),
        (encode(raw_frame(0, 0, 0)), "page masks"),
        (encode(FrameHeader { zero: 1, ..raw_frame(0, 0, 1) }), "overlap"),
        (encode(FrameHeader { zstd: 2, encoded_len: u32::MAX, ..raw_frame(0, 0, 1) }), "encoded_len"),
        (encode(FrameHeader { zstd: 2, ..raw_frame(0, 0, 1) }), "encoded_len"),
        (damaged_section, "checksum of encoded section"),
        (encoded_frame(1, 0, &[1, 0, 0], hasher), "delta of page 0 is malformed"),
        (encoded_frame(1, 0, &[4, 0, 0xff, 0x1f, 9, 9], hasher), "past the page's end"),
        (encoded_frame(1, 0, &[0xff, 0xff, 0], hasher), "65535 bytes"),
        (encoded_frame(1, 0, &[3, 0, 0, 1, 9, 9], hasher), "follow the last delta"),
        (encoded_frame(0, 1, b"this is not zstd", hasher), "not exactly one zstd frame"),
        // A good frame of 8192 bytes where one page is announced: nothing is written past it.
        (
            encoded_frame(0, 1, b"\x28\xb5\x2f\xfd\x60\x00\x1f\x02\x80\x00a\x03\x80\x00b", hasher),
            "announces Some(8192) bytes",
        ),
        // Nothing was sent yet: not this page, and not itself; and there is no such chunk, or page of it.
        (referring_frame(&[(1, 1)], hasher), "not all of them were sent"),
        (referring_frame(&[(0, 1)], hasher), "not all of them were sent"),
        (referring_frame(&[(5, 1)], hasher), "not all of them were sent"),
        (referring_frame(&[(u32::MAX, 1)], hasher), "not all of them were sent"),
        (referring_frame(&[(4, 0b1000)], hasher), "not all of them were sent"),
        (referring_frame(&[], hasher), "refers to 0 chunks"),
        (referring_frame(&[(1, 0)], hasher), "names no page"),
        // The rest of the frame never comes.
        (encode(raw_frame(0, 0, 1)), "in the middle of a frame for 1 s"),
    ]
}

#[test]
pub(crate) fn bad_frames_end_their_stream_with_the_reason() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    // Four whole chunks and one of three pages.
    let offer = Hello { capabilities: 3 | 16, ..hello((MIB + 3 * PAGE) as u64) };
    let mut control = open_session(recv.port(), offer);
    let hasher = PageHasher::new(SEED);
    for (bytes, words) in bad_frames(&hasher) {
        let mut stream = open_stream(recv.port(), 0);
        stream.write(&bytes);
        match control.receive() {
            Some(Message::StreamStopped { stream: 0, reason }) => {
                assert!(reason.contains(words), "{words:?} in {reason:?}");
            }
            other => panic!("{words:?}: {other:?}"),
        }
        assert!(stream.receive().is_none(), "{words:?}: the stream is closed");
    }
    // Cut inside raw pages, and before any frame.
    for bytes in [&[&raw_frame(0, 0, 1).encode(&hasher)[..], &[1; 100]].concat()[..], &[]] {
        let mut stream = open_stream(recv.port(), 0);
        stream.write(bytes);
        drop(stream);
        match control.receive() {
            Some(Message::StreamStopped { stream: 0, reason }) => {
                assert!(reason.contains("closed the connection"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    drop(control);
    recv.ferry.wait_for(LIMIT).code(1).says(&["the source is gone"]);
    let memory = std::fs::read(&job.to).unwrap();
    assert_eq!(memory.len(), MIB + 3 * PAGE);
    assert!(memory[PAGE..].iter().all(|&byte| byte == 0), "no bad frame reached memory");
}

/// zstd alone does not allow references.
#[test]
fn references_that_were_not_agreed_on_are_refused() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let mut control = open_session(recv.port(), hello(MIB as u64));
    let mut stream = open_stream(recv.port(), 0);
    stream.write(&referring_frame(&[(1, 1)], &PageHasher::new(SEED)));
    match control.receive() {
        Some(Message::StreamStopped { reason, .. }) => {
            assert!(reason.contains("references (not agreed on)"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn encodings_that_were_not_agreed_on_are_refused() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let offer = Hello { capabilities: !3, ..hello(MIB as u64) };
    let mut control = open_session(recv.port(), offer);
    let hasher = PageHasher::new(SEED);
    let encoded = |delta, zstd| encoded_frame(delta, zstd, &[3, 0, 0, 1, 9], &hasher);
    for bytes in [encoded(1, 0), encoded(0, 1)] {
        let mut stream = open_stream(recv.port(), 0);
        stream.write(&bytes);
        match control.receive() {
            Some(Message::StreamStopped { reason, .. }) => {
                assert!(reason.contains("not agreed on"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Every message that may not come, and accounts that are not the destination's: the session ends, unverified.
#[test]
fn a_session_out_of_order_is_ended() {
    let job = Job::new(Image::Random, MIB);
    let totals = |pages, streams| Message::Finish(Totals { streams, pages, state: 0 });
    let end = |stream| StreamEnd { stream, frames: 0, fold: 0 };
    for (message, code, words) in [
        (Message::Go, ErrorCode::Protocol, "GO while this side was in state Moving"),
        (Message::Hello(hello(4096)), ErrorCode::Protocol, "HELLO while"),
        (Message::Ready(Totals { streams: vec![], pages: 0, state: 0 }), ErrorCode::Protocol, "READY while"),
        (totals(1, vec![]), ErrorCode::Integrity, "number of pages carried"),
        (totals(0, vec![end(0)]), ErrorCode::Integrity, "frames and receipts"),
        (totals(0, (0..256).map(end).collect()), ErrorCode::Integrity, "frames and receipts"),
    ] {
        let _turn = turn();
        let recv = Recv::to_file(&job.to, TIMEOUT);
        let mut control = open_session(recv.port(), hello(MIB as u64));
        control.send(&message);
        control.expect_error(code, words);
        let ended = recv.ferry.wait_for(LIMIT);
        ended.code(1).says(&[words]);
        assert!(!ended.report().verified);
    }
}

/// STREAM_LOST for streams that never were, over and over, takes nothing.
#[test]
fn streams_that_never_were_can_be_lost() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let mut control = open_session(recv.port(), hello(MIB as u64));
    for stream in [0, 7, u16::MAX, 0] {
        control.send(&Message::StreamLost { stream });
        assert_eq!(control.receive(), Some(Message::StreamStopped { stream, reason: String::new() }));
    }
    // A session without any page: complete, and GO is awaited; then the source vanishes without it.
    control.send(&Message::Finish(Totals { streams: vec![], pages: 0, state: 0 }));
    assert!(matches!(control.receive(), Some(Message::Ready(_))));
    control.send(&Message::Finish(Totals { streams: vec![], pages: 0, state: 0 }));
    // It may have said GO.
    assert_eq!(control.receive(), Some(Message::Status(SessionStatus::Abandoned)));
    control.expect_error(ErrorCode::Protocol, "FINISH while this side was in state Ready");
    recv.ferry.wait_for(LIMIT).code(1).says(&["FINISH while"]);
}

/// A source that lost its control connection after READY asks, is told, says GO and is answered; also when the
/// destination takes the old connection for alive.
#[test]
fn a_query_takes_the_place_of_a_lost_control_connection() {
    let job = Job::new(Image::Random, MIB);
    for closed in [true, false] {
        let _turn = turn();
        let recv = Recv::to_file(&job.to, 3);
        let mut control = open_session(recv.port(), hello(MIB as u64));
        control.send(&Message::Finish(Totals { streams: vec![], pages: 0, state: 0 }));
        assert!(matches!(control.receive(), Some(Message::Ready(_))));
        let old = (!closed).then_some(control);
        let mut query = Peer::connect(recv.port());
        query.write(&preamble(Role::Query, 0).encode());
        query.send(&Message::Query);
        assert_eq!(query.receive(), Some(Message::Status(SessionStatus::Ready)));
        query.send(&Message::Go);
        let answer = (0..3).find_map(|_| query.receive().filter(|m| *m == Message::Running));
        assert_eq!(answer, Some(Message::Running), "closed: {closed}");
        drop((query, old));
        recv.ferry.wait_for(LIMIT).code(0);
    }
}

/// Dense memory comes in once streams are open, before any of its pages does, and no other; a map of another layout is refused.
#[test]
fn a_dense_map_brings_in_what_it_names() {
    let _turn = turn();
    let job = Job::new(Image::Random, 6 * MIB);
    let recv = Recv::to_file(&job.to, 60);
    let mut peer = Peer::connect(recv.port());
    peer.write(&preamble(Role::Control, 0).encode());
    peer.send(&Message::Hello(Hello { dense: vec![0; 2], ..hello(6 * MIB as u64) }));
    peer.expect_error(ErrorCode::Layout, "dense map has 2 bytes");
    let _control = open_session(recv.port(), Hello { dense: vec![0b010], ..hello(6 * MIB as u64) });
    assert_eq!(blocks(&job.to), 0);
    let _stream = open_stream(recv.port(), 0);
    let enlarges =
        GuestMemory::open_ram_file(&job.to, true).is_ok_and(|memory| memory.enlarging().enlarges());
    if !enlarges {
        println!("skipped: no large pages of shared memory on request here (Linux 6.1, a tmpfs)");
        return;
    }
    let begun = Instant::now();
    while blocks(&job.to) < 2 * MIB as u64 && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(blocks(&job.to), 2 * MIB as u64);
}

/// A guest of 64 TiB is within the protocol: it is taken or refused, without a crash.
#[test]
fn the_largest_guest_does_no_harm() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let mut peer = Peer::connect(recv.port());
    peer.write(&preamble(Role::Control, 0).encode());
    // No chunk is beyond the map, and none is present.
    peer.send(&Message::Hello(Hello { presence: vec![0; 4 << 20], ..hello(64 << 40) }));
    match peer.receive() {
        Some(Message::Error { code: ErrorCode::Layout, text }) => {
            assert!(text.contains("to.img"), "{text}");
            assert_serves(&job, recv);
        }
        Some(Message::Error { code: ErrorCode::Local, text }) => {
            assert!(text.contains("bytes of memory"), "{text}");
            assert_serves(&job, recv);
        }
        Some(Message::Welcome(_)) => {
            assert_eq!(peer.receive(), Some(Message::Prepared));
            drop(peer);
            let ended = recv.ferry.wait_for(LIMIT);
            ended.code(1).says(&["the source is gone"]);
            let resident = ended.report().max_rss_bytes;
            assert!(resident < 512 << 20, "{resident} bytes for nothing");
        }
        other => panic!("{other:?}"),
    }
}
