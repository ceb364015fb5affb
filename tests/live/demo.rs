//! `pageferry demo` over what it can be asked for: it proves by itself that the guest went on.

use testkit::PATIENCE;

use crate::vm::{World, have_kvm, pageferry};

/// Runs a demo with these arguments and looks at what it reports.
fn demo(args: &[&str]) {
    let world = World::new();
    let unix = format!("unix:{}", world.path("d").display());
    let mut all = vec!["demo", "--json", "--mem", "64M", "--working-set", "4M"];
    all.extend(args.iter().map(|&arg| if arg == "unix" { unix.as_str() } else { arg }));
    if !all.contains(&"--no-kvm") && !have_kvm() {
        all.push("--no-kvm");
    }
    let ended = pageferry(&all, PATIENCE);
    assert_eq!(ended.code, Some(0), "{all:?}: {ended:?}");
    let report = ended.json();
    assert_eq!(report["status"], "completed", "{all:?}: {report}");
    assert_eq!(report["verified"], true, "{all:?}: {report}");
    assert!(report["rounds"].as_u64().is_some_and(|n| n >= 2), "{all:?}: {report}");
    assert_eq!(report["mismatches"], 0, "{all:?}: {report}");
    let passes = report["passes"].as_array().unwrap();
    let cpus = all.iter().position(|&a| a == "--cpus").map_or("1", |at| all[at + 1]);
    assert_eq!(passes.len().to_string(), cpus, "{all:?}: {report}");
    for both in passes {
        assert!(
            both[0].as_u64().is_some_and(|n| n >= 2) && both[1].as_u64().is_some_and(|n| n >= 2),
            "{all:?}: {report}"
        );
    }
}

#[test]
fn every_number_of_vcpus() {
    for cpus in ["1", "2", "4", "8"] {
        demo(&["--cpus", cpus]);
    }
}

#[test]
fn every_number_of_vcpus_without_kvm() {
    for cpus in ["1", "2", "4", "8"] {
        demo(&["--cpus", cpus, "--no-kvm"]);
    }
}

#[test]
fn every_tracker() {
    for tracker in ["bitmap", "ring", "uffd"] {
        demo(&["--cpus", "2", "--tracker", tracker]);
        demo(&["--cpus", "2", "--tracker", tracker, "--uri", "unix"]);
    }
    demo(&["--no-kvm", "--uri", "unix"]);
}

#[test]
fn every_codec() {
    for codec in ["raw", "zstd", "zstd:1", "delta", "auto"] {
        demo(&["--codec", codec]);
        demo(&["--codec", codec, "--uri", "unix", "--no-kvm"]);
    }
}

#[test]
fn any_number_of_streams() {
    for streams in ["1", "2", "16"] {
        demo(&["--cpus", "2", "--streams", streams]);
    }
}

#[test]
fn a_guest_that_writes_flat_out() {
    demo(&["--cpus", "2", "--rate", "0"]);
    demo(&["--cpus", "2", "--rate", "0", "--no-kvm"]);
}
