//! `pageferry lab`: soft-RoCE for hosts without an RDMA device, in a guest that one command starts.
//!
//! The guest is Debian's kernel under QEMU's software emulation, so neither KVM nor root is needed. It sees the host's files
//! (read-only, with a writable layer on top) and runs the host's programs.

mod bench;
mod cpio;
mod demo;
mod error;
mod guest;
mod host;
mod initramfs;
mod kernel;
mod needs;
mod run;
mod script;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use pageferry::cli::print;

use self::error::LabError;
use self::guest::{BOOT_PATIENCE_S, Output};
use self::run::Plan;
use super::{CliError, size};

/// Runs commands in a guest with soft-RoCE and KVM, for hosts that have neither
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pageferry lab run -- ibv_devinfo")]
pub(super) struct LabArgs {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    Run(RunArgs),
    Up(UpArgs),
    Demo(demo::DemoArgs),
    Bench(bench::BenchArgs),
    Prepare(PrepareArgs),
    /// The bench's part that runs in the guest
    #[command(hide = true)]
    BenchInside(bench::InsideArgs),
}

const RUN_HELP: &str = "Examples:\n  pageferry lab run -- ibv_devinfo\n  \
pageferry lab run --share /tmp/results -- sh -c 'ib_write_bw & sleep 1; ib_write_bw 10.9.0.1 > /tmp/results/bw'\n  \
pageferry lab run --hosts 2 -- sh -c 'ping -c 3 $PAGEFERRY_LAB_PEER'\n\n\
The command sees the host's files; what it writes is gone afterwards, other than in --share folders. \
The RDMA device is rxe0 on pferry0, which has the address 10.9.0.1 (the second of two hosts: 10.9.0.2). \
With --hosts 2, PAGEFERRY_LAB_HOST is 0 or 1 and PAGEFERRY_LAB_PEER the other one's address.\n\
With --parallel, QEMU's emulation damages virtual machines that run in the guest, and now and then the guest itself.\n\n\
Exit codes: the command's own (with --hosts 2 the first that is not 0); 124 timed out; 125 the guest stopped or could not be set up; \
2 wrong arguments; 3 could not start, something is missing; 130 cancelled.";

/// Runs a command in a lab guest
#[derive(Debug, Args)]
#[command(after_help = RUN_HELP)]
struct RunArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// Two guests, joined by a network, that both run the command
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    hosts: u8,
    /// Without a guest: use this host's RDMA device, or (as root) make one for the time of the command
    #[arg(long, conflicts_with_all = ["cpus", "mem", "parallel", "hosts", "share", "console", "kernel", "install", "no_rdma", "ram_file"])]
    host: bool,
    /// Emulate each CPU by a thread of its own: faster, and no place to run virtual machines
    #[arg(long)]
    parallel: bool,
    /// A guest without network and RDMA device
    #[arg(long, hide = true)]
    no_rdma: bool,
    /// Keep the guest's memory in this file, as it is when the command ends
    #[arg(long, value_name = "FILE", conflicts_with = "hosts")]
    ram_file: Option<PathBuf>,
    /// The command, and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    cmd: Vec<OsString>,
}

/// Gives this host, not a guest, an RDMA device for as long as a command runs
///
/// A device that is there is used; else one is made, as root, by rdma_rxe on a pair of virtual network devices, and taken down
/// again. The same as `lab run --host`.
#[derive(Debug, Args)]
#[command(after_help = "Examples, as root:\n  pageferry lab up -- ibv_devinfo\n  pageferry lab up\n\n\
The device that is made is rxe0, with the address 10.9.0.1.\n\n\
Exit codes: the command's own; 124 timed out; 2 wrong arguments; 3 could not start, something is missing; 130 cancelled.")]
struct UpArgs {
    /// End a command that has not ended after this many seconds
    #[arg(long, default_value_t = 86_400, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// The command, and its arguments; without one the device stays until Ctrl-C
    #[arg(last = true, value_name = "CMD")]
    cmd: Vec<OsString>,
}

/// Options of every command that starts a guest.
#[derive(Clone, Debug, Args)]
struct GuestArgs {
    /// CPUs of a guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
    /// Memory of a guest
    #[arg(long, default_value = "3072M", value_parser = memory)]
    mem: u64,
    /// Kill a guest that has not ended after this many seconds
    #[arg(long, default_value_t = 900, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Boot a guest once more that shows no sign of life for this many seconds
    #[arg(long, default_value_t = BOOT_PATIENCE_S, hide = true, value_name = "S")]
    boot_patience: u64,
    /// A folder of the host that the command may write to; may be given several times
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// Keep what the guest's kernel prints in this file
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Boot the kernel of this Debian package instead of the current one's
    #[arg(long, value_name = "PACKAGE")]
    kernel: Option<String>,
    /// As root: install the Debian packages that are missing
    #[arg(long)]
    install: bool,
}

