//! The RAM of a real Linux guest, for images that are like nothing that is made up: page cache, heaps, page tables, slabs.
//!
//! A lab guest (`pageferry lab run`) boots Debian's kernel, sees the host's files, and runs this program again, which starts processes
//! that build structures on their heaps, writes a log, and then reads the host's programs and libraries until memory is full. It is
//! stopped where it stands, by killing its machine, so nothing is freed any more; its RAM is a file, which stays. What it holds
//! depends on what is installed here, and is otherwise much the same each time.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use pagecopy::compress::Compress;
use pageferry::measure::process::{private_bytes, program};
use pageferry::print;
use pageferry_benches::Random;
use pageferry_benches::images::{BLOCK_BYTES, Holes};

/// Share of the guest's memory that goes to heaps, in percent.
const HEAPS_PERCENT: u64 = 35;
/// The log in tmpfs, in percent.
const LOG_PERCENT: u64 = 3;
/// Memory that stays free, in percent.
const FREE_PERCENT: u64 = 8;
/// How long the heaps may take, and all of it: everything is emulated.
const HEAPS_PATIENCE: Duration = Duration::from_secs(600);
const PATIENCE_S: u32 = 1200;
/// Files that are read into the page cache, in this order.
const FOLDERS: [&str; 4] = ["/usr/bin", "/usr/lib", "/usr/share", "/usr/sbin"];
/// Larger files are read so far.
const FILE_MAX: u64 = 32 << 20;
/// Where processes say that their heaps are full.
const READY: &str = "/run/pageferry-fill";

