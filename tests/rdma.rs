//! Transfers over real RDMA devices: soft-RoCE does. Where there is none, a lab guest that has one runs all of this once more.

#[path = "common/device.rs"]
mod device;
#[cfg(feature = "rdma")]
#[path = "common/ends.rs"]
mod ends;
#[path = "common/in_lab.rs"]
mod in_lab;
#[path = "rdma/lab.rs"]
mod lab;
#[cfg(feature = "rdma")]
#[path = "rdma/loss.rs"]
mod loss;
#[cfg(feature = "rdma")]
#[path = "rdma/torn.rs"]
mod torn;

use std::fs;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use device::device;

const MIB: u64 = 1 << 20;
/// How long a transfer may take: soft-RoCE on emulated CPUs is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// The device's address; returns from the test with a printed reason where there is none.
macro_rules! device_or_skip {
    () => {
        match device() {
            Ok(address) => address,
            Err(why) => return println!("skipped: {why}"),
        }
    };
}
#[cfg(feature = "rdma")]
use device_or_skip;

/// Returns from the test with a printed reason where there is no KVM.
macro_rules! kvm_or_skip {
    () => {
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            return println!("skipped: /dev/kvm: {error}");
        }
    };
}
#[cfg(feature = "rdma")]
use kvm_or_skip;

/// Tests take turns: each may use all there is.
fn turn() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// A file of `mib` MiB; `kind` says what is in a MiB.
fn image(path: &Path, mib: u64, kind: impl Fn(u64) -> Content) {
    let mut file = fs::File::create(path).unwrap();
    file.set_len(mib * MIB).unwrap();
    let mut random = fs::File::open("/dev/urandom").unwrap();
    let mut block = vec![0; MIB as usize];
    for at in 0..mib {
        match kind(at) {
            Content::Hole => continue,
            Content::Zero => block.fill(0),
            Content::Text => block.iter_mut().enumerate().for_each(|(i, b)| *b = b'a' + (i / 77 % 23) as u8),
            Content::Random => random.read_exact(&mut block).unwrap(),
        }
        std::os::unix::fs::FileExt::write_all_at(&file, &block, at * MIB).unwrap();
    }
    file.flush().unwrap();
}

enum Content {
    Hole,
    Zero,
    Text,
    Random,
}

fn mixed(at: u64) -> Content {
    match at % 5 {
        0 => Content::Hole,
        1 => Content::Zero,
        2 => Content::Text,
        _ => Content::Random,
    }
}

/// A destination; killed when dropped.
struct Recv {
    child: Child,
    uri: String,
}

impl Recv {
    fn start(address: Ipv4Addr, to: &Path, args: &[&str]) -> Self {
        let errors = to.with_extension("err");
        let child = Command::new(env!("CARGO_BIN_EXE_pageferry"))
            .args(["recv", &format!("rdma:{address}:0"), "--insecure", "--json", "--ram-file"])
            .arg(to)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut this = Self { child, uri: String::new() };
        loop {
            let said = fs::read_to_string(&errors).unwrap();
            if let Some((_, rest)) = said.split_once("listening on ")
                && let Some((uri, _)) = rest.split_once('\n')
            {
                this.uri = uri.into();
                return this;
            }
            assert!(this.child.try_wait().unwrap().is_none(), "recv ended: {said}");
            assert!(Instant::now() < deadline, "recv does not listen: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn send(&self, from: &Path, args: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_pageferry"))
            .args(["send", &self.uri, "--json", "--ram-file"])
            .arg(from)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits for its end; says whether it succeeded.
    fn ended(mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < deadline, "recv does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Recv {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn report(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("no report ({e}): {}", String::from_utf8_lossy(&output.stderr));
    })
}

/// Moves a file, and checks that what came is the same and as sparse.
fn moves(address: Ipv4Addr, from: &Path, send: &[&str], recv: &[&str]) -> serde_json::Value {
    let to = from.with_extension("copy");
    let destination = Recv::start(address, &to, recv);
    let output = destination.send(from, send).wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "send {send:?}: {told}");
    assert!(destination.ended(), "recv {recv:?}");
    assert!(fs::read(from).unwrap() == fs::read(&to).unwrap(), "{send:?}: the files differ");
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks();
    assert!(blocks(&to) <= blocks(from), "{send:?}: {} blocks became {}", blocks(from), blocks(&to));
    let report = report(&output);
    assert_eq!((&report["mismatches"], &report["streams_lost"]), (&0.into(), &0.into()), "{report}");
    report
}

