//! Who owns the guest, whatever happens: migrations of a real guest between real processes, in which either process is killed or
//! frozen, or connections are cut, at steps of the protocol that chance chooses. After each run exactly one side runs the guest,
//! or none where that is impossible by nature, and the guest's own chain of sums says that its memory is whole.
//!
//! Half of the runs hand the guest over before its pages (postcopy), and in some a process is starved instead: of descriptors, of
//! address space, or of room for its guest's memory. Room is that of a tmpfs of the VM's own, which is filled for a while; where none can
//! be mounted address space is taken instead. A guest that touches a page for which there is no room is lost by nature, as by a kill.
//!
//! `PAGEFERRY_HARNESS_RUNS` says how many runs there are (24), `PAGEFERRY_HARNESS_SEED` which is the first (1; `clock` for another one each
//! time). A run that fails says how to have it again: the faults are the same then, though the machine's own timing is not.

#[allow(dead_code, reason = "written for tests that look closer")]
#[path = "live/proxy.rs"]
mod proxy;
#[path = "common/tmpfs.rs"]
mod tmpfs;
#[allow(dead_code, reason = "written for tests that do more with a VM")]
#[path = "live/vm.rs"]
mod vm;

#[path = "ownership/faults.rs"]
mod faults;
#[path = "ownership/verdict.rs"]
mod verdict;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use faults::{Plan, Victim};
use proxy::By;
use tmpfs::Tmpfs;
use vm::{Spec, Vm, World, have_kvm};

/// Runs, unless `PAGEFERRY_HARNESS_RUNS` says otherwise.
const RUNS: u64 = 24;

/// The first seed, unless `PAGEFERRY_HARNESS_SEED` says otherwise.
const FIRST_SEED: u64 = 1;
/// The guest's memory.
const MEM_MIB: u64 = 16;
/// What a file system has besides that, where its room is taken.
const ROOM_TO_SPARE_MIB: usize = 1;
/// How long a destination waits for its source while pages are missing: longer than all that one plan can do to their connections.
const POSTCOPY_PATIENCE_S: &str = "15";

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    if text == "clock" {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
        return Some(now.as_millis() as u64);
    }
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

/// A guest that is small enough to be there in no time. Where room is taken it touches pages for the first time all through its
/// migration.
fn guest(plan: &Plan) -> Spec {
    let working_set = if plan.takes_room() { 6 << 20 } else { 1 << 20 };
    let spec = Spec { mem_mib: MEM_MIB, working_set, kvm: plan.kvm && have_kvm(), ..Spec::counter() };
    let seconds = |s: u64| s.to_string();
    spec.with(&[
        "--link-timeout",
        "1",
        "--handover-timeout",
        "2",
        "--reconnect-timeout",
        &seconds(plan.reconnect_s),
        "--postcopy-timeout",
        POSTCOPY_PATIENCE_S,
    ])
}

/// Where a VM has its memory: on a file system of its own, if the plan takes its room.
struct Memory {
    room: Option<Arc<Tmpfs>>,
}

impl Memory {
    fn new(plan: &Plan) -> Self {
        let mount = || Tmpfs::mount(MEM_MIB as usize + ROOM_TO_SPARE_MIB).expect("a tmpfs, as before");
        Self { room: plan.takes_room().then(|| Arc::new(mount())) }
    }

    /// The guest's machine, with this memory.
    fn of(&self, spec: &Spec) -> Spec {
        let memory = match &self.room {
            Some(room) => format!("file:{}", room.path("ram").display()),
            None => "memfd".into(),
        };
        spec.clone().with(&["--memory", &memory])
    }

    fn victim(&self, vm: &Vm) -> Victim {
        Victim { pid: vm.pid(), room: self.room.clone() }
    }
}

/// Whether a file system can be had whose room can be taken; says once that there is none.
fn has_room_to_take() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(|| Tmpfs::new(1).is_some())
}

/// What one run came to.
struct Outcome {
    harms: Vec<String>,
    end: String,
    /// Room was taken from a process.
    took_room: bool,
}

/// One migration.
fn run(plan: &Plan) -> Outcome {
    let world = World::new();
    let spec = guest(plan);
    let memory = [Memory::new(plan), Memory::new(plan)];
    let (destination, uri) = world.destination("b", &memory[1].of(&spec));
    // Last, so that its guest has only just begun.
    let source = world.source("a", &memory[0].of(&spec));
    let hand = faults::Hand::new(&uri, plan, memory[0].victim(&source), memory[1].victim(&destination));
    // Without an answer, if it is killed at once.
    let mut request = json!({
        "execute": "migrate", "uri": hand.uri(), "streams": plan.streams, "link_timeout_s": 1,
        "reconnect_timeout_s": plan.reconnect_s,
    });
    if let Some(rounds) = plan.postcopy_after_rounds {
        request["postcopy_after_rounds"] = rounds.into();
    }
    let _ = source.ask(&request);
    verdict::settle(&source, &destination, &hand);
    let end = verdict::judge(&spec, &source, &destination, &hand);
    let took_room = [By::Source, By::Destination].into_iter().any(|side| hand.took_room(side));
    Outcome { harms: hand.kinds(), end, took_room }
}

/// What became of many runs.
#[derive(Default)]
struct Summary {
    harms: BTreeMap<String, u32>,
    /// Of all runs, and of those in which room was taken.
    ends: BTreeMap<String, [u32; 2]>,
    slowest: Duration,
}

impl Summary {
    fn add(&mut self, outcome: Outcome, took: Duration) {
        outcome.harms.into_iter().for_each(|harm| *self.harms.entry(harm).or_default() += 1);
        let counts = self.ends.entry(outcome.end).or_default();
        counts[0] += 1;
        counts[1] += u32::from(outcome.took_room);
        self.slowest = self.slowest.max(took);
    }

    fn print(&self) {
        println!("times that");
        self.harms.iter().for_each(|(harm, count)| println!("{count:5}       {harm}"));
        println!("runs, and those of them in which a process had no room, after which the guest");
        self.ends.iter().for_each(|(end, [all, room])| println!("{all:5} {room:5} {end}"));
    }
}

#[test]
fn the_guest_has_one_owner_whatever_happens() {
    let first = from_environment("PAGEFERRY_HARNESS_SEED").unwrap_or(FIRST_SEED);
    let runs = from_environment("PAGEFERRY_HARNESS_RUNS").unwrap_or(RUNS);
    println!("{runs} runs from PAGEFERRY_HARNESS_SEED={first}");
    let (next, summary, began) = (AtomicU64::new(0), Mutex::new(Summary::default()), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from).min(4) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= runs {
                        return;
                    }
                    let plan = Plan::of(first.wrapping_add(i), has_room_to_take());
                    let (since, told) = (Instant::now(), Told(&plan));
                    let outcome = run(&plan);
                    std::mem::forget(told);
                    summary.lock().unwrap().add(outcome, since.elapsed());
                }
            });
        }
    });
    let summary = summary.into_inner().unwrap();
    println!("{runs} runs in {:?}, the slowest {:?}", began.elapsed(), summary.slowest);
    summary.print();
}

/// Says how to have a run again that panics.
struct Told<'a>(&'a Plan);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        println!(
            "{:#?}\nreplay with: PAGEFERRY_HARNESS_SEED={} PAGEFERRY_HARNESS_RUNS=1 cargo test --test ownership",
            self.0, self.0.seed
        );
    }
}
