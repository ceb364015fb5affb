//! Guests that move under TLS, before and after their handover, and a handshake that nobody answers.

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::vm::{Spec, World, pageferry, prove};

/// Keys for this host, and how a request names them.
fn keys(world: &World) -> (PathBuf, Value) {
    let dir = world.path("keys");
    let ended = pageferry(&["keys", "init", dir.to_str().unwrap()], PATIENCE);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let file = |name: &str| dir.join(name);
    let named =
        json!({"ca": file("ca-cert.pem"), "cert": file("client-cert.pem"), "key": file("client-key.pem")});
    (dir, named)
}

/// There, and on from there: a destination becomes a source.
#[test]
fn a_guest_moves_on_and_on() {
    let world = World::new();
    let (dir, tls) = keys(&world);
    let spec = Spec { cpus: 2, ..Spec::counter() }.with(&["--memory", "memfd"]);
    let spec = spec.with(&["--tls-dir", dir.to_str().unwrap()]);
    let mut all = vec![world.source("a", &spec)];
    for (at, postcopy) in [None, Some(0), None].into_iter().enumerate() {
        let (destination, uri) = world.destination(&format!("b{at}"), &spec);
        let here = all.last().unwrap();
        here.begin_migration(&uri, &json!({"tls": tls, "postcopy_after_rounds": postcopy, "streams": 3}));
        let report = here.wait_migration(PATIENCE);
        assert_eq!(
            (&report["status"], &report["protection"]),
            (&json!("completed"), &json!("tls")),
            "{report}"
        );
        assert_eq!(report["verified"], true, "{report}");
        assert_eq!(report.get("postcopy").is_some(), postcopy.is_some(), "{report}");
        all.push(destination);
        prove(&spec, &all.iter().collect::<Vec<_>>());
    }
}

#[test]
fn the_command_says_what_the_vm_is_to_read() {
    let world = World::new();
    let (dir, _) = keys(&world);
    let dir = dir.to_str().unwrap();
    let spec = Spec::counter().with(&["--tls-dir", dir]);
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let ended = source.ctl(&["migrate", &uri]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("it does not speak TLS") && ended.err.contains("--tls-dir"), "{ended:?}");
    let ended = source.ctl(&["migrate", &uri, "--tls-dir", dir, "--tls-hostname", "node9"]);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(ended.err.contains("is for another name"), "{ended:?}");
    let ended = source.ctl(&["migrate", &uri, "--tls-dir", dir]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.out.contains("TLS 1.3"), "{ended:?}");
    prove(&spec, &[&source, &destination]);
}

/// Whoever accepts a connection and says nothing holds a migration up until it is cancelled, or for its time-out.
#[test]
fn a_handshake_that_nobody_answers_is_cancelled() {
    let world = World::new();
    let (_, tls) = keys(&world);
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", silent.local_addr().unwrap());
    source.begin_migration(&uri, &json!({"tls": tls, "link_timeout_s": 60, "reconnect_timeout_s": 0}));
    let _connection = silent.accept().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let begun = Instant::now();
    assert!(source.ask(&json!({"execute": "cancel"})).is_ok());
    wait_for("it is cancelled", PATIENCE, || {
        (source.status()["migration"]["status"] == "cancelled").then_some(())
    });
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    source.begin_migration(&uri, &json!({"tls": tls, "link_timeout_s": 1, "reconnect_timeout_s": 0}));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "failed", "{report}");
    assert_eq!(source.state(), "running");
    prove(&spec, &[&source]);
}
