//! Guests that come to one host at the same time, of which each has room alone.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::{Arriving, Destination, Landing};
use rustix::fs::FallocateFlags;
use testkit::PATIENCE;
use testkit::proxy::{Harm, Plan, Proxy, Way};

use crate::common::tmpfs::Tmpfs;
use crate::common::{Ferry, Image, Job, MIB, PAGE, Recv, folder, send, turn};

/// Two guests of this size, and a file system for one and a half.
const GUEST: usize = 24 * MIB;
const ROOM_MIB: usize = 40;

/// Memory with a hole every 2 MiB: no part of it comes as large pages, ahead of its content.
fn job(len: usize) -> Job {
    let mut job = Job::new(Image::Random, len);
    let file = File::options().write(true).open(&job.from).unwrap();
    for at in (2 * MIB - PAGE..len).step_by(2 * MIB) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, at as u64, PAGE as u64).unwrap();
        job.content[at..at + PAGE].fill(0);
    }
    job
}

/// A command that takes a guest in to this file.
fn recv(file: &Path) -> Recv {
    Recv::start("tcp:127.0.0.1:0", ["--json", "--link-timeout", "60", "--ram-file", file.to_str().unwrap()])
}

/// The same in this process.
fn receive(file: &Path) -> (Arriving, String) {
    let destination = Destination::builder().bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = destination.uri().to_string();
    let backing = Backing::File { path: file.into(), create: true };
    let land = move |offer: &pageferry::Offer| {
        Ok(Landing::memory(Arc::new(GuestMemory::create(offer.layout.clone(), &backing)?)))
    };
    (destination.receive(land).unwrap(), uri)
}

/// Sends a guest of which so much arrives, and then nothing for longer than the test takes.
fn begin(port: u16, job: &Job, arrives: usize) -> (Ferry, Proxy) {
    let plan = Plan { connection: 1, way: Way::ToDestination, at: arrives, harm: Harm::Stall };
    let proxy = Proxy::start(port, plan);
    let args = ["--streams", "1", "--codec", "raw", "--link-timeout", "60"];
    let source = send(&proxy.uri(), &job.from, &args);
    proxy.wait_done();
    (source, proxy)
}

#[test]
fn the_second_of_two_hears_before_its_first_page_that_there_is_no_room_and_a_killed_one_needs_none() {
    let _turn = turn();
    let Some(small) = Tmpfs::new(ROOM_MIB) else { return };
    let job = job(GUEST);
    let (first, mut second) = (recv(&small.path("first")), recv(&small.path("second")));
    let (_source, _proxy) = begin(first.port(), &job, MIB);
    let refused = send(&second.uri, &job.from, &[]).wait();
    let needed = format!("the guest brings {} bytes, but the file system of", GUEST - 12 * PAGE);
    refused.code(1).says(&[&needed]);
    refused.says(&["bytes that other guests are bringing here, has"]).says(&["mount it larger"]);
    assert_eq!(refused.report().wire_bytes, 0, "{refused:?}");
    assert!(second.ferry.refused_or_ended(), "the destination ended");
    // Nobody is left to say that it does not come.
    first.ferry.signal("KILL");
    assert_eq!(first.ferry.wait().code, None);
    std::fs::remove_file(small.path("first")).unwrap();
    send(&second.uri, &job.from, &[]).wait().code(0);
    second.ferry.wait().code(0);
    assert!(std::fs::read(small.path("second")).unwrap() == job.content);
}

#[test]
fn two_of_one_process_are_counted_together() {
    let _turn = turn();
    let Some(small) = Tmpfs::new(ROOM_MIB) else { return };
    let job = job(GUEST);
    let ((first, first_uri), (second, second_uri)) =
        (receive(&small.path("first")), receive(&small.path("second")));
    let port = first_uri.rsplit(':').next().unwrap().parse().unwrap();
    let (_source, _proxy) = begin(port, &job, MIB);
    let refused = send(&second_uri, &job.from, &[]).wait();
    refused.code(1).says(&["bytes that other guests are bringing here, has"]);
    first.cancel().unwrap();
    assert!(first.wait().is_err());
    std::fs::remove_file(small.path("first")).unwrap();
    send(&second_uri, &job.from, &[]).wait().code(0);
    second.wait().unwrap();
    assert!(std::fs::read(small.path("second")).unwrap() == job.content);
}

/// What has come is not counted twice: as what is taken, and as what is to come.
#[test]
fn a_claim_shrinks_as_pages_come() {
    let _turn = turn();
    let Some(large) = Tmpfs::new(GUEST / MIB + 24) else { return };
    let (job, other) = (job(GUEST), job(20 * MIB));
    let (first, second) = (recv(&large.path("first")), recv(&large.path("second")));
    let (_source, _proxy) = begin(first.port(), &job, 16 * MIB);
    let begun = Instant::now();
    // Others are told once a second.
    while send(&second.uri, &other.from, &[]).wait().code != Some(0) {
        assert!(begun.elapsed() < PATIENCE, "what has come is still spoken for");
    }
    second.ferry.wait().code(0);
    assert!(std::fs::read(large.path("second")).unwrap() == other.content);
}

/// Where something else lies where the account should be, guests come as if there was none.
#[test]
fn without_an_account_guests_are_taken_in_all_the_same() {
    let _turn = turn();
    let is_root = rustix::process::geteuid().is_root();
    if !is_root || Command::new("setpriv").arg("--version").output().is_err() {
        return println!("skipped: only root can be another user, whose account it may spoil");
    }
    let user = (180_000 + std::process::id()).to_string();
    let account = format!("/dev/shm/pageferry-room.{user}");
    if File::create(&account).is_err() {
        return println!("skipped: there is no /dev/shm");
    }
    let job = Job::new(Image::Random, MIB);
    let folder = folder();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let file = folder.path().join("f");
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups", env!("CARGO_BIN_EXE_pageferry")]);
    command.args(["recv", "tcp:127.0.0.1:0", "--ram-file"]).arg(&file);
    let recv = Recv::of(Ferry::of(command));
    send(&recv.uri, &job.from, &[]).wait().code(0);
    let ended = recv.ferry.wait();
    std::fs::remove_file(&account).unwrap();
    ended.code(0).says(&["are not counted together", &account]);
    assert!(std::fs::read(&file).unwrap() == job.content);
}
