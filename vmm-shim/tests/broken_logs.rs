//! The conformance suite over logs that are broken on purpose, each in the one way that breaks one rule; and over the sound one beneath.

use std::sync::{Arc, Mutex, MutexGuard};

use pagecopy::backend::{BackendError, DirtyLog, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE};
use vmm_shim::adapter::VmMemory;
use vmm_shim::bitmap_log::BitmapLog;
use vmm_shim::conformance::{Rule, Violation, Written, run};
use vmm_shim::union_log::UnionLog;
use vmm_shim::vm_memory::bitmap::AtomicBitmap;
use vmm_shim::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Two regions, neither a multiple of a chunk.
fn memory() -> (Memory, Layout) {
    let ranges = [
        (GuestAddress(0), 17 * CHUNK_SIZE + 9 * PAGE_SIZE),
        (GuestAddress(1 << 32), 2 * CHUNK_SIZE + PAGE_SIZE),
    ];
    let memory = Memory::from_ranges(&ranges).unwrap();
    let layout = VmMemory::new(memory.clone()).unwrap().layout().clone();
    (memory, layout)
}

/// Runs the suite over a log of what is written to this memory through vm-memory.
fn run_over(memory: &Memory, log: impl DirtyLog) -> Result<(), Violation> {
    let ram = Arc::new(VmMemory::new(memory.clone()).unwrap());
    let layout = ram.layout().clone();
    let write = |(chunk, bit), number: u64| {
        // Somewhere else in the page each time.
        let gpa = layout.address(chunk, bit).unwrap() + number % (PAGE_SIZE as u64 / 8) * 8;
        memory.write_obj(number, GuestAddress(gpa)).unwrap();
    };
    run(&Written::new(ram, log, write))
}

/// A log that breaks a rule.
struct Broken {
    inner: BitmapLog<Memory>,
    layout: Layout,
    breaks: Rule,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ever_started: bool,
    /// No sync since the last start.
    fresh: bool,
    /// Words reported so far.
    seen: u64,
    /// What the last sync reported, and what nobody reported before a stop.
    last: Vec<(u32, u64)>,
    kept: Vec<(u32, u64)>,
    /// Pages that are not armed again.
    dead: Vec<(u32, u64)>,
}

