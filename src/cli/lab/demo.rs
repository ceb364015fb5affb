//! `pageferry lab demo`: the demo, over RDMA, in a guest that has it.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;

use super::error::LabError;
use super::guest::Output;
use super::{GuestArgs, first_failure, needs, own_program, script};

/// Runs `pageferry demo` over RDMA in a lab guest
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pageferry lab demo\n  pageferry lab demo -- --mem 64M --streams 2 --json\n\n\
Exit codes: those of `pageferry demo`; 124 timed out; 125 the guest stopped or could not be set up; 2 wrong arguments; \
3 could not start, something is missing; 130 cancelled."
)]
pub(super) struct DemoArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// Where the destination listens in the guest, whose address is 10.9.0.1
    #[arg(long, default_value_t = format!("rdma:{}:4444", script::address(0)))]
    uri: String,
    /// Options of `pageferry demo`
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

pub(super) fn run(args: &DemoArgs) -> Result<ExitCode, LabError> {
    if args.guest.install {
        needs::install(needs::GUEST)?;
    }
    let mut command = vec![own_program()?.into_os_string()];
    command.extend(["demo", "--uri", &args.uri].map(OsString::from));
    command.extend(args.options.iter().cloned());
    Ok(first_failure(&super::run::run(&args.guest.plan(command, 1, Output::Through))?))
}
