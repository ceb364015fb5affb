//! QEMU's monitor: JSON lines over a Unix socket (QMP: <https://www.qemu.org/docs/master/interop/qmp-spec.html>).

use std::io::{self, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::backend::BackendError;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// A monitor that has another client keeps further ones waiting, without a word.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// `stop` waits for requests to disks that are under way.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// Longest line that is taken, in bytes: answers that are read here have a few hundred KiB.
const LINE_MAX: usize = 16 << 20;
/// Commands that may be said again where the connection broke before the answer: said twice, they do what they do once.
const REPEATABLE: [&str; 9] = [
    "stop",
    "cont",
    "query-status",
    "query-migrate",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
];

/// A connection to a QEMU's monitor. It is made anew where it breaks, to the same process alone.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    pid: u32,
    version: (u64, u64),
    monitor: Mutex<Monitor>,
}

#[derive(Debug)]
struct Monitor {
    stream: UnixStream,
    /// What was read and is no whole line yet.
    input: Vec<u8>,
    commands: u64,
    /// Connections before this one.
    connections: u64,
    /// How often the guest was let run, as far as QEMU has said so over this connection.
    runs: u64,
}

/// A moment at which the guest stood still. It has stood still between two that are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StoodStill {
    connections: u64,
    runs: u64,
}

impl Qmp {
    /// Connects to the monitor at `path`, a Unix socket (`-qmp unix:PATH,server=on,wait=off`).
    ///
    /// # Errors
    /// Where nobody listens there, something else than QEMU's monitor answers, or another client has it. The text says what helps.
    pub fn connect(path: &Path) -> Result<Self, BackendError> {
        let (monitor, version) = Monitor::open(path)?;
        let pid = monitor.pid().map_err(|e| failed(path, "ask whose socket it is", e))?;
        Ok(Self { path: path.to_owned(), pid, version, monitor: Mutex::new(monitor) })
    }

    /// QEMU's process, as the kernel knows it by the socket (`SO_PEERCRED`, unix(7)).
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// QEMU's version: major and minor.
    pub fn version(&self) -> (u64, u64) {
        self.version
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has a command done, and returns what it returns. `arguments` is an object, or null.
    ///
    /// # Errors
    /// QEMU's own, and those of the connection. A command that may be said twice is said again over a new connection before that.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value, BackendError> {
        self.execute_by(&mut self.monitor(), command, arguments)
    }

    fn execute_by(
        &self,
        monitor: &mut Monitor,
        command: &str,
        arguments: &Value,
    ) -> Result<Value, BackendError> {
        match monitor.execute(command, arguments, None) {
            Err(Failed::Connection(e)) if REPEATABLE.contains(&command) => {
                // What QEMU said in between was said to nobody.
                *monitor = Monitor { connections: monitor.connections + 1, ..self.again(&e)? };
                monitor.execute(command, arguments, None)
            }
            other => other,
        }
        .map_err(|failed| failed.of(&self.path, command))
    }

    /// Gives QEMU a descriptor of its own by a name, for `fd:NAME`.
    ///
    /// # Errors
    /// As of [`execute`](Self::execute).
    pub fn give(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), BackendError> {
        let given = self.monitor().execute("getfd", &json!({ "fdname": name }), Some(fd));
        given.map(drop).map_err(|failed| failed.of(&self.path, "getfd"))
    }

    /// Whether the guest stands still: this moment, to compare others with, or `None` where it may run. QEMU tells of a guest that it lets
    /// run (`RESUME`) before it answers who asks later, so nothing is missed between two looks.
    ///
    /// # Errors
    /// As of [`execute`](Self::execute).
    pub(super) fn look(&self) -> Result<Option<StoodStill>, BackendError> {
        let mut monitor = self.monitor();
        let status = self.execute_by(&mut monitor, "query-status", &Value::Null)?;
        // Of other states it is not said that neither vCPUs nor devices write.
        let still = matches!(status["status"].as_str(), Some("paused" | "prelaunch" | "postmigrate"));
        Ok(still.then_some(StoodStill { connections: monitor.connections, runs: monitor.runs }))
    }

