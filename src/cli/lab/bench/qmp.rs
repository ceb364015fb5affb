//! QEMU's own migration of a paused guest, by its machine protocol (QMP): one JSON object a line over a Unix socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::child::Running;
use super::super::needs;
use super::Took;

/// How long a QEMU may take to open its socket, and to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a migration may take.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(180);
/// How often it is asked how the migration stands.
const TICK: Duration = Duration::from_millis(10);
/// No limit of bandwidth: bytes in a second.
const BANDWIDTH: u64 = 100 << 30;

/// How QEMU migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Over RDMA, memory registered piece by piece.
    Rdma,
    /// Over RDMA, all memory pinned first.
    RdmaPinAll,
    /// Over several TCP connections.
    Multifd(u8),
}

impl Mode {
    fn capability(self) -> Option<&'static str> {
        match self {
            Self::Rdma => None,
            Self::RdmaPinAll => Some("rdma-pin-all"),
            Self::Multifd(_) => Some("multifd"),
        }
    }
}

/// Migrates the image into a file that is made for it; returns the milliseconds from the request until the destination has it.
/// QEMU's own total time ends when the source has sent everything, which may be well before that.
pub(super) fn migrate(
    mode: Mode,
    image: &Path,
    copy: &Path,
    folder: &Path,
    host: &str,
    port: u16,
) -> Result<Took, String> {
    let length = image.metadata().map_err(|e| format!("{}: {e}", image.display()))?.len();
    let file = std::fs::File::create(copy).and_then(|file| file.set_len(length));
    file.map_err(|e| format!("{}: {e}", copy.display()))?;
    let mut destination = Qemu::start(copy, length, &folder.join("destination.qmp"), true)?;
    let mut source = Qemu::start(image, length, &folder.join("source.qmp"), false)?;
    for qemu in [&mut source, &mut destination] {
        qemu.connect()?;
        if let Some(capability) = mode.capability() {
            let on = json!([{"capability": capability, "state": true}]);
            qemu.ask("migrate-set-capabilities", &json!({ "capabilities": on }))?;
        }
        let mut parameters = json!({"max-bandwidth": BANDWIDTH, "downtime-limit": 300});
        if let Mode::Multifd(channels) = mode {
            parameters["multifd-channels"] = channels.into();
        }
        qemu.ask("migrate-set-parameters", &parameters)?;
    }
    let scheme = if matches!(mode, Mode::Multifd(_)) { "tcp" } else { "rdma" };
    let uri = format!("{scheme}:{host}:{port}");
    destination.ask("migrate-incoming", &json!({ "uri": uri }))?;
    let begin = Instant::now();
    source.ask("migrate", &json!({ "uri": uri }))?;
    let state = source.wait_for_migration(begin)?;
    destination.wait_for_migration(begin)?;
    let total_ms = begin.elapsed().as_secs_f64() * 1e3;
    Ok(Took { total_ms, setup_ms: state["setup-time"].as_f64().unwrap_or(0.0) })
}

/// A QEMU with a paused guest.
struct Qemu {
    child: Running,
    socket: std::path::PathBuf,
    link: Option<BufReader<UnixStream>>,
}

impl Qemu {
    fn start(ram: &Path, length: u64, socket: &Path, incoming: bool) -> Result<Self, String> {
        let program = needs::program("qemu-system-x86_64").ok_or("qemu-system-x86_64 is not installed")?;
        let _ = std::fs::remove_file(socket);
        let errors = socket.with_extension("err");
        let stderr = std::fs::File::create(&errors).map_err(|e| format!("{}: {e}", errors.display()))?;
        let backend = format!("memory-backend-file,id=ram,size={length},mem-path={},share=on", ram.display());
        let mut command = Command::new(program);
        command
            .args([
                "-accel",
                "tcg",
                "-machine",
                "q35,memory-backend=ram",
                "-nodefaults",
                "-display",
                "none",
                "-S",
            ])
            .args(["-m", &format!("size={length}B"), "-object", &backend])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let child = Running::start(&mut command).map_err(|e| format!("QEMU does not start: {e}"))?;
        Ok(Self { child, socket: socket.into(), link: None })
    }

    /// Waits for the socket, and greets.
    fn connect(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
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
        stream.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
        self.link = Some(BufReader::new(stream));
        self.ask("qmp_capabilities", &json!({})).map(drop)
    }

    /// One command; its return value.
    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let broke = |e: &dyn std::fmt::Display| format!("QEMU does not answer {command}: {e}");
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
    fn wait_for_migration(&mut self, begin: Instant) -> Result<Value, String> {
        loop {
            let state = self.ask("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(state),
                Some("failed" | "cancelled") => {
                    let reason = state["error-desc"].as_str().unwrap_or("QEMU's migration failed");
                    return Err(format!("{reason}{}", self.last_words()));
                }
                _ if begin.elapsed() > MIGRATION_PATIENCE => {
                    return Err(format!(
                        "QEMU's migration had not ended after {} s",
                        MIGRATION_PATIENCE.as_secs()
                    ));
                }
                _ => std::thread::sleep(TICK),
            }
        }
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
    fn answers_are_told_from_events() {
        let text = b"{\"QMP\": {}}\n{\"event\": \"STOP\"}\n{\"return\": {\"a\": 1}}\n{\"error\": {\"desc\": \"no\"}}\n";
        let mut link = &text[..];
        assert_eq!(answer(&mut link).unwrap(), Ok(json!({"a": 1})));
        assert_eq!(answer(&mut link).unwrap(), Err("no".into()));
        assert!(answer(&mut link).is_err());
        assert!(answer(&mut &b"no JSON\n"[..]).is_err());
    }
}