#[test]
fn what_is_missing_is_named() {
    if device().is_ok() {
        return println!("skipped: nothing is missing here");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_pageferry"))
        .args(["recv", "rdma:127.0.0.1:0", "--anon"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let (code, words) = if cfg!(feature = "rdma") {
        (3, &["no RDMA device", "pageferry lab"][..])
    } else {
        (2, &["--features rdma", "libibverbs-dev", "librdmacm-dev", "libclang-dev", "pkg-config"][..])
    };
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn images_arrive_whole_and_sparse() {
    let address = device_or_skip!();
    let _turn = turn();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    type Kind = fn(u64) -> Content;
    let kinds: [(&str, Kind); 4] = [
        ("random", |_| Content::Random),
        ("zero", |_| Content::Zero),
        ("sparse", |at| if at % 4 == 0 { Content::Random } else { Content::Hole }),
        ("mixed", mixed),
    ];
    for (name, kind) in kinds {
        let from = folder.path().join(name);
        image(&from, 32, kind);
        for args in [&["--streams", "1"][..], &["--streams", "4"], &["--streams", "4", "--rdma-pin-all"]] {
            moves(address, &from, args, &[]);
        }
    }
}

/// Memory whose second half is the first, 2000 bytes on: no page is another's, and all of it is known. Frames that refer to other
/// chunks share a queue pair with pages that are placed.
#[test]
fn what_was_sent_before_is_referred_to() {
    let address = device_or_skip!();
    let _turn = turn();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let from = folder.path().join("digits");
    let mut random = vec![0; 6 * MIB as usize];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
    // What no level makes shorter, and so is placed, comes last.
    let (digits, placed) = random.split_at(4 * MIB as usize);
    let mut content: Vec<u8> = digits.iter().flat_map(|byte| [b'a' + byte % 16, b'a' + byte / 16]).collect();
    content.extend_from_within(..);
    content[8 * MIB as usize..].rotate_left(2000);
    content.extend(placed);
    fs::write(&from, &content).unwrap();
    let wire = |codec: &str| {
        let report = moves(address, &from, &["--streams", "2", "--codec", codec], &[]);
        assert!(report["pages"]["raw"].as_u64().is_some_and(|raw| raw >= 512), "{report}");
        report["wire_bytes"].as_u64().unwrap()
    };
    let (without, with) = (wire("zstd:1"), wire("zstd:2"));
    assert!(with < without * 3 / 4, "{with} {without}");
}

#[test]
fn little_pinned_memory_is_enough() {
    let address = device_or_skip!();
    let _turn = turn();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let from = folder.path().join("random");
    image(&from, 24, |_| Content::Random);
    // Several runs, but not all at a time; and none at all.
    for limit in ["8M", "1M"] {
        let args = ["--streams", "3", "--rdma-max-pinned", limit];
        moves(address, &from, &args, &[]);
        moves(address, &from, &["--streams", "3"], &["--rdma-max-pinned", limit]);
    }
}

#[test]
fn a_killed_side_ends_the_other_with_an_error() {
    let address = device_or_skip!();
    let _turn = turn();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let from = folder.path().join("random");
    image(&from, 256, |_| Content::Random);
    let to = folder.path().join("copy");
    let begun = |to: &Path| {
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(to).map_or(0, |m| m.blocks()) < 8192 {
            assert!(Instant::now() < deadline, "nothing arrives");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    for kill_source in [true, false] {
        let args = ["--link-timeout", "3", "--reconnect-timeout", "0"];
        let mut destination = Recv::start(address, &to, &args);
        let mut source = destination.send(&from, &["--streams", "2", "--link-timeout", "3"]);
        begun(&to);
        if kill_source {
            source.kill().unwrap();
            source.wait().unwrap();
            assert!(!destination.ended(), "recv takes half a file for a whole one");
        } else {
            destination.child.kill().unwrap();
            let output = source.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(report(&output)["status"], "failed");
        }
        let _ = fs::remove_file(&to);
    }
}

#[test]
fn a_running_guest_moves() {
    let address = device_or_skip!();
    let _turn = turn();
    kvm_or_skip!();
    for args in [&["--streams", "1"][..], &["--streams", "3", "--rdma-pin-all"]] {
        demo(address, &[&["--working-set", "4M", "--rate", "2000"], args].concat());
    }
}

/// Moves a guest on KVM, which says itself that it is whole.
fn demo(address: Ipv4Addr, args: &[&str]) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_pageferry"))
        .args(["demo", "--json", "--mem", "64M", "--uri", &format!("rdma:{address}:0")])
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let report = report(&output);
    assert_eq!((&report["verified"], &report["accelerator"]), (&true.into(), &"kvm".into()), "{report}");
    report
}

/// Inside one process, so that what a connection leaves behind shows. `PAGEFERRY_TEST_CONNECTIONS` says how many.
#[cfg(feature = "rdma")]
#[test]
fn connections_leave_nothing_behind() {
    use std::sync::Arc;

    use pageferry::pagecopy::backend::{GuestRam, StaticLog};
    use pageferry::pagecopy::bitmap::PageBitmap;
    use pageferry::pagecopy::choose::CodecMode;
    use pageferry::pagecopy::digest::PageHasher;
    use pageferry::pagecopy::layout::Layout;
    use pageferry::transport::accept::{Acceptor, StreamRequest};
    use pageferry::transport::destination::PageSink;
    use pageferry::transport::dial::{Dialler, Route};
    use pageferry::transport::rdma::{Listener, RdmaOptions};
    use pageferry::transport::source::{PageSource, SourceOptions};
    use pageferry::transport::uri::Uri;
    use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};

    let connections = std::env::var("PAGEFERRY_TEST_CONNECTIONS").map_or(100, |many| many.parse().unwrap());
    let address = device_or_skip!();
    let _turn = turn();
    let ram = || -> Arc<dyn GuestRam> {
        Arc::new(GuestMemory::create(Layout::flat(4 * MIB).unwrap(), &Backing::Memfd).unwrap())
    };
    let timeout = Duration::from_secs(20);
    let options = SourceOptions {
        streams: 1,
        references: false,
        codec: CodecMode::Raw,
        cache_bytes: 0,
        timeout,
        mismatches_max: 0,
    };
    let memory = ram();
    let pending = PageBitmap::full(memory.layout());
    let source = PageSource::new(memory, Arc::new(StaticLog), PageHasher::new(1), options, pending);
    let sink = Arc::new(PageSink::new(ram(), PageHasher::new(1), 0, timeout));
    let acceptor = Acceptor::new(sink, u64::MAX);
    // A port that is free for TCP, too, as for a destination.
    let tcp = std::net::TcpListener::bind((address, 0)).unwrap();
    let listener = Listener::bind(tcp.local_addr().unwrap()).unwrap();
    let uri = Uri::Rdma { host: address.to_string(), port: tcp.local_addr().unwrap().port() };
    let dialler = Dialler::new(&source, &Route::default(), &uri, [7; 16], 1, timeout, RdmaOptions::default());
    let connect = |count: u32| {
        for _ in 0..count {
            let attached = std::thread::scope(|scope| {
                let accepting = scope.spawn(|| {
                    let deadline = Instant::now() + timeout;
                    while Instant::now() < deadline {
                        if let Some(request) = listener.accept().unwrap() {
                            return acceptor.accept(StreamRequest::Queue(request), 0).unwrap();
                        }
                    }
                    None
                });
                let opened = dialler.open(0, &|| false).expect("connected");
                (opened, accepting.join().unwrap().expect("accepted"))
            });
            drop(attached);
        }
    };
    let open_files = || fs::read_dir("/proc/self/fd").unwrap().count();
    let status = |field: &str| -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    connect(20);
    let before = (open_files(), status("VmPin:"), status("VmRSS:"));
    connect(connections);
    let after = (open_files(), status("VmPin:"), status("VmRSS:"));
    println!("files, pinned KiB, resident KiB: {before:?} before, {after:?} after");
    assert_eq!((before.0, before.1), (after.0, after.1), "files and pinned memory");
    // A connection has buffers of 5 MiB: a single one that stayed would show.
    assert!(after.2 < before.2 + 4096, "resident memory: {before:?}, {after:?}");
}
