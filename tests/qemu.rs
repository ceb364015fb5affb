//! Guests of a QEMU that nobody changed, moved from beside it: a Linux guest that writes its memory and checks it, two QEMUs, two
//! processes of pageferry.
//!
//! Linux takes minutes to boot under KVM in a lab guest, so there `counter.rs` has a guest without a system.

mod common;
#[path = "qemu/counter.rs"]
mod counter;
#[path = "common/device.rs"]
mod device;
#[path = "qemu/faults.rs"]
mod faults;
#[path = "qemu/harness.rs"]
mod harness;
#[path = "common/huge_pages.rs"]
mod huge_pages;
#[path = "common/in_lab.rs"]
mod in_lab;
#[path = "qemu/memory.rs"]
mod memory;
#[path = "qemu/rig.rs"]
mod rig;

use std::time::Duration;

use common::{Ferry, MIB, turn};
use rig::{Qemu, Rig};
use testkit::PATIENCE;

/// Emulation is slow, and the host may be busy.
const LONG: Duration = Duration::from_secs(240);

/// Moves the guest of one QEMU to another, and returns the source's report.
fn migrate(from: &Qemu, to: &Qemu, options: &[&str]) -> serde_json::Value {
    migrate_by("tcp:127.0.0.1:0", from, to, options)
}

/// The same over this address.
fn migrate_by(listens: &str, from: &Qemu, to: &Qemu, options: &[&str]) -> serde_json::Value {
    let (mut receiving, uri) = receive_with(listens, to, &[]);
    let sending = Ferry::start([&["qemu", "send", &uri, "--qmp", &from.qmp(), "--json"], options].concat());
    let sent = sending.wait_for(LONG);
    let received = receiving.take().unwrap().wait_for(PATIENCE);
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{sent:?} {received:?}");
    serde_json::from_str(&sent.stdout).unwrap()
}

/// Has a QEMU's guest come.
fn receive(to: &Qemu) -> (Option<Ferry>, String) {
    receive_with("tcp:127.0.0.1:0", to, &[])
}

/// The same at this address, with options.
fn receive_with(listens: &str, to: &Qemu, options: &[&str]) -> (Option<Ferry>, String) {
    let command = ["qemu", "recv", listens, "--insecure", "--qmp", &to.qmp(), "--json"];
    let mut receiving = Ferry::start([&command[..], options].concat());
    let text = receiving.wait_stderr("listening on ");
    let uri = text.split("listening on ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    (Some(receiving), uri)
}

/// How often a guest goes on: `PAGEFERRY_QEMU_HOPS`, or twice.
fn hops() -> u64 {
    number("PAGEFERRY_QEMU_HOPS").unwrap_or(2)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: no number")))
}

/// `PAGEFERRY_QEMU_CPUS` may say how many vCPUs it has, `PAGEFERRY_QEMU_MIB` how much memory.
#[test]
fn a_linux_guest_goes_there_and_back() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let cpus = number("PAGEFERRY_QEMU_CPUS").unwrap_or(2).to_string();
    let cpus = ["-smp", &cpus];
    let mut at = rig.start(&cpus);
    at.wait_beats(3);
    let mut console = String::new();
    for hop in 0..hops() {
        let next = rig.start_waiting(&cpus);
        let report = migrate(&at, &next, &["--final-check"]);
        assert_eq!(report["verified"], true, "{report}");
        if vmm_shim::foreign::check().is_ok() {
            // By soft-dirty bits, which told of everything.
            assert!(report["paused_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{report}");
            assert_eq!(report["final_check_pages"], 0, "{report}");
        }
        next.wait_beats(5);
        assert_eq!(at.status(), "postmigrate", "hop {hop}");
        println!("hop {hop}: downtime {} ms", report["downtime_ms"]);
        console += &at.console();
        at = next;
    }
    console += &at.console();
    rig::check_console(&console);
}

#[test]
fn a_guest_that_stands_still_arrives_as_it_was() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    // Which each QEMU writes into a page of its guest.
    let ids = ["324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", "a1b2c3d4-0000-4000-8000-0123456789ab"];
    let [here, there] = ids.map(|id| format!("vmgenid,guid={id}"));
    let (from, to) = (rig.start(&["-device", &here]), rig.start_waiting(&["-device", &there]));
    from.wait_beats(3);
    from.ask("stop");
    let report = migrate(&from, &to, &[]);
    assert!(report["notes"][0].as_str().is_some_and(|note| note.contains("vmgenid")), "{report}");
    assert_eq!((&from.status()[..], &to.status()[..]), ("postmigrate", "paused"));
    let (from_ram, to_ram) = (from.ram(), to.ram());
    assert!(from_ram.len() >= 256 * MIB && from_ram.len() == to_ram.len());
    let pages = from_ram.chunks(4096).zip(to_ram.chunks(4096));
    let differ: Vec<_> = pages.filter(|(one, other)| one != other).collect();
    let [(own, theirs)] = differ[..] else { panic!("{} pages", differ.len()) };
    // Its first three numbers are little-endian (UEFI Specification, Appendix A).
    let [of_source, of_destination] = [[0xaf, 0x6e, 0x4e, 0x32, 0xd1, 0xd1], [0xd4, 0xc3, 0xb2, 0xa1, 0, 0]];
    let holds = |page: &[u8], id: [u8; 6]| page.windows(6).any(|bytes| bytes == id);
    assert!(holds(own, of_source) && holds(theirs, of_destination));
    to.ask("cont");
    to.wait_beats(3);
    rig::check_console(&(from.console() + &to.console()));
}

