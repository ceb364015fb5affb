//! QEMU's own migration of a paused guest, by its machine protocol (QMP): one JSON object a line over a Unix socket.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::process::{self, MemoryWatch, Running};
use super::{Job, PATIENCE, Place, Target, Took};

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";
/// How long a QEMU may take to open its socket, and to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked how the migration stands.
const TICK: Duration = Duration::from_millis(2);
/// No limit of bandwidth: bytes in a second.
const BANDWIDTH: u64 = 100 << 30;

/// How QEMU migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Over one TCP connection.
    Tcp,
    /// Over one TCP connection, with a cache for deltas.
    Xbzrle,
    /// Over several TCP connections.
    Multifd(u8),
    /// Over several TCP connections, compressed: their number, and the level, else QEMU's default.
    MultifdZstd(u8, Option<u8>),
    /// Over RDMA, memory registered piece by piece.
    Rdma,
    /// Over RDMA, all memory pinned first.
    RdmaPinAll,
}

impl Mode {
    fn capability(self) -> Option<&'static str> {
        match self {
            Self::Tcp | Self::Rdma => None,
            Self::Xbzrle => Some("xbzrle"),
            Self::RdmaPinAll => Some("rdma-pin-all"),
            Self::Multifd(_) | Self::MultifdZstd(..) => Some("multifd"),
        }
    }

    fn scheme(self) -> &'static str {
        if matches!(self, Self::Rdma | Self::RdmaPinAll) { "rdma" } else { "tcp" }
    }

    pub(super) fn parameters(self) -> Value {
        let mut parameters = json!({"max-bandwidth": BANDWIDTH, "downtime-limit": 300});
        if let Self::Multifd(channels) | Self::MultifdZstd(channels, _) = self {
            parameters["multifd-channels"] = channels.into();
        }
        if let Self::MultifdZstd(_, level) = self {
            parameters["multifd-compression"] = "zstd".into();
            if let Some(level) = level {
                parameters["multifd-zstd-level"] = level.into();
            }
        }
        parameters
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Xbzrle => f.write_str("xbzrle"),
            Self::Multifd(channels) => write!(f, "multifd:{channels}"),
            Self::MultifdZstd(channels, None) => write!(f, "multifd-zstd:{channels}"),
            Self::MultifdZstd(channels, Some(level)) => write!(f, "multifd-zstd:{channels}:{level}"),
            Self::Rdma => f.write_str("rdma"),
            Self::RdmaPinAll => f.write_str("rdma-pin-all"),
        }
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |what: &str, text: &str, most: u8| match text.parse() {
            Ok(number) if (1..=most).contains(&number) => Ok(number),
            _ => Err(format!("{what} are 1 to {most}, not {text:?}")),
        };
        let words: Vec<&str> = text.split(':').collect();
        Ok(match *words.as_slice() {
            ["tcp"] => Self::Tcp,
            ["xbzrle"] => Self::Xbzrle,
            ["rdma"] => Self::Rdma,
            ["rdma-pin-all"] => Self::RdmaPinAll,
            ["multifd", channels] => Self::Multifd(number("channels", channels, 255)?),
            ["multifd-zstd", channels] => Self::MultifdZstd(number("channels", channels, 255)?, None),
            ["multifd-zstd", channels, level] => {
                Self::MultifdZstd(number("channels", channels, 255)?, Some(number("levels", level, 20)?))
            }
            _ => {
                return Err(format!(
                    "{text:?} is none of tcp, xbzrle, multifd:CHANNELS, multifd-zstd:CHANNELS[:LEVEL], rdma, rdma-pin-all"
                ));
            }
        })
    }
}

/// QEMU's name for its certificates.
const CREDENTIALS: &str = "tls0";

/// Migrates a paused guest that has the image for its RAM. QEMU's own total time ends when the source has sent everything, which
/// may be well before the destination has it.
///
/// QEMU reads the holes of the image through its mapping, which fills them: the image is sparse no longer afterwards.
///
/// # Errors
/// What QEMU says, or that it does not answer or is not there.
pub fn migrate(mode: Mode, job: &Job<'_>) -> Result<Took, String> {
    let Pair { mut source, mut destination } = start_pair(job, job.tls)?;
    let mut parameters = mode.parameters();
    if job.tls.is_some() {
        parameters["tls-creds"] = CREDENTIALS.into();
    }
    for qemu in [&mut source, &mut destination] {
        qemu.set_up(mode.capability(), &parameters)?;
    }
    let uri = format!("{}:{}:{}", mode.scheme(), job.host, job.port);
    destination.ask("migrate-incoming", &json!({ "uri": uri }))?;
    let cpu = |qemu: &Qemu| process::cpu_s(qemu.child.id()).ok_or("QEMU is gone");
    // What it took to start is not counted.
    let (source_cpu, destination_cpu) = (cpu(&source)?, cpu(&destination)?);
    let watch = |qemu: &Qemu| job.watch_memory.then(|| MemoryWatch::start(qemu.child.id()));
    let (source_memory, destination_memory) = (watch(&source), watch(&destination));
    let begin = Instant::now();
    source.ask("migrate", &json!({ "uri": uri }))?;
    let state = source.wait_for_migration(begin)?;
    destination.wait_for_migration(begin)?;
    let total_ms = begin.elapsed().as_secs_f64() * 1e3;
    let most = |watch: Option<MemoryWatch>| watch.map_or(0, |watch| watch.most());
    Ok(Took {
        total_ms,
        reported_ms: state["total-time"].as_f64().unwrap_or(total_ms),
        setup_ms: state["setup-time"].as_f64().unwrap_or(0.0),
        source_cpu_s: cpu(&source)? - source_cpu,
        destination_cpu_s: cpu(&destination)? - destination_cpu,
        wire_bytes: state["ram"]["transferred"].as_u64().unwrap_or(0),
        source_private_bytes: most(source_memory),
        destination_private_bytes: most(destination_memory),
    })
}

