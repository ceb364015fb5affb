//! Writers that dirty memory while it moves: threads of the source's process, which the engine pauses and throttles as it does
//! a guest's vCPUs.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use pageferry::pagecopy::backend::{BackendError, Guest, GuestRam, StateBlob, StateSink, Throttle};
use pageferry::pagecopy::layout::PAGE_SIZE;

use super::pattern::{Targets, Walk};
use crate::cli::random::SplitMix;

/// How long a writer sleeps when it has written what was due.
const TICK: Duration = Duration::from_millis(1);
/// A writer that was kept from writing for longer than this does not catch up: it was a slower guest meanwhile.
const LAG_MAX: Duration = Duration::from_millis(5);
/// Pages written between two looks at what was ordered.
const BURST: u64 = 64;
/// Name and version of the writers' state.
pub(super) const STATE_NAME: &str = "bench-writers";
pub(super) const STATE_VERSION: u32 = 1;

/// The guest: writers that run, or are paused. Made paused.
pub(super) struct Dirtier {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    ram: Arc<dyn GuestRam>,
    control: Mutex<Control>,
    changed: Condvar,
    /// Whether writers are to look at `control`: spares them the lock.
    attention: AtomicBool,
    /// Percent of their writes that are taken from the writers.
    throttle: AtomicU8,
    /// Pages written by all writers together.
    written: AtomicU64,
    /// CPU time that each writer took, in microseconds.
    cpu_us: Vec<AtomicU64>,
    /// Bytes that change in a page that is written.
    write_bytes: usize,
}

struct Control {
    order: Order,
    /// Writers that stand still.
    parked: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Park,
    End,
}

impl Dirtier {
    /// Starts `count` writers, paused. Each writes `write_bytes` bytes, whole words of 8, into the pages that `targets` names.
    pub(super) fn new(
        ram: Arc<dyn GuestRam>,
        targets: &Targets,
        count: u8,
        write_bytes: usize,
    ) -> Result<Self, BackendError> {
        let control = Control { order: Order::Park, parked: 0 };
        let shared = Arc::new(Shared {
            ram,
            control: Mutex::new(control),
            changed: Condvar::new(),
            attention: AtomicBool::new(true),
            throttle: AtomicU8::new(0),
            written: AtomicU64::new(0),
            cpu_us: (0..count).map(|_| AtomicU64::new(0)).collect(),
            write_bytes,
        });
        let mut threads = Vec::new();
        for writer in 0..count {
            let (shared, walk) = (shared.clone(), targets.walk(writer, count));
            let thread = std::thread::Builder::new()
                .name(format!("writer-{writer}"))
                .spawn(move || shared.run(writer, walk))
                .map_err(|e| BackendError::new(format!("start writer {writer} of {count}"), e))?;
            threads.push(thread);
        }
        Ok(Self { shared, threads })
    }

    /// Pages written so far; a page that was written again counts again.
    pub(super) fn written_pages(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// CPU time of all writers so far, in seconds.
    pub(super) fn cpu_s(&self) -> f64 {
        self.shared.cpu_us.iter().map(|us| us.load(Ordering::Relaxed)).sum::<u64>() as f64 / 1e6
    }
}

impl Guest for Dirtier {
    fn pause(&self) -> Result<(), BackendError> {
        let mut control = self.shared.control();
        self.shared.order(&mut control, Order::Park);
        while control.parked < self.threads.len() {
            control = self.shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), BackendError> {
        self.shared.order(&mut self.shared.control(), Order::Run);
        Ok(())
    }

    fn throttle(&self) -> Option<&dyn Throttle> {
        Some(self)
    }

    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        out.piece(STATE_NAME, STATE_VERSION, &self.written_pages().to_le_bytes())
    }

