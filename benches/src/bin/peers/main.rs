//! Side-by-side runs of pageferry and QEMU's own migration on the same RAM images, and the figures that pageferry is held to.
//!
//! `cargo run --release -p pageferry-benches --bin peers -- --help`

mod acceptance;
mod choose;
mod contender;
mod delta;
mod forward;
mod guest_ram;
mod limit;
mod link;
mod live;
mod run;
mod signals;
mod table;
mod warm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use pageferry::measure::qemu;
use pageferry::print;
use pageferry_benches::images::{self, Kind};
use serde_json::json;

use crate::acceptance::Row;
use crate::contender::Contender;
use crate::link::Rate;
use crate::run::{Comparison, Image, Outcome, Runner, SEED};

/// Compares pageferry with QEMU's own migration, side by side
#[derive(Debug, Parser)]
#[command(after_help = "Examples:\n  peers readme --only random-file,sparse\n  \
peers run --image mixed --size 1G pageferry:4:auto qemu:multifd:4 qemu:multifd-zstd:4:3\n  \
peers run --image guest.img --link 10gbit --runs 3 --json\n\n\
Contenders take turns; the first round warms up and is not counted; figures are medians. Times end when both sides have \
everything. An otherwise idle machine is needed, and memory for two images.\n\n\
Exit codes: 0 measured; 1 something could not be measured; 2 wrong arguments; 130 cancelled.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Readme(ReadmeArgs),
    Run(RunArgs),
    MakeImage(MakeImageArgs),
    MakeGuestRam(guest_ram::MakeArgs),
    Choose(choose::ChooseArgs),
    /// The part of make-guest-ram that runs in the guest
    #[command(hide = true)]
    FillGuest(guest_ram::FillArgs),
    /// One transfer of bytes alone
    #[command(hide = true)]
    Limit(limit::LimitArgs),
    /// What benches/converge.sh asks for
    #[command(hide = true)]
    Live(live::LiveArgs),
    /// What benches/long-path.sh moves a guest over
    #[command(hide = true)]
    Forward(forward::ForwardArgs),
}

/// Measures the figures that pageferry is held to, each with its target
#[derive(Debug, Args)]
struct ReadmeArgs {
    /// Only these rows; `--list` names them
    #[arg(long, value_delimiter = ',', value_name = "ROW")]
    only: Vec<String>,
    /// Name the rows, and measure nothing
    #[arg(long)]
    list: bool,
    /// Size of the images
    #[arg(long, default_value = "4G", value_parser = size)]
    size: u64,
    /// The RAM of a real guest, as `make-guest-ram` makes it
    #[arg(long, default_value = "/dev/shm/guest-ram.img", value_name = "FILE")]
    guest_ram: PathBuf,
    /// Keep what was measured here; what other calls measured there is judged along with it
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// Measure nothing, and judge what --keep has
    #[arg(long, requires = "keep")]
    judge: bool,
    #[command(flatten)]
    how: HowArgs,
}

/// Compares contenders of your choice with one image
#[derive(Debug, Args)]
struct RunArgs {
    /// random, zero, sparse, text, heap or mixed; or a RAM file, of which a copy is used
    #[arg(long, default_value = "random")]
    image: String,
    /// Size of an image that is made
    #[arg(long, default_value = "4G", value_parser = size)]
    size: u64,
    /// Into anonymous memory instead of a fresh tmpfs file
    #[arg(long)]
    anon: bool,
    /// Over a link of this rate between two network namespaces, as root: 1gbit, 10gbit, …
    #[arg(long, value_name = "RATE")]
    link: Option<Rate>,
    /// Look at both sides' memory every 5 ms
    #[arg(long)]
    watch_memory: bool,
    #[command(flatten)]
    how: HowArgs,
    /// `pageferry:STREAMS[:CODEC]`, `attached:STREAMS[:CODEC]`, `qemu:tcp`, `qemu:xbzrle`, `qemu:multifd:CHANNELS`,
    /// `qemu:multifd-zstd:CHANNELS[:LEVEL]`, `limit:write|splice[:STREAMS]`; `tls:` before one of the first or of the `qemu:` ones
    #[arg(required = true)]
    contenders: Vec<Contender>,
}

