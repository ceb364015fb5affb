//! The lab without a guest: runs a command on this host, with its RDMA device or with soft-RoCE on a pair of virtual network devices that
//! are taken down afterwards.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::stop;
use super::error::LabError;
use super::needs;
use super::script::{self, LINKS, Network, RDMA_DEVICE};
use crate::cli::say;

/// Where Linux lists RDMA devices.
const DEVICES: &str = "/sys/class/infiniband";
/// How often it is looked whether the command has ended.
const TICK: Duration = Duration::from_millis(20);
/// How long a command may take to end when asked to.
const GRACE: Duration = Duration::from_secs(5);
/// How long the RDMA device may take to know its address.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(5);

/// Runs the command; returns its exit code.
pub(super) fn run(command: &[OsString], timeout: Duration) -> Result<u8, LabError> {
    let (to, cancelled) = channel();
    stop::on_signals(move || {
        // Nobody listens any more once the command has ended.
        let _ = to.send(());
    });
    let links = match devices(Path::new(DEVICES)) {
        found if found.is_empty() => Some(Links::set_up()?),
        found => {
            say(format_args!("this host has RDMA devices: {}", found.join(", ")));
            None
        }
    };
    let result = run_here(command, timeout, &cancelled);
    drop(links);
    result
}

/// The names of the RDMA devices.
fn devices(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// The virtual network devices and the RDMA device on them; gone when dropped.
struct Links;

impl Links {
    fn set_up() -> Result<Self, LabError> {
        let failed = |reason| Err(LabError::Host { reason });
        if !nix::unistd::geteuid().is_root() {
            return failed(
                "there is no RDMA device, and only root may make one (soft-RoCE): use sudo, or leave --host out: \
                 the lab guest needs no root"
                    .into(),
            );
        }
        needs::check(needs::HOST)?;
        if let Err(reason) = load("rdma_rxe") {
            return failed(format!(
                "there is no RDMA device, and its kernel does not load rdma_rxe, which would be one ({reason}): boot a kernel \
                 that has it (Debian's has), or leave --host out"
            ));
        }
        // For programs that use the connection manager; rdma_rxe works without.
        let _ = load("rdma_ucm");
        if Path::new("/sys/class/net").join(LINKS[0]).exists() {
            return failed(format!(
                "its network device {} exists: another `lab run --host` uses it, or one was killed (then: ip link delete {})",
                LINKS[0], LINKS[0]
            ));
        }
        // From here on, whatever was set up is taken down.
        let links = Self;
        for words in script::network_commands(Network::Veth, 0) {
            call(&words).map_err(|reason| LabError::Host { reason })?;
        }
        links.wait_for_address()?;
        Ok(links)
    }

    fn wait_for_address(&self) -> Result<(), LabError> {
        let deadline = Instant::now() + ADDRESS_PATIENCE;
        let folder = Path::new(DEVICES).join(RDMA_DEVICE).join("ports/1/gids");
        let has_address = |path: &Path| fs::read_to_string(path).is_ok_and(|gid| gid.contains("ffff:0a09"));
        while !fs::read_dir(&folder).into_iter().flatten().flatten().any(|entry| has_address(&entry.path())) {
            if Instant::now() > deadline {
                return Err(LabError::Host { reason: format!("{RDMA_DEVICE} gets no address") });
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        // Only what was set up can be taken down; the rest says that it is not there.
        let lines = [format!("rdma link delete {RDMA_DEVICE}"), format!("ip link delete {}", LINKS[0])];
        for line in lines {
            let _ = call(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        }
    }
}

/// Loads a module, unless it is there.
fn load(module: &str) -> Result<(), String> {
    if Path::new("/sys/module").join(module).exists() {
        return Ok(());
    }
    call(&["modprobe".to_owned(), module.to_owned()])
}

fn call(words: &[String]) -> Result<(), String> {
    let program = needs::program(&words[0]).ok_or_else(|| format!("{} is not installed", words[0]))?;
    let output = Command::new(program).args(&words[1..]).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(LabError::tool(&words.join(" "), &output).to_string()),
        Err(error) => Err(format!("{}: {error}", words.join(" "))),
    }
}

/// Runs the command with this host's files, network and terminal.
fn run_here(command: &[OsString], timeout: Duration, cancelled: &Receiver<()>) -> Result<u8, LabError> {
    let program = Path::new(&command[0]);
    let mut child = Command::new(program)
        .args(&command[1..])
        .env("PATH", needs::path())
        .env("PAGEFERRY_LAB_HOST", "0")
        .spawn()
        .map_err(LabError::file("run", program))?;
    let deadline = Instant::now() + timeout;
    loop {
        match cancelled.recv_timeout(TICK) {
            Ok(()) => {
                end(&mut child);
                return Err(LabError::Cancelled);
            }
            Err(RecvTimeoutError::Timeout) => {}
            // Signals do what they do by default.
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
        }
        if let Some(status) = child.try_wait().map_err(LabError::file("wait for", program))? {
            return Ok(code(status));
        }
        if Instant::now() > deadline {
            end(&mut child);
            return Err(LabError::TimedOut { after: timeout, console: String::new() });
        }
    }
}

/// The exit code, as a shell has it.
fn code(status: ExitStatus) -> u8 {
    let signal = || std::os::unix::process::ExitStatusExt::signal(&status).map_or(1, |signal| 128 + signal);
    u8::try_from(status.code().unwrap_or_else(signal)).unwrap_or(1)
}

/// Asks a child to end, then makes it.
fn end(child: &mut Child) {
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    let deadline = Instant::now() + GRACE;
    while child.try_wait().is_ok_and(|status| status.is_none()) {
        if Instant::now() > deadline {
            let _ = child.kill();
        }
        std::thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str, timeout: Duration) -> Result<u8, LabError> {
        let (_to, cancelled) = channel();
        run_here(&["sh", "-c", line].map(OsString::from), timeout, &cancelled)
    }

    #[test]
    fn exit_codes_pass_through() {
        let long = Duration::from_secs(60);
        assert_eq!(run("exit 0", long).unwrap(), 0);
        assert_eq!(run("exit 77", long).unwrap(), 77);
        assert_eq!(run("kill -KILL $$", long).unwrap(), 137);
        assert!(matches!(run("exec sleep 100", Duration::ZERO), Err(LabError::TimedOut { .. })));
    }

    #[test]
    fn a_cancelled_command_ends() {
        let (to, cancelled) = channel();
        to.send(()).unwrap();
        let command = ["sleep", "100"].map(OsString::from);
        let result = run_here(&command, Duration::from_secs(60), &cancelled);
        assert!(matches!(result, Err(LabError::Cancelled)));
    }

    #[test]
    fn devices_are_listed_by_name() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(devices(&folder.path().join("nothing")), Vec::<String>::new());
        fs::create_dir(folder.path().join("mlx5_0")).unwrap();
        assert_eq!(devices(folder.path()), ["mlx5_0"]);
    }
}
