//! `pageferry demo`: a guest that keeps writing moves between two processes of this host, and proves that it went on.

mod half;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cli::words::explain;
use clap::Args;
use pageferry::cli::print;
use pageferry::engine::report::Report;
use pageferry::vmm_shim::guests::counter::{Checker, CounterParams, Side};
use pageferry::vmm_shim::kvm;
use serde::Serialize;

use super::api::{self, MigrateRequest, Request, RunState, VmStatus};
use super::folder::Folder;
use super::tuning::TuningArgs;
use super::{CliError, Exit, TransferArgs, ctl, output, size};
use crate::cli::say;

/// How long a VM may take to start, and the guest to print.
const PATIENCE: Duration = Duration::from_secs(30);
/// Passes every vCPU shows on each side.
const PASSES: u64 = 2;

/// Moves a running guest between two VMs on this host and proves that it went on
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pageferry demo --mem 1G --cpus 2 --streams 4 --json")]
pub(super) struct DemoArgs {
    /// Guest memory
    #[arg(long, default_value = "256M", value_parser = size::memory)]
    mem: u64,
    /// vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: u8,
    #[command(flatten)]
    transfer: TransferArgs,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Memory that the guest writes over and over
    #[arg(long, default_value = "16M", value_parser = size::parse)]
    working_set: u64,
    /// Pages that each vCPU writes in a second; 0: as fast as it can
    #[arg(long, default_value_t = 20000)]
    rate: u64,
    /// Let the guest run at the destination at once; its pages follow
    #[arg(long)]
    postcopy: bool,
    /// Go over this URI instead of a free port on 127.0.0.1
    #[arg(long, value_name = "URI")]
    uri: Option<String>,
    /// How written pages are found: bitmap, ring, uffd
    #[arg(long, default_value = "bitmap")]
    tracker: String,
    /// Without KVM: a process moves that writes its own memory
    #[arg(long)]
    no_kvm: bool,
    /// Only one side, for two hosts that share a folder: its name
    #[arg(long, hide = true, requires_all = ["meet", "uri"])]
    side: Option<half::Which>,
    /// The folder that both sides share
    #[arg(long, hide = true, value_name = "DIR", requires = "side")]
    meet: Option<PathBuf>,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(super) json: bool,
}

/// The demo's result: the migration's report, and the guest's own word.
#[derive(Debug, Serialize)]
struct DemoReport {
    #[serde(flatten)]
    report: Report,
    /// `kvm` or `process`.
    accelerator: &'static str,
    /// Passes that each vCPU finished before and after the handover.
    passes: Vec<(u64, u64)>,
}

pub(super) fn run(args: &DemoArgs) -> Result<(), CliError> {
    let process = args.no_kvm || !have_kvm(args.json);
    let folder = Folder::new("demo").map_err(|e| CliError::cannot_start(&e))?;
    if let (Some(side), Some(meet)) = (args.side, &args.meet) {
        return half::run(args, side, meet, process, &folder.path);
    }
    let guest = Pair::start(args, process, &folder.path)?;
    let mut check = Checker::new(args.cpus, pages_of_each(args));
    wait_passes(&guest.source.serial, &mut check, Side::Source).map_err(|e| guest.source.explain(e))?;
    tell(args.json, "the guest runs at the source and keeps writing; moving it");
    let end = migrate(args, &guest.source, guest.uri.clone())?;
    let went = end.verdict().and_then(|()| guest.prove(&mut check));
    let went = went.map_err(|error| CliError { text: error.text + &guest.last_words(), ..error });
    let mut report = end.report;
    report.verified &= went.is_ok();
    if let Err(error) = &went {
        report.error = Some(error.text.clone());
    }
    let passes = check.passes();
    if args.json {
        let accelerator = if process { "process" } else { "kvm" };
        let demo = DemoReport { report, accelerator, passes };
        print::line(serde_json::to_string(&demo).unwrap_or_default());
    } else {
        output::print(&report, false);
        print_passes(&passes);
    }
    went
}

