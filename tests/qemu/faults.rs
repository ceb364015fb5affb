//! A pair of QEMUs, with each process killed, and the link cut, at moments that matter: never two guests run, and the guest goes on
//! where the table in docs/operations.md says.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::json;
use testkit::proxy::Port;
use testkit::{PATIENCE, wait_until};

use crate::common::{Ended, Ferry, turn};
use crate::rig::{self, Qemu, Rig, beats};
use crate::{LONG, receive};

/// A path that can be cut, and mended.
pub(crate) struct Path {
    pub(crate) port: Port,
    down: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Path {
    pub(crate) fn to(uri: &str) -> Self {
        let target = uri.strip_prefix("tcp:").unwrap().to_owned();
        let (down, open) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (is_down, all) = (down.clone(), open.clone());
        let port = Port::open(move |_, client| {
            let mut all = all.lock().unwrap();
            let Some(server) =
                (!is_down.load(Ordering::SeqCst)).then(|| TcpStream::connect(&target).ok()).flatten()
            else {
                return;
            };
            for (from, to) in [(&client, &server), (&server, &client)] {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(got @ 1..) = from.read(&mut buffer) {
                        if to.write_all(&buffer[..got]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
            all.extend([client, server]);
        });
        Self { port, down, open }
    }

    pub(crate) fn cut(&self) {
        let mut open = self.open.lock().unwrap();
        self.down.store(true, Ordering::SeqCst);
        open.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    pub(crate) fn mend(&self) {
        self.down.store(false, Ordering::SeqCst);
    }
}

/// A migration under way, of which pages have come.
struct UnderWay {
    from: Qemu,
    to: Qemu,
    sending: Ferry,
    receiving: Ferry,
    path: Path,
    api: String,
}

impl UnderWay {
    fn begin(rig: &Rig, options: &[&str]) -> Self {
        let (from, to) = (rig.start(&[]), rig.start_waiting(&[]));
        from.wait_beats(3);
        let (receiving, uri) = receive(&to);
        let path = Path::to(&uri);
        let (uri, qmp) = (path.port.uri(), from.qmp());
        let api = format!("{qmp}.api");
        let command = ["qemu", "send", &uri, "--qmp", &qmp, "--api", &api, "--codec", "raw", "--json"];
        let sending = Ferry::start([&command[..], options].concat());
        wait_until("pages come", LONG, || to.populated_bytes() > 8 << 20);
        Self { from, to, sending, receiving: receiving.unwrap(), path, api }
    }

    fn ctl(&self, args: &[&str]) -> Ended {
        Ferry::start([&["ctl", &self.api], args].concat()).wait_for(PATIENCE)
    }

    /// Waits until the guest is paused before its switchover.
    fn wait_paused(&self) {
        wait_until("it waits before the switchover", LONG, || {
            let status: serde_json::Value =
                serde_json::from_str(&self.ctl(&["status", "--json"]).stdout).unwrap();
            status["migration"]["status"] == "pre-switchover"
        });
    }
}

/// The guest runs on at the source, and found nothing wrong.
fn runs_on(from: &Qemu) {
    let told = beats(&from.console());
    from.wait_beats(told + 3);
    rig::check_console(&from.console());
}

#[test]
fn a_link_that_is_cut_for_a_while_is_taken_up_again() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let it = UnderWay::begin(rig, &["--bandwidth", "30MB/s"]);
    it.path.cut();
    let told = beats(&it.from.console());
    // Whatever happens meanwhile, the guest runs on.
    it.from.wait_beats(told + 20);
    it.path.mend();
    let (sent, received) = (it.sending.wait_for(LONG), it.receiving.wait_for(PATIENCE));
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{sent:?} {received:?}");
    let report: serde_json::Value = serde_json::from_str(&sent.stdout).unwrap();
    assert!(report["reconnects"].as_u64().is_some_and(|count| count >= 1), "{report}");
    it.to.wait_beats(3);
    rig::check_console(&(it.from.console() + &it.to.console()));
}

/// What that is worth: by itself, over the same link, QEMU has failed.
#[test]
fn qemu_alone_fails_where_a_link_is_cut() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let (from, to) = (rig.start(&[]), rig.start_waiting(&[]));
    from.wait_beats(3);
    to.ask_with("migrate-incoming", &json!({ "uri": "tcp:127.0.0.1:0" }));
    let listens = &to.ask("query-migrate")["socket-address"][0];
    let path = Path::to(&format!("tcp:127.0.0.1:{}", listens["port"].as_str().unwrap()));
    from.ask_with("migrate-set-parameters", &json!({ "max-bandwidth": 30 << 20 }));
    from.ask_with("migrate", &json!({ "uri": path.port.uri() }));
    wait_until("pages come", LONG, || to.populated_bytes() > 8 << 20);
    path.cut();
    let told = beats(&from.console());
    from.wait_beats(told + 3);
    path.mend();
    wait_until("it has failed", LONG, || from.ask("query-migrate")["status"] == "failed");
    runs_on(&from);
}

#[test]
fn the_guest_runs_on_whoever_dies_at_the_destination() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    for paused in [false, true] {
        let options: &[&str] =
            if paused { &["--pause-before-switchover"] } else { &["--bandwidth", "4MB/s"] };
        let mut it =
            UnderWay::begin(rig, &[options, &["--reconnect-timeout", "0", "--link-timeout", "3"]].concat());
        if paused {
            it.wait_paused();
            assert_eq!(it.from.ask("query-status")["status"], "paused");
            it.to.kill();
            assert_eq!(it.ctl(&["continue"]).code, Some(0));
        } else {
            it.receiving.signal("KILL");
        }
        let sent = it.sending.wait_for(LONG);
        assert_eq!(sent.code, Some(1), "{sent:?}");
        assert!(sent.stderr.contains("the guest runs on at the source"), "{sent:?}");
        runs_on(&it.from);
        assert!(!it.from.capability("x-ignore-shared"));
        if paused {
            assert_eq!(it.receiving.wait_for(PATIENCE).code, Some(1));
        } else {
            assert_ne!(it.to.status(), "running");
        }
    }
}

#[test]
fn a_cancelled_migration_leaves_all_as_it_was() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let it = UnderWay::begin(rig, &["--pause-before-switchover"]);
    it.wait_paused();
    assert_eq!(it.ctl(&["cancel"]).code, Some(0));
    assert_eq!(it.sending.wait_for(PATIENCE).code, Some(130));
    assert_eq!(it.receiving.wait_for(PATIENCE).code, Some(1));
    runs_on(&it.from);
    assert_eq!((&it.from.status()[..], &it.to.status()[..]), ("running", "inmigrate"));
}

/// Without whoever commanded it a guest stays as it is: running while pages move, paused during the handover.
#[test]
fn a_sender_that_dies_lets_nobody_run_who_did_not() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    for paused in [false, true] {
        let options: &[&str] =
            if paused { &["--pause-before-switchover"] } else { &["--bandwidth", "4MB/s"] };
        let it = UnderWay::begin(rig, options);
        if paused {
            it.wait_paused();
        }
        it.sending.signal("KILL");
        it.receiving.signal("TERM");
        assert_eq!(it.receiving.wait_for(PATIENCE).code, Some(130));
        assert_eq!(it.to.status(), "inmigrate");
        if paused {
            assert_eq!(it.from.status(), "paused");
            it.from.ask("cont");
        }
        runs_on(&it.from);
    }
}

#[test]
fn postcopy_is_refused_with_its_reason() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let (from, to) = (rig.start(&["-S"]), rig.start_waiting(&[]));
    let (receiving, uri) = receive(&to);
    let ended = Ferry::start([
        "qemu",
        "send",
        &uri,
        "--qmp",
        &from.qmp(),
        "--on-timeout",
        "postcopy",
        "--timeout",
        "60",
    ]);
    let ended = ended.wait_for(PATIENCE);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("precopy alone"), "{ended:?}");
    drop(receiving);
    assert_eq!((&from.status()[..], &to.status()[..]), ("prelaunch", "inmigrate"));
}
