//! Around the switch to postcopy: what can be asked for, what is refused, and what is lost with what.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use pageferry::transport::wire::control::Message;
use pageferry::transport::wire::{Role, stream_number};
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{Spec, World, prove};

/// A guest with enough memory that its pages are on their way for a while.
fn large() -> Spec {
    Spec { cpus: 2, mem_mib: 256, working_set: 160 << 20, ..Spec::counter() }.with(&["--memory", "memfd"])
}

/// Holds back every piece of what nobody asks for, while `slow` is set.
fn slowly(slow: &Arc<AtomicBool>) -> impl Fn(&Seen<'_>) -> Verdict + Send + Sync + use<> {
    let slow = slow.clone();
    move |seen| {
        if matches!(seen, Seen::Data { role: Role::Postcopy, stream: 1.., .. })
            && slow.load(Ordering::Relaxed)
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        Verdict::Pass
    }
}

/// The source's word that it knows of the running guest may come when nothing is missing any more. It is not its last.
#[test]
fn a_late_echo_of_running_is_not_the_end() {
    let world = World::new();
    let spec = Spec::counter().with(&["--memory", "memfd"]);
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let late = AtomicBool::new(true);
    let proxy = Proxy::new(&uri, move |seen| {
        let echo = matches!(seen, Seen::Message { by: By::Source, message: Message::Running, .. });
        if echo && late.swap(false, Ordering::Relaxed) {
            std::thread::sleep(Duration::from_secs(1));
        }
        Verdict::Pass
    });
    source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0}));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    // Without ARRIVED the source would have waited for its time-out.
    assert!(report["total_ms"].as_f64().is_some_and(|n| n < 8000.0), "{report}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn it_cannot_be_cancelled_and_says_what_it_does() {
    let world = World::new();
    let spec = large();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let slow = Arc::new(AtomicBool::new(true));
    let proxy = Proxy::new(&uri, slowly(&slow));
    // Raw, for what this guest writes shrinks to nothing.
    source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0, "codec": "raw"}));
    source.wait_state("postcopy");
    // It runs there already, and waits for what it touches.
    destination.wait_state("running");
    let waited = wait_for("the guest waits for pages", PATIENCE, || {
        let post = destination.status()["migration"]["postcopy"].clone();
        (post["faults"].as_u64().is_some_and(|n| n > 0)).then_some(post)
    });
    assert!(waited["pages_left"].as_u64().is_some_and(|n| n > 0), "{waited}");
    // It may run a moment before the source hears so.
    wait_for("the source knows that it runs", PATIENCE, || {
        (source.status()["migration"]["status"] == "postcopy-active").then_some(())
    });
    for (vm, refused) in [
        (&source, vec!["cancel"]),
        (&source, vec!["resume", "--force"]),
        (&source, vec!["quit"]),
        (&source, vec!["migrate", "tcp:127.0.0.1:9"]),
        (&destination, vec!["migrate", "tcp:127.0.0.1:9"]),
        (&destination, vec!["cancel"]),
    ] {
        let ended = vm.ctl(&refused);
        assert_eq!(ended.code, Some(1), "{refused:?}: {ended:?}");
    }
    // A guest that waits for a page can be paused, and goes on.
    assert_eq!(destination.ctl(&["pause"]).code, Some(0));
    assert_eq!(destination.ctl(&["resume"]).code, Some(0));
    slow.store(false, Ordering::Relaxed);
    assert_eq!(source.wait_migration(PATIENCE)["status"], "completed");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn it_is_asked_for_while_pages_move() {
    let world = World::new();
    let spec = Spec { rate: 0, ..large() };
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let early = source.ctl(&["postcopy"]);
    assert_eq!(early.code, Some(1), "{early:?}");
    source.begin_migration(&uri, &json!({"downtime_limit_ms": 0}));
    wait_for("it takes the request", PATIENCE, || (source.ctl(&["postcopy"]).code == Some(0)).then_some(()));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert!(report["postcopy"]["pages"].as_u64().is_some_and(|n| n > 0), "{report}");
    prove(&spec, &[&source, &destination]);
}

