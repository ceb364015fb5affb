//! What a hostile destination can do to a source.

use std::time::{Duration, Instant};

use pageferry::pagecopy::digest::PageHasher;
use pageferry::transport::wire::control::{Base, BaseChunk, ErrorCode, Message, Totals, Welcome};
use rustix::fs::{FallocateFlags, fallocate};

use crate::common::raw::{Peer, Server, read_raw_frame, receipt_bytes, welcome};
use crate::common::{Ended, Image, Job, MIB, PAGE, send, turn};

/// `--link-timeout` of the sources here.
const TIMEOUT: &str = "1";
/// A timeout for the control connection, one for a stream, and slack for a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs a source of `pages` random pages against `script`; it must fail and say one of `words`.
#[track_caller]
fn facing(
    pages: usize,
    streams: &str,
    script: impl FnOnce(&Server) + Send + 'static,
    words: &[&str],
) -> Ended {
    let _turn = turn();
    let job = Job::new(Image::Random, pages * PAGE);
    let (server, uri) = Server::new();
    let thread = std::thread::spawn(move || script(&server));
    let args = ["--link-timeout", TIMEOUT, "--streams", streams, "--codec", "raw"];
    let sent = send(&uri, &job.from, &args).wait_for(LIMIT);
    sent.code(1).says(&["the source is unchanged"]).says(words);
    assert!(!sent.report().verified);
    assert_eq!(std::fs::read(&job.from).unwrap(), job.content);
    thread.join().unwrap();
    sent
}

/// Until the source closes.
fn hold(mut peer: Peer) {
    while peer.receive().is_some() {}
}

/// Reads and says nothing until the source closes.
fn mute(mut peer: Peer) {
    let _ = std::io::copy(&mut peer.socket, &mut std::io::sink());
}

#[test]
fn silence_and_absence() {
    // Either limit is the same second.
    let silent = &["nothing was heard from the peer for 1 s", "has not sent WELCOME for 1 s"];
    facing(1, "1", |server| mute(server.accept().0), silent);
    facing(1, "1", |server| drop(server.accept()), &["closed the control connection", "connection broke"]);
    facing(1, "1", |server| drop(server.hello()), &["closed the control connection", "connection broke"]);
    // A byte now and then is not a message.
    let slow = |server: &Server| {
        let (mut peer, _) = server.accept();
        for byte in welcome_bytes().into_iter().take(12) {
            peer.write(&[byte]);
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    facing(1, "1", slow, &["comes too slowly"]);
}

fn welcome_bytes() -> Vec<u8> {
    Message::Welcome(Welcome { version: 1, capabilities: 3, streams: 1, timeout_ms: 2000, reconnect_ms: 0 })
        .encode()
}

#[test]
fn answers_to_hello_that_make_no_sense() {
    let answer = |bytes: Vec<u8>, words: &'static str| {
        let script = move |server: &Server| {
            let (mut peer, _) = server.hello();
            peer.write(&bytes);
            hold(peer);
        };
        facing(1, "2", script, &[words]);
    };
    let welcome = |version, streams, capabilities| {
        Message::Welcome(Welcome { version, streams, capabilities, timeout_ms: 2000, reconnect_ms: 0 })
            .encode()
    };
    answer(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "something else than pageferry answers there");
    answer([2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff].to_vec(), "limit");
    answer(welcome(9, 1, 3), "version 9");
    answer(welcome(0, 1, 3), "version 0");
    answer(welcome(1, 0, 3), "0 streams");
    answer(welcome(1, 3, 3), "3 streams");
    answer(welcome(1, u16::MAX, 3), "65535 streams");
    answer(welcome(1, 1, 1 << 40), "capabilities");
    answer(Message::Prepared.encode(), "PREPARED while this side was in state ExpectWelcome");
    answer(Message::Go.encode(), "GO while");
    answer(Message::Running.encode(), "RUNNING while");
    let twice = [welcome(1, 1, 3), welcome(1, 1, 3)].concat();
    answer(twice, "WELCOME while this side was in state ExpectPrepared");
    // What it says of an older copy: not agreed on, of no such guest, or twice.
    let base = |seed, chunk, pages: u64| {
        let seals = vec![7; pages.count_ones() as usize];
        Message::Base(Base { seed, chunks: vec![BaseChunk { chunk, pages, seals }] }).encode()
    };
    answer(base(1, 0, 1), "BASE while this side was in state ExpectWelcome");
    answer([welcome(1, 1, 3), base(1, 0, 1)].concat(), "BASE, which was not offered");
    let agreed = welcome(1, 1, 3 | 128);
    answer([agreed.clone(), base(1, 0, 2)].concat(), "pages that the guest does not have");
    answer([agreed.clone(), base(1, u32::MAX, 1)].concat(), "pages that the guest does not have");
    answer([agreed.clone(), base(1, 0, 1), base(1, 0, 1)].concat(), "a chunk comes twice");
    answer([agreed.clone(), base(1, 0, 1), base(2, 0, 1)].concat(), "its seed is another");
    let long = [20u16.to_le_bytes(), [0; 2]].concat();
    answer([agreed, long, 600_000u32.to_le_bytes().to_vec()].concat(), "limit");
    let no = Message::Error { code: ErrorCode::Layout, text: "no room for this guest".into() };
    answer(no.encode(), "the destination reports: no room for this guest");
    let flood: Vec<u8> = (0..5000)
        .flat_map(|_| Message::StreamStopped { stream: 0, reason: String::new() }.encode())
        .collect();
    answer(flood, "STREAM_STOPPED while");
}

#[test]
fn streams_that_are_not_let_in() {
    let words = &["data stream 0 could not be opened"];
    let silent = |server: &Server| {
        let _control = server.prepared();
        mute(server.accept().0);
    };
    let sent = facing(1, "1", silent, words);
    sent.says(&["nothing was heard from the peer for 1 s"]);
    let closed = |server: &Server| {
        let _control = server.prepared();
        drop(server.accept());
    };
    facing(1, "1", closed, words);
    let wrong_number = |server: &Server| {
        let _control = server.prepared();
        let (mut peer, _) = server.accept();
        peer.send(&Message::Attached { stream: 7 });
        mute(peer);
    };
    facing(1, "1", wrong_number, words);
    let refused = |server: &Server| {
        let _control = server.prepared();
        let (mut peer, _) = server.accept();
        peer.send(&Message::Error { code: ErrorCode::Local, text: "no threads left".into() });
    };
    facing(1, "1", refused, words).says(&["no threads left"]);
}

#[test]
fn a_destination_that_never_reads() {
    let script = |server: &Server| {
        let _control = server.prepared();
        let _stream = server.stream();
        // Longer than the source's patience with the stream.
        std::thread::sleep(Duration::from_secs(4));
    };
    facing(16 * MIB / PAGE, "1", script, &["no receipt for 1 s"]);
}

#[test]
fn a_destination_that_reads_and_never_answers() {
    let script = |server: &Server| {
        let _control = server.prepared();
        mute(server.stream());
    };
    facing(MIB / PAGE, "1", script, &["no receipt for 1 s"]);
}

/// Reads a frame and writes what `answer` makes of it.
fn answering(answer: fn(u64, &[u64]) -> (u64, Vec<u64>)) -> impl FnOnce(&Server) + Send + 'static {
    move |server| {
        let (_control, hasher) = server.prepared();
        let mut stream = server.stream();
        while let Some((header, digests)) = read_raw_frame(&mut stream, &hasher) {
            let (seq, digests) = answer(header.seq, &digests);
            let bytes = receipt_bytes(seq, &digests, &hasher);
            stream.write(&bytes);
        }
    }
}

