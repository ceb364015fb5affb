//! Either process killed or stopped at any moment before GO: the guest runs on at the source, or is gone with it; the
//! destination never runs it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::Message;
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{NO_RESUME, Spec, Vm, World, prove, send_signal, stop_process};

/// Moments at which a process is killed. What comes by at that moment is lost with it, so that nothing is left to chance: it
/// either arrived before, or never does.
const POINTS: [Point; 10] = [
    Point::Open(Role::Control),
    Point::Message(By::Source, "HELLO"),
    Point::Message(By::Destination, "WELCOME"),
    Point::Message(By::Destination, "PREPARED"),
    Point::Open(Role::Stream),
    Point::Data(1),
    Point::Data(256 << 10),
    Point::Message(By::Source, "STATE"),
    Point::Message(By::Source, "FINISH"),
    Point::Message(By::Destination, "READY"),
];

#[derive(Clone, Copy, Debug)]
enum Point {
    /// When a connection of this role is opened.
    Open(Role),
    /// When this message comes by.
    Message(By, &'static str),
    /// When a stream has carried this many bytes: raw, for compressed a guest may be through before.
    Data(u64),
}

/// A proxy that kills a process at a point.
fn killer(uri: &str, point: Point, pid: i32) -> Proxy {
    let done = AtomicBool::new(false);
    Proxy::new(uri, move |seen| {
        let now = match (point, seen) {
            (Point::Open(at), Seen::Open { role, .. }) => *role == at,
            (Point::Message(at, name), Seen::Message { by, message, .. }) => {
                *by == at && message.name() == name
            }
            (Point::Data(bytes), Seen::Data { by: By::Source, total, .. }) => *total >= bytes,
            _ => false,
        };
        if !now {
            return Verdict::Pass;
        }
        // Once: a process that is gone and waited for may have given its number to another.
        if !done.swap(true, Ordering::Relaxed) {
            send_signal(pid, libc::SIGKILL);
        }
        Verdict::Cut
    })
}

/// The source after an attempt that failed: says so and why, and its guest runs on.
fn runs_on(spec: &Spec, source: &Vm, what: &str) {
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "failed", "{what}: {report}");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("runs on at the source: "), "{what}: {error}");
    assert_eq!(source.state(), "running", "{what}");
    prove(spec, &[source]);
}

