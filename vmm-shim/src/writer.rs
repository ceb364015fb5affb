//! A guest without KVM: threads of this process that write guest memory, and prove that nothing of it was lost.
//!
//! It does what the KVM counter guest does, and prints the same lines. The working set is cut into one slice of equal
//! size for each thread (vCPU). At *step* `k` = 0, 1, 2 ... a thread writes page `k mod pages` of its slice; `pages`
//! steps are a *pass*. A page then holds, in 64-bit words of the host's byte order: [`MAGIC`], `k`, `chain(k)`, 508
//! times the pattern `chain(k) xor (k + 1)`, and in the last word `k` again: so a page of which parts are of
//! different steps shows.
//!
//! The chain is that of the [counter guest](crate::guests::counter), whose checker reads this one's lines too. From
//! the second pass on, before a page is written, all of it is verified for step `k - pages`; a difference is printed as
//! `E c<cpu> p<page> want <x> got <x>`, once a page. At a pass' end `c<cpu> p<pass> s<chain>` is printed, with the
//! pass from 0 and the chain value after its last step. Numbers are hexadecimal without leading zeros.
//!
//! The chain depends on every step before it. So lines whose passes go up by one with the right chain show that the
//! guest never went back and never skipped, and the absence of `E` lines that its memory came along.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pagecopy::backend::{self, BackendError, Guest, GuestRam, PAUSE_PATIENCE, StateBlob, StateSink};
use pagecopy::layout::PAGE_SIZE;
use vm_memory::volatile_memory::VolatileSlice;

use crate::guests::counter::{MAGIC, first_chain, mix};

/// Most threads a writer may have.
pub const THREADS_MAX: u8 = 8;

/// 64-bit words in a page.
const WORDS: usize = PAGE_SIZE / 8;
/// Name and version of the writer's state.
const STATE_NAME: &str = "memory-writer";
const STATE_VERSION: u32 = 1;
/// How far a paced writer may fall behind its schedule, or run ahead of it.
const SLACK: Duration = Duration::from_millis(1);

/// What a writer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// Threads, 1 to [`THREADS_MAX`].
    pub threads: u8,
    /// Guest-physical address of the working set, a multiple of the page size.
    pub gpa: u64,
    /// Bytes in the working set; rounded down to whole pages for each thread. It lies in one region.
    pub bytes: u64,
    /// Pages that each thread writes in a second; 0 for as fast as it can.
    pub pages_per_s: u64,
}

impl WriterOptions {
    /// Pages in the slice of each thread.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE as u64 / u64::from(self.threads.max(1))
    }

    /// Refuses what is no working set of this memory; returns the region and the offset in it.
    fn place(&self, ram: &dyn GuestRam) -> Result<(usize, u64), BackendError> {
        let Self { threads, gpa, bytes, .. } = *self;
        if !(1..=THREADS_MAX).contains(&threads) {
            return Err(BackendError::invalid(format!("writer threads: {threads}; use 1 to {THREADS_MAX}")));
        }
        if self.pages() == 0 {
            return Err(BackendError::invalid(format!(
                "a working set of {bytes} bytes is less than a page for each of {threads} threads"
            )));
        }
        let layout = ram.layout();
        layout.find(gpa, bytes).filter(|_| gpa % PAGE_SIZE as u64 == 0).ok_or_else(|| {
            BackendError::invalid(format!(
                "a working set of {bytes} bytes at {gpa:#x} does not lie, page-aligned, in one of the {} regions",
                layout.regions().len()
            ))
        })
    }
}

/// Where a writer's lines go: called with one whole line at a time, by the threads in turn. It must not call the
/// writer, and while it blocks, a pause waits, as long as it does ([`PAUSE_PATIENCE`]).
pub type Sink = Box<dyn FnMut(&[u8]) + Send>;

