//! The monitor's client and who commands the guest over it, against a monitor that misbehaves; tests/qemu.rs has real ones.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use testkit::{PATIENCE, wait_until};

use super::control::Control;
use super::written::Writes;
use super::{Qmp, blocks};

/// What was said to a monitor, and whether its guest runs.
#[derive(Debug, Default)]
struct Guest {
    said: Vec<String>,
    runs: bool,
    /// Commands before whose answer the connection breaks, once each.
    breaks_at: Vec<&'static str>,
    /// What commands of the human monitor print.
    prints: Vec<(&'static str, &'static str)>,
}

/// A monitor at `path`, with a guest that runs.
fn monitor(path: &Path, breaks_at: &[&'static str]) -> Arc<Mutex<Guest>> {
    let guest = Guest { runs: true, breaks_at: breaks_at.to_vec(), ..Guest::default() };
    let (guest, listener) = (Arc::new(Mutex::new(guest)), UnixListener::bind(path).unwrap());
    let shared = guest.clone();
    std::thread::spawn(move || {
        // One client at a time, as QEMU's.
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let version = json!({ "qemu": { "major": 9, "minor": 1, "micro": 0 } });
            writeln!(client, "{}", json!({ "QMP": { "version": version, "capabilities": [] } })).unwrap();
            for line in BufReader::new(client.try_clone().unwrap()).lines().map_while(Result::ok) {
                let request: Value = serde_json::from_str(&line).unwrap();
                let mut guest = shared.lock().unwrap();
                let command = request["execute"].as_str().unwrap().to_owned();
                guest.said.push(command.clone());
                if let Some(at) = guest.breaks_at.iter().position(|&breaks| breaks == command) {
                    guest.breaks_at.remove(at);
                    break;
                }
                match &command[..] {
                    "stop" => guest.runs = false,
                    "cont" if !std::mem::replace(&mut guest.runs, true) => {
                        writeln!(client, "{}", json!({ "event": "RESUME" })).unwrap();
                    }
                    _ => {}
                }
                let status = if guest.runs { "running" } else { "paused" };
                let line = request["arguments"]["command-line"].as_str();
                let printed = line.map(|line| guest.prints.iter().find(|(command, _)| *command == line));
                let printed = printed.map(|printed| json!(printed.map_or("", |(_, text)| text)));
                drop(guest);
                writeln!(client, "{}", json!({ "event": "NOBODY_ASKED" })).unwrap();
                let id = &request["id"];
                let _ = match &command[..] {
                    "fail" => writeln!(
                        client,
                        "{}",
                        json!({ "error": { "desc": "it does not like to" }, "id": id })
                    ),
                    _ => {
                        let answer = printed.unwrap_or_else(|| json!({ "status": status }));
                        writeln!(client, "{}", json!({ "return": answer, "id": id }))
                    }
                };
            }
        }
    });
    guest
}

#[test]
fn a_connection_that_breaks_is_made_anew_for_what_may_be_said_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let guest = monitor(&path, &["stop", "getfd"]);
    let qmp = Qmp::connect(&path).unwrap();
    assert_eq!((qmp.version(), qmp.pid()), ((9, 1), std::process::id()));
    qmp.execute("stop", &Value::Null).unwrap();
    assert!(!guest.lock().unwrap().runs);
    let refused = qmp.execute("fail", &Value::Null).unwrap_err();
    assert_eq!(refused.source.to_string(), "it does not like to");
    // A descriptor may have been taken by then.
    assert!(qmp.give("x", folder_fd(&folder).as_fd()).is_err());
    qmp.execute("cont", &Value::Null).unwrap();
    let said = guest.lock().unwrap().said.join(" ");
    assert_eq!(said, "qmp_capabilities stop qmp_capabilities stop fail getfd qmp_capabilities cont");
}

fn folder_fd(folder: &tempfile::TempDir) -> std::fs::File {
    std::fs::File::open(folder.path()).unwrap()
}

