//! From READY on: every message of the handover lost, cut or kept back, and either side killed around GO. Whoever may run the guest
//! runs it, once; whoever may not, does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use pageferry::transport::wire::Role;
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{Spec, Vm, World, prove, send_signal, stop_process};

/// Whether this is the message with that name on the control connection.
fn is(seen: &Seen<'_>, name: &str) -> bool {
    matches!(seen, Seen::Message { role: Role::Control, message, .. } if message.name() == name)
}

/// A migration on whose way something happens by a rule, and which must come to its end all the same.
fn arrives(what: &str, more: &[&str], rule: impl Fn(&Seen<'_>) -> Verdict + Send + Sync + 'static) {
    let world = World::new();
    let spec = Spec { cpus: 2, ..Spec::counter() };
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = Proxy::new(&uri, rule);
    let uri = proxy.uri();
    let mut args = vec!["migrate", &uri, "--json"];
    args.extend(more);
    let ended = source.ctl(&args);
    assert_eq!(ended.code, Some(0), "{what}: {ended:?}");
    assert_eq!(ended.json()["status"], "completed", "{what}");
    assert!(ended.json().get("error").is_none(), "{what}: {ended:?}");
    assert_eq!(source.state(), "migrated", "{what}");
    assert_eq!(destination.state(), "running", "{what}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn running_cut_is_learnt_by_asking() {
    arrives("RUNNING cut", &[], |seen| if is(seen, "RUNNING") { Verdict::Cut } else { Verdict::Pass });
}

#[test]
fn running_lost_is_learnt_by_asking() {
    arrives("RUNNING lost", &["--link-timeout", "1"], |seen| {
        if is(seen, "RUNNING") { Verdict::Lose } else { Verdict::Pass }
    });
}

#[test]
fn go_cut_is_said_again() {
    arrives("GO cut", &[], |seen| if is(seen, "GO") { Verdict::Cut } else { Verdict::Pass });
}

#[test]
fn go_lost_is_said_again() {
    arrives(
        "GO lost",
        &["--link-timeout", "1"],
        |seen| if is(seen, "GO") { Verdict::Lose } else { Verdict::Pass },
    );
}

#[test]
fn go_and_every_first_answer_cut() {
    let queries = AtomicU32::new(0);
    let (go, status, running) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    arrives("everything cut once or twice", &[], move |seen| {
        let first = |counter: &AtomicU32, times| counter.fetch_add(1, Ordering::Relaxed) < times;
        let cut = match seen {
            Seen::Open { role: Role::Query, .. } => first(&queries, 1),
            Seen::Message { message, .. } => match message.name() {
                "GO" => first(&go, 2),
                "STATUS" => first(&status, 1),
                "RUNNING" => first(&running, 1),
                _ => false,
            },
            _ => false,
        };
        if cut { Verdict::Cut } else { Verdict::Pass }
    });
}

/// The source waits, paused, in state `unknown`, and does not let itself be resumed without force.
fn waits_unknown(source: &Vm) {
    source.wait_state("unknown");
    let printed = source.serial();
    let refused = source.ctl(&["resume"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.err.contains("not confirmed") && refused.err.contains("--force"), "{refused:?}");
    let refused = source.ctl(&["migrate", "tcp:127.0.0.1:9"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(source.state(), "unknown");
    assert_eq!(source.serial().len(), printed.len(), "the source ran a guest that it had handed over");
}

#[test]
fn a_source_that_cannot_ask_waits_until_it_can() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let gone = Arc::new(AtomicBool::new(true));
    let cut = gone.clone();
    let proxy = Proxy::new(&uri, move |seen| match seen {
        Seen::Open { role: Role::Query, .. } if cut.load(Ordering::Relaxed) => Verdict::Cut,
        seen if is(seen, "RUNNING") => Verdict::Cut,
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({}));
    waits_unknown(&source);
    prove(&spec, &[&source, &destination]);
    waits_unknown(&source);
    gone.store(false, Ordering::Relaxed);
    source.wait_state("migrated");
    prove(&spec, &[&source, &destination]);
}

/// GO is lost, and the destination gives up before anybody can ask it: the source hears so, and its guest runs on.
#[test]
fn a_guest_that_the_destination_gave_up_runs_on() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let patient = ["--handover-timeout", "1", "--reconnect-timeout", "1", "--link-timeout", "60"];
    let (destination, uri) = world.destination("b", &spec.clone().with(&patient));
    let gone = Arc::new(AtomicBool::new(true));
    let cut = gone.clone();
    let proxy = Proxy::new(&uri, move |seen| match seen {
        Seen::Open { role: Role::Query, .. } if cut.load(Ordering::Relaxed) => Verdict::Cut,
        seen if is(seen, "GO") => Verdict::Cut,
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({}));
    waits_unknown(&source);
    wait_for("the destination gives up", PATIENCE, || {
        destination.errors().contains("its source is answered").then_some(())
    });
    waits_unknown(&source);
    gone.store(false, Ordering::Relaxed);
    source.wait_state("running");
    let status = source.status();
    assert_eq!(status["migration"]["status"], "failed", "{status}");
    let error = status["migration"]["error"].to_string();
    assert!(error.contains("runs on at the source") && error.contains("gave the session up"), "{error}");
    // Its purpose is over, long before it would answer no more.
    assert!(!wait_for("the destination ends", PATIENCE, || destination.exited()).success());
    assert!(destination.serial().is_empty());
    prove(&spec, &[&source]);
}

#[test]
fn destination_killed_before_go_reaches_it_leaves_the_choice_to_the_user() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let pid = destination.pid();
    let proxy = Proxy::new(&uri, move |seen| {
        if !is(seen, "GO") {
            return Verdict::Pass;
        }
        send_signal(pid, libc::SIGKILL);
        Verdict::Cut
    });
    source.begin_migration(&proxy.uri(), &json!({}));
    waits_unknown(&source);
    destination.kill();
    assert!(destination.serial().is_empty());
    // Another destination in its place cannot answer for it.
    drop(proxy);
    let other = Vm::start(&world, "c", &spec, Some(&uri));
    std::thread::sleep(Duration::from_millis(500));
    waits_unknown(&source);
    assert_eq!(other.state(), "incoming");
    let resumed = source.ctl(&["resume", "--force"]);
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    assert_eq!(source.state(), "running");
    prove(&spec, &[&source]);
    // It is whole, and can be moved.
    let ended = source.ctl(&["migrate", &uri]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    prove(&spec, &[&source, &other]);
}

#[test]
fn cancelling_the_question_leaves_the_state_unknown() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let pid = destination.pid();
    let proxy = Proxy::new(&uri, move |seen| {
        if is(seen, "READY") {
            // READY goes on; what the source answers to it finds nobody.
            stop_process(pid);
        }
        Verdict::Pass
    });
    source.begin_migration(&proxy.uri(), &json!({"link_timeout_s": 1}));
    source.wait_state("unknown");
    let cancelled = source.ctl(&["cancel"]);
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    waits_unknown(&source);
    // The user looks, finds a destination that hangs, ends it, and only then takes the guest back.
    destination.kill();
    assert!(destination.serial().is_empty());
    let resumed = source.ctl(&["resume", "--force"]);
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    prove(&spec, &[&source]);
}

#[test]
fn source_killed_after_go_leaves_the_guest_at_the_destination() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let pid = source.pid();
    let proxy = Proxy::new(&uri, move |seen| {
        if is(seen, "RUNNING") && matches!(seen, Seen::Message { by: By::Destination, .. }) {
            send_signal(pid, libc::SIGKILL);
            return Verdict::Cut;
        }
        Verdict::Pass
    });
    source.begin_migration(&proxy.uri(), &json!({}));
    source.wait_exit(PATIENCE);
    destination.wait_state("running");
    prove(&spec, &[&source, &destination]);
    // It is a VM like any other at once, whether or not a source may still ask.
    let (next, uri) = world.destination("c", &spec);
    let ended = destination.ctl(&["migrate", &uri]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    prove(&spec, &[&source, &destination, &next]);
}

#[test]
fn a_paused_guest_whose_go_is_cut_arrives_paused() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    assert_eq!(source.ctl(&["pause"]).code, Some(0));
    let (destination, uri) = world.destination("b", &spec);
    let proxy = Proxy::new(&uri, |seen| if is(seen, "GO") { Verdict::Cut } else { Verdict::Pass });
    let ended = source.ctl(&["migrate", &proxy.uri()]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    wait_for("it is there", PATIENCE, || (destination.state() == "paused").then_some(()));
    assert!(destination.serial().is_empty());
    assert_eq!(destination.ctl(&["resume"]).code, Some(0));
    prove(&spec, &[&source, &destination]);
}
