//! What guarding memory costs, in figures that are printed: `PAGEFERRY_TEST_BYTES=2147483648 cargo test --release -p pageferry-vmm-shim
//! --test guard_costs -- --nocapture --test-threads 1`. Only that it works is tested.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagecopy::backend::GuestRam;
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE};
use vm_memory::Bytes;
use vmm_shim::guest_memory::{Backing, GuestMemory};

fn bytes() -> u64 {
    std::env::var("PAGEFERRY_TEST_BYTES").map_or(16 << 20, |bytes| bytes.parse().unwrap())
}

/// Ends a loop, also when a test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Guards memory, writes a page of one chunk in four, and releases the others in order; again, because huge pages may have come apart.
fn costs(backing: &Backing) {
    let memory = Arc::new(GuestMemory::create(Layout::flat(bytes()).unwrap(), backing).unwrap());
    if let Err(error) = memory.guard_check() {
        return println!("skipped: {error}: {}", error.source);
    }
    memory.populate(0, memory.layout().chunks()).unwrap();
    let chunks = memory.layout().chunks();
    let written = chunks / 4;
    for round in 1..=3u64 {
        let pages = PageBitmap::full(memory.layout());
        let begin = Instant::now();
        let guard = memory.clone().guard(&pages).unwrap();
        let guarded = begin.elapsed();
        let over = AtomicBool::new(false);
        let mut trips: Vec<Duration> = Vec::new();
        let mut released = Duration::ZERO;
        std::thread::scope(|scope| {
            let _over = Over(&over);
            scope.spawn(|| {
                let mut faults = Vec::new();
                while !over.load(Ordering::SeqCst) {
                    guard.wait(&mut faults, Duration::from_millis(10)).unwrap();
                    faults.drain(..).for_each(|fault| guard.release(fault.chunk, u64::MAX).unwrap());
                }
            });
            for chunk in 0..written {
                let begin = Instant::now();
                memory.region(0).write_obj(round, chunk as usize * CHUNK_SIZE + 5 * PAGE_SIZE).unwrap();
                trips.push(begin.elapsed());
            }
            let begin = Instant::now();
            (written..chunks).for_each(|chunk| guard.release(chunk, u64::MAX).unwrap());
            released = begin.elapsed();
        });
        let begin = Instant::now();
        guard.end().unwrap();
        let ended = begin.elapsed();
        trips.sort();
        println!(
            "{backing:?}, {} MiB, round {round}: guarded in {guarded:?}; a write that waits {:?} (a tenth take {:?} and more); the \
             release of {} chunks {released:?}; the end {ended:?}",
            bytes() >> 20,
            trips[trips.len() / 2],
            trips[trips.len() * 9 / 10],
            chunks - written,
        );
        assert_eq!(memory.region(0).read_obj::<u64>(5 * PAGE_SIZE).unwrap(), round);
    }
}

#[test]
fn of_transparent_huge_pages() {
    costs(&Backing::Anonymous { huge: true });
}

#[test]
fn of_small_pages() {
    costs(&Backing::Anonymous { huge: false });
}

#[test]
fn of_a_memfd() {
    costs(&Backing::Memfd);
}
