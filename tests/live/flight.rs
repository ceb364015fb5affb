//! The handover's one flight: the last pages, their streams' ends, the device state and FINISH are on their way together, and what is lost
//! or damaged then takes the handover back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::Message;
use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{Spec, World, prove};

fn is(flag: &AtomicBool) -> bool {
    flag.load(Ordering::SeqCst)
}

/// The guest is paused, and FINISH is not said.
#[derive(Default)]
struct Between {
    state: AtomicBool,
    finish: AtomicBool,
}

impl Between {
    fn see(&self, seen: &Seen<'_>) {
        match seen {
            Seen::Message { message: Message::State(_), .. } => self.state.store(true, Ordering::SeqCst),
            Seen::Message { message: Message::Finish(_), .. } => self.finish.store(true, Ordering::SeqCst),
            _ => {}
        }
    }

    /// Holds something back for as long.
    fn wait(&self) {
        let begun = Instant::now();
        while is(&self.state) && !is(&self.finish) && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// How long what streams carry takes: longer than the state, so that the last of it is under way when that is said.
const WAY: Duration = Duration::from_millis(10);
/// A host that is busy elsewhere may be through before that; then it is tried again.
const TRIES: usize = 10;

/// Moves a guest that writes little and fast through a proxy with a rule that sets the flag when it has held or harmed what it is to.
/// Returns the source's report, once it has.
fn moved(
    options: &Value,
    rule: impl Fn(&Seen<'_>, &Between, &AtomicBool) -> Verdict + Clone + Send + Sync + 'static,
) -> Value {
    let spec = Spec { working_set: 128 << 10, rate: 20_000, ..Spec::counter() };
    for _ in 0..TRIES {
        let world = World::new();
        let source = world.source("a", &spec);
        wait_for("the guest's first pass", PATIENCE, || (!source.serial().is_empty()).then_some(()));
        let (destination, uri) = world.destination("b", &spec);
        let (between, done, rule) = (Between::default(), Arc::new(AtomicBool::new(false)), rule.clone());
        let does = done.clone();
        let proxy = Proxy::new(&uri, move |seen| {
            between.see(seen);
            rule(seen, &between, &does)
        });
        source.begin_migration(&proxy.uri(), options);
        let report = source.wait_migration(PATIENCE);
        assert_eq!(report["status"], "completed", "{report}");
        prove(&spec, &[&source, &destination]);
        if is(&done) {
            return report;
        }
    }
    panic!("each time it was through too early");
}

/// Nothing reaches the source from its streams between STATE and FINISH: it does not wait for receipts, or for ends.
#[test]
fn finish_waits_for_no_receipt() {
    let report = moved(&json!({"downtime_limit_ms": 5000, "streams": 2}), |seen, between, held| {
        if let Seen::Data { role: Role::Stream, by: By::Destination, .. } = seen {
            std::thread::sleep(WAY);
            held.fetch_or(is(&between.state), Ordering::SeqCst);
            between.wait();
        }
        Verdict::Pass
    });
    // Held back for longer than a stream waits for a receipt, the session would have been resumed.
    assert_eq!(report["reconnects"], 0, "{report}");
}

/// A page that arrives other than it was sent after FINISH was said of it is sent again: the session is resumed for that.
#[test]
fn damage_on_the_last_way_takes_the_handover_back() {
    let options = json!({"codec": "raw", "streams": 1, "downtime_limit_ms": 5000});
    let report = moved(&options, |seen, between, flipped| {
        let Seen::Data { role: Role::Stream, by: By::Source, len, .. } = seen else { return Verdict::Pass };
        std::thread::sleep(WAY);
        between.wait();
        // In the midst of raw pages, and not of an end.
        let flips = *len > 4 << 10 && is(&between.finish) && !flipped.swap(true, Ordering::SeqCst);
        if flips { Verdict::Flip } else { Verdict::Pass }
    });
    assert_eq!(report["reconnects"], 1, "{report}");
}

/// What the path alone takes is told before a pass has shown anything.
#[test]
fn a_limit_that_the_path_makes_impossible_is_told_at_once() {
    let world = World::new();
    let spec = Spec { working_set: 4 << 20, rate: 200, ..Spec::counter() };
    let source = world.source("a", &spec);
    let (_destination, uri) = world.destination("b", &spec);
    let proxy = Proxy::new(&uri, |seen| {
        if let Seen::Data { by: By::Destination, .. } = seen {
            std::thread::sleep(Duration::from_millis(60));
        }
        Verdict::Pass
    });
    let options = json!({"codec": "raw", "bandwidth": 1_000_000, "downtime_limit_ms": 50});
    source.begin_migration(&proxy.uri(), &options);
    let report = wait_for("it says so", PATIENCE, || {
        Some(source.status()["migration"].clone()).filter(|report| report["stalled"].is_string())
    });
    let said = report["stalled"].as_str().unwrap();
    assert!(said.contains("round trips alone take") && said.contains("of the 50 ms allowed"), "{said}");
    assert!(said.contains("--downtime-limit") && said.contains("`ctl postcopy`"), "{said}");
    assert_eq!(report["rounds"], 1, "{report}");
    assert_eq!(source.ctl(&["cancel"]).code, Some(0));
}
