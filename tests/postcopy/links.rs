//! Connections lost in postcopy, and hosts: the guest stops where it needs a page, nothing is lost that need not be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pageferry::transport::wire::Role;
use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{Spec, Vm, World, prove};

/// A guest in postcopy whose connections go through a proxy, which lets nothing through while `cut` is set.
struct Way {
    world: World,
    spec: Spec,
    source: Vm,
    destination: Vm,
    uri: String,
    proxy: Proxy,
    cut: Arc<AtomicBool>,
}

impl Way {
    /// Begins a migration whose pages come slowly until `fast`, and waits until the guest runs at the destination.
    fn begin(more: &[&str], fast: &Arc<AtomicBool>) -> Self {
        let world = World::new();
        let spec = Spec { cpus: 2, mem_mib: 256, working_set: 160 << 20, ..Spec::counter() };
        let spec = spec.with(&["--memory", "memfd"]).with(more);
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let cut = Arc::new(AtomicBool::new(false));
        let (cutting, fast) = (cut.clone(), fast.clone());
        let proxy = Proxy::new(&uri, move |seen| match seen {
            _ if cutting.load(Ordering::Relaxed) => Verdict::Cut,
            Seen::Data { role: Role::Postcopy, stream: 1.., .. } if !fast.load(Ordering::Relaxed) => {
                std::thread::sleep(Duration::from_millis(5));
                Verdict::Pass
            }
            _ => Verdict::Pass,
        });
        // Raw, for what this guest writes shrinks to nothing.
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0, "codec": "raw"}));
        destination.wait_state("running");
        wait_for("pages have come", PATIENCE, || {
            let post = destination.status()["migration"]["postcopy"].clone();
            (post["pages_left"].as_u64()? < post["pages"].as_u64()?).then_some(())
        });
        Self { world, spec, source, destination, uri, proxy, cut }
    }

    /// Loses all connections, and lets none through.
    fn lose_all(&self) {
        self.cut.store(true, Ordering::Relaxed);
        self.proxy.cut_all();
        for vm in [&self.source, &self.destination] {
            wait_for("it notices", PATIENCE, || (migration(vm)["status"] == "postcopy-paused").then_some(()));
        }
    }

    /// The guest arrives whole; returns the source's report.
    fn arrives(&self) -> Value {
        let report = self.source.wait_migration(PATIENCE);
        assert_eq!(report["status"], "completed", "{report}");
        assert_eq!(report["postcopy"]["pages_left"], 0, "{report}");
        assert!(report["error"].is_null(), "{report}");
        prove(&self.spec, &[&self.source, &self.destination]);
        report
    }
}

fn migration(vm: &Vm) -> Value {
    vm.status()["migration"].clone()
}

#[test]
fn all_connections_lost_for_a_while() {
    let fast = Arc::new(AtomicBool::new(false));
    let way = Way::begin(&[], &fast);
    way.lose_all();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(way.source.state(), "postcopy");
    assert_eq!(way.destination.state(), "running");
    let printed = way.source.serial().len();
    way.cut.store(false, Ordering::Relaxed);
    fast.store(true, Ordering::Relaxed);
    let report = way.arrives();
    assert_eq!(way.source.serial().len(), printed, "the source ran a guest that it had handed over");
    let post = &report["postcopy"];
    assert!(post["reconnects"].as_u64().is_some_and(|n| n > 0), "{report}");
    assert!(post["resent"].as_u64().is_some_and(|n| n <= (64 << 20) / 4096), "{report}");
}

/// Those of before have ended, and what they say of that is not said of those that took their place.
#[test]
fn a_lost_link_opens_each_connection_once_more() {
    let fast = Arc::new(AtomicBool::new(false));
    let way = Way::begin(&[], &fast);
    way.proxy.cut(|role, _| role == Role::Control);
    wait_for("they are opened again", PATIENCE, || {
        migration(&way.source)["postcopy"]["reconnects"].as_u64().filter(|&n| n > 0)
    });
    std::thread::sleep(Duration::from_secs(1));
    fast.store(true, Ordering::Relaxed);
    let report = way.arrives();
    assert_eq!(report["postcopy"]["reconnects"], 1, "{report}");
}

