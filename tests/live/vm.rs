//! `pageferry vm` processes under test: started, asked, killed; and the guest's own word on what became of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use pageferry::vmm_shim::guests::counter::{Checker, CounterParams, Side};
use pageferry::vmm_shim::kvm;
use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

/// A destination with this gives a session up as soon as its connections are lost, and so does its source.
pub(crate) const NO_RESUME: &[&str] = &["--reconnect-timeout", "0"];

/// The command under test.
pub(crate) const PAGEFERRY: &str = env!("CARGO_BIN_EXE_pageferry");

/// Whether there is KVM; prints why not.
pub(crate) fn have_kvm() -> bool {
    static TOLD: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let missing = TOLD.get_or_init(|| kvm::open().err().map(|e| e.to_string()));
    if let Some(why) = missing {
        println!("skipped: no /dev/kvm ({why})");
    }
    missing.is_none()
}

/// A folder for sockets and consoles, and the right to run VMs: only so many tests do at a time.
pub(crate) struct World {
    folder: tempfile::TempDir,
    _permit: Permit,
}

impl World {
    pub(crate) fn new() -> Self {
        // Short: a Unix socket's path is at most 107 bytes.
        Self { folder: tempfile::Builder::new().prefix("pf").tempdir().unwrap(), _permit: Permit::take() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts a VM whose guest runs.
    pub(crate) fn source(&self, name: &str, spec: &Spec) -> Vm {
        let vm = Vm::start(self, name, spec, None);
        vm.wait_state("running");
        vm
    }

    /// Starts a VM that listens on a port of the system's choice; returns its URI, too.
    pub(crate) fn destination(&self, name: &str, spec: &Spec) -> (Vm, String) {
        let vm = Vm::start(self, name, spec, Some("tcp:127.0.0.1:0"));
        let uri = vm.wait_listening();
        (vm, uri)
    }
}

/// One of a few.
struct Permit;

static PERMITS: (Mutex<Option<usize>>, Condvar) = (Mutex::new(None), Condvar::new());

impl Permit {
    fn take() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let mut left = PERMITS.0.lock().unwrap_or_else(|e| e.into_inner());
        while *left.get_or_insert(cores.clamp(2, 4)) == 0 {
            left = PERMITS.1.wait(left).unwrap_or_else(|e| e.into_inner());
        }
        *left = left.map(|n| n - 1);
        Self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut left = PERMITS.0.lock().unwrap_or_else(|e| e.into_inner());
        *left = left.map(|n| n + 1);
        PERMITS.1.notify_one();
    }
}

/// What machine a VM is.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) cpus: u8,
    pub(crate) mem_mib: u64,
    pub(crate) working_set: u64,
    pub(crate) rate: u64,
    pub(crate) guest: String,
    pub(crate) kvm: bool,
    /// More arguments of `pageferry vm`.
    pub(crate) more: Vec<String>,
    /// More of its environment.
    pub(crate) environment: &'static [(&'static str, &'static str)],
}

impl Spec {
    /// A small counter guest; on KVM where there is one.
    pub(crate) fn counter() -> Self {
        Self {
            cpus: 1,
            mem_mib: 64,
            working_set: 4 << 20,
            rate: 20_000,
            guest: "counter".into(),
            kvm: have_kvm(),
            more: Vec::new(),
            environment: &[],
        }
    }

    pub(crate) fn with(mut self, more: &[&str]) -> Self {
        self.more.extend(more.iter().map(|&s| s.into()));
        self
    }