/// Migrates the guest.
fn migrate(args: &DemoArgs, source: &VmProcess, uri: String) -> Result<ctl::End, CliError> {
    let migrate = MigrateRequest {
        resume_after_save: false,
        snapshot: false,
        base: None,
        uri,
        tls: None,
        streams: args.transfer.streams,
        codec: args.transfer.codec.to_string(),
        postcopy_after_rounds: args.postcopy.then_some(0),
        link_timeout_s: args.transfer.link_timeout,
        reconnect_timeout_s: 10,
        rdma_pin_all: args.transfer.rdma.rdma_pin_all,
        rdma_max_pinned: args.transfer.rdma.limit.rdma_max_pinned,
        tuning: args.tuning.clone(),
    };
    api::ask(&source.api, &Request::Migrate(Box::new(migrate))).map_err(|e| ctl::refused(&e))?;
    ctl::follow(&source.api, args.json)
}

fn print_passes(passes: &[(u64, u64)]) {
    for (cpu, (before, after)) in passes.iter().enumerate() {
        print::line(format_args!(
            "vCPU {cpu}: {before} passes over its memory before the handover, {after} after it, none lost, none twice"
        ));
    }
}

fn tell(quiet: bool, text: &str) {
    if !quiet {
        say(text);
    }
}

fn have_kvm(quiet: bool) -> bool {
    match kvm::open() {
        Ok(_) => true,
        Err(error) => {
            tell(quiet, &explain(&error));
            tell(
                quiet,
                "so the demo moves a process that writes its own memory instead of a virtual machine",
            );
            false
        }
    }
}

fn pages_of_each(args: &DemoArgs) -> u64 {
    CounterParams { working_set: args.working_set, pages_per_s: args.rate, page_words: 0 }.pages(args.cpus)
}

/// One VM process; killed when dropped.
struct VmProcess {
    child: Child,
    api: PathBuf,
    serial: PathBuf,
    errors: PathBuf,
}

impl VmProcess {
    fn start(
        args: &DemoArgs,
        process: bool,
        folder: &Path,
        name: &str,
        incoming: Option<&str>,
    ) -> Result<Self, CliError> {
        let api = folder.join(format!("{name}.sock"));
        let serial = folder.join(format!("{name}.serial"));
        let errors = folder.join(format!("{name}.err"));
        let system = |e: std::io::Error| CliError::cannot_start(&e);
        let mut command = Command::new(std::env::current_exe().map_err(system)?);
        command
            .arg("vm")
            .arg("--api")
            .arg(format!("unix:{}", api.display()))
            .arg("--serial")
            .arg(&serial)
            .args(["--guest", "counter", "--tracker", &args.tracker])
            .args(["--mem", &args.mem.to_string(), "--cpus", &args.cpus.to_string()])
            .args(["--working-set", &args.working_set.to_string(), "--rate", &args.rate.to_string()])
            .args(["--link-timeout", &args.transfer.link_timeout.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors).map_err(system)?);
        if process {
            command.arg("--no-kvm");
        }
        if let Some(uri) = incoming {
            // Whatever it is told, and whoever can reach it: the guest has nothing to hide.
            command.args(["--insecure", "--incoming", uri]);
        }
        let child = command.spawn().map_err(system)?;
        Ok(Self { child, api, serial, errors })
    }

