//! `pageferry send` and `pageferry recv`, as real processes over real sockets: every kind of memory, every transport,
//! stream count and codec arrives byte for byte.

mod common;

use std::net::TcpListener;

use common::{Ended, Ferry, Image, Job, MIB, PAGE, Recv, assert_same, blocks, send, turn};
use pageferry::engine::report::{Pages, Status};

/// Not a multiple of a chunk (256 KiB), so that every image ends in a short one.
const LEN: usize = 24 * MIB + 5 * PAGE;

/// Sends `job` with these arguments to a destination at `uri`; both must succeed and agree.
#[track_caller]
fn transfer(job: &Job, uri: &str, args: &[&str]) -> (Ended, Ended) {
    let _turn = turn();
    let to = job.to.to_str().unwrap();
    let recv = Recv::start(uri, ["--json", "--ram-file", to]);
    let sent = send(&recv.uri, &job.from, args).wait();
    let received = recv.ferry.wait();
    sent.code(0);
    received.code(0);
    job.assert_arrived();
    (sent, received)
}

/// Every page is accounted for once: memory alone has one round, and nothing in it is sent twice.
#[track_caller]
fn assert_report(job: &Job, ended: &Ended, streams: u16) {
    let report = ended.report();
    let pages = report.pages;
    assert_eq!(report.status, Status::Completed, "{ended:?}");
    assert!(report.verified && report.error.is_none(), "{ended:?}");
    assert_eq!(report.streams, streams, "{ended:?}");
    assert_eq!((report.streams_lost, report.mismatches), (0, 0), "{ended:?}");
    assert_eq!(pages.total as usize, job.content.len() / PAGE, "{ended:?}");
    let moved = pages.zero + pages.delta + pages.compressed + pages.raw;
    assert_eq!(moved + pages.hole + pages.unchanged, pages.total, "{ended:?}");
    assert_eq!(report.logical_bytes, moved * PAGE as u64, "{ended:?}");
}

fn every_kind(transport: &str, streams: u16) {
    for image in Image::ALL {
        let job = Job::new(image, LEN);
        let uri = match transport {
            "unix" => format!("unix:{}", job.folder.path().join("s").display()),
            host => format!("tcp:{host}:0"),
        };
        let count = streams.to_string();
        let (sent, received) = transfer(&job, &uri, &["--streams", &count]);
        assert_report(&job, &sent, streams);
        assert_report(&job, &received, streams);
        let (ours, theirs) = (sent.report().pages, received.report().pages);
        assert_eq!((ours.zero, ours.raw), (theirs.zero, theirs.raw), "{image:?}: both sides count alike");
        if image == Image::Sparse {
            assert!(blocks(&job.to) <= blocks(&job.from), "{} of {}", blocks(&job.to), blocks(&job.from));
        }
        if matches!(image, Image::Zero | Image::Text) {
            let wire = sent.report().wire_bytes as usize;
            assert!(image == Image::Text || wire < LEN / 100, "{image:?} took {wire} bytes on the wire");
        }
    }
}

#[test]
fn every_kind_over_tcp_with_one_stream() {
    every_kind("127.0.0.1", 1);
}

#[test]
fn every_kind_over_tcp_with_four_streams() {
    every_kind("127.0.0.1", 4);
}

#[test]
fn every_kind_over_tcp_with_eight_streams() {
    every_kind("127.0.0.1", 8);
}

#[test]
fn every_kind_over_ipv6() {
    if let Err(error) = TcpListener::bind("[::1]:0") {
        eprintln!("skipped: no IPv6 loopback here ({error})");
        return;
    }
    every_kind("[::1]", 4);
}

#[test]
fn every_kind_over_a_unix_socket_with_one_stream() {
    every_kind("unix", 1);
}

#[test]
fn every_kind_over_a_unix_socket_with_eight_streams() {
    every_kind("unix", 8);
}

#[test]
fn every_codec() {
    let job = Job::new(Image::Mixed, LEN);
    for codec in ["raw", "zstd", "zstd:3", "delta", "auto"] {
        let (sent, received) = transfer(&job, "tcp:127.0.0.1:0", &["--codec", codec]);
        assert_report(&job, &sent, 4);
        let pages = sent.report().pages;
        assert_eq!(pages.compressed, received.report().pages.compressed, "{codec}");
        match codec {
            "raw" | "delta" => assert_eq!(pages.compressed, 0, "{codec}"),
            "auto" => {}
            _ => {
                assert!(pages.compressed > 0, "{codec}");
                assert!(sent.report().wire_bytes < sent.report().logical_bytes, "{codec}");
            }
        }
    }
}