/// A paused guest that has the image for its RAM, and a QEMU that waits for it.
fn start_pair(job: &Job<'_>, tls: Option<&Path>) -> Result<Pair, String> {
    let length = job.image.metadata().map_err(|e| format!("{}: {e}", job.image.display()))?.len();
    job.target.make(length)?;
    let socket = |name: &str| job.folder.join(name);
    let start =
        |ram, name, place, incoming| Qemu::start(ram, length, Runs::Not, &socket(name), place, incoming, tls);
    let destination = start(job.target, "destination.qmp", job.destination, true)?;
    let source = start(Target::File(job.image), "source.qmp", job.source, false)?;
    Ok(Pair { source, destination })
}

/// Two QEMUs, for whoever commands them.
pub struct Pair {
    source: Qemu,
    destination: Qemu,
}

impl Pair {
    /// Starts them, and waits until they answer.
    ///
    /// # Errors
    /// Those of QEMU.
    pub fn start(job: &Job<'_>) -> Result<Self, String> {
        let mut pair = start_pair(job, None)?;
        for qemu in [&mut pair.source, &mut pair.destination] {
            qemu.connect()?;
            qemu.part();
        }
        Ok(pair)
    }

    /// Their monitors: the source's and the destination's.
    pub fn sockets(&self) -> [&Path; 2] {
        [&self.source.socket, &self.destination.socket]
    }
}

/// QEMU's name and version, or that there is none.
pub fn version() -> String {
    let output = process::program(PROGRAM)
        .and_then(|path| std::process::Command::new(path).arg("--version").output().ok());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    // QEMU emulator version 10.0.2 (Debian ...)
    text.split_whitespace().nth(3).map_or_else(|| "no QEMU".into(), |version| format!("QEMU {version}"))
}

/// Whether a QEMU's guest runs.
#[derive(Clone, Copy)]
pub(super) enum Runs<'a> {
    /// It is paused, and stays so.
    Not,
    /// Under KVM, from this firmware.
    From(&'a Path),
}

/// A QEMU with its guest.
pub(super) struct Qemu {
    pub(super) child: Running,
    pub(super) socket: PathBuf,
    link: Option<BufReader<UnixStream>>,
}

impl Qemu {
    pub(super) fn start(
        ram: Target<'_>,
        length: u64,
        runs: Runs<'_>,
        socket: &Path,
        place: &Place,
        incoming: bool,
        tls: Option<&Path>,
    ) -> Result<Self, String> {
        let program = process::program(PROGRAM)
            .ok_or(format!("{PROGRAM} is not installed (package qemu-system-x86)"))?;
        let _ = std::fs::remove_file(socket);
        let errors = socket.with_extension("err");
        let stderr = std::fs::File::create(&errors).map_err(|e| format!("{}: {e}", errors.display()))?;
        let backend = match ram {
            Target::File(path) => {
                let path = path.display().to_string().replace(',', ",,");
                format!("memory-backend-file,id=ram,size={length},mem-path={path},share=on")
            }
            Target::Anonymous => format!("memory-backend-ram,id=ram,size={length}"),
        };
        let mut command = place.command(&program);
        match runs {
            Runs::Not => command.args(["-accel", "tcg", "-S"]),
            // Without a register that QEMU sets whatever KVM says to it, and that a KVM without hardware does not take.
            Runs::From(firmware) => {
                command.args(["-accel", "kvm", "-cpu", "host,-arch-capabilities", "-bios"]).arg(firmware)
            }
        };
        command
            .args(["-machine", "q35,memory-backend=ram", "-nodefaults", "-display", "none"])
            .args(["-m", &format!("size={length}B"), "-object", &backend])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        if let Some(folder) = tls {
            let folder = folder.display().to_string().replace(',', ",,");
            let endpoint = if incoming { "server" } else { "client" };
            let object =
                format!("tls-creds-x509,id={CREDENTIALS},dir={folder},endpoint={endpoint},verify-peer=on");
            command.args(["-object", &object]);
        }
        let child = Running::start(&mut command).map_err(|e| format!("QEMU does not start: {e}"))?;
        Ok(Self { child, socket: socket.into(), link: None })
    }