/// The guest. See the [module](self) for what its threads do. Made paused; [`resume`](Guest::resume) starts it.
pub struct MemoryWriter {
    shared: Arc<Shared>,
    /// The threads, from the first `resume` on.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the threads and their owner share.
struct Shared {
    ram: Arc<dyn GuestRam>,
    control: Mutex<Control>,
    /// Signalled at every change of `control`.
    changed: Condvar,
    /// Set while a thread should look at `control`: spares it the lock at every step.
    attention: AtomicBool,
    sink: Mutex<Sink>,
    /// Memory that it ran on is lost: it never runs again, and nothing that the threads find or print counts.
    lost: AtomicBool,
    mismatches: AtomicU64,
    steps: AtomicU64,
}

/// What the threads are to do, and where they stand.
struct Control {
    options: WriterOptions,
    order: Order,
    throttle: u8,
    /// How far each thread is; those of running threads are out of date.
    counters: Vec<Counters>,
    /// Threads that stand still between two steps.
    parked: usize,
    /// Threads that ended, though nobody asked them to.
    dead: usize,
    /// Whether the guest ever ran.
    ran: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    Park,
    End,
}

/// How far one thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    /// The step to be done next.
    step: u64,
    /// The chain value of that step.
    chain: u64,
    /// The chain value of the step a pass earlier; that of step 0 during the first pass.
    behind: u64,
}

impl Counters {
    fn first(cpu: u8) -> Self {
        Self { step: 0, chain: first_chain(cpu), behind: first_chain(cpu) }
    }
}

impl MemoryWriter {
    /// A writer that has not run yet.
    ///
    /// # Errors
    /// When the working set does not lie in a region, is less than a page for each thread, or the number of threads
    /// is out of range.
    pub fn new(ram: Arc<dyn GuestRam>, options: WriterOptions, sink: Sink) -> Result<Self, BackendError> {
        options.place(&*ram)?;
        let control = Control {
            options,
            order: Order::Park,
            throttle: 0,
            counters: (0..options.threads).map(Counters::first).collect(),
            parked: 0,
            dead: 0,
            ran: false,
        };
        let shared = Shared {
            ram,
            control: Mutex::new(control),
            changed: Condvar::new(),
            attention: AtomicBool::new(true),
            sink: Mutex::new(sink),
            lost: AtomicBool::new(false),
            mismatches: AtomicU64::new(0),
            steps: AtomicU64::new(0),
        };
        Ok(Self { shared: Arc::new(shared), threads: Mutex::new(Vec::new()) })
    }

    /// What the writer does: as made, or as loaded with the state.
    pub fn options(&self) -> WriterOptions {
        self.shared.control().options
    }

    /// Pages that did not hold what was written to them, each of which is also a line.
    pub fn mismatches(&self) -> u64 {
        self.shared.mismatches.load(Ordering::Relaxed)
    }

    /// Steps (page writes) done here by all threads together; those of a migrated guest's past are not counted.
    pub fn steps(&self) -> u64 {
        self.shared.steps.load(Ordering::Relaxed)
    }

    /// Waits until all threads stand still; the error tells how many do not.
    fn wait_parked<'a>(
        &self,
        control: MutexGuard<'a, Control>,
    ) -> (MutexGuard<'a, Control>, Result<(), BackendError>) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).len();
        let runs = |control: &mut Control| control.parked + control.dead < threads;
        let waited = self.shared.changed.wait_timeout_while(control, PAUSE_PATIENCE, runs);
        let mut control = waited.unwrap_or_else(PoisonError::into_inner).0;
        if !runs(&mut control) {
            return (control, Ok(()));
        }
        let what = format!(
            "pausing: {} of {threads} writer threads do not stop; they wait for pages that have not come, or for their console",
            threads - control.parked - control.dead
        );
        (control, Err(BackendError::new(what, std::io::Error::from(std::io::ErrorKind::TimedOut))))
    }

    fn spawn(&self, threads: u8) -> Result<(), BackendError> {
        let mut handles = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        // Where an earlier attempt failed half way, only the missing ones are made.
        for cpu in handles.len() as u8..threads {
            let shared = self.shared.clone();
            let handle = std::thread::Builder::new()
                .name(format!("writer-{cpu}"))
                .spawn(move || shared.run(cpu))
                .map_err(|e| BackendError::new(format!("start writer thread {cpu} of {threads}"), e))?;
            handles.push(handle);
        }
        Ok(())
    }
}

impl Guest for MemoryWriter {
    fn pause(&self) -> Result<(), BackendError> {
        let mut control = self.shared.control();
        let before = control.order;
        self.shared.order(&mut control, Order::Park);
        let (mut control, parked) = self.wait_parked(control);
        if parked.is_err() {
            self.shared.order(&mut control, before);
        }
        parked?;
        self.shared.alive(&control)
    }

    fn stop_for_good(&self, release: &dyn Fn() -> Result<(), BackendError>) -> Result<(), BackendError> {
        let mut control = self.shared.control();
        self.shared.lost.store(true, Ordering::SeqCst);
        self.shared.order(&mut control, Order::Park);
        release()?;
        self.wait_parked(control).1
    }

