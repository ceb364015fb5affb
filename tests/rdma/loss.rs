//! A queue pair, a device, or memory to pin that is not there any more, or not enough.

use std::fs;
use std::io::Write;
use std::os::fd::RawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::Destination;
use pageferry::pagecopy::backend::{Guest, GuestRam};
use pageferry::vmm_shim::guests::counter::{Checker, CounterParams, PAGE_WORDS_MAX, Side};
use pageferry::vmm_shim::vmm::{self, GuestImage, Tracker, Vm, VmConfig};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::ends::{Hooked, Still, Taker, Told, differences, empty, ferry, full, source as source_of};
use crate::{Content, PATIENCE, Recv, device, device_or_skip, image, kvm_or_skip, report, turn};

/// The connection manager's command that ends a connection, and the bytes that follow its head: the connection's number.
const DISCONNECT: u32 = 10;
const NUMBER_BYTES: u16 = 4;

/// Has the kernel end the connection that this process opened last, in the way in which its owner would: by a command on the file
/// of its event channel. The owner learns of it as of any end.
fn end_a_connection() {
    let is_channel =
        |fd: &RawFd| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|to| to.ends_with("rdma_cm"));
    let names = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let files = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_channel);
    let newest = files.max().expect("a connection over RDMA");
    let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let mut file = fs::File::from(pidfd_getfd(own, newest, PidfdGetfdFlags::empty()).unwrap());
    // Numbers are the kernel's; those of other files are refused.
    let ended = (0..10_000u32).any(|number| {
        let words = [DISCONNECT.to_ne_bytes(), u32::from(NUMBER_BYTES).to_ne_bytes(), number.to_ne_bytes()];
        file.write(&words.concat()).is_ok()
    });
    assert!(ended, "no connection could be ended");
}

/// A hook that ends a connection once this many chunks were read.
fn ends_one_after(chunks: u32) -> impl Fn(u32, u32) + Send + Sync + 'static {
    let (reads, done) = (std::sync::atomic::AtomicU32::new(0), AtomicBool::new(false));
    move |_, _| {
        if reads.fetch_add(1, Ordering::Relaxed) >= chunks && !done.swap(true, Ordering::Relaxed) {
            end_a_connection();
        }
    }
}

#[test]
fn three_of_four_queue_pairs_are_enough() {
    let address = device_or_skip!();
    let _turn = turn();
    let memory = full(32);
    for chunks in [3, 60] {
        let from = source_of(
            Hooked::new(&memory, ends_one_after(chunks)),
            Arc::new(Told::default()),
            Arc::new(Still),
            4,
        );
        let arrived = empty(memory.layout().clone());
        let to = Taker { ram: arrived.clone(), guest: Arc::new(Still) };
        let (sent, received) =
            ferry(&format!("rdma:{address}:0"), from, Destination::builder().insecure(true), to);
        let (report, _) = (sent.unwrap(), received.unwrap());
        assert_eq!((report.streams_lost, report.mismatches, report.verified), (1, 0, true), "{report:?}");
        assert_eq!(differences(&memory, &arrived), 0, "pages that are not as the source has them");
    }
}

