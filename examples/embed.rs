//! A VMM of about 100 lines, on vm-memory and kvm-ioctls, that gains live migration by the lines between the two marks.
//!
//! Its guest counts in pages of low memory; its device writes pages of its own at any time, through vm-memory, which marks them. Source
//! and destination are two VMs of this process here, joined by TCP; on two hosts each would have its half of `main`.
//!
//! ```text
//! cargo run --release --example embed                     moves the VM while both write, and shows that nothing was lost
//! cargo run --release --example embed -- --kvm-log-alone  without the device's log: pages are lost, and it says how many
//! ```

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use pageferry::vmm_shim::vm_memory::bitmap::AtomicBitmap;
use pageferry::vmm_shim::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Memory = GuestMemoryMmap<AtomicBitmap>;
type Failed = Box<dyn Error + Send + Sync>;

/// Bytes of guest memory, which begins at address 0.
const MEMORY: usize = 16 << 20;
/// Where the guest's code is, and the pages in which it counts.
const CODE: u64 = 0x1000;
const GUEST_PAGES: std::ops::Range<u64> = 0x10..0x80;
/// The device's pages: all from 1 MiB on.
const DEVICE_PAGES: std::ops::Range<u64> = 0x100..(MEMORY as u64 >> 12);

/// Real-mode code: counts in `bx`, writes it to each of its pages, tells port 0x10, and begins anew.
#[rustfmt::skip]
const GUEST: [u8; 23] = [
    0x43,                         // pass: inc bx
    0xb8, 0x00, 0x10,             //       mov ax, 0x1000
    0x8e, 0xc0,                   // page: mov es, ax
    0x26, 0x89, 0x1e, 0x00, 0x00, //       mov es:[0], bx
    0x05, 0x00, 0x01,             //       add ax, 0x100
    0x3d, 0x00, 0x80,             //       cmp ax, 0x8000
    0x72, 0xf1,                   //       jb page
    0xe6, 0x10,                   //       out 0x10, al
    0xeb, 0xe9,                   //       jmp pass
];

/// A device that writes its pages in turn, and knows what must be in them.
struct Device {
    step: u64,
    wrote: Vec<u64>,
    lost: u64,
}

