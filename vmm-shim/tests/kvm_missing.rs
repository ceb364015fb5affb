//! A guest that runs on real KVM and misses pages: it can be stopped whatever it waits for.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::*;
use pagecopy::backend::{Guest, GuestRam, MissingPages, StateBlob};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::PAGE_SIZE;
use vm_memory::Bytes;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::counter::{Checker, CounterParams, Side};
use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig, VmState};

const CPUS: u8 = 2;
const BYTES: u64 = 32 << 20;
const PARAMS: CounterParams = CounterParams { working_set: 4 << 20, pages_per_s: 0, page_words: 8 };

/// A counter that has run and stands still, and its state.
struct Left {
    ram: Arc<AnonRam>,
    console: Console,
    state: Vec<StateBlob>,
}

impl Left {
    fn new() -> Self {
        let ram = AnonRam::flat(BYTES);
        let (vm, console) = vm(CPUS, GuestImage::Counter(PARAMS), Tracker::None, &ram);
        vm.resume().unwrap();
        wait_for(&vm, "passes", || console.passes(CPUS) >= 2);
        vm.pause().unwrap();
        let state = StateBlob::all_of(&vm).unwrap();
        Self { ram, console, state }
    }
}

/// The same guest in another VM, where all pages are missing.
struct Came {
    vm: Vm,
    console: Console,
    missing: Box<dyn MissingPages>,
    /// Faults that are still answered.
    answers: AtomicU64,
    /// Faults that wait.
    waiting: AtomicU64,
    over: AtomicBool,
}

impl Came {
    fn new(answers: u64) -> Option<Self> {
        let layout = pagecopy::layout::Layout::flat(BYTES).unwrap();
        let memory = Arc::new(GuestMemory::create(layout, &Backing::Memfd).unwrap());
        if let Err(error) = memory.missing_unit() {
            println!("skipped: {error}");
            return None;
        }
        let chunks = memory.layout().chunks();
        let all = PageBitmap::new(chunks);
        for chunk in 0..chunks {
            all.insert(chunk, memory.layout().valid(chunk));
        }
        let missing = memory.clone().miss(&all).unwrap();
        let config = VmConfig { cpus: CPUS, guest: GuestImage::Incoming, tracker: Tracker::None };
        let console = Console::default();
        let vm = Vm::new(config, memory, Box::new(console.clone())).unwrap();
        vm.start().unwrap();
        Some(Self {
            vm,
            console,
            missing,
            answers: answers.into(),
            waiting: AtomicU64::new(0),
            over: AtomicBool::new(false),
        })
    }

    /// Brings pages that are touched, as long as there are answers.
    fn serve(&self, from: &AnonRam) {
        let (mut faults, mut page) = (Vec::new(), [0; PAGE_SIZE]);
        while !self.over.load(Ordering::SeqCst) {
            self.missing.wait(&mut faults, Duration::from_millis(10)).unwrap();
            // What is not answered waits until there are answers again.
            faults.retain(|fault| {
                let less = |answers: u64| answers.checked_sub(1);
                if self.answers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_err() {
                    return true;
                }
                from.chunk(fault.chunk).read_slice(&mut page, fault.page as usize * PAGE_SIZE).unwrap();
                self.missing.place(fault.chunk, fault.page, &page).unwrap();
                self.missing.settle(*fault).unwrap();
                false
            });
            self.waiting.store(faults.len() as u64, Ordering::SeqCst);
        }
    }

    /// Does something with the guest while its pages come, and again when it no longer runs.
    fn run(&self, left: &Left, act: impl FnOnce()) {
        std::thread::scope(|scope| {
            scope.spawn(|| self.serve(&left.ram));
            // Also when it fails.
            let _over = Over(&self.over);
            self.vm.load_state(&left.state).unwrap();
            self.vm.resume().unwrap();
            act();
        });
    }
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Page tables, code, stack, parameters, data: each is what it waits for in one of the cases.
#[test]
fn it_is_stopped_for_good_whatever_it_waits_for() {
    if !kvm() {
        return;
    }
    let left = Left::new();
    for answers in 0..24 {
        let Some(came) = Came::new(answers) else { return };
        came.run(&left, || {
            wait_for(&came.vm, "a fault", || came.waiting.load(Ordering::SeqCst) > 0);
            let printed = came.console.len();
            came.vm.stop_for_good(&|| came.missing.end()).unwrap();
            assert_eq!(came.vm.state(), VmState::Paused);
            assert_eq!(came.console.len(), printed, "after {answers}: it printed what it did on zeros");
        });
        let error = came.vm.resume().unwrap_err().to_string();
        assert!(error.contains("cannot resume"), "{error}");
        assert!(StateBlob::all_of(&came.vm).is_err());
    }
}

#[test]
fn where_it_cannot_be_paused_it_runs_on() {
    if !kvm() {
        return;
    }
    let left = Left::new();
    let Some(came) = Came::new(0) else { return };
    came.run(&left, || {
        wait_for(&came.vm, "a fault", || came.waiting.load(Ordering::SeqCst) > 0);
        match came.vm.pause() {
            Err(error) => {
                // Either may be the one for which KVM itself reads a page.
                assert!(error.what.contains("vCPU ") && error.what.contains("page"), "{error}");
                assert_eq!(came.vm.state(), VmState::Running);
            }
            // KVM got by without reading memory itself.
            Ok(()) => came.vm.resume().unwrap(),
        }
        came.answers.store(u64::MAX, Ordering::SeqCst);
        wait_for(&came.vm, "passes", || came.console.passes(CPUS) >= 2);
        came.vm.pause().unwrap();
    });
    let mut checker = Checker::new(CPUS, PARAMS.pages(CPUS));
    checker.feed(Side::Source, &left.console.bytes()).unwrap();
    checker.feed(Side::Destination, &came.console.bytes()).unwrap();
}

/// KVM itself reads what an instruction prints from memory: the byte that it gets when nobody brings the page must not go out.
#[test]
fn what_it_would_print_from_a_lost_page_goes_nowhere() {
    if !kvm() {
        return;
    }
    // cld; mov si, 0x9000; mov dx, 0x3f8; again: outsb; jmp again
    let image = vec![0xfc, 0xbe, 0x00, 0x90, 0xba, 0xf8, 0x03, 0x6e, 0xeb, 0xfd];
    let layout = pagecopy::layout::Layout::flat(1 << 20).unwrap();
    let memory = Arc::new(GuestMemory::create(layout, &Backing::Memfd).unwrap());
    if let Err(error) = memory.missing_unit() {
        println!("skipped: {error}");
        return;
    }
    let config = VmConfig { cpus: 1, guest: GuestImage::RealMode(image), tracker: Tracker::None };
    let console = Console::default();
    let vm = Vm::new(config, memory.clone(), Box::new(console.clone())).unwrap();
    let pages = PageBitmap::new(memory.layout().chunks());
    pages.insert(0, 1 << 9);
    let missing = memory.miss(&pages).unwrap();
    vm.start().unwrap();
    vm.resume().unwrap();
    let mut faults = Vec::new();
    while faults.iter().all(|fault: &pagecopy::backend::Fault| fault.page != 9) {
        missing.wait(&mut faults, Duration::from_secs(5)).unwrap();
        faults.iter().filter(|fault| fault.page != 9).for_each(|&fault| missing.settle(fault).unwrap());
    }
    vm.stop_for_good(&|| missing.end()).unwrap();
    // Whose end prints what is left of a line.
    drop(vm);
    assert_eq!(console.bytes(), b"");
}