    /// Waits until it answers and `ready` likes the answer.
    fn wait<T>(&mut self, ready: impl Fn(&VmStatus) -> Option<T>) -> Result<T, CliError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(status) = api::status(&self.api)
                && let Some(value) = ready(&status)
            {
                return Ok(value);
            }
            let ended = self.child.try_wait().ok().flatten().is_some();
            if ended || Instant::now() > deadline {
                let text = std::fs::read_to_string(&self.errors).unwrap_or_default();
                let text = text.trim().trim_start_matches("pageferry: ");
                let text = if ended {
                    format!("a VM of the demo ended: {text}")
                } else {
                    "a VM of the demo does not answer".into()
                };
                return Err(CliError { exit: Exit::CannotStart, text });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Adds why the guest crashed, if it did: a guest that is gone prints nothing.
    fn explain(&self, mut error: CliError) -> CliError {
        if let Ok(VmStatus { reason: Some(why), .. }) = api::status(&self.api) {
            error.text = format!("{}: {why}", error.text);
        }
        error
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        let asked = api::ask(&self.api, &Request::Quit { force: true }).is_ok();
        let deadline = Instant::now() + Duration::from_secs(2);
        while asked && Instant::now() < deadline {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Source and destination.
struct Pair {
    source: VmProcess,
    destination: VmProcess,
    uri: String,
}

impl Pair {
    fn start(args: &DemoArgs, process: bool, folder: &Path) -> Result<Self, CliError> {
        let listen = args.uri.as_deref().unwrap_or("tcp:127.0.0.1:0");
        let mut source = VmProcess::start(args, process, folder, "source", None)?;
        let mut destination = VmProcess::start(args, process, folder, "destination", Some(listen))?;
        source.wait(|s| (s.state == RunState::Running).then_some(()))?;
        let uri = destination.wait(|s| s.listening.clone())?;
        Ok(Self { source, destination, uri })
    }

    /// What the VMs said on standard error, for an error whose reason one of them knows.
    fn last_words(&self) -> String {
        let said = |name: &str, vm: &VmProcess| {
            let text = std::fs::read_to_string(&vm.errors).unwrap_or_default();
            let lines = text.lines().map(|line| line.trim_start_matches("pageferry: "));
            let lines: Vec<_> = lines.filter(|line| !line.starts_with("listening on ")).collect();
            if lines.is_empty() { String::new() } else { format!("; the {name} said: {}", lines.join("; ")) }
        };
        said("source", &self.source) + &said("destination", &self.destination)
    }

    /// The guest's own word: what it printed at the source, then at the destination, is one unbroken chain.
    fn prove(&self, check: &mut Checker) -> Result<(), CliError> {
        prove(&self.source.serial, &self.destination.serial, check).map_err(|e| self.destination.explain(e))
    }
}

/// What the guest printed at the source, then at the destination, is one unbroken chain.
fn prove(source: &Path, destination: &Path, check: &mut Checker) -> Result<(), CliError> {
    *check = Checker::new(check.passes().len() as u8, check.pages());
    Console::open(source)?.feed(check, Side::Source)?;
    wait_passes(destination, check, Side::Destination)
}

/// Waits until every vCPU has finished some passes on one side.
fn wait_passes(serial: &Path, check: &mut Checker, side: Side) -> Result<(), CliError> {
    let mut console = Console::open(serial)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        console.feed(check, side)?;
        let enough = |&(before, after): &(u64, u64)| match side {
            Side::Source => before >= PASSES,
            Side::Destination => after >= PASSES,
        };
        if check.passes().iter().all(enough) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(CliError {
                exit: Exit::Failed,
                text: format!(
                    "the guest shows no progress at the {} for {} s",
                    if side == Side::Source { "source" } else { "destination" },
                    PATIENCE.as_secs()
                ),
            });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A VM's console output, read as it grows.
struct Console {
    file: File,
}

impl Console {
    fn open(path: &Path) -> Result<Self, CliError> {
        File::open(path).map(|file| Self { file }).map_err(|e| CliError::cannot_start(&e))
    }

    fn feed(&mut self, check: &mut Checker, side: Side) -> Result<(), CliError> {
        let mut text = Vec::new();
        self.file.read_to_end(&mut text).map_err(|e| CliError::cannot_start(&e))?;
        check.feed(side, &text).map_err(|e| CliError {
            exit: Exit::Failed,
            text: format!("the guest did not survive the migration whole: {}", explain(&e)),
        })
    }
}
