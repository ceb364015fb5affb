//! Heaps as programs build them, and a log.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::hint::black_box;
use std::io::{self, BufWriter, Write};
use std::process::Command;

use clap::ValueEnum;
use pageferry::measure::process::{private_bytes, program};
use pageferry_benches::Random;

use super::cache::{self, Files};
use super::guest;

/// Share of the guest's memory that goes to heaps, in percent.
const HEAPS_PERCENT: u64 = 35;
/// The log in tmpfs, in percent.
const LOG_PERCENT: u64 = 3;

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Heap {
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

/// Fills the guest: heaps, a log in tmpfs, and page cache.
pub(super) fn fill(total: u64) -> Result<(), String> {
    let started = start_heaps(total * HEAPS_PERCENT / 100)?;
    write_log(total * LOG_PERCENT / 100).map_err(|e| format!("the guest's log: {e}"))?;
    guest::wait_until_ready(started)?;
    cache::fill(Files::All, total * cache::FREE_PERCENT / 100, total)
}

/// Starts the processes that hold `bytes` together; returns how many they are.
fn start_heaps(bytes: u64) -> Result<usize, String> {
    let python = program("python3");
    let kinds = [Heap::Records, Heap::Documents, Heap::Index];
    let count = kinds.len() + usize::from(python.is_some());
    let share = bytes / count as u64;
    for heap in kinds {
        guest::start_own("--hold", &heap, share)?;
    }
    if let Some(python) = python {
        let ready = format!("{}/python", guest::READY);
        guest::start(Command::new(python).args(["-c", PYTHON, &share.to_string(), &ready]))?;
    }
    Ok(count)
}

/// Builds structures until the process has `bytes`, says so, and keeps them.
pub(super) fn hold(heap: Heap, bytes: u64) -> Result<(), String> {
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
    guest::say_ready(&guest::name(&heap))?;
    black_box((&records, &documents, &index));
    guest::stay()
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
