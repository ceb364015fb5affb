//! `pageferry qemu recv`: takes a guest in for a QEMU that waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use pageferry::backend::{Guest, GuestRam};
use pageferry::pagecopy::layout::Layout;
use pageferry::vmm_shim::foreign;
use pageferry::vmm_shim::qemu::{QemuGuest, Role};
use pageferry::{Landing, Offer, Refused, Uri};

use super::super::api::ApiAddress;
use super::super::recv::{WaitingArgs, verdict};
use super::super::sandbox::{Profile, SandboxArgs};
use super::super::words;
use super::super::{CliError, output, stop};
use super::commanded::{self, Attached};

/// Takes the guest of `pageferry qemu send` in, for a QEMU that was started with `-incoming defer`
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pageferry qemu recv tcp:0:4444 --qmp unix:/run/vm1.qmp --tls-dir /etc/pki/pageferry"
)]
pub(super) struct RecvArgs {
    /// Where to listen: tcp:HOST:PORT (port 0: any), unix:PATH or rdma:HOST:PORT
    uri: Uri,
    /// QEMU's monitor: unix:PATH, as it was started with `-qmp unix:PATH,server=on,wait=off`
    #[arg(long, value_name = "ADDRESS")]
    qmp: ApiAddress,
    /// Answer `pageferry ctl` here: status, cancel; unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    api: Option<ApiAddress>,
    /// Whether dense memory becomes pages of 2 MiB, which come in and run faster; a later migration away from here then finds written
    /// memory by 2 MiB at a time, and hashes all of it
    #[arg(long, value_enum, default_value_t = LargePagesArg::Auto)]
    large_pages: LargePagesArg,
    /// Wait this many seconds for a source that was lost after the guest had come whole, before it was handed over
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    handover_timeout: u64,
    #[command(flatten)]
    waiting: WaitingArgs,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    sandbox: SandboxArgs,
}

/// Whether dense memory becomes large pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LargePagesArg {
    /// Where written pages cannot be found one by one here, so that nothing is lost by it
    Auto,
    /// Yes, where memory is in a tmpfs and the kernel can (Linux 6.1)
    On,
    /// As QEMU and the file system have it
    Off,
}

impl LargePagesArg {
    fn wanted(self) -> bool {
        self == Self::On || self == Self::Auto && foreign::check().is_err()
    }
}

pub(super) fn run(args: &RecvArgs) -> Result<(), CliError> {
    if args.uri.is_one_way() {
        let text = "a guest of QEMU comes from another QEMU: give tcp:, unix: or rdma:".to_owned();
        return Err(CliError::usage(text));
    }
    let guest = super::attach(&args.qmp.0, Role::Destination)?;
    let ram = guest.memory().map_err(|e| CliError::cannot_start(&e))?;
    let memory = Arc::new(if args.large_pages.wanted() { ram.enlarging() } else { ram });
    let ram: Arc<dyn GuestRam> = memory.clone();
    let profile = Profile::qemu(&args.uri, &args.qmp.0, args.api.as_ref().map(|api| api.0.as_path()));
    args.sandbox.enter(profile.reading_anew(&args.waiting.files()))?;
    let builder = args.waiting.builder()?.handover_timeout(Duration::from_secs(args.handover_timeout));
    let destination = builder.bind(&args.uri).map_err(|e| CliError::cannot_start(&e))?;
    let progress = destination.progress();
    let notes = guest.own_memory();
    let machine = guest.describe().map_err(|e| CliError::cannot_start(&e))?;
    let attached = Attached::new(progress.clone(), machine, ram.layout().bytes());
    let attached = attached.listening_on(destination.uri().to_string());
    let _answering = attached.serve(commanded::open(args.api.as_ref())?);
    let cancelled = progress.clone();
    stop::on_signals(move || {
        // Nothing of this is postcopy, which could not be cancelled.
        let _ = cancelled.cancel();
    });
    tracing::info!("listening on {}", destination.uri());
    let (own, taken) = (guest.clone(), Arc::new(AtomicBool::new(false)));
    let came = taken.clone();
    let arriving = destination.receive(move |offer| {
        let landing = land(offer, &ram, &own)?;
        came.store(true, Ordering::Release);
        Ok(landing)
    });
    let arriving = arriving.map_err(|e| CliError::cannot_start(&e))?;
    let bar = output::Bar::start(&progress, args.json);
    let result = arriving.wait();
    bar.finish();
    let end = result.map(drop).map_err(|error| verdict(&error));
    // What nobody sent through here is not this command's: QEMU may be filling it by itself.
    if end.is_err()
        && taken.load(Ordering::Acquire)
        && guest.still_waits()
        && let Err(e) = memory.clear()
    {
        tracing::warn!("start QEMU anew for another attempt: {}", words::explain(&e));
    }
    let mut report = words::report(&progress);
    report.notes.extend(notes);
    output::print(&report, args.json);
    end
}

/// Lets a guest come that this QEMU is for.
fn land(offer: &Offer, ram: &Arc<dyn GuestRam>, guest: &Arc<QemuGuest>) -> Result<Landing, Refused> {
    if !offer.live {
        return Err("memory alone came, and no guest: use `pageferry recv`".into());
    }
    if offer.layout != *ram.layout() {
        let (theirs, own) = (blocks(&offer.layout), blocks(ram.layout()));
        let what = format!(
            "the guest's memory is {theirs}, this QEMU's {own}: start it with the source's memory backends"
        );
        return Err(what.into());
    }
    if offer.machine != guest.machine() {
        let (theirs, own) = (&offer.machine, guest.machine());
        let what = format!(
            "the guest's machine is \"{theirs}\", this QEMU's \"{own}\": start it with the source's -machine"
        );
        return Err(what.into());
    }
    let own: Arc<dyn Guest> = guest.clone();
    Ok(Landing::guest(ram.clone(), own))
}

/// Memory blocks in words.
fn blocks(layout: &Layout) -> String {
    let block = |region: &pageferry::layout::Region| format!("{} of {} MiB", region.name, region.len >> 20);
    layout.regions().iter().map(block).collect::<Vec<_>>().join(" and ")
}
