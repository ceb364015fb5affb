//! Who has the guest after a run, and whether that may be.

use std::time::{Duration, Instant};

use pageferry::vmm_shim;
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::faults::Hand;
use crate::proxy::By;
use crate::vm::{Spec, Vm, prove};

/// The exit code of a process whose guest's memory could not be had.
const ROOM_EXIT: i32 = vmm_shim::lost_room::EXIT_CODE;
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

/// Whether a VM's guest has stopped for good.
fn crashed(vm: &Vm) -> bool {
    vm.ask(&json!({"execute": "status"})).is_ok_and(|status| status["state"] == "crashed")
}

/// Why a VM's guest has stopped for good.
fn reason(vm: &Vm) -> String {
    wait_for("it says why its guest is lost", PATIENCE, || {
        let status = vm.status();
        let why = status["reason"].as_str()?;
        // The first word, before the session's thread has said more.
        (!why.contains("were missing and never came")).then(|| why.to_owned())
    })
}

/// A guest is lost by nature where its memory cannot be had, as by a kill: it has stopped for good, or its process has ended where the
/// guest is threads of it. Whoever ends by anything else breaks the rules.
fn must_be_lost_for_want_of_room(spec: &Spec, vm: &Vm, side: By, hand: &Hand) {
    let (code, text) = match vm.exited() {
        None => (None, reason(vm)),
        Some(status) => (status.code(), vm.errors()),
    };
    let words = ["could not be had", "cannot be brought in"];
    let says_so = text.contains("file system") && words.iter().any(|words| text.contains(words));
    let may_end = vm.exited().is_none() || (!spec.kvm && code == Some(ROOM_EXIT));
    assert!(
        hand.took_room(side) && says_so && may_end,
        "{side:?} lost its guest ({:?}) after {}: {text}",
        vm.exited(),
        hand.deeds()
    );
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
            "postcopy-active" | "postcopy-paused"
                if destination.exited().is_none() && !crashed(destination) =>
            {
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
        Some("running") => at_source(spec, source, destination, hand),
        Some("crashed") => lost_at_source(spec, source, destination, hand),
        Some("migrated") => at_destination(spec, source, destination, hand, "migrated"),
        Some("unknown") => unknown(spec, source, destination, hand),
        Some("postcopy") => in_postcopy(spec, source, destination, hand),
        None if hand.killed(By::Source) => without_source(spec, source, destination, hand),
        None => lost_at_source(spec, source, destination, hand),
        Some(other) => panic!("the source is {other} after {}", hand.deeds()),
    };
    let runs_on = end.starts_with("runs on at the source");
    assert!(!runs_on || !hand.killed(By::Source), "a killed process runs a guest");
    end
}

/// It runs on at the source: the destination never ran it, and does not.
fn at_source(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand) -> String {
    prove(spec, &[source]);
    never_ran(destination, hand);
    let error = source.status()["migration"]["error"].as_str().unwrap_or_default().to_owned();
    let want = if error.contains("the file system of") { "; the destination had no room" } else { "" };
    format!("runs on at the source{want}")
}

/// The guest did not run at the destination, and does not: that waits for one, or gave it up in order.
fn never_ran(destination: &Vm, hand: &Hand) {
    assert!(destination.serial().is_empty(), "the destination ran a guest that it never got");
    match state(destination) {
        Some(state) => assert_eq!(state, "incoming", "the destination has a guest that it never got"),
        None if hand.killed(By::Destination) => {}
        None => {
            let code = destination.wait_exit(PATIENCE).code();
            assert_eq!(code, Some(1), "a destination that gives up says so: {}", destination.errors());
        }
    }
}

/// Its own memory could not be had at the source, which then handed nothing over.
fn lost_at_source(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand) -> String {
    must_be_lost_for_want_of_room(spec, source, By::Source, hand);
    stands(source);
    never_ran(destination, hand);
    "lost at the source for want of room".into()
}

/// It was handed over before its pages, which the source keeps: the destination is gone, and the guest with it.
fn in_postcopy(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand) -> String {
    stands(source);
    let when = "before all its pages were there; the source keeps them";
    format!("{} {when}", lost_with_destination(spec, destination, hand))
}

/// The destination had the guest, and has not.
fn lost_with_destination(spec: &Spec, destination: &Vm, hand: &Hand) -> &'static str {
    if destination.exited().is_some() && hand.killed(By::Destination) {
        return "killed with the destination";
    }
    must_be_lost_for_want_of_room(spec, destination, By::Destination, hand);
    stands(destination);
    "lost at the destination for want of room"
}

/// It was handed over: the destination runs it, unless it was killed later.
fn at_destination(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand, what: &str) -> String {
    match state(destination).as_deref() {
        Some("running") => {
            prove(spec, &[source, destination]);
            format!("runs at the destination; the source is {what}")
        }
        None | Some("crashed") => {
            stands(source);
            format!("{}; the source is {what}", lost_with_destination(spec, destination, hand))
        }
        Some(other) => panic!("the destination is {other} and the source {what} after {}", hand.deeds()),
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
        if state == "running" || state == "crashed" {
            return at_destination(spec, source, destination, hand, "unknown");
        }
        assert_eq!(state, "incoming", "after {}", hand.deeds());
    }
    let killed = hand.killed(By::Destination);
    let gave_up = destination.wait_exit(PATIENCE).code() == Some(1) && !killed;
    if !gave_up && !killed {
        must_be_lost_for_want_of_room(spec, destination, By::Destination, hand);
    }
    assert!(destination.serial().is_empty(), "a destination that gave up ran the guest");
    // Somebody has looked, and decides.
    let resumed = source.ctl(&["resume", "--force"]);
    let refused = resumed.err.contains("needs the pages that are still here");
    if refused && gave_up {
        // It was not heard that the guest never ran there, which it may do for all the source knows.
        return "unknown at the source, the destination gone without it; in postcopy, and paused".into();
    }
    if refused {
        return in_postcopy(spec, source, destination, hand);
    }
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    prove(spec, &[source]);
    "unknown at the source, the destination gone without it; resumed by force".into()
}

/// The source is gone: the destination runs the guest if it was told to, and else never does.
fn without_source(spec: &Spec, source: &Vm, destination: &Vm, hand: &Hand) -> String {
    let became = wait_for("the destination runs it or does not", PATIENCE, || {
        let Ok(status) = destination.ask(&json!({"execute": "status"})) else {
            return destination.exited().map(|status| match status.code() {
                Some(ROOM_EXIT) => Became::Lost,
                _ => Became::Nothing,
            });
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
        Became::Lost
            if destination.exited().is_some() || !reason(destination).contains("was not heard of for") =>
        {
            let end = lost_with_destination(spec, destination, hand);
            return format!("{end}; the source was killed");
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
    /// It ran before all its pages were there, and was stopped; or its memory could not be had.
    Lost,
    Nothing,
}

/// The guest does not run here.
fn stands(vm: &Vm) {
    let printed = vm.serial().len();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.serial().len(), printed, "a guest runs that must not");
}