#[test]
fn destination_killed_after_any_time() {
    let world = World::new();
    let spec = Spec::counter().with(NO_RESUME);
    let source = world.source("a", &spec);
    let mut failed = 0;
    // The longest delays may come after the end: then the test is over, with the guest gone.
    for delay_ms in [0, 1, 2, 4, 8, 12, 16, 20, 25, 30, 40, 50] {
        let (destination, uri) = world.destination(&format!("b{delay_ms}"), &spec);
        // Slow enough that the migration lasts longer than the delays.
        let proxy = slow(&uri, 400_000);
        source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
        std::thread::sleep(Duration::from_millis(delay_ms));
        destination.kill();
        runs_on(&spec, &source, &format!("killed after {delay_ms} ms"));
        assert!(destination.serial().is_empty(), "killed after {delay_ms} ms");
        failed += 1;
    }
    assert_eq!(failed, 12);
    let (destination, uri) = world.destination("b", &spec);
    let ended = source.ctl(&["migrate", &uri, "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    prove(&spec, &[&source, &destination]);
    assert_eq!(source.state(), "migrated");
}

/// A proxy that lets each stream have this many bytes in a second.
pub(crate) fn slow(uri: &str, bytes_per_s: u64) -> Proxy {
    Proxy::new(uri, move |seen| {
        if let Seen::Data { by: By::Source, len, .. } = seen {
            std::thread::sleep(Duration::from_micros(*len as u64 * 1_000_000 / bytes_per_s));
        }
        Verdict::Pass
    })
}

#[test]
fn destination_killed_at_any_point() {
    let world = World::new();
    let spec = Spec { cpus: 2, ..Spec::counter() }.with(NO_RESUME);
    let source = world.source("a", &spec);
    for (i, point) in POINTS.into_iter().enumerate() {
        let (destination, uri) = world.destination(&format!("b{i}"), &spec);
        let pid = destination.pid();
        let proxy = killer(&uri, point, pid);
        source.begin_migration(&proxy.uri(), &json!({"codec": "raw", "link_timeout_s": 4}));
        runs_on(&spec, &source, &format!("{point:?}"));
        assert!(destination.serial().is_empty(), "{point:?}");
    }
    let (destination, uri) = world.destination("b", &spec);
    source.begin_migration(&uri, &json!({}));
    assert_eq!(source.wait_migration(PATIENCE)["status"], "completed");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn source_killed_at_any_point() {
    let world = World::new();
    let spec = Spec::counter().with(NO_RESUME);
    for (i, point) in POINTS.into_iter().enumerate() {
        let source = world.source(&format!("a{i}"), &spec);
        let short = spec.clone().with(&["--link-timeout", "3", "--handover-timeout", "2"]);
        let (destination, uri) = world.destination(&format!("b{i}"), &short);
        let pid = source.pid();
        let proxy = killer(&uri, point, pid);
        // Without an answer, if it is killed at once.
        let _ = source.ask(&json!({"execute": "migrate", "uri": proxy.uri(), "codec": "raw"}));
        source.wait_exit(PATIENCE);
        if matches!(point, Point::Message(By::Source, "HELLO") | Point::Open(Role::Control)) {
            // No session has begun: it listens on, and has said who was refused.
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(destination.state(), "incoming", "{point:?}");
        } else {
            let start = Instant::now();
            let status = destination.wait_exit(Duration::from_secs(12));
            assert_eq!(status.code(), Some(1), "{point:?}");
            let errors = destination.errors();
            let expected = ["the source is gone", "the source did not say GO within 2 s"];
            assert!(
                expected.iter().any(|e| errors.contains(e)),
                "{point:?} after {:?}: {errors}",
                start.elapsed()
            );
        }
        assert!(destination.serial().is_empty(), "{point:?}: the destination ran a guest without GO");
    }
}

#[test]
fn source_killed_after_any_time() {
    let world = World::new();
    let spec = Spec::counter().with(NO_RESUME);
    for delay_ms in [0, 2, 5, 10, 20, 40] {
        let source = world.source(&format!("a{delay_ms}"), &spec);
        let (destination, uri) = world.destination(&format!("b{delay_ms}"), &spec);
        let proxy = slow(&uri, 400_000);
        source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
        std::thread::sleep(Duration::from_millis(delay_ms));
        source.kill();
        // Later than its session can learn of it; where none had begun, it listens on.
        std::thread::sleep(Duration::from_millis(300));
        let listens =
            || destination.ask(&json!({"execute": "status"})).is_ok_and(|s| s["state"] == "incoming");
        wait_for("it listens or ends", PATIENCE, || {
            (destination.exited().is_some() || listens()).then_some(())
        });
        assert!(destination.serial().is_empty(), "killed after {delay_ms} ms");
        if let Some(status) = destination.exited() {
            assert_eq!(status.code(), Some(1));
            assert!(destination.errors().contains("the source is gone"), "{}", destination.errors());
        }
    }
}

#[test]
fn destination_stopped_is_given_up_in_time() {
    let world = World::new();
    let spec = Spec::counter().with(NO_RESUME);
    let source = world.source("a", &spec);
    for (i, bytes) in [1, 64 << 10].into_iter().enumerate() {
        let (destination, uri) = world.destination(&format!("b{i}"), &spec);
        let pid = destination.pid();
        let stopped = std::sync::Arc::new(Mutex::new(None));
        let at = stopped.clone();
        let proxy = Proxy::new(&uri, move |seen| {
            if matches!(seen, Seen::Data { by: By::Source, total, .. } if *total >= bytes) {
                at.lock().unwrap().get_or_insert_with(|| {
                    stop_process(pid);
                    Instant::now()
                });
            }
            Verdict::Pass
        });
        let ended = source.ctl(&["migrate", &proxy.uri(), "--link-timeout", "2"]);
        let waited = stopped.lock().unwrap().expect("the proxy stopped it").elapsed();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        // It would have had 10 s.
        assert!(waited < Duration::from_secs(10), "given up after {waited:?}");
        runs_on(&spec, &source, "stopped");
        // What it wakes up to is a session that is over.
        destination.signal(libc::SIGCONT);
        assert_eq!(destination.wait_exit(PATIENCE).code(), Some(1));
        assert!(destination.serial().is_empty());
    }
}

#[test]
fn without_go_a_ready_destination_never_runs() {
    let world = World::new();
    let spec = Spec::counter().with(NO_RESUME);
    let source = world.source("a", &spec);
    let patient = spec.clone().with(&["--handover-timeout", "3", "--link-timeout", "3"]);
    let (destination, uri) = world.destination("b", &patient);
    static SOURCE: AtomicI32 = AtomicI32::new(0);
    SOURCE.store(source.pid(), Ordering::Relaxed);
    let proxy = Proxy::new(&uri, |seen| match seen {
        Seen::Message { role: Role::Control, message: Message::Go, .. } => {
            send_signal(SOURCE.load(Ordering::Relaxed), libc::SIGKILL);
            Verdict::Lose
        }
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    source.wait_exit(PATIENCE);
    // It waits for GO, and then for a source that asks.
    let status = destination.wait_exit(PATIENCE);
    assert_eq!(status.code(), Some(1));
    assert!(destination.errors().contains("never run here"), "{}", destination.errors());
    assert!(destination.serial().is_empty());
}