/// How everything is run.
#[derive(Debug, Args)]
struct HowArgs {
    /// Runs of each contender that count
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// The program; by default the one beside this
    #[arg(long, value_name = "FILE")]
    pageferry: Option<PathBuf>,
    /// Where images and copies are made; it should be a tmpfs
    #[arg(long, default_value = "/dev/shm", value_name = "DIR")]
    folder: PathBuf,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// Makes an image, always the same for a seed
#[derive(Debug, Args)]
struct MakeImageArgs {
    /// random, zero, sparse, text, heap or mixed
    kind: Kind,
    /// The file
    file: PathBuf,
    /// Its size
    #[arg(long, default_value = "4G", value_parser = size)]
    size: u64,
    /// What decides the content
    #[arg(long, default_value_t = SEED)]
    seed: u64,
}

/// A size with a unit of 1024: 512M, 4G.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = digits.parse::<u64>().ok().filter(|n| *n > 0 && *n <= u64::MAX >> shift);
    let bytes = number.map(|n| n << shift).filter(|bytes| bytes.is_multiple_of(1 << 20));
    bytes.ok_or_else(|| format!("{text:?} is no multiple of 1M, such as 512M or 4G"))
}

fn main() -> ExitCode {
    print::end("peers", run(&Cli::parse()))
}

fn run(cli: &Cli) -> ExitCode {
    if let Err(error) = signals::catch() {
        print::note(format_args!("peers: signals cannot be caught: {error}"));
        return ExitCode::FAILURE;
    }
    let done = match &cli.command {
        Command::Readme(args) => readme(args),
        Command::Run(args) => compare(args),
        Command::MakeImage(args) => images::make(&args.file, args.kind, args.size, args.seed)
            .map(|()| true)
            .map_err(|e| format!("{}: {e}", args.file.display())),
        Command::MakeGuestRam(args) => guest_ram::make(args).map(|()| true),
        Command::Choose(args) => choose::run(args).map(|()| true),
        Command::FillGuest(args) => guest_ram::fill(args).map(|()| true),
        Command::Limit(args) => limit::run(args).map(|()| true),
        Command::Live(args) => live::run(args).map(|()| true),
        Command::Forward(args) => forward::run(args).map(|()| true),
    };
    match done {
        _ if signals::cancelled() => ExitCode::from(130),
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            print::note(format_args!("peers: {reason}"));
            ExitCode::FAILURE
        }
    }
}

/// The `pageferry` that is named, or the one beside this program.
fn program(named: Option<&Path>) -> Result<PathBuf, String> {
    let beside = || {
        let own = std::env::current_exe().map_err(|e| format!("this program's own place: {e}"))?;
        Ok::<_, String>(own.with_file_name("pageferry"))
    };
    let pageferry = named.map_or_else(beside, |named| Ok(named.to_path_buf()))?;
    if pageferry.is_file() {
        return Ok(pageferry);
    }
    let hint = "build it with `cargo build --release`, or name it with --pageferry";
    Err(format!("there is no {}: {hint}", pageferry.display()))
}

impl HowArgs {
    fn runner(&self) -> Result<Runner, String> {
        let pageferry = program(self.pageferry.as_deref())?;
        if cfg!(debug_assertions) {
            print::note("peers: this is a debug build: its figures mean little");
        }
        Runner::new(pageferry, &self.folder, self.runs)
    }
}

/// One comparison. False if a contender failed.
fn compare(args: &RunArgs) -> Result<bool, String> {
    let image = match args.image.parse::<Kind>() {
        Ok(kind) => Image::Made(kind, args.size),
        Err(_) if Path::new(&args.image).is_file() => Image::File(args.image.clone().into()),
        Err(reason) => return Err(format!("{reason}, nor a file")),
    };
    let comparison = Comparison {
        name: "run".into(),
        image,
        anonymous: args.anon,
        link: args.link,
        contenders: args.contenders.clone(),
        watch_memory: args.watch_memory,
    };
    let comparisons = [comparison];
    if let Some(lack) = acceptance::lack(&comparisons) {
        return Err(lack);
    }
    let outcomes = args.how.runner()?.compare(&comparisons)?;
    if args.how.json {
        print::line(json!({ "machine": machine(), "comparisons": outcomes }));
    } else {
        outcomes.iter().for_each(|outcome| print::text(table::outcome(outcome)));
    }
    Ok(outcomes.iter().all(Outcome::is_complete))
}

