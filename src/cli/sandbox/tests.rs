//! What a profile refuses, and what it lets through. In processes of their own: nothing of it can be undone.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use nix::sched::CloneFlags;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pageferry::vmm_shim::guest_memory::Backing;
use rustix::net::{AddressFamily, SocketType};

use super::*;

const CHILD: &str = "PAGEFERRY_SANDBOX_TEST";

/// Runs a test of this file in a process of its own, and says whether this is that.
fn alone(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some_and(|name| name == test) {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("cli::sandbox::tests::{test}"), "--nocapture", "--test-threads=1"])
        .env(CHILD, test)
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
    print!("{}", out.lines().filter(|line| line.starts_with("skipped:")).collect::<String>());
    false
}

/// Enters it; whether this kernel has all that it takes.
fn entered(profile: &Profile) -> bool {
    let lacks = engage(profile);
    for lack in &lacks {
        println!("skipped: {}", lack.text);
    }
    lacks.is_empty()
}

/// A call, and what it says without a sandbox: anything but that it is refused.
type Call = (&'static str, fn() -> io::Result<()>);

const NOBODY: i32 = 0x3fff_ffff;

/// What no profile has. None of them does anything where it is let through.
const FORBIDDEN: &[Call] = &[
    ("ptrace", || Ok(nix::sys::ptrace::attach(Pid::from_raw(NOBODY))?)),
    ("chroot", || Ok(nix::unistd::chroot("/nowhere/at/all")?)),
    ("unshare", || Ok(nix::sched::unshare(CloneFlags::CLONE_NEWUSER)?)),
    ("setns", || Ok(nix::sched::setns(File::open("/dev/null")?, CloneFlags::empty())?)),
    ("personality", || Ok(nix::sys::personality::get().map(drop)?)),
    ("process_vm_readv", || {
        let (from, mut to) = ([7_u8; 8], [0_u8; 8]);
        let remote = RemoteIoVec { base: from.as_ptr().addr(), len: from.len() };
        process_vm_readv(Pid::this(), &mut [io::IoSliceMut::new(&mut to)], &[remote])?;
        Ok(())
    }),
    ("socket AF_ALG", || {
        let family = AddressFamily::from_raw(38);
        Ok(rustix::net::socket(family, SocketType::SEQPACKET, None).map(drop)?)
    }),
];

#[track_caller]
fn assert_refused(name: &str, result: &io::Result<()>, error: i32) {
    assert_eq!(
        result.as_ref().map_err(io::Error::raw_os_error).err(),
        Some(Some(error)),
        "{name}: {result:?}"
    );
}

#[test]
fn calls_that_nobody_needs_are_refused_and_were_not_before() {
    if !alone("calls_that_nobody_needs_are_refused_and_were_not_before") {
        return;
    }
    for (name, call) in FORBIDDEN {
        let result = call();
        let error = result.as_ref().err().and_then(io::Error::raw_os_error);
        assert!(
            error != Some(libc::EPERM),
            "{name} is refused without a sandbox, and proves nothing: {result:?}"
        );
    }
    let api = Path::new("/tmp/none");
    if !entered(&Profile::vm(api, &Backing::Memfd, false)) {
        return;
    }
    for (name, call) in FORBIDDEN {
        assert_refused(name, &call(), libc::EPERM);
    }
    // In threads that were there before, too, and in those that come.
    let mut tasks = 0;
    std::thread::spawn(|| assert_refused("in a thread", &FORBIDDEN[0].1(), libc::EPERM)).join().unwrap();
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n") && status.contains("\nNoNewPrivs:\t1\n"), "{status}");
        tasks += 1;
    }
    assert!(tasks >= 2, "the harness's thread is there");
    // Programs are run, and gain nothing.
    let status = Command::new("cat").arg("/proc/self/status").output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    for none in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "Seccomp:\t2", "NoNewPrivs:\t1"] {
        assert!(status.contains(none), "{none}: {status}");
    }
    // Others' sockets, and files anywhere but where the system has its own.
    let _ = TcpStream::connect("127.0.0.1:1").map_err(|e| assert_eq!(e.kind(), ErrorKind::ConnectionRefused));
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("archive"), "x").unwrap();
    fs::rename(folder.path().join("archive"), folder.path().join("renamed")).unwrap();
    for system in ["/etc/pageferry-test", "/usr/pageferry-test", "/proc/sys/kernel/hostname"] {
        let result = File::options().write(true).create(true).truncate(false).open(system).map(drop);
        assert_refused(system, &result, libc::EACCES);
    }
    assert!(fs::read("/etc/passwd").is_ok());
    // A port that it was not made to listen on.
    assert_refused("bind", &TcpListener::bind("127.0.0.1:0").map(drop), libc::EACCES);
}

