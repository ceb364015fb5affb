//! A guest that writes when it hurts most: its memory, its dirty log, and its vCPUs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pagecopy::backend::{
    self, BackendError, DirtyLog, Fault, GuestRam, MissingPages, Placer, Room, StateBlob, StateSink,
};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileSlice;

use super::rng::Rng;
use crate::guest_memory::Memory;

/// Former contents of a page that the guest may return to.
const FORMER_MAX: usize = 3;

/// Cores that it runs on once it misses pages.
const CORES: usize = 3;

/// How a guest behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Habits {
    /// Percent of the engine's own accesses to memory and log in whose midst the guest writes.
    pub(super) interferes: u64,
    /// The dirty log is re-armed by a sync, as a ring is, and not just before pages are read.
    pub(super) log_rearms: bool,
    /// Its memory can place fresh pages.
    pub(super) places: bool,
    /// All of it is to be brought in ahead of its content.
    pub(super) populates: bool,
    /// Its device state cannot be loaded.
    pub(super) refuses_state: bool,
    /// It cannot be resumed.
    pub(super) refuses_to_run: bool,
    /// It can run before its pages are there.
    pub(super) misses: bool,
    /// There is no room for what is missing.
    pub(super) lacks_room: bool,
    /// Pages that have followed when memory runs out.
    pub(super) places_max: Option<u32>,
    /// Writes in all; then it rests, so that every migration can come to its end.
    pub(super) writes: u32,
}

impl Habits {
    /// It cannot run here, whatever comes.
    pub(super) fn is_faulty(&self) -> bool {
        self.refuses_state || self.refuses_to_run || self.lacks_room || self.places_max.is_some()
    }
}

/// A guest, wherever it is: at the source its first, at the destination its new home.
pub(super) struct Guest {
    memory: Memory,
    habits: Habits,
    /// Where it was before, whose pages must be the ones that follow.
    origin: Option<Arc<Guest>>,
    state: Mutex<State>,
}

struct State {
    rng: Rng,
    running: bool,
    writes_left: u32,
    /// What it did, which its device state holds.
    clock: u64,
    /// The pages it likes to write.
    hot: Vec<(u32, u32)>,
    former: BTreeMap<(u32, u32), Vec<[u8; PAGE_SIZE]>>,
    /// Content that compresses, and does not repeat itself.
    text: [u8; PAGE_SIZE],
    populated: Vec<u64>,
    logging: bool,
    /// For each chunk, pages whose next write is noted.
    armed: Vec<u64>,
    /// Pages noted since the last sync.
    noted: Vec<u64>,
    /// For each chunk, pages that are still to come.
    missing: Vec<u64>,
    /// What each core waits for.
    cores: [Option<(u32, u32)>; CORES],
    /// What was touched since it was last asked.
    faults: Vec<Fault>,
    waits: u64,
    /// How often pages were taken away that did not follow.
    taken_back: u64,
    /// Pages that have followed.
    placed: u32,
    /// It was stopped before its pages were there, for they never come.
    lost: bool,
    violation: Option<String>,
}