    /// A checker of the counter guest's output.
    pub(crate) fn checker(&self) -> Checker {
        let params = CounterParams { working_set: self.working_set, pages_per_s: self.rate, page_words: 0 };
        Checker::new(self.cpus, params.pages(self.cpus))
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    /// Its standard output as one JSON object.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }
}

/// Runs the command to its end, which must come within `timeout`.
pub(crate) fn pageferry(args: &[&str], timeout: Duration) -> Ended {
    let mut child = Command::new(PAGEFERRY)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let read = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = String::new();
            stream.unwrap().read_to_string(&mut text).unwrap();
            text
        })
    };
    let out = read(child.stdout.take().map(|s| Box::new(s) as _));
    let err = read(child.stderr.take().map(|s| Box::new(s) as _));
    let start = Instant::now();
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if start.elapsed() > timeout {
            let _ = child.kill();
            let _ = child.wait();
            panic!(
                "pageferry {args:?} did not end within {timeout:?}: {}{}",
                out.join().unwrap(),
                err.join().unwrap()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ended { code, out: out.join().unwrap(), err: err.join().unwrap() }
}

/// A `pageferry vm` process; killed when dropped, and its last words shown if the test failed.
pub(crate) struct Vm {
    name: String,
    child: Mutex<Child>,
    pid: i32,
    api: PathBuf,
    serial: PathBuf,
    errors: PathBuf,
}

impl Vm {
    /// Starts it, and waits until its control socket answers.
    pub(crate) fn start(world: &World, name: &str, spec: &Spec, incoming: Option<&str>) -> Self {
        let errors = File::create(world.path(&format!("{name}.err"))).unwrap();
        Self::start_with(world, name, spec, incoming, errors.into())
    }

    /// The same, with this standard error.
    pub(crate) fn start_with(
        world: &World,
        name: &str,
        spec: &Spec,
        incoming: Option<&str>,
        stderr: Stdio,
    ) -> Self {
        let serial = world.path(&format!("{name}.serial"));
        let serial = serial.to_str().unwrap();
        Self::start_on(world, name, spec, incoming, serial, [Stdio::null(), stderr])
    }

    /// Starts a source whose console is its standard output.
    #[allow(dead_code, reason = "for tests/output.rs, which shares this file")]
    pub(crate) fn start_on_console(world: &World, name: &str, spec: &Spec, stdout: Stdio) -> Self {
        Self::start_on(world, name, spec, None, "stdio", [stdout, Stdio::null()])
    }

    fn start_on(
        world: &World,
        name: &str,
        spec: &Spec,
        incoming: Option<&str>,
        console: &str,
        [stdout, stderr]: [Stdio; 2],
    ) -> Self {
        let file = |end: &str| world.path(&format!("{name}.{end}"));
        let (api, serial, errors) = (file("sock"), file("serial"), file("err"));
        let mut command = Command::new(PAGEFERRY);
        command
            .args(["vm", "--api", &format!("unix:{}", api.display())])
            .args(["--serial", console])
            .args(["--guest", &spec.guest])
            .args(["--cpus", &spec.cpus.to_string(), "--mem", &format!("{}M", spec.mem_mib)])
            .args(["--working-set", &spec.working_set.to_string(), "--rate", &spec.rate.to_string()])
            .args(&spec.more)
            .envs(spec.environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        if !spec.kvm {
            command.arg("--no-kvm");
        }
        if let Some(uri) = incoming {
            command.args(["--incoming", uri]);
        }
        let child = command.spawn().unwrap();
        // It has the ends of pipes that it was given.
        drop(command);
        let pid = child.id().try_into().unwrap();
        let vm = Self { name: name.into(), child: Mutex::new(child), pid, api, serial, errors };
        wait_for(&format!("{name} answers"), PATIENCE, || {
            if let Some(status) = vm.exited() {
                panic!("{name} ended at once with {status}: {}", vm.errors());
            }
            vm.ask(&json!({"execute": "status"})).ok()
        });
        vm
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// What it printed to standard error.
    pub(crate) fn errors(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// What its guest printed.
    pub(crate) fn serial(&self) -> Vec<u8> {
        std::fs::read(&self.serial).unwrap_or_default()
    }

    /// `unix:PATH` of its control socket.
    pub(crate) fn api(&self) -> String {
        format!("unix:{}", self.api.display())
    }

    pub(crate) fn api_path(&self) -> &Path {
        &self.api
    }

    /// One request on the control socket.
    pub(crate) fn ask(&self, request: &Value) -> Result<Value, String> {
        let stream = UnixStream::connect(&self.api).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (&stream).write_all(format!("{request}\n").as_bytes()).map_err(|e| e.to_string())?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).map_err(|e| e.to_string())?;
        let answer: Value = serde_json::from_str(&line).map_err(|e| format!("{e}: {line:?}"))?;
        match answer.get("error") {
            Some(error) => Err(error.as_str().unwrap_or("?").into()),
            None => Ok(answer["return"].clone()),
        }
    }

    pub(crate) fn status(&self) -> Value {
        self.ask(&json!({"execute": "status"})).unwrap_or_else(|e| panic!("{}: status: {e}", self.name))
    }

    /// The state that `status` shows.
    pub(crate) fn state(&self) -> String {
        self.status()["state"].as_str().unwrap().into()
    }

    pub(crate) fn wait_state(&self, state: &str) {
        wait_for(&format!("{} is {state}", self.name), PATIENCE, || (self.state() == state).then_some(()));
    }

    pub(crate) fn wait_listening(&self) -> String {
        wait_for(&format!("{} listens", self.name), PATIENCE, || {
            self.status()["listening"].as_str().map(str::to_owned)
        })
    }

    /// Whether [`Self::as_nobody`] works.
    #[allow(dead_code, reason = "for tests/output.rs, which shares this file")]
    pub(crate) fn can_be_nobody() -> bool {
        let args = ["--reuid", "65534", "--clear-groups", PAGEFERRY, "--version"];
        Command::new("setpriv").args(args).stdout(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    /// Runs the command as another user.
    #[allow(dead_code, reason = "for tests/output.rs, which shares this file")]
    pub(crate) fn as_nobody(args: &[&str]) -> Ended {
        let output = Command::new("setpriv")
            .args(["--reuid", "65534", "--clear-groups", PAGEFERRY])
            .args(args)
            .output();
        let output = output.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// `pageferry ctl` on this VM.
    pub(crate) fn ctl(&self, args: &[&str]) -> Ended {
        let api = self.api();
        let mut all = vec!["ctl", &api];
        all.extend(args);
        pageferry(&all, PATIENCE)
    }

    /// Asks for a migration, without waiting for its end.
    pub(crate) fn begin_migration(&self, uri: &str, more: &Value) {
        let mut request = json!({"execute": "migrate", "uri": uri});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.ask(&request).unwrap_or_else(|e| panic!("{}: migrate to {uri}: {e}", self.name));
    }

    /// Waits for the end of a migration begun with [`Self::begin_migration`]; returns its report.
    pub(crate) fn wait_migration(&self, timeout: Duration) -> Value {
        let start = Instant::now();
        wait_for(&format!("{}: the migration's end", self.name), 2 * timeout, || {
            let status = self.status();
            assert!(start.elapsed() < timeout, "{}: still not ended after {timeout:?}: {status}", self.name);
            let report = status["migration"].clone();
            let ended =
                ["completed", "failed", "cancelled"].contains(&report["status"].as_str().unwrap_or(""));
            ended.then_some(report)
        })
    }

    /// How the process ended, if it has.
    pub(crate) fn exited(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    pub(crate) fn wait_exit(&self, timeout: Duration) -> ExitStatus {
        wait_for(&format!("{} ends", self.name), timeout, || self.exited())
    }

    /// SIGKILL; returns when it is gone.
    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: i32) {
        send_signal(self.pid, signal);
    }
}

/// Sends a signal to a process that this test started and has not yet waited for.
pub(crate) fn send_signal(pid: i32, signal: i32) {
    let signal = nix::sys::signal::Signal::try_from(signal).expect("a signal's number");
    // The child is waited for only by the owner of its Vm, so its number is not another process's. It may have ended.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}

/// SIGSTOP; returns when all threads stand. The signal alone begins the stop, and a thread of a busy host may run on meanwhile. A vCPU for
/// which KVM itself reads a page that is missing tries again and again until it comes, and stands only then: it runs no guest meanwhile.
pub(crate) fn stop_process(pid: i32) {
    send_signal(pid, libc::SIGSTOP);
    let begun = Instant::now();
    let waits_for_a_page = |task: &std::fs::DirEntry| {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        begun.elapsed() > Duration::from_secs(2) && name.starts_with("vcpu-")
    };
    let stands = |task: std::io::Result<std::fs::DirEntry>| {
        if task.as_ref().is_ok_and(waits_for_a_page) {
            return true;
        }
        let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
        // A thread that has gone meanwhile, or died before it was stopped, stands, too.
        stat.map_or(true, |stat| {
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 'Z', 'X']))
        })
    };
    wait_for("the process stands", PATIENCE, || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        tasks.map_or(true, |mut tasks| tasks.all(stands)).then_some(())
    });
}

/// What the threads of a process do, as far as the kernel tells.
fn threads(pid: i32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let about = |task: std::fs::DirEntry| {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        format!("{} in {}; ", read("comm").trim(), read("wchan").trim())
    };
    tasks.map(about).collect()
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let status = self.exited();
            let serial = self.serial();
            let tail = String::from_utf8_lossy(&serial[serial.len().saturating_sub(300)..]).into_owned();
            println!("--- {}: threads: {}", self.name, threads(self.pid));
            println!(
                "--- {}: exit {status:?}; it printed:\n{}\n--- its guest, at the end:\n{tail}",
                self.name,
                self.errors()
            );
        }
        let child = self.child.get_mut().unwrap_or_else(|e| e.into_inner());
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The guest's own word: what it printed on all these VMs, one after the other, is one unbroken chain; it goes on at the
/// last of them, and nowhere else.
pub(crate) fn prove(spec: &Spec, chain: &[&Vm]) {
    let (last, before) = chain.split_last().unwrap();
    let texts: Vec<Vec<u8>> = before.iter().map(|vm| vm.serial()).collect();
    prove_after(spec, &texts, last);
    for (vm, text) in before.iter().zip(texts) {
        assert_eq!(vm.serial().len(), text.len(), "{} ran beside {}", vm.name, last.name);
    }
}

/// The same of a guest that printed these texts before, wherever that was.
pub(crate) fn prove_after(spec: &Spec, texts: &[impl AsRef<[u8]>], last: &Vm) {
    let mut first: Option<Vec<u64>> = None;
    wait_for(&format!("the guest goes on at {}", last.name), PATIENCE, || {
        let mut checker = spec.checker();
        let mut side = Side::Source;
        let serial = last.serial();
        for text in texts.iter().map(AsRef::as_ref).chain([&serial[..]]) {
            checker.feed(side, text).unwrap_or_else(|e| panic!("the guest at {}: {e}", last.name));
            side = Side::Destination;
        }
        let passes: Vec<u64> = checker.passes().iter().map(|(a, b)| a + b).collect();
        let began = first.get_or_insert_with(|| passes.clone());
        passes.iter().zip(began).all(|(now, began)| *now >= *began + 2).then_some(())
    });
}
