//! What the end-to-end tests share: the real command as a child with bounded waits, RAM images, folders, a limit on how
//! much runs at once.

#![allow(dead_code, reason = "every test binary uses its own part")]

pub(crate) mod raw;
pub(crate) mod secure;
pub(crate) mod tmpfs;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry::engine::report::Report;
use tempfile::TempDir;
use testkit::{PATIENCE, Rng};

pub(crate) const MIB: usize = 1 << 20;
pub(crate) const PAGE: usize = 4096;
/// A folder in memory where there is one, removed in the end.
pub(crate) fn folder() -> TempDir {
    let shm = Path::new("/dev/shm");
    let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("pageferry-test-").tempdir_in(base).unwrap()
}

/// Pairs of processes that run at the same time.
const PAIRS: usize = 3;
static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// The right to run a pair of processes.
pub(crate) struct Turn;

/// Waits for a turn.
pub(crate) fn turn() -> Turn {
    let mut running = RUNNING.0.lock().unwrap_or_else(|e| e.into_inner());
    while *running >= PAIRS {
        running = RUNNING.1.wait(running).unwrap_or_else(|e| e.into_inner());
    }
    *running += 1;
    Turn
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.0.lock().unwrap_or_else(|e| e.into_inner()) -= 1;
        RUNNING.1.notify_one();
    }
}

/// A running `pageferry`; killed when it is dropped.
pub(crate) struct Ferry {
    child: Child,
    what: String,
    stderr: Arc<(Mutex<String>, Condvar)>,
    readers: Vec<JoinHandle<()>>,
    stdout: Arc<Mutex<String>>,
}

/// How a `pageferry` ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) what: String,
}

