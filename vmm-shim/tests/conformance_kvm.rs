//! The conformance suite over the trackers that watch vCPUs: KVM's bitmap, its rings of two sizes, and userfaultfd under
//! a guest that runs on KVM.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::kvm;
use pagecopy::backend::{BackendError, DirtyLog, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE, Region};
use vmm_shim::conformance::{Page, Subject, check};
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::map;
use vmm_shim::uffd_log::UffdLog;
use vmm_shim::vmm::writer::{FIRST_FREE, Writer};
use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig};

const MIB: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

/// Two regions, neither a whole number of chunks.
fn layout() -> Layout {
    Layout::new(vec![
        Region { name: "low".into(), gpa: 0, len: 16 * MIB + 5 * PAGE },
        Region { name: "high".into(), gpa: 4 << 30, len: MIB + 67 * PAGE },
    ])
    .unwrap()
}

/// A tracker together with what the host writes to guest memory, which KVM does not see: a VMM owes the union of both.
struct WithHostWrites {
    log: Arc<dyn DirtyLog>,
    /// Pages the host has written since the last sync.
    host: PageBitmap,
}

impl DirtyLog for WithHostWrites {
    fn name(&self) -> &'static str {
        self.log.name()
    }
    fn start(&self) -> Result<(), BackendError> {
        for chunk in 0..self.host.chunks() {
            self.host.take(chunk);
        }
        self.log.start()
    }
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        let mut pages = self.log.sync(dirty)?;
        for chunk in 0..self.host.chunks() {
            let written = self.host.take(chunk);
            dirty.insert(chunk, written);
            pages += u64::from(written.count_ones());
        }
        Ok(pages)
    }
    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        self.log.clear(first, pages)
    }
    fn stop(&self) -> Result<(), BackendError> {
        self.log.stop()
    }
}

/// Memory that a vCPU writes.
struct Written<'a> {
    memory: Arc<GuestMemory>,
    log: WithHostWrites,
    writer: Mutex<Writer<'a>>,
}

impl Written<'_> {
    /// The pages through which the guest is told what to write.
    fn note_host_writes(&self, pages: usize) {
        let list = (0..=pages as u64 * 8 / PAGE).map(|page| map::FREE + page * PAGE);
        for gpa in list.chain([map::PARAMS]) {
            let (chunk, bit) = self.memory.layout().page_at(gpa).unwrap();
            self.log.host.insert(chunk, 1 << bit);
        }
    }
}

impl Subject for Written<'_> {
    fn ram(&self) -> &dyn GuestRam {
        &*self.memory
    }
    fn log(&self) -> &dyn DirtyLog {
        &self.log
    }
    fn write(&self, pages: &[Page]) {
        let layout = self.memory.layout();
        let addresses: Vec<u64> = pages
            .iter()
            .map(|&(chunk, bit)| {
                let place = layout.locate(chunk).unwrap();
                layout.regions()[place.region].gpa + place.offset + u64::from(bit) * PAGE
            })
            .collect();
        // Before, for a sync that comes between; and after, for one that came too early.
        self.note_host_writes(pages.len());
        self.writer.lock().unwrap().write(&addresses).unwrap();
        self.note_host_writes(pages.len());
    }
    fn writable(&self) -> Vec<Page> {
        let layout = self.memory.layout();
        let first = layout.page_at(FIRST_FREE).unwrap();
        (0..layout.chunks())
            .flat_map(|chunk| bits(layout.valid(chunk)).map(move |bit| (chunk, bit)))
            .filter(|&page| page >= first)
            .collect()
    }
    fn exact(&self) -> bool {
        true
    }
    fn extra_pages(&self) -> usize {
        // The parameters and the list, the code, the stack, the task state segment, and the page tables with their accessed bits.
        32
    }
}

fn conforms(tracker: Tracker, backing: &Backing) {
    if !kvm() {
        return;
    }
    let memory = Arc::new(GuestMemory::create(layout(), backing).unwrap());
    let config = VmConfig { cpus: 1, guest: GuestImage::Writer, tracker };
    let vm = Vm::new(config, memory.clone(), Box::new(std::io::sink())).unwrap();
    vm.start().unwrap();
    let log = match vm.dirty_log() {
        Some(log) => log,
        None => match UffdLog::new(memory.clone()) {
            Ok(log) => Arc::new(log),
            Err(e) => return println!("skipped: {e}: {}", e.source),
        },
    };
    let log = WithHostWrites { log, host: PageBitmap::new(layout().chunks()) };
    check(&Written { memory, log, writer: Mutex::new(Writer::new(&vm)) });
}

#[test]
fn kvm_bitmap_conforms() {
    conforms(Tracker::Bitmap, &Backing::Anonymous { huge: false });
    conforms(Tracker::Bitmap, &Backing::Memfd);
}

#[test]
fn kvm_bitmap_conforms_over_huge_pages() {
    conforms(Tracker::Bitmap, &Backing::Anonymous { huge: true });
}

#[test]
fn kvm_ring_conforms() {
    conforms(Tracker::Ring, &Backing::Anonymous { huge: false });
    conforms(Tracker::Ring, &Backing::Anonymous { huge: true });
}

#[test]
fn small_kvm_ring_conforms() {
    // Smaller than what the suite writes at once: the vCPU stops on full rings.
    conforms(Tracker::RingOf { entries: 1024 }, &Backing::Anonymous { huge: false });
}

#[test]
fn userfaultfd_conforms_under_kvm() {
    conforms(Tracker::None, &Backing::Anonymous { huge: false });
    conforms(Tracker::None, &Backing::Memfd);
}

/// A scan that protects keeps every fault of the VM from ending while it lasts: syncs without a pause between them, over memory
/// that takes long to scan, must do that only where the guest has written.
#[test]
fn userfaultfd_syncs_back_to_back_do_not_stop_the_guest() {
    if !kvm() {
        return;
    }
    let memory = Arc::new(
        GuestMemory::create(Layout::flat(256 * MIB).unwrap(), &Backing::Anonymous { huge: false }).unwrap(),
    );
    memory.populate(0, memory.layout().chunks()).unwrap();
    let config = VmConfig { cpus: 1, guest: GuestImage::Writer, tracker: Tracker::None };
    let vm = Vm::new(config, memory.clone(), Box::new(std::io::sink())).unwrap();
    vm.start().unwrap();
    let log = match UffdLog::new(memory.clone()) {
        Ok(log) => log,
        Err(e) => return println!("skipped: {e}: {}", e.source),
    };
    log.start().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let dirty = PageBitmap::new(memory.layout().chunks());
            while !done.load(Ordering::Acquire) {
                log.sync(&dirty).unwrap();
            }
        });
        let mut writer = Writer::new(&vm);
        // Every page is written for the first time since the log started: each takes a fault.
        let written = (0..20).try_for_each(|round| {
            let pages: Vec<u64> = (0..50).map(|i| 16 * MIB + (round * 50 + i) * 7 * PAGE).collect();
            writer.write(&pages).map(drop)
        });
        done.store(true, Ordering::Release);
        written.unwrap();
    });
}
