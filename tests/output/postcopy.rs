//! What may be asked of either side in postcopy, and what signals do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pageferry::transport::wire::Role;
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::proxy::{Proxy, Seen, Verdict};
use crate::vm::{Spec, Vm, World, prove};

/// A guest that runs at the destination, and most of whose pages are at the source until it `goes`.
struct Halfway {
    // Before the world that they are in.
    source: Vm,
    destination: Vm,
    _proxy: Proxy,
    goes: Arc<AtomicBool>,
    spec: Spec,
    _world: World,
}

impl Halfway {
    fn begin() -> Self {
        let world = World::new();
        let spec =
            Spec { mem_mib: 128, working_set: 64 << 20, ..Spec::counter() }.with(&["--memory", "memfd"]);
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let goes = Arc::new(AtomicBool::new(false));
        let go = goes.clone();
        let proxy = Proxy::new(&uri, move |seen| {
            let slow = matches!(seen, Seen::Data { role: Role::Postcopy, stream: 1.., .. });
            if slow && !go.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
            Verdict::Pass
        });
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0, "codec": "raw"}));
        destination.wait_state("running");
        source.wait_state("postcopy");
        Self { source, destination, _proxy: proxy, goes, spec, _world: world }
    }

    fn end(&self) {
        self.goes.store(true, Ordering::Relaxed);
        assert_eq!(self.source.wait_migration(PATIENCE)["status"], "completed");
        prove(&self.spec, &[&self.source, &self.destination]);
    }
}

#[test]
fn every_request_at_the_source_is_answered_by_what_is_so() {
    let way = Halfway::begin();
    let refused = |request: &[&str], words: &str| {
        let ended = way.source.ctl(request);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.err.contains(words), "{request:?}: {words:?} is missing: {ended:?}");
        assert!(!ended.err.contains("cancel it first"), "{request:?}: it cannot be: {ended:?}");
    };
    refused(&["pause"], "pause it at the destination");
    refused(&["resume"], "needs the pages that are still here");
    refused(&["resume", "--force"], "needs the pages that are still here");
    refused(&["cancel"], "cannot be cancelled");
    refused(&["switchover"], "the guest was handed over");
    refused(&["set", "--max-rounds", "3"], "only the bandwidth");
    refused(&["set", "--bandwidth", "1Gbit", "--timeout", "3"], "only the bandwidth");
    refused(&["continue"], "does not wait");
    refused(&["migrate", "unix:/nowhere"], "under way already");
    refused(&["quit"], "needs the pages that are still here");
    assert_eq!(way.source.ctl(&["postcopy"]).code, Some(0), "it is in it");
    assert_eq!(way.source.ctl(&["set", "--bandwidth", "1Gbit"]).code, Some(0));
    assert_eq!(way.source.state(), "postcopy");
    way.end();
}

#[test]
fn a_signal_at_the_source_waits_for_the_pages() {
    let way = Halfway::begin();
    way.source.signal(libc::SIGTERM);
    wait_for("it says so", PATIENCE, || {
        way.source.errors().contains("needs the pages that are still here").then_some(())
    });
    assert_eq!(way.source.exited(), None);
    way.goes.store(true, Ordering::Relaxed);
    assert_eq!(way.source.wait_exit(PATIENCE).code(), Some(0));
    prove(&way.spec, &[&way.source, &way.destination]);
}

#[test]
fn a_signal_at_the_destination_loses_no_guest_that_nobody_was_warned_of() {
    let way = Halfway::begin();
    let ended = way.destination.ctl(&["quit"]);
    assert!(ended.code == Some(1) && ended.err.contains("pages of the guest"), "{ended:?}");
    way.destination.signal(libc::SIGTERM);
    wait_for("it says so", PATIENCE, || {
        way.destination.errors().contains("and the guest is lost").then_some(())
    });
    assert_eq!(way.destination.state(), "running");
    // Once all pages are there it ends as ever.
    way.end();
    way.destination.signal(libc::SIGTERM);
    assert_eq!(way.destination.wait_exit(PATIENCE).code(), Some(0));
}

#[test]
fn a_second_signal_at_the_destination_ends_it_and_its_guest() {
    let way = Halfway::begin();
    way.destination.signal(libc::SIGTERM);
    wait_for("it says so", PATIENCE, || {
        way.destination.errors().contains("and the guest is lost").then_some(())
    });
    way.destination.signal(libc::SIGTERM);
    assert_eq!(way.destination.wait_exit(PATIENCE).code(), Some(1));
    assert!(
        way.destination.errors().contains("pages of the running guest were missing"),
        "{}",
        way.destination.errors()
    );
    let ended = way.source.ctl(&["quit", "--force"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(way.source.wait_exit(PATIENCE).code(), Some(1));
}