    fn resume(&self) -> Result<(), BackendError> {
        let threads = {
            let mut control = self.shared.control();
            self.shared.alive(&control)?;
            control.ran = true;
            control.options.threads
        };
        self.spawn(threads)?;
        let mut control = self.shared.control();
        self.shared.order(&mut control, Order::Run);
        Ok(())
    }

    fn throttle(&self) -> Option<&dyn backend::Throttle> {
        Some(self)
    }

    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).len();
        let control = self.shared.control();
        self.shared.alive(&control)?;
        if control.order != Order::Park || control.parked < threads {
            return Err(BackendError::invalid("save the state of a memory writer that runs: pause it first"));
        }
        out.piece(STATE_NAME, STATE_VERSION, &encode(&control.options, &control.counters))
    }

    /// The options come with the state: those that this writer was made with are replaced.
    fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError> {
        let [blob] = state else {
            return Err(BackendError::invalid(format!(
                "the state of a memory writer is one blob, {STATE_NAME:?}; {} were given",
                state.len()
            )));
        };
        if blob.name != STATE_NAME || blob.version != STATE_VERSION {
            return Err(BackendError::invalid(format!(
                "state {:?} version {}: this guest knows {STATE_NAME:?} version {STATE_VERSION} only",
                blob.name, blob.version
            )));
        }
        let (options, counters) = decode(&blob.bytes)?;
        options.place(&*self.shared.ram)?;
        let mut control = self.shared.control();
        if control.ran {
            return Err(BackendError::invalid(
                "load state into a memory writer that has run: make a new one",
            ));
        }
        control.options = options;
        control.counters = counters;
        Ok(())
    }
}

impl backend::Throttle for MemoryWriter {
    fn set(&self, percent: u8) -> Result<(), BackendError> {
        if percent > 99 {
            return Err(BackendError::invalid(format!("throttle by {percent} percent: use 0 to 99")));
        }
        let mut control = self.shared.control();
        control.throttle = percent;
        let order = control.order;
        self.shared.order(&mut control, order);
        Ok(())
    }
}