#[test]
fn a_guest_whose_destination_dies_runs_on() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let (from, to) = (rig.start(&[]), rig.start_waiting(&[]));
    from.wait_beats(3);
    let (receiving, uri) = receive(&to);
    let options = ["--reconnect-timeout", "0", "--bandwidth", "4MB/s"];
    let sending =
        Ferry::start([&["qemu", "send", &uri, "--qmp", &from.qmp(), "--json"][..], &options].concat());
    testkit::wait_until("pages come", PATIENCE, || to.populated_bytes() > 0);
    receiving.unwrap().signal("KILL");
    let sent = sending.wait_for(PATIENCE);
    assert_eq!(sent.code, Some(1), "{sent:?}");
    assert_eq!(from.status(), "running");
    assert_ne!(to.status(), "running");
    let beats = rig::beats(&from.console());
    from.wait_beats(beats + 3);
    rig::check_console(&from.console());
    // What was set in QEMU is as before.
    assert!(!from.capability("x-ignore-shared"));
}

/// What `pageferry` says where it refuses a QEMU before anything is done.
fn refused(side: &str, qemu: &Qemu, words: &[&str]) {
    let uri = if side == "send" { "tcp:127.0.0.1:9" } else { "tcp:127.0.0.1:0" };
    let ended = Ferry::start(["qemu", side, uri, "--qmp", &qemu.qmp(), "--json"]).wait_for(PATIENCE);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    for word in words {
        assert!(ended.stderr.contains(word), "{word}: {ended:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(json["status"], "failed");
    assert!(!qemu.capability("x-ignore-shared"));
}

#[test]
fn what_cannot_be_moved_is_refused_by_name() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let private = rig.qemu("share=off", &["-S"]);
    refused("send", &private, &["`ram`", "memory-backend-file", "share=off", "share=on"]);
    drop(private);
    // A second backend that is private.
    let numa = [
        "-S",
        "-m",
        "256M,slots=2,maxmem=1G",
        "-object",
        "memory-backend-ram,id=dimm,size=128M",
        "-device",
        "pc-dimm,memdev=dimm",
    ];
    let dimm = rig.start(&numa);
    refused("send", &dimm, &["`dimm`", "memory-backend-ram", "private", "share=on"]);
    drop(dimm);
    let runs = rig.start(&["-S"]);
    refused("recv", &runs, &["prelaunch", "-incoming defer"]);
    // A control socket that cannot be had, before a migration is begun.
    let (qmp, taken) = (runs.qmp(), runs.qmp());
    let ended =
        Ferry::start(["qemu", "send", "tcp:127.0.0.1:9", "--qmp", &qmp, "--api", &taken]).wait_for(PATIENCE);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(ended.stderr.contains("--api: "), "{ended:?}");
    assert_eq!(runs.status(), "prelaunch");
    drop(runs);
    let waits = rig.start_waiting(&[]);
    refused("send", &waits, &["inmigrate", "no guest in it"]);
    // Something is in its memory: it may be another guest's.
    waits.write(5 << 20, b"x");
    refused("recv", &waits, &["\"ram\"", "not fresh"]);
    assert_eq!(waits.status(), "inmigrate");
}

#[test]
fn a_socket_that_is_no_monitor_is_told_so() {
    let folder = common::folder();
    let path = folder.path().join("sock");
    let uri = format!("unix:{}", path.display());
    let send = || Ferry::start(["qemu", "send", "tcp:127.0.0.1:9", "--qmp", &uri]).wait_for(PATIENCE);
    let nobody = send();
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
    assert!(nobody.stderr.contains("-qmp unix:PATH,server=on,wait=off"), "{nobody:?}");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let answers = [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"{\"hello\": 1}\n", b""];
    let serving = std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, answer).unwrap();
            if answer.is_empty() {
                // It says nothing, as a monitor that has another client.
                std::io::Read::read(&mut stream, &mut [0]).unwrap();
            }
        }
    });
    for words in ["something else", "not QEMU's monitor", "one client at a time"] {
        let ended = send();
        assert_eq!(ended.code, Some(3), "{ended:?}");
        assert!(ended.stderr.contains(words), "{words}: {ended:?}");
    }
    serving.join().unwrap();
}

#[test]
fn a_destination_of_another_shape_is_refused() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let from = rig.start(&["-S"]);
    let (receiving, uri) = {
        let to = rig.qemu_of(128, "share=on", &["-incoming", "defer"]);
        let (receiving, uri) = receive(&to);
        let sending = Ferry::start(["qemu", "send", &uri, "--qmp", &from.qmp()]).wait_for(PATIENCE);
        assert_eq!(sending.code, Some(1), "{sending:?}");
        assert!(sending.stderr.contains("ram of 256 MiB, this QEMU's ram of 128 MiB"), "{sending:?}");
        (receiving, uri)
    };
    drop((receiving, uri));
    assert_eq!(from.status(), "prelaunch");
}
