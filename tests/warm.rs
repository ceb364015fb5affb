//! A destination that has an older copy of what comes: only what differs travels, and whatever the copy is, what arrives is what was sent.

mod common;

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::raw::{SEED, hello, open_session, open_stream, preamble};
use common::{Ended, Ferry, Image, Job, MIB, PAGE, Recv, send, turn};
use pageferry::pagecopy::digest::{PageHasher, receipt};
use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::{Hello, Message, capability};
use pageferry::transport::wire::frame::{FrameHeader, RECEIPT_HEADER_LEN, check_receipt};
use testkit::Rng;

const LEN: usize = 24 * MIB + 5 * PAGE;

/// An older copy of what a job sends, of which one page in `every` has another content.
fn older(job: &Job, every: usize) -> PathBuf {
    let path = job.folder.path().join("older.img");
    let mut content = job.content.clone();
    let mut rng = Rng::new(3);
    content.chunks_mut(PAGE).step_by(every).for_each(|page| page.copy_from_slice(&rng.bytes(PAGE)));
    std::fs::write(&path, content).unwrap();
    path
}

/// The same as an archive.
fn saved(ram: &Path) -> PathBuf {
    let path = ram.with_extension("pferry");
    send(&format!("file:{}", path.display()), ram, &[]).wait().code(0);
    path
}

fn recv(job: &Job, uri: &str, base: &Path) -> Recv {
    let args = ["--json", "--ram-file"].map(OsStr::new);
    Recv::start(uri, args.into_iter().chain([job.to.as_os_str(), OsStr::new("--base"), base.as_os_str()]))
}

/// Sends a job to who has this base; what arrives must be what was sent. Returns how both ended.
#[track_caller]
fn transfer(job: &Job, uri: &str, base: &Path, args: &[&str]) -> (Ended, Ended) {
    let _turn = turn();
    let recv = recv(job, uri, base);
    let sent = send(&recv.uri, &job.from, args).wait();
    let received = recv.ferry.wait();
    assert!(sent.code(0).report().verified && received.code(0).report().verified);
    job.assert_arrived();
    (sent, received)
}

#[test]
fn only_what_differs_travels() {
    for image in Image::ALL {
        let job = Job::new(image, LEN);
        let ram = older(&job, 20);
        for base in [saved(&ram), ram] {
            for codec in ["raw", "auto"] {
                let unix = format!("unix:{}", job.folder.path().join("s").display());
                for (uri, streams) in [("tcp:127.0.0.1:0", "4"), (unix.as_str(), "1")] {
                    let args = ["--streams", streams, "--codec", codec];
                    let (sent, received) = transfer(&job, uri, &base, &args);
                    let (ours, theirs) = (sent.report(), received.report());
                    assert_eq!(ours.pages.unchanged, theirs.pages.unchanged, "{image:?} {sent:?}");
                    assert_eq!((ours.mismatches, ours.streams_lost), (0, 0), "{sent:?}");
                    let pages = ours.pages;
                    let moved = pages.zero + pages.delta + pages.compressed + pages.raw;
                    assert_eq!(moved + pages.hole + pages.unchanged, pages.total, "{sent:?}");
                    if matches!(image, Image::Random | Image::Text) {
                        assert_eq!(pages.unchanged, pages.total - pages.total.div_ceil(20), "{sent:?}");
                        let wire = ours.wire_bytes as usize;
                        assert!(wire < LEN * 6 / 100, "{image:?}: {wire} bytes of {LEN}");
                    }
                }
            }
        }
    }
}

#[test]
fn memory_that_is_anonymous_takes_from_the_base_too() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, LEN);
    let base = saved(&older(&job, 7));
    let recv = Recv::start(
        "tcp:127.0.0.1:0",
        ["--json", "--anon", "--digest", "--base", base.to_str().unwrap()].map(OsStr::new),
    );
    let sent = send(&recv.uri, &job.from, &["--digest"]).wait();
    let received = recv.ferry.wait();
    assert!(sent.code(0).report().pages.unchanged > 0);
    assert_eq!(sent.report().digest, received.code(0).report().digest);
}

/// A base that is no copy of it, or is damaged, costs what it did not save.
#[test]
fn a_base_that_is_wrong_does_no_harm() {
    let job = Job::new(Image::Random, 4 * MIB);
    let other = Job::new(Image::Text, 4 * MIB);
    let shorter = Job::new(Image::Text, 2 * MIB);
    for base in [&saved(&other.from), &other.from] {
        let (sent, _) = transfer(&job, "tcp:127.0.0.1:0", base, &[]);
        assert_eq!(sent.report().pages.unchanged, 0, "{sent:?}");
    }
    for base in [&saved(&shorter.from), &shorter.from] {
        let (sent, received) = transfer(&job, "tcp:127.0.0.1:0", base, &[]);
        assert_eq!(sent.report().pages.unchanged, 0, "{sent:?}");
        received.says(&["the base is of no use"]);
    }
    // A byte of a frame's header here, of a page there.
    let whole = saved(&older(&job, 20));
    let bytes = std::fs::read(&whole).unwrap();
    let total = job.content.len() / PAGE;
    let mut noticed = 0;
    for at in (1000..bytes.len() - 20_000).step_by(bytes.len() / 9) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 4;
        std::fs::write(&whole, damaged).unwrap();
        let (sent, received) = transfer(&job, "tcp:127.0.0.1:0", &whole, &["--streams", "2"]);
        let report = sent.report();
        let lacking = total - total.div_ceil(20) - report.pages.unchanged as usize;
        assert!(lacking <= 64, "byte {at}: {lacking} pages less: {sent:?}");
        assert_eq!(report.mismatches, 0, "{sent:?}");
        // It may lie in a page that is another anyway.
        if lacking != 0 {
            received.says(&["of the base"]);
            noticed += 1;
        }
    }
    assert!(noticed >= 5, "{noticed} bytes were noticed");
}