/// Frames that are lost with a stream count as sent at the source and not as arrived at the destination. Precopy sends their pages again;
/// here they are missing.
#[test]
fn a_stream_lost_in_the_first_pass_does_not_spoil_the_handover() {
    let world = World::new();
    let spec = Spec { rate: 0, ..large() };
    let source = world.source("a", &spec);
    // The guest has touched all of it: the first pass has much to send.
    wait_for("a pass", PATIENCE, || source.serial().contains(&b'\n').then_some(()));
    let (destination, uri) = world.destination("b", &spec);
    let lost = Arc::new(AtomicBool::new(false));
    let losing = lost.clone();
    let proxy = Proxy::new(&uri, move |seen| match seen {
        // What is under way then never arrives; the stream does not come back.
        Seen::Data { role: Role::Stream, by: By::Source, stream, total, .. }
            if *total > 4 << 20 && stream_number(*stream) == 1 =>
        {
            losing.store(true, Ordering::Relaxed);
            Verdict::Cut
        }
        Seen::Data { role: Role::Stream, .. } => {
            std::thread::sleep(Duration::from_millis(2));
            Verdict::Pass
        }
        Seen::Open { role: Role::Stream, stream } if stream_number(*stream) != *stream => Verdict::Cut,
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw", "streams": 2, "downtime_limit_ms": 0}));
    wait_for("a stream is lost", PATIENCE, || lost.load(Ordering::Relaxed).then_some(()));
    let first_pass = source.status()["migration"]["rounds"].clone();
    assert_eq!(source.ctl(&["postcopy"]).code, Some(0));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(first_pass, 1, "{report}");
    assert_eq!(report["status"], "completed", "{report}");
    assert!(report["postcopy"]["pages"].as_u64().is_some_and(|n| n > 0), "{report}");
    prove(&spec, &[&source, &destination]);
}

const BEFORE_GO: [&str; 6] = ["POSTCOPY", "POSTCOPY_READY", "MISSING", "STATE", "FINISH", "READY"];

#[test]
fn before_go_the_guest_stays_whatever_is_cut_for_good() {
    for message in BEFORE_GO {
        let world = World::new();
        let spec = Spec::counter().with(&["--memory", "memfd"]);
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let proxy = Proxy::new(&uri, move |seen| match seen {
            Seen::Message { role: Role::Control, message: seen, .. } if seen.name() == message => {
                Verdict::Cut
            }
            _ => Verdict::Pass,
        });
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0, "reconnect_timeout_s": 0}));
        let report = source.wait_migration(PATIENCE);
        assert_eq!(report["status"], "failed", "{message}: {report}");
        assert_eq!(source.state(), "running", "{message}");
        prove(&spec, &[&source]);
        assert!(destination.serial().is_empty(), "{message}: it ran there, too");
    }
}

/// The handover is taken back, and with it what the destination has taken away; postcopy begins anew.
#[test]
fn before_go_everything_that_is_cut_is_made_anew() {
    for message in BEFORE_GO {
        let world = World::new();
        let spec = Spec { mem_mib: 96, working_set: 32 << 20, ..Spec::counter() };
        let spec = spec.with(&["--memory", "memfd"]);
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let cut = AtomicBool::new(false);
        let proxy = Proxy::new(&uri, move |seen| match seen {
            Seen::Message { message: seen, .. }
                if seen.name() == message && !cut.swap(true, Ordering::Relaxed) =>
            {
                Verdict::Cut
            }
            _ => Verdict::Pass,
        });
        // Some of it is there by then, and is taken away again.
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 1, "downtime_limit_ms": 0}));
        let report = source.wait_migration(PATIENCE);
        assert_eq!(report["status"], "completed", "{message}: {report}");
        assert_eq!(report["reconnects"], 1, "{message}: {report}");
        assert!(report["postcopy"]["pages"].as_u64().is_some_and(|n| n > 0), "{message}: {report}");
        prove(&spec, &[&source, &destination]);
    }
}

#[test]
fn connections_of_postcopy_that_are_not_opened_at_once_are_tried_again() {
    let world = World::new();
    let spec = Spec::counter().with(&["--memory", "memfd"]);
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let tries = Arc::new(AtomicU32::new(0));
    let tried = tries.clone();
    let proxy = Proxy::new(&uri, move |seen| match seen {
        Seen::Open { role: Role::Postcopy, .. } if tried.fetch_add(1, Ordering::Relaxed) < 2 => Verdict::Cut,
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0}));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert!(tries.load(Ordering::Relaxed) > 2, "{report}");
    prove(&spec, &[&source, &destination]);
}
