//! The RAM of real Linux guests, for images that are like nothing that is made up: page cache, heaps, page tables, slabs.
//!
//! A lab guest (`pageferry lab run`) boots Debian's kernel, sees the host's files, and runs this program again, which fills the guest
//! with what its kind holds. It is stopped where it stands, by killing its machine, so nothing is freed any more; its RAM is a file,
//! which stays. What it holds depends on what is installed here, and is otherwise much the same each time.

mod cache;
mod compiler;
mod database;
mod encrypted;
mod floats;
mod guest;
mod heaps;
mod host;
mod idle;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{Args, ValueEnum};
use pagecopy::compress::Compress;
use pageferry::print;
use pageferry_benches::images::{BLOCK_BYTES, Holes};
use tempfile::TempDir;

use self::cache::Files;
use self::floats::Numbers;
use self::guest::meminfo;
use self::heaps::Heap;

/// How long all of it may take: everything is emulated.
const PATIENCE_S: u32 = 1200;

/// What a guest holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Heaps of several programs, a log, and page cache of the host's files in the rest
    Heaps,
    /// It has booted, and waits; most of its memory was never touched
    Idle,
    /// Page cache full of programs and libraries
    Cache,
    /// Arrays of float32 and float64: fields of a stencil computation, and particles
    Floats,
    /// SQLite at work: tables and indexes in the page cache, in private caches, and in memory alone
    Database,
    /// gcc in the midst of its work, with sources and objects in the page cache
    Compiler,
    /// Page cache full of compressed and encrypted files
    Encrypted,
}

impl Kind {
    /// Makes what the guest is to read, in a folder that is removed with what is returned.
    fn prepare(self, memory: u64) -> Result<TempDir, String> {
        let folder = TempDir::with_prefix("pageferry-guest")
            .map_err(|e| format!("a folder for the guest's files: {e}"))?;
        match self {
            Self::Database => database::prepare(folder.path(), memory)?,
            Self::Encrypted => encrypted::prepare(folder.path(), memory)?,
            Self::Compiler => compiler::check()?,
            Self::Heaps | Self::Idle | Self::Cache | Self::Floats => {}
        }
        Ok(folder)
    }
}

/// Boots a Linux guest, fills its memory as a kind of guest has it, and keeps its RAM in a file
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  peers make-guest-ram --kind floats /var/tmp/floats.img\n\n\
The guest is emulated, so this takes some minutes. The file has holes where the guest never touched its memory; \
`cp` would add some, in place of zeros.")]
pub(crate) struct MakeArgs {
    /// The file; a tmpfs is much faster
    #[arg(default_value = "/dev/shm/guest-ram.img")]
    file: PathBuf,
    /// What the guest holds
    #[arg(long, value_enum, default_value = "heaps")]
    kind: Kind,
    /// Memory of the guest
    #[arg(long, default_value = "1G", value_parser = crate::size)]
    mem: u64,
    /// The program; by default the one beside this
    #[arg(long, value_name = "FILE")]
    pageferry: Option<PathBuf>,
}

/// What runs in the guest.
#[derive(Debug, Args)]
pub(crate) struct FillArgs {
    /// What the guest is to hold
    #[arg(long, value_enum, default_value = "heaps")]
    kind: Kind,
    /// What the host has prepared for that
    #[arg(long, value_name = "DIR")]
    prepared: Option<PathBuf>,
    /// Be one of the processes that hold structures
    #[arg(long, requires = "bytes", conflicts_with = "compute")]
    hold: Option<Heap>,
    /// Be one of the processes that hold numbers
    #[arg(long, requires = "bytes")]
    compute: Option<Numbers>,
    /// How much of it
    #[arg(long)]
    bytes: Option<u64>,
}

/// Makes the file, and says what it holds.
pub(crate) fn make(args: &MakeArgs) -> Result<(), String> {
    let pageferry = crate::program(args.pageferry.as_deref())?;
    let own = std::env::current_exe().map_err(|e| format!("this program's own place: {e}"))?;
    let prepared = args.kind.prepare(args.mem)?;
    let mut lab = Command::new(pageferry);
    lab.args(["lab", "run", "--no-rdma", "--mem", &args.mem.to_string()]);
    lab.args(["--timeout", &PATIENCE_S.to_string()]);
    lab.arg("--ram-file").arg(&args.file).arg("--").arg(own);
    lab.args(["fill-guest", "--kind", &guest::name(&args.kind), "--prepared"]).arg(prepared.path());
    let status = lab.stdin(Stdio::null()).status().map_err(|e| format!("the lab: {e}"))?;
    if !status.success() {
        return Err(format!("the guest's RAM cannot be made: the lab ended with {status}"));
    }
    let told = describe(&args.file).map_err(|e| format!("{}: {e}", args.file.display()))?;
    print::line(format_args!("{}: {told}", args.file.display()));
    Ok(())
}