impl Guest {
    /// A guest that has run for a while, or memory for one that is to come.
    pub(super) fn new(layout: Layout, habits: Habits, mut rng: Rng, origin: Option<Arc<Self>>) -> Arc<Self> {
        let runs = origin.is_none();
        let chunks = layout.chunks();
        let all: Vec<_> = (0..chunks).flat_map(|c| bits(layout.valid(c)).map(move |b| (c, b))).collect();
        let hot = (0..rng.range(1, 6)).map(|_| rng.pick(&all)).collect();
        let words = vec![0; chunks as usize];
        let text = std::array::from_fn(|_| rng.below(16) as u8);
        let state = State {
            running: runs,
            writes_left: habits.writes,
            clock: 0,
            hot,
            former: BTreeMap::new(),
            text,
            populated: words.clone(),
            logging: false,
            armed: words.clone(),
            noted: words.clone(),
            missing: words,
            cores: [None; CORES],
            faults: Vec::new(),
            waits: 0,
            taken_back: 0,
            placed: 0,
            lost: false,
            violation: None,
            rng,
        };
        let guest = Arc::new(Self { memory: Memory::new(layout), habits, origin, state: Mutex::new(state) });
        if runs {
            let mut state = guest.state();
            for &(chunk, bit) in &all {
                if state.rng.percent(60) {
                    guest.write(&mut state, chunk, bit);
                }
            }
            state.writes_left = habits.writes;
            drop(state);
        }
        guest
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What a page holds.
    pub(super) fn page(&self, chunk: u32, bit: u32) -> [u8; PAGE_SIZE] {
        self.memory.read(chunk, bit)
    }

    pub(super) fn runs(&self) -> bool {
        self.state().running
    }

    pub(super) fn set_running(&self, running: bool) {
        self.state().running = running;
    }

    /// Whether it will write again.
    pub(super) fn is_busy(&self) -> bool {
        let state = self.state();
        state.running && state.writes_left != 0
    }

    /// The guest runs for a moment, on cores that do not wait for a page.
    pub(super) fn run(&self) {
        let mut state = self.state();
        let writes = state.rng.range(1, 6);
        for _ in 0..writes {
            self.write_somewhere(&mut state);
        }
    }

    /// Pages that are still to come.
    pub(super) fn missing(&self) -> u64 {
        self.state().missing.iter().map(|pages| u64::from(pages.count_ones())).sum()
    }

    /// How often a core has waited for a page.
    pub(super) fn waits(&self) -> u64 {
        self.state().waits
    }

    /// How often pages were taken away that did not follow, for the handover was taken back.
    pub(super) fn taken_back(&self) -> u64 {
        self.state().taken_back
    }

    /// It was stopped because pages of it never come.
    pub(super) fn is_lost(&self) -> bool {
        self.state().lost
    }

    /// What happened to it that must never happen.
    pub(super) fn violation(&self) -> Option<String> {
        self.state().violation.take()
    }

    /// A core touches a page; false where it has to wait for it.
    fn touch(&self, state: &mut State, (chunk, bit): (u32, u32)) -> bool {
        if state.missing[chunk as usize] >> bit & 1 == 0 {
            return true;
        }
        if let Some(core) = state.cores.iter().position(Option::is_none) {
            state.waits += 1;
            state.cores[core] = Some((chunk, bit));
            state.faults.push(Fault { chunk, page: bit, thread: core as u32 });
        }
        false
    }

    /// Pages are there: who waits for them goes on.
    fn came(&self, state: &mut State) {
        let State { missing, cores, .. } = state;
        for core in cores {
            core.take_if(|(chunk, bit)| missing[*chunk as usize] >> *bit & 1 == 0);
        }
    }

    /// The engine touches memory or the log: now and then the guest writes at just that moment.
    fn interfere(&self, state: &mut State) {
        if self.habits.interferes != 0 && state.running && state.rng.percent(self.habits.interferes) {
            self.write_somewhere(state);
        }
    }

    fn write_somewhere(&self, state: &mut State) {
        if !state.running || state.writes_left == 0 || state.cores.iter().all(Option::is_some) {
            return;
        }
        state.writes_left -= 1;
        let (chunk, bit) = if state.rng.percent(75) {
            state.rng.pick(&state.hot.clone())
        } else {
            let chunk = state.rng.below(u64::from(self.memory.layout().chunks())) as u32;
            let valid = self.memory.layout().valid(chunk);
            (chunk, state.rng.below(u64::from(valid.count_ones())) as u32)
        };
        if self.touch(state, (chunk, bit)) {
            self.write(state, chunk, bit);
        }
    }

    fn write(&self, state: &mut State, chunk: u32, bit: u32) {
        let old = self.memory.read(chunk, bit);
        let mut new = old;
        match state.rng.below(12) {
            0 => new.fill(0),
            1 if state.rng.percent(30) => new.fill(state.rng.next() as u8),
            // What many of its pages have, each with something of its own.
            1 | 10 | 11 => {
                new = state.text;
                new.rotate_left(state.rng.pick(&[0, 8, 1024, 2000]));
                let own = state.rng.below(PAGE_SIZE as u64 - 200) as usize;
                new[own..own + 200].fill(state.rng.next() as u8);
            }
            2 => {
                let mut noise = state.rng.fork();
                for word in new.as_chunks_mut::<8>().0 {
                    *word = noise.next().to_le_bytes();
                }
            }
            // What it held before: nothing tells that from a page that was never written.
            3..=5 => {
                if let Some(former) = state.former.get(&(chunk, bit)).filter(|f| !f.is_empty()) {
                    new = former[state.rng.below(former.len() as u64) as usize];
                }
            }
            6 => {
                let other = state.rng.pick(&state.hot.clone());
                if !self.touch(state, other) {
                    return;
                }
                new = self.memory.read(other.0, other.1);
            }
            // A little, which is what deltas are for.
            _ => {
                let at = state.rng.below(PAGE_SIZE as u64 - 8) as usize;
                new[at..at + 8].copy_from_slice(&state.rng.next().to_le_bytes());
            }
        }
        let former = state.former.entry((chunk, bit)).or_default();
        if former.len() == FORMER_MAX {
            former.remove(0);
        }
        former.push(old);
        self.memory.write(chunk, bit, &new);
        state.clock += 1;
        state.populated[chunk as usize] |= 1 << bit;
        if state.logging && state.armed[chunk as usize] >> bit & 1 != 0 {
            state.noted[chunk as usize] |= 1 << bit;
            state.armed[chunk as usize] &= !(1 << bit);
        }
    }

    /// Where memory that is there, or device state, differs from another guest's.
    pub(super) fn difference(&self, other: &Self) -> Option<String> {
        let layout = self.memory.layout();
        for chunk in 0..layout.chunks() {
            let there = layout.valid(chunk) & !other.state().missing[chunk as usize];
            for bit in bits(there) {
                if self.memory.read(chunk, bit) != other.memory.read(chunk, bit) {
                    return Some(format!("page {bit} of chunk {chunk}"));
                }
            }
        }
        let clocks = (self.state().clock, other.state().clock);
        (clocks.0 != clocks.1).then(|| format!("device state: {clocks:?}"))
    }
}

impl backend::Guest for Guest {
    fn pause(&self) -> Result<(), BackendError> {
        self.set_running(false);
        Ok(())
    }

