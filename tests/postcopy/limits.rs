//! What postcopy takes of a link: pages are encoded as in precopy, and the limit of bandwidth holds.

use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::vm::{Spec, Vm, World, have_kvm, prove};

/// Memory of the guests here.
const MEM: u64 = 64 << 20;

/// A quiet guest in memory of text, which a fast level brings to less than half; `None`, with the reason printed, without KVM.
pub(crate) fn quiet(world: &World) -> Option<Spec> {
    if !have_kvm() {
        println!("skipped: no KVM, without which memory has no content");
        return None;
    }
    let path = world.path("content");
    std::fs::write(&path, include_bytes!("../../docs/design.md")).unwrap();
    let spec = Spec { mem_mib: MEM >> 20, working_set: 1 << 20, rate: 500, ..Spec::counter() };
    Some(spec.with(&["--memory", "memfd", "--content", path.to_str().unwrap()]))
}

/// Moves it with nothing sent before it runs there; returns the reports of both sides.
fn moves(name: &str, request: &Value) -> Option<[Value; 2]> {
    let world = World::new();
    let spec = quiet(&world)?;
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    source.begin_migration(&uri, request);
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{name}: {report}");
    prove(&spec, &[&source, &destination]);
    Some([report, completed(&destination)])
}

fn completed(vm: &Vm) -> Value {
    wait_for("it is done there, too", PATIENCE, || {
        let report = vm.status()["migration"].clone();
        (report["status"] == "completed").then_some(report)
    })
}

fn number(report: &Value, field: &str) -> u64 {
    report["postcopy"][field].as_u64().unwrap_or_else(|| panic!("no {field}: {report}"))
}

#[test]
fn pages_that_shrink_take_less_of_the_wire_and_the_limit_is_kept() {
    let rate = 10_000_000;
    let request = |codec| json!({"codec": codec, "bandwidth": rate, "postcopy_after_rounds": 0});
    let mut wire = Vec::new();
    for codec in ["raw", "zstd:1", "auto"] {
        let Some(reports) = moves(codec, &request(codec)) else { return };
        for report in &reports {
            let (sent, logical) = (number(report, "wire_bytes"), number(report, "logical_bytes"));
            assert_eq!(logical, 4096 * number(report, "pages"), "{codec}: {report}");
            let ways = ["zero", "compressed", "raw"].map(|way| number(report, way));
            assert_eq!(ways.iter().sum::<u64>(), number(report, "pages"), "{codec}: {report}");
            match codec {
                "raw" => assert!(ways[1] == 0 && sent >= ways[2] * 4096, "{report}"),
                _ => assert!(ways[1] > 4 * ways[2] && sent < logical / 2, "{codec}: {report}"),
            }
        }
        let report = &reports[0];
        assert_eq!(report["bandwidth_limit"], rate, "{report}");
        // What the guest asks for does not wait; nor does a frame of each connection, before the debt is there.
        let seconds = report["postcopy"]["drain_ms"].as_f64().unwrap() / 1e3;
        let asked = number(report, "faults") * 5000;
        let most = rate as f64 * (seconds + 0.1) + asked as f64 + 2e6;
        let sent = number(report, "wire_bytes");
        assert!((sent as f64) < most, "{codec}: {sent} bytes, at most {most}: {report}");
        wire.push(sent);
    }
    assert!(wire[1] < wire[0] / 2 && wire[2] < wire[0] / 2, "{wire:?}");
}

#[test]
fn the_limit_is_changed_while_pages_follow() {
    let world = World::new();
    let Some(spec) = quiet(&world) else { return };
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    // It would take more than a minute.
    let slow = json!({"codec": "raw", "bandwidth": 1_000_000, "postcopy_after_rounds": 0});
    source.begin_migration(&uri, &slow);
    destination.wait_state("running");
    let before = wait_for("pages follow", PATIENCE, || {
        source.status()["migration"]["postcopy"]["pages_left"].as_u64()
    });
    assert!(before > MEM / 4096 / 2, "{before} pages left");
    let set = source.ctl(&["set", "--bandwidth", "0"]);
    assert_eq!(set.code, Some(0), "{set:?}");
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert!(report["bandwidth_limit"].is_null(), "{report}");
    prove(&spec, &[&source, &destination]);
}