#[test]
fn a_connection_lost_again_and_again() {
    let fast = Arc::new(AtomicBool::new(false));
    let way = Way::begin(&[], &fast);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        way.proxy.cut_all();
        std::thread::sleep(Duration::from_millis(150));
    }
    fast.store(true, Ordering::Relaxed);
    way.arrives();
}

#[test]
fn the_last_words_lost_one_by_one() {
    for word in ["SENT", "ARRIVED"] {
        let world = World::new();
        let spec = Spec::counter().with(&["--memory", "memfd"]);
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let cuts = AtomicU32::new(0);
        let proxy = Proxy::new(&uri, move |seen| match seen {
            Seen::Message { message, .. } if message.name() == word => {
                if cuts.fetch_add(1, Ordering::Relaxed) < 2 { Verdict::Cut } else { Verdict::Pass }
            }
            _ => Verdict::Pass,
        });
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0}));
        let report = source.wait_migration(PATIENCE);
        assert_eq!(report["status"], "completed", "{word}: {report}");
        prove(&spec, &[&source, &destination]);
    }
}

#[test]
fn go_and_running_lost_are_learnt_by_asking_while_pages_come() {
    for word in ["GO", "RUNNING"] {
        let world = World::new();
        let spec = Spec { cpus: 2, ..Spec::counter() }.with(&["--memory", "memfd"]);
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let proxy = Proxy::new(&uri, move |seen| match seen {
            Seen::Message { role: Role::Control, message, .. } if message.name() == word => Verdict::Cut,
            _ => Verdict::Pass,
        });
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0}));
        let report = source.wait_migration(PATIENCE);
        assert_eq!(report["status"], "completed", "{word}: {report}");
        prove(&spec, &[&source, &destination]);
    }
}

/// Whoever ends a source that asks what came of GO would end the pages of a guest that runs already.
#[test]
fn a_source_that_asks_goes_on_serving_pages_whoever_wants_to_end_it() {
    for word in ["GO", "RUNNING"] {
        let world = World::new();
        let spec = Spec { cpus: 2, mem_mib: 128, working_set: 64 << 20, ..Spec::counter() };
        let spec = spec.with(&["--memory", "memfd"]);
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let deaf = Arc::new(AtomicBool::new(true));
        let hears = deaf.clone();
        let proxy = Proxy::new(&uri, move |seen| match seen {
            Seen::Message { role: Role::Control, message, .. } if message.name() == word => Verdict::Cut,
            Seen::Open { role: Role::Query, .. } if hears.load(Ordering::Relaxed) => Verdict::Cut,
            _ => Verdict::Pass,
        });
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0}));
        wait_for("it asks", PATIENCE, || (migration(&source)["status"] == "unknown").then_some(()));
        for request in [&["cancel"][..], &["resume", "--force"], &["quit"], &["migrate", "tcp:127.0.0.1:9"]] {
            let ended = source.ctl(request);
            assert_eq!(ended.code, Some(1), "{word}: {request:?}: {ended:?}");
        }
        source.signal(libc::SIGTERM);
        if word == "RUNNING" {
            // Nobody has told the source, and all pages that the guest touches come.
            prove(&spec, &[&source, &destination]);
        }
        assert_eq!(migration(&source)["status"], "unknown", "{word}");
        deaf.store(false, Ordering::Relaxed);
        prove(&spec, &[&source, &destination]);
        let post = wait_for("all pages have come", PATIENCE, || {
            let report = migration(&destination);
            (report["status"] == "completed").then(|| report["postcopy"].clone())
        });
        let any = post["pages"].as_u64().is_some_and(|pages| pages > 0);
        assert!(any && post["pages_left"] == 0, "{word}: {post}");
    }
}

