//! The rules that every dirty tracker must keep, as one suite that runs over each of them.
//!
//! For tests: a VMM with a dirty log of its own runs [`run`] over it, and learns which [`Rule`] it breaks. A log is put under test as a
//! [`Subject`], which joins it with its memory and with something that writes that memory in the way the log watches (a thread, a vCPU);
//! [`Written`] is one for logs whose memory a function can write.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use pagecopy::backend::{BackendError, DirtyLog, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::PAGE_SIZE;

/// A page: its chunk and its bit (0..64) in the chunk.
pub type Page = (u32, u32);

/// A dirty tracker under test, with its memory and a writer.
pub trait Subject: Sync {
    /// The memory.
    fn ram(&self) -> &dyn GuestRam;

    /// The tracker, not started.
    fn log(&self) -> &dyn DirtyLog;

    /// Changes each of these pages, which are some of [`writable`](Self::writable), and returns when the changes are
    /// in memory. Called from one thread at a time, but while another one uses the log and reads the memory.
    fn write(&self, pages: &[Page]);

    /// The pages that the writer can write; at least 64. All of them, unless a guest needs some for itself.
    fn writable(&self) -> Vec<Page> {
        let layout = self.ram().layout();
        (0..layout.chunks())
            .flat_map(|chunk| bits(layout.valid(chunk)).map(move |bit| (chunk, bit)))
            .collect()
    }

    /// Whether the tracker promises to report nothing but written pages.
    fn exact(&self) -> bool;

    /// How many pages beyond the written ones each sync of an exact tracker may report all the same: KVM, say, writes
    /// the accessed and dirty bits of the guest's page tables.
    fn extra_pages(&self) -> usize {
        0
    }
}

/// What every dirty log must do: the rules of [`DirtyLog`], one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// `start`, `sync`, `clear` and `stop` do not fail; `stop` neither before the first `start` nor twice in a row.
    Works,
    /// After `start` nothing is reported that was written before.
    StartsQuiet,
    /// The first and last pages of regions are reported like any other.
    ReportsEdges,
    /// Every page that was written is reported.
    ReportsWrites,
    /// A page that was reported and cleared is not reported again, unless it was written again.
    ReportsOnce,
    /// An exact log reports no page that nobody wrote.
    ReportsNothingElse,
    /// Reports name pages that there are.
    NamesPages,
    /// `sync` returns no less than it reports.
    Counts,
    /// `sync` adds to the bitmap, and takes nothing out.
    AddsToBitmap,
    /// What is written between `sync` and `clear`, or after `clear`, is not lost.
    KeepsWritesAroundClear,
    /// `clear` of some pages of a chunk concerns these alone, and all of these.
    ClearsInPart,
    /// `start` after `stop` starts afresh.
    StartsAfresh,
    /// A guest that writes everything is reported whole.
    ReportsEverything,
    /// Copies of what is reported, made beside a writer, come to equal memory: what is written while the log is asked is not lost.
    Converges,
}

impl Rule {
    /// All of them, in the order in which they are tried for the first time.
    pub const ALL: [Self; 14] = [
        Self::Works,
        Self::NamesPages,
        Self::Counts,
        Self::StartsQuiet,
        Self::ReportsEdges,
        Self::ReportsNothingElse,
        Self::ReportsOnce,
        Self::ReportsWrites,
        Self::AddsToBitmap,
        Self::KeepsWritesAroundClear,
        Self::ClearsInPart,
        Self::StartsAfresh,
        Self::ReportsEverything,
        Self::Converges,
    ];
}

/// A rule that a log does not keep.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule:?}: {what}")]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// What was done, and which pages show it.
    pub what: String,
}

impl Violation {
    /// As an error, unless a condition holds.
    fn unless(holds: bool, rule: Rule, what: impl FnOnce() -> String) -> Result<(), Self> {
        if holds { Ok(()) } else { Err(Self { rule, what: what() }) }
    }
}

