//! What a source has registered, at both ends: which runs of memory, who uses them, and which to let go.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use pagecopy::backend::GuestRam;
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_SIZE, Layout};

use super::sys::{Access, Domain, Id, Region};
use super::{NotRegistered, RdmaOptions, TICK, connect};
use crate::wire::queue::{REGISTER_CHUNKS_MAX, Range, Registered};

const _: () = assert!(RUN_CHUNKS_MAX <= REGISTER_CHUNKS_MAX);

/// Shorter runs of data are not worth a registration: their pages travel in messages.
const RUN_CHUNKS_MIN: u32 = 2;
/// Longest run: so short that registering the next one overlaps with sending from this one.
const RUN_CHUNKS_MAX: u32 = 32;
/// Of what may be pinned, each run takes at most this part, so that there is room for several.
const PINNED_PARTS: u64 = 8;

/// How a run stands.
enum State {
    Idle,
    /// Asked for at the destination; what is known so far.
    Asked {
        local: Option<Arc<Region>>,
        remote: Option<(u64, u32)>,
    },
    Ready {
        region: Arc<Region>,
        to: u64,
        key: u32,
    },
    /// Not to be had: its pages travel in messages.
    Refused,
}

struct Run {
    state: State,
    /// Frames under way that were placed in it.
    users: u32,
    /// When it was last used, by a count of uses.
    used: u64,
}

/// Two adapters that streams connect: registrations hold for these.
struct Pair {
    domain: Arc<Domain>,
    adapter: u32,
    runs: Vec<Run>,
}

#[derive(Default)]
struct Table {
    pairs: Vec<Pair>,
    pinned: u64,
    /// The least of what both ends allow.
    pinned_max: u64,
    clock: u64,
}

/// What is registered, for all streams of a session.
pub(crate) struct Registry {
    ram: Arc<dyn GuestRam>,
    options: RdmaOptions,
    /// Runs of whole chunks of data, ascending, as long as they may be.
    whole: Vec<Range>,
    /// The same, cut so that several fit into what both ends may pin, once that is known.
    plan: OnceLock<Vec<Range>>,
    table: Mutex<Table>,
    changed: Condvar,
}

/// Where the pages of a chunk go.
pub(super) struct Target {
    pub(super) region: Arc<Region>,
    /// Of the chunk, in the region.
    pub(super) offset: u64,
    /// Of the chunk, at the destination.
    pub(super) to: u64,
    pub(super) key: u32,
    pub(super) hold: Hold,
}

/// What has to be done before a chunk can be placed.
pub(super) enum Next {
    Place(Target),
    /// Not at all.
    Message,
    /// Let these go at the destination, ask it for that one, and register it here with [`Registry::register`].
    Ask {
        run: usize,
        range: Range,
        release: Vec<Range>,
    },
    /// Wait, with nothing held back: somebody else's frames or answers are under way.
    Wait,
}

/// Keeps a run registered while a frame that was placed in it is under way.
pub(super) struct Hold {
    registry: Arc<Registry>,
    pair: usize,
    run: usize,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut table = self.registry.table();
        table.pairs[self.pair].runs[self.run].users -= 1;
        drop(table);
        self.registry.changed.notify_all();
    }
}

