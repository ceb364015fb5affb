//! `pageferry recv`: takes memory in, to a file or to anonymous memory.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use pageferry::engine::destination::{Destination, Incoming, IncomingError};
use pageferry::engine::progress::Progress;
use pageferry::engine::report::Status;
use pageferry::engine::{Options, content_digest, explain};
use pageferry::pagecopy::backend::{Guest, GuestRam};
use pageferry::pagecopy::layout::Layout;
use pageferry::transport::uri::Uri;
use pageferry::transport::wire::control::Hello;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};

use super::{CliError, Exit, PinnedArgs, output, stop};

/// Receives what `pageferry send` sends
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pageferry recv tcp:0:4444 --ram-file /dev/shm/copy.img\n  pageferry recv unix:/run/ferry.sock --anon --digest"
)]
pub(super) struct RecvArgs {
    /// Where to listen: tcp:HOST:PORT (port 0: any), unix:PATH or rdma:HOST:PORT
    uri: Uri,
    #[command(flatten)]
    target: Target,
    /// Print an xxh3-128 of the content (reads all of it once more)
    #[arg(long)]
    digest: bool,
    /// Give a silent peer or stream up after this many seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    link_timeout: u64,
    /// Wait this many seconds for a source that was lost on the way and connects again; 0: give up at once
    #[arg(long, default_value_t = 300, value_name = "S", value_parser = clap::value_parser!(u64).range(0..=86400))]
    reconnect_timeout: u64,
    #[command(flatten)]
    pinned: PinnedArgs,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// Into this file, made new; holes stay holes
    #[arg(long, value_name = "FILE")]
    ram_file: Option<PathBuf>,
    /// Into anonymous huge-page memory, as a VM has it; gone when the command ends
    #[arg(long)]
    anon: bool,
}

/// Makes memory of whatever size the source brings.
struct Taker<'a> {
    target: &'a Target,
    ram: Option<Arc<dyn GuestRam>>,
}

impl Incoming for Taker<'_> {
    fn open(&mut self, hello: &Hello, layout: Layout) -> Result<Arc<dyn GuestRam>, String> {
        if hello.live {
            // Before the file is made: a refusal leaves nothing behind.
            return Err(
                "this destination takes memory alone, not a running guest; use `pageferry vm --incoming`"
                    .into(),
            );
        }
        let backing = match &self.target.ram_file {
            Some(path) => Backing::File { path: path.clone(), create: true },
            None => Backing::Anonymous { huge: true },
        };
        let ram: Arc<dyn GuestRam> =
            Arc::new(GuestMemory::create(layout, &backing).map_err(|e| explain(&e))?.enlarging());
        self.ram = Some(ram.clone());
        Ok(ram)
    }

    fn guest(&self) -> Option<Arc<dyn Guest>> {
        None
    }
}

pub(super) fn run(args: &RecvArgs) -> Result<(), CliError> {
    let options = Options {
        timeout: std::time::Duration::from_secs(args.link_timeout),
        reconnect_timeout: std::time::Duration::from_secs(args.reconnect_timeout),
        rdma: args.pinned.options(),
        ..Options::default()
    };
    if let Some(path) = &args.target.ram_file {
        // Before a source comes for nothing.
        GuestMemory::check_ram_file_can_be_made(path).map_err(|e| CliError::cannot_start(&e))?;
    }
    let progress = Progress::default();
    let cancelled = progress.clone();
    stop::on_signals(move || {
        cancelled.cancel();
    });
    let destination = Destination::bind(&args.uri, &options, &progress, |notice| tracing::info!("{notice}"))
        .map_err(|e| CliError::cannot_start(&e))?;
    tracing::info!("listening on {}", destination.uri());
    let bar = output::Bar::start(&progress, args.json);
    let mut taker = Taker { target: &args.target, ram: None };
    let result = destination.receive(&mut taker);
    bar.finish();
    let mut report = progress.report();
    if let (true, Ok(_), Some(ram)) = (args.digest, &result, &taker.ram) {
        report.digest = Some(content_digest(&**ram).map_err(|e| CliError::cannot_start(&e))?);
    }
    let end = result.map(drop).map_err(|error| {
        let exit = match error {
            IncomingError::Cancelled => Exit::Cancelled,
            _ => Exit::Failed,
        };
        CliError { exit, text: explain(&error) }
    });
    if let (Err(error), Status::None) = (&end, report.status) {
        // It ended before a source came.
        report.status = if error.exit == Exit::Cancelled { Status::Cancelled } else { Status::Failed };
        report.error = Some(error.text.clone());
    }
    output::print(&report, args.json);
    end
}
