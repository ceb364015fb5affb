//! The dirty logs over a VM that is not ours: made with kvm-ioctls, on vm-memory's memory, with a device that writes through that.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use pagecopy::backend::{DirtyLog, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::PAGE_SIZE;
use vmm_shim::adapter::VmMemory;
use vmm_shim::bitmap_log::BitmapLog;
use vmm_shim::conformance::{Page, Subject, run};
use vmm_shim::kvm::{DirtyRings, KvmBitmapLog, KvmRingLog, KvmSlots, Slot};
use vmm_shim::union_log::UnionLog;
use vmm_shim::vm_memory::bitmap::AtomicBitmap;
use vmm_shim::vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Where the guest's code is, and where its list of pages, as real-mode segments.
const CODE: u64 = 0x1000;
const LIST: u64 = 0x2000;
/// Two regions below 1 MiB, neither a whole number of chunks.
const REGIONS: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 74 * PAGE_SIZE), (GuestAddress(0x60000), 67 * PAGE_SIZE)];

/// For each of `cx` segments from `si` on, adds one to the first word of the segment.
#[rustfmt::skip]
const GUEST: [u8; 11] = [
    0xad,                         // next: lodsw
    0x8e, 0xc0,                   //       mov es, ax
    0x26, 0xff, 0x06, 0x00, 0x00, //       inc word es:[0]
    0xe2, 0xf6,                   //       loop next
    0xf4,                         //       hlt
];

/// A VM as any program makes it. It does not know of this crate.
struct Theirs {
    vm: VmFd,
    memory: Memory,
    regions: Vec<kvm_userspace_memory_region>,
}

impl Theirs {
    fn new() -> Option<Self> {
        let vm = match vmm_shim::kvm::open() {
            Ok(kvm) => kvm.create_vm().unwrap(),
            Err(e) => {
                println!("skipped: {e}");
                return None;
            }
        };
        let memory = Memory::from_ranges(&REGIONS).unwrap();
        // Numbers as a VMM may choose them.
        let region = |(i, r): (usize, &<Memory as GuestMemoryBackend>::R)| kvm_userspace_memory_region {
            slot: 7 - 2 * i as u32,
            flags: 0,
            guest_phys_addr: r.start_addr().0,
            memory_size: r.len(),
            userspace_addr: r.get_host_address(MemoryRegionAddress(0)).unwrap() as u64,
        };
        let regions: Vec<_> = memory.iter().enumerate().map(region).collect();
        memory.write_slice(&GUEST, GuestAddress(CODE)).unwrap();
        Some(Self { vm, memory, regions })
    }

    fn vcpu(&self) -> VcpuFd {
        let vcpu = self.vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu
    }

    fn ram(&self) -> Arc<VmMemory<Memory>> {
        Arc::new(VmMemory::new(self.memory.clone()).unwrap())
    }

    fn slots(&self, slots: &[Slot]) -> Result<KvmSlots, pagecopy::backend::BackendError> {
        // SAFETY: the slots are vm-memory's mappings, and the VM never runs again once they are dropped.
        unsafe { KvmSlots::new(&self.vm, self.ram(), slots) }
    }

    fn all_slots(&self) -> Vec<Slot> {
        self.regions.iter().map(|&r| r.into()).collect()
    }
}

/// Memory that a vCPU of theirs writes, and a device.
struct Written<L> {
    log: L,
    ram: Arc<VmMemory<Memory>>,
    vcpu: Arc<Mutex<VcpuFd>>,
    on_ring_full: Box<dyn Fn() + Send + Sync>,
}

