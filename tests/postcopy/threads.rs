//! How the threads that bring pages are scheduled: before a guest that computes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::limits::quiet;
use crate::vm::{Vm, World};

/// Slices that are asked for: where a guest waits, and in bulk.
const URGENT_NS: u64 = 100_000;
const BULK_NS: u64 = 500_000;

/// The slice of each thread of a process, in nanoseconds, by its name; `None` where the kernel does not say.
fn slices(pid: i32) -> Option<BTreeMap<String, u64>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    // A thread may end while it is looked at.
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).ok();
    let texts =
        tasks.filter_map(|task| Some((read(task.path().join("comm"))?, read(task.path().join("sched"))?)));
    texts.map(|(name, text)| Some((name.trim().to_owned(), slice(&text)?))).collect()
}

fn slice(sched: &str) -> Option<u64> {
    let line = sched.lines().find_map(|line| line.strip_prefix("se.slice"))?;
    line.split(':').nth(1)?.trim().parse().ok()
}

/// Whether the kernel takes what it is asked for, as Linux 6.12 and later do.
fn takes_slices() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers =
        |text: &str| text.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok()).collect();
    let version: Vec<u32> = numbers(&release);
    version >= vec![6, 12]
}

#[test]
fn threads_that_bring_pages_have_shorter_slices_than_a_guest() {
    if !takes_slices() || slices(std::process::id() as i32).is_none() {
        return println!("skipped: the kernel takes no slices, or does not show them");
    }
    let world = World::new();
    let Some(spec) = quiet(&world) else { return };
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    // It would take more than a minute.
    let slow = json!({"codec": "raw", "bandwidth": 1_000_000, "streams": 2, "postcopy_after_rounds": 0});
    source.begin_migration(&uri, &slow);
    destination.wait_state("running");
    let bring = [("postcopy-0", URGENT_NS), ("postcopy-1", BULK_NS), ("postcopy-2", BULK_NS)];
    assert_have(&source, &bring);
    assert_have(&destination, &bring);
    assert_have(&destination, &[("faults", URGENT_NS)]);
    let all = slices(destination.pid()).unwrap();
    assert!(all.get("vcpu-0").is_some_and(|&slice| slice > BULK_NS), "{all:?}");
}

/// The threads of these names have these slices, or will soon: they have their names before they ask.
fn assert_have(vm: &Vm, wanted: &[(&str, u64)]) {
    let began = Instant::now();
    loop {
        let all = slices(vm.pid()).unwrap();
        if wanted.iter().all(|(name, slice)| all.get(*name) == Some(slice)) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{wanted:?} are not among {all:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