/// Runs the whole suite over a subject. The log is stopped at the end, if it keeps all rules.
///
/// # Errors
/// The first rule that the log does not keep.
///
/// # Panics
/// When the subject has fewer than 64 pages that can be written.
pub fn run(subject: &dyn Subject) -> Result<(), Violation> {
    let pages = subject.writable();
    assert!(
        pages.len() >= 64,
        "the subject offers {} writable pages; the suite takes at least 64",
        pages.len()
    );
    must(subject.log().stop(), "stop of a log that was never started")?;
    let suite = Suite { subject, pages };
    suite.starts_quiet()?;
    suite.reports_region_edges()?;
    suite.reports_each_write_once()?;
    suite.keeps_what_the_bitmap_held()?;
    suite.survives_writes_around_clear()?;
    suite.clears_in_part()?;
    suite.starts_again()?;
    suite.reports_everything()?;
    suite.copies_come_to_equal_memory()?;
    must(subject.log().stop(), "the last stop")?;
    must(subject.log().stop(), "a second stop in a row")
}

fn must<T>(result: Result<T, BackendError>, what: &str) -> Result<T, Violation> {
    result.map_err(|e| Violation { rule: Rule::Works, what: format!("{what}: {e}: {}", e.source) })
}

/// A log over memory that a function writes: for most logs all that [`run`] needs.
///
/// ```
/// use std::sync::Arc;
/// use pagecopy::backend::GuestRam;
/// use vmm_shim::adapter::VmMemory;
/// use vmm_shim::bitmap_log::BitmapLog;
/// use vmm_shim::conformance::{Written, run};
/// use vmm_shim::vm_memory::bitmap::AtomicBitmap;
/// use vmm_shim::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 20 << 12)])?;
/// let ram = Arc::new(VmMemory::new(memory.clone())?);
/// let layout = ram.layout().clone();
/// let log = BitmapLog::new(memory.clone(), &layout)?;
/// let write = move |(chunk, bit), number: u64| {
///     let gpa = layout.address(chunk, bit).expect("a page");
///     memory.write_obj(number, GuestAddress(gpa)).expect("guest memory");
/// };
/// run(&Written::new(ram, log, write))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Written<L, W> {
    ram: Arc<dyn GuestRam>,
    log: L,
    write: W,
    exact: bool,
    number: AtomicU64,
}

impl<L: DirtyLog, W: Fn(Page, u64) + Sync> Written<L, W> {
    /// `write` puts a number somewhere into a page, as those do whose writes the log reports; no number comes twice.
    pub fn new(ram: Arc<dyn GuestRam>, log: L, write: W) -> Self {
        Self { ram, log, write, exact: true, number: AtomicU64::new(0) }
    }

    /// The log may report pages that nobody wrote.
    #[must_use]
    pub fn inexact(mut self) -> Self {
        self.exact = false;
        self
    }

    /// The log.
    pub fn log(&self) -> &L {
        &self.log
    }
}

impl<L: DirtyLog, W: Fn(Page, u64) + Sync> Subject for Written<L, W> {
    fn ram(&self) -> &dyn GuestRam {
        &*self.ram
    }
    fn log(&self) -> &dyn DirtyLog {
        &self.log
    }
    fn write(&self, pages: &[Page]) {
        for &page in pages {
            (self.write)(page, self.number.fetch_add(1, Ordering::Relaxed) + 1);
        }
    }
    fn exact(&self) -> bool {
        self.exact
    }
}

/// A few of the pages, for a message.
fn some(pages: &BTreeSet<Page>) -> String {
    let first: Vec<_> = pages.iter().take(8).collect();
    format!("{} pages, such as (chunk, bit) {first:?}", pages.len())
}

struct Suite<'a> {
    subject: &'a dyn Subject,
    pages: Vec<Page>,
}

