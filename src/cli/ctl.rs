//! `pageferry ctl`: commands a running `pageferry vm`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cli::words::{self, explain};
use clap::{Args, Subcommand};
use pageferry::cli::print;
use pageferry::engine::plan::Plan;
use pageferry::engine::report::{Report, Status};
use pageferry::transport::uri::Uri;

use super::api::{
    self, ApiAddress, ApiError, MigrateRequest, PlanRequest, RecordRequest, Request, TraceState, VmStatus,
};
use super::protection::ConnectArgs;
use super::tuning::TuningArgs;
use super::{CliError, Exit, TransferArgs, output, rate};

/// How often a migration's progress is asked for.
const POLL: Duration = Duration::from_millis(20);

/// How long a source may ask what became of its handover before that is taken for the result.
const ASKING: Duration = Duration::from_secs(5);

/// Commands a running `pageferry vm`
#[derive(Debug, Args)]
#[command(
    subcommand_negates_reqs = true,
    override_usage = "pageferry ctl <API> [OPTIONS] <COMMAND>\n       pageferry ctl schema",
    after_help = "Examples:\n  pageferry ctl unix:/run/a.sock status\n  pageferry ctl unix:/run/a.sock migrate tcp:node7:4444 --streams 4 --json"
)]
pub(super) struct CtlArgs {
    /// The VM's control socket: unix:PATH; all commands but `schema` need it
    #[arg(required = true)]
    api: Option<ApiAddress>,
    #[command(subcommand)]
    command: CtlCommand,
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    pub(super) json: bool,
}

/// Names the VM where commands say how they are used: by itself clap leaves out what `schema` does without.
pub(super) fn with_usages(mut command: clap::Command) -> clap::Command {
    let mut built = command.clone();
    built.build();
    for part in built.get_subcommands_mut() {
        let (name, usage) = (part.get_name().to_owned(), part.render_usage().to_string());
        if let Some(usage) = usage.strip_prefix("Usage: ctl ").filter(|_| name != "schema" && name != "help")
        {
            let usage = format!("pageferry ctl <API> {usage}");
            command = command.mut_subcommand(name, |part| part.override_usage(usage));
        }
    }
    command
}

#[derive(Debug, Subcommand)]
enum CtlCommand {
    /// Shows how the VM and its last migration stand
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock status --json")]
    Status,
    /// Moves the guest to a destination, or saves it, and waits until that is done
    #[command(
        after_help = "Examples:\n  pageferry ctl unix:/run/a.sock migrate tcp:node7:4444 --downtime-limit 100\n  \
pageferry ctl unix:/run/a.sock migrate file:/backup/vm1.pferry --resume\n  \
pageferry ctl unix:/run/a.sock migrate 'exec:zstd -1 | gpg -e -r KEY -o STATE.gpg'"
    )]
    Migrate(Box<MigrateArgs>),
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
    /// Records which pages the guest writes, for `bench --trace`, and waits until that is done
    #[command(
        after_help = "Example:\n  pageferry ctl unix:/run/a.sock record-trace guest.trace --seconds 30 --interval 100"
    )]
    RecordTrace(RecordArgs),
    /// Cancels the migration; the guest runs on where it is
    #[command(after_help = "Example:\n  pageferry ctl unix:/run/a.sock cancel")]
    Cancel,
    /// Watches the guest for some seconds and says what moving it would come to
    #[command(
        after_help = "Example:\n  pageferry ctl unix:/run/a.sock plan --link 10Gbit --downtime-limit 100 --json"
    )]
    Plan(PlanArgs),
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
    Quit {
        /// Even if pages of a running guest are still on their way from here or to here: that guest is lost then
        #[arg(long)]
        force: bool,
    },
    /// Prints the JSON schema of the control socket's lines; takes no VM
    #[command(after_help = "Example:\n  pageferry ctl schema > api.schema.json")]
    Schema,
}