struct Vm {
    memory: Memory,
    /// The same as the engine takes it, and the VM's slots in it.
    ram: Arc<dyn GuestRam>,
    slots: Arc<KvmSlots>,
    vcpu: Mutex<VcpuFd>,
    device: Mutex<Device>,
    running: AtomicBool,
    /// Passes of the guest, and steps of the device, in this VM.
    passes: AtomicU64,
    steps: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    fn new() -> Result<Arc<Self>, Failed> {
        let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
        let vcpu = vm.create_vcpu(0)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_bindings::kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)])?;
        let ram: Arc<dyn GuestRam> = Arc::new(VmMemory::new(memory.clone())?);
        // SAFETY: the slots are vm-memory's mappings, which are kept for as long as the VM is, and which vm-memory alone touches.
        let slots = Arc::new(unsafe { KvmSlots::new(&vm, ram.clone(), &Slot::of_regions(&*ram)) }?);
        let pages = (DEVICE_PAGES.end - DEVICE_PAGES.start) as usize;
        let device = Mutex::new(Device { step: 0, wrote: vec![0; pages], lost: 0 });
        let (running, passes, steps) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let this =
            Arc::new(Self { memory, ram, slots, vcpu: Mutex::new(vcpu), device, running, passes, steps });
        for work in [Self::run_vcpu, Self::run_device] {
            let vm = this.clone();
            thread::spawn(move || {
                loop {
                    work(&vm);
                    thread::sleep(Duration::from_micros(20));
                }
            });
        }
        Ok(this)
    }

    /// Lets the guest run for one pass.
    fn run_vcpu(&self) {
        let mut vcpu = lock(&self.vcpu);
        if !self.running.load(Ordering::SeqCst) {
            return;
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => self.passes.fetch_add(1, Ordering::SeqCst),
            other => panic!("the guest stopped: {other:?}"),
        };
        // Completes the instruction that made the exit: only then are the registers those after it.
        vcpu.set_kvm_immediate_exit(1);
        let _ = vcpu.run();
        vcpu.set_kvm_immediate_exit(0);
    }

    /// Writes a page, after a look whether it still holds what was written last.
    fn run_device(&self) {
        let mut device = lock(&self.device);
        if !self.running.load(Ordering::SeqCst) {
            return;
        }
        let page = device.step as usize % device.wrote.len();
        let at = GuestAddress((DEVICE_PAGES.start + page as u64) << 12);
        let found: u64 = self.memory.read_obj(at).expect("guest memory");
        device.lost += u64::from(found != device.wrote[page]);
        device.step += 1;
        device.wrote[page] = device.step;
        self.memory.write_obj(device.step, at).expect("guest memory");
        self.steps.fetch_add(1, Ordering::SeqCst);
    }

    /// Pages of the guest that do not hold what it counted last, or one less.
    fn guest_lost(&self) -> Result<usize, Failed> {
        let bx = lock(&self.vcpu).get_regs()?.rbx as u16;
        let held = GUEST_PAGES.map(|page| self.memory.read_obj::<u16>(GuestAddress(page << 12)));
        let held = held.collect::<Result<Vec<u16>, _>>()?;
        Ok(held.iter().filter(|&&held| held != bx && held != bx.wrapping_sub(1)).count())
    }

    /// Waits until the guest has made three passes here, and the device has been in each of its pages.
    fn wait_a_round(&self) {
        let pages = DEVICE_PAGES.end - DEVICE_PAGES.start;
        while self.passes.load(Ordering::SeqCst) < 3 || self.steps.load(Ordering::SeqCst) < pages {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

// ---- live migration from here ----
use pageferry::backend::{BackendError, DirtyLog, Guest, GuestRam, StateBlob, StateSink};
use pageferry::vmm_shim::kvm::{KvmBitmapLog, KvmSlots, Slot};
use pageferry::vmm_shim::{adapter::VmMemory, bitmap_log::BitmapLog, union_log::UnionLog};
use pageferry::{Arrival, Destination, Landing, Report, Source, Uri};

impl Guest for Vm {
    fn pause(&self) -> Result<(), BackendError> {
        self.running.store(false, Ordering::SeqCst);
        drop((lock(&self.vcpu), lock(&self.device))); // whoever was in the midst of something is through
        Ok(())
    }
    fn resume(&self) -> Result<(), BackendError> {
        self.running.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        let regs = lock(&self.vcpu).get_regs().map_err(|e| BackendError::new("read the registers", e))?;
        let device = lock(&self.device);
        let words = [&[regs.rax, regs.rbx, regs.rip, regs.rflags, device.step], &device.wrote[..]].concat();
        out.piece("vm", 1, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>())
    }
    fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError> {
        let mut device = lock(&self.device);
        let fits = |s: &&StateBlob| s.version == 1 && s.bytes.len() == 8 * (5 + device.wrote.len());
        let bytes = state.first().filter(fits).map_or(&[][..], |s| &s.bytes);
        let words: Vec<u64> = bytes.as_chunks().0.iter().map(|&word| u64::from_le_bytes(word)).collect();
        let &[rax, rbx, rip, rflags, step, ref wrote @ ..] = &words[..] else {
            return Err(BackendError::invalid("load a state that is not this VMM's"));
        };
        let regs = kvm_bindings::kvm_regs { rax, rbx, rip, rflags, ..Default::default() };
        lock(&self.vcpu).set_regs(&regs).map_err(|e| BackendError::new("set the registers", e))?;
        *device = Device { step, wrote: wrote.into(), lost: 0 };
        Ok(())
    }
}

fn receive(vm: &Arc<Vm>, listening: Destination) -> Result<Arrival, Failed> {
    let vm = vm.clone();
    let land = move |_: &_| Ok(Landing::guest(vm.ram.clone(), vm.clone()));
    Ok(listening.receive(land)?.wait()?)
}

fn send(vm: &Arc<Vm>, to: &Uri, with_marks: bool) -> Result<Report, Failed> {
    let marks = BitmapLog::new(vm.memory.clone(), vm.ram.layout())?;
    let kvm = KvmBitmapLog::new(vm.slots.clone())?;
    let log: Arc<dyn DirtyLog> = if with_marks { Arc::new(UnionLog::new(kvm, marks)) } else { Arc::new(kvm) };
    let source = Source::builder(vm.ram.clone(), log).guest(vm.clone()).machine("embed 1").build()?;
    Ok(source.start(to)?.wait()?)
}
// ---- to here ----

fn main() -> Result<(), Failed> {
    let with_marks = !std::env::args().any(|arg| arg == "--kvm-log-alone");
    let (source, destination) = (Vm::new()?, Vm::new()?);
    source.memory.write_slice(&GUEST, GuestAddress(CODE))?;
    source.resume()?;
    source.wait_a_round();

    let listening = Destination::builder().bind(&"tcp:127.0.0.1:0".parse()?)?;
    let uri = listening.uri().clone();
    let arriving = destination.clone();
    let arrival = thread::spawn(move || receive(&arriving, listening));
    let report = send(&source, &uri, with_marks)?;
    arrival.join().map_err(|_| "the destination panicked")??;

    destination.wait_a_round();
    destination.pause()?;
    let lost = lock(&destination.device).lost as usize + destination.guest_lost()?;
    println!("moved in {} rounds, {:.1} ms of downtime", report.rounds, report.downtime_ms);
    println!("lost {lost} pages");
    if lost == 0 { Ok(()) } else { Err("the guest is not what it was".into()) }
}
