//! Which memory is moved, and whose.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use testkit::{PATIENCE, Rng};

use crate::common::{Ferry, MIB, folder, turn};
use crate::huge_pages::HugePages;
use crate::migrate;
use crate::rig::{self, Qemu, Rig};
use crate::{receive, refused};

/// A guest that never runs.
fn start(ram: &Path, memory: &[&str], more: &[&str]) -> Qemu {
    let still = ["-machine", "q35", "-accel", "tcg", "-S"];
    Qemu::start(ram, 64, "share=on", &[&still[..], memory, more].concat())
}

#[test]
fn nodes_and_modules_move_each_to_its_own() {
    if Rig::get().is_none() {
        return;
    }
    let _turn = turn();
    let folder = folder();
    let file = |side: &str, what: &str| folder.path().join(format!("{side}-{what}"));
    let mut rng = Rng::new(5);
    let pair = ["from", "to"].map(|side| {
        let object = |id: &str, mib: u64| {
            let path = file(side, id);
            format!("memory-backend-file,id={id},size={mib}M,mem-path={},share=on", path.display())
        };
        let (node, module) = (object("node1", 64), object("module", 128));
        let memory = [
            "-m",
            "128M,slots=2,maxmem=1G",
            "-numa",
            "node,memdev=ram",
            "-object",
            &node,
            "-numa",
            "node,memdev=node1",
            "-object",
            &module,
            "-device",
            "pc-dimm,memdev=module",
        ];
        let waits: &[&str] = if side == "to" { &["-incoming", "defer"] } else { &[] };
        start(&file(side, "ram"), &memory, waits)
    });
    let [from, to] = &pair;
    for (what, mib) in [("ram", 64), ("node1", 64), ("module", 128)] {
        let content = rng.bytes(2 * MIB);
        let into = fs::OpenOptions::new().write(true).open(file("from", what)).unwrap();
        let end = (mib * MIB - content.len()) as u64;
        for at in [8 << 20, end] {
            into.write_all_at(&content, at).unwrap();
        }
    }
    migrate(from, to, &[]);
    for what in ["ram", "node1", "module"] {
        let [sent, came] = ["from", "to"].map(|side| fs::read(file(side, what)).unwrap());
        assert!(sent.iter().any(|&byte| byte != 0));
        assert!(sent == came, "{what}");
    }
    assert_eq!((&from.status()[..], &to.status()[..]), ("postmigrate", "prelaunch"));
}

#[test]
fn memory_that_other_processes_write_is_refused() {
    if Rig::get().is_none() {
        return;
    }
    let _turn = turn();
    let folder = folder();
    let shared = folder.path().join("shared");
    let object = format!("memory-backend-file,id=shared,size=1M,mem-path={},share=on", shared.display());
    let device = ["-object", &object, "-device", "ivshmem-plain,memdev=shared"];
    let qemu = start(&folder.path().join("ram"), &["-machine", "memory-backend=ram"], &device);
    refused("send", &qemu, &["`ivshmem-plain", "device_del", "other processes write"]);
}

/// Bits that lie, or that nobody sets, are asked for and refused, with what works in their place.
#[test]
fn bits_that_say_nothing_are_refused_by_name() {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        return println!("skipped: no QEMU: qemu-system-x86_64");
    }
    let _turn = turn();
    let by_bits = |qemu: &Qemu| {
        let command =
            ["qemu", "send", "tcp:127.0.0.1:9", "--qmp", &qemu.qmp(), "--tracker", "soft-dirty", "--json"];
        let ended = Ferry::start(command).wait_for(PATIENCE);
        ended.code(3).says(&["compare contents instead"]);
        assert_eq!(qemu.status(), "prelaunch");
        ended.stderr
    };
    let folder = folder();
    if vmm_shim::foreign::check().is_err() {
        let qemu = start(&folder.path().join("ram"), &["-machine", "memory-backend=ram"], &[]);
        let said = by_bits(&qemu);
        assert!(said.contains("does not note them") && said.contains("CONFIG_MEM_SOFT_DIRTY"), "{said}");
        return;
    }
    let Some(_reserve) = HugePages::reserve(32) else { return };
    let _mounted = Mounted::new(folder.path());
    let qemu = start(&folder.path().join("ram"), &["-machine", "memory-backend=ram"], &[]);
    let said = by_bits(&qemu);
    assert!(said.contains("hugetlbfs have no soft-dirty bits"), "{said}");
}