#[derive(Debug, Args)]
struct MigrateArgs {
    /// Where the destination listens: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT; or where to save the guest: file:PATH, or exec:COMMAND
    /// and fd:N, of the VM's process
    uri: Uri,
    #[command(flatten)]
    transfer: TransferArgs,
    #[command(flatten)]
    tuning: TuningArgs,
    #[command(flatten)]
    protection: ConnectArgs,
    /// Let the guest run at the destination after this many rounds, if it is not there by then; its pages follow
    #[arg(long, value_name = "N")]
    postcopy_after_rounds: Option<u64>,
    /// Save no more than what differs from this archive of an older state of the guest; file:PATH alone
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Save the guest as of one instant: it stands still for milliseconds and runs on
    #[arg(long)]
    snapshot: bool,
    /// Let a guest that was saved run on; without, it stays paused
    #[arg(long)]
    resume: bool,
    /// Do not wait for the end; `status` tells
    #[arg(long)]
    detach: bool,
}

#[derive(Debug, Args)]
struct RecordArgs {
    /// The trace's file, made new
    file: PathBuf,
    /// How long to record
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// How often to look which pages were written, in milliseconds
    #[arg(long, default_value_t = 100, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    interval: u64,
}

#[derive(Debug, Args)]
struct PlanArgs {
    /// What the link to the destination carries: 1Gbit, 100MB/s, or bytes a second
    #[arg(long, value_name = "RATE", value_parser = rate::parse)]
    link: u64,
    /// Watch the guest for this long
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
    seconds: u64,
    /// Longest downtime to aim for, in milliseconds
    #[arg(long, default_value_t = 300, value_name = "MS")]
    downtime_limit: u64,
}

impl MigrateArgs {
    fn request(&self) -> Result<MigrateRequest, CliError> {
        Ok(MigrateRequest {
            uri: absolute(&self.uri),
            tls: self.protection.request().map_err(CliError::usage)?,
            resume_after_save: self.resume || self.snapshot,
            snapshot: self.snapshot,
            base: self.base.as_ref().map(|base| std::path::absolute(base).unwrap_or_else(|_| base.clone())),
            streams: self.transfer.streams,
            codec: self.transfer.codec.to_string(),
            postcopy_after_rounds: self.postcopy_after_rounds,
            link_timeout_s: self.transfer.link_timeout,
            reconnect_timeout_s: self.transfer.reconnect_timeout,
            rdma_pin_all: self.transfer.rdma.rdma_pin_all,
            rdma_max_pinned: self.transfer.rdma.limit.rdma_max_pinned,
            tuning: self.tuning.clone(),
        })
    }
}

/// An address as the VM's process, which has a folder of its own, is to read it.
fn absolute(uri: &Uri) -> String {
    match uri {
        Uri::File(path) => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            Uri::File(path).to_string()
        }
        uri => uri.to_string(),
    }
}

pub(super) fn run(args: &CtlArgs) -> Result<(), CliError> {
    if let CtlCommand::Schema = args.command {
        print::text(api::schema::text());
        return Ok(());
    }
    let Some(ApiAddress(path)) = &args.api else {
        let text = "which VM? `pageferry ctl unix:PATH COMMAND`, with the PATH of its --api".into();
        return Err(CliError { exit: Exit::Usage, text });
    };
    let request = match &args.command {
        CtlCommand::Status => return show_status(path, args.json),
        CtlCommand::Plan(plan) => return show_plan(path, plan, args.json),
        CtlCommand::Migrate(migrate) => {
            api::ask(path, &Request::Migrate(Box::new(migrate.request()?))).map_err(|e| refused(&e))?;
            if migrate.detach {
                return done(args.json);
            }
            let end = follow(path, args.json)?;
            output::print(&end.report, args.json);
            return end.verdict();
        }
        CtlCommand::RecordTrace(record) => return record_trace(path, record, args.json),
        CtlCommand::Pause => Request::Pause,
        CtlCommand::Resume { force } => Request::Resume { force: *force },
        CtlCommand::Cancel => Request::Cancel,
        CtlCommand::Set(tuning) => Request::Set(tuning.clone()),
        CtlCommand::Switchover => Request::Switchover,
        CtlCommand::Continue => Request::Continue,
        CtlCommand::Postcopy => Request::Postcopy,
        CtlCommand::Recover { uri } => Request::Recover { uri: uri.to_string() },
        CtlCommand::Quit { force } => Request::Quit { force: *force },
        CtlCommand::Schema => unreachable!("it was printed"),
    };
    api::ask(path, &request).map_err(|e| refused(&e))?;
    done(args.json)
}

fn done(json: bool) -> Result<(), CliError> {
    if json {
        print::line(format_args!("{{\"status\":\"ok\"}}"));
    }
    Ok(())
}