/// Memory whose second half is the first, 2000 bytes on: no page is another's, and all of it is known.
#[test]
fn what_was_sent_before_is_referred_to() {
    let mut job = Job::new(Image::Text, 32 * MIB);
    let half = job.content.len() / 2;
    let (first, second) = job.content.split_at_mut(half);
    second.copy_from_slice(first);
    second.rotate_left(2000);
    std::fs::write(&job.from, &job.content).unwrap();
    let wire = |codec: &str| {
        let (sent, _) = transfer(&job, "tcp:127.0.0.1:0", &["--codec", codec]);
        assert_report(&job, &sent, 4);
        sent.report().wire_bytes
    };
    let (without, with) = (wire("zstd:1"), wire("zstd:2"));
    assert!(with < without * 3 / 4, "{with} {without}");
}

#[test]
fn the_json_object_has_every_field() {
    let job = Job::new(Image::Mixed, 4 * MIB);
    let (sent, received) = transfer(&job, "tcp:127.0.0.1:0", &[]);
    for (side, ended) in [("send", &sent), ("recv", &received)] {
        let json = ended.json();
        for field in [
            "total_ms",
            "downtime_ms",
            "setup_ms",
            "rounds",
            "streams",
            "logical_bytes",
            "wire_bytes",
            "logical_gb_s",
            "wire_gb_s",
            "cpu_s",
            "max_rss_bytes",
        ] {
            assert!(json[field].is_number(), "{side}: {field} in {json}");
        }
        let (mine, others): (&[_], &[_]) = match side {
            "send" => (&["scan", "send"], &["receive", "fault_in", "apply", "hash"]),
            _ => (&["receive", "hash"], &["scan", "copy", "encode", "send"]),
        };
        let spent = |name: &&str| json["time_ms"][name].as_f64().unwrap();
        assert!(mine.iter().all(|name| spent(name) > 0.0), "{side}: {json}");
        assert!(others.iter().all(|name| spent(name) == 0.0), "{side}: {json}");
        for field in ["total", "hole", "zero", "unchanged", "delta", "compressed", "raw"] {
            assert!(json["pages"][field].is_u64(), "{side}: pages.{field} in {json}");
        }
        assert_eq!(json["status"], "completed", "{side}");
        assert_eq!(json["verified"], true, "{side}");
        assert!(json["max_rss_bytes"].as_u64().unwrap() > 1 << 20, "{side}: {json}");
        assert!(json["total_ms"].as_f64() >= json["setup_ms"].as_f64(), "{side}: {json}");
    }
    assert_eq!(sent.json()["rounds"], 1);
    assert_eq!(sent.stdout.lines().count(), 1, "one JSON object: {}", sent.stdout);
}

/// The expected values are what xxHash's own library gives for these images.
#[test]
fn the_digest_is_xxh3_128_of_the_content_on_both_sides() {
    for (image, target, expected) in [
        (Image::Mixed, "file", "e02a699c601085176dbcb9574cf77012"),
        (Image::Sparse, "anon", "3aed16f58eb7ffeacc10668bbe1444b9"),
        (Image::Text, "anon", "5cfcc9266de92a4419af74e55507f599"),
    ] {
        let _turn = turn();
        let job = Job::new(image, LEN);
        let to = job.to.to_str().unwrap();
        let target = if target == "file" { vec!["--ram-file", to] } else { vec!["--anon"] };
        let recv = Recv::start("tcp:127.0.0.1:0", [&["--json", "--digest"], &target[..]].concat());
        let sent = send(&recv.uri, &job.from, &["--digest"]).wait();
        let received = recv.ferry.wait();
        for ended in [sent, received] {
            assert_eq!(ended.code(0).report().digest.as_deref(), Some(expected), "{image:?}");
        }
    }
}

#[test]
fn the_text_summary_has_the_digest() {
    let _turn = turn();
    let job = Job::new(Image::Text, 2 * MIB);
    let recv = Recv::start("tcp:127.0.0.1:0", ["--anon", "--digest"]);
    let from = job.from.to_str().unwrap();
    let sent = Ferry::run(["send", &recv.uri, "--ram-file", from, "--digest"]);
    let received = recv.ferry.wait();
    let line = |ended: &Ended| {
        ended.code(0).stdout.lines().find_map(|l| l.strip_prefix("xxh3-128:")).unwrap().trim().to_owned()
    };
    assert_eq!(line(&sent), line(&received));
    for word in ["completed", "total time:", "downtime:", "verified:", "yes"] {
        assert!(sent.stdout.contains(word), "{word}: {}", sent.stdout);
    }
}