impl Suite<'_> {
    fn log(&self) -> &dyn DirtyLog {
        self.subject.log()
    }

    /// Starts the log and makes sure that it is quiet.
    fn start(&self, rule: Rule, when: &str) -> Result<(), Violation> {
        must(self.log().start(), "start")?;
        let reported = self.report()?;
        let extra = self.subject.extra_pages();
        Violation::unless(reported.len() <= extra, rule, || {
            format!(
                "{when}: nothing was written since start, but sync reports {}; {extra} are allowed",
                some(&reported)
            )
        })
    }

    /// One sync into a new bitmap, whose words are checked. Nothing is cleared.
    fn sync(&self) -> Result<BTreeSet<Page>, Violation> {
        let layout = self.subject.ram().layout();
        let dirty = PageBitmap::new(layout.chunks());
        let count = must(self.log().sync(&dirty), "sync")?;
        for (chunk, word) in dirty.iter() {
            let wrong = word & !layout.valid(chunk);
            Violation::unless(wrong == 0, Rule::NamesPages, || {
                format!("sync reports bits {wrong:#x} of chunk {chunk}, which name no page")
            })?;
        }
        let pages: BTreeSet<Page> =
            dirty.iter().flat_map(|(chunk, word)| bits(word).map(move |bit| (chunk, bit))).collect();
        Violation::unless(count >= pages.len() as u64, Rule::Counts, || {
            format!("sync says that it held {count} pages, but reports {}", pages.len())
        })?;
        Ok(pages)
    }

    /// Clears these pages, chunk by chunk.
    fn clear(&self, pages: &BTreeSet<Page>) -> Result<(), Violation> {
        let set = PageBitmap::new(self.subject.ram().layout().chunks());
        for &(chunk, bit) in pages {
            set.insert(chunk, 1 << bit);
        }
        for (chunk, word) in set.iter() {
            must(self.log().clear(chunk, &[word]), "clear")?;
        }
        Ok(())
    }

    /// One sync, all of whose pages are cleared with one call that covers every chunk.
    fn report(&self) -> Result<BTreeSet<Page>, Violation> {
        let pages = self.sync()?;
        let mut words = vec![0; self.subject.ram().layout().chunks() as usize];
        for &(chunk, bit) in &pages {
            words[chunk as usize] |= 1 << bit;
        }
        must(self.log().clear(0, &words), "clear of all chunks")?;
        Ok(pages)
    }

    /// That `reported` holds all of `written`, as the rule says, and, of an exact tracker, hardly anything else but `maybe`.
    fn compare(
        &self,
        rule: Rule,
        what: &str,
        reported: &BTreeSet<Page>,
        written: &BTreeSet<Page>,
        maybe: &BTreeSet<Page>,
    ) -> Result<(), Violation> {
        let lost: BTreeSet<Page> = written.difference(reported).copied().collect();
        Violation::unless(lost.is_empty(), rule, || {
            format!("{what}: written, but not reported: {}", some(&lost))
        })?;
        let over: BTreeSet<Page> =
            reported.iter().filter(|p| !written.contains(p) && !maybe.contains(p)).copied().collect();
        let extra = self.subject.extra_pages();
        let few = !self.subject.exact() || over.len() <= extra;
        Violation::unless(few, Rule::ReportsNothingElse, || {
            format!("{what}: reported, but not written: {}; {extra} are allowed", some(&over))
        })
    }

    /// That a report made when nothing was written since the last one is empty, but for what may always be in it.
    fn quiet(&self, what: &str, reported: &BTreeSet<Page>) -> Result<(), Violation> {
        Violation::unless(reported.len() <= self.subject.extra_pages(), Rule::ReportsOnce, || {
            format!("{what}: reported twice, but written once: {}", some(reported))
        })
    }

    /// Pages chosen by a step through the list: the same ones in every run.
    fn every(&self, step: usize, offset: usize) -> BTreeSet<Page> {
        self.pages.iter().copied().skip(offset).step_by(step).collect()
    }

    fn write(&self, pages: &BTreeSet<Page>) {
        let list: Vec<Page> = pages.iter().copied().collect();
        self.subject.write(&list);
    }

    fn starts_quiet(&self) -> Result<(), Violation> {
        self.start(Rule::StartsQuiet, "first start")?;
        must(self.log().stop(), "stop")?;
        // Populated pages, written before the log runs.
        self.write(&self.every(2, 0));
        self.start(Rule::StartsQuiet, "start with populated pages")?;
        self.quiet("a second sync without writes", &self.report()?)
    }

    fn reports_each_write_once(&self) -> Result<(), Violation> {
        for (step, offset) in [(1000, 0), (7, 3), (3, 1), (64, 63), (7, 3)] {
            let written = self.every(step, offset.min(self.pages.len() - 1));
            self.write(&written);
            let what = format!("every {step}. page written");
            self.compare(Rule::ReportsWrites, &what, &self.report()?, &written, &BTreeSet::new())?;
            self.quiet("a sync after the report was cleared", &self.report()?)?;
        }
        Ok(())
    }

    fn reports_region_edges(&self) -> Result<(), Violation> {
        let layout = self.subject.ram().layout();
        let mut edges = BTreeSet::new();
        for region in 0..layout.regions().len() {
            let chunks = layout.region_chunks(region);
            let last = chunks.end - 1;
            edges.insert((chunks.start, 0));
            edges.insert((last, 0));
            edges.insert((last, layout.valid(last).ilog2()));
        }
        edges.retain(|page| self.pages.contains(page));
        self.write(&edges);
        let what = "first and last pages of regions";
        self.compare(Rule::ReportsEdges, what, &self.report()?, &edges, &BTreeSet::new())?;
        self.quiet("a sync after these were cleared", &self.report()?)
    }

    fn keeps_what_the_bitmap_held(&self) -> Result<(), Violation> {
        let dirty = PageBitmap::new(self.subject.ram().layout().chunks());
        let (held, written) = (self.pages[5], self.pages[6]);
        dirty.insert(held.0, 1 << held.1);
        self.subject.write(&[written]);
        must(self.log().sync(&dirty), "sync")?;
        for page in [held, written] {
            Violation::unless(dirty.get(page.0) >> page.1 & 1 == 1, Rule::AddsToBitmap, || {
                format!(
                    "after sync, {page:?} is not in a bitmap that held {held:?} when {written:?} was written"
                )
            })?;
        }
        self.clear(&BTreeSet::from([written]))?;
        self.report().map(drop)
    }

    /// A page written between sync and clear is covered by the read that follows clear, if it was in the report; any
    /// other page, and any page after clear, must be in the next report.
    fn survives_writes_around_clear(&self) -> Result<(), Violation> {
        let first = self.every(4, 0);
        self.write(&first);
        let reported = self.sync()?;
        self.compare(Rule::ReportsWrites, "before writes around clear", &reported, &first, &BTreeSet::new())?;
        // In the same chunks as those about to be cleared.
        let others: BTreeSet<Page> = self.every(4, 2).difference(&reported).copied().collect();
        let both: BTreeSet<Page> = first.union(&others).copied().collect();
        self.write(&both);
        self.clear(&reported)?;
        let after = self.every(8, 0);
        self.write(&after);
        let due = after.union(&others).copied().collect();
        let what = "written between sync and clear, or after clear";
        self.compare(Rule::KeepsWritesAroundClear, what, &self.report()?, &due, &reported)?;
        self.quiet("a sync after that", &self.report()?)
    }

    fn clears_in_part(&self) -> Result<(), Violation> {
        let rule = Rule::ClearsInPart;
        let written = self.every(2, 1);
        self.write(&written);
        let reported = self.sync()?;
        self.compare(Rule::ReportsWrites, "before a partial clear", &reported, &written, &BTreeSet::new())?;
        let cleared: BTreeSet<Page> = written.iter().copied().step_by(2).collect();
        let held: BTreeSet<Page> = reported.difference(&cleared).copied().collect();
        self.clear(&cleared)?;
        // What was not cleared may be reported again, or not: its consumer has it already.
        let quiet = self.sync()?;
        let twice: BTreeSet<Page> = quiet.difference(&held).copied().collect();
        self.quiet("a sync after a partial clear", &twice)?;
        self.write(&cleared);
        let reported = self.sync()?;
        self.compare(rule, "written after a partial clear", &reported, &cleared, &held)?;
        let all: BTreeSet<Page> = held.union(&reported).copied().collect();
        self.clear(&all)?;
        // Not what was reported beyond that: the writer may not be able to write it.
        let rest: BTreeSet<Page> = written.difference(&cleared).copied().collect();
        self.write(&rest);
        self.compare(rule, "written after the rest was cleared", &self.report()?, &rest, &BTreeSet::new())
    }

    fn starts_again(&self) -> Result<(), Violation> {
        self.write(&self.every(5, 0));
        must(self.log().stop(), "stop with pages not yet reported")?;
        self.write(&self.every(5, 1));
        self.start(Rule::StartsAfresh, "start after a stop with pages not yet reported")?;
        let written = self.every(5, 2);
        self.write(&written);
        let what = "written after another start";
        self.compare(Rule::StartsAfresh, what, &self.report()?, &written, &BTreeSet::new())
    }

    fn reports_everything(&self) -> Result<(), Violation> {
        let all = self.every(1, 0);
        self.write(&all);
        self.compare(Rule::ReportsEverything, "all pages written", &self.report()?, &all, &BTreeSet::new())
    }

    /// What migration does: copy what is reported, after clear, while a writer runs; the copy must converge on memory.
    fn copies_come_to_equal_memory(&self) -> Result<(), Violation> {
        const BATCHES: usize = 300;
        /// Batches that the writer may be ahead of the rounds of the reader, so that they do meet on a busy machine.
        const LEAD: usize = 10;
        let ram = self.subject.ram();
        let chunks = ram.layout().chunks();
        must(self.log().stop(), "stop")?;
        must(self.log().start(), "start")?;
        let mut copy = vec![0u8; chunks as usize * 64 * PAGE_SIZE];
        let dirty = PageBitmap::full(ram.layout());
        let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
        let pages = &self.pages;
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let _finished = Finished(&done);
                for batch in 0..BATCHES {
                    while batch > (rounds.load(Ordering::Acquire) + 1) * LEAD {
                        std::thread::yield_now();
                    }
                    // A few pages that are hot, and a few that move.
                    let list: Vec<Page> = (0..4)
                        .map(|i| pages[(batch % 3 * 17 + i) % pages.len()])
                        .chain((0..4).map(|i| pages[(batch * 29 + i * 101) % pages.len()]))
                        .collect();
                    self.subject.write(&list);
                }
            });
            // Should the reader leave early, the writer is let go.
            let _released = Released(&rounds);
            while !done.load(Ordering::Acquire) {
                must(self.log().sync(&dirty), "sync beside a writer")?;
                self.copy_dirty(&dirty, &mut copy)?;
                rounds.fetch_add(1, Ordering::Release);
            }
            if let Err(panic) = writer.join() {
                std::panic::resume_unwind(panic);
            }
            Ok(())
        })?;
        must(self.log().sync(&dirty), "the last sync")?;
        self.copy_dirty(&dirty, &mut copy)?;
        let mut now = vec![0u8; PAGE_SIZE];
        let mut wrong = BTreeSet::new();
        for chunk in 0..chunks {
            for bit in bits(ram.layout().valid(chunk)) {
                read_page(ram, (chunk, bit), &mut now);
                if now != copy[copied(chunk, bit)] {
                    wrong.insert((chunk, bit));
                }
            }
        }
        Violation::unless(wrong.is_empty(), Rule::Converges, || {
            format!(
                "copies made beside a writer, and once more after it, differ from memory: {}",
                some(&wrong)
            )
        })
    }

    /// Clears and copies all that is in the bitmap, chunk by chunk, as stream workers do.
    fn copy_dirty(&self, dirty: &PageBitmap, copy: &mut [u8]) -> Result<(), Violation> {
        for chunk in 0..dirty.chunks() {
            let word = dirty.take(chunk);
            if word == 0 {
                continue;
            }
            must(self.log().clear(chunk, &[word]), "clear beside a writer")?;
            for bit in bits(word) {
                read_page(self.subject.ram(), (chunk, bit), &mut copy[copied(chunk, bit)]);
            }
        }
        Ok(())
    }
}

/// Sets its flag when dropped, so that a writer that panics ends the loop that waits for it.
struct Finished<'a>(&'a AtomicBool);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Makes the count of rounds as good as endless when dropped.
struct Released<'a>(&'a AtomicUsize);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.store(usize::MAX / 100, Ordering::Release);
    }
}

/// Where the suite's copy keeps a page.
fn copied(chunk: u32, bit: u32) -> std::ops::Range<usize> {
    let at = (chunk as usize * 64 + bit as usize) * PAGE_SIZE;
    at..at + PAGE_SIZE
}

fn read_page(ram: &dyn GuestRam, (chunk, bit): Page, into: &mut [u8]) {
    let page = ram
        .chunk(chunk)
        .subslice(bit as usize * PAGE_SIZE, PAGE_SIZE)
        .expect("bits of a layout's chunk name pages of it");
    page.copy_to(into);
}