impl Drop for MemoryWriter {
    fn drop(&mut self) {
        self.shared.order(&mut self.shared.control(), Order::End);
        for thread in self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A panic of a thread was reported when it happened, and by `pause`.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, Control> {
        // A thread that panics is counted in `dead`; what it leaves in `control` is whole.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it cannot go on, if it cannot.
    fn alive(&self, control: &Control) -> Result<(), BackendError> {
        if self.lost.load(Ordering::SeqCst) {
            return Err(BackendError::invalid("the guest was stopped for good"));
        }
        if control.dead == 0 {
            return Ok(());
        }
        Err(BackendError::invalid(format!(
            "{} of {} writer threads ended by a panic; the guest is lost",
            control.dead, control.options.threads
        )))
    }

    /// Gives an order, and makes all threads look at it.
    fn order(&self, control: &mut Control, order: Order) {
        control.order = order;
        // With a throttle, threads look at `control` in any case.
        self.attention.store(order != Order::Run || control.throttle > 0, Ordering::Release);
        self.changed.notify_all();
    }

    fn print(&self, line: &str) {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lost.load(Ordering::SeqCst) {
            return;
        }
        sink(line.as_bytes());
    }

    /// The life of one thread.
    fn run(&self, cpu: u8) {
        let _death = Death(self);
        let mut throttle = Throttle { since: Instant::now() };
        while let Some((options, mut counters)) = self.park(cpu) {
            let pages = options.pages();
            let (region, offset) = options.place(&*self.ram).expect("checked when the options came");
            let slice_bytes = pages as usize * PAGE_SIZE;
            let slice = self
                .ram
                .region(region)
                .subslice(offset as usize + slice_bytes * usize::from(cpu), slice_bytes)
                .expect("the working set lies in its region");
            let mut pace = Pace::new(options.pages_per_s);
            loop {
                self.step(cpu, &slice, pages, &mut counters);
                let wait = pace.after_step();
                if let Some(wait) = wait {
                    self.sleep(wait);
                }
                if self.attention.load(Ordering::Acquire) && !self.attend(&mut throttle) {
                    break;
                }
            }
            self.control().counters[usize::from(cpu)] = counters;
        }
    }

    /// Waits, parked, until the guest is to run; `None` at its end.
    fn park(&self, cpu: u8) -> Option<(WriterOptions, Counters)> {
        let mut control = self.control();
        control.parked += 1;
        self.changed.notify_all();
        while control.order == Order::Park {
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        control.parked -= 1;
        (control.order == Order::Run).then(|| (control.options, control.counters[usize::from(cpu)]))
    }

    /// Looks at what was ordered, and takes the throttle's time; returns whether to go on.
    fn attend(&self, throttle: &mut Throttle) -> bool {
        let (order, percent) = {
            let control = self.control();
            (control.order, control.throttle)
        };
        if order != Order::Run {
            return false;
        }
        if let Some(wait) = throttle.wait(percent) {
            self.sleep(wait);
            throttle.since = Instant::now();
        }
        true
    }

    /// Sleeps, but no longer than the guest is to run under the same throttle.
    fn sleep(&self, wait: Duration) {
        let control = self.control();
        if control.order == Order::Run {
            let before = control.throttle;
            let same = |c: &mut Control| c.order == Order::Run && c.throttle == before;
            drop(
                self.changed.wait_timeout_while(control, wait, same).unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    /// One step: verifies a page, writes it, and prints at the end of a pass.
    fn step(&self, cpu: u8, slice: &VolatileSlice<'_>, pages: u64, counters: &mut Counters) {
        let Counters { step, chain, behind } = *counters;
        let index = step % pages;
        let page = slice.subslice(index as usize * PAGE_SIZE, PAGE_SIZE).expect("a page of the slice");
        if step >= pages {
            let mut found = [0u64; WORDS];
            page.copy_to(&mut found);
            let expected = content(step - pages, behind);
            if let Some((got, want)) = found.iter().zip(&expected).find(|(got, want)| got != want)
                && !self.lost.load(Ordering::SeqCst)
            {
                self.mismatches.fetch_add(1, Ordering::Relaxed);
                self.print(&format!("E c{cpu:x} p{index:x} want {want:x} got {got:x}\n"));
            }
            counters.behind = mix(behind, step - pages);
        }
        page.copy_from(&content(step, chain));
        counters.chain = mix(chain, step);
        counters.step = step + 1;
        self.steps.fetch_add(1, Ordering::Relaxed);
        if index == pages - 1 {
            self.print(&format!("c{cpu:x} p{:x} s{:x}\n", step / pages, counters.chain));
        }
    }
}

/// Counts its thread among the dead if it ends by a panic.
struct Death<'a>(&'a Shared);

impl Drop for Death<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.control().dead += 1;
            self.0.changed.notify_all();
        }
    }
}

/// The schedule of a paced thread.
struct Pace {
    /// Time for one step; zero for as fast as possible.
    each: Duration,
    due: Instant,
}

impl Pace {
    fn new(pages_per_s: u64) -> Self {
        let each = Duration::from_secs(1).as_nanos() as u64;
        Self { each: Duration::from_nanos(each.checked_div(pages_per_s).unwrap_or(0)), due: Instant::now() }
    }

    /// The time to sleep after a step. Time that was lost is not made up for, but for [`SLACK`].
    fn after_step(&mut self) -> Option<Duration> {
        if self.each.is_zero() {
            return None;
        }
        let now = Instant::now();
        self.due += self.each;
        self.due = self.due.max(now.checked_sub(SLACK).unwrap_or(now));
        // Short sleeps cost more than they take.
        self.due.checked_duration_since(now).filter(|ahead| *ahead > SLACK)
    }
}

/// Alternates work and sleep.
struct Throttle {
    /// When the work since the last sleep began.
    since: Instant,
}

impl Throttle {
    /// The time to sleep, once enough was worked for it.
    fn wait(&mut self, percent: u8) -> Option<Duration> {
        let worked = self.since.elapsed();
        if percent == 0 || worked < SLACK {
            return None;
        }
        // After a pause, or when the throttle is new, `since` lies far back.
        Some(worked.min(2 * SLACK) * u32::from(percent) / (100 - u32::from(percent)))
    }
}

/// What a page holds after a step.
fn content(step: u64, chain: u64) -> [u64; WORDS] {
    let mut words = [chain ^ step.wrapping_add(1); WORDS];
    words[..3].copy_from_slice(&[MAGIC, step, chain]);
    words[WORDS - 1] = step;
    words
}

/// The state, in 64-bit little-endian words: the four options, then three counters a thread.
fn encode(options: &WriterOptions, counters: &[Counters]) -> Vec<u8> {
    let head = [u64::from(options.threads), options.gpa, options.bytes, options.pages_per_s];
    let tail = counters.iter().flat_map(|c| [c.step, c.chain, c.behind]);
    head.into_iter().chain(tail).flat_map(u64::to_le_bytes).collect()
}

/// The inverse of [`encode`], for bytes from anywhere. That the working set lies in memory is not checked here.
fn decode(bytes: &[u8]) -> Result<(WriterOptions, Vec<Counters>), BackendError> {
    /// Steps that no guest reaches, and from which none can overflow.
    const STEPS_MAX: u64 = 1 << 56;
    let (words, rest) = bytes.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let wrong = |what: String| BackendError::invalid(format!("state {STATE_NAME:?}: {what}"));
    let [threads, gpa, bytes_of_set, pages_per_s, tail @ ..] = &words[..] else {
        return Err(wrong(format!("{} bytes are too few for its options", bytes.len())));
    };
    let threads = u8::try_from(*threads)
        .ok()
        .filter(|n| (1..=THREADS_MAX).contains(n))
        .ok_or_else(|| wrong(format!("{threads} threads; at most {THREADS_MAX} are supported")))?;
    if !rest.is_empty() || tail.len() != 3 * usize::from(threads) {
        return Err(wrong(format!("{} bytes are not the counters of {threads} threads", bytes.len())));
    }
    let options = WriterOptions { threads, gpa: *gpa, bytes: *bytes_of_set, pages_per_s: *pages_per_s };
    let counters: Vec<Counters> =
        tail.chunks_exact(3).map(|c| Counters { step: c[0], chain: c[1], behind: c[2] }).collect();
    for (cpu, c) in (0..threads).zip(&counters) {
        if c.step > STEPS_MAX {
            return Err(wrong(format!("thread {cpu} is at step {:#x}, beyond {STEPS_MAX:#x}", c.step)));
        }
        let first = Counters::first(cpu);
        let chain_wrong = c.step == 0 && c.chain != first.chain;
        let behind_wrong = c.step <= options.pages() && c.behind != first.behind;
        if chain_wrong || behind_wrong {
            return Err(wrong(format!("the chain of thread {cpu} is not that of step {:#x}", c.step)));
        }
    }
    Ok((options, counters))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_as_written_down() {
        assert_eq!(first_chain(0), 0x7061_6765_6665_72ff ^ 0x9e37_79b9_7f4a_7c15);
        assert_eq!(mix(1, 0), 0x9e37_79b9_7f4a_7c15u64.rotate_left(29));
        assert_eq!(mix(0, 2), 0x3c6e_f372_fe94_f82au64.rotate_left(29));
    }

    #[test]
    fn state_is_what_was_written_down_and_nothing_else() {
        let options = WriterOptions { threads: 2, gpa: 0x10_0000, bytes: 0x8000, pages_per_s: 7 };
        let mut counters = vec![Counters { step: 5, chain: 0x1122, behind: 3 }, Counters::first(1)];
        let bytes = encode(&options, &counters);
        assert_eq!(bytes.len(), 8 * (4 + 2 * 3));
        assert_eq!(&bytes[..24], b"\x02\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\x80\0\0\0\0\0\0");
        assert_eq!(&bytes[32..48], b"\x05\0\0\0\0\0\0\0\x22\x11\0\0\0\0\0\0");
        assert_eq!(decode(&bytes).unwrap(), (options, counters.clone()));
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert!(decode(&[&bytes[..], &[0]].concat()).is_err());
        counters[1].chain ^= 1;
        assert!(decode(&encode(&options, &counters)).unwrap_err().to_string().contains("thread 1"));
        counters[1] = Counters { step: 1 << 57, chain: 0, behind: 0 };
        assert!(decode(&encode(&options, &counters)).unwrap_err().to_string().contains("beyond"));
        for threads in [0u64, 9, 1 << 40] {
            let mut bad = bytes.clone();
            bad[..8].copy_from_slice(&threads.to_le_bytes());
            assert!(decode(&bad).unwrap_err().to_string().contains("threads"), "{threads}");
        }
    }

    #[test]
    fn a_paced_writer_does_not_make_up_for_a_pause() {
        let mut pace = Pace::new(1000);
        pace.due -= Duration::from_secs(5);
        assert_eq!(pace.after_step(), None);
        assert!(pace.due + Duration::from_millis(2) > Instant::now(), "the five seconds are forgotten");
        assert_eq!(Pace::new(0).after_step(), None);
    }
}
