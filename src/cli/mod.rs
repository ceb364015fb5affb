//! The command line, its measurements and what it prints: behind the feature `cli`, and no part of the library.

mod api;
mod backing;
mod bench;
mod ctl;
mod demo;
mod file;
mod folder;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod inspect;
mod keys;
mod lab;
mod log;
pub mod measure;
mod output;
pub mod print;
mod protection;
mod qemu;
mod random;
mod rate;
mod recv;
mod sandbox;
mod send;
mod size;
mod stats;
mod stop;
mod trace;
mod tuning;
mod vm;
mod words;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use pageferry::engine::report::Status;
use pageferry::vmm_shim::lost_room;
use pageferry::{CodecMode, RdmaOptions, SourceBuilder, reserve};

/// Moves the RAM of a running virtual machine between hosts.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXIT_CODES, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: log::LogArgs,
}

impl Cli {
    fn parse_arguments<T>(words: impl IntoIterator<Item = T>) -> Result<Self, clap::Error>
    where
        T: Into<std::ffi::OsString> + Clone,
    {
        let mut command = Self::command().mut_subcommand("ctl", ctl::with_usages);
        let matches = command.try_get_matches_from_mut(words)?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 the migration failed and the source has the guest, \
or an archive is damaged; 2 wrong arguments; \
3 could not start (file, port, permission); 4 the handover was not confirmed: look at both sides before resuming; \
5 a page of guest memory in a file could not be had, for its file system was full; \
6 done, but the result could not be printed; 130 cancelled.";

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    Vm(vm::VmArgs),
    Ctl(ctl::CtlArgs),
    Send(send::SendArgs),
    Recv(recv::RecvArgs),
    Qemu(qemu::QemuArgs),
    Inspect(inspect::InspectArgs),
    Keys(keys::KeysArgs),
    Lab(lab::LabArgs),
    Bench(Box<bench::BenchArgs>),
}

/// How a command ends when it does not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Exit {
    /// The migration failed; nothing is lost.
    Failed = 1,
    /// The arguments are wrong.
    Usage = 2,
    /// Nothing was begun.
    CannotStart = 3,
    /// Nobody knows who has the guest.
    Unknown = 4,
    /// A lab guest's command took too long.
    TimedOut = 124,
    /// A lab guest stopped, or could not be set up.
    LabStopped = 125,
    /// Somebody asked.
    Cancelled = 130,
}

/// A command's failure: printed, and the process's exit code.
#[derive(Debug)]
struct CliError {
    exit: Exit,
    text: String,
}

impl CliError {
    fn usage(text: String) -> Self {
        Self { exit: Exit::Usage, text }
    }

    fn cannot_start(error: &dyn std::error::Error) -> Self {
        Self { exit: Exit::CannotStart, text: words::explain(error) }
    }
}

/// Does what the arguments say.
pub fn run() -> ExitCode {
    // Before there is any guest memory.
    lost_room::report();
    // A `vm` is there for many migrations. Here, not in the library, which leaves its host's allocator as it is.
    reserve::keep_little();
    print::on_panic(|text| match tracing::enabled!(tracing::Level::ERROR) {
        true => tracing::error!("{text}"),
        false => say(text),
    });
    let code = match Cli::parse_arguments(std::env::args_os()) {
        Ok(cli) => run_command(&cli),
        Err(error) => usage(&error),
    };
    print::end("pageferry", code)
}

/// Says a line on standard error.
fn say(text: impl std::fmt::Display) {
    print::note(format_args!("pageferry: {text}"));
}

/// Prints what clap has to say: help that was asked for, or what is wrong with the arguments.
fn usage(error: &clap::Error) -> ExitCode {
    let (out, errors) = print::terminals();
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let styled = error.render();
    let text = |terminal| if terminal && !plain { styled.ansi().to_string() } else { styled.to_string() };
    if !error.use_stderr() {
        print::text(text(out));
        return ExitCode::SUCCESS;
    }
    let mut words = std::env::args_os().take_while(|word| word != "--");
    if words.any(|word| word == "--json") {
        let text = styled.to_string();
        let paragraph = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        print::line(failure(Exit::Usage, paragraph));
    }
    print::errors().push(text(errors).into_bytes());
    ExitCode::from(Exit::Usage as u8)
}

/// What `--json` prints where there is no result.
fn failure(exit: Exit, text: &str) -> serde_json::Value {
    let status = match exit {
        Exit::Cancelled => Status::Cancelled,
        Exit::Unknown => Status::Unknown,
        _ => Status::Failed,
    };
    serde_json::json!({ "status": status, "error": text, "exit_code": exit as u8 })
}