    fn load_state(&self, _state: &[StateBlob]) -> Result<(), BackendError> {
        Err(BackendError::invalid("load state into writers that are a source"))
    }
}

impl Throttle for Dirtier {
    /// What a vCPU loses of its time, a writer loses of its writes.
    fn set(&self, percent: u8) -> Result<(), BackendError> {
        if percent > 99 {
            return Err(BackendError::invalid(format!("throttle by {percent} percent: use 0 to 99")));
        }
        self.shared.throttle.store(percent, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Dirtier {
    fn drop(&mut self) {
        self.shared.order(&mut self.shared.control(), Order::End);
        for thread in self.threads.drain(..) {
            // A panic was printed when it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, control: &mut Control, order: Order) {
        control.order = order;
        self.attention.store(order != Order::Run, Ordering::Release);
        self.changed.notify_all();
    }

    /// The life of a writer.
    fn run(&self, writer: u8, mut walk: Walk) {
        let _end = End(self);
        let mut random = SplitMix::new(u64::from(writer) + 1);
        let mut bytes = vec![0; self.write_bytes];
        // Time that the guest has had, and pages that were written of those that were due by it.
        let (mut ran, mut done) = (Duration::ZERO, 0);
        let mut looked = Instant::now();
        loop {
            if self.attention.load(Ordering::Acquire) {
                self.account(writer);
                if !self.park() {
                    return;
                }
                looked = Instant::now();
            }
            let now = Instant::now();
            let percent = 100 - u32::from(self.throttle.load(Ordering::Relaxed));
            ran += (now - looked).min(LAG_MAX) * percent / 100;
            looked = now;
            let due = walk.due(ran);
            if done >= due {
                self.account(writer);
                std::thread::sleep(TICK);
                continue;
            }
            let burst = (due - done).min(BURST);
            for _ in 0..burst {
                let (chunk, page) = walk.next(&mut random);
                random.fill(&mut bytes);
                let words = (PAGE_SIZE - bytes.len()) / 8 + 1;
                self.write(chunk, page, random.below(words as u64) as usize * 8, &bytes);
            }
            done += burst;
            self.written.fetch_add(burst, Ordering::Relaxed);
        }
    }

    /// Stands still until the writers are to run; whether they ever will.
    fn park(&self) -> bool {
        let mut control = self.control();
        control.parked += 1;
        self.changed.notify_all();
        while control.order == Order::Park {
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        control.parked -= 1;
        control.order == Order::Run
    }

    fn write(&self, chunk: u32, page: u32, at: usize, bytes: &[u8]) {
        let memory = self.ram.chunk(chunk);
        let piece = memory.subslice(page as usize * PAGE_SIZE + at, bytes.len());
        piece.expect("targets lie in the layout").copy_from(bytes);
    }

    /// Takes note of the CPU time that this thread has used.
    fn account(&self, writer: u8) {
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) {
            let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
            self.cpu_us[usize::from(writer)].store(us as u64, Ordering::Relaxed);
        }
    }
}

/// A thread that ends, of a panic too, writes nothing any more: nobody waits for it to park.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.control().parked += 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use pageferry::pagecopy::bitmap::PageBitmap;
    use pageferry::pagecopy::layout::Layout;
    use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};

    use super::super::pattern::Pattern;
    use super::*;

    fn writers(pattern: &Pattern, pages_per_s: u64) -> (Arc<GuestMemory>, Dirtier) {
        let layout = Layout::flat(4 << 20).unwrap();
        let ram = Arc::new(GuestMemory::create(layout, &Backing::Anonymous { huge: false }).unwrap());
        let populated = PageBitmap::new(16);
        (4..12).for_each(|chunk| assert_eq!(populated.insert(chunk, u64::MAX), u64::MAX));
        let targets = Targets::new(pattern, pages_per_s, &populated).unwrap();
        let dirtier = Dirtier::new(ram.clone(), &targets, 2, 64).unwrap();
        (ram, dirtier)
    }

    fn populated(ram: &GuestMemory) -> Vec<u64> {
        let mut words = vec![0; 16];
        ram.populated(0, &mut words).unwrap();
        words
    }

    #[test]
    fn paused_writers_do_not_write_and_resumed_ones_write_where_they_may() {
        let (ram, dirtier) = writers(&Pattern::Uniform, 1_000_000);
        assert_eq!(dirtier.written_pages(), 0);
        dirtier.resume().unwrap();
        while dirtier.written_pages() < 10_000 {
            std::thread::sleep(TICK);
        }
        dirtier.pause().unwrap();
        let (written, before) = (dirtier.written_pages(), pageferry::engine::content_digest(&*ram).unwrap());
        std::thread::sleep(20 * TICK);
        assert_eq!(dirtier.written_pages(), written);
        assert_eq!(pageferry::engine::content_digest(&*ram).unwrap(), before);
        assert!(dirtier.cpu_s() > 0.0);
        let touched = populated(&ram);
        assert!(touched[..4].iter().chain(&touched[12..]).all(|w| *w == 0), "{touched:x?}");
        assert!(touched[4..12].iter().all(|w| *w != 0), "{touched:x?}");
    }

    #[test]
    fn throttled_writers_write_less() {
        let (_ram, dirtier) = writers(&Pattern::Sequential, 100_000);
        let in_50_ms = || {
            let before = dirtier.written_pages();
            std::thread::sleep(50 * TICK);
            dirtier.written_pages() - before
        };
        dirtier.resume().unwrap();
        // On a machine that is busy, writers may get no time in one span or another.
        let slower = (0..100).any(|_| {
            dirtier.throttle().unwrap().set(0).unwrap();
            let free = in_50_ms();
            dirtier.throttle().unwrap().set(90).unwrap();
            let held = in_50_ms();
            held < free / 2 && held > 0
        });
        assert!(slower, "100 times, throttling took less than half of the writes, or all");
        assert!(dirtier.throttle().unwrap().set(100).is_err());
    }
}