    fn resume(&self) -> Result<(), BackendError> {
        if self.habits.refuses_to_run {
            return Err(BackendError::invalid("this guest cannot be resumed"));
        }
        self.set_running(true);
        Ok(())
    }

    fn stop_for_good(&self, release: &dyn Fn() -> Result<(), BackendError>) -> Result<(), BackendError> {
        let mut state = self.state();
        (state.running, state.lost) = (false, true);
        drop(state);
        release()
    }

    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        let clock = self.state().clock;
        out.piece("clock", 1, &clock.to_le_bytes())
    }

    fn load_state(&self, blobs: &[StateBlob]) -> Result<(), BackendError> {
        let bytes = blobs.first().and_then(|blob| blob.bytes[..].try_into().ok());
        let none = || BackendError::invalid("load the clock");
        let bytes = bytes.filter(|_| !self.habits.refuses_state);
        self.state().clock = u64::from_le_bytes(bytes.ok_or_else(none)?);
        Ok(())
    }
}

impl GuestRam for Guest {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.interfere(&mut self.state());
        self.memory.region(region)
    }

    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        let mut state = self.state();
        self.interfere(&mut state);
        pages.copy_from_slice(&state.populated[first as usize..first as usize + pages.len()]);
        self.interfere(&mut state);
        Ok(())
    }

    fn populates_ahead(&self) -> bool {
        self.habits.populates
    }

    fn placer(self: Arc<Self>) -> Option<Box<dyn Placer>> {
        self.habits.places.then(|| Box::new(GuestPlacer(self)) as Box<dyn Placer>)
    }

    fn room(&self) -> Option<Room> {
        let bytes = if self.habits.lacks_room && self.missing() != 0 { 0 } else { u64::MAX };
        Some(Room { bytes, of: "the simulated host".into(), hint: "none" })
    }

    fn missing_unit(&self) -> Result<u32, BackendError> {
        if self.habits.misses { Ok(0) } else { Err(BackendError::invalid("this memory misses nothing")) }
    }

    fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        let mut state = self.state();
        for (chunk, pages) in missing.iter() {
            state.missing[chunk as usize] = pages;
            bits(pages).for_each(|bit| self.memory.write(chunk, bit, &[0xee; PAGE_SIZE]));
        }
        drop(state);
        Ok(Box::new(Missing(self)))
    }

    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.memory.discard(chunk, pages)
    }
}

