//! Guests of a QEMU that nobody changed, moved from beside it: a Linux guest that writes its memory and checks it, two QEMUs, two
//! processes of pageferry.

mod common;
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
    let (mut receiving, uri) = receive(to);
    let sending = Ferry::start([&["qemu", "send", &uri, "--qmp", &from.qmp(), "--json"], options].concat());
    let sent = sending.wait_for(LONG);
    let received = receiving.take().unwrap().wait_for(PATIENCE);
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{sent:?} {received:?}");
    serde_json::from_str(&sent.stdout).unwrap()
}

/// Has a QEMU's guest come.
fn receive(to: &Qemu) -> (Option<Ferry>, String) {
    let mut receiving = Ferry::start(["qemu", "recv", "tcp:127.0.0.1:0", "--qmp", &to.qmp(), "--json"]);
    let text = receiving.wait_stderr("listening on ");
    let uri = text.split("listening on ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    (Some(receiving), uri)
}

#[test]
fn a_linux_guest_goes_there_and_back() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let mut at = rig.start(&["-smp", "2"]);
    at.wait_beats(3);
    let mut console = String::new();
    for hop in 0..2 {
        let next = rig.start_waiting(&["-smp", "2"]);
        let report = migrate(&at, &next, &[]);
        assert_eq!(report["verified"], true, "{report}");
        next.wait_beats(5);
        assert_eq!(at.status(), "postmigrate", "hop {hop}");
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
    let (from, to) = (rig.start(&[]), rig.start_waiting(&[]));
    from.wait_beats(3);
    from.ask("stop");
    migrate(&from, &to, &[]);
    assert_eq!((&from.status()[..], &to.status()[..]), ("postmigrate", "paused"));
    let (from_ram, to_ram) = (from.ram(), to.ram());
    assert_eq!(from_ram.len(), rig::MEMORY_MIB * MIB);
    let differ = from_ram.chunks(4096).zip(to_ram.chunks(4096)).filter(|(one, other)| one != other).count();
    assert_eq!(differ, 0, "pages");
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
