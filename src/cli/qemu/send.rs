//! `pageferry qemu send`: moves the guest of a QEMU away.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use pageferry::backend::{DirtyLog, GuestRam};
use pageferry::layout::Layout;
use pageferry::vmm_shim::qemu::{QemuGuest, QemuScanLog, Role};
use pageferry::{Source, Uri};

use super::super::api::ApiAddress;
use super::super::protection::ConnectArgs;
use super::super::send::verdict;
use super::super::tuning::{OnTimeoutArg, TuningArgs};
use super::super::words::{self, explain};
use super::super::{CliError, TransferArgs, output, stop};
use super::commanded::{self, Attached, NO_POSTCOPY};

/// Moves the guest of a QEMU to `pageferry qemu recv`
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pageferry qemu send tcp:node7:4444 --qmp unix:/run/vm1.qmp --streams 4 --downtime-limit 100"
)]
pub(super) struct SendArgs {
    /// Where the destination listens: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT
    uri: Uri,
    /// QEMU's monitor: unix:PATH, as it was started with `-qmp unix:PATH,server=on,wait=off`
    #[arg(long, value_name = "ADDRESS")]
    qmp: ApiAddress,
    /// Answer `pageferry ctl` here: status, set, cancel, switchover, continue; unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    api: Option<ApiAddress>,
    /// How written pages are found
    #[arg(long, value_enum, default_value_t = TrackerArg::Auto)]
    tracker: TrackerArg,
    /// Compare all memory with what was sent, once the guest stands still: 0.05 s for each GiB and core of downtime
    #[arg(long)]
    final_check: bool,
    #[command(flatten)]
    transfer: TransferArgs,
    #[command(flatten)]
    tuning: TuningArgs,
    #[command(flatten)]
    protection: ConnectArgs,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(super) json: bool,
}

/// How written pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TrackerArg {
    /// What works here and costs least
    Auto,
    /// By the soft-dirty bits of QEMU's page table; the guest stands still for some milliseconds in each round
    SoftDirty,
    /// By comparing all of memory with what was sent: 0.05 s for each GiB and core and round, and in the downtime once
    Scan,
}

/// What finds written pages.
fn log(tracker: TrackerArg, guest: &Arc<QemuGuest>, layout: &Layout) -> Result<Arc<dyn DirtyLog>, CliError> {
    let soft_dirty = || guest.soft_dirty_log(layout).map(|log| Arc::new(log) as Arc<dyn DirtyLog>);
    let scan = || Arc::new(QemuScanLog::new(guest.clone()));
    match tracker {
        TrackerArg::Scan => Ok(scan()),
        TrackerArg::SoftDirty => soft_dirty().map_err(|e| CliError::cannot_start(&e)),
        TrackerArg::Auto => Ok(soft_dirty().unwrap_or_else(|e| {
            tracing::info!("written pages are found by comparing memory: {}", explain(&e));
            scan()
        })),
    }
}

pub(super) fn run(args: &SendArgs) -> Result<(), CliError> {
    if args.uri.is_one_way() {
        let text =
            "a guest of QEMU is moved to another QEMU, not saved: give tcp:, unix: or rdma:".to_owned();
        return Err(CliError::usage(text));
    }
    if args.tuning.on_timeout == Some(OnTimeoutArg::Postcopy) {
        return Err(CliError::usage(NO_POSTCOPY.into()));
    }
    let guest = super::attach(&args.qmp.0, Role::Source)?;
    let ram: Arc<dyn GuestRam> = Arc::new(guest.memory().map_err(|e| CliError::cannot_start(&e))?);
    let log = log(args.tracker, &guest, ram.layout())?;
    let (memory_bytes, tracker) = (ram.layout().bytes(), log.name().to_owned());
    let source = Source::builder(ram, log)
        .guest(guest.clone())
        .machine(guest.machine())
        .paused(!guest.ran())
        .final_check(args.final_check)
        .dense(true);
    let source = args.transfer.apply(source).tuning(args.tuning.tuning());
    let source = source.tls(args.protection.tls().map_err(CliError::usage)?);
    let source = source.build().map_err(|e| CliError::usage(explain(&e)))?;
    // Whatever may fail comes before a migration that would be left in its midst.
    let machine = guest.describe().map_err(|e| CliError::cannot_start(&e))?;
    let notes = guest.own_memory();
    let api = commanded::open(args.api.as_ref())?;
    let migration = source.start(&args.uri).map_err(|e| CliError::cannot_start(&e))?;
    let progress = migration.progress();
    let attached = Attached::new(progress.clone(), machine, memory_bytes).tracked_by(&tracker);
    let _answering = attached.serve(api);
    let cancelled = progress.clone();
    stop::on_signals(move || {
        // Nothing of this is postcopy, which could not be cancelled.
        let _ = cancelled.cancel();
    });
    let bar = output::Bar::start(&progress, args.json);
    let result = migration.wait();
    bar.finish();
    let mut report = words::report(&progress);
    report.notes.extend(notes);
    output::print(&report, args.json);
    result.map(drop).map_err(|failure| verdict(&failure))
}
