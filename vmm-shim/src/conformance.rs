//! The properties that every dirty tracker must have, as one suite that runs over each of them.
//!
//! It belongs in tests: like them, it panics at what it finds. A tracker is put under test as a [`Subject`], which
//! joins it with its memory and with something that writes that memory in the way the tracker watches (a thread, a
//! vCPU).

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pagecopy::backend::{DirtyLog, GuestRam};
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

/// Runs the whole suite over a subject. The log is stopped at the end.
///
/// # Panics
/// When the tracker lacks a property, with a text that says which one and what pages show it.
pub fn check(subject: &dyn Subject) {
    let pages = subject.writable();
    assert!(
        pages.len() >= 64,
        "the subject offers {} writable pages; the suite takes at least 64",
        pages.len()
    );
    must(subject.log().stop(), "stop of a log that was never started");
    let suite = Suite { subject, pages };
    suite.starts_quiet();
    suite.reports_each_write_once();
    suite.reports_region_edges();
    suite.keeps_what_the_bitmap_held();
    suite.survives_writes_around_clear();
    suite.clears_in_part();
    suite.starts_again();
    suite.reports_everything();
    suite.copies_come_to_equal_memory();
    must(subject.log().stop(), "the last stop");
    must(subject.log().stop(), "a second stop in a row");
}