#[test]
fn a_receiver_has_its_file_and_its_port_and_nothing_else() {
    if !alone("a_receiver_has_its_file_and_its_port_and_nothing_else") {
        return;
    }
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let unix = outside.path().join("s");
    let _unix = UnixListener::bind(&unix).unwrap();
    assert!(TcpStream::connect(at).is_ok() && Command::new("true").status().is_ok());

    let ram = inside.path().join("ram");
    let uri = format!("tcp:127.0.0.1:{}", at.port()).parse().unwrap();
    if !entered(&Profile::recv(&uri, Some(&ram), None, false)) {
        return;
    }
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&ram).unwrap();
    file.write_all(b"memory").unwrap();
    file.sync_all().unwrap();
    File::open(inside.path()).unwrap().sync_all().unwrap();
    fs::rename(&ram, inside.path().join("other")).unwrap();
    fs::remove_file(inside.path().join("other")).unwrap();
    assert!(fs::read_to_string("/proc/self/status").unwrap().contains("Threads:"));

    for path in [&secret, Path::new("/etc/passwd"), Path::new("/root"), Path::new("/dev/mem")] {
        if path.exists() {
            assert_refused("open", &File::open(path).map(drop), libc::EACCES);
        }
    }
    assert_refused("create", &fs::write(outside.path().join("new"), "x"), libc::EACCES);
    assert_refused("remove", &fs::remove_file(&secret), libc::EACCES);
    assert_refused("connect", &TcpStream::connect(at).map(drop), libc::EACCES);
    assert_refused("spawn", &Command::new("true").status().map(drop), libc::EPERM);
    drop(listener);
    assert_refused("another port", &TcpListener::bind("127.0.0.1:1").map(drop), libc::EACCES);
    drop(TcpListener::bind(at).unwrap());
    // Threads, memory and what is open still work.
    let sum = std::thread::spawn(|| vec![1_u8; 1 << 20].iter().map(|&b| u64::from(b)).sum::<u64>());
    assert_eq!(sum.join().unwrap(), 1 << 20);
    let (mut one, mut other) = UnixStream::pair().unwrap();
    one.write_all(b"x").unwrap();
    other.read_exact(&mut [0]).unwrap();
}

#[test]
fn strict_runs_no_program_and_has_what_it_is_allowed() {
    if !alone("strict_runs_no_program_and_has_what_it_is_allowed") {
        return;
    }
    let (allowed, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let memory = Backing::Memfd;
    let mut profile = Profile::vm(&allowed.path().join("api"), &memory, true);
    profile.allow(allowed.path()).unwrap();
    assert!(profile.allow(&outside.path().join("none")).is_err());
    // Without it a host may know no name.
    let knows_names = Path::new("/etc/hosts").exists();
    if !entered(&profile) {
        return;
    }
    fs::write(allowed.path().join("archive"), "x").unwrap();
    assert_refused("create", &fs::write(outside.path().join("archive"), "x"), libc::EACCES);
    assert_refused("read", &fs::read("/etc/passwd").map(drop), libc::EACCES);
    assert_refused("spawn", &Command::new("true").status().map(drop), libc::EPERM);
    let resolved = std::net::ToSocketAddrs::to_socket_addrs("localhost:1");
    assert!(!knows_names || resolved.is_ok(), "names are resolved");
}

#[test]
fn a_thread_that_leaves_nothing_writes_what_is_open() {
    let mut file = tempfile::tempfile().unwrap();
    let mut same = file.try_clone().unwrap();
    let worked = std::thread::spawn(move || {
        Leaving::begin().leave_nothing();
        same.write_all(b"line").unwrap();
        let status = fs::read_to_string("/proc/thread-self/status");
        (status.is_err(), File::open("/dev/null").is_err())
    });
    let (no_status, no_file) = worked.join().unwrap();
    if !no_file {
        return println!("skipped: this kernel has no landlock");
    }
    assert!(no_status);
    let mut text = String::new();
    io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "line");
    // It was that thread alone.
    assert!(File::open("/dev/null").is_ok());
}
