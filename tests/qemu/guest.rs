//! The only program of a Linux guest: writes its memory, checks what it wrote, and counts on its console. Built by the test, without
//! dependencies, and linked statically, for nothing else is in the guest's file system.
//!
//! It takes `mib=` (memory that it writes) and `rate=` (pages that it writes a second) from the kernel's command line. Each 100 ms it
//! prints `beat N wrote W errors E`: N counts up by one.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE_WORDS: usize = 512;

static WROTE: AtomicU64 = AtomicU64::new(0);
static ERRORS: AtomicU64 = AtomicU64::new(0);

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// What a word of a page is in its `turn`-th writing.
fn word(page: u64, turn: u64, at: u64) -> u64 {
    let mixed = (page << 40 | turn << 10 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 29
}

/// A part of memory, with the turn in which each of its pages was written last.
struct Part {
    first: u64,
    words: Vec<AtomicU64>,
    turns: Vec<u64>,
    random: u64,
    swept: usize,
}

impl Part {
    fn new(first: u64, pages: usize) -> Self {
        let words = (0..pages * PAGE_WORDS).map(|_| AtomicU64::new(0)).collect();
        let mut part = Self { first, words, turns: vec![0; pages], random: first | 1, swept: 0 };
        (0..pages).for_each(|page| part.write(page));
        part
    }

    fn write(&mut self, page: usize) {
        self.turns[page] += 1;
        let (number, turn) = (self.first + page as u64, self.turns[page]);
        for (at, slot) in self.words[page * PAGE_WORDS..][..PAGE_WORDS].iter().enumerate() {
            slot.store(word(number, turn, at as u64), Ordering::Relaxed);
        }
        WROTE.fetch_add(1, Ordering::Relaxed);
    }

    fn check(&self, page: usize) {
        let (number, turn) = (self.first + page as u64, self.turns[page]);
        let words = self.words[page * PAGE_WORDS..][..PAGE_WORDS].iter().enumerate();
        let right = words.fold(true, |right, (at, slot)| {
            right & (slot.load(Ordering::Relaxed) == word(number, turn, at as u64))
        });
        ERRORS.fetch_add(u64::from(!right), Ordering::Relaxed);
    }

    /// Checks pages and writes them, so many a second, and looks through all others in turn.
    fn run(mut self, rate: u64) {
        let begun = Instant::now();
        let mut done = 0;
        loop {
            let due = begun.elapsed().as_millis() as u64 * rate / 1000;
            while done < due {
                self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let page = (self.random >> 33) as usize % self.turns.len();
                self.check(page);
                self.write(page);
                done += 1;
            }
            for _ in 0..16 {
                self.swept = (self.swept + 1) % self.turns.len();
                self.check(self.swept);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn main() {
    let pages = number("mib", 32) << 8;
    let threads = std::thread::available_parallelism().map_or(1, |cpus| cpus.get()) as u64;
    let (share, rate) = (pages / threads, number("rate", 200) / threads);
    for thread in 0..threads {
        let part = Part::new(thread * share, share as usize);
        std::thread::spawn(move || part.run(rate));
    }
    for beat in 0u64.. {
        let (wrote, errors) = (WROTE.load(Ordering::Relaxed), ERRORS.load(Ordering::Relaxed));
        _ = std::io::stdout().write_all(format!("beat {beat} wrote {wrote} errors {errors}\n").as_bytes());
        std::thread::sleep(Duration::from_millis(100));
    }
}