#[test]
fn whoever_writes_unseen_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let guest = monitor(&path, &[]);
    let qmp = Qmp::connect(&path).unwrap();
    let says = |tree, network| {
        guest.lock().unwrap().prints = vec![("info qtree", tree), ("info network", network)];
        blocks::refuse_unseen_writers(&qmp).map_err(|e| e.to_string())
    };
    // As QEMU prints them: tap with vhost writes as QEMU's process.
    let own = "bus: main-system-bus\n  dev: q35-pcihost, id \"\"\n      dev: virtio-net-pci, id \"n0\"\n        vhost = true\n";
    let tap = "n0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n \\ t0: index=0,type=tap,ifname=tap0\n";
    says(own, tap).unwrap();
    let device = says("  dev: vfio-pci, id \"gpu\"\n    host = \"0000:01:00.0\"\n", "").unwrap_err();
    assert!(device.contains("`vfio-pci, id \"gpu\"`") && device.contains("device_del"), "{device}");
    for kind in ["vhost-user-blk-pci", "vhost-user-fs-pci", "vhost-vdpa-device-pci", "ivshmem-plain"] {
        let tree: &'static str = format!("    dev: {kind}, id \"\"\n").leak();
        assert!(says(tree, "").is_err_and(|e| e.contains(kind)), "{kind}");
    }
    let switch = " \\ ovs0: index=0,type=vhost-user\n";
    let network = says(own, switch).unwrap_err();
    assert!(network.contains("`ovs0`"), "{network}");
}

#[test]
fn looks_leave_a_guest_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let guest = monitor(&path, &[]);
    let control = Control::new(Arc::new(Qmp::connect(&path).unwrap()));
    let runs = || guest.lock().unwrap().runs;
    control.stop_to_look().unwrap();
    assert!(!runs());
    control.go_on().unwrap();
    assert!(runs());
    control.pause().unwrap();
    control.stop_to_look().unwrap();
    control.go_on().unwrap();
    assert!(!runs(), "it was paused before");
    control.run().unwrap();
    assert!(runs());
}

#[test]
fn a_guest_that_stands_still_has_written_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let guest = monitor(&path, &[]);
    let (qmp, writes) = (Qmp::connect(&path).unwrap(), Writes::default());
    let possible = || {
        writes.look(&qmp).unwrap();
        writes.possible()
    };
    let say = |command| drop(qmp.execute(command, &Value::Null).unwrap());
    assert!(possible() && possible(), "it runs");
    say("stop");
    assert!(possible(), "it ran until now");
    assert!(!possible() && !possible());
    say("cont");
    say("stop");
    assert!(possible(), "it ran in between");
    assert!(!possible());
    guest.lock().unwrap().breaks_at.push("query-status");
    assert!(possible(), "over another connection nobody knows what came before it");
    assert!(!possible());
}

#[test]
fn a_throttle_stops_and_lets_go_on_but_for_who_holds_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let guest = monitor(&path, &[]);
    let control = Control::new(Arc::new(Qmp::connect(&path).unwrap()));
    let count = |what: &str| guest.lock().unwrap().said.iter().filter(|said| *said == what).count();
    let runs = || guest.lock().unwrap().runs;
    control.throttle(50).unwrap();
    wait_until("it is stopped and let go on", PATIENCE, || count("stop") > 3 && count("cont") > 3);
    control.pause().unwrap();
    let (before, period) = (count("cont"), Duration::from_millis(50));
    std::thread::sleep(3 * period);
    assert!(!runs() && count("cont") == before, "nobody lets a guest run that is paused");
    control.run().unwrap();
    for _ in 0..20 {
        // At whatever moment of its turns.
        control.stop_to_look().unwrap();
        assert!(!runs());
        control.go_on().unwrap();
    }
    let before = count("stop");
    wait_until("it is throttled as before", PATIENCE, || count("stop") > before + 2);
    control.throttle(0).unwrap();
    assert!(runs());
    let before = count("stop");
    std::thread::sleep(3 * period);
    assert!(runs() && count("stop") == before, "{:?}", guest.lock().unwrap());
}