#[test]
fn receipts_that_lie() {
    facing(
        64,
        "1",
        answering(|seq, d| (seq + 1, d.to_vec())),
        &["a receipt for frame 1 while frame Some(0)"],
    );
    facing(64, "1", answering(|_, d| (u64::MAX, d.to_vec())), &["a receipt for frame 18446744073709551615"]);
    facing(64, "1", answering(|seq, d| (seq, d[1..].to_vec())), &["has 63 digests instead of 64"]);
    facing(64, "1", answering(|seq, _| (seq, vec![])), &["has 0 digests instead of 64"]);
    facing(3, "1", answering(|seq, d| (seq, [d, d].concat())), &["has 6 digests instead of 3"]);
}

#[test]
fn receipts_for_nothing_and_garbage() {
    let unasked = |server: &Server| {
        let (_control, hasher) = server.prepared();
        let mut stream = server.stream();
        stream.write(&receipt_bytes(0, &[1; 64], &hasher).repeat(3));
        mute(stream);
    };
    facing(
        64,
        "1",
        unasked,
        &["a receipt for frame 0 while", "digests instead of", "other than they were sent"],
    );
    let garbage = |server: &Server| {
        let _control = server.prepared();
        let mut stream = server.stream();
        stream.write(&[0xee; 100]);
        mute(stream);
    };
    facing(64, "1", garbage, &["bad magic"]);
    let long = |server: &Server| {
        let _control = server.prepared();
        let mut stream = server.stream();
        stream.write(b"PGR1\xff\xff\xff\xff\0\0\0\0\0\0\0\0");
        mute(stream);
    };
    facing(64, "1", long, &["the limit is 64"]);
}