/// Boots a Linux guest, fills its page cache and heaps, and keeps its RAM in a file
#[derive(Debug, Args)]
pub(crate) struct MakeArgs {
    /// The file; a tmpfs is much faster
    #[arg(default_value = "/dev/shm/guest-ram.img")]
    file: PathBuf,
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
    /// Be one of the processes that hold structures
    #[arg(long, requires = "bytes")]
    hold: Option<Heap>,
    /// How much of it
    #[arg(long)]
    bytes: Option<u64>,
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Heap {
    /// A tree of records, by name.
    Records,
    /// Parsed documents.
    Documents,
    /// A table of lists of numbers.
    Index,
}

/// The same in Python, where there is one. The number is that of the bytes.
const PYTHON: &str = "\
import os, random, sys, time
rng, held, n = random.Random(3), {}, 0
limit = int(sys.argv[1]) // os.sysconf('SC_PAGE_SIZE')
while n % 1000 or int(open('/proc/self/statm').read().split()[5]) < limit:
    held['key-%d' % n] = {
        'id': n, 'name': 'user %d' % rng.randrange(10**6), 'score': rng.random(), 'tags': [rng.randrange(100) for _ in range(6)]
    }
    n += 1
open(sys.argv[2], 'w').close()
time.sleep(1 << 30)
";

/// Makes the file, and says what it holds.
pub(crate) fn make(args: &MakeArgs) -> Result<(), String> {
    let pageferry = crate::program(args.pageferry.as_deref())?;
    let own = std::env::current_exe().map_err(|e| format!("this program's own place: {e}"))?;
    let mut lab = Command::new(pageferry);
    lab.args([
        "lab",
        "run",
        "--no-rdma",
        "--mem",
        &args.mem.to_string(),
        "--timeout",
        &PATIENCE_S.to_string(),
    ]);
    lab.arg("--ram-file").arg(&args.file).arg("--").arg(own).arg("fill-guest");
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
    if let (Some(heap), Some(bytes)) = (args.hold, args.bytes) {
        return hold(heap, bytes);
    }
    let total = meminfo("MemTotal:")?;
    let complain = |what: &str| format!("the guest's {what}");
    fs::create_dir_all(READY).map_err(|e| format!("{READY}: {e}"))?;
    let started = start_heaps(total * HEAPS_PERCENT / 100)?;
    write_log(total * LOG_PERCENT / 100).map_err(|e| format!("{}: {e}", complain("log")))?;
    let deadline = Instant::now() + HEAPS_PATIENCE;
    while fs::read_dir(READY).map_err(|e| format!("{READY}: {e}"))?.count() < started {
        if Instant::now() > deadline {
            return Err(complain("processes take too long"));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    // The kernel may begin to drop pages before so little is free; what was read by then is as much as it keeps.
    let mut left = total;
    for folder in FOLDERS {
        read_all(Path::new(folder), total * FREE_PERCENT / 100, &mut left)?;
    }
    for name in ["MemTotal:", "MemFree:", "Cached:", "AnonPages:", "Slab:"] {
        print::note(format_args!("{name:<12}{:>6} MiB", meminfo(name)? >> 20));
    }
    Ok(())
}

/// Starts the processes that hold `bytes` together; returns how many they are.
fn start_heaps(bytes: u64) -> Result<usize, String> {
    let own = std::env::current_exe().map_err(|e| format!("this program's own place: {e}"))?;
    let python = program("python3");
    let kinds = [Heap::Records, Heap::Documents, Heap::Index];
    let count = kinds.len() + usize::from(python.is_some());
    let share = (bytes / count as u64).to_string();
    let start = |command: &mut Command| {
        // They stay when this program has ended, and must not hold its pipes.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(drop).map_err(|e| format!("a process cannot be started: {e}"))
    };
    for heap in kinds {
        let name = heap.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        start(Command::new(&own).args(["fill-guest", "--hold", &name, "--bytes", &share]))?;
    }
    if let Some(python) = python {
        start(Command::new(python).args(["-c", PYTHON, &share, &format!("{READY}/python")]))?;
    }
    Ok(count)
}

/// Builds structures until the process has `bytes`, says so, and keeps them.
fn hold(heap: Heap, bytes: u64) -> Result<(), String> {
    let mut random = Random::new(heap as u64 + 1);
    let (mut records, mut documents, mut index) = (BTreeMap::new(), Vec::new(), HashMap::new());
    let mut count = 0u64;
    while !count.is_multiple_of(1000) || private_bytes(std::process::id()).unwrap_or(u64::MAX) < bytes {
        count += 1;
        let number = random.next_u64();
        match heap {
            Heap::Records => {
                let tags: Vec<String> = (0..3).map(|_| format!("tag-{}", random.below(500))).collect();
                records.insert(format!("customer-{:07}", number % 10_000_000), (count, tags, number as f64 / 7.0));
            }
            Heap::Documents => documents.push(serde_json::json!({
                "id": count, "user": format!("user{}", number % 5000), "path": "/api/v1/items", "ms": number % 900,
                "items": [number % 13, number % 17], "ok": !number.is_multiple_of(9),
            })),
            Heap::Index => {
                let list: &mut Vec<u32> = index.entry(number % 100_000).or_default();
                list.push(count as u32);
            }
        }
    }
    let ready =
        Path::new(READY).join(heap.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned()));
    File::create(&ready).map_err(|e| format!("{}: {e}", ready.display()))?;
    loop {
        std::thread::sleep(Duration::from_secs(3600));
        black_box((&records, &documents, &index));
    }
}

/// Writes lines as programs log them, into a file in memory.
fn write_log(bytes: u64) -> io::Result<()> {
    let mut random = Random::new(9);
    let mut log = BufWriter::new(File::create("/dev/shm/messages.log")?);
    let (mut written, mut second) = (0, 0u64);
    while written < bytes {
        second += random.next_u64() % 3;
        let line = format!(
            "2026-01-{:02} {:02}:{:02}:{:02} node7 service[{}]: request {:016x} from 10.0.{}.{} took {} ms\n",
            1 + second / 86_400 % 28,
            second / 3600 % 24,
            second / 60 % 60,
            second % 60,
            400 + random.below(5),
            random.next_u64(),
            random.below(4),
            random.below(256),
            random.below(900),
        );
        log.write_all(line.as_bytes())?;
        written += line.len() as u64;
    }
    log.flush()
}

/// Reads files, folder by folder in the order of their names, until only `free` bytes of memory are free, or `left` were read.
fn read_all(folder: &Path, free: u64, left: &mut u64) -> Result<(), String> {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(kind) = entry.file_type() else { continue };
        if *left == 0 || meminfo("MemFree:")? < free {
            return Ok(());
        }
        if kind.is_dir() {
            read_all(&entry.path(), free, left)?;
        } else if kind.is_file()
            && let Ok(file) = File::open(entry.path())
        {
            // A file that cannot be read is one less.
            let read = io::copy(&mut file.take(FILE_MAX.min(*left)), &mut io::sink()).unwrap_or(0);
            *left = left.saturating_sub(read);
        }
    }
    Ok(())
}

/// A figure of the kernel's, in bytes.
fn meminfo(name: &str) -> Result<u64, String> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|e| format!("/proc/meminfo: {e}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| format!("/proc/meminfo has no {name}"))
}

#[cfg(test)]
mod tests {
    use pageferry_benches::images::{self, Kind};

    use super::*;

    #[test]
    fn an_image_is_described() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        images::make(&path, Kind::Mixed, 10 << 20, 1).unwrap();
        let told = describe(&path).unwrap();
        assert!(told.starts_with("10 MiB, of which 7 MiB were touched, 4 MiB read as zeros; zstd"), "{told}");
        assert!(told.ends_with(" of 6 MiB"), "{told}");
    }

    #[test]
    fn reading_ends_where_memory_does() {
        // There is never as much free memory, so nothing is read, and nothing fails.
        assert_eq!(read_all(Path::new("/"), u64::MAX, &mut 1), Ok(()));
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::write(folder.path().join(name), [1; 100]).unwrap();
        }
        let mut left = 150;
        assert_eq!(read_all(folder.path(), 0, &mut left), Ok(()));
        assert_eq!(left, 0);
        let mut left = 1000;
        assert_eq!(read_all(folder.path(), 0, &mut left), Ok(()));
        assert_eq!(left, 700);
        assert!(meminfo("MemTotal:").unwrap() >= meminfo("MemFree:").unwrap());
        assert!(meminfo("Nothing:").is_err());
    }
}