    /// Lets another client have its monitor, which serves one at a time.
    pub(super) fn part(&mut self) {
        self.link = None;
    }

    /// Waits for the socket, and greets.
    pub(super) fn connect(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + ANSWER_PATIENCE;
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(format!("QEMU's socket: {error}")),
                Err(_) if self.child.has_ended() => {
                    return Err(format!("QEMU ended at once{}", self.last_words()));
                }
                Err(_) => std::thread::sleep(TICK),
            }
        };
        stream.set_read_timeout(Some(ANSWER_PATIENCE)).map_err(|e| e.to_string())?;
        self.link = Some(BufReader::new(stream));
        self.ask("qmp_capabilities", &json!({})).map(drop)
    }

    /// Greets it, and sets one side of a migration up.
    pub(super) fn set_up(&mut self, capability: Option<&str>, parameters: &Value) -> Result<(), String> {
        self.connect()?;
        if let Some(capability) = capability {
            let on = json!([{"capability": capability, "state": true}]);
            self.ask("migrate-set-capabilities", &json!({ "capabilities": on }))?;
        }
        self.ask("migrate-set-parameters", parameters).map(drop)
    }

    /// One command; its return value.
    pub(super) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let broke = |e: &dyn fmt::Display| format!("QEMU does not answer {command}: {e}");
        let link = self.link.as_mut().ok_or("QEMU is not connected")?;
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        let asked = link.get_mut().write_all(line.as_bytes()).map_err(|e| broke(&e));
        let answer = asked.and_then(|()| answer(link).map_err(|e| broke(&e)));
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(refused)) => Err(format!("{command}: {refused}")),
            Err(error) => Err(error + &self.last_words()),
        }
    }

    /// Waits for the end of a migration that began at `begin`; returns what QEMU says of it.
    pub(super) fn wait_for_migration(&mut self, begin: Instant) -> Result<Value, String> {
        loop {
            let state = self.ask("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(state),
                Some("failed" | "cancelled") => {
                    let reason = state["error-desc"].as_str().unwrap_or("QEMU's migration failed");
                    return Err(format!("{reason}{}", self.last_words()));
                }
                _ if begin.elapsed() > PATIENCE => {
                    return Err(format!("QEMU's migration had not ended after {} s", PATIENCE.as_secs()));
                }
                _ => std::thread::sleep(TICK),
            }
        }
    }

    /// 8 bytes of the guest's memory, by way of a file.
    pub(super) fn word_at(&mut self, address: u64, file: &Path) -> Result<u64, String> {
        self.ask("pmemsave", &json!({"val": address, "size": 8, "filename": file}))?;
        let bytes = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let word = bytes.try_into().map_err(|_| format!("{}: not 8 bytes", file.display()))?;
        Ok(u64::from_le_bytes(word))
    }

    /// What it printed last.
    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.socket.with_extension("err")).unwrap_or_default();
        text.lines().last().map_or_else(String::new, |line| format!(" ({line})"))
    }
}

/// The next answer: a value, or QEMU's reason to refuse. The greeting and events come between and are not answers.
fn answer(link: &mut impl BufRead) -> std::io::Result<Result<Value, String>> {
    loop {
        let mut line = String::new();
        if link.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let mut message: Value = serde_json::from_str(&line)?;
        if let Some(value) = message.get_mut("return") {
            return Ok(Ok(value.take()));
        }
        if let Some(error) = message.get("error") {
            return Ok(Err(error["desc"].as_str().unwrap_or("refused").to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_named_and_read_alike() {
        let modes = [
            Mode::Tcp,
            Mode::Xbzrle,
            Mode::Multifd(8),
            Mode::MultifdZstd(4, None),
            Mode::MultifdZstd(4, Some(3)),
            Mode::Rdma,
            Mode::RdmaPinAll,
        ];
        for mode in modes {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        for bad in ["", "multifd", "multifd:0", "multifd:x", "multifd-zstd:4:21", "tcp:4"] {
            assert!(bad.parse::<Mode>().is_err(), "{bad}");
        }
        let parameters = Mode::MultifdZstd(4, Some(3)).parameters();
        assert_eq!(
            (&parameters["multifd-channels"], &parameters["multifd-zstd-level"]),
            (&json!(4), &json!(3))
        );
        assert_eq!(Mode::Multifd(4).parameters()["multifd-compression"], Value::Null);
    }

    #[test]
    fn answers_are_told_from_events() {
        let text = b"{\"QMP\": {}}\n{\"event\": \"STOP\"}\n{\"return\": {\"a\": 1}}\n{\"error\": {\"desc\": \"no\"}}\n";
        let mut link = &text[..];
        assert_eq!(answer(&mut link).unwrap(), Ok(json!({"a": 1})));
        assert_eq!(answer(&mut link).unwrap(), Err("no".into()));
        assert!(answer(&mut link).is_err());
        assert!(answer(&mut &b"no JSON\n"[..]).is_err());
    }
}