/// The seal of a frame tells before its pages are placed, for a page that was placed cannot be taken back from a running guest.
#[test]
fn what_arrives_damaged_is_not_placed() {
    let world = World::new();
    let spec = Spec { cpus: 2, mem_mib: 64, working_set: 40 << 20, ..Spec::counter() };
    let spec = spec.with(&["--memory", "memfd"]);
    let source = world.source("a", &spec);
    prove(&spec, &[&source]);
    let (destination, uri) = world.destination("b", &spec);
    let pieces = AtomicU32::new(0);
    let proxy = Proxy::new(&uri, move |seen| match seen {
        // Small pieces may be headers: a connection that carries a wrong one is lost.
        Seen::Data { role: Role::Postcopy, by: By::Source, len: 16_384.., .. } => {
            if pieces.fetch_add(1, Ordering::Relaxed) % 100 == 7 { Verdict::Flip } else { Verdict::Pass }
        }
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0, "codec": "raw"}));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert!(report["postcopy"]["damaged"].as_u64().is_some_and(|n| n > 0), "{report}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn it_recovers_over_another_address() {
    let fast = Arc::new(AtomicBool::new(false));
    let way = Way::begin(&[], &fast);
    let early = way.source.ctl(&["recover", "tcp:nonsense"]);
    assert_ne!(early.code, Some(0), "{early:?}");
    way.lose_all();
    // The proxy stays closed for ever.
    let recovered = way.source.ctl(&["recover", &way.uri]);
    assert_eq!(recovered.code, Some(0), "{recovered:?}");
    way.arrives();
}

#[test]
fn a_source_that_dies_takes_the_guest_with_it_and_it_is_stopped() {
    let fast = Arc::new(AtomicBool::new(false));
    let way = Way::begin(&["--postcopy-timeout", "2"], &fast);
    way.source.kill();
    way.destination.wait_state("crashed");
    let status = way.destination.status();
    assert_eq!(status["migration"]["status"], "postcopy-lost", "{status}");
    assert!(status["reason"].as_str().unwrap().contains("the guest was stopped, and is lost"), "{status}");
    let printed = way.destination.serial().len();
    let resumed = way.destination.ctl(&["resume", "--force"]);
    assert_eq!(resumed.code, Some(1), "{resumed:?}");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(way.destination.serial().len(), printed, "it ran with pages that it does not have");
}

/// A vCPU that waits for its page tables can only be stopped by letting it go on, where KVM reads them by itself.
#[test]
fn a_guest_of_which_no_page_came_is_stopped() {
    let world = World::new();
    let spec = Spec { cpus: 2, mem_mib: 64, working_set: 16 << 20, ..Spec::counter() };
    let spec = spec.with(&["--memory", "memfd", "--postcopy-timeout", "1"]);
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = Proxy::new(&uri, |seen| match seen {
        Seen::Data { role: Role::Postcopy, by: By::Source, .. } => Verdict::Lose,
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0}));
    destination.wait_state("running");
    source.kill();
    destination.wait_state("crashed");
    let status = destination.status();
    assert_eq!(status["migration"]["status"], "postcopy-lost", "{status}");
    assert_eq!(destination.serial(), b"", "it ran without a page");
    assert_eq!(destination.ctl(&["resume", "--force"]).code, Some(1));
}

#[test]
fn a_destination_that_dies_leaves_the_source_paused() {
    let fast = Arc::new(AtomicBool::new(false));
    let way = Way::begin(&[], &fast);
    let printed = way.source.serial().len();
    way.destination.kill();
    wait_for("it notices", PATIENCE, || {
        (migration(&way.source)["status"] == "postcopy-paused").then_some(())
    });
    assert_eq!(way.source.state(), "postcopy");
    // Another destination in its place does not know the session.
    let other = Vm::start(&way.world, "c", &way.spec, Some(&way.uri));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(way.source.state(), "postcopy");
    assert_eq!(other.state(), "incoming");
    assert_eq!(way.source.serial().len(), printed, "the source ran a guest that it had handed over");
}