    fn monitor(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection in place of one that broke.
    fn again(&self, broke: &io::Error) -> Result<Monitor, BackendError> {
        let gone = |e: BackendError| {
            let what =
                format!("QEMU's monitor at {} went away ({broke}); connect to it again", self.path.display());
            BackendError::new(what, e)
        };
        let (monitor, _) = Monitor::open(&self.path).map_err(gone)?;
        match monitor.pid() {
            Ok(pid) if pid == self.pid => Ok(monitor),
            Ok(pid) => Err(gone(BackendError::invalid(format!(
                "it is another process's now: {pid}, not {}",
                self.pid
            )))),
            Err(e) => Err(gone(BackendError::new("ask whose socket it is", e))),
        }
    }
}

/// Why a command has no result.
#[derive(Debug)]
enum Failed {
    /// QEMU's answer.
    Refused(String),
    Connection(io::Error),
}

impl Failed {
    fn of(self, path: &Path, command: &str) -> BackendError {
        let path = path.display();
        match self {
            Self::Refused(why) => BackendError::new(format!("QEMU at {path} refused `{command}`"), why),
            Self::Connection(e) => BackendError::new(format!("ask QEMU at {path} for `{command}`"), e),
        }
    }
}

fn failed(path: &Path, what: &str, e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> BackendError {
    BackendError::new(format!("{}: {what}", path.display()), e)
}

impl Monitor {
    /// Connects, and hears the greeting, with QEMU's version.
    fn open(path: &Path) -> Result<(Self, (u64, u64)), BackendError> {
        let stream = UnixStream::connect(path).map_err(|e| {
            failed(path, "connect to QEMU's monitor; start QEMU with `-qmp unix:PATH,server=on,wait=off`", e)
        })?;
        let mut monitor = Self { stream, input: Vec::new(), commands: 0, connections: 0, runs: 0 };
        let greeting = monitor.line(GREETING_PATIENCE).map_err(|e| {
            let what = match e.kind() {
                ErrorKind::TimedOut => {
                    "no greeting came: QEMU's monitor serves one client at a time; end the other, or give QEMU one more `-qmp`"
                }
                _ => "hear the greeting of QEMU's monitor; this is something else",
            };
            failed(path, what, e)
        })?;
        let version = &greeting["QMP"]["version"]["qemu"];
        let (Some(major), Some(minor)) = (version["major"].as_u64(), version["minor"].as_u64()) else {
            return Err(BackendError::invalid(format!(
                "{}: what answers is not QEMU's monitor",
                path.display()
            )));
        };
        let agreed = monitor.execute("qmp_capabilities", &Value::Null, None);
        agreed.map_err(|failed| failed.of(path, "qmp_capabilities"))?;
        Ok((monitor, (major, minor)))
    }

    fn pid(&self) -> io::Result<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.stream)?;
        Ok(credentials.pid.as_raw_nonzero().get() as u32)
    }

    fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Failed> {
        self.commands += 1;
        let mut request = json!({ "execute": command, "id": self.commands });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        self.send(format!("{request}\n").as_bytes(), fd).map_err(Failed::Connection)?;
        loop {
            // Events, and answers that came too late for those who asked, are nobody's.
            let mut answer = self.line(ANSWER_PATIENCE).map_err(Failed::Connection)?;
            self.runs += u64::from(answer["event"] == "RESUME");
            if answer["id"].as_u64() != Some(self.commands) {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let text = error["desc"].as_str().unwrap_or("it does not say why");
                return Err(Failed::Refused(text.chars().take(1000).collect()));
            }
            return Ok(answer["return"].take());
        }
    }

    /// Sends a line, and a descriptor with it.
    fn send(&mut self, mut line: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.stream.set_write_timeout(Some(ANSWER_PATIENCE))?;
        while !line.is_empty() {
            let fds: Vec<_> = fd.iter().copied().collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let sent =
                sendmsg(self.stream.as_fd(), &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?;
            line = &line[sent..];
            fd = None;
        }
        Ok(())
    }

    /// The next line, as it comes.
    fn line(&mut self, patience: Duration) -> io::Result<Value> {
        let deadline = Instant::now() + patience;
        let mut looked = 0;
        loop {
            if let Some(end) = self.input[looked..].iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=looked + end).collect();
                return serde_json::from_slice(&line).map_err(|e| io::Error::new(ErrorKind::InvalidData, e));
            }
            looked = self.input.len();
            if looked > LINE_MAX {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    format!("a line of more than {LINE_MAX} bytes"),
                ));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend_from_slice(&bytes[..count]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
    }
}
