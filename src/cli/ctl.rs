//! `pageferry ctl`: commands a running `pageferry vm`.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use pageferry::engine::explain;
use pageferry::engine::report::{Report, Status};
use pageferry::transport::uri::Uri;

use super::api::{self, ApiAddress, ApiError, MigrateRequest, Request, VmStatus};
use super::tuning::TuningArgs;
use super::{CliError, Exit, TransferArgs, output};

/// How often a migration's progress is asked for.
const POLL: Duration = Duration::from_millis(20);

/// How long a source may ask what became of its handover before that is taken for the result.
const ASKING: Duration = Duration::from_secs(5);

/// Commands a running `pageferry vm`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pageferry ctl unix:/run/a.sock status\n  pageferry ctl unix:/run/a.sock migrate tcp:node7:4444 --streams 4 --json"
)]
pub(super) struct CtlArgs {
    /// The VM's control socket: unix:PATH
    api: ApiAddress,
    #[command(subcommand)]
    command: CtlCommand,
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum CtlCommand {
    /// Shows how the VM and its last migration stand
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock status --json")]
    Status,
    /// Moves the guest to a destination and waits until it is there
    #[command(
        after_help = "Example:\n  pageferry ctl unix:/run/a.sock migrate tcp:node7:4444 --downtime-limit 100"
    )]
    Migrate(MigrateArgs),
    /// Stops the vCPUs
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock pause")]
    Pause,
    /// Lets the vCPUs run
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock resume")]
    Resume {
        /// Even if the guest was handed over: only when you know that it does not run at the destination
        #[arg(long)]
        force: bool,
    },
    /// Cancels the migration; the guest runs on where it is
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock cancel")]
    Cancel,
    /// Changes limits of the migration that runs
    #[command(
        after_help = "Example:\n  pageferry ctl unix:/run/a.sock set --bandwidth 2Gbit --downtime-limit 500",
        arg_required_else_help = true
    )]
    Set(TuningArgs),
    /// Switches over as soon as the first pass is done, whatever the downtime
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock switchover")]
    Switchover,
    /// Lets a migration go on that waits before its switchover
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock continue")]
    Continue,
    /// Lets the guest of a migration run at the destination now; its pages follow
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock postcopy")]
    Postcopy,
    /// Opens lost connections of a migration in postcopy again, at another address of the destination
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock recover tcp:node7-b:4444")]
    Recover {
        /// Where the destination is reached: tcp:HOST:PORT or unix:PATH
        uri: Uri,
    },
    /// Ends the VM's process
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock quit")]
    Quit,
}

#[derive(Debug, Args)]
struct MigrateArgs {
    /// Where the destination listens: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT
    uri: Uri,
    #[command(flatten)]
    transfer: TransferArgs,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Let the guest run at the destination after this many rounds, if it is not there by then; its pages follow
    #[arg(long, value_name = "N")]
    postcopy_after_rounds: Option<u64>,
    /// Do not wait for the end; `status` tells
    #[arg(long)]
    detach: bool,
}

impl MigrateArgs {
    fn request(&self) -> MigrateRequest {
        MigrateRequest {
            uri: self.uri.to_string(),
            streams: self.transfer.streams,
            codec: self.transfer.codec.to_string(),
            postcopy_after_rounds: self.postcopy_after_rounds,
            link_timeout_s: self.transfer.link_timeout,
            rdma_pin_all: self.transfer.rdma.rdma_pin_all,
            rdma_max_pinned: self.transfer.rdma.limit.rdma_max_pinned,
            tuning: self.tuning.clone(),
        }
    }
}

pub(super) fn run(args: &CtlArgs) -> Result<(), CliError> {
    let path = args.api.0.as_path();
    let request = match &args.command {
        CtlCommand::Status => return show_status(path, args.json),
        CtlCommand::Migrate(migrate) => {
            api::ask(path, &Request::Migrate(migrate.request())).map_err(|e| refused(&e))?;
            if migrate.detach {
                return done(args.json);
            }
            let report = follow(path, args.json)?;
            output::print(&report, args.json);
            return verdict(&report);
        }
        CtlCommand::Pause => Request::Pause,
        CtlCommand::Resume { force } => Request::Resume { force: *force },
        CtlCommand::Cancel => Request::Cancel,
        CtlCommand::Set(tuning) => Request::Set(tuning.clone()),
        CtlCommand::Switchover => Request::Switchover,
        CtlCommand::Continue => Request::Continue,
        CtlCommand::Postcopy => Request::Postcopy,
        CtlCommand::Recover { uri } => Request::Recover { uri: uri.to_string() },
        CtlCommand::Quit => Request::Quit,
    };
    api::ask(path, &request).map_err(|e| refused(&e))?;
    done(args.json)
}

fn done(json: bool) -> Result<(), CliError> {
    if json {
        println!("{{\"status\":\"ok\"}}");
    }
    Ok(())
}

pub(super) fn refused(error: &ApiError) -> CliError {
    let exit = if matches!(error, ApiError::Connect { .. }) { Exit::CannotStart } else { Exit::Failed };
    CliError { exit, text: explain(error) }
}

fn show_status(path: &Path, json: bool) -> Result<(), CliError> {
    let status = api::status(path).map_err(|e| refused(&e))?;
    if json {
        println!("{}", serde_json::to_string(&status).unwrap_or_default());
        return Ok(());
    }
    let VmStatus { guest, cpus, memory_bytes, accelerator, tracker, .. } = &status;
    let state = serde_json::to_value(status.state).unwrap_or_default();
    println!("{:<18}{}", "VM status:", state.as_str().unwrap_or("?"));
    if let Some(reason) = &status.reason {
        println!("{:<18}{reason}", "reason:");
    }
    println!("{:<18}{guest}, {cpus} vCPUs, {} MiB ({accelerator}, {tracker})", "guest:", memory_bytes >> 20);
    if let Some(listening) = &status.listening {
        println!("{:<18}{listening}", "listening:");
    }
    if let Some(migration) = status.migration.filter(|m| m.status != Status::None) {
        print!("{}", migration.summary());
    }
    Ok(())
}

/// Watches a migration until it ends; shows a bar on a terminal.
pub(super) fn follow(path: &Path, quiet: bool) -> Result<Report, CliError> {
    let mut bar = output::LateBar::new(quiet);
    let (mut silent, mut asking): (Option<Instant>, Option<Instant>) = (None, None);
    loop {
        match api::status(path) {
            Ok(status) => {
                silent = None;
                let report = status.migration.unwrap_or_default();
                let ended = match report.status {
                    Status::Completed | Status::Failed | Status::Cancelled | Status::PostcopyLost => true,
                    Status::Unknown => asking.get_or_insert_with(Instant::now).elapsed() > ASKING,
                    _ => false,
                };
                if ended {
                    bar.finish();
                    return Ok(report);
                }
                bar.show(&report);
            }
            // A busy host may miss a beat; a VM that is gone stays silent.
            Err(error) => {
                if silent.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(2) {
                    return Err(refused(&error));
                }
            }
        }
        std::thread::sleep(POLL);
    }
}

/// A finished migration as an exit code.
pub(super) fn verdict(report: &Report) -> Result<(), CliError> {
    let exit = match report.status {
        Status::Completed => return Ok(()),
        Status::Cancelled => Exit::Cancelled,
        Status::Unknown => Exit::Unknown,
        _ => Exit::Failed,
    };
    Err(CliError { exit, text: report.error.clone().unwrap_or_else(|| "the migration failed".into()) })
}
