//! `pageferry bench`: measures the transport, without a virtual machine.
//!
//! Source and destination are processes of their own, a new pair for each run, so that each side's CPU time and memory are
//! its own and the destination's memory is fresh, as a migration finds it.

mod dirtier;
mod hosts;
mod limit;
mod listening;
mod live;
mod live_args;
mod mix;
mod page;
mod pair;
mod pattern;
mod plan;
mod plots;
mod result;
mod series;
mod side;

use std::path::{Path, PathBuf};

use crate::cli::words::explain;
use clap::{Args, ValueEnum};
use pageferry::cli::print;
use pageferry::pagecopy::choose::CodecMode;
use pageferry::pagecopy::layout::PAGE_SIZE;
use pageferry::transport::uri::Uri;

use self::limit::Limits;
use self::live_args::LiveArgs;
use self::mix::Mix;
use self::pair::Running;
use self::plan::{Image, Plan};
use self::result::{OfLimit, Results};
use super::folder::Folder;
use super::sandbox::{Profile, SandboxArgs};
use super::tuning::TuningArgs;
use super::{CliError, Exit, backing, size, stop};
use crate::cli::say;

/// Smallest RAM.
const RAM_MIN: u64 = 1 << 20;

/// Measures how fast and at what cost memory moves: no virtual machine needed
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct BenchArgs {
    /// Another host to measure with, where `bench --listen` runs: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT
    #[arg(conflicts_with_all = ["transport", "memory", "limit"])]
    uri: Option<Uri>,
    /// Serve the runs of another host's bench, into this host's memory
    #[arg(long, value_name = "URI", conflicts_with_all = ["uri", "ram", "mix", "image", "streams", "codecs", "runs", "limit", "report", "json"])]
    listen: Option<Uri>,
    /// With --listen: the port of the runs' destinations, instead of any that is free
    #[arg(long, default_value_t = 0, value_name = "PORT", requires = "listen")]
    data_port: u16,
    /// With --listen: where others can reach it, too; whoever does can have memory filled here
    #[arg(long, requires = "listen")]
    insecure: bool,
    /// Move memory under TLS 1.3, with the certificates and keys in this folder; `pageferry keys init` makes them
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// Guest RAM
    #[arg(long, default_value = "1G", value_parser = ram_size)]
    ram: u64,
    /// What it holds: random, sparse, zero, mixed, or percentages of hole, zero, dup, heap, text and random
    #[arg(long, default_value = "mixed", value_name = "hole=30,text=70")]
    mix: Mix,
    /// RAM is this file's content instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ram", "mix"])]
    image: Option<PathBuf>,
    /// Data streams: one or several numbers to try
    #[arg(long, default_value = "4", value_delimiter = ',', value_name = "N,N", value_parser = clap::value_parser!(u16).range(1..=256))]
    streams: Vec<u16>,
    /// Codecs to try: auto, raw, zstd[:LEVEL], delta
    #[arg(long, default_value = "auto", value_delimiter = ',', value_name = "CODEC,CODEC")]
    codecs: Vec<CodecMode>,
    /// Runs of each configuration; figures are their medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Leave out the run of each configuration that comes first and does not count
    #[arg(long)]
    no_warm_up: bool,
    /// What carries the streams
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    transport: Transport,
    /// What the destination's memory is made of: anon (2 MiB pages where the host has them), anon4k, memfd, hugetlb, file:PATH
    #[arg(long, default_value = "anon", value_parser = memory)]
    memory: String,
    #[command(flatten)]
    live: LiveArgs,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Compare what both sides hold in the end (reads all of it once more)
    #[arg(long)]
    digest: bool,
    /// Measure the machine, too: copies, sockets, zero scans and page faults, and show what share of that is reached
    #[arg(long)]
    limit: bool,
    /// Write the result as a page with plots to this file: one that needs nothing else
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Give a silent peer or stream up after this many seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    link_timeout: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(super) json: bool,
    /// One side of a run; what it is to do, as JSON
    #[arg(long, hide = true, value_name = "JSON")]
    side: Option<String>,
    /// With --listen alone: nobody else connects to a bench.
    #[command(flatten)]
    sandbox: SandboxArgs,
}

const HELP: &str = "Examples:\n  pageferry bench --ram 4G --mix random --streams 1,2,4 --runs 5\n  \
pageferry bench --ram 1G --mix hole=40,text=60 --codecs raw,auto,zstd:1 --json\n  \
pageferry bench --image /dev/shm/ram.img --memory memfd\n  \
pageferry bench --ram 2G --dirty-rate 400 --pattern hot:5 --digest\n  \
pageferry bench --ram 4G --mix random --limit --report bench.html\n  \
node7$ pageferry bench --listen tcp:0:4444 --insecure\n  node1$ pageferry bench tcp:node7:4444 --ram 4G --streams 1,2,4,8\n\n\
Source and destination are two processes on this host, new ones for each run. Configurations take turns; the first run of \
each only warms the machine up. There is no chunk size to sweep: a chunk is 64 pages by protocol, one word of KVM's dirty bitmap.\n\n\
Exit codes: 0 measured; 1 a configuration has no run that succeeded; 2 wrong arguments; 3 could not start; 130 cancelled.";