impl Broken {
    fn new(breaks: Rule, memory: &Memory, layout: &Layout) -> Self {
        let inner = BitmapLog::new(memory.clone(), layout).unwrap();
        Self { inner, layout: layout.clone(), breaks, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What the sound log reports.
    fn harvest(&self) -> Result<PageBitmap, BackendError> {
        let found = PageBitmap::new(self.layout.chunks());
        self.inner.sync(&found)?;
        Ok(found)
    }

    /// Makes a report what it must not be.
    fn spoil(&self, found: &PageBitmap, state: &mut State) -> Result<(), BackendError> {
        let any = !found.is_empty();
        match self.breaks {
            Rule::StartsQuiet if std::mem::take(&mut state.fresh) => {
                found.insert(0, u64::MAX);
            }
            Rule::ReportsEdges => {
                for region in 0..self.layout.regions().len() {
                    let last = self.layout.region_chunks(region).end - 1;
                    found.remove(last, 1 << self.layout.valid(last).ilog2());
                }
            }
            Rule::ReportsWrites => {
                for (chunk, word) in found.iter() {
                    state.seen += 1;
                    if state.seen.is_multiple_of(100) {
                        found.remove(chunk, word);
                    }
                }
            }
            Rule::ReportsOnce => {
                let now: Vec<_> = found.iter().collect();
                for (chunk, word) in std::mem::replace(&mut state.last, now) {
                    found.insert(chunk, word);
                }
            }
            Rule::ReportsNothingElse if any => {
                found.insert(3, 1 << 11);
            }
            Rule::NamesPages if any => {
                found.insert(self.layout.chunks() - 1, 1 << 60);
            }
            Rule::ClearsInPart => {
                state.dead.iter().for_each(|&(chunk, word)| {
                    found.remove(chunk, word);
                });
                state.last = found.iter().collect();
            }
            Rule::StartsAfresh => {
                state.kept.drain(..).for_each(|(chunk, word)| {
                    found.insert(chunk, word);
                });
            }
            Rule::ReportsEverything => {
                let mut pages = 0;
                for (chunk, word) in found.iter() {
                    pages += word.count_ones();
                    if pages > 1000 {
                        found.remove(chunk, word);
                    }
                }
            }
            Rule::Converges => {
                for _ in 0..200 {
                    self.harvest()?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl DirtyLog for Broken {
    fn name(&self) -> &str {
        "broken"
    }

    fn start(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        (state.ever_started, state.fresh) = (true, true);
        self.inner.start()
    }

    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        let found = self.harvest()?;
        self.spoil(&found, &mut self.state())?;
        if self.breaks == Rule::AddsToBitmap {
            for (chunk, word) in dirty.iter() {
                dirty.remove(chunk, word);
            }
        }
        for (chunk, word) in found.iter() {
            dirty.insert(chunk, word);
        }
        Ok(found.count().saturating_sub((self.breaks == Rule::Counts).into()))
    }

    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        let mut state = self.state();
        match self.breaks {
            // Whatever was written since the report is forgotten.
            Rule::KeepsWritesAroundClear => drop(self.harvest()?),
            // What was cleared with less than all of its chunk is not armed again.
            Rule::ClearsInPart => {
                for (chunk, &word) in (first..).zip(pages) {
                    let part = |&(c, all): &(u32, u64)| c == chunk && word != all;
                    if word != 0 && state.last.iter().any(part) {
                        state.dead.push((chunk, word));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        match self.breaks {
            Rule::Works if !state.ever_started => return Err(BackendError::invalid("stop before start")),
            Rule::StartsAfresh if state.ever_started => {
                if let Ok(found) = self.harvest() {
                    state.kept.extend(found.iter());
                }
            }
            _ => {}
        }
        self.inner.stop()
    }
}

#[test]
fn a_log_that_breaks_a_rule_is_told_which() {
    for rule in Rule::ALL {
        let (memory, layout) = memory();
        let broken = run_over(&memory, Broken::new(rule, &memory, &layout));
        let violation = broken.expect_err(&format!("a log that breaks {rule:?} must not pass"));
        assert_eq!(violation.rule, rule, "{violation}");
        assert!(violation.to_string().starts_with(&format!("{rule:?}: ")), "{violation}");
    }
}

#[test]
fn the_log_beneath_keeps_all_rules_alone_and_in_a_union() {
    let (memory, layout) = memory();
    run_over(&memory, BitmapLog::new(memory.clone(), &layout).unwrap()).unwrap();
    let union = UnionLog::new(BitmapLog::new(memory.clone(), &layout).unwrap(), pagecopy::backend::StaticLog);
    assert!(union.expects_writes());
    run_over(&memory, union).unwrap();
}

/// A log that cannot be started.
struct Dead;

impl DirtyLog for Dead {
    fn name(&self) -> &str {
        "dead"
    }
    fn start(&self) -> Result<(), BackendError> {
        Err(BackendError::invalid("start"))
    }
    fn sync(&self, _dirty: &PageBitmap) -> Result<u64, BackendError> {
        Ok(0)
    }
    fn stop(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[test]
fn a_union_that_is_half_started_is_stopped() {
    let (memory, layout) = memory();
    let union = UnionLog::new(BitmapLog::new(memory, &layout).unwrap(), Dead);
    assert_eq!(union.name(), "marks+dead");
    union.start().unwrap_err();
    let text = union.sync(&PageBitmap::new(layout.chunks())).unwrap_err().to_string();
    assert!(text.contains("marks is not started"), "{text}");
}

#[test]
fn bitmaps_of_another_shape_are_refused() {
    let (memory, layout) = memory();
    let refused = |layout: &Layout, part: &str| {
        let text = BitmapLog::new(memory.clone(), layout).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    };
    refused(&Layout::flat(layout.bytes()).unwrap(), "region 0 has");
    let first = layout.regions()[0].clone();
    refused(&Layout::new(vec![first]).unwrap(), "has 2 regions, the layout 1");
}
