//! `pageferry send`: moves the content of a RAM file.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use pageferry::backend::{GuestRam, StaticLog};
use pageferry::vmm_shim::guest_memory::GuestMemory;
use pageferry::{Cause, Failure, Fate, Source, Uri, content_digest};

use super::protection::ConnectArgs;
use super::words::{self, explain};
use super::{CliError, Exit, TransferArgs, output, rate, stop};

/// Sends the content of a RAM file to `pageferry recv`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pageferry send tcp:node7:4444 --ram-file /dev/shm/ram.img --streams 4\n  \
pageferry send file:ram.pferry --ram-file /dev/shm/ram.img"
)]
pub(super) struct SendArgs {
    /// Where the destination listens: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT; or where to save it: file:PATH, exec:COMMAND or fd:N
    uri: Uri,
    /// The file; its size must be a multiple of 4096
    #[arg(long, value_name = "FILE")]
    ram_file: PathBuf,
    /// Save no more than what differs from this archive of an older state; file:PATH alone
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    #[command(flatten)]
    transfer: TransferArgs,
    #[command(flatten)]
    protection: ConnectArgs,
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
    matches!(failure.cause, Cause::Socket(_) | Cause::Tls(_))
}

/// How a migration has ended that failed.
pub(super) fn verdict(failure: &Failure) -> CliError {
    let exit = match (failure.fate, &failure.cause) {
        (Fate::Unknown, _) => Exit::Unknown,
        (_, cause) if cause.is_cancelled() => Exit::Cancelled,
        _ if is_not_started(failure) => Exit::CannotStart,
        _ => Exit::Failed,
    };
    CliError { exit, text: explain(failure) }
}

pub(super) fn run(args: &SendArgs) -> Result<(), CliError> {
    let ram = match args.uri {
        Uri::Rdma { .. } => GuestMemory::open_ram_file_to_register(&args.ram_file),
        _ => GuestMemory::open_ram_file(&args.ram_file, false),
    };
    let ram = ram.map_err(|e| CliError::cannot_start(&e))?;
    let ram: Arc<dyn GuestRam> = Arc::new(ram);
    let bandwidth = args.bandwidth.filter(|&rate| rate != 0);
    let source = args.transfer.apply(Source::builder(ram.clone(), Arc::new(StaticLog))).bandwidth(bandwidth);
    let source = source
        .base(args.base.clone())
        .tls(args.protection.tls().map_err(CliError::usage)?)
        .build()
        .map_err(|e| CliError { exit: Exit::Usage, text: explain(&e) })?;
    let migration = source.start(&args.uri).map_err(|e| CliError::cannot_start(&e))?;
    let progress = migration.progress();
    let cancelled = progress.clone();
    stop::on_signals(move || {
        // There is no guest, and so no postcopy, which could not be cancelled.
        let _ = cancelled.cancel();
    });
    let bar = output::Bar::start(&progress, args.json);
    let result = migration.wait();
    bar.finish();
    let mut report = words::report(&progress);
    if args.digest && result.is_ok() {
        report.digest = Some(content_digest(&*ram).map_err(|e| CliError::cannot_start(&e))?);
    }
    output::print(&report, args.json);
    result.map(drop).map_err(|failure| verdict(&failure))
}