/// The figures that pageferry is held to. False if something could not be measured.
fn readme(args: &ReadmeArgs) -> Result<bool, String> {
    if let Some(name) = args.only.iter().find(|name| acceptance::ROWS.iter().all(|row| row.name != **name)) {
        return Err(format!("there is no row {name:?}; --list names them"));
    }
    let chosen: Vec<_> = acceptance::ROWS
        .iter()
        .filter(|row| args.only.is_empty() || args.only.iter().any(|name| name == row.name))
        .collect();
    if args.list {
        chosen.iter().for_each(|row| print::line(format_args!("{:<18}{}", row.name, row.what())));
        return Ok(true);
    }
    let mut outcomes = args.keep.as_deref().map_or(Ok(Vec::new()), kept)?;
    let complete = args.judge || measure(args, &chosen, &mut outcomes)?;
    let verdicts: Vec<_> = chosen.iter().map(|row| row.judge(&outcomes)).collect();
    if args.how.json {
        print::line(json!({ "machine": machine(), "comparisons": outcomes, "rows": verdicts }));
    } else {
        print::text(table::verdicts(&verdicts));
    }
    Ok(complete)
}

/// Runs what the rows are read off, each once, and adds it to what there is; what one row is read off takes turns. False if
/// something could not be measured.
fn measure(args: &ReadmeArgs, rows: &[&Row], outcomes: &mut Vec<Outcome>) -> Result<bool, String> {
    let mut runner = args.how.runner()?;
    let mut complete = true;
    let mut measured: Vec<&str> = Vec::new();
    for row in rows {
        let mut wanted = row.comparisons().to_vec();
        wanted.retain(|name| !measured.contains(name));
        measured.extend(&wanted);
        let named = |name: &&str| {
            acceptance::comparison(name, args.size, &args.guest_ram)
                .ok_or_else(|| format!("the comparison {name:?} is unknown"))
        };
        let comparisons = wanted.iter().map(named).collect::<Result<Vec<_>, _>>()?;
        if let Some(lack) = acceptance::lack(&comparisons) {
            print::note(format_args!("{}: left out: {lack}", wanted.join(", ")));
            complete = false;
            continue;
        }
        for outcome in runner.compare(&comparisons)? {
            complete &= outcome.is_complete();
            if !args.how.json {
                print::line(table::outcome(&outcome));
            }
            outcomes.retain(|old| old.name != outcome.name);
            outcomes.push(outcome);
        }
        args.keep.as_deref().map_or(Ok(()), |path| keep(path, outcomes))?;
    }
    Ok(complete)
}

/// What earlier calls measured; nothing if there were none.
fn kept(path: &Path) -> Result<Vec<Outcome>, String> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn keep(path: &Path, outcomes: &[Outcome]) -> Result<(), String> {
    let text = serde_json::to_vec_pretty(outcomes).map_err(|e| e.to_string())?;
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// What was measured on.
fn machine() -> serde_json::Value {
    json!({
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "congestion_control": fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default().trim(),
        "qemu": qemu::version(),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(drop);
        assert!(parse("peers run --image mixed --size 1G pageferry:4 qemu:multifd:4").is_ok());
        assert!(parse("peers readme --only sparse,zero --runs 3 --json").is_ok());
        for bad in ["peers run", "peers run --link 1 pageferry:4", "peers run xen:1", "peers readme --runs 0"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!((size("512M"), size("4G"), size("1048576")), (Ok(512 << 20), Ok(4 << 30), Ok(1 << 20)));
        for bad in ["", "G", "0M", "1K", "4097", "99999999999G", "é"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_was_measured_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept.json");
        assert!(kept(&path).unwrap().is_empty());
        let outcome = Outcome {
            name: "sparse".into(),
            image: "sparse".into(),
            image_bytes: 4096,
            data_bytes: 0,
            memory: "anonymous".into(),
            link: "loopback".into(),
            contenders: vec![run::Runs {
                contender: "qemu:tcp".into(),
                runs: vec![],
                failed: Some("no".into()),
            }],
        };
        keep(&path, &[outcome]).unwrap();
        let read = kept(&path).unwrap();
        assert_eq!((read[0].name.as_str(), read[0].contenders[0].failed.as_deref()), ("sparse", Some("no")));
        fs::write(&path, "x").unwrap();
        assert!(kept(&path).is_err());
    }
}
