//! Hosts that fail otherwise: a cgroup at its limit, no huge pages, no descriptors or threads at the source, a path that carries a tenth.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::common::{Ended, Ferry, Image, Job, MIB, Recv, folder, send, turn};

/// A memory cgroup of its own, of either version; gone in the end.
struct Cgroup(PathBuf);

impl Cgroup {
    /// `None`, with the reason printed, where none can be made.
    fn new(limit: usize) -> Option<Self> {
        let name = format!("pageferry-test-{}", std::process::id());
        for (top, file) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let folder = PathBuf::from(top).join(&name);
            if std::fs::create_dir(&folder).is_err() {
                continue;
            }
            let made = Self(folder);
            if std::fs::write(made.0.join(file), limit.to_string()).is_ok() {
                return Some(made);
            }
        }
        println!("skipped: no memory cgroup can be made here (it takes root, and one that is delegated)");
        None
    }

    /// A command in it.
    fn start(&self, args: &[&str]) -> Ferry {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(&self.0);
        command.arg(env!("CARGO_BIN_EXE_pageferry")).args(args);
        Ferry::of(command)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Whoever was in it has ended.
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_guest_that_the_cgroup_has_no_room_for_is_refused_before_the_first_page() {
    let _turn = turn();
    let Some(cgroup) = Cgroup::new(100 * MIB) else { return };
    let (large, fits) = (Job::new(Image::Random, 128 * MIB), Job::new(Image::Random, 4 * MIB));
    let mut recv = Recv::of(cgroup.start(&["recv", "tcp:127.0.0.1:0", "--anon"]));
    let refused = send(&recv.uri, &large.from, &[]).wait();
    refused.code(1).says(&["within its cgroup's limit"]);
    assert_eq!(refused.report().wire_bytes, 0, "{refused:?}");
    // It listens on, for what fits.
    assert!(recv.ferry.refused_or_ended());
    send(&recv.uri, &fits.from, &[]).wait().code(0);
    recv.ferry.wait().code(0).says(&["within its cgroup's limit"]);
}

#[test]
fn a_destination_without_huge_pages_does_not_start() {
    let _turn = turn();
    let free = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    if free.trim() != "0" {
        return println!("skipped: this host has huge pages");
    }
    let folder = folder();
    let api = format!("unix:{}", folder.path().join("api").display());
    let args = ["vm", "--mem", "64M", "--memory", "hugetlb", "--no-kvm", "--api", &api];
    for incoming in [&[][..], &["--incoming", "tcp:127.0.0.1:0"]] {
        let ended = Ferry::run(args.iter().chain(incoming));
        ended.code(3).says(&["it takes 32 free huge pages of 2097152 bytes"]).says(&["nr_hugepages"]);
    }
}

/// Both say what is short, at once, and the source is as it was.
#[track_caller]
fn assert_both_hear(job: &Job, [sent, received]: [Ended; 2], words: &str) {
    sent.code(1).says(&["the source is unchanged"]).says(&[words]);
    received.code(1).says(&["the source"]);
    assert_eq!(std::fs::read(&job.from).unwrap(), job.content);
}

#[test]
fn a_source_without_descriptors_fails_both_sides() {
    let _turn = turn();
    let job = Job::new(Image::Random, 2 * MIB);
    let recv = Recv::to_file(&job.to, 10);
    let from = job.from.to_str().unwrap();
    let sent = Ferry::start_limited(20, ["send", &recv.uri, "--ram-file", from, "--streams", "64"]).wait();
    assert_both_hear(&job, [sent, recv.ferry.wait()], "RLIMIT_NOFILE is 20: raise it");
}

#[test]
fn a_source_without_threads_fails_both_sides() {
    let _turn = turn();
    let have = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !have("setpriv") || !have("prlimit") || !rustix::process::geteuid().is_root() {
        return println!(
            "skipped: threads are bounded for users other than root only, whom only root can become"
        );
    }
    let job = Job::new(Image::Random, 2 * MIB);
    std::fs::set_permissions(job.folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let recv = Recv::to_file(&job.to, 10);
    let user = (170_000 + std::process::id()).to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "prlimit", "--nproc=12:12"]);
    command.arg(env!("CARGO_BIN_EXE_pageferry")).args(["send", &recv.uri, "--streams", "32", "--ram-file"]);
    let sent = Ferry::of({
        command.arg(&job.from);
        command
    });
    let sent = sent.wait();
    assert_both_hear(&job, [sent, recv.ferry.wait()], "another thread (RLIMIT_NPROC is 12");
}

/// Carries connections on, each way no faster than so many bytes a second.
fn slow_path(to: u16, bytes_per_s: usize) -> String {
    const PIECE: usize = 16 << 10;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let carry = move |mut from: TcpStream, mut to: TcpStream| {
        let mut piece = [0; PIECE];
        while let Ok(len @ 1..) = from.read(&mut piece) {
            if to.write_all(&piece[..len]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_secs_f64(len as f64 / bytes_per_s as f64));
        }
        let _ = to.shutdown(Shutdown::Write);
    };
    // For as long as the process is there.
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let far = TcpStream::connect(("127.0.0.1", to)).unwrap();
            let (near_again, far_again) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || carry(near, far));
            std::thread::spawn(move || carry(far_again, near_again));
        }
    });
    uri
}

/// It takes ten times as long, longer than either side's patience, and is neither given up nor kept in memory.
#[test]
fn a_peer_that_is_ten_times_slower_than_agreed_is_waited_for() {
    let _turn = turn();
    let job = Job::new(Image::Random, 12 * MIB);
    let recv = Recv::to_file(&job.to, 1);
    let uri = slow_path(recv.port(), 4 * MIB);
    let args = ["--link-timeout", "1", "--streams", "1", "--codec", "raw", "--bandwidth", "40MiB"];
    let sent = send(&uri, &job.from, &args).wait();
    let report = sent.code(0).report();
    assert!(report.verified && report.streams_lost == 0, "{sent:?}");
    assert!(report.total_ms > 2000.0, "it was no slower: {sent:?}");
    recv.ferry.wait().code(0);
    job.assert_arrived();
}