/// Sent again, and again, and then the migration fails on a source that is whole.
#[test]
fn digests_that_never_match() {
    let lie = |seq, digests: &[u64]| (seq, digests.iter().map(|digest| !digest).collect());
    let sent = facing(4, "1", answering(lie), &["arrived other than they were sent"]);
    sent.says(&["check both hosts' memory"]);
    assert!(sent.report().mismatches > 64, "{sent:?}");
    assert_eq!(sent.report().status, pageferry::engine::report::Status::Failed);
}

/// Streams that die and are never said to have stopped: the pages in them cannot be sent again, so the source gives up.
#[test]
fn a_destination_that_does_not_stop_lost_streams() {
    let began = Instant::now();
    let script = |server: &Server| {
        let (_control, hasher) = server.prepared();
        let mut dies = server.stream();
        let mut lives = server.stream();
        let good = std::thread::spawn(move || {
            while let Some((header, digests)) = read_raw_frame(&mut lives, &hasher) {
                let bytes = receipt_bytes(header.seq, &digests, &hasher);
                lives.write(&bytes);
            }
        });
        let _ = std::io::Read::read(&mut dies.socket, &mut [0; 10]);
        drop(dies);
        good.join().unwrap();
    };
    facing(8 * MIB / PAGE, "2", script, &["did not stop stream"]);
    assert!(began.elapsed() < LIMIT + LIMIT);
}

/// It takes GO and is never seen again: nobody knows, and the source says so.
#[test]
fn a_destination_that_vanishes_after_go() {
    let _turn = turn();
    let job = Job::new(Image::Random, 64 * PAGE);
    let (server, uri) = Server::new();
    let thread = std::thread::spawn(move || {
        let (mut control, hello) = server.hello();
        control.send(&welcome(&hello));
        control.send(&Message::Prepared);
        let mut stream = server.stream();
        let hasher = PageHasher::new(hello.seed);
        while let Some((header, digests)) = read_raw_frame(&mut stream, &hasher) {
            let bytes = receipt_bytes(header.seq, &digests, &hasher);
            stream.write(&bytes);
        }
        drop(stream);
        let Some(Message::Finish(totals)) = control.receive() else { panic!("no FINISH") };
        control.send(&Message::Ready(totals));
        assert_eq!(control.receive(), Some(Message::Go));
    });
    let sent = send(&uri, &job.from, &["--link-timeout", TIMEOUT, "--streams", "1", "--codec", "raw"])
        .wait_for(LIMIT);
    thread.join().unwrap();
    sent.code(4).says(&["the handover was not confirmed"]);
    assert!(!sent.report().verified);
    assert_eq!(sent.json()["status"], "unknown");
}

/// Receipts are good, and the account is not.
#[test]
fn accounts_that_differ() {
    let script = |server: &Server| {
        let (mut control, hello) = server.hello();
        control.send(&welcome(&hello));
        control.send(&Message::Prepared);
        let mut stream = server.stream();
        let hasher = PageHasher::new(hello.seed);
        while let Some((header, digests)) = read_raw_frame(&mut stream, &hasher) {
            let bytes = receipt_bytes(header.seq, &digests, &hasher);
            stream.write(&bytes);
        }
        drop(stream);
        match control.receive() {
            Some(Message::Finish(totals)) => {
                control.send(&Message::Ready(Totals { pages: totals.pages + 1, ..totals }));
            }
            other => panic!("{other:?} instead of FINISH"),
        }
        control.expect_error(ErrorCode::Integrity, "differs");
    };
    facing(64, "1", script, &["account of the transfer differs from the source's (number of pages carried)"]);
}

/// What a source says of its memory before anything is sent: a destination that believes it fills no holes, and none that zeros
/// would leave.
#[test]
fn the_maps_of_hello_tell_data_from_holes_and_zeros() {
    let _turn = turn();
    let job = Job::new(Image::Random, 8 * MIB);
    let file = std::fs::OpenOptions::new().write(true).open(&job.from).unwrap();
    // Of four pieces of 2 MiB: data with few zeros, with a hole, zeros that are there, and nothing.
    let zeros = vec![0; 2 * MIB];
    std::os::unix::fs::FileExt::write_all_at(&file, &zeros[..3 * MIB / 4], MIB as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &zeros, 4 * MIB as u64).unwrap();
    for (at, length) in [(3 * MIB, PAGE), (6 * MIB, 2 * MIB)] {
        punch(&file, at, length);
    }
    let (server, uri) = Server::new();
    let sent = send(&uri, &job.from, &["--link-timeout", TIMEOUT]);
    let (peer, hello) = server.hello();
    assert_eq!((hello.presence, hello.dense), (vec![0b0111], vec![0b0001]));
    drop(peer);
    sent.wait_for(LIMIT).code(1);
}

/// Makes a hole.
fn punch(file: &std::fs::File, at: usize, length: usize) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, at as u64, length as u64).unwrap();
}
