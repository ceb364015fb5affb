//! What is left of the memory that a migration took.

use std::time::{Duration, Instant};

use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::vm::{Spec, Vm, World};

/// Has the C library keep all that is freed in one place, also the largest buffers, and take it back only when it is told to.
const KEEPS_ALL: &[(&str, &str)] = &[(
    "GLIBC_TUNABLES",
    "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296",
)];

/// Bytes of one kind that a process has in memory: `RssAnon`, its own, or `RssShmem`, here a guest's.
fn resident(vm: &Vm, kind: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

fn anonymous(vm: &Vm) -> u64 {
    resident(vm, "RssAnon")
}

/// Far above what a process has grown by afterwards (0.6 MiB), and far below that where nothing is given back (58 MiB at least).
const GROWN_MAX: u64 = 6 << 20;

/// A process has grown by little since, or will have soon: it says first that it is done.
fn assert_hardly_grown(name: &str, vm: &Vm, before: u64) {
    let began = Instant::now();
    loop {
        let grown = anonymous(vm).saturating_sub(before);
        if grown < GROWN_MAX {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "the {name} keeps {grown} bytes");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn memory_that_a_migration_took_goes_back_to_the_host() {
    let spec = Spec { kvm: false, working_set: 32 << 20, rate: 0, ..Spec::counter() };
    let spec = Spec { environment: KEEPS_ALL, ..spec }.with(&["--memory", "memfd"]);
    let world = World::new();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    wait_for("its pages are written", PATIENCE, || {
        (resident(&source, "RssShmem") >= spec.working_set).then_some(())
    });
    let [before_source, before_destination] = [&source, &destination].map(anonymous);
    // Each stream has its buffers, and deltas begin from pages that are kept.
    source.begin_migration(&uri, &json!({"codec": "delta", "streams": 64, "max_rounds": 4}));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert_hardly_grown("source", &source, before_source);
    assert_hardly_grown("destination", &destination, before_destination);
}

/// Migrations that are cancelled before anything is looked at, and those after which nothing may have grown since.
const FIRST: usize = 10;
const THEN: usize = 20;

/// Begins a migration, and cancels it when some of its pages have arrived: more, or fewer.
fn begin_and_cancel(world: &World, spec: &Spec, source: &Vm, number: usize) {
    let (destination, uri) = world.destination(&format!("b{number}"), spec);
    source.begin_migration(
        &uri,
        &json!({"streams": 32, "codec": "delta", "bandwidth": 200_000_000, "downtime_limit_ms": 0}),
    );
    let sent = (1 + number as u64 % 8) << 20;
    wait_for("some of it was sent", PATIENCE, || {
        source.status()["migration"]["wire_bytes"].as_u64().filter(|&bytes| bytes >= sent)
    });
    source.ask(&json!({"execute": "cancel"})).unwrap();
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "cancelled", "{report}");
    destination.wait_exit(PATIENCE);
}

/// A source keeps nothing of the migrations that came to nothing, however many.
#[test]
fn a_source_does_not_grow_by_migrations_that_are_cancelled() {
    let spec = Spec { working_set: 32 << 20, ..Spec::counter() }.with(&["--memory", "memfd"]);
    let world = World::new();
    let source = world.source("a", &spec);
    for number in 0..FIRST {
        begin_and_cancel(&world, &spec, &source, number);
    }
    let before = anonymous(&source);
    let mut most = 0;
    for number in FIRST..FIRST + THEN {
        begin_and_cancel(&world, &spec, &source, number);
        assert_hardly_grown("source", &source, before);
        most = most.max(anonymous(&source));
    }
    println!("{before} bytes after {FIRST} migrations, at most {most} after any of {THEN} more");
}
