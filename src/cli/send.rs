//! `pageferry send`: moves the content of a RAM file.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use pageferry::engine::progress::Progress;
use pageferry::engine::source::{Cause, Failure, Fate, SourceBackend, migrate};
use pageferry::engine::tuning::Tuning;
use pageferry::engine::{content_digest, explain};
use pageferry::pagecopy::backend::{GuestRam, StaticLog};
use pageferry::transport::uri::Uri;
use pageferry::vmm_shim::guest_memory::GuestMemory;

use super::{CliError, Exit, TransferArgs, output, rate, stop};

/// Sends the content of a RAM file to `pageferry recv`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pageferry send tcp:node7:4444 --ram-file /dev/shm/ram.img --streams 4")]
pub(super) struct SendArgs {
    /// Where the destination listens: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT
    uri: Uri,
    /// The file; its size must be a multiple of 4096
    #[arg(long, value_name = "FILE")]
    ram_file: PathBuf,
    #[command(flatten)]
    transfer: TransferArgs,
    /// Send at most so much a second over all streams together: 1Gbit, 100MB/s, or bytes
    #[arg(long, value_name = "RATE", value_parser = rate::parse)]
    bandwidth: Option<u64>,
    /// Print an xxh3-128 of the content (reads all of it once more)
    #[arg(long)]
    digest: bool,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(super) json: bool,
}

/// Whether it failed before anything was begun.
pub(super) fn is_not_started(failure: &Failure) -> bool {
    matches!(failure.cause, Cause::Socket(_))
}

pub(super) fn run(args: &SendArgs) -> Result<(), CliError> {
    let ram = match args.uri {
        Uri::Rdma { .. } => GuestMemory::open_ram_file_to_register(&args.ram_file),
        Uri::Tcp { .. } | Uri::Unix(_) => GuestMemory::open_ram_file(&args.ram_file, false),
    };
    let ram = ram.map_err(|e| CliError::cannot_start(&e))?;
    let ram: Arc<dyn GuestRam> = Arc::new(ram);
    let backend = SourceBackend {
        ram: ram.clone(),
        log: Arc::new(StaticLog),
        guest: None,
        paused: false,
        machine: String::new(),
    };
    let bandwidth = args.bandwidth.filter(|&rate| rate != 0);
    let progress = Progress::new(Tuning { bandwidth, ..Tuning::default() });
    let cancelled = progress.clone();
    stop::on_signals(move || {
        cancelled.cancel();
    });
    let bar = output::Bar::start(&progress, args.json);
    let result = migrate(&backend, &args.uri, &args.transfer.options(), &progress);
    bar.finish();
    let mut report = progress.report();
    if args.digest && result.is_ok() {
        report.digest = Some(content_digest(&*ram).map_err(|e| CliError::cannot_start(&e))?);
    }
    output::print(&report, args.json);
    result.map(drop).map_err(|failure| {
        let exit = match (failure.fate, &failure.cause) {
            (Fate::Unknown, _) => Exit::Unknown,
            (_, Cause::Cancelled) => Exit::Cancelled,
            _ if is_not_started(&failure) => Exit::CannotStart,
            _ => Exit::Failed,
        };
        CliError { exit, text: explain(&failure) }
    })
}
