//! The table: an attack and a side that is attacked in each row. Every attack ends in an error, or is ignored while a rightful source is
//! served and its guest runs; and what it costs the attacked process stays below the bounds here, which `SECURITY.md` states.
//!
//! | module | attacks | on |
//! |---|---|---|
//! | `door` | whoever reaches the port, meanwhile a rightful source comes | `recv`, `vm --incoming` |
//! | `session` | a source that has the session | `recv`, `vm --incoming` |
//! | `source` | a destination that is connected to | `send`, a running `vm` |
//! | `archive` | a file that is loaded or looked into | `recv`, `vm --incoming`, `inspect` |
//!
//! Most attacks come over plain connections and again under TLS, where whoever attacks has a good certificate; and there are some upon TLS
//! itself.

#[path = "table/archive.rs"]
mod archive;
#[path = "table/door.rs"]
mod door;
#[path = "table/session.rs"]
mod session;
#[path = "table/source.rs"]
mod source;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::common::MIB;

/// What an attack may cost the process that is attacked, beyond what it had before. Memory of its guest, which is shared in these tests,
/// is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Anonymous resident memory, in bytes.
    pub(crate) memory: usize,
    /// Threads.
    pub(crate) threads: usize,
    /// Descriptors.
    pub(crate) descriptors: usize,
}

/// Of whoever reaches the port of a destination.
pub(crate) const AT_THE_DOOR: Bounds = Bounds { memory: 96 * MIB, threads: 16, descriptors: 640 };
/// Of a source that has the session, with as many streams as there may be.
pub(crate) const IN_THE_SESSION: Bounds = Bounds { memory: 256 * MIB, threads: 300, descriptors: 700 };
/// The same under TLS: each stream has records that are not taken apart yet, and those that are about to be sent.
pub(crate) const IN_THE_SESSION_UNDER_TLS: Bounds = Bounds { memory: 336 * MIB, ..IN_THE_SESSION };
/// Of a destination that a source has connected to, for each of its streams a few threads.
pub(crate) const AT_THE_SOURCE: Bounds = Bounds { memory: 32 * MIB, threads: 16, descriptors: 32 };
/// Of an archive.
pub(crate) const OF_A_FILE: Bounds = Bounds { memory: 128 * MIB, threads: 16, descriptors: 96 };

/// How often a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What a process has, or had at most.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    memory: usize,
    threads: usize,
    descriptors: usize,
}

/// A field of a process's status, in bytes or as it is; `None` when it has gone.
fn field(status: &str, name: &str) -> Option<usize> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?.trim();
    match value.strip_suffix(" kB") {
        Some(kib) => kib.parse::<usize>().ok().map(|kib| kib << 10),
        None => value.parse().ok(),
    }
}

/// Looks at a process.
fn look(pid: u32) -> Option<Seen> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Seen {
        memory: field(&status, "RssAnon:")?,
        threads: field(&status, "Threads:")?,
        descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count(),
    })
}

/// A process that is watched while it is attacked.
pub(crate) struct Watch {
    before: Seen,
    over: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Watch {
    /// From now on.
    pub(crate) fn of(pid: u32) -> Self {
        let before = look(pid).expect("it runs");
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let thread = std::thread::spawn(move || {
            let mut most = Seen::default();
            while !ends.load(Ordering::Relaxed) {
                let Some(seen) = look(pid) else { break };
                most.memory = most.memory.max(seen.memory);
                most.threads = most.threads.max(seen.threads);
                most.descriptors = most.descriptors.max(seen.descriptors);
                std::thread::sleep(LOOK_EVERY);
            }
            most
        });
        Self { before, over, thread }
    }

    /// Until now: it has cost no more than this.
    #[track_caller]
    pub(crate) fn end(self, row: &str, bounds: Bounds) {
        self.over.store(true, Ordering::Relaxed);
        let most = self.thread.join().unwrap();
        let grown = Bounds {
            memory: most.memory.saturating_sub(self.before.memory),
            threads: most.threads.saturating_sub(self.before.threads),
            descriptors: most.descriptors.saturating_sub(self.before.descriptors),
        };
        println!(
            "{row:<64} {:>4} MiB {:>4} threads {:>4} descriptors",
            grown.memory >> 20,
            grown.threads,
            grown.descriptors
        );
        let within = grown.memory <= bounds.memory
            && grown.threads <= bounds.threads
            && grown.descriptors <= bounds.descriptors;
        assert!(within, "{row}: {grown:?} is beyond {bounds:?}");
    }
}