/// How much data there is, and how it shrinks.
fn describe(path: &Path) -> io::Result<String> {
    let length = path.metadata()?.len();
    let data = Holes::of(path)?.data_bytes();
    let file = File::open(path)?;
    let mut compress = Compress::new();
    let (mut block, mut out) = (vec![0; BLOCK_BYTES / 4], vec![0; BLOCK_BYTES / 4]);
    let (mut zeros, mut plain, mut shrunk) = (0u64, 0, 0);
    for at in (0..length).step_by(block.len()) {
        file.read_exact_at(&mut block, at)?;
        let empty = block.chunks(4096).filter(|page| page.iter().all(|byte| *byte == 0)).count();
        zeros += empty as u64;
        if empty * 4096 < block.len() {
            plain += block.len();
            shrunk += compress.compress(1, &block, &mut out).unwrap_or(block.len());
        }
    }
    let mib = |bytes: u64| bytes >> 20;
    Ok(format!(
        "{} MiB, of which {} MiB were touched, {} MiB read as zeros; zstd (level 1) makes {} of {} MiB",
        mib(length),
        mib(data),
        mib(zeros * 4096),
        mib(shrunk as u64),
        mib(plain as u64),
    ))
}

/// What runs in the guest: fills its memory, and leaves processes behind that hold some of it.
pub(crate) fn fill(args: &FillArgs) -> Result<(), String> {
    match (args.hold, args.compute, args.bytes) {
        (Some(heap), _, Some(bytes)) => return heaps::hold(heap, bytes),
        (_, Some(numbers), Some(bytes)) => return floats::hold(numbers, bytes),
        _ => {}
    }
    let total = meminfo("MemTotal:")?;
    fs::create_dir_all(guest::READY).map_err(|e| format!("{}: {e}", guest::READY))?;
    match args.kind {
        Kind::Heaps => heaps::fill(total)?,
        Kind::Idle => idle::fill()?,
        Kind::Cache => cache::fill(Files::Programs, total * cache::FREE_PERCENT / 100, total)?,
        Kind::Floats => floats::fill(total)?,
        Kind::Database => database::fill(total, prepared(args)?)?,
        Kind::Compiler => compiler::fill(total)?,
        Kind::Encrypted => encrypted::fill(total, prepared(args)?)?,
    }
    for name in ["MemTotal:", "MemFree:", "Cached:", "AnonPages:", "Slab:"] {
        print::note(format_args!("{name:<12}{:>6} MiB", meminfo(name)? >> 20));
    }
    Ok(())
}

/// The folder that the host prepared, which the guest must see: it has folders of its own in place of some of the host's.
fn prepared(args: &FillArgs) -> Result<&Path, String> {
    let folder = args.prepared.as_deref().ok_or("--prepared is missing")?;
    let hint =
        "the guest does not see it: let TMPDIR name a folder that is not below /dev, /run, /proc or /sys";
    if folder.is_dir() { Ok(folder) } else { Err(format!("{}: {hint}", folder.display())) }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use pageferry_benches::images;

    use super::*;

    /// The arguments of make-guest-ram, as a command line of their own.
    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        make: MakeArgs,
    }

    #[test]
    fn a_guest_is_one_of_several() {
        let kind = |line: &str| Line::try_parse_from(line.split(' ')).map(|line| line.make.kind);
        assert_eq!(kind("make-guest-ram a.img").unwrap(), Kind::Heaps);
        for one in Kind::value_variants() {
            assert_eq!(kind(&format!("make-guest-ram --kind {} a.img", guest::name(one))).unwrap(), *one);
        }
        assert!(kind("make-guest-ram --kind nothing a.img").is_err());
    }

    #[test]
    fn a_folder_that_the_guest_does_not_see_is_explained() {
        let args =
            |prepared| FillArgs { kind: Kind::Database, prepared, hold: None, compute: None, bytes: None };
        let error = prepared(&args(Some("/nothing/here".into()))).unwrap_err();
        assert!(error.starts_with("/nothing/here: ") && error.contains("TMPDIR"), "{error}");
        assert!(prepared(&args(None)).is_err());
        assert_eq!(prepared(&args(Some("/".into()))), Ok(Path::new("/")));
    }

    #[test]
    fn an_image_is_described() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        images::make(&path, images::Kind::Mixed, 10 << 20, 1).unwrap();
        let told = describe(&path).unwrap();
        assert!(told.starts_with("10 MiB, of which 7 MiB were touched, 4 MiB read as zeros; zstd"), "{told}");
        assert!(told.ends_with(" of 6 MiB"), "{told}");
    }
}