#[test]
fn what_can_be_no_base_is_refused_at_once() {
    let job = Job::new(Image::Text, MIB);
    let (text, cut) = (job.folder.path().join("text"), job.folder.path().join("cut"));
    std::fs::write(&text, "no RAM file").unwrap();
    let archive = std::fs::read(saved(&job.from)).unwrap();
    std::fs::write(&cut, &archive[..archive.len() / 2]).unwrap();
    let none = job.folder.path().join("none");
    std::fs::write(&job.to, vec![1; PAGE]).unwrap();
    for (base, words) in [
        (&text, &["no archive"][..]),
        (&cut, &["cut off", "ended after"]),
        (&none, &["No such file"]),
        (&job.folder.path().to_owned(), &["no regular file"]),
        (&job.to, &["--ram-file is made anew"]),
    ] {
        let [base, to] = [base, &job.to].map(|path| path.to_str().unwrap());
        let ended = Ferry::run(["recv", "tcp:127.0.0.1:0", "--ram-file", to, "--base", base]);
        assert_ne!(ended.code, Some(0), "{ended:?}");
        ended.says(words);
        assert_eq!(std::fs::read(&job.to).unwrap(), [1; PAGE], "{base}");
    }
}

/// Takes the seals that a destination says; PREPARED follows them.
fn seals(peer: &mut common::raw::Peer) -> (u64, Vec<u64>) {
    match (peer.receive(), peer.receive()) {
        (Some(Message::Base(base)), Some(Message::Prepared)) => {
            (base.seed, base.chunks.iter().flat_map(|chunk| chunk.seals.clone()).collect())
        }
        other => panic!("{other:?} instead of BASE and PREPARED"),
    }
}

/// A source by hand, and a base that is written after its seals were said.
#[test]
fn a_base_that_is_written_meanwhile_is_told_by_receipts() {
    let _turn = turn();
    let job = Job::new(Image::Random, 64 * PAGE);
    let recv = recv(&job, "tcp:127.0.0.1:0", &job.from);
    let mut peer = common::raw::Peer::connect(recv.port());
    peer.write(&preamble(Role::Control, 0).encode());
    let capabilities = capability::CODECS | capability::BASE;
    peer.send(&Message::Hello(Hello { capabilities, ..hello(64 * PAGE as u64) }));
    let Some(Message::Welcome(welcome)) = peer.receive() else { panic!("no WELCOME") };
    assert_eq!(welcome.capabilities, capabilities);
    let (seed, said) = seals(&mut peer);
    let pages: Vec<&[u8; PAGE]> = job.content.as_chunks().0.iter().collect();
    let under = |seed, page: &[u8; PAGE]| receipt(PageHasher::new(seed).page(page));
    assert_eq!(said, pages.iter().map(|page| under(seed, page)).collect::<Vec<_>>());
    let file = std::fs::File::options().write(true).open(&job.from).unwrap();
    file.write_all_at(b"new", 5 * PAGE as u64 + 100).unwrap();
    let (mut stream, hasher) = (open_stream(recv.port(), 0), PageHasher::new(SEED));
    let mut expect = |seq, digests: &[u64]| {
        use std::io::Read;
        stream.write(&FrameHeader::same(seq, 0, (1 << 4) | (1 << 5) | (1 << 63)).encode(&hasher));
        let mut bytes = vec![0; RECEIPT_HEADER_LEN + 3 * 8 + 8];
        stream.socket.read_exact(&mut bytes).unwrap();
        let found = check_receipt(&bytes, &hasher).unwrap();
        assert_eq!(found, digests.iter().flat_map(|digest| digest.to_le_bytes()).collect::<Vec<_>>());
    };
    expect(0, &[under(SEED, pages[4]), 0, under(SEED, pages[63])]);
    // Of what is cut off nothing can be had any more; what came stays.
    file.set_len(10 * PAGE as u64).unwrap();
    expect(1, &[0, 0, 0]);
    drop((peer, stream));
    recv.ferry.wait().says(&["of the base could not be read, or were not what they were"]);
    let arrived = std::fs::read(&job.to).unwrap();
    let arrived = arrived.as_chunks::<PAGE>().0;
    assert!(arrived[4] == *pages[4] && arrived[63] == *pages[63] && arrived[5] == [0; PAGE]);
}

#[test]
fn a_source_that_knows_of_no_base_is_served() {
    let _turn = turn();
    let job = Job::new(Image::Random, 64 * PAGE);
    let recv = recv(&job, "tcp:127.0.0.1:0", &job.from);
    // It says WELCOME and PREPARED, and nothing between them.
    let peer = open_session(recv.port(), hello(64 * PAGE as u64));
    let mut stream = open_stream(recv.port(), 0);
    stream.write(&FrameHeader::same(0, 0, 1).encode(&PageHasher::new(SEED)));
    let ended = stream.receive();
    assert!(ended.is_none(), "{ended:?}");
    drop(peer);
    recv.ferry.wait().code(1);
}