impl Registry {
    /// For memory in which `populated` is no hole. Only whole chunks of data are registered: that would allocate holes.
    pub(crate) fn new(ram: Arc<dyn GuestRam>, options: RdmaOptions, populated: &PageBitmap) -> Self {
        let whole = plan(ram.layout(), |chunk| populated.get(chunk));
        let table = Table { pinned_max: options.pinned_max, ..Table::default() };
        Self { ram, options, whole, plan: OnceLock::new(), table: Mutex::new(table), changed: Condvar::new() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The domain for a new connection.
    pub(super) fn domain(&self, id: &Arc<Id>) -> io::Result<Arc<Domain>> {
        let table = self.table();
        let known = table.pairs.iter().map(|pair| &pair.domain).enumerate();
        connect::domain_of(known, id).map(|(_, domain)| domain)
    }

    /// Takes note of a stream between two adapters, and of what the destination may pin; returns the number of the pair.
    pub(super) fn pair(&self, domain: &Arc<Domain>, adapter: u32, pinned_max: u64) -> usize {
        let mut table = self.table();
        table.pinned_max = table.pinned_max.min(pinned_max);
        let is_this = |pair: &Pair| Arc::ptr_eq(&pair.domain, domain) && pair.adapter == adapter;
        if let Some(at) = table.pairs.iter().position(is_this) {
            return at;
        }
        let longest = table.pinned_max / PINNED_PARTS / CHUNK_SIZE as u64;
        let longest = longest.clamp(1, RUN_CHUNKS_MAX.into()) as u32;
        let plan = self.plan.get_or_init(|| cut(&self.whole, longest));
        let runs = plan.iter().map(|_| Run { state: State::Idle, users: 0, used: 0 }).collect();
        table.pairs.push(Pair { domain: domain.clone(), adapter, runs });
        table.pairs.len() - 1
    }

    /// The plan; empty before there is a stream.
    fn plan(&self) -> &[Range] {
        self.plan.get().map_or(&[], Vec::as_slice)
    }

    /// The run of the plan that a chunk lies in.
    pub(super) fn run_of(&self, chunk: u32) -> Option<usize> {
        let at = self.plan().partition_point(|range| range.first <= chunk).checked_sub(1)?;
        (chunk < self.plan()[at].first + self.plan()[at].count).then_some(at)
    }

    /// Runs in all.
    pub(super) fn runs(&self) -> usize {
        self.plan().len()
    }

    pub(super) fn pins_all(&self) -> bool {
        self.options.pin_all
    }

    /// What to do so that `chunk`, which lies in `run`, can be placed.
    pub(super) fn next(self: &Arc<Self>, pair: usize, run: usize, chunk: u32) -> Next {
        let mut table = self.table();
        table.clock += 1;
        let clock = table.clock;
        let entry = &mut table.pairs[pair].runs[run];
        match &entry.state {
            State::Refused => Next::Message,
            State::Asked { .. } => Next::Wait,
            State::Ready { region, to, key } => {
                let offset = u64::from(chunk - self.plan()[run].first) * CHUNK_SIZE as u64;
                let (region, to, key) = (region.clone(), to + offset, *key);
                (entry.users, entry.used) = (entry.users + 1, clock);
                let hold = Hold { registry: self.clone(), pair, run };
                Next::Place(Target { region, offset, to, key, hold })
            }
            State::Idle => self.claim(&mut table, pair, run, true),
        }
    }

    /// Whether to ask for a run ahead of its use, which lets nothing go for it.
    pub(super) fn ahead(&self, pair: usize, run: usize) -> Next {
        let mut table = self.table();
        match table.pairs[pair].runs[run].state {
            State::Idle => self.claim(&mut table, pair, run, false),
            _ => Next::Message,
        }
    }

    /// Makes an idle run asked for, if there is room or room can be made.
    fn claim(&self, table: &mut Table, pair: usize, run: usize, evict: bool) -> Next {
        let pins = !table.pairs[pair].domain.on_demand();
        let bytes = if pins { bytes_of(self.ram.layout(), self.plan()[run]) } else { 0 };
        let mut release = Vec::new();
        while table.pinned + bytes > table.pinned_max {
            if !evict {
                return Next::Message;
            }
            let idle = |(_, run): &(usize, &Run)| run.users == 0 && matches!(run.state, State::Ready { .. });
            let runs = table.pairs[pair].runs.iter().enumerate();
            let Some((oldest, _)) = runs.filter(idle).min_by_key(|(_, run)| run.used) else {
                // Frames and answers under way make room in time; without any there is none at all.
                let busy = |run: &Run| run.users != 0 || matches!(run.state, State::Asked { .. });
                let any = table.pairs.iter().any(|pair| pair.runs.iter().any(busy));
                return if any { Next::Wait } else { Next::Message };
            };
            table.pairs[pair].runs[oldest].state = State::Idle;
            table.pinned -= bytes_of(self.ram.layout(), self.plan()[oldest]);
            release.push(self.plan()[oldest]);
        }
        table.pinned += bytes;
        table.pairs[pair].runs[run].state = State::Asked { local: None, remote: None };
        Next::Ask { run, range: self.plan()[run], release }
    }

    /// Registers a run that was asked for at this end.
    pub(super) fn register(&self, pair: usize, run: usize) -> io::Result<()> {
        let range = self.plan()[run];
        let domain = self.table().pairs[pair].domain.clone();
        let place = self.ram.layout().locate(range.first).expect("the plan is the layout's");
        let bytes = bytes_of(self.ram.layout(), range);
        let region = Region::guest(&domain, &self.ram, place.region, place.offset, bytes, Access::Read);
        let region = match region.map_err(|e| NotRegistered::of(&e, bytes)) {
            Ok(region) => Some(region),
            Err(NotRegistered::Unfit) => None,
            Err(NotRegistered::Fatal(error)) => {
                self.lower(pair, run, bytes, error)?;
                None
            }
        };
        self.settle(pair, run, |state| {
            let State::Asked { local, .. } = state else { return };
            match region {
                Some(region) => *local = Some(region),
                None => *state = State::Refused,
            }
        });
        Ok(())
    }

    /// This process may pin no more. What it has pinned is as much as there may be from now on; where that is nothing, the user has to
    /// do something about it.
    fn lower(&self, pair: usize, run: usize, bytes: u64, error: io::Error) -> io::Result<()> {
        let mut table = self.table();
        let counted = matches!(table.pairs[pair].runs[run].state, State::Asked { .. });
        let counts = counted && !table.pairs[pair].domain.on_demand();
        let pinned = table.pinned - if counts { bytes } else { 0 };
        let ready = |run: &Run| matches!(run.state, State::Ready { .. });
        if pinned == 0 || !table.pairs.iter().any(|pair| pair.runs.iter().any(ready)) {
            return Err(error);
        }
        table.pinned_max = table.pinned_max.min(pinned);
        Ok(())
    }

    /// Takes the destination's answer; says whether it was waited for.
    pub(super) fn answer(&self, pair: usize, answer: Registered) -> bool {
        let Some(run) = self.run_of(answer.range.first).filter(|&run| self.plan()[run] == answer.range)
        else {
            return false;
        };
        let mut asked = false;
        self.settle(pair, run, |state| match (&mut *state, answer.place) {
            (State::Asked { remote, .. }, Some(place)) => {
                asked = remote.is_none();
                *remote = Some(place);
            }
            (State::Asked { .. }, None) => {
                asked = true;
                *state = State::Refused;
            }
            // Refused here meanwhile.
            (State::Refused, _) => asked = true,
            _ => {}
        });
        asked
    }

    fn settle(&self, pair: usize, run: usize, change: impl FnOnce(&mut State)) {
        let mut table = self.table();
        let pins = !table.pairs[pair].domain.on_demand();
        let state = &mut table.pairs[pair].runs[run].state;
        let was_refused = matches!(state, State::Refused);
        change(state);
        if let State::Asked { local: Some(region), remote: Some((to, key)) } = state {
            *state = State::Ready { region: region.clone(), to: *to, key: *key };
        }
        if matches!(state, State::Refused) && !was_refused && pins {
            table.pinned -= bytes_of(self.ram.layout(), self.plan()[run]);
        }
        drop(table);
        self.changed.notify_all();
    }

    /// A stream that asked for runs died before the answer: somebody else may ask.
    pub(super) fn forget(&self, pair: usize, runs: &[usize]) {
        let mut table = self.table();
        for &run in runs {
            let state = &mut table.pairs[pair].runs[run].state;
            if matches!(state, State::Asked { .. }) {
                *state = State::Idle;
                if !table.pairs[pair].domain.on_demand() {
                    table.pinned -= bytes_of(self.ram.layout(), self.plan()[run]);
                }
            }
        }
        drop(table);
        self.changed.notify_all();
    }

    /// Waits a moment for an answer or a receipt.
    pub(super) fn wait(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now()).min(TICK / 10);
        let left = left.max(Duration::from_micros(100));
        // Woken early or for another's sake, the caller looks again.
        drop(self.changed.wait_timeout(self.table(), left));
    }
}

fn bytes_of(layout: &Layout, range: Range) -> u64 {
    let last = layout.locate(range.first + range.count - 1).map_or(0, |place| place.bytes() as u64);
    u64::from(range.count - 1) * CHUNK_SIZE as u64 + last
}

/// Runs of chunks that are all data, each in one region.
fn plan(layout: &Layout, populated: impl Fn(u32) -> u64) -> Vec<Range> {
    let mut plan: Vec<Range> = Vec::new();
    for region in 0..layout.regions().len() {
        let mut open = false;
        for chunk in layout.region_chunks(region) {
            let valid = layout.valid(chunk);
            let data = populated(chunk) & valid == valid;
            match plan.last_mut() {
                Some(last) if data && open => last.count += 1,
                _ if data => plan.push(Range { first: chunk, count: 1 }),
                _ => {}
            }
            open = data;
        }
    }
    plan
}

/// Runs of at most `longest` chunks; those that are not worth it are left out.
fn cut(whole: &[Range], longest: u32) -> Vec<Range> {
    let pieces = whole.iter().flat_map(|range| {
        let end = range.first + range.count;
        let starts = (range.first..end).step_by(longest as usize);
        starts.map(move |first| Range { first, count: longest.min(end - first) })
    });
    pieces.filter(|range| range.count >= RUN_CHUNKS_MIN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_leaves_holes_alone() {
        let layout = Layout::flat(20 * CHUNK_SIZE as u64 + 4096).unwrap();
        // Chunk 5 has a hole of one page, chunks 6 and 8 stand alone, 7, 9 and 10 are empty; the last chunk has one page.
        let populated = |chunk| match chunk {
            5 => !2,
            7 | 9 | 10 => 0,
            20 => 1,
            _ => u64::MAX,
        };
        let range = |first, count| Range { first, count };
        let whole = plan(&layout, populated);
        assert_eq!(whole, [range(0, 5), range(6, 1), range(8, 1), range(11, 10)]);
        assert_eq!(cut(&whole, 256), [range(0, 5), range(11, 10)]);
        assert_eq!(cut(&whole, 4), [range(0, 4), range(11, 4), range(15, 4), range(19, 2)]);
        assert_eq!(cut(&whole, 1), []);
        assert_eq!(bytes_of(&layout, range(19, 2)), CHUNK_SIZE as u64 + 4096);
    }
}