/// What a guest prints.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_running_guest_does_not_notice_a_lost_queue_pair() {
    let address = device_or_skip!();
    let _turn = turn();
    kvm_or_skip!();
    let params = CounterParams { working_set: 8 << 20, pages_per_s: 2000, page_words: PAGE_WORDS_MAX };
    let (here, there) = (Console::default(), Console::default());
    let machine = |guest, console: &Console| {
        let ram = empty(vmm::layout(64 << 20).unwrap());
        let config = VmConfig { cpus: 1, guest, tracker: Tracker::Bitmap };
        let vm = Arc::new(Vm::new(config, ram.clone(), Box::new(console.clone())).unwrap());
        vm.start().unwrap();
        (vm, ram)
    };
    let (source, memory) = machine(GuestImage::Counter(params), &here);
    let (destination, arrived) = machine(GuestImage::Incoming, &there);
    source.resume().unwrap();
    let passes = |side| {
        let mut check = Checker::new(1, params.pages(1));
        check.feed(Side::Source, &here.0.lock().unwrap()).unwrap();
        check.feed(Side::Destination, &there.0.lock().unwrap()).unwrap();
        let (before, after) = check.passes()[0];
        if side == Side::Source { before } else { after }
    };
    let deadline = Instant::now() + PATIENCE;
    let runs_at = |side| {
        while passes(side) < 2 {
            assert!(Instant::now() < deadline, "the guest does not get on at the {side:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    runs_at(Side::Source);
    let from =
        source_of(Hooked::new(&memory, ends_one_after(20)), source.dirty_log().unwrap(), source.clone(), 4);
    let to = Taker { ram: arrived, guest: destination.clone() };
    let (sent, received) =
        ferry(&format!("rdma:{address}:0"), from, Destination::builder().insecure(true), to);
    let (report, arrival) = (sent.unwrap(), received.unwrap());
    println!("lost {}, torn {}, rounds {}", report.streams_lost, report.torn, report.rounds);
    assert!(arrival.running);
    assert_eq!((report.streams_lost, report.mismatches, report.verified), (1, 0, true), "{report:?}");
    runs_at(Side::Destination);
}

#[test]
fn too_little_memory_to_pin_is_named_with_what_to_do() {
    let address = device_or_skip!();
    let _turn = turn();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let from = folder.path().join("random");
    image(&from, 8, |_| Content::Random);
    // The limit holds only for those without the capability.
    let less = ["--bounding-set=-ipc_lock", "prlimit", "--memlock=65536:65536"];
    let tried = Command::new("setpriv").args(less).arg("true").output();
    if !tried.as_ref().is_ok_and(|output| output.status.success()) {
        return println!("skipped: setpriv and prlimit do not lower the limit: {tried:?}");
    }
    let destination = Recv::start(address, &folder.path().join("copy"), &["--link-timeout", "5"]);
    let output = Command::new("setpriv")
        .args(less)
        .args([env!("CARGO_BIN_EXE_pageferry"), "send", &destination.uri, "--ram-file"])
        .arg(&from)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for words in ["RLIMIT_MEMLOCK is 65536 bytes", "ulimit -l unlimited", "--rdma-max-pinned"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(!destination.ended(), "recv takes nothing for a file");
}

/// The limit allows some of the memory: what is pinned is let go for what is needed next, and nothing is lost. Where it does not allow
/// the first of it, it is named at once.
#[test]
fn a_limit_on_locked_memory_that_is_met_in_mid_transfer() {
    let address = device_or_skip!();
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("random"), folder.path().join("copy"));
    image(&from, 48, |_| Content::Random);
    for (mib, moves) in [(20, true), (6, false)] {
        let limit = format!("--memlock={0}:{0}", mib << 20);
        let less = ["--bounding-set=-ipc_lock", "prlimit", limit.as_str()];
        let tried = Command::new("setpriv").args(less).arg("true").output();
        if !tried.as_ref().is_ok_and(|output| output.status.success()) {
            return println!("skipped: setpriv and prlimit do not lower the limit: {tried:?}");
        }
        let destination = Recv::start(address, &to, &[]);
        let output = Command::new("setpriv")
            .args(less)
            .args([env!("CARGO_BIN_EXE_pageferry"), "send", &destination.uri, "--streams", "1"])
            .args(["--codec", "raw", "--json", "--ram-file"])
            .arg(&from)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let report = report(&output);
        if moves {
            assert_eq!(output.status.code(), Some(0), "{said}");
            assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        } else {
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains(&format!("RLIMIT_MEMLOCK is {} bytes", mib << 20)), "{said}");
        }
        assert_eq!((&report["streams_lost"], &report["reconnects"]), (&0.into(), &0.into()), "{report}");
    }
}

/// The lab's RDMA device, while it is being removed; there again in the end.
struct Removal(std::process::Child);

impl Removal {
    fn begin() -> Self {
        Self(Command::new("rdma").args(["link", "delete", "rxe0"]).spawn().unwrap())
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        // Without those who used it nothing is in its way.
        let status = self.0.wait().unwrap();
        let add = ["link", "add", "rxe0", "type", "rxe", "netdev", "pferry0"];
        let added = Command::new("rdma").args(add).output().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while device().is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        if !std::thread::panicking() {
            assert!(status.success() && added.status.success() && device().is_ok(), "{status}, {added:?}");
        }
    }
}

#[test]
fn the_guest_runs_on_when_its_device_is_removed() {
    let address = device_or_skip!();
    let _turn = turn();
    kvm_or_skip!();
    // A process that ever used the device keeps it open, and that keeps the removal waiting.
    if std::env::var_os("PAGEFERRY_TEST_REMOVAL").is_none()
        || !Path::new("/sys/class/infiniband/rxe0").exists()
    {
        return println!("skipped: only in the lab, in a process of its own");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let vm = |name: &str, more: &[&str]| {
        let api = format!("unix:{}", path(name).display());
        let child = Command::new(env!("CARGO_BIN_EXE_pageferry"))
            .args(["vm", "--guest", "counter", "--mem", "256M", "--working-set", "128M", "--rate", "0"])
            .args(["--link-timeout", "4", "--api", &api, "--serial"])
            .arg(path(&format!("{name}.serial")))
            .args(more)
            .stdin(Stdio::null())
            .stderr(fs::File::create(path(&format!("{name}.err"))).unwrap())
            .spawn();
        Process(child.unwrap(), api)
    };
    let source = vm("a", &[]);
    let mut destination =
        vm("b", &["--insecure", "--reconnect-timeout", "0", "--incoming", &format!("rdma:{address}:0")]);
    source.wait("running", |status| (status["state"] == "running").then_some(()));
    let uri = destination.wait("listening", |status| status["listening"].as_str().map(str::to_owned));
    source.ctl(&["migrate", &uri, "--detach", "--streams", "4", "--codec", "raw"]);
    source.wait("moving", |status| {
        (status["migration"]["wire_bytes"].as_u64().is_some_and(|n| n > 4 << 20)).then_some(())
    });
    // Dropped last: the removal is complete when nobody has the device open any more.
    let removal = Removal::begin();
    let (migration, state) = source.wait("an end", |status| {
        let ended = ["completed", "failed"].iter().any(|end| status["migration"]["status"] == *end);
        ended.then(|| (status["migration"].clone(), status["state"].clone()))
    });
    println!("the source is {state}, its migration {}: {}", migration["status"], migration["error"]);
    let error = migration["error"].as_str().expect("an error");
    assert!(error.contains("the guest runs on at the source: all data streams are lost"), "{error}");
    let deadline = Instant::now() + PATIENCE;
    while destination.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the destination does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = fs::read_to_string(path("b.err")).unwrap();
    assert!(said.contains("all data streams are lost"), "{said}");
    let length = |name: &str| fs::metadata(path(name)).map_or(0, |m| m.len());
    assert_eq!(length("b.serial"), 0, "the guest never ran there");
    let before = length("a.serial");
    source.wait("writing on", |status| {
        (status["state"] == "running" && length("a.serial") > before).then_some(())
    });
    drop((source, destination));
    drop(removal);
}

/// A `pageferry vm` and its API; killed when dropped.
struct Process(std::process::Child, String);

impl Process {
    fn ctl(&self, args: &[&str]) -> std::process::Output {
        Command::new(env!("CARGO_BIN_EXE_pageferry")).args(["ctl", &self.1]).args(args).output().unwrap()
    }

    fn wait<T>(&self, what: &str, holds: impl Fn(&serde_json::Value) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.ctl(&["status", "--json"]);
            if output.status.success()
                && let Some(value) = holds(&report(&output))
            {
                return value;
            }
            assert!(Instant::now() < deadline, "{what}: {output:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