/// What carries the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Transport {
    /// TCP over loopback
    Tcp,
    /// Unix sockets
    Unix,
}

fn ram_size(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes < RAM_MIN || !bytes.is_multiple_of(PAGE_SIZE as u64) => {
            Err("RAM is a multiple of 4096 bytes and at least 1M".into())
        }
        bytes => Ok(bytes),
    }
}

fn memory(text: &str) -> Result<String, String> {
    backing::parse(text).map(|_| text.to_owned())
}

pub(super) fn run(args: &BenchArgs) -> Result<(), CliError> {
    if let Some(order) = &args.side {
        side::run(order);
        return Ok(());
    }
    if cfg!(debug_assertions) {
        say("this is a debug build, which is slower than a release build");
    }
    let waits = args.tuning.pause_before_switchover == Some(true);
    let waits = waits
        .then(|| "nobody could `continue` a bench's migration: leave out --pause-before-switchover".into());
    if let Err(text) = args.live.check().and_then(|()| waits.map_or(Ok(()), Err)) {
        return Err(CliError { exit: Exit::Usage, text });
    }
    let cannot = |text| CliError { exit: Exit::CannotStart, text };
    if let Some(uri) = &args.listen {
        let memory = backing::parse(&args.memory).map_err(cannot)?;
        args.sandbox.enter(Profile::bench(uri, &memory, args.data_port))?;
    }
    let running = Running::default();
    let cancelled = running.clone();
    stop::on_signals(move || cancelled.cancel());
    if let Some(path) = &args.report {
        // Before minutes are spent for a page that cannot be written.
        let file = std::fs::File::options().append(true).create(true).open(path);
        file.map_err(|e| cannot(format!("--report: cannot write to {}: {e}", path.display())))?;
    }
    if let Some(uri) = &args.listen {
        return hosts::listen(uri, args, &running);
    }
    let dirtying = args.live.dirtying().map_err(cannot)?;
    let image = Image::new(args, dirtying.is_some()).map_err(cannot)?;
    let folder = Folder::new("bench").map_err(|e| CliError::cannot_start(&e))?;
    let limits = limits(args, &folder)?;
    let plan = Plan {
        args,
        image: &image,
        dirtying: dirtying.as_ref(),
        destination: args.uri(&folder),
        running: &running,
    };
    let mut rows = plan.measure()?;
    for row in &mut rows {
        row.of_limit =
            limits.zip(row.median.as_ref()).map(|(limits, run)| OfLimit::of(&limits, run, &args.memory));
    }
    let results = Results {
        ram_bytes: image.bytes,
        content: args.image.as_ref().map_or_else(|| args.mix.to_string(), |path| path.display().to_string()),
        transport: args.transport_name(),
        memory: rows.iter().find_map(|row| row.memory.clone()).unwrap_or_else(|| args.memory.clone()),
        dirtying,
        limits,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        rows,
    };
    if args.json {
        print::line(serde_json::to_string(&results).unwrap_or_default());
    } else {
        print::text(result::text(&results));
    }
    if let Some(path) = &args.report {
        write_page(path, &results)?;
    }
    match results.rows.iter().find(|row| row.runs.is_empty()) {
        Some(row) => {
            let reason = row.failed.as_deref().unwrap_or("it did not run");
            let text = format!("{} streams, codec {}: {reason}", row.streams, row.codec);
            Err(CliError { exit: Exit::Failed, text })
        }
        None => Ok(()),
    }
}

impl BenchArgs {
    /// What carries the streams: the other host's address, or the kind of socket.
    fn transport_name(&self) -> String {
        match &self.uri {
            Some(uri) => uri.to_string(),
            None => self.transport.to_possible_value().map_or_else(String::new, |v| v.get_name().into()),
        }
    }

    /// Where a destination on this host listens.
    fn uri(&self, folder: &Folder) -> String {
        match self.transport {
            Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Transport::Unix => format!("unix:{}", folder.path.join("socket").display()),
        }
    }
}

fn write_page(path: &Path, results: &Results) -> Result<(), CliError> {
    let failed = |why: String| {
        let text = format!("--report: cannot write to {}: {why}", path.display());
        CliError { exit: Exit::CannotStart, text }
    };
    let html = page::html(results).map_err(|e| failed(e.to_string()))?;
    std::fs::write(path, html).map_err(|e| failed(e.to_string()))
}

/// What the machine can do, where that is asked for.
fn limits(args: &BenchArgs, folder: &Folder) -> Result<Option<Limits>, CliError> {
    if !args.limit {
        return Ok(None);
    }
    let failed = |text: String| CliError { exit: Exit::CannotStart, text };
    let uri = args.uri(folder).parse().map_err(|e| failed(explain(&e)))?;
    Limits::measure(&uri).map(Some).map_err(failed)
}
