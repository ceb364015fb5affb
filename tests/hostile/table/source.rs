//! A destination that a source has connected to, and that breaks the protocol: the source gives it up, and is what it was.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pageferry::pagecopy::bitmap::bits;
use pageferry::pagecopy::choose::Load;
use pageferry::pagecopy::digest::{PageHasher, receipt};
use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::{ErrorCode, Message, Welcome, capability};
use pageferry::transport::wire::frame::{FrameHeader, FrameKind, encode_load};
use pageferry::transport::wire::postcopy::PageRequest;
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use super::{AT_THE_SOURCE, Watch};
use crate::common::raw::{Peer, Server, receipt_bytes, welcome};
use crate::common::secure;
use crate::common::{Image, Job, MIB, PAGE, send, turn};
use crate::lab::Keys;
use crate::vm::{Spec, World, prove};

/// How long somebody goes on whom the source does not leave.
const LONG: Duration = Duration::from_secs(6);

/// An attack by a destination.
struct Attack {
    name: &'static str,
    script: fn(&Server),
    words: &'static [&'static str],
    /// What `send` ends with: it has failed, or has begun nothing.
    code: i32,
}

impl Attack {
    const fn new(name: &'static str, script: fn(&Server), words: &'static [&'static str]) -> Self {
        Self { name, script, words, code: 1 }
    }

    /// Upon a handshake: no session has begun.
    const fn below(name: &'static str, script: fn(&Server), words: &'static [&'static str]) -> Self {
        Self { name, script, words, code: 3 }
    }
}

const ATTACKS: [Attack; 11] = [
    Attack::new("a WELCOME of 4 GiB", oversize, &["limit"]),
    Attack::new("a WELCOME by drops", slow_welcome, &["comes too slowly", "has not sent WELCOME"]),
    Attack::new("ATTACHED by drops", slow_attached, &["could not be opened"]),
    Attack::new("PINGs, answers never read", pings, &["has not taken", "broke", "closed", "no receipt"]),
    Attack::new("STREAM_STOPPED without end", stopped, &["floods", "stopped", "no receipt", "lost"]),
    Attack::new("receipts for frames never sent", unsent, &["a receipt for frame"]),
    Attack::new("receipts of 4 GiB", long_receipts, &["the limit is 64"]),
    Attack::new("receipts of other bytes, without end", garbage, &["bad magic"]),
    Attack::new("loads without receipts", loads, &["loads without a receipt"]),
    Attack::new("frames that are never read", deaf, &["no receipt for 1 s"]),
    Attack::new("errors of the longest text, without end", errors, &["the destination reports"]),
];

/// Upon TLS itself.
const TLS_ATTACKS: [Attack; 5] = [
    Attack::below("a record of 64 KiB", long_record, &["TLS"]),
    Attack::below("a handshake message of 16 MiB", long_message, &["TLS"]),
    Attack::below("another protocol in place of TLS", no_tls, &["does not speak TLS"]),
    Attack::below("a handshake by drops", slow_handshake, &["timed out"]),
    Attack::new("keys renewed without end", renewals, &["TLS"]),
];

/// Writes the same over and over, without reading, until the source has had enough; or for a long time.
fn flood(peer: &mut Peer, bytes: &[u8]) {
    let begun = Instant::now();
    peer.socket.set_write_timeout(Some(LONG)).unwrap();
    while begun.elapsed() < LONG && peer.socket.write_all(bytes).is_ok() {}
}

/// Reads until the source closes.
fn drain(mut peer: Peer) {
    let _ = std::io::copy(&mut peer.socket, &mut std::io::sink());
}

fn drip(peer: &mut Peer, bytes: &[u8]) {
    for byte in bytes {
        if peer.socket.write_all(&[*byte]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn oversize(server: &Server) {
    let (mut peer, _) = server.hello();
    peer.write(&[2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    peer.write(&[0; 4096]);
    drain(peer);
}

fn slow_welcome(server: &Server) {
    let (mut peer, hello) = server.hello();
    let bytes = welcome(&hello).encode();
    drip(&mut peer, &bytes[..bytes.len() - 1]);
}

fn slow_attached(server: &Server) {
    let _control = server.prepared();
    let (mut peer, preamble) = server.accept();
    let bytes = Message::Attached { stream: preamble.stream }.encode();
    drip(&mut peer, &bytes[..bytes.len() - 1]);
    drain(peer);
}

/// The control connection, on which nobody reads or answers.
fn silent(server: &Server) -> Peer {
    let (mut peer, hello) = server.hello();
    peer.send(&welcome(&hello));
    peer.send(&Message::Prepared);
    peer
}

fn pings(server: &Server) {
    let mut control = silent(server);
    let _stream = server.stream();
    flood(&mut control, &Message::Ping(7).encode().repeat(2000));
}

fn stopped(server: &Server) {
    let mut control = silent(server);
    let _stream = server.stream();
    let reason = "r".repeat(4096);
    let words =
        (0..1000).flat_map(|stream| Message::StreamStopped { stream, reason: reason.clone() }.encode());
    flood(&mut control, &words.collect::<Vec<u8>>());
}

/// The first stream, and what its receipts are signed by.
fn stream(server: &Server) -> (Peer, Peer, PageHasher) {
    let (control, hasher) = server.prepared();
    (control, server.stream(), hasher)
}

fn unsent(server: &Server) {
    let (_control, mut stream, hasher) = stream(server);
    let receipts: Vec<u8> = (9..1000).flat_map(|seq| receipt_bytes(seq, &[1; 64], &hasher)).collect();
    flood(&mut stream, &receipts);
}

fn long_receipts(server: &Server) {
    let (_control, mut stream, _) = stream(server);
    flood(&mut stream, &b"PGR1\xff\xff\xff\xff\0\0\0\0\0\0\0\0".repeat(1000));
}

fn garbage(server: &Server) {
    let (_control, mut stream, _) = stream(server);
    flood(&mut stream, &[0xee; 1 << 16]);
}

fn loads(server: &Server) {
    let (_control, mut stream, hasher) = stream(server);
    let mut bytes = Vec::new();
    let load = Load { passed_nanos: u64::MAX, worked_nanos: u64::MAX, ready_nanos: u64::MAX };
    encode_load(&mut bytes, load, &hasher);
    flood(&mut stream, &bytes.repeat(1000));
}

fn deaf(server: &Server) {
    let (_control, _stream, _) = stream(server);
    std::thread::sleep(LONG);
}

/// A record that is longer than any may be.
fn long_record(server: &Server) {
    let mut socket = server.accept_socket();
    let _ = socket.write_all(&[22, 3, 3, 0xff, 0xff]).and_then(|()| socket.write_all(&[0; 0xffff]));
    let _ = std::io::copy(&mut socket, &mut std::io::sink());
}

/// The beginning of a message of 16 MiB, which goes on in record after record.
fn long_message(server: &Server) {
    let mut socket = server.accept_socket();
    socket.set_write_timeout(Some(LONG)).unwrap();
    let mut record = vec![22, 3, 3, 0x40, 0, 2, 0xff, 0xff, 0xff];
    record.resize(5 + 0x4000, 0);
    while socket.write_all(&record).is_ok() {
        record[5..9].fill(0);
    }
}

fn no_tls(server: &Server) {
    let mut socket = server.accept_socket();
    let _ = socket.write_all(&b"220 mail.example ESMTP\r\n".repeat(1000));
    let _ = std::io::copy(&mut socket, &mut std::io::sink());
}

/// The handshake's answer never ends, and comes a byte at a time.
fn slow_handshake(server: &Server) {
    let mut socket = server.accept_socket();
    for byte in [&[22, 3, 3, 0x40, 0, 2, 0, 0x3f, 0xfc, 3, 3][..], &[7; 100]].concat() {
        if socket.write_all(&[byte]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Asks for new keys, over and over.
fn renewals(server: &Server) {
    let (mut peer, _) = server.hello();
    peer.socket.set_write_timeout(Some(LONG)).unwrap();
    let begun = Instant::now();
    while begun.elapsed() < LONG && peer.socket.renew_keys().is_ok() {}
}

fn errors(server: &Server) {
    let mut control = silent(server);
    let error = Message::Error { code: ErrorCode::Local, text: "e".repeat(4096) };
    flood(&mut control, &error.encode().repeat(100));
}

#[test]
fn a_send_gives_up_whoever_breaks_the_protocol() {
    for attack in &ATTACKS {
        let _turn = turn();
        let job = Job::new(Image::Random, 16 * MIB);
        assert_given_up(attack, &job, None);
    }
}

#[test]
fn a_send_under_tls_gives_up_whoever_breaks_the_protocol() {
    let keys = Keys::good();
    for attack in ATTACKS.iter().chain(&TLS_ATTACKS) {
        let _turn = turn();
        let job = Job::new(Image::Random, 16 * MIB);
        assert_given_up(attack, &job, Some(&keys));
    }
}

/// A source gives up who attacks it, for the reason that the row has, and what it has read is what it was.
#[track_caller]
fn assert_given_up(attack: &Attack, job: &Job, keys: Option<&Keys>) {
    let (server, uri) = Server::with(keys.map(|keys| secure::server(keys.path())));
    let mut args = vec!["--link-timeout", "1", "--streams", "1", "--codec", "raw"];
    args.extend(keys.iter().flat_map(|keys| ["--tls-dir", keys.text()]));
    let sending = send(&uri, &job.from, &args);
    let watch = Watch::of(sending.id());
    let row = format!("{}, on send{}", attack.name, if keys.is_some() { ", under TLS" } else { "" });
    std::thread::scope(|scope| {
        scope.spawn(|| (attack.script)(&server));
        let sent = sending.wait();
        watch.end(&row, AT_THE_SOURCE);
        assert_eq!(sent.code, Some(attack.code), "{row}: {sent:?}");
        sent.says(attack.words);
        if attack.code == 1 {
            sent.says(&["the source is unchanged"]);
        }
    });
    assert_eq!(std::fs::read(&job.from).unwrap(), job.content);
}

#[test]
fn a_vm_runs_on_whoever_it_was_to_go_to() {
    let world = World::new();
    let spec = Spec::counter().with(&["--memory", "memfd"]);
    let source = world.source("a", &spec);
    for attack in &ATTACKS {
        let (server, uri) = Server::new();
        let watch = Watch::of(source.pid() as u32);
        std::thread::scope(|scope| {
            scope.spawn(|| (attack.script)(&server));
            let options =
                json!({"link_timeout_s": 1, "reconnect_timeout_s": 0, "streams": 1, "codec": "raw"});
            source.begin_migration(&uri, &options);
            let report = source.wait_migration(PATIENCE);
            watch.end(&format!("{}, on a running vm", attack.name), AT_THE_SOURCE);
            let error = report["error"].as_str().unwrap_or_default();
            assert_eq!(report["status"], "failed", "{}: {report}", attack.name);
            assert!(attack.words.iter().any(|words| error.contains(words)), "{}: {error}", attack.name);
        });
        assert_eq!(source.state(), "running", "{}", attack.name);
    }
    prove(&spec, &[&source]);
}

/// Reads a frame of raw pages and zeros; its number, and the digests of its pages.
fn read_frame(peer: &mut Peer, hasher: &PageHasher) -> Option<(u64, Vec<u64>)> {
    let mut bytes = [0; FrameHeader::LEN];
    peer.socket.read_exact(&mut bytes).ok()?;
    let header = FrameHeader::decode(&bytes, hasher).unwrap();
    if header.kind == FrameKind::End {
        return None;
    }
    assert_eq!(header.pages(), header.raw | header.zero);
    let mut raw = vec![0; header.raw_len()];
    peer.socket.read_exact(&mut raw).ok()?;
    let mut pages = raw.as_chunks::<PAGE>().0.iter();
    let digests = bits(header.pages()).map(|bit| match header.raw & 1 << bit {
        0 => hasher.zero(),
        _ => hasher.page(pages.next().expect("a page for each bit")),
    });
    Some((header.seq, digests.map(receipt).collect()))
}

/// Takes whatever the source opens: streams, whose frames arrive, and connections of postcopy, which it passes on. For as long as the
/// process is there.
fn attach(server: Server, hasher: PageHasher) -> Receiver<(Peer, u16)> {
    let (pass, passed) = channel();
    std::thread::spawn(move || {
        loop {
            let (mut peer, preamble) = server.accept();
            peer.send(&Message::Attached { stream: preamble.stream });
            if preamble.role == Role::Postcopy {
                if pass.send((peer, preamble.stream)).is_err() {
                    return;
                }
                continue;
            }
            let hasher = hasher.clone();
            std::thread::spawn(move || {
                while let Some((seq, digests)) = read_frame(&mut peer, &hasher) {
                    peer.write(&receipt_bytes(seq, &digests, &hasher));
                }
            });
        }
    });
    passed
}

/// The control connection of a session that goes by postcopy, once the guest is handed over, and what the source opens for its pages.
fn handed_over(server: Server) -> (Peer, PageHasher, Receiver<(Peer, u16)>) {
    let (mut control, hello) = server.hello();
    control.send(&Message::Welcome(Welcome {
        version: 1,
        capabilities: hello.capabilities & (capability::POSTCOPY | capability::RESUME),
        streams: 1,
        timeout_ms: 2000,
        reconnect_ms: 60_000,
    }));
    control.send(&Message::Prepared);
    let hasher = PageHasher::new(hello.seed);
    let connections = attach(server, hasher.clone());
    let totals = loop {
        match control.receive().expect("the source has gone") {
            Message::Postcopy => control.send(&Message::PostcopyReady { unit_chunks: 0 }),
            Message::Finish(totals) => break totals,
            _ => {}
        }
    };
    control.send(&Message::Ready(totals));
    while control.receive() != Some(Message::Go) {}
    control.send(&Message::Running);
    (control, hasher, connections)
}

/// Asks for every page, over and over, and takes none.
fn ask(peer: &mut Peer, hasher: &PageHasher, until: Instant) -> usize {
    let request = |chunk| PageRequest { chunk, pages: u64::MAX }.encode(hasher);
    let requests: Vec<u8> = (0..256).flat_map(request).collect();
    let (mut asked, requests) = (0, requests.repeat(16));
    peer.socket.set_write_timeout(Some(LONG)).unwrap();
    while Instant::now() < until && peer.socket.write_all(&requests).is_ok() {
        asked += 4096;
    }
    asked
}

/// The guest was handed over to a destination that asks for pages and takes none: it costs the source no more than any other, and the
/// source goes on serving.
#[test]
fn a_storm_of_page_requests_costs_the_source_little() {
    let world = World::new();
    // Pages are there, to be asked for.
    let spec = Spec { working_set: 48 << 20, rate: 0, ..Spec::counter() }.with(&["--memory", "memfd"]);
    let source = world.source("a", &spec);
    std::thread::sleep(Duration::from_millis(500));
    let (server, uri) = Server::new();
    let watch = Watch::of(source.pid() as u32);
    let options = json!({
        "link_timeout_s": 4, "reconnect_timeout_s": 60, "streams": 1, "codec": "raw", "postcopy_after_rounds": 0,
    });
    source.begin_migration(&uri, &options);
    let (control, hasher, connections) = handed_over(server);
    let mut reader = Peer::over(control.socket.try_clone().unwrap());
    let answering = std::thread::spawn(move || while reader.receive().is_some() {});
    let until = Instant::now() + 2 * LONG;
    let (mut asked, mut opened, mut kept) = (0, 0, Vec::new());
    while let Ok((mut peer, stream)) = connections.recv_timeout(until - Instant::now()) {
        opened += 1;
        match stream {
            0 => asked += ask(&mut peer, &hasher, until),
            // Nobody reads what is pushed.
            _ => kept.push(peer),
        }
        if Instant::now() >= until {
            break;
        }
    }
    println!("{asked} requests, {opened} connections");
    assert!(asked > 10_000 && opened >= 2, "{asked} requests, {opened} connections");
    assert_eq!(source.state(), "postcopy");
    watch.end("page-request storms, on a vm in postcopy", AT_THE_SOURCE);
    let quit = source.ctl(&["quit", "--force"]);
    assert_eq!(quit.code, Some(0), "{quit:?}");
    wait_for("it ends", PATIENCE, || source.exited());
    drop(control);
    answering.join().unwrap();
}