/// Has a trace recorded, and waits for it.
fn record_trace(path: &Path, args: &RecordArgs, json: bool) -> Result<(), CliError> {
    let file = std::path::absolute(&args.file).map_err(|e| CliError::cannot_start(&e))?;
    let request = RecordRequest { file, seconds: args.seconds, interval_ms: args.interval };
    api::ask(path, &Request::RecordTrace(request)).map_err(|e| refused(&e))?;
    let trace = loop {
        std::thread::sleep(POLL);
        match api::status(path).map_err(|e| refused(&e))?.trace {
            Some(trace) if trace.state == TraceState::Recording => {}
            Some(trace) => break trace,
            None => return Err(CliError { exit: Exit::Failed, text: "the VM knows of no recording".into() }),
        }
    };
    if let Some(error) = trace.error {
        return Err(CliError { exit: Exit::Failed, text: error });
    }
    if json {
        print::line(serde_json::to_string(&trace).unwrap_or_default());
    } else {
        print::line(format_args!(
            "{}: {} intervals, {} written pages",
            trace.file.display(),
            trace.intervals,
            trace.pages
        ));
    }
    Ok(())
}

pub(super) fn refused(error: &ApiError) -> CliError {
    let exit = if matches!(error, ApiError::Connect { .. } | ApiError::Closed { .. }) {
        Exit::CannotStart
    } else {
        Exit::Failed
    };
    CliError { exit, text: explain(error) }
}

fn show_plan(path: &Path, args: &PlanArgs, json: bool) -> Result<(), CliError> {
    let PlanArgs { link, seconds, downtime_limit } = *args;
    let request = PlanRequest { link, seconds, downtime_limit_ms: downtime_limit };
    let plan = api::ask(path, &Request::Plan(request)).map_err(|e| refused(&e))?;
    if json {
        print::line(format_args!("{plan}"));
        return Ok(());
    }
    let plan: Plan = serde_json::from_value(plan).map_err(|e| refused(&e.into()))?;
    print::text(words::plan(&plan));
    Ok(())
}

fn show_status(path: &Path, json: bool) -> Result<(), CliError> {
    let status = api::status(path).map_err(|e| refused(&e))?;
    if json {
        print::line(serde_json::to_string(&status).unwrap_or_default());
        return Ok(());
    }
    let VmStatus { guest, cpus, memory_bytes, accelerator, tracker, .. } = &status;
    let state = serde_json::to_value(status.state).unwrap_or_default();
    print::line(format_args!("{:<18}{}", "VM status:", state.as_str().unwrap_or("?")));
    if let Some(reason) = &status.reason {
        print::line(format_args!("{:<18}{reason}", "reason:"));
    }
    print::line(format_args!(
        "{:<18}{guest}, {cpus} vCPUs, {} MiB ({accelerator}, {tracker})",
        "guest:",
        memory_bytes >> 20
    ));
    if let Some(sandbox) = &status.sandbox {
        let mode = serde_json::to_value(sandbox.mode).unwrap_or_default();
        let lacks: String = sandbox.lacks.iter().map(|lack| format!("; {lack}")).collect();
        print::line(format_args!("{:<18}{}{lacks}", "sandbox:", mode.as_str().unwrap_or("?")));
    }
    if let Some(listening) = &status.listening {
        print::line(format_args!("{:<18}{listening}", "listening:"));
    }
    if let Some(migration) = status.migration.filter(|m| m.status != Status::None) {
        print::text(migration.summary());
    }
    Ok(())
}

/// How a migration ended.
pub(super) struct End {
    pub(super) report: Report,
    /// Nothing was begun.
    pub(super) not_started: bool,
}

impl End {
    /// It as an exit code.
    pub(super) fn verdict(&self) -> Result<(), CliError> {
        let exit = match self.report.status {
            Status::Completed => return Ok(()),
            Status::Cancelled => Exit::Cancelled,
            Status::Unknown => Exit::Unknown,
            Status::Failed if self.not_started => Exit::CannotStart,
            _ => Exit::Failed,
        };
        Err(CliError {
            exit,
            text: self.report.error.clone().unwrap_or_else(|| "the migration failed".into()),
        })
    }
}

/// Watches a migration until it ends; shows a bar on a terminal.
pub(super) fn follow(path: &Path, quiet: bool) -> Result<End, CliError> {
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
                    return Ok(End { report, not_started: status.not_started });
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
