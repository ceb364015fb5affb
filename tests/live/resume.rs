//! Connections that are lost before GO and made anew: streams one by one, and everything at once, for a while or for ever. The guest
//! runs on at the source meanwhile, and the migration goes on where it was.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use pageferry::transport::wire::Role;
use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::common::{Image, Job, MIB, Recv, send};
use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{Spec, Vm, World, prove};

/// Bytes that may be sent twice, besides what the guest has written meanwhile.
const TWICE_MAX: u64 = 64 << 20;

/// A guest whose migration takes some seconds over [`narrow`].
fn busy() -> Spec {
    Spec { working_set: 40 << 20, rate: 4000, ..Spec::counter() }
}

/// A source whose guest has written all of its memory.
fn full(world: &World, spec: &Spec) -> Vm {
    let source = world.source("a", spec);
    wait_for("the guest's first pass", PATIENCE, || (!source.serial().is_empty()).then_some(()));
    source
}

/// A proxy through which each stream gets 10 MB/s, and nothing at all while `down`. Of raw pages, which take long: compressed the guest
/// might be through before anything is cut.
fn narrow(uri: &str, down: &Arc<AtomicBool>) -> Proxy {
    let down = down.clone();
    Proxy::new(uri, move |seen| {
        if down.load(Ordering::Acquire) {
            return Verdict::Cut;
        }
        if let Seen::Data { by: By::Source, len, .. } = seen {
            std::thread::sleep(Duration::from_micros(*len as u64 / 10));
        }
        Verdict::Pass
    })
}

fn up() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(false))
}

/// Waits until some of the memory was delivered.
fn wait_moving(source: &Vm) {
    wait_for("pages move", PATIENCE, || {
        let migration = source.status()["migration"].clone();
        assert_eq!(migration.get("error"), None, "{migration}");
        (migration["logical_bytes"].as_u64().is_some_and(|n| n > 4 << 20)).then_some(())
    });
}

/// Closes all connections and lets none through.
fn cut_everything(proxy: &Proxy, down: &AtomicBool) {
    down.store(true, Ordering::Release);
    proxy.cut_all();
}

/// Waits until this side says that it has no connections.
fn wait_reconnecting(vm: &Vm) -> Value {
    wait_for("it says that it reconnects", PATIENCE, || {
        let migration = vm.status()["migration"].clone();
        (migration["status"] == "reconnecting").then_some(migration)
    })
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("no {field} in {report}"))
}

#[test]
fn everything_cut_for_a_while_goes_on_where_it_was() {
    let world = World::new();
    let spec = busy();
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let down = up();
    let proxy = narrow(&uri, &down);
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    for _ in 0..2 {
        wait_moving(&source);
        let before = source.status()["migration"].clone();
        cut_everything(&proxy, &down);
        let lost = wait_reconnecting(&source);
        assert!(lost["error"].as_str().unwrap().contains("control connection"), "{lost}");
        assert_eq!(source.state(), "running");
        wait_reconnecting(&destination);
        let printed = source.serial().len();
        std::thread::sleep(Duration::from_millis(1500));
        let lost = wait_reconnecting(&source);
        assert!(lost["reconnecting_ms"].as_f64().is_some_and(|n| n > 1000.0), "{lost}");
        assert!(number(&lost, "logical_bytes") >= number(&before, "logical_bytes"), "{lost}");
        wait_for("the guest runs on meanwhile", PATIENCE, || (source.serial().len() > printed).then_some(()));
        down.store(false, Ordering::Release);
        wait_for("pages move again", PATIENCE, || {
            (source.status()["migration"]["status"] != "reconnecting").then_some(())
        });
    }
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert_eq!((number(&report, "reconnects"), number(&report, "mismatches")), (2, 0), "{report}");
    // The second time they may be lost before they are back.
    assert!((4..=8).contains(&number(&report, "streams_lost")), "{report}");
    let twice = number(&report, "resent_bytes");
    assert!(0 < twice && twice < TWICE_MAX, "{report}");
    let theirs = wait_for("the destination's report", PATIENCE, || {
        let report = destination.status()["migration"].clone();
        (report["status"] == "completed").then_some(report)
    });
    assert_eq!((number(&theirs, "reconnects"), number(&theirs, "resent_bytes")), (2, twice), "{theirs}");
    prove(&spec, &[&source, &destination]);
    assert_eq!(source.state(), "migrated");
}

