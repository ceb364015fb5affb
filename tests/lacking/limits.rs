//! Limits of a process: address space, threads.

use std::process::Command;

use testkit::PATIENCE;

use crate::common::{Ferry, Image, Job, MIB, Recv, folder, send, turn};

/// Whether limits can be set from outside; prints why not.
fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        println!("skipped: no {program} here");
    }
    found
}

/// `ulimit -v` leaves too little: the migration fails before it touches anything, and the guest runs on.
#[test]
fn a_source_without_address_space_keeps_its_guest() {
    let _turn = turn();
    if !have("prlimit") {
        return;
    }
    let folder = folder();
    let api = format!("unix:{}", folder.path().join("api").display());
    let vm = Ferry::start(["vm", "--no-kvm", "--mem", "32M", "--working-set", "4M", "--api", &api]);
    let deadline = std::time::Instant::now() + PATIENCE;
    while Ferry::run(["ctl", &api, "status"]).code != Some(0) {
        assert!(std::time::Instant::now() < deadline, "no control socket");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.id())).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size: usize = size.trim().trim_end_matches(" kB").parse().unwrap();
    let limit = format!("--as={}:", (size << 10) + 48 * MIB);
    let set = Command::new("prlimit").args(["--pid", &vm.id().to_string(), &limit]).status().unwrap();
    assert!(set.success());
    let recv = Recv::start("tcp:127.0.0.1:0", ["--json", "--anon"]);
    let failed = Ferry::run(["ctl", &api, "migrate", &recv.uri]);
    failed.code(1).says(&["RLIMIT_AS"]);
    let status = Ferry::run(["ctl", &api, "status", "--json"]);
    assert!(status.stdout.contains("\"state\":\"running\""), "{status:?}");
    Ferry::run(["ctl", &api, "quit"]).code(0);
    vm.wait().code(0);
}

/// The same at the destination, which refuses and listens on.
#[test]
fn a_destination_without_address_space_refuses() {
    let _turn = turn();
    if !have("prlimit") {
        return;
    }
    let job = Job::new(Image::Random, 2 * MIB);
    let mut recv = Recv::start("tcp:127.0.0.1:0", ["--json", "--ram-file", job.to.to_str().unwrap()]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", recv.ferry.id())).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size: usize = size.trim().trim_end_matches(" kB").parse().unwrap();
    let limit = |bytes: String| {
        let pid = recv.ferry.id().to_string();
        // The soft limit alone, which may be raised again.
        let set = Command::new("prlimit").args(["--pid", &pid, &format!("--as={bytes}:")]).status();
        assert!(set.unwrap().success());
    };
    limit(((size << 10) + 48 * MIB).to_string());
    // Whichever allocation is the first that finds no room.
    send(&recv.uri, &job.from, &[]).wait().code(1).says(&["its limit is RLIMIT_AS"]);
    limit("unlimited".into());
    assert!(recv.ferry.refused_or_ended());
    send(&recv.uri, &job.from, &[]).wait().code(0);
    recv.ferry.wait().code(0);
    job.assert_arrived();
}

/// A user of his own, who may have fewer threads than there are streams.
#[test]
fn a_destination_without_threads_fails_both_sides() {
    let _turn = turn();
    if !have("setpriv") || !have("prlimit") || !is_root() {
        return println!(
            "skipped: threads are bounded for users other than root only, whom only root can become"
        );
    }
    let job = Job::new(Image::Random, 2 * MIB);
    std::fs::set_permissions(job.folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let user = 70_000 + std::process::id();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user.to_string(), "--regid", &user.to_string(), "--clear-groups"]);
    command.args([
        "prlimit",
        "--nproc=12:12",
        env!("CARGO_BIN_EXE_pageferry"),
        "recv",
        "tcp:127.0.0.1:0",
        "--json",
    ]);
    command.arg("--ram-file").arg(&job.to);
    let mut recv = Ferry::of(command);
    const SIGN: &str = "pageferry: listening on ";
    let seen = recv.wait_stderr(SIGN);
    let uri = seen.lines().find_map(|line| line.strip_prefix(SIGN)).unwrap().to_owned();
    let sent = send(&uri, &job.from, &["--streams", "32"]).wait();
    for ended in [sent, recv.wait()] {
        ended.code(1).says(&["cannot start thread recv-"]).says(&["RLIMIT_NPROC is 12"]);
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