/// A hugetlbfs, for as long as this is there.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(at: &'a Path) -> Self {
        let mounted = Command::new("mount").args(["-t", "hugetlbfs", "none"]).arg(at).status().unwrap();
        assert!(mounted.success());
        Self(at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Another user has neither QEMU's files nor its page table, if he may speak to its monitor.
#[test]
fn another_user_is_told_whose_process_it_is() {
    if Rig::get().is_none() {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: only root can become another user");
    }
    let _turn = turn();
    let folder = folder();
    let qemu = start(&folder.path().join("ram"), &["-machine", "memory-backend=ram"], &[]);
    let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    open(folder.path(), 0o755);
    open(&folder.path().join("ram"), 0o600);
    let qmp = qemu.qmp();
    open(Path::new(qmp.strip_prefix("unix:").unwrap()), 0o666);
    // Where others may not go: the command is given to him by a descriptor.
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    let program = folder.path().join("pageferry");
    // By another process: whoever is started meanwhile has no descriptor of it, and it can be run.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_pageferry")).arg(&program).status().unwrap();
    assert!(copied.success());
    open(&program, 0o755);
    command.arg(&program).args(["qemu", "send", "tcp:127.0.0.1:9", "--qmp", &qmp]);
    let ended = Ferry::of(command).wait_for(PATIENCE);
    ended.code(3).says(&["run this as the user of QEMU, or as root"]);
    assert!(ended.stderr.contains("`ram`"), "{ended:?}");
    assert_eq!(qemu.status(), "prelaunch");
}

/// What came of a guest that went elsewhere after all is taken away again, and the QEMU takes another.
#[test]
fn a_failed_attempt_leaves_a_destination_fresh() {
    if Rig::get().is_none() {
        return;
    }
    let _turn = turn();
    let folder = folder();
    let memory = ["-machine", "memory-backend=ram"];
    let from = start(&folder.path().join("from"), &memory, &[]);
    let to = start(&folder.path().join("to"), &memory, &["-incoming", "defer"]);
    let content = Rng::new(9).bytes(32 * MIB);
    from.write(MIB as u64, &content);
    let (receiving, uri) = receive(&to);
    let command = ["qemu", "send", &uri, "--qmp", &from.qmp(), "--codec", "raw", "--bandwidth", "4MB/s"];
    let sending = Ferry::start(command);
    testkit::wait_until("pages come", PATIENCE, || to.populated_bytes() > 4 << 20);
    sending.signal("TERM");
    sending.wait().code(130);
    receiving.unwrap().wait().code(1);
    assert_eq!(to.populated_bytes(), 0);
    // What came by another way is not taken away: QEMU may fill its memory by itself.
    let (receiving, _) = receive(&to);
    to.write(0, &content[..4096]);
    let receiving = receiving.unwrap();
    receiving.signal("TERM");
    receiving.wait().code(130);
    assert!(to.ram()[..4096] == content[..4096]);
    to.write(0, &[0; 4096]);
    migrate(&from, &to, &[]);
    assert!(from.ram() == to.ram());
}

/// Its devices' memory moves with it, where QEMU hands that over (10.0); before, in QEMU's own stream (until 8.0).
#[test]
fn a_guest_in_memfds_goes_there_and_back() {
    let Some(rig) = Rig::get() else { return };
    let _turn = turn();
    let probe = rig.start(&["-S"]);
    let version = &probe.ask("query-version")["qemu"];
    let version = (version["major"].as_u64().unwrap(), version["minor"].as_u64().unwrap());
    drop(probe);
    if ((8, 1)..(10, 0)).contains(&version) {
        return println!("skipped: QEMU {}.{} moves no memory of memfds from outside", version.0, version.1);
    }
    let machine = if version >= (10, 0) { "memory-backend=fd,aux-ram-share=on" } else { "memory-backend=fd" };
    let memory =
        ["-object", "memory-backend-memfd,id=fd,size=256M,share=on", "-machine", machine, "-device", "VGA"];
    let mut at = rig.start(&memory);
    at.wait_beats(3);
    let mut console = String::new();
    for _ in 0..2 {
        let next = rig.start_waiting(&memory);
        migrate(&at, &next, &["--final-check"]);
        next.wait_beats(3);
        console += &at.console();
        at = next;
    }
    rig::check_console(&(console + &at.console()));
    if version >= (10, 0) {
        // What QEMU was set to is as before.
        assert_eq!(at.ask("query-migrate-parameters")["mode"], "normal");
        let private =
            rig.start(&[&memory[..2], &["-machine", "memory-backend=fd,aux-ram-share=off", "-S"]].concat());
        refused("send", &private, &["memfd", "aux-ram-share=on", "memory-backend-file"]);
    }
}
