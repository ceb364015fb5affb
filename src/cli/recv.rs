//! `pageferry recv`: takes memory in, to a file or to anonymous memory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use pageferry::backend::GuestRam;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::{
    Destination, DestinationBuilder, IncomingError, Landing, Offer, Refused, Uri, content_digest,
};

use super::protection::ListenArgs;
use super::sandbox::{Profile, SandboxArgs};
use super::words::{self, explain};
use super::{CliError, Exit, PinnedArgs, file, output, stop};

/// Receives what `pageferry send` sends
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pageferry recv tcp:0:4444 --ram-file /dev/shm/copy.img\n  pageferry recv unix:/run/ferry.sock --anon --digest\n  \
pageferry recv file:ram.pferry --ram-file /dev/shm/copy.img"
)]
pub(super) struct RecvArgs {
    /// Where to listen: tcp:HOST:PORT (port 0: any), unix:PATH or rdma:HOST:PORT; or what to load: file:PATH, exec:COMMAND or fd:N
    uri: Uri,
    /// An older copy of what comes from a peer, an archive or a RAM file: what is the same need not come again. Or the archive that the
    /// one that is loaded stands on, where that is not where it says
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    #[command(flatten)]
    target: Target,
    /// Print an xxh3-128 of the content (reads all of it once more)
    #[arg(long)]
    digest: bool,
    #[command(flatten)]
    waiting: WaitingArgs,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sandbox: SandboxArgs,
}

/// How a command that takes something in waits for it.
#[derive(Debug, Args)]
pub(super) struct WaitingArgs {
    /// Give a silent peer or stream up after this many seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    link_timeout: u64,
    /// Wait this many seconds for a source that was lost on the way and connects again; 0: give up at once
    #[arg(long, default_value_t = 300, value_name = "S", value_parser = clap::value_parser!(u64).range(0..=86400))]
    reconnect_timeout: u64,
    #[command(flatten)]
    pinned: PinnedArgs,
    #[command(flatten)]
    protection: ListenArgs,
}

impl WaitingArgs {
    /// The certificates that may be replaced meanwhile.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.protection.files()
    }

    /// What listens so.
    pub(super) fn builder(&self) -> Result<DestinationBuilder, CliError> {
        Ok(Destination::builder()
            .link_timeout(Duration::from_secs(self.link_timeout))
            .reconnect_timeout(Duration::from_secs(self.reconnect_timeout))
            .rdma(self.pinned.options())
            .notice(|notice| tracing::info!("{notice}"))
            .tls(self.protection.tls().map_err(CliError::usage)?)
            .insecure(self.protection.is_insecure()))
    }
}

/// How a session that came in has ended.
pub(super) fn verdict(error: &IncomingError) -> CliError {
    let exit = if error.is_cancelled() { Exit::Cancelled } else { Exit::Failed };
    CliError { exit, text: explain(error) }
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
fn land(file: Option<&PathBuf>, offer: &Offer) -> Result<Arc<dyn GuestRam>, Refused> {
    if offer.live {
        // Before the file is made: a refusal leaves nothing behind.
        return Err(
            "this destination takes memory alone, not a running guest; use `pageferry vm --incoming`".into(),
        );
    }
    let backing = match file {
        Some(path) => Backing::File { path: path.clone(), create: true },
        None => Backing::Anonymous { huge: true },
    };
    Ok(Arc::new(GuestMemory::create(offer.layout.clone(), &backing)?.enlarging()))
}

pub(super) fn run(args: &RecvArgs) -> Result<(), CliError> {
    if let Some(path) = &args.target.ram_file {
        // Before a source comes for nothing.
        if args.base.as_ref().is_some_and(|base| file::is_same(base, path)) {
            let text = format!(
                "{}: --ram-file is made anew, and cannot be --base, too; give another path",
                path.display()
            );
            return Err(CliError { exit: Exit::CannotStart, text });
        }
        GuestMemory::check_ram_file_can_be_made(path).map_err(|e| CliError::cannot_start(&e))?;
    }
    let (file, base, strict) = (&args.target.ram_file, &args.base, args.sandbox.is_strict());
    args.sandbox.check(&args.uri)?;
    let profile = Profile::recv(&args.uri, file.as_deref(), base.as_deref(), strict);
    args.sandbox.enter(profile.reading_anew(&args.waiting.files()))?;
    let destination = args.waiting.builder()?.base(args.base.clone());
    let destination = destination.bind(&args.uri).map_err(|e| CliError::cannot_start(&e))?;
    let progress = destination.progress();
    let cancelled = progress.clone();
    stop::on_signals(move || {
        // Only a source in postcopy cannot be cancelled.
        let _ = cancelled.cancel();
    });
    let does = if args.uri.is_one_way() { "loading" } else { "listening on" };
    tracing::info!("{does} {}", destination.uri());
    let file = args.target.ram_file.clone();
    let arriving = destination.receive(move |offer| {
        let ram = land(file.as_ref(), offer)?;
        Ok(Landing::memory(ram.clone()).keeping(ram))
    });
    let arriving = arriving.map_err(|e| CliError::cannot_start(&e))?;
    let bar = output::Bar::start(&progress, args.json);
    let result = arriving.wait();
    bar.finish();
    let mut report = words::report(&progress);
    if let (true, Ok(arrival)) = (args.digest, &result) {
        report.digest = Some(content_digest(&*arrival.vm).map_err(|e| CliError::cannot_start(&e))?);
    }
    let end = result.map(drop).map_err(|error| verdict(&error));
    output::print(&report, args.json);
    end
}