#[test]
fn every_size_around_a_chunk_and_a_page() {
    for pages in [1, 2, 63, 64, 65, 127, 511, 513] {
        let job = Job::new(Image::Random, pages * PAGE);
        let (sent, received) = transfer(&job, "tcp:127.0.0.1:0", &["--streams", "3"]);
        assert_report(&job, &sent, 3);
        assert_report(&job, &received, 3);
    }
}

#[test]
fn an_image_of_holes_only() {
    let job = Job::new(Image::Zero, 4 * PAGE);
    let file = std::fs::File::create(&job.from).unwrap();
    file.set_len(job.content.len() as u64).unwrap();
    let (sent, _) = transfer(&job, "tcp:127.0.0.1:0", &[]);
    let pages = sent.report().pages;
    assert_eq!((pages.hole, sent.report().wire_bytes), (4, 0), "{sent:?}");
    assert_eq!(blocks(&job.to), 0);
}

#[test]
fn a_file_in_the_way_is_replaced_whole() {
    for other in [LEN / 2, LEN, 2 * LEN] {
        let job = Job::new(Image::Sparse, LEN);
        std::fs::write(&job.to, vec![0xee; other]).unwrap();
        transfer(&job, "tcp:127.0.0.1:0", &[]);
        assert!(blocks(&job.to) <= blocks(&job.from));
    }
}

#[test]
fn odd_path_names() {
    let job = Job::new(Image::Text, MIB);
    for name in ["with space", "-dash", "ü☃", "a:b,c=d", "new\nline", "per%cent"] {
        let _turn = turn();
        let folder = job.folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let (from, to, socket) = (folder.join(name), folder.join("to"), folder.join("s:1"));
        std::fs::copy(&job.from, &from).unwrap();
        let args = ["--json", "--ram-file"].map(std::ffi::OsStr::new);
        let uri = format!("unix:{}", socket.display());
        // The line that says where it listens is not parsed: a name may hold a line break.
        let recv = Recv::start(&uri, args.into_iter().chain([to.as_os_str()]));
        send(&uri, &from, &[]).wait().code(0);
        recv.ferry.wait().code(0);
        assert_same(&to, &job.content);
        assert!(!socket.exists(), "the socket is removed");
    }
}

/// Every kind of memory through a file, which has a hole for nothing and a mark for zeros, and through a command.
#[test]
fn every_kind_is_saved_and_loaded() {
    for image in Image::ALL {
        for codec in ["auto", "raw", "zstd:1"] {
            let job = Job::new(image, LEN);
            let path = job.folder.path().join("archive");
            for uri in [format!("file:{}", path.display()), format!("exec:cat > {}", path.display())] {
                let sent = send(&uri, &job.from, &["--codec", codec]).wait();
                sent.code(0);
                assert_report(&job, &sent, 4);
                assert_eq!(sent.report().wire_bytes, path.metadata().unwrap().len(), "{sent:?}");
                for uri in [format!("file:{}", path.display()), format!("exec:cat {}", path.display())] {
                    let _ = std::fs::remove_file(&job.to);
                    let recv = Ferry::run(["recv", &uri, "--json", "--ram-file", job.to.to_str().unwrap()]);
                    recv.code(0);
                    job.assert_arrived();
                    let (saved, loaded) = (sent.report().pages, recv.report().pages);
                    let of =
                        |pages: Pages| (pages.total, pages.hole, pages.zero, pages.compressed, pages.raw);
                    assert_eq!(of(saved), of(loaded), "{image:?} {codec}");
                    if image == Image::Sparse {
                        assert!(blocks(&job.to) <= blocks(&job.from));
                    }
                }
            }
        }
    }
}

/// A file system that is full keeps what was there, and is told of.
#[test]
fn a_full_file_system_leaves_what_was_there() {
    let Some(small) = common::tmpfs::Tmpfs::new(8) else { return };
    let job = Job::new(Image::Random, 16 * MIB);
    let path = small.path("archive");
    std::fs::write(&path, "older").unwrap();
    let sent = send(&format!("file:{}", path.display()), &job.from, &[]).wait();
    sent.code(1).says(&["has 0 bytes left"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"older");
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "something is left behind");
    // What was cut off is no archive, wherever that was.
    let path = job.folder.path().join("archive");
    send(&format!("file:{}", path.display()), &job.from, &[]).wait().code(0);
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        for uri in [format!("file:{}", path.display()), format!("exec:cat {}", path.display())] {
            let recv = Ferry::run(["recv", &uri, "--json", "--anon"]);
            recv.code(1).says(&["cut off", "ended after"]);
        }
    }
}