/// Downloads and installs what the lab needs, without starting a guest
#[derive(Debug, Args)]
#[command(after_help = "Example, as root:\n  pageferry lab prepare --install\n\n\
Exit codes: 0 a guest can be started; 2 wrong arguments; 3 something is missing and cannot be had.")]
struct PrepareArgs {
    /// Boot the kernel of this Debian package instead of the current one's
    #[arg(long, value_name = "PACKAGE")]
    kernel: Option<String>,
    /// As root: install the Debian packages that are missing
    #[arg(long)]
    install: bool,
}

/// Memory of a guest: it needs some to unpack itself.
fn memory(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes < 512 << 20 => Err("a lab guest takes at least 512M".into()),
        bytes if bytes > 1 << 40 => Err("a lab guest takes at most 1T".into()),
        bytes => Ok(bytes),
    }
}

impl GuestArgs {
    fn plan(&self, command: Vec<OsString>, hosts: u8, output: Output) -> Plan {
        Plan {
            command,
            hosts: usize::from(hosts),
            cpus: self.cpus,
            parallel: false,
            memory: self.mem,
            ram_file: None,
            timeout: Duration::from_secs(self.timeout),
            boot_patience: Duration::from_secs(self.boot_patience),
            shares: self.share.clone(),
            console: self.console.clone(),
            rdma: true,
            kernel: self.kernel.clone(),
            output,
        }
    }
}

impl LabArgs {
    /// Whether it is to print one JSON object.
    pub(super) fn json(&self) -> bool {
        matches!(&self.command, LabCommand::Bench(args) if args.json)
    }
}

pub(super) fn run(args: &LabArgs) -> Result<ExitCode, CliError> {
    match &args.command {
        LabCommand::Run(args) => run_command(args),
        LabCommand::Up(args) => up(args),
        LabCommand::Demo(args) => demo::run(args),
        LabCommand::Bench(args) => bench::run(args),
        LabCommand::Prepare(args) => prepare(args),
        LabCommand::BenchInside(args) => bench::run_inside(args),
    }
    .map_err(CliError::from)
}

fn run_command(args: &RunArgs) -> Result<ExitCode, LabError> {
    if args.host {
        return host::run(&args.cmd, Duration::from_secs(args.guest.timeout)).map(ExitCode::from);
    }
    if args.guest.install {
        needs::install(needs::GUEST)?;
    }
    let output = if args.hosts == 1 { Output::Through } else { Output::Prefixed };
    let mut plan = args.guest.plan(args.cmd.clone(), args.hosts, output);
    plan.rdma = !args.no_rdma;
    plan.parallel = args.parallel;
    plan.ram_file.clone_from(&args.ram_file);
    Ok(first_failure(&run::run(&plan)?))
}

fn up(args: &UpArgs) -> Result<ExitCode, LabError> {
    let stay =
        ["sh", "-c", "echo 'RDMA is up; Ctrl-C takes down what was made for it' >&2; exec sleep infinity"];
    let command = if args.cmd.is_empty() { stay.map(OsString::from).to_vec() } else { args.cmd.clone() };
    host::run(&command, Duration::from_secs(args.timeout)).map(ExitCode::from)
}

/// This program, which a guest sees at the same place.
fn own_program() -> Result<PathBuf, LabError> {
    std::env::current_exe().map_err(LabError::file("find this program by", Path::new("/proc/self/exe")))
}

/// The exit code for those of the guests.
fn first_failure(codes: &[u8]) -> ExitCode {
    ExitCode::from(codes.iter().copied().find(|code| *code != 0).unwrap_or(0))
}

fn prepare(args: &PrepareArgs) -> Result<ExitCode, LabError> {
    let all = [needs::GUEST, needs::BENCH, &[needs::XZ]].concat();
    if args.install {
        needs::install(&all)?;
    }
    needs::check(needs::GUEST)?;
    let cache = kernel::cache()?;
    let kernel = kernel::find(&cache, args.kernel.as_deref())?;
    let initramfs = initramfs::get(&cache, &kernel)?;
    print::line(format_args!(
        "kernel:    {} ({} modules), {}",
        kernel.version,
        kernel.modules.len(),
        kernel.image.display()
    ));
    print::line(format_args!("initramfs: {}", initramfs.display()));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn parse(line: &str) -> Result<RunArgs, String> {
        Line::try_parse_from(line.split(' ')).map(|line| line.run).map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_is_what_follows_the_dashes() {
        let args = parse("run --cpus 4 --share /a --share /b -- ls --cpus 9 -- x").unwrap();
        assert_eq!(args.cmd, ["ls", "--cpus", "9", "--", "x"]);
        assert_eq!((args.guest.cpus, args.hosts, args.guest.mem), (4, 1, 3 << 30));
        assert_eq!(args.guest.share.len(), 2);
        assert_eq!(args.guest.timeout, 900);
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for bad in [
            "run",
            "run ls",
            "run --hosts 3 -- ls",
            "run --cpus 0 -- ls",
            "run --mem 64M -- ls",
            "run --timeout 0 -- ls",
            "run --hosts 2 --ram-file /x -- ls",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_code_that_is_not_zero_counts() {
        assert_eq!(first_failure(&[0, 0]), ExitCode::SUCCESS);
        assert_eq!(first_failure(&[0, 3]), ExitCode::from(3));
        assert_eq!(first_failure(&[4, 3]), ExitCode::from(4));
    }
}