fn run_command(cli: &Cli) -> ExitCode {
    let logging = cli.log.start().map_err(|text| CliError { exit: Exit::CannotStart, text });
    let result = logging.and_then(|()| cli.command.run());
    result.unwrap_or_else(|CliError { exit, text }| {
        if cli.command.json() && !print::has_printed() {
            print::line(failure(exit, &text));
        }
        say(text);
        ExitCode::from(exit as u8)
    })
}

impl Command {
    fn run(&self) -> Result<ExitCode, CliError> {
        let done = |()| ExitCode::SUCCESS;
        match self {
            Self::Demo(args) => demo::run(args).map(done),
            Self::Vm(args) => vm::run(args).map(done),
            Self::Ctl(args) => ctl::run(args).map(done),
            Self::Send(args) => send::run(args).map(done),
            Self::Recv(args) => recv::run(args).map(done),
            Self::Qemu(args) => qemu::run(args).map(done),
            Self::Inspect(args) => inspect::run(args),
            Self::Keys(args) => keys::run(args),
            Self::Lab(args) => lab::run(args),
            Self::Bench(args) => bench::run(args).map(done),
        }
    }

    /// Whether it is to print one JSON object, whatever happens.
    fn json(&self) -> bool {
        match self {
            Self::Demo(args) => args.json,
            Self::Ctl(args) => args.json,
            Self::Send(args) => args.json,
            Self::Recv(args) => args.json,
            Self::Qemu(args) => args.json(),
            Self::Inspect(args) => args.json,
            Self::Keys(args) => args.json,
            Self::Lab(args) => args.json(),
            Self::Bench(args) => args.json,
            Self::Vm(_) => false,
        }
    }
}

/// Options of every command that migrates.
#[derive(Clone, Debug, Args)]
struct TransferArgs {
    /// Data streams
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    streams: u16,
    /// How pages are encoded: auto, raw, zstd[:LEVEL], delta
    #[arg(long, default_value = "auto")]
    codec: CodecMode,
    /// Give a silent peer or stream up after this many seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    link_timeout: u64,
    /// Try this many seconds to connect again what was lost, while the guest runs on; 0: fail at once
    #[arg(long, default_value_t = 300, value_name = "S", value_parser = clap::value_parser!(u64).range(0..=86400))]
    reconnect_timeout: u64,
    #[command(flatten)]
    rdma: RdmaArgs,
}

/// Options of the rdma: transport.
#[derive(Clone, Debug, Args)]
struct RdmaArgs {
    /// Over RDMA: pin all memory that holds data before the first page is sent
    #[arg(long)]
    rdma_pin_all: bool,
    #[command(flatten)]
    limit: PinnedArgs,
}

/// The one that destinations have, too.
#[derive(Clone, Debug, Args)]
struct PinnedArgs {
    /// Over RDMA: pin at most this much memory at a time
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    rdma_max_pinned: Option<u64>,
}

impl RdmaArgs {
    fn options(&self) -> RdmaOptions {
        RdmaOptions { pin_all: self.rdma_pin_all, ..self.limit.options() }
    }
}

impl PinnedArgs {
    fn options(&self) -> RdmaOptions {
        RdmaOptions { pin_all: false, pinned_max: self.rdma_max_pinned.unwrap_or(u64::MAX) }
    }
}

impl TransferArgs {
    fn apply(&self, source: SourceBuilder) -> SourceBuilder {
        source
            .streams(self.streams)
            .codec(self.codec)
            .link_timeout(Duration::from_secs(self.link_timeout))
            .reconnect_timeout(Duration::from_secs(self.reconnect_timeout))
            .rdma(self.rdma.options())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(line: &str) -> String {
        Cli::parse_arguments(line.split(' ')).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().mut_subcommand("ctl", ctl::with_usages).debug_assert();
        Cli::parse_arguments("pageferry ctl unix:/run/a.sock plan --link 1Gbit".split(' ')).unwrap();
        Cli::parse_arguments("pageferry ctl schema".split(' ')).unwrap();
    }

    #[test]
    fn usages_name_the_vm_that_is_commanded() {
        for (command, rest) in [
            ("plan", "[OPTIONS] --link <RATE>"),
            ("migrate", "[OPTIONS] <URI>"),
            ("recover", "[OPTIONS] <URI>"),
        ] {
            let usage = format!("Usage: pageferry ctl <API> {command} {rest}");
            for text in [
                said(&format!("pageferry ctl unix:/x {command}")),
                said(&format!("pageferry ctl {command} --help")),
            ] {
                assert!(text.contains(&usage), "{usage}: {text}");
            }
        }
        assert!(said("pageferry ctl schema --help").contains("Usage: pageferry ctl schema"));
        assert!(said("pageferry ctl").contains("pageferry ctl <API> [OPTIONS] <COMMAND>"));
    }
}
