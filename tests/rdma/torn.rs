//! Pages that are written while an adapter reads them.

use crate::ends::every_page_is_torn;
use crate::{demo, device, device_or_skip, kvm_or_skip, turn};

#[test]
fn ten_thousand_torn_pages_do_not_survive() {
    let address = device_or_skip!();
    let _turn = turn();
    for streams in [1, 4] {
        // Where the window is full, a page may be on its way before it is written: so there are some more than ten thousand.
        let (torn, _) = every_page_is_torn(&format!("rdma:{address}:0"), streams, 56, true);
        assert!(torn >= 10_000, "only {torn} torn");
    }
}

/// `PAGEFERRY_TEST_RUNS` says how often.
#[test]
fn no_page_torn_by_a_running_guest_survives() {
    let address = device_or_skip!();
    let _turn = turn();
    kvm_or_skip!();
    let runs = std::env::var("PAGEFERRY_TEST_RUNS").map_or(2, |runs| runs.parse().unwrap());
    let mut torn = 0;
    for run in 1..=runs {
        let args = ["--rate", "0", "--working-set", "16M", "--codec", "raw", "--streams", "2"];
        let report = demo(address, &args);
        let passes = &report["passes"];
        println!("run {run}: torn {}, mismatches {}, passes {passes}", report["torn"], report["mismatches"]);
        assert_eq!(report["mismatches"], 0, "{report}");
        torn += report["torn"].as_u64().unwrap();
    }
    println!("{torn} torn in {runs} runs");
}
