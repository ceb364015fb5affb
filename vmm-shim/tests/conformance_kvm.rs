//! The conformance suite over the trackers that watch vCPUs: KVM's bitmap, its rings of two sizes, and userfaultfd under
//! a guest that runs on KVM.

mod common;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::kvm;
use pagecopy::backend::{DirtyLog, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE, Region};
use vmm_shim::bitmap_log::{BitmapLog, MarkedMemory};
use vmm_shim::conformance::{Page, Subject, run};
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::map;
use vmm_shim::uffd_log::UffdLog;
use vmm_shim::union_log::UnionLog;
use vmm_shim::vm_memory::bitmap::AtomicBitmap;
use vmm_shim::vmm::writer::{FIRST_FREE, Writer};
use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig};

const MIB: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

/// Two regions, neither a whole number of chunks.
fn layout() -> Layout {
    Layout::new(vec![
        Region::new("low", 0, 16 * MIB + 5 * PAGE),
        Region::new("high", 4 << 30, MIB + 67 * PAGE),
    ])
    .unwrap()
}

/// What the host writes to the memory of one of our own VMs: it goes by address, so it is marked by hand.
#[derive(Clone)]
struct Marks(Arc<Vec<(u64, AtomicBitmap)>>);

impl Marks {
    fn new(layout: &Layout) -> Self {
        let page = NonZeroUsize::new(PAGE_SIZE).unwrap();
        let bitmap = |r: &Region| (r.len, AtomicBitmap::new(r.len as usize, page));
        Self(Arc::new(layout.regions().iter().map(bitmap).collect()))
    }
}

impl MarkedMemory for Marks {
    fn each_bitmap(&self, each: &mut dyn FnMut(u64, &AtomicBitmap)) {
        self.0.iter().for_each(|(len, bitmap)| each(*len, bitmap));
    }
}

/// Memory that a vCPU writes, and the host.
struct Written<'a> {
    memory: Arc<GuestMemory>,
    log: UnionLog<Arc<dyn DirtyLog>, BitmapLog<Marks>>,
    marks: Marks,
    writer: Mutex<Writer<'a>>,
}

impl Written<'_> {
    /// The pages through which the guest is told what to write: all in the first region, which starts at 0.
    fn note_host_writes(&self, pages: usize) {
        let (_, bitmap) = &self.marks.0[0];
        bitmap.set_addr_range(map::FREE as usize, pages * 8 + 1);
        bitmap.set_addr_range(map::PARAMS as usize, 1);
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
        let addresses: Vec<u64> =
            pages.iter().map(|&(chunk, bit)| layout.address(chunk, bit).unwrap()).collect();
        // After the writes, as whoever marks what it writes does. The guest's are in the log already then, so before, too.
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
    let marks = Marks::new(memory.layout());
    let log = UnionLog::new(log, BitmapLog::new(marks.clone(), memory.layout()).unwrap());
    run(&Written { memory, log, marks, writer: Mutex::new(Writer::new(&vm)) }).unwrap();
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
