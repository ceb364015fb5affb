//! `pageferry lab demo`: the demo, over RDMA, in a guest that has it, or between two of them.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use super::error::LabError;
use super::guest::Output;
use super::run::Folder;
use super::{GuestArgs, first_failure, needs, own_program, script};

/// What each of two hosts runs: the first one has the guest, the second one gets it.
const TWO_HOSTS: &str =
    r#"if [ $PAGEFERRY_LAB_HOST = 0 ]; then side=source; else side=destination; fi; exec "$@" --side $side"#;

/// Runs `pageferry demo` over RDMA in a lab guest, or between two
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pageferry lab demo\n  pageferry lab demo --hosts 2\n  \
pageferry lab demo -- --mem 64M --streams 2 --json\n\n\
Exit codes: those of `pageferry demo`; 124 timed out; 125 the guest stopped or could not be set up; 2 wrong arguments; \
3 could not start, something is missing; 130 cancelled.")]
pub(super) struct DemoArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// Two guests, joined by a network; the demo's virtual machine moves from the first to the second
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    hosts: u8,
    /// Where the destination listens; the guest has the address 10.9.0.1, the second of two 10.9.0.2 [default: rdma, port 4444]
    #[arg(long)]
    uri: Option<String>,
    /// Options of `pageferry demo`
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

pub(super) fn run(args: &DemoArgs) -> Result<ExitCode, LabError> {
    if args.guest.install {
        needs::install(needs::GUEST)?;
    }
    let destination = script::address(usize::from(args.hosts) - 1);
    let uri = args.uri.clone().unwrap_or_else(|| format!("rdma:{destination}:4444"));
    let mut command = vec![own_program()?.into_os_string()];
    command.extend(["demo", "--uri", &uri].map(OsString::from));
    command.extend(args.options.iter().cloned());
    if args.hosts == 1 {
        return Ok(first_failure(&super::run::run(&args.guest.plan(command, 1, Output::Through))?));
    }
    let meet = Folder::new().map_err(LabError::file("make a folder in", &std::env::temp_dir()))?;
    let mut plan = args.guest.plan(two_hosts(command, &meet.path), 2, Output::Prefixed);
    plan.shares.push(meet.path.clone());
    Ok(first_failure(&super::run::run(&plan)?))
}

fn two_hosts(demo: Vec<OsString>, meet: &Path) -> Vec<OsString> {
    let mut command = ["sh", "-c", TWO_HOSTS, "sh"].map(OsString::from).to_vec();
    command.extend(demo);
    command.extend(["--meet".into(), meet.into()]);
    command
}