fn must<T>(result: Result<T, pagecopy::backend::BackendError>, what: &str) -> T {
    result.unwrap_or_else(|e| panic!("{what}: {e}: {}", e.source))
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
    fn start(&self, when: &str) {
        must(self.log().start(), "start");
        let reported = self.report();
        let extra = self.subject.extra_pages();
        assert!(
            reported.len() <= extra,
            "{when}: nothing was written since start, but sync reports {}; {extra} are allowed",
            some(&reported)
        );
    }

    /// One sync into a new bitmap, whose words are checked. Nothing is cleared.
    fn sync(&self) -> BTreeSet<Page> {
        let layout = self.subject.ram().layout();
        let dirty = PageBitmap::new(layout.chunks());
        let count = must(self.log().sync(&dirty), "sync");
        for (chunk, word) in dirty.iter() {
            let wrong = word & !layout.valid(chunk);
            assert!(wrong == 0, "sync reports bits {wrong:#x} of chunk {chunk}, which name no page");
        }
        let pages: BTreeSet<Page> =
            dirty.iter().flat_map(|(chunk, word)| bits(word).map(move |bit| (chunk, bit))).collect();
        assert!(
            count >= pages.len() as u64,
            "sync says that it held {count} pages, but reports {}",
            pages.len()
        );
        pages
    }

    /// Clears these pages, chunk by chunk.
    fn clear(&self, pages: &BTreeSet<Page>) {
        let set = PageBitmap::new(self.subject.ram().layout().chunks());
        for &(chunk, bit) in pages {
            set.insert(chunk, 1 << bit);
        }
        for (chunk, word) in set.iter() {
            must(self.log().clear(chunk, &[word]), "clear");
        }
    }

    /// One sync, all of whose pages are cleared with one call that covers every chunk.
    fn report(&self) -> BTreeSet<Page> {
        let pages = self.sync();
        let mut words = vec![0; self.subject.ram().layout().chunks() as usize];
        for &(chunk, bit) in &pages {
            words[chunk as usize] |= 1 << bit;
        }
        must(self.log().clear(0, &words), "clear of all chunks");
        pages
    }

    /// Asserts that `reported` holds all of `written` and, of an exact tracker, hardly anything else but `maybe`.
    fn compare(
        &self,
        what: &str,
        reported: &BTreeSet<Page>,
        written: &BTreeSet<Page>,
        maybe: &BTreeSet<Page>,
    ) {
        let lost: BTreeSet<Page> = written.difference(reported).copied().collect();
        assert!(lost.is_empty(), "{what}: written, but not reported: {}", some(&lost));
        let over: BTreeSet<Page> =
            reported.iter().filter(|p| !written.contains(p) && !maybe.contains(p)).copied().collect();
        let extra = self.subject.extra_pages();
        assert!(
            !self.subject.exact() || over.len() <= extra,
            "{what}: reported, but not written: {}; {extra} are allowed",
            some(&over)
        );
    }

    /// Pages chosen by a step through the list: the same ones in every run.
    fn every(&self, step: usize, offset: usize) -> BTreeSet<Page> {
        self.pages.iter().copied().skip(offset).step_by(step).collect()
    }

    fn write(&self, pages: &BTreeSet<Page>) {
        let list: Vec<Page> = pages.iter().copied().collect();
        self.subject.write(&list);
    }

    fn starts_quiet(&self) {
        self.start("first start");
        must(self.log().stop(), "stop");
        // Populated pages, written before the log runs.
        self.write(&self.every(2, 0));
        self.start("start with populated pages");
        let again = self.report();
        self.compare("a second sync without writes", &again, &BTreeSet::new(), &BTreeSet::new());
    }

    fn reports_each_write_once(&self) {
        for (step, offset) in [(1000, 0), (7, 3), (3, 1), (64, 63), (7, 3)] {
            let written = self.every(step, offset.min(self.pages.len() - 1));
            self.write(&written);
            let reported = self.report();
            self.compare(&format!("every {step}. page written"), &reported, &written, &BTreeSet::new());
            let again = self.report();
            self.compare("a sync after the report was cleared", &again, &BTreeSet::new(), &BTreeSet::new());
            assert!(
                again.len() <= self.subject.extra_pages(),
                "reported twice, but written once: {}",
                some(&again)
            );
        }
    }

    fn reports_region_edges(&self) {
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
        self.compare("first and last pages of regions", &self.report(), &edges, &BTreeSet::new());
    }

    fn keeps_what_the_bitmap_held(&self) {
        let dirty = PageBitmap::new(self.subject.ram().layout().chunks());
        let (held, written) = (self.pages[5], self.pages[6]);
        dirty.insert(held.0, 1 << held.1);
        self.subject.write(&[written]);
        must(self.log().sync(&dirty), "sync");
        for page in [held, written] {
            assert!(
                dirty.get(page.0) >> page.1 & 1 == 1,
                "sync must add to the bitmap; {page:?} is not in it"
            );
        }
        self.clear(&BTreeSet::from([written]));
        self.report();
    }

    /// A page written between sync and clear is covered by the read that follows clear, if it was in the report; any
    /// other page, and any page after clear, must be in the next report.
    fn survives_writes_around_clear(&self) {
        let first = self.every(4, 0);
        self.write(&first);
        let reported = self.sync();
        self.compare("before writes around clear", &reported, &first, &BTreeSet::new());
        // In the same chunks as those about to be cleared.
        let others: BTreeSet<Page> = self.every(4, 2).difference(&reported).copied().collect();
        let both: BTreeSet<Page> = first.union(&others).copied().collect();
        self.write(&both);
        self.clear(&reported);
        let after = self.every(8, 0);
        self.write(&after);
        let due = after.union(&others).copied().collect();
        self.compare("written between sync and clear, or after clear", &self.report(), &due, &reported);
        self.compare("a sync after that", &self.report(), &BTreeSet::new(), &BTreeSet::new());
    }

    fn clears_in_part(&self) {
        let written = self.every(2, 1);
        self.write(&written);
        let reported = self.sync();
        self.compare("before a partial clear", &reported, &written, &BTreeSet::new());
        let cleared: BTreeSet<Page> = written.iter().copied().step_by(2).collect();
        let held: BTreeSet<Page> = reported.difference(&cleared).copied().collect();
        self.clear(&cleared);
        // What was not cleared may be reported again, or not: its consumer has it already.
        let quiet = self.sync();
        self.compare("a sync after a partial clear", &quiet, &BTreeSet::new(), &held);
        let twice: BTreeSet<Page> = quiet.difference(&held).copied().collect();
        assert!(twice.len() <= self.subject.extra_pages(), "cleared, but reported again: {}", some(&twice));
        self.write(&cleared);
        let reported = self.sync();
        self.compare("written after a partial clear", &reported, &cleared, &held);
        let all: BTreeSet<Page> = held.union(&reported).copied().collect();
        self.clear(&all);
        // Not what was reported beyond that: the writer may not be able to write it.
        let rest: BTreeSet<Page> = written.difference(&cleared).copied().collect();
        self.write(&rest);
        self.compare("written after the rest was cleared", &self.report(), &rest, &BTreeSet::new());
    }

    fn starts_again(&self) {
        self.write(&self.every(5, 0));
        must(self.log().stop(), "stop with pages not yet reported");
        self.write(&self.every(5, 1));
        self.start("start after a stop with pages not yet reported");
        let written = self.every(5, 2);
        self.write(&written);
        self.compare("written after another start", &self.report(), &written, &BTreeSet::new());
    }

    fn reports_everything(&self) {
        let all = self.every(1, 0);
        self.write(&all);
        self.compare("all pages written", &self.report(), &all, &BTreeSet::new());
    }

    /// What migration does: copy what is reported, after clear, while a writer runs; the copy must converge on memory.
    fn copies_come_to_equal_memory(&self) {
        const BATCHES: usize = 300;
        /// Batches that the writer may be ahead of the rounds of the reader, so that they do meet on a busy machine.
        const LEAD: usize = 10;
        let ram = self.subject.ram();
        let chunks = ram.layout().chunks();
        must(self.log().stop(), "stop");
        must(self.log().start(), "start");
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
            // Should the reader panic, the writer is let go.
            let _released = Released(&rounds);
            while !done.load(Ordering::Acquire) {
                must(self.log().sync(&dirty), "sync beside a writer");
                self.copy_dirty(&dirty, &mut copy);
                rounds.fetch_add(1, Ordering::Release);
            }
            if let Err(panic) = writer.join() {
                std::panic::resume_unwind(panic);
            }
        });
        must(self.log().sync(&dirty), "the last sync");
        self.copy_dirty(&dirty, &mut copy);
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
        assert!(
            wrong.is_empty(),
            "copies made beside a writer, and once more after it, differ from memory: {}",
            some(&wrong)
        );
    }

    /// Clears and copies all that is in the bitmap, chunk by chunk, as stream workers do.
    fn copy_dirty(&self, dirty: &PageBitmap, copy: &mut [u8]) {
        for chunk in 0..dirty.chunks() {
            let word = dirty.take(chunk);
            if word == 0 {
                continue;
            }
            must(self.log().clear(chunk, &[word]), "clear beside a writer");
            for bit in bits(word) {
                read_page(self.subject.ram(), (chunk, bit), &mut copy[copied(chunk, bit)]);
            }
        }
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
