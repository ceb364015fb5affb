//! A guest that runs on real KVM while it is copied: the copy is of the moment when it was guarded, and both go on from there.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use pagecopy::backend::{GuardedPages, Guest, GuestRam, StateBlob};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE};
use testkit::wait_until;
use vm_memory::Bytes;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::counter::{Checker, CounterParams, Side};
use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig};

const CPUS: u8 = 2;
const BYTES: u64 = 32 << 20;
/// All of its pages are written in a few milliseconds, again and again.
const PARAMS: CounterParams = CounterParams { working_set: 8 << 20, pages_per_s: 0, page_words: 32 };

/// What is copied, and to where.
struct Copy<'a> {
    from: &'a dyn GuestRam,
    to: &'a AnonRam,
    guard: &'a dyn GuardedPages,
    pages: &'a PageBitmap,
    claimed: PageBitmap,
    faults: AtomicUsize,
    over: AtomicBool,
}

impl Copy<'_> {
    fn chunk(&self, chunk: u32) {
        let pages = self.pages.get(chunk);
        if pages == 0 || self.claimed.insert(chunk, 1) == 0 {
            return;
        }
        let mut page = [0u8; PAGE_SIZE];
        for bit in bits(pages) {
            self.from.chunk(chunk).read_slice(&mut page, bit as usize * PAGE_SIZE).unwrap();
            self.to.chunk(chunk).write_slice(&page, bit as usize * PAGE_SIZE).unwrap();
        }
        self.guard.release(chunk, pages).unwrap();
    }

    /// Copies what vCPUs wait for.
    fn serve(&self) {
        let mut faults = Vec::new();
        while !self.over.load(Ordering::SeqCst) {
            self.guard.wait(&mut faults, Duration::from_millis(10)).unwrap();
            self.faults.fetch_add(faults.len(), Ordering::SeqCst);
            faults.drain(..).for_each(|fault| self.chunk(fault.chunk));
        }
    }

    /// Copies the rest, slowly, when some vCPU has waited.
    fn go_through(&self) {
        wait_until("a vCPU that waits", Duration::from_secs(60), || self.faults.load(Ordering::SeqCst) > 0);
        for chunk in 0..self.pages.chunks() {
            self.chunk(chunk);
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Goes on with a guest from its state and memory, for a few passes.
fn goes_on(state: &[StateBlob], ram: &Arc<AnonRam>) -> Vec<u8> {
    let console = Console::default();
    let config = VmConfig { cpus: CPUS, guest: GuestImage::Incoming, tracker: Tracker::None };
    let vm = Vm::new(config, ram.clone(), Box::new(console.clone())).unwrap();
    vm.start().unwrap();
    vm.load_state(state).unwrap();
    vm.resume().unwrap();
    wait_for(&vm, "passes of the copy", || console.passes(CPUS) >= 3);
    vm.pause().unwrap();
    console.bytes()
}

fn the_copy_is_of_one_moment(backing: &Backing) {
    if !kvm() {
        return;
    }
    let memory = Arc::new(GuestMemory::create(Layout::flat(BYTES).unwrap(), backing).unwrap());
    if let Err(error) = memory.guard_check() {
        return println!("skipped: {error}: {}", error.source);
    }
    let console = Console::default();
    let config = VmConfig { cpus: CPUS, guest: GuestImage::Counter(PARAMS), tracker: Tracker::None };
    let vm = Vm::new(config, memory.clone(), Box::new(console.clone())).unwrap();
    vm.start().unwrap();
    vm.resume().unwrap();
    wait_for(&vm, "passes", || console.passes(CPUS) >= 2);
    vm.pause().unwrap();
    let state = StateBlob::all_of(&vm).unwrap();
    let printed = console.bytes();
    let mut words = vec![0; memory.layout().chunks() as usize];
    memory.populated(0, &mut words).unwrap();
    let pages = PageBitmap::new(memory.layout().chunks());
    (0..).zip(words).for_each(|(chunk, word)| {
        pages.insert(chunk, word);
    });
    let begin = Instant::now();
    let guard = memory.clone().guard(&pages).unwrap();
    println!("{backing:?}: {} pages are guarded after {:?}", pages.count(), begin.elapsed());
    let to = AnonRam::flat(BYTES);
    let copy = Copy {
        from: &*memory,
        to: &to,
        guard: &*guard,
        pages: &pages,
        claimed: PageBitmap::new(pages.chunks()),
        faults: AtomicUsize::new(0),
        over: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        // Also when it fails.
        let _over = Over(&copy.over);
        let server = scope.spawn(|| {
            let _over = Over(&copy.over);
            copy.serve();
        });
        vm.resume().unwrap();
        copy.go_through();
        copy.over.store(true, Ordering::SeqCst);
        server.join().unwrap();
    });
    println!("{backing:?}: vCPUs have waited {} times", copy.faults.load(Ordering::SeqCst));
    guard.end().unwrap();
    let at_the_end = console.passes(CPUS);
    wait_for(&vm, "passes after the end", || console.passes(CPUS) >= at_the_end + 3);
    vm.pause().unwrap();
    // The guest has lost nothing, and neither has its copy: each finds what it had written a pass before.
    let checker = Checker::new(CPUS, PARAMS.pages(CPUS));
    checker.clone().feed(Side::Source, &console.bytes()).unwrap();
    let mut of_the_copy = checker;
    of_the_copy.feed(Side::Source, &printed).unwrap();
    of_the_copy.feed(Side::Destination, &goes_on(&state, &to)).unwrap();
}

#[test]
fn of_anonymous_memory() {
    the_copy_is_of_one_moment(&Backing::Anonymous { huge: false });
}

#[test]
fn of_transparent_huge_pages() {
    the_copy_is_of_one_moment(&Backing::Anonymous { huge: true });
}

#[test]
fn of_a_memfd() {
    the_copy_is_of_one_moment(&Backing::Memfd);
}