#[test]
fn one_of_four_streams_cut_again_and_again() {
    let world = World::new();
    let spec = busy();
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = narrow(&uri, &up());
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    wait_moving(&source);
    let mut cuts = 0;
    let report = loop {
        let migration = source.status()["migration"].clone();
        if ["completed", "failed"].contains(&migration["status"].as_str().unwrap()) {
            break migration;
        }
        proxy.cut(|role, stream| role == Role::Stream && stream == cuts % 4);
        cuts += 1;
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(report["status"], "completed", "{report}");
    println!("{cuts} cuts: {report}");
    assert!(number(&report, "streams_reconnected") >= 3, "after {cuts} cuts: {report}");
    // The session is resumed only where a cut hits the last pages on their way, with the guest paused.
    assert!(number(&report, "reconnects") <= 3, "{report}");
    assert_eq!(number(&report, "mismatches"), 0, "{report}");
    prove(&spec, &[&source, &destination]);
}

/// The control connection lives: nothing is taken back, and the streams come again.
#[test]
fn all_streams_cut_at_once_come_again() {
    let world = World::new();
    let spec = busy();
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = narrow(&uri, &up());
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    wait_moving(&source);
    proxy.cut(|role, _| role == Role::Stream);
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert_eq!((number(&report, "streams_lost"), number(&report, "reconnects")), (4, 0), "{report}");
    assert!(number(&report, "streams_reconnected") >= 1, "{report}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn a_destination_that_does_not_come_back_is_given_up() {
    let world = World::new();
    let spec = busy();
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let down = up();
    let proxy = narrow(&uri, &down);
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw", "reconnect_timeout_s": 2}));
    wait_moving(&source);
    cut_everything(&proxy, &down);
    wait_reconnecting(&source);
    destination.kill();
    down.store(false, Ordering::Release);
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "failed", "{report}");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("runs on at the source: the connections were lost"), "{error}");
    assert!(error.contains("not made anew within 2 s"), "{error}");
    assert_eq!(source.state(), "running");
    prove(&spec, &[&source]);
}

#[test]
fn a_source_that_does_not_come_back_is_given_up() {
    let world = World::new();
    let spec = busy().with(&["--reconnect-timeout", "1"]);
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let down = up();
    let proxy = narrow(&uri, &down);
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    wait_moving(&source);
    cut_everything(&proxy, &down);
    assert_eq!(destination.wait_exit(PATIENCE).code(), Some(1));
    assert!(destination.errors().contains("did not come back within 1 s"), "{}", destination.errors());
    assert!(destination.serial().is_empty());
    // What was agreed on holds for both.
    let report = source.wait_migration(PATIENCE);
    assert!(report["error"].as_str().unwrap().contains("not made anew within 1 s"), "{report}");
    prove(&spec, &[&source]);
}

/// Cancelled while nothing can be said: at once; and the destination hears of it as soon as it can.
#[test]
fn a_migration_that_reconnects_can_be_cancelled() {
    let world = World::new();
    let spec = busy();
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let down = up();
    let proxy = narrow(&uri, &down);
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    wait_moving(&source);
    cut_everything(&proxy, &down);
    wait_reconnecting(&source);
    wait_reconnecting(&destination);
    // It would go on trying for longer than anybody here waits.
    assert_eq!(source.ctl(&["cancel"]).code, Some(0));
    assert_eq!(source.wait_migration(PATIENCE)["status"], "cancelled");
    assert_eq!(source.state(), "running");
    assert_eq!(destination.exited(), None);
    down.store(false, Ordering::Release);
    assert_eq!(destination.wait_exit(PATIENCE).code(), Some(1));
    assert!(destination.errors().contains("cancelled"), "{}", destination.errors());
    prove(&spec, &[&source]);
}

