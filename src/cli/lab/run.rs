//! Runs one command in one lab guest, or in two that are joined by a network.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::super::stop;
use super::error::LabError;
use super::guest::{Event, Guest, Machine, Output, Word};
use super::script::{self, Network};
use super::{initramfs, kernel, needs};

/// A shell's exit code for a command that a broken pipe ended.
const BROKEN_PIPE: u8 = 141;

/// What runs, where.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// Guests: 1 or 2.
    pub hosts: usize,
    /// CPUs of each.
    pub cpus: u8,
    /// Whether each CPU has a thread of its own.
    pub parallel: bool,
    /// Memory of each, in bytes.
    pub memory: u64,
    /// The file that is the (only) guest's memory; made new, and kept as the guest leaves it.
    pub ram_file: Option<PathBuf>,
    /// How long all of it may take.
    pub timeout: Duration,
    /// How long a guest's boot may take before it is booted once more.
    pub boot_patience: Duration,
    /// Folders of the host that the guests may write to.
    pub shares: Vec<PathBuf>,
    /// Keep the consoles here; the second guest's with `.1` after the name.
    pub console: Option<PathBuf>,
    /// Whether there is an RDMA device.
    pub rdma: bool,
    /// The kernel's package.
    pub kernel: Option<String>,
    /// Where the command's output goes.
    pub output: Output,
}

/// Runs it; returns the exit code of each guest's command.
pub(super) fn run(plan: &Plan) -> Result<Vec<u8>, LabError> {
    needs::check(needs::GUEST)?;
    let cache = kernel::cache()?;
    let kernel = kernel::find(&cache, plan.kernel.as_deref())?;
    let initramfs = initramfs::get(&cache, &kernel)?;
    let shares: Vec<PathBuf> = plan.shares.iter().map(|path| shared(path)).collect::<Result<_, _>>()?;
    let folder = Folder::new().map_err(LabError::file("make a folder in", &std::env::temp_dir()))?;
    let (to, events) = channel();
    let cancel = to.clone();
    stop::on_signals(move || {
        // Nobody listens any more once the guests have ended.
        let _ = cancel.send(Event::Cancelled);
    });
    if let Some(file) = &plan.ram_file {
        let made = fs::File::create(file).and_then(|made| made.set_len(plan.memory));
        made.map_err(LabError::file("make", file))?;
    }
    let deadline = Instant::now() + plan.timeout;
    let mut guests = Vec::new();
    for host in 0..plan.hosts {
        let consoles: Vec<_> = plan.console.iter().map(|path| console_of(path, host)).collect();
        let machine = Machine {
            kernel: &kernel,
            initramfs: &initramfs,
            cpus: plan.cpus,
            parallel: plan.parallel,
            memory: plan.memory,
            ram_file: plan.ram_file.as_deref(),
            shares: &shares,
            network: network(plan),
            host,
            console: consoles.first().map(PathBuf::as_path),
            boot_patience: plan.boot_patience,
        };
        guests.push(start(plan, &machine, &folder.path, &to)?);
    }
    let result = follow(&mut guests, &events, deadline, plan.timeout);
    for guest in &mut guests {
        guest.end();
    }
    result
}

fn network(plan: &Plan) -> Network {
    match (plan.rdma, plan.hosts) {
        (false, _) => Network::None,
        (true, 1) => Network::Veth,
        (true, _) => Network::Card,
    }
}

fn console_of(path: &Path, host: usize) -> PathBuf {
    if host == 0 {
        return path.into();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{host}"));
    name.into()
}

/// A folder to share, as the guest will see it too.
fn shared(path: &Path) -> Result<PathBuf, LabError> {
    let path = fs::canonicalize(path).map_err(LabError::file("share", path))?;
    fs::read_dir(&path).map_err(LabError::file("share", &path))?;
    Ok(path)
}

/// Writes a guest's scripts and starts it.
fn start(plan: &Plan, machine: &Machine<'_>, folder: &Path, to: &Sender<Event>) -> Result<Guest, LabError> {
    let own = folder.join(machine.host.to_string());
    let job = own.join("job");
    fs::create_dir_all(&job).map_err(LabError::file("make the folder", &job))?;
    let mut added = vec![("PAGEFERRY_LAB_HOST".to_owned(), machine.host.to_string())];
    if plan.hosts == 2 {
        added.push(("PAGEFERRY_LAB_PEER".into(), script::address(1 - machine.host)));
    }
    let here = std::env::current_dir().unwrap_or_else(|_| "/".into());
    for (name, text) in [
        ("setup", script::setup(machine.host, machine.shares)),
        ("network", script::network(machine.network, machine.host)),
        ("command", script::command(&plan.command, here.as_os_str(), &added)),
    ] {
        let path = job.join(name);
        fs::write(&path, text).map_err(LabError::file("write", &path))?;
    }
    Guest::start(machine, &own, &plan.output, to)
}

/// Waits for every guest's command to end. They start together, and no guest ends while another one's command runs.
fn follow(
    guests: &mut [Guest],
    events: &Receiver<Event>,
    deadline: Instant,
    limit: Duration,
) -> Result<Vec<u8>, LabError> {
    let mut ready = 0;
    let mut codes = vec![None; guests.len()];
    while codes.iter().any(Option::is_none) {
        let until = guests.iter().filter_map(Guest::silent_until).min().map_or(deadline, |t| t.min(deadline));
        let (host, word) = match events.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Event::Said(host, word)) => (host, word),
            Ok(Event::ReaderGone) => return Ok(vec![BROKEN_PIPE; guests.len()]),
            Ok(Event::Cancelled) | Err(RecvTimeoutError::Disconnected) => return Err(LabError::Cancelled),
            Err(RecvTimeoutError::Timeout) if until < deadline => {
                for guest in guests.iter_mut().filter(|guest| guest.silent_until() == Some(until)) {
                    guest.boot_again()?;
                }
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                let slow = codes.iter().position(Option::is_none).unwrap_or_default();
                return Err(LabError::TimedOut { after: limit, console: guests[slow].console() });
            }
        };
        guests[host].heard();
        match word {
            Word::Alive => {}
            Word::Ready => ready += 1,
            Word::Exit(code) => codes[host] = Some(code),
            Word::Fail(reason) => return Err(LabError::Setup { reason, console: guests[host].console() }),
            Word::Gone if codes[host].is_some() => {}
            Word::Gone => {
                // QEMU closes the ports before it has said why.
                guests[host].end();
                let (reason, console) = (guests[host].qemu_errors(), guests[host].console());
                return Err(LabError::Stopped { reason, console });
            }
        }
        if ready == guests.len() {
            ready = 0;
            guests.iter_mut().for_each(Guest::go);
        }
    }
    Ok(codes.into_iter().flatten().collect())
}

/// A folder for sockets, scripts and consoles, removed in the end. Only its owner may enter: the scripts have the caller's environment.
pub(super) struct Folder {
    /// Where it is.
    pub path: PathBuf,
}

impl Folder {
    pub(super) fn new() -> std::io::Result<Self> {
        let mut random = [0u8; 8];
        getrandom::fill(&mut random).map_err(std::io::Error::other)?;
        let name = format!("pageferry-lab-{:016x}", u64::from_le_bytes(random));
        let path = std::env::temp_dir().join(name);
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
