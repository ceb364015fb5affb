//! Every kind of guest and of memory arrives whole.

use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::huge_pages::HugePages;
use crate::vm::{Spec, Vm, World, have_kvm, pageferry, prove};

/// Moves a guest by postcopy that begins at once, and looks at what both sides report.
fn moves(spec: &Spec, more: &Value) {
    let world = World::new();
    let source = world.source("a", spec);
    let (destination, uri) = world.destination("b", spec);
    let mut request = json!({"postcopy_after_rounds": 0});
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    source.begin_migration(&uri, &request);
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{spec:?}: {report}");
    check(spec, &report);
    assert_eq!(source.state(), "migrated");
    assert_eq!(destination.state(), "running");
    check(spec, &wait_completed(&destination));
    prove(spec, &[&source, &destination]);
}

/// Waits until the destination says that it is done, too.
fn wait_completed(destination: &Vm) -> Value {
    wait_for("the destination is done", PATIENCE, || {
        let report = destination.status()["migration"].clone();
        (report["status"] == "completed").then_some(report)
    })
}

fn check(spec: &Spec, report: &Value) {
    let post = &report["postcopy"];
    assert!(post["pages"].as_u64().is_some_and(|n| n > 0), "{spec:?}: {report}");
    assert_eq!(post["pages_left"], 0, "{spec:?}: {report}");
    assert_eq!(post["damaged"], 0, "{spec:?}: {report}");
    assert_eq!(post["resent"], 0, "{spec:?}: {report}");
    // A small guest may never have waited.
    let (faults, blocked) = (post["faults"].as_u64().unwrap(), post["blocked_ms"].as_f64().unwrap());
    assert_eq!(faults > 0, blocked > 0.0, "{spec:?}: {report}");
    assert!(blocked.is_sign_positive(), "{spec:?}: {report}");
    let of_waits = |field| post[field].as_u64();
    assert!(of_waits("fault_p50_us").unwrap() <= of_waits("fault_p99_us").unwrap(), "{spec:?}: {report}");
    // The source is not told.
    let longest = of_waits("fault_max_us");
    assert!(longest.is_none() || longest >= of_waits("fault_p99_us"), "{spec:?}: {report}");
    assert_eq!(report["verified"], true, "{spec:?}: {report}");
}

#[test]
fn every_kind_of_memory() {
    for memory in ["memfd", "anon", "anon4k"] {
        moves(&Spec::counter().with(&["--memory", memory]), &json!({}));
    }
}

#[test]
fn huge_pages_from_hugetlbfs() {
    let Some(_reserve) = HugePages::reserve(2 * 64 / 2 + 8) else { return };
    moves(&Spec::counter().with(&["--memory", "hugetlb"]), &json!({}));
}

#[test]
fn every_number_of_vcpus_and_of_streams() {
    for (cpus, streams) in [(1, 1), (2, 4), (4, 2), (8, 16)] {
        let spec = Spec { cpus, working_set: 16 << 20, ..Spec::counter() };
        moves(&spec.with(&["--memory", "memfd"]), &json!({"streams": streams}));
    }
}

#[test]
fn every_tracker() {
    for tracker in ["bitmap", "ring", "uffd"] {
        let spec = Spec { cpus: 2, ..Spec::counter() };
        moves(&spec.with(&["--memory", "memfd", "--tracker", tracker]), &json!({}));
    }
}

#[test]
fn a_process_without_kvm() {
    for memory in ["memfd", "anon"] {
        let spec = Spec { cpus: 2, kvm: false, ..Spec::counter() };
        moves(&spec.with(&["--memory", memory]), &json!({}));
    }
}

#[test]
fn a_guest_that_writes_flat_out() {
    let spec = Spec { cpus: 2, rate: 0, working_set: 32 << 20, ..Spec::counter() };
    moves(&spec.with(&["--memory", "memfd"]), &json!({}));
}

#[test]
fn after_some_rounds_only_the_rest_is_missing() {
    // It dirties more than can ever be sent within a downtime of nothing.
    let spec =
        Spec { cpus: 2, rate: 0, working_set: 16 << 20, ..Spec::counter() }.with(&["--memory", "memfd"]);
    let world = World::new();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    source.begin_migration(&uri, &json!({"downtime_limit_ms": 0, "postcopy_after_rounds": 3}));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert!(report["rounds"].as_u64().is_some_and(|n| n > 3), "{report}");
    check(&spec, &report);
    // What was not written again is not missing: the guest's page tables and code at least.
    let missing = report["postcopy"]["pages"].as_u64().unwrap();
    assert!(missing < report["logical_bytes"].as_u64().unwrap() / 4096, "{report}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn out_of_time_in_the_first_pass() {
    let spec =
        Spec { mem_mib: 256, working_set: 96 << 20, rate: 0, ..Spec::counter() }.with(&["--memory", "memfd"]);
    let world = World::new();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    prove(&spec, &[&source]);
    // Raw, for what this guest writes shrinks to nothing.
    let limits = ["--codec", "raw", "--bandwidth", "5MB/s", "--timeout", "1"];
    let args = [&["migrate", &uri][..], &limits, &["--on-timeout", "postcopy", "--json"]].concat();
    let ended = source.ctl(&args);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    check(&spec, &ended.json());
    prove(&spec, &[&source, &destination]);
}

#[test]
fn a_guest_goes_on_from_where_it_came_to() {
    let world = World::new();
    let spec = Spec { cpus: 2, ..Spec::counter() }.with(&["--memory", "memfd"]);
    let first = world.source("a", &spec);
    let (second, uri) = world.destination("b", &spec);
    first.begin_migration(&uri, &json!({"postcopy_after_rounds": 0}));
    assert_eq!(first.wait_migration(PATIENCE)["status"], "completed");
    let (third, uri) = world.destination("c", &spec);
    wait_completed(&second);
    second.begin_migration(&uri, &json!({"postcopy_after_rounds": 0}));
    assert_eq!(second.wait_migration(PATIENCE)["status"], "completed");
    prove(&spec, &[&first, &second, &third]);
}

#[test]
fn the_demo_proves_it() {
    let mut args = vec!["demo", "--json", "--postcopy", "--mem", "64M", "--working-set", "8M", "--cpus", "2"];
    if !have_kvm() {
        args.push("--no-kvm");
    }
    let ended = pageferry(&args, PATIENCE);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!((&report["status"], &report["verified"]), (&"completed".into(), &true.into()), "{report}");
    assert!(report["postcopy"]["pages"].as_u64().is_some_and(|n| n > 0), "{report}");
    assert!(report["downtime_ms"].as_f64().is_some_and(|n| n < 1000.0), "{report}");
}
