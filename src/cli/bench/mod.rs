//! `pageferry bench`: measures the transport, without a virtual machine.
//!
//! Source and destination are processes of their own, a new pair for each run, so that each side's CPU time and memory are
//! its own and the destination's memory is fresh, as a migration finds it.

mod mix;
mod pair;
mod result;
mod side;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pageferry::engine::{available_memory_bytes, explain};
use pageferry::pagecopy::backend::GuestRam;
use pageferry::pagecopy::choose::CodecMode;
use pageferry::pagecopy::layout::{Layout, PAGE_SIZE};
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};

use self::mix::Mix;
use self::pair::{Listening, Running};
use self::result::{Results, Row, Run};
use self::side::{DestinationOrder, SourceOrder, Transfer};
use super::folder::Folder;
use super::{CliError, Exit, backing, size, stop};

/// Smallest RAM.
const RAM_MIN: u64 = 1 << 20;

/// Measures how fast and at what cost memory moves: no virtual machine needed
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct BenchArgs {
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
    /// Give a silent peer or stream up after this many seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    link_timeout: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// One side of a run; what it is to do, as JSON
    #[arg(long, hide = true, value_name = "JSON")]
    side: Option<String>,
}

const HELP: &str = "Examples:\n  pageferry bench --ram 4G --mix random --streams 1,2,4 --runs 5\n  \
pageferry bench --ram 1G --mix hole=40,text=60 --codecs raw,auto,zstd:1 --json\n  \
pageferry bench --image /dev/shm/ram.img --memory memfd\n\n\
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
        eprintln!("pageferry: this is a debug build, which is slower than a release build");
    }
    let running = Running::default();
    let cancelled = running.clone();
    stop::on_signals(move || cancelled.cancel());
    let image = Image::new(args).map_err(|text| CliError { exit: Exit::CannotStart, text })?;
    let folder = Folder::new("bench").map_err(|e| CliError::cannot_start(&e))?;
    let rows = measure(args, &image, &folder, &running)?;
    let results = Results {
        ram_bytes: image.bytes,
        content: args.image.as_ref().map_or_else(|| args.mix.to_string(), |path| path.display().to_string()),
        transport: args.transport.to_possible_value().map_or_else(String::new, |v| v.get_name().into()),
        memory: args.memory.clone(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        rows,
    };
    if args.json {
        println!("{}", serde_json::to_string(&results).unwrap_or_default());
    } else {
        print!("{}", result::text(&results));
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

/// Runs all configurations in turns.
fn measure(
    args: &BenchArgs,
    image: &Image,
    folder: &Folder,
    running: &Running,
) -> Result<Vec<Row>, CliError> {
    let codecs = args.codecs.iter().flat_map(|codec| args.streams.iter().map(move |n| (*n, *codec)));
    let mut rows: Vec<Row> = codecs.map(|(n, codec)| Row::new(n, codec.to_string())).collect();
    for turn in u32::from(args.no_warm_up)..=args.runs {
        for row in rows.iter_mut().filter(|row| row.failed.is_none()) {
            let result = one(args, image, folder, row, running);
            if running.is_cancelled() {
                return Err(CliError { exit: Exit::Cancelled, text: "cancelled".into() });
            }
            if turn != 0 || result.is_err() {
                row.add(result);
            }
        }
    }
    Ok(rows)
}

/// One run of a configuration.
fn one(
    args: &BenchArgs,
    image: &Image,
    folder: &Folder,
    row: &Row,
    running: &Running,
) -> Result<Run, String> {
    let uri = match args.transport {
        Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
        Transport::Unix => format!("unix:{}", folder.path.join("socket").display()),
    };
    let order = DestinationOrder { uri, memory: args.memory.clone(), timeout_s: args.link_timeout };
    let mut listening = Listening::start(order, running)?;
    let transfer = Transfer { streams: row.streams, codec: row.codec.clone(), timeout_s: args.link_timeout };
    let order = SourceOrder { uri: listening.uri.clone(), image: image.path.clone(), transfer };
    let source = pair::send(order, running)?;
    let destination = listening.outcome()?;
    Ok(Run::new(&source, &destination))
}

/// The content of guest RAM, as a file that sources map.
struct Image {
    path: PathBuf,
    bytes: u64,
    /// What was made here; gone with it.
    _made: Option<GuestMemory>,
}

impl Image {
    fn new(args: &BenchArgs) -> Result<Self, String> {
        if let Some(path) = &args.image {
            let ram = GuestMemory::open_ram_file(path, false).map_err(|e| explain(&e))?;
            let path = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
            return Ok(Self { path, bytes: ram.layout().bytes(), _made: None });
        }
        // Of what is no hole there is one copy at the source and one at the destination.
        let (needed, free) = (args.ram as f64 * args.mix.present() * 2.0, available_memory_bytes());
        if needed > free as f64 {
            return Err(format!(
                "--ram {}: this composition takes {} MiB on both sides together, and {} MiB are free; take less, or more holes",
                args.ram,
                needed as u64 >> 20,
                free >> 20
            ));
        }
        let layout = Layout::flat(args.ram).map_err(|e| format!("--ram: {e}"))?;
        let ram = GuestMemory::create(layout, &Backing::Memfd).map_err(|e| explain(&e))?;
        args.mix.fill(&ram);
        let (fd, _) = ram.fd_of(0).ok_or("a memfd has no descriptor")?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&fd);
        let path = format!("/proc/{}/fd/{fd}", std::process::id()).into();
        Ok(Self { path, bytes: args.ram, _made: Some(ram) })
    }
}
