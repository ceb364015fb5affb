//! Who owns the guest, whatever happens: migrations of a real guest between real processes, in which either process is killed or
//! frozen, or connections are cut, at steps of the protocol that chance chooses. After each run exactly one side runs the guest,
//! or none where that is impossible by nature, and the guest's own chain of sums says that its memory is whole.
//!
//! Half of the runs hand the guest over before its pages (postcopy), and in some a process is starved instead: of descriptors, of address
//! space, or of room for its guest's memory.
//!
//! `PAGEFERRY_HARNESS_RUNS` says how many runs there are (24), `PAGEFERRY_HARNESS_SEED` which is the first (1; `clock` for another one each
//! time). A run that fails says how to have it again: the faults are the same then, though the machine's own timing is not.

#[path = "common/rng.rs"]
mod rng;

#[allow(dead_code, reason = "written for tests that look closer")]
#[path = "live/proxy.rs"]
mod proxy;
#[allow(dead_code, reason = "written for tests that do more with a VM")]
#[path = "live/vm.rs"]
mod vm;

#[path = "ownership/faults.rs"]
mod faults;
#[path = "ownership/verdict.rs"]
mod verdict;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use faults::Plan;
use vm::{Spec, World, have_kvm};

/// Runs, unless `PAGEFERRY_HARNESS_RUNS` says otherwise.
const RUNS: u64 = 24;

/// The first seed, unless `PAGEFERRY_HARNESS_SEED` says otherwise.
const FIRST_SEED: u64 = 1;
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

/// A guest that is small enough to be there in no time.
fn guest(plan: &Plan) -> Spec {
    let spec = Spec { mem_mib: 16, working_set: 1 << 20, kvm: have_kvm(), ..Spec::counter() };
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
        "--memory",
        "memfd",
    ])
}

/// One migration; how it ended.
fn run(plan: &Plan) -> String {
    let world = World::new();
    let spec = guest(plan);
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let hand = faults::Hand::new(&uri, plan, source.pid(), destination.pid());
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
    verdict::judge(&spec, &source, &destination, &hand)
}

#[test]
fn the_guest_has_one_owner_whatever_happens() {
    let first = from_environment("PAGEFERRY_HARNESS_SEED").unwrap_or(FIRST_SEED);
    let runs = from_environment("PAGEFERRY_HARNESS_RUNS").unwrap_or(RUNS);
    println!("{runs} runs from PAGEFERRY_HARNESS_SEED={first}");
    let (next, ends) = (AtomicU64::new(0), Mutex::new(BTreeMap::<String, u32>::new()));
    let (began, slowest) = (Instant::now(), Mutex::new(Duration::ZERO));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from).min(4) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= runs {
                        return;
                    }
                    let plan = Plan::of(first.wrapping_add(i));
                    let (since, told) = (Instant::now(), Told(&plan));
                    let end = run(&plan);
                    std::mem::forget(told);
                    *ends.lock().unwrap().entry(end).or_default() += 1;
                    let mut slowest = slowest.lock().unwrap();
                    *slowest = since.elapsed().max(*slowest);
                }
            });
        }
    });
    println!("{runs} runs in {:?}, the slowest {:?}", began.elapsed(), slowest.lock().unwrap());
    for (end, count) in &*ends.lock().unwrap() {
        println!("{count:5} {end}");
    }
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
