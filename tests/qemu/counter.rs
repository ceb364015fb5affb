//! The counter guest in QEMU under KVM: it writes pages without a pause, checks each before it writes it again, and tells of each pass.
//! Where this kernel notes no written pages a lab guest's does, and has an RDMA device too: all of this runs there once more.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;
use testkit::wait_until;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::counter::{Checker, CounterParams, PAGE_WORDS_MAX, Side};
use vmm_shim::guests::firmware;
use vmm_shim::vmm::{self, GuestImage, Tracker, Vm, VmConfig};

use crate::common::{MIB, folder, turn};
use crate::rig::Qemu;
use crate::{LONG, device, hops, in_lab, migrate_by};

const MEMORY_MIB: usize = 64;
/// It is written in passes of a second.
const COUNTER: CounterParams =
    CounterParams { working_set: 8 << 20, pages_per_s: 2000, page_words: PAGE_WORDS_MAX };

/// A guest that goes from QEMU to QEMU.
pub(crate) struct Counter {
    folder: TempDir,
    rom: PathBuf,
    pub(crate) at: Qemu,
    checker: Checker,
    /// How much of its output was checked, of the QEMU where it is.
    read: usize,
    started: AtomicU64,
}

impl Counter {
    /// `None`, with the reason printed, where there is no QEMU or no KVM.
    pub(crate) fn start() -> Option<Self> {
        if std::process::Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
            println!("skipped: no QEMU: qemu-system-x86_64");
            return None;
        }
        if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            println!("skipped: no /dev/kvm");
            return None;
        }
        let folder = folder();
        let (ram, rom) = (folder.path().join("0"), folder.path().join("rom"));
        let layout = vmm::layout((MEMORY_MIB * MIB) as u64).unwrap();
        let memory = GuestMemory::create(layout, &Backing::File { path: ram.clone(), create: true });
        let memory = Arc::new(memory.unwrap());
        let config = VmConfig { cpus: 1, guest: GuestImage::Counter(COUNTER), tracker: Tracker::None };
        drop(Vm::new(config, memory.clone(), Box::new(std::io::sink())).unwrap());
        std::fs::write(&rom, firmware::write(&*memory).unwrap()).unwrap();
        let at = Qemu::start(&ram, MEMORY_MIB, "share=on", &options(&rom));
        let checker = Checker::new(1, COUNTER.pages(1));
        Some(Self { folder, rom, at, checker, read: 0, started: AtomicU64::new(1) })
    }

    /// A QEMU that waits for it.
    pub(crate) fn waiting(&self) -> Qemu {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let ram = self.folder.path().join(number.to_string());
        Qemu::start(
            &ram,
            MEMORY_MIB,
            "share=on",
            &[&options(&self.rom)[..], &["-incoming", "defer"]].concat(),
        )
    }

    /// Checks what it has told since the last look.
    pub(crate) fn look(&mut self) -> u64 {
        let console = self.at.console();
        // To the checker all of one guest's consoles are one: it never goes back.
        self.checker.feed(Side::Source, &console.as_bytes()[self.read..]).unwrap();
        self.read = console.len();
        self.checker.passes()[0].0
    }

    pub(crate) fn wait_passes(&mut self, count: u64) {
        let before = self.look();
        wait_until("it counts and checks", LONG, || self.look() >= before + count);
    }

    /// Moves it, and returns the source's report.
    fn hop(&mut self, listens: &str, options: &[&str]) -> serde_json::Value {
        let next = self.waiting();
        let report = migrate_by(listens, &self.at, &next, options);
        self.look();
        assert_eq!((&self.at.status()[..], &next.status()[..]), ("postmigrate", "running"));
        self.has_gone_to(next);
        report
    }

    /// It is there now, with all that it has told before looked at.
    pub(crate) fn has_gone_to(&mut self, next: Qemu) {
        (self.at, self.read) = (next, 0);
    }
}

/// Without one register that QEMU sets whatever KVM says to it, and that a KVM without hardware does not take.
fn options(rom: &std::path::Path) -> Vec<&str> {
    let rom = rom.to_str().unwrap();
    vec![
        "-machine",
        "q35,memory-backend=ram",
        "-accel",
        "kvm",
        "-cpu",
        "host,-arch-capabilities",
        "-bios",
        rom,
    ]
}

/// Moves it over an address, there and back.
fn goes_over(listens: &str) {
    let Some(mut guest) = Counter::start() else { return };
    let _turn = turn();
    guest.wait_passes(2);
    for hop in 0..hops() {
        let report = guest.hop(listens, &["--final-check", "--streams", "2"]);
        assert_eq!(report["verified"], true, "{report}");
        if vmm_shim::foreign::check().is_ok() {
            // By soft-dirty bits, which told of everything.
            assert!(report["paused_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{report}");
            assert_eq!(report["final_check_pages"], 0, "{report}");
        }
        println!(
            "hop {hop}: {}: downtime {} ms, paused {} ms",
            listens, report["downtime_ms"], report["paused_ms"]
        );
        guest.wait_passes(2);
    }
}

#[test]
fn a_counter_guest_goes_there_and_back_under_kvm() {
    goes_over("tcp:127.0.0.1:0");
}

#[test]
fn a_counter_guest_goes_over_rdma() {
    match device::device() {
        Ok(address) => goes_over(&format!("rdma:{address}:0")),
        Err(why) => println!("skipped: {why}"),
    }
}

#[test]
fn the_labs_guest_passes_this_by_soft_dirty_bits() {
    if vmm_shim::foreign::check().is_ok() {
        return println!("skipped: this kernel notes written pages, the lab is not needed");
    }
    let script =
        "exec \"$0\" --test-threads 1 --show-output --color never counter::a_counter_guest memory::bits_that";
    let Some(lines) = in_lab::run(&[], script) else { return };
    assert!(lines.iter().any(|line| line.starts_with("hop 1: tcp:")), "{}", lines.join("\n"));
    if cfg!(feature = "rdma") {
        assert!(lines.iter().any(|line| line.starts_with("hop 1: rdma:")), "{}", lines.join("\n"));
    }
}
