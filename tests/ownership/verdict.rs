//! Who has the guest after a run, and whether that may be.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::faults::Hand;
use crate::proxy::By;
use crate::vm::{PATIENCE, Spec, Vm, prove, wait_for};

/// How long a source may ask what became of its handover while its destination could still answer.
const ASKING: Duration = Duration::from_secs(8);

/// The state of a VM, unless its process has ended.
fn state(vm: &Vm) -> Option<String> {
    // A process that ends between the two is asked once more.
    wait_for("it answers or has ended", PATIENCE, || match vm.ask(&json!({"execute": "status"})) {
        Ok(status) => Some(Some(status["state"].as_str().unwrap_or("?").to_owned())),
        Err(_) => vm.exited().map(|_| None),
    })
}

/// Waits until the source knows what became of its migration, has given up asking for it, or is gone.
pub(crate) fn settle(source: &Vm, destination: &Vm, hand: &Hand) {
    let mut unknown = None;
    let mut told = Some(Instant::now() + PATIENCE - Duration::from_secs(1));
    wait_for("the source's migration settles", PATIENCE, || {
        if hand.is_busy() {
            return None;
        }
        if source.exited().is_some() {
            return Some(());
        }
        let status = source.ask(&json!({"execute": "status"})).ok()?;
        if told.take_if(|at| Instant::now() > *at).is_some() {
            println!("the source says, still: {status}");
        }
        match status["migration"]["status"].as_str().unwrap_or("none") {
            "completed" | "failed" | "cancelled" | "postcopy-lost" => Some(()),
            // It keeps the pages of a guest that can never ask for them, for as long as nobody ends it.
            "postcopy-active" | "postcopy-paused" if destination.exited().is_none() => {
                unknown = None;
                None
            }
            "unknown" | "postcopy-active" | "postcopy-paused" => {
                let since: &Instant = unknown.get_or_insert_with(Instant::now);
                (since.elapsed() > ASKING).then_some(())
            }
            // It never heard of the migration: it was killed or frozen just then.
            _ => {
                unknown = None;
                None
            }
        }
    });
}

/// The guest has one owner, or none where there is nobody left to have it; and it is whole. Says how it ended.
pub(crate) fn judge(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand) -> String {
    let end = match state(source).as_deref() {
        Some("running") => at_source(spec, source, destination),
        Some("migrated") => at_destination(spec, source, destination, hand, "migrated"),
        Some("unknown") => unknown(spec, source, destination, hand),
        Some("postcopy") => in_postcopy(source, destination, hand),
        None => without_source(spec, source, destination, hand),
        Some(other) => panic!("the source is {other} after {}", hand.deeds()),
    };
    assert!(end != "runs on at the source" || !hand.killed(By::Source), "a killed process runs a guest");
    end
}

/// It runs on at the source: the destination never ran it, and does not.
fn at_source(spec: &Spec, source: &Vm, destination: &Vm) -> String {
    prove(spec, &[source]);
    assert!(destination.serial().is_empty(), "the destination ran a guest that the source kept");
    if let Some(state) = state(destination) {
        assert_eq!(state, "incoming", "the destination has a guest that the source kept");
    }
    "runs on at the source".into()
}

/// It was handed over before its pages, which the source keeps: the destination is gone, and the guest with it.
fn in_postcopy(source: &Vm, destination: &Vm, hand: &Hand) -> String {
    assert!(hand.killed(By::Destination), "a destination with a guest ended: {}", destination.errors());
    stands(source);
    "killed with the destination before all its pages were there; the source keeps them".into()
}

/// It was handed over: the destination runs it, unless it was killed later.
fn at_destination(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand, what: &str) -> String {
    match state(destination) {
        Some(state) => {
            assert_eq!(state, "running", "the source is {what} after {}", hand.deeds());
            prove(spec, &[source, destination]);
            format!("runs at the destination; the source is {what}")
        }
        None => {
            assert!(
                hand.killed(By::Destination),
                "a destination with a guest ended: {}",
                destination.errors()
            );
            stands(source);
            format!("killed with the destination; the source is {what}")
        }
    }
}

/// The source does not know, and does not run it.
fn unknown(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand) -> String {
    stands(source);
    if !destination.serial().is_empty() {
        return at_destination(spec, source, destination, hand, "unknown");
    }
    // A destination that runs it has printed by now, or will; one that never will has ended.
    if let Some(state) = state(destination) {
        if state == "running" {
            return at_destination(spec, source, destination, hand, "unknown");
        }
        assert_eq!(state, "incoming", "after {}", hand.deeds());
        let code = destination.wait_exit(PATIENCE).code();
        assert_eq!(code, Some(1), "a destination that gives up says so: {}", destination.errors());
        assert!(destination.serial().is_empty(), "a destination that gave up ran the guest");
    }
    // Somebody has looked, and decides.
    let resumed = source.ctl(&["resume", "--force"]);
    if resumed.err.contains("needs the pages that are still here") {
        return in_postcopy(source, destination, hand);
    }
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    prove(spec, &[source]);
    "unknown at the source, the destination gone without it; resumed by force".into()
}

/// The source is gone: the destination runs the guest if it was told to, and else never does.
fn without_source(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand) -> String {
    assert!(hand.killed(By::Source), "the source ended: {}", source.errors());
    let became = wait_for("the destination runs it or does not", PATIENCE, || {
        let Ok(status) = destination.ask(&json!({"execute": "status"})) else {
            return destination.exited().map(|_| Became::Nothing);
        };
        match (status["state"].as_str(), status["migration"]["status"].as_str()) {
            (Some("crashed"), _) => Some(Became::Lost),
            // Pages are missing: it waits for a source that never comes, and then stops the guest for good.
            (Some("running"), Some("postcopy-active" | "postcopy-paused" | "postcopy-lost")) => None,
            (Some("running"), _) => Some(Became::Running),
            // It listens, since no session had begun, or still waits.
            (_, Some("none")) => Some(Became::Nothing),
            _ => None,
        }
    });
    match became {
        Became::Running => {
            prove(spec, &[source, destination]);
            return "runs at the destination; the source was killed".into();
        }
        Became::Lost => {
            stands(destination);
            return "stopped for good at the destination; the source was killed with its pages".into();
        }
        Became::Nothing => {}
    }
    if hand.killed(By::Destination) {
        return "killed with both".into();
    }
    assert!(destination.serial().is_empty(), "without GO the destination ran the guest");
    "killed with the source".into()
}

/// What became of a guest at a destination without a source.
enum Became {
    Running,
    /// It ran before all its pages were there, and was stopped.
    Lost,
    Nothing,
}

/// The guest does not run here.
fn stands(vm: &Vm) {
    let printed = vm.serial().len();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.serial().len(), printed, "a guest runs that must not");
}