/// What is still to come of it: what does come must be what its origin has.
struct Missing(Arc<Guest>);

impl Missing {
    fn place_page(&self, state: &mut State, chunk: u32, bit: u32, page: &[u8; PAGE_SIZE]) {
        let origin = self.0.origin.as_ref().expect("only a guest that moves misses pages");
        if state.missing[chunk as usize] >> bit & 1 == 0 {
            state.violation.get_or_insert(format!("page {bit} of chunk {chunk} was placed twice"));
        } else if origin.memory.read(chunk, bit) != *page {
            state.violation.get_or_insert(format!("page {bit} of chunk {chunk} followed and is stale"));
        }
        state.missing[chunk as usize] &= !(1 << bit);
        self.0.memory.write(chunk, bit, page);
    }
}

impl MissingPages for Missing {
    fn wait(&self, faults: &mut Vec<Fault>, _timeout: Duration) -> Result<(), BackendError> {
        faults.append(&mut self.0.state().faults);
        Ok(())
    }

    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        let mut state = self.0.state();
        for (bit, page) in (first..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
            state.placed += 1;
            if self.0.habits.places_max.is_some_and(|most| state.placed > most) {
                return Err(BackendError::new(
                    "bring a page in",
                    std::io::Error::from(std::io::ErrorKind::OutOfMemory),
                ));
            }
            self.place_page(&mut state, chunk, bit, page);
        }
        self.0.came(&mut state);
        Ok(())
    }

    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError> {
        (first..first + count).try_for_each(|bit| self.place(chunk, bit, &[0; PAGE_SIZE]))
    }

    fn settle(&self, _fault: Fault) -> Result<(), BackendError> {
        self.0.came(&mut self.0.state());
        Ok(())
    }

    fn end(&self) -> Result<(), BackendError> {
        let mut state = self.0.state();
        state.taken_back += u64::from(!state.lost && state.missing.iter().any(|&pages| pages != 0));
        for chunk in 0..state.missing.len() {
            let pages = std::mem::take(&mut state.missing[chunk]);
            if pages != 0 && state.running {
                state.violation.get_or_insert("the guest runs on zeros instead of its pages".into());
            }
            bits(pages).for_each(|bit| self.0.memory.write(chunk as u32, bit, &[0; PAGE_SIZE]));
        }
        self.0.came(&mut state);
        Ok(())
    }
}

struct GuestPlacer(Arc<Guest>);

impl Placer for GuestPlacer {
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        for (bit, page) in (first..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
            self.0.memory.write(chunk, bit, page);
        }
        Ok(())
    }
}

/// The strictest log that [`DirtyLog`] allows: a page that is written again before it is re-armed is not reported again.
impl DirtyLog for Guest {
    fn name(&self) -> &str {
        "simulated"
    }

    fn start(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        state.logging = true;
        state.armed.fill(u64::MAX);
        state.noted.fill(0);
        Ok(())
    }

    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        let mut state = self.state();
        let mut count = 0;
        for chunk in 0..self.memory.layout().chunks() {
            self.interfere(&mut state);
            let pages = std::mem::take(&mut state.noted[chunk as usize]);
            if self.habits.log_rearms {
                state.armed[chunk as usize] |= pages;
            }
            self.interfere(&mut state);
            count += u64::from(pages.count_ones());
            dirty.insert(chunk, pages);
        }
        Ok(count)
    }

    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        let mut state = self.state();
        for (chunk, pages) in (first as usize..).zip(pages) {
            self.interfere(&mut state);
            if !self.habits.log_rearms {
                state.armed[chunk] |= pages;
            }
        }
        self.interfere(&mut state);
        Ok(())
    }

    fn stop(&self) -> Result<(), BackendError> {
        self.state().logging = false;
        Ok(())
    }
}