impl Ferry {
    /// Starts the command under test.
    pub(crate) fn start<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
        command.args(args);
        Self::of(command)
    }

    /// Starts it with so few descriptors.
    pub(crate) fn start_limited<S: AsRef<OsStr>>(
        descriptors: u32,
        args: impl IntoIterator<Item = S>,
    ) -> Self {
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {descriptors}; exec \"$0\" \"$@\"");
        command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_pageferry")).args(args);
        Self::of(command)
    }

    /// Starts a command that runs the one under test.
    pub(crate) fn of(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let what = format!("{command:?}");
        let mut child = command.spawn().unwrap();
        let stderr = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let stdout = Arc::new(Mutex::new(String::new()));
        let (mut out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (seen, text) = (stderr.clone(), stdout.clone());
        let readers = vec![
            std::thread::spawn(move || {
                let mut err = BufReader::new(err);
                let mut line = Vec::new();
                while err.read_until(b'\n', &mut line).is_ok_and(|n| n != 0) {
                    seen.0.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
                    seen.1.notify_all();
                    line.clear();
                }
            }),
            std::thread::spawn(move || {
                let mut all = Vec::new();
                let _ = out.read_to_end(&mut all);
                *text.lock().unwrap() = String::from_utf8_lossy(&all).into_owned();
            }),
        ];
        Self { child, what, stderr, readers, stdout }
    }

    /// Waits until standard error holds `text`; returns all of standard error.
    pub(crate) fn wait_stderr(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let (seen, more) = &*self.stderr;
        let mut seen = seen.lock().unwrap();
        while !seen.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{}: {text:?} never came on standard error: {seen}", self.what);
            seen = more.wait_timeout(seen, left.min(Duration::from_millis(100))).unwrap().0;
        }
        seen.clone()
    }

    /// Waits until this destination has refused somebody or ended; says whether it refused and still runs.
    pub(crate) fn refused_or_ended(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = self.child.try_wait().unwrap().is_some();
            let stderr = self.stderr.0.lock().unwrap().clone();
            if ended || stderr.contains("refused ") {
                return !ended;
            }
            assert!(Instant::now() < deadline, "{} neither refused nor ended: {stderr}", self.what);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The number of the process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Its `VmRSS`, in bytes.
    pub(crate) fn resident(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
    }

    /// Descriptors that it has open.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).map_or(0, Iterator::count)
    }

    /// Sends a signal to this child, by name (`STOP`).
    pub(crate) fn signal(&self, name: &str) {
        let status =
            Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success(), "{}", self.what);
    }

    /// Waits for the end, at most `limit`; a child that takes longer is killed and fails the test with its output.
    pub(crate) fn wait_for(mut self, limit: Duration) -> Ended {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let stderr = self.stderr.0.lock().unwrap().clone();
                panic!("{} did not end within {limit:?}; standard error: {stderr}", self.what);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        let ended = Ended {
            code: status.code(),
            stdout: self.stdout.lock().unwrap().clone(),
            stderr: self.stderr.0.lock().unwrap().clone(),
            what: self.what.clone(),
        };
        assert!(!ended.stderr.contains("panicked"), "{ended:?}");
        ended
    }

    pub(crate) fn wait(self) -> Ended {
        self.wait_for(PATIENCE)
    }

    /// Runs to the end.
    pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ended {
        Self::start(args).wait()
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// It ended with this code.
    #[track_caller]
    pub(crate) fn code(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }

    /// Its standard error says one of these; every word of the line that it says.
    #[track_caller]
    pub(crate) fn says(&self, any: &[&str]) -> &Self {
        assert!(any.iter().any(|text| self.stderr.contains(text)), "none of {any:?} in {self:?}");
        self
    }

    /// The report on standard output.
    #[track_caller]
    pub(crate) fn report(&self) -> Report {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The report as it was printed.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// A destination that listens, and where.
pub(crate) struct Recv {
    pub(crate) ferry: Ferry,
    pub(crate) uri: String,
}

impl Recv {
    /// `recv URI` with more arguments; waits until it listens.
    pub(crate) fn start<S: AsRef<OsStr>>(uri: &str, args: impl IntoIterator<Item = S>) -> Self {
        let mut all = vec![OsStr::new("recv").to_owned(), uri.into()];
        all.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        Self::of(Ferry::start(all))
    }

    /// One that is about to listen.
    pub(crate) fn of(mut ferry: Ferry) -> Self {
        const SIGN: &str = "pageferry: listening on ";
        let seen = ferry.wait_stderr(SIGN);
        let uri = seen.lines().find_map(|line| line.strip_prefix(SIGN)).unwrap().to_owned();
        Self { ferry, uri }
    }

    /// A destination for `file` on a TCP port of the system's choice. It ends with its connections: whatever happens to them is seen at
    /// once.
    pub(crate) fn to_file(file: &Path, timeout: u64) -> Self {
        let timeout = timeout.to_string();
        let args =
            ["--json", "--reconnect-timeout", "0", "--link-timeout", &timeout, "--ram-file"].map(OsStr::new);
        Self::start("tcp:127.0.0.1:0", args.into_iter().chain([file.as_os_str()]))
    }

    /// The port of a TCP URI.
    pub(crate) fn port(&self) -> u16 {
        self.uri.rsplit(':').next().unwrap().parse().unwrap()
    }
}

/// `send URI --ram-file FILE --json` with more arguments.
pub(crate) fn send(uri: &str, file: &Path, args: &[&str]) -> Ferry {
    let mut all: Vec<&OsStr> = ["send", uri, "--json", "--ram-file"].map(OsStr::new).to_vec();
    all.push(file.as_os_str());
    all.extend(args.iter().map(OsStr::new));
    Ferry::start(all)
}

/// Kinds of RAM images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    /// Incompressible, every page written.
    Random,
    /// Every page written with zeros.
    Zero,
    /// One MiB in eight random, the rest holes.
    Sparse,
    /// Words.
    Text,
    /// By MiB of ten: 3 holes, 1 zero, 2 heap-like, 2 text, 2 random.
    Mixed,
}

impl Image {
    pub(crate) const ALL: [Self; 5] = [Self::Random, Self::Zero, Self::Sparse, Self::Text, Self::Mixed];

    fn block(self, index: usize, rng: &mut Rng, words: &[Vec<u8>]) -> Option<Vec<u8>> {
        match self {
            Self::Random => Some(rng.bytes(MIB)),
            Self::Zero => Some(vec![0; MIB]),
            Self::Sparse => index.is_multiple_of(8).then(|| rng.bytes(MIB)),
            Self::Text => Some(text(rng, words)),
            Self::Mixed => match index % 10 {
                0..3 => None,
                3 => Some(vec![0; MIB]),
                4..6 => Some(heap(rng)),
                6..8 => Some(text(rng, words)),
                _ => Some(rng.bytes(MIB)),
            },
        }
    }

    /// Writes an image of `len` bytes; returns its content.
    pub(crate) fn write(self, path: &Path, len: usize) -> Vec<u8> {
        let mut rng = Rng::new(self as u64 + 7);
        let words: Vec<Vec<u8>> =
            (0..4000).map(|_| (0..2 + rng.index(9)).map(|_| b'a' + rng.index(26) as u8).collect()).collect();
        let file = std::fs::File::create(path).unwrap();
        file.set_len(len as u64).unwrap();
        let mut content = vec![0; len];
        for (index, piece) in content.chunks_mut(MIB).enumerate() {
            if let Some(block) = self.block(index, &mut rng, &words) {
                piece.copy_from_slice(&block[..piece.len()]);
                file.write_all_at(piece, (index * MIB) as u64).unwrap();
            }
        }
        content
    }
}

fn text(rng: &mut Rng, words: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(MIB + 16);
    while out.len() < MIB {
        out.extend_from_slice(&words[rng.index(words.len())]);
        out.push(b' ');
    }
    out.truncate(MIB);
    out
}

/// Pointers that share their high bytes, small numbers, zeros.
fn heap(rng: &mut Rng) -> Vec<u8> {
    let base = 0x7f00_0000_0000 + rng.index(1 << 28) as u64;
    (0..MIB / 16)
        .flat_map(|_| {
            let random = rng.next();
            let pointer = (base + (random & 0xff_ffff)).to_le_bytes();
            let number = (random >> 24 & 0xffff).to_le_bytes();
            [pointer, number].concat()
        })
        .collect()
}

/// Disk blocks of a file, in bytes.
pub(crate) fn blocks(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// The files hold the same bytes.
#[track_caller]
pub(crate) fn assert_same(path: &Path, content: &[u8]) {
    let found = std::fs::read(path).unwrap();
    assert_eq!(found.len(), content.len(), "{}", path.display());
    if let Some(at) = found.iter().zip(content).position(|(a, b)| a != b) {
        panic!("{} differs from what was sent at byte {at:#x}", path.display());
    }
}

/// A source image and the place for its copy.
pub(crate) struct Job {
    pub(crate) folder: TempDir,
    pub(crate) from: PathBuf,
    pub(crate) to: PathBuf,
    pub(crate) content: Vec<u8>,
}

impl Job {
    pub(crate) fn new(image: Image, len: usize) -> Self {
        let folder = folder();
        let (from, to) = (folder.path().join("from.img"), folder.path().join("to.img"));
        let content = image.write(&from, len);
        Self { folder, from, to, content }
    }

    #[track_caller]
    pub(crate) fn assert_arrived(&self) {
        assert_same(&self.to, &self.content);
    }
}

/// Writes without caring whether the peer still listens.
pub(crate) fn write_anyway(stream: &mut impl Write, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}
