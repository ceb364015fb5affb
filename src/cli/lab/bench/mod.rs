//! `pageferry lab bench`: soft-RoCE's limit, pageferry and QEMU side by side, all in one boot of one guest.

mod image;
mod inside;
mod perftest;
mod table;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use pageferry::cli::print;

use self::image::Kind;
use self::table::Table;
use super::super::size;
use super::error::LabError;
use super::guest::{BOOT_PATIENCE_S, Output};
use super::run::{self, Plan};
use super::{memory, needs};
use crate::cli::say;

pub(super) use self::inside::run as run_inside;

/// Measures RDMA and TCP in a lab guest: the device's limit, pageferry, QEMU
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pageferry lab bench --runs 5 --mem 128M --json > bench.json\n\n\
Rows that fail are shown with the reason and do not fail the command. All runs of a row come from one boot; contenders take turns.\n\n\
Exit codes: 0 measured; 1 the measurement failed; 2 wrong arguments; 3 could not start, something is missing; \
124 timed out; 125 the guest stopped; 130 cancelled.")]
pub(super) struct BenchArgs {
    #[command(flatten)]
    what: WhatArgs,
    /// CPUs of the guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
    /// Memory of the guest
    #[arg(long, default_value = "3072M", value_parser = memory)]
    guest_mem: u64,
    /// Kill a guest that has not ended after this many seconds
    #[arg(long, default_value_t = 3600, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Boot the kernel of this Debian package instead of the current one's
    #[arg(long, value_name = "PACKAGE")]
    kernel: Option<String>,
    /// As root: install the Debian packages that are missing
    #[arg(long)]
    install: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(in super::super) json: bool,
}

/// What is measured.
#[derive(Clone, Debug, Args)]
struct WhatArgs {
    /// Size of the images that are moved, a multiple of 1M
    #[arg(long, default_value = "128M", value_parser = image_size)]
    mem: u64,
    /// Runs of each row
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Images
    #[arg(long, value_delimiter = ',', default_value = "random,sparse,zero", value_name = "KIND")]
    images: Vec<Kind>,
    /// Let memory files use huge pages (tmpfs with huge=advise) instead of 4 KiB pages
    #[arg(long)]
    huge_pages: bool,
    /// Only rows whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

fn image_size(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes == 0 || bytes % (1 << 20) != 0 => Err("an image has a multiple of 1M".into()),
        bytes => Ok(bytes),
    }
}

/// What the guest runs.
#[derive(Debug, Args)]
pub(super) struct InsideArgs {
    #[command(flatten)]
    what: WhatArgs,
}

pub(super) fn run(args: &BenchArgs) -> Result<ExitCode, LabError> {
    let all = [needs::GUEST, needs::BENCH].concat();
    if args.install {
        needs::install(&all)?;
    }
    needs::check(&all)?;
    if cfg!(debug_assertions) {
        say("this is a debug build: its own rows are slower than those of a release build");
    }
    let captured = Arc::new(Mutex::new(Vec::new()));
    let plan = Plan {
        command: command(args)?,
        hosts: 1,
        cpus: args.cpus,
        // It runs no virtual machine, and both sides are to have a CPU.
        parallel: true,
        memory: args.guest_mem,
        ram_file: None,
        timeout: Duration::from_secs(args.timeout),
        boot_patience: Duration::from_secs(BOOT_PATIENCE_S),
        shares: vec![],
        console: None,
        rdma: true,
        kernel: args.kernel.clone(),
        output: Output::Captured(captured.clone()),
    };
    let codes = run::run(&plan)?;
    if codes != [0] {
        return Err(LabError::Inside(format!(
            "the bench ended with exit code {} in the guest; its own words are above",
            codes[0]
        )));
    }
    let json = captured.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let table: Table = serde_json::from_slice(&json).map_err(|e| {
        LabError::Inside(format!("what the bench printed in the guest is not understood: {e}"))
    })?;
    if args.json {
        print::line(serde_json::to_string(&table).unwrap_or_default());
    } else {
        print::text(table::text(&table));
    }
    Ok(ExitCode::SUCCESS)
}

/// This program again, in the guest, which sees it at the same place.
fn command(args: &BenchArgs) -> Result<Vec<OsString>, LabError> {
    let mut command = vec![super::own_program()?.into_os_string()];
    let what = &args.what;
    let images: Vec<String> = what.images.iter().map(Kind::to_string).collect();
    let words = ["lab", "bench-inside", "--mem"].map(str::to_owned).into_iter();
    let words = words.chain([what.mem.to_string(), "--runs".into(), what.runs.to_string()]);
    let words = words.chain(["--images".into(), images.join(",")]);
    let only = what.only.iter().flat_map(|only| ["--only".to_owned(), only.clone()]);
    let huge = what.huge_pages.then(|| "--huge-pages".to_owned());
    command.extend(words.chain(only).chain(huge).map(OsString::from));
    Ok(command)
}

/// Files of the bench, in the guest's memory.
fn folder() -> PathBuf {
    "/dev/shm/pageferry-bench".into()
}