impl<L> Written<L> {
    /// Half of the pages by the vCPU, half by the device.
    fn write_pages(&self, pages: &[Page]) {
        let layout = self.ram.layout();
        let address = |&(chunk, bit): &Page| layout.address(chunk, bit).unwrap();
        let memory = self.ram.memory();
        let (by_vcpu, by_device): (Vec<u64>, Vec<u64>) =
            pages.iter().map(address).partition(|gpa| gpa >> 12 & 1 == 0);
        for gpa in by_device {
            let old: u64 = memory.read_obj(GuestAddress(gpa + 8)).unwrap();
            memory.write_obj(old + 1, GuestAddress(gpa + 8)).unwrap();
        }
        let segments: Vec<u8> = by_vcpu.iter().flat_map(|gpa| ((gpa >> 4) as u16).to_le_bytes()).collect();
        if segments.is_empty() {
            return;
        }
        memory.write_slice(&segments, GuestAddress(LIST)).unwrap();
        let mut vcpu = self.vcpu.lock().unwrap();
        let regs =
            kvm_regs { rip: CODE, rsi: LIST, rcx: by_vcpu.len() as u64, rflags: 2, ..kvm_regs::default() };
        vcpu.set_regs(&regs).unwrap();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => return,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => (self.on_ring_full)(),
                Err(e) if e.errno() == libc::EINTR => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

impl<L: DirtyLog> Subject for Written<L> {
    fn ram(&self) -> &dyn GuestRam {
        &*self.ram
    }
    fn log(&self) -> &dyn DirtyLog {
        &self.log
    }
    fn write(&self, pages: &[Page]) {
        self.write_pages(pages);
    }
    fn writable(&self) -> Vec<Page> {
        let layout = self.ram.layout();
        let pages =
            (0..layout.chunks()).flat_map(|chunk| bits(layout.valid(chunk)).map(move |bit| (chunk, bit)));
        pages.filter(|page| *page > (0, 2)).collect()
    }
    fn exact(&self) -> bool {
        true
    }
    fn extra_pages(&self) -> usize {
        // The code, and the list.
        2
    }
}

fn with_bitmap(manual: bool) -> Option<Written<UnionLog<KvmBitmapLog, BitmapLog<Memory>>>> {
    let theirs = Theirs::new()?;
    let slots = Arc::new(theirs.slots(&theirs.all_slots()).unwrap());
    let kvm = match manual {
        true => KvmBitmapLog::new(slots).unwrap(),
        false => KvmBitmapLog::without_manual_protection(slots),
    };
    let ram = theirs.ram();
    let log = UnionLog::new(kvm, BitmapLog::new(theirs.memory.clone(), ram.layout()).unwrap());
    let vcpu = Arc::new(Mutex::new(theirs.vcpu()));
    Some(Written { log, ram, vcpu, on_ring_full: Box::new(|| unreachable!("there is no ring")) })
}

#[test]
fn bitmaps_of_somebody_elses_vm_conform() {
    for manual in [true, false] {
        let Some(written) = with_bitmap(manual) else { return };
        run(&written).unwrap();
    }
}

#[test]
fn rings_of_somebody_elses_vm_conform() {
    let Some(theirs) = Theirs::new() else { return };
    let rings = match DirtyRings::enable(&theirs.vm, 1 << 10) {
        Ok(rings) => rings,
        Err(e) => return println!("skipped: {e}"),
    };
    assert_eq!(rings.entries(), 1 << 10);
    let vcpu = theirs.vcpu();
    let slots = Arc::new(theirs.slots(&theirs.all_slots()).unwrap());
    let vcpu = Arc::new(Mutex::new(vcpu));
    // Whoever has the lock is out of the guest.
    let kicked = vcpu.clone();
    let flush = move || drop(kicked.lock().unwrap());
    let kvm = {
        let fd: &dyn AsRawFd = &*vcpu.lock().unwrap();
        Arc::new(KvmRingLog::new(slots, rings, &[fd], flush).unwrap())
    };
    let ram = theirs.ram();
    let full = kvm.clone();
    let log = UnionLog::new(kvm.clone(), BitmapLog::new(theirs.memory.clone(), ram.layout()).unwrap());
    let on_ring_full = Box::new(move || full.harvest().unwrap());
    run(&Written { log, ram, vcpu, on_ring_full }).unwrap();
    assert!(kvm.written_by_vcpu().is_some_and(|written| written.len() == 1));
}

#[test]
fn writes_of_devices_are_in_no_log_of_kvm() {
    let Some(written) = with_bitmap(true) else { return };
    written.log.start().unwrap();
    // Page 5 is the device's, page 4 the vCPU's.
    written.write_pages(&[(0, 5), (0, 4)]);
    let (by_kvm, by_both) = (PageBitmap::new(4), PageBitmap::new(4));
    written.log.first().sync(&by_kvm).unwrap();
    assert_eq!(by_kvm.get(0) & 0b11_0000, 0b01_0000);
    written.log.sync(&by_both).unwrap();
    assert_eq!(by_both.get(0) & 0b10_0000, 0b10_0000);
}

#[test]
fn slots_that_do_not_fit_are_refused() {
    let Some(theirs) = Theirs::new() else { return };
    let all = theirs.all_slots();
    let refused = |slots: &[Slot], part: &str| {
        let error = theirs.slots(slots).unwrap_err();
        let text = format!("{error}: {}", error.source);
        assert!(text.contains(part), "{text}");
    };
    refused(&all[..1], "is in no memory slot");
    refused(&[all[0], all[1], all[1]], "is in two memory slot");
    refused(&[all[0], Slot { gpa: 0x50000, ..all[1] }], "does not lie in one region");
    refused(&[all[0], Slot { len: all[1].len + 4096, ..all[1] }], "does not lie in one region");
    refused(&[Slot { gpa: 0x1000, len: 4096, ..all[0] }, all[1]], "cuts a chunk");
    // A region may be of several slots, where they meet between chunks.
    let (first, rest) = (64 * 4096, all[0].len - 64 * 4096);
    let halves = [
        Slot { len: first, ..all[0] },
        Slot { number: 1, gpa: first, len: rest, host: all[0].host + first, ..all[0] },
        all[1],
    ];
    theirs.slots(&halves).unwrap();
    // KVM has them now, and refuses the same numbers with other memory.
    refused(&all, "turning dirty logging off for slot 7");
}