/// Everything cut, once, when this message comes by: it takes the handover back to where pages move, and then it happens.
fn handover_cut_at(name: &'static str) {
    let world = World::new();
    let spec = Spec::counter();
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let cuts = Arc::new(AtomicU32::new(0));
    let counted = cuts.clone();
    let proxy = Proxy::new(&uri, move |seen| match seen {
        Seen::Message { message, .. }
            if message.name() == name && counted.fetch_add(1, Ordering::Relaxed) == 0 =>
        {
            Verdict::Cut
        }
        _ => Verdict::Pass,
    });
    let ended = source.ctl(&["migrate", &proxy.uri(), "--json"]);
    assert_eq!(ended.code, Some(0), "{name}: {ended:?}");
    assert_eq!(number(&ended.json(), "reconnects"), 1, "{name}: {ended:?}");
    assert!(cuts.load(Ordering::Relaxed) >= 2, "{name} was said again");
    prove(&spec, &[&source, &destination]);
    assert_eq!(source.state(), "migrated");
    assert_eq!(destination.state(), "running");
}

#[test]
fn a_handover_cut_before_go_is_taken_back_and_done_again() {
    for name in ["STATE", "FINISH", "READY"] {
        handover_cut_at(name);
    }
}

/// An answer to RESUME that is lost: another attempt, with another number, is what counts.
#[test]
fn resuming_that_is_cut_is_tried_again() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let (ready, resume, resumed) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let proxy = Proxy::new(&uri, move |seen| {
        let first = |counter: &AtomicU32| counter.fetch_add(1, Ordering::Relaxed) == 0;
        let cut = match seen {
            Seen::Message { message, .. } => match message.name() {
                "READY" => first(&ready),
                "RESUME" => first(&resume),
                "RESUMED" => first(&resumed),
                _ => false,
            },
            _ => false,
        };
        if cut { Verdict::Cut } else { Verdict::Pass }
    });
    let ended = source.ctl(&["migrate", &proxy.uri(), "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(number(&ended.json(), "reconnects"), 1, "{ended:?}");
    prove(&spec, &[&source, &destination]);
}

/// A source that stood still for longer than its destination waits for an answer: it wakes up, and goes on.
#[test]
fn a_stopped_source_goes_on_when_it_wakes_up() {
    let world = World::new();
    let spec = busy().with(&["--link-timeout", "1"]);
    let source = full(&world, &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = narrow(&uri, &up());
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    wait_moving(&source);
    source.signal(libc::SIGSTOP);
    wait_reconnecting(&destination);
    source.signal(libc::SIGCONT);
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    assert!(number(&report, "reconnects") >= 1, "{report}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn memory_alone_goes_on_where_it_was() {
    let job = Job::new(Image::Random, 24 * MIB);
    let args = [OsStr::new("--json"), OsStr::new("--ram-file"), job.to.as_os_str()];
    let recv = Recv::start("tcp:127.0.0.1:0", args);
    let down = up();
    let proxy = narrow(&recv.uri, &down);
    let sent = send(&proxy.uri(), &job.from, &["--streams", "2"]);
    std::thread::sleep(Duration::from_millis(500));
    cut_everything(&proxy, &down);
    std::thread::sleep(Duration::from_millis(800));
    down.store(false, Ordering::Release);
    let (sent, received) = (sent.wait(), recv.ferry.wait());
    let (report, theirs) = (sent.code(0).report(), received.code(0).report());
    assert_eq!((report.reconnects, theirs.reconnects), (1, 1), "{report:?} {theirs:?}");
    assert!(report.resent_bytes < TWICE_MAX && report.verified, "{report:?}");
    job.assert_arrived();
}
