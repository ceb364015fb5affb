//! File systems that are too small, or fill up while pages come.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::pagecopy::backend::{Fault, GuestRam};
use pageferry::pagecopy::bitmap::PageBitmap;
use pageferry::pagecopy::layout::Layout;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::kvm;
use testkit::{PATIENCE, Rng};
use vm_memory::Bytes;

use crate::common::tmpfs::Tmpfs;
use crate::common::{Ended, Ferry, MIB, PAGE, Recv, blocks, folder, send, turn};

/// Random pages, with a hole every 2 MiB: no part of it may come as large pages, ahead of its content.
fn image(path: &Path, mib: usize) {
    let file = File::create(path).unwrap();
    file.set_len((mib * MIB) as u64).unwrap();
    let mut rng = Rng::new(11);
    for at in (0..mib).step_by(2) {
        file.write_all_at(&rng.bytes(2 * MIB - PAGE), (at * MIB) as u64).unwrap();
    }
}

#[track_caller]
fn ended_in_order(ended: &Ended, words: &[&str]) {
    ended.code(1);
    for word in words {
        ended.says(&[word]);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_the_first_page() {
    let _turn = turn();
    let Some(small) = Tmpfs::new(16) else { return };
    let folder = folder();
    let from = folder.path().join("from");
    image(&from, 32);
    let mut recv =
        Recv::start("tcp:127.0.0.1:0", ["--json", "--ram-file", small.path("f").to_str().unwrap()]);
    let sent = send(&recv.uri, &from, &["--streams", "1"]).wait();
    let needed = format!("the guest brings {} bytes", 32 * MIB - 16 * PAGE);
    let of = format!("the file system of {} has ", small.path("f").display());
    ended_in_order(&sent, &[&needed, &of, "mount it larger"]);
    // It listens on, and takes what fits.
    assert!(recv.ferry.refused_or_ended(), "the destination ended");
    let fits = folder.path().join("fits");
    image(&fits, 8);
    send(&recv.uri, &fits, &[]).wait().code(0);
    recv.ferry.wait().code(0);
    assert_eq!(std::fs::read(&fits).unwrap(), std::fs::read(small.path("f")).unwrap());
}

/// The room goes while pages come: by each way of bringing them in.
#[test]
fn room_that_vanishes_fails_both_sides_at_once() {
    let folder = folder();
    let from = folder.path().join("from");
    image(&from, 32);
    for (streams, codec) in [("1", "raw"), ("4", "raw"), ("2", "zstd")] {
        let _turn = turn();
        let Some(small) = Tmpfs::new(48) else { return };
        let to = small.path("f");
        let recv = Recv::start("tcp:127.0.0.1:0", ["--json", "--ram-file", to.to_str().unwrap()]);
        let more = ["--streams", streams, "--codec", codec, "--bandwidth", "8MB/s"];
        let sending = send(&recv.uri, &from, &more);
        let deadline = Instant::now() + PATIENCE;
        // It is made when the source has said what comes.
        while !to.exists() || blocks(&to) < MIB as u64 {
            assert!(Instant::now() < deadline, "nothing came");
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ballast = small.fill(0).unwrap();
        let (sent, received) = (sending.wait(), recv.ferry.wait());
        let of = format!("the file system of {} has ", to.display());
        for ended in [&sent, &received] {
            ended_in_order(ended, &[&of, "No space left on device"]);
        }
        // Not after 300 s of trying.
        let report = sent.report();
        assert_eq!((report.reconnects, report.streams_reconnected), (0, 0), "{sent:?}");
    }
}

#[test]
fn a_vm_whose_memory_file_does_not_fit_does_not_start() {
    let _turn = turn();
    let Some(small) = Tmpfs::new(16) else { return };
    let api = format!("unix:{}", small.path("api").display());
    let memory = format!("file:{}", small.path("ram").display());
    for incoming in [&[][..], &["--incoming", "tcp:127.0.0.1:0"]] {
        let args = ["vm", "--no-kvm", "--mem", "64M", "--api", &api, "--memory", &memory];
        let ended = Ferry::run(args.iter().chain(incoming));
        ended.code(3).says(&["the guest's memory takes 67108864 bytes, but the file system of"]);
        ended.says(&["mount it larger"]);
    }
}

/// A guest without KVM is threads of the process: what they touch cannot be had.
#[test]
fn a_guest_whose_room_vanishes_does_not_end_silently() {
    let _turn = turn();
    let Some(small) = Tmpfs::new(80) else { return };
    let folder = folder();
    let api = format!("unix:{}", folder.path().join("api").display());
    let ram = small.path("ram");
    let memory = format!("file:{}", ram.display());
    let vm = Command::new(env!("CARGO_BIN_EXE_pageferry"))
        .args(["vm", "--no-kvm", "--mem", "64M", "--working-set", "48M", "--rate", "0", "--paused"])
        .args(["--api", &api, "--memory", &memory])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while Ferry::run(["ctl", &api, "status"]).code != Some(0) {
        assert!(Instant::now() < deadline, "no control socket");
    }
    let _ballast = small.fill(0).unwrap();
    // The answer may not get out.
    Ferry::run(["ctl", &api, "resume"]);
    let ended = vm.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!((ended.status.code(), ended.status.signal()), (Some(5), None), "{said}");
    assert!(
        said.contains(&format!("a page of the memory file {} could not be had", ram.display())),
        "{said}"
    );
}

/// KVM does not get the page, and says so.
#[test]
fn a_vcpu_whose_page_cannot_be_had_stops_with_the_file_systems_name() {
    let _turn = turn();
    if let Err(error) = kvm::open() {
        return println!("skipped: no /dev/kvm ({error})");
    }
    let Some(small) = Tmpfs::new(80) else { return };
    let folder = folder();
    let api = format!("unix:{}", folder.path().join("api").display());
    let ram = small.path("ram");
    let memory = format!("file:{}", ram.display());
    let args = [
        "--mem",
        "64M",
        "--working-set",
        "48M",
        "--rate",
        "0",
        "--paused",
        "--api",
        &api,
        "--memory",
        &memory,
    ];
    let vm = Ferry::start(["vm"].iter().chain(&args));
    let asked = |what: &[&str]| Ferry::run(["ctl", &api].iter().chain(what));
    let deadline = Instant::now() + PATIENCE;
    while asked(&["status"]).code != Some(0) {
        assert!(Instant::now() < deadline, "no control socket");
    }
    let _ballast = small.fill(0).unwrap();
    asked(&["resume"]).code(0);
    let of = format!("the file system of {} has ", ram.display());
    loop {
        let status = asked(&["status", "--json"]);
        if status.stdout.contains("crashed") {
            let said = status.stdout.contains("could not be had") && status.stdout.contains(&of);
            assert!(said, "{status:?}");
            break;
        }
        assert!(Instant::now() < deadline, "{status:?}");
    }
    asked(&["quit"]).code(0);
    vm.wait();
}

/// The kernel takes room for a page before it sees that there is one: a memory that just fits is not short of any.
#[test]
fn a_page_that_is_there_needs_no_room() {
    let _turn = turn();
    let Some(small) = Tmpfs::new(1) else { return };
    let backing = Backing::File { path: small.path("ram"), create: true };
    let layout = Layout::flat(MIB as u64).unwrap();
    let memory = Arc::new(GuestMemory::create(layout, &backing).unwrap());
    if let Err(error) = memory.missing_unit() {
        return println!("skipped: {error}");
    }
    memory.populate(0, 4).unwrap();
    let pages = PageBitmap::new(4);
    pages.insert(1, 0b110);
    let missing = memory.clone().miss(&pages).unwrap();
    missing.place(1, 1, &[7; 2 * PAGE]).unwrap();
    // All of it is there, and the file system is full.
    assert_eq!(memory.room().unwrap().bytes, 0);
    missing.place(1, 0, &[9; 4 * PAGE]).unwrap();
    missing.place_zeros(1, 0, 4).unwrap();
    missing.settle(Fault { chunk: 1, page: 2, thread: 0 }).unwrap();
    missing.end().unwrap();
    let words: Vec<u8> = (0..4).map(|page| memory.chunk(1).read_obj(page * PAGE).unwrap()).collect();
    assert_eq!(words, [0, 7, 7, 0]);
}
