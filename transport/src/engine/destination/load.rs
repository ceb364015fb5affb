//! Loading an archive: a migration in without a peer.
//!
//! Nothing of a frame reaches memory before it is known to be what was saved. A file is read by several threads at once, everything else
//! in order.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pagecopy::backend::{GuestRam, StateBlob};
use pagecopy::bitmap::bits;
use pagecopy::layout::{Layout, PAGE_SIZE};

use super::{Arrival, Incoming, IncomingError, Offer, demand};
use crate::archive::fill::Filler;
use crate::archive::format::{Header, split_state};
use crate::archive::frames::{Opened, Opener};
use crate::archive::image::{ChunkReader, Image};
use crate::archive::oneway::OneWayReader;
use crate::archive::reader::{Item, Sequence};
use crate::archive::{ArchiveError, Walk};
use crate::clock;
use crate::engine::progress::Progress;
use crate::engine::report::{Report, Status};
use crate::engine::{explain, usage};
use crate::local::guarded;
use crate::uri::Uri;

/// How often the report that others see is renewed, in nanoseconds.
const REPORT_NANOS: u64 = 50_000_000;

/// How an archive is to be loaded.
#[derive(Clone, Debug)]
pub(crate) struct Loading {
    pub(crate) uri: Uri,
    /// The archive that it stands on, where that is not where it says.
    pub(crate) base: Option<PathBuf>,
    /// Threads that read a file.
    pub(crate) threads: usize,
    /// The guest is to run before its pages are here.
    pub(crate) on_demand: bool,
}

/// What was loaded so far.
#[derive(Default)]
struct Loaded {
    raw: AtomicU64,
    zero: AtomicU64,
    compressed: AtomicU64,
    same: AtomicU64,
    wire: AtomicU64,
    logical: AtomicU64,
    /// When it was last told, in nanoseconds by the clock.
    told: AtomicU64,
}

impl Loaded {
    fn add(&self, opened: &Opened<'_>) {
        let add = |counter: &AtomicU64, value: u64| counter.fetch_add(value, Ordering::Relaxed);
        let pages = |mask: u64| u64::from(mask.count_ones());
        add(&self.raw, pages(opened.header.raw & !opened.same()));
        add(&self.zero, pages(opened.header.zero));
        add(&self.compressed, pages(opened.header.zstd));
        add(&self.same, pages(opened.same()));
        add(&self.wire, opened.header.frame_len() as u64);
        add(&self.logical, opened.logical_bytes());
    }

    /// Renews the report that others see, if it is time.
    fn report_now_and_then(&self, progress: &Progress, began: Duration) {
        let (now, told) = (clock::nanos(), self.told.load(Ordering::Relaxed));
        let due = now.saturating_sub(told) >= REPORT_NANOS;
        if due && self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.report(progress, began);
        }
    }

    fn report(&self, progress: &Progress, began: Duration) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        progress.update(|r| {
            (r.pages.raw, r.pages.zero) = (get(&self.raw), get(&self.zero));
            (r.pages.compressed, r.pages.unchanged) = (get(&self.compressed), get(&self.same));
            (r.wire_bytes, r.logical_bytes) = (get(&self.wire), get(&self.logical));
            r.rates(clock::now() - began);
        });
    }
}

/// Loads it. Blocks until the guest is here, and runs if it did, or there is no whole guest in it.
pub(super) fn load(
    loading: &Loading,
    progress: &Progress,
    incoming: &mut dyn Incoming,
) -> Result<Arrival, IncomingError> {
    let (began, cpu) = (clock::now(), usage::cpu_seconds());
    progress.update(|r| {
        *r = Report { status: Status::Setup, page_size: PAGE_SIZE as u32, streams: 1, ..Report::default() };
    });
    let load = Load { loading, progress, began };
    let result = guarded(|| load.run(incoming)).unwrap_or_else(|what| Err(IncomingError::Panicked { what }));
    progress.update(|r| {
        r.cpu_s = usage::cpu_seconds() - cpu;
        r.max_rss_bytes = usage::max_rss_bytes();
        r.rates(clock::now() - began);
        match &result {
            Ok(_) => (r.status, r.verified) = (Status::Completed, true),
            Err(error) => {
                r.status = match error {
                    error if error.loses_guest() => Status::PostcopyLost,
                    error if error.is_cancelled() => Status::Cancelled,
                    _ => Status::Failed,
                };
                r.error = Some(explain(error));
            }
        }
    });
    result.map(|running| Arrival { report: progress.report(), running, vm: () })
}

struct Load<'a> {
    loading: &'a Loading,
    progress: &'a Progress,
    began: Duration,
}

impl Load<'_> {
    /// The phases; returns whether the guest runs.
    fn run(&self, incoming: &mut dyn Incoming) -> Result<bool, IncomingError> {
        let state = match &self.loading.uri {
            Uri::File(path) if self.loading.on_demand => {
                let image = Image::open(path, self.loading.base.as_deref())?;
                let ram = self.land(image.header(), image.layout(), incoming)?;
                let (progress, began, threads) = (self.progress, self.began, self.loading.threads);
                return demand::run(demand::Demand { progress, began, threads }, &image, &ram, incoming);
            }
            _ if self.loading.on_demand => {
                let why = "what comes in order cannot be loaded on demand: it takes file:PATH".into();
                return Err(IncomingError::Unfit { why });
            }
            Uri::File(path) => self.load_file(path, incoming)?,
            uri => self.load_in_order(uri, incoming)?,
        };
        self.check()?;
        let Some(guest) = incoming.guest() else {
            incoming.arrived(false);
            return Ok(false);
        };
        self.progress.update(|r| r.status = Status::Device);
        let (state, runs) = split_state(state).ok_or_else(IncomingError::no_run_state)?;
        guest.load_state(&state)?;
        if runs {
            guest.resume()?;
        }
        incoming.arrived(runs);
        Ok(runs)
    }

    fn check(&self) -> Result<(), ArchiveError> {
        if self.progress.is_cancelled() { Err(ArchiveError::Cancelled) } else { Ok(()) }
    }

    /// Has the VMM make memory for the guest.
    fn land(
        &self,
        header: &Header,
        layout: &Layout,
        incoming: &mut dyn Incoming,
    ) -> Result<Arc<dyn GuestRam>, IncomingError> {
        let Header { live, data_bytes, .. } = *header;
        let offer = Offer { layout: layout.clone(), machine: header.machine.clone(), live, data_bytes };
        let ram = incoming.open(&offer).map_err(|why| IncomingError::Unfit { why })?;
        if live != incoming.guest().is_some() {
            let what = if live { "a guest, and not memory alone" } else { "memory alone, and no guest" };
            return Err(IncomingError::Unfit { why: format!("the archive is of {what}") });
        }
        self.progress.update(|r| {
            r.status = Status::Active;
            r.pages.total = layout.pages();
            r.setup_ms = (clock::now() - self.began).as_secs_f64() * 1e3;
        });
        Ok(ram)
    }

    /// Reads everything, in order.
    fn load_in_order(&self, uri: &Uri, incoming: &mut dyn Incoming) -> Result<Vec<StateBlob>, IncomingError> {
        let mut input = OneWayReader::open(uri).map_err(ArchiveError::from)?;
        let go_on = || !self.progress.is_cancelled();
        let mut sequence = Sequence::begin(|_, buffer: &mut [u8]| Ok(input.read_exact(buffer, &go_on)?))?;
        let layout = sequence.start().layout.clone();
        if let Some(base) = &sequence.start().header.base {
            let why = "an archive that stands on another is loaded from a file".into();
            return Err(ArchiveError::Base { name: base.name.clone(), why }.into());
        }
        let ram = self.land(&sequence.start().header, &layout, incoming)?;
        let (filler, loaded) = (Filler::new(ram.clone()), Loaded::default());
        let mut opener = Opener::new()?;
        let mut state = Vec::new();
        loop {
            match sequence.next(&mut opener)? {
                Item::Frame(offset, opened) => {
                    opened.whole(offset, &layout)?;
                    filler.fill(&opened, opened.header.pages())?;
                    loaded.add(&opened);
                }
                Item::State(said) => state = said,
                Item::End(footer) => {
                    self.progress.update(|r| r.pages.hole = layout.pages() - footer.pages);
                    break;
                }
            }
            loaded.report_now_and_then(self.progress, self.began);
        }
        drop(sequence);
        input.finish(&go_on).map_err(ArchiveError::from)?;
        ram.persist()?;
        loaded.report(self.progress, self.began);
        Ok(state)
    }

    /// Reads a file, by several threads.
    fn load_file(&self, path: &Path, incoming: &mut dyn Incoming) -> Result<Vec<StateBlob>, IncomingError> {
        let image = Image::open(path, self.loading.base.as_deref())?;
        let state = image.state()?;
        let ram = self.land(image.header(), image.layout(), incoming)?;
        let footer = *image.archive().footer();
        self.progress.update(|r| {
            r.pages.hole = image.layout().pages() - footer.pages;
            r.streams = self.loading.threads as u16;
        });
        let shared = Shared::new(&image, ram.clone());
        let load = |own: &mut Own, group: usize| {
            self.check()?;
            shared.load(group, own)?;
            shared.loaded.report_now_and_then(self.progress, self.began);
            Ok(())
        };
        let walk = Walk::new(self.loading.threads);
        walk.each::<_, ArchiveError>(shared.groups.len(), || Own::new(&image), load, |_| Ok(()))?;
        ram.persist()?;
        shared.loaded.report(self.progress, self.began);
        Ok(state)
    }
}

/// What a thread needs to load frames.
struct Own {
    opener: Opener,
    base: Option<ChunkReader>,
}

impl Own {
    fn new(image: &Image) -> Result<Self, ArchiveError> {
        let opener = Opener::new().map_err(|source| ArchiveError::Read { offset: 0, source })?;
        Ok(Self { opener, base: image.base().map(Image::reader).transpose()? })
    }
}

/// What the threads share that load a file.
struct Shared<'a> {
    image: &'a Image,
    filler: Filler,
    /// Of each frame, the pages that no later one has.
    newest: Vec<u64>,
    /// The order in which frames are taken: as they lie, but all of a chunk's together.
    order: Vec<u32>,
    /// Where in that order those of the next chunk begin, or a pad.
    groups: Vec<u32>,
    loaded: Loaded,
}

impl<'a> Shared<'a> {
    fn new(image: &'a Image, ram: Arc<dyn GuestRam>) -> Self {
        let archive = image.archive();
        let mut last = HashMap::new();
        for (at, entry) in archive.entries().iter().enumerate() {
            if entry.pages != 0 && image.frames_of(entry.chunk).len() > 1 {
                last.insert(entry.chunk, at);
            }
        }
        let mut order: Vec<u32> = (0..archive.entries().len() as u32).collect();
        if !last.is_empty() {
            order.sort_by_key(|&at| {
                let at = at as usize;
                let entry = &archive.entries()[at];
                last.get(&entry.chunk).copied().filter(|_| entry.pages != 0).unwrap_or(at)
            });
        }
        let key = |at: u32| {
            let entry = &archive.entries()[at as usize];
            (entry.pages != 0).then_some(entry.chunk)
        };
        let begins = |&at: &u32| {
            let (now, before) =
                (key(order[at as usize]), at.checked_sub(1).map(|at| key(order[at as usize])));
            now.is_none() || before != Some(now)
        };
        let groups = (0..order.len() as u32).filter(begins).collect();
        let (filler, newest) = (Filler::new(ram), archive.newest());
        Self { image, filler, newest, order, groups, loaded: Loaded::default() }
    }

    /// Loads the frames of a group, which no other thread has.
    fn load(&self, group: usize, own: &mut Own) -> Result<(), ArchiveError> {
        let start = self.groups[group] as usize;
        let end = self.groups.get(group + 1).map_or(self.order.len(), |&end| end as usize);
        let archive = self.image.archive();
        for &at in &self.order[start..end] {
            let entry = &archive.entries()[at as usize];
            if entry.pages == 0 {
                archive.check_pad(entry, &mut own.opener)?;
                continue;
            }
            let opened = archive.read(entry, &mut own.opener)?;
            opened.whole(entry.offset, self.image.layout())?;
            let newest = self.newest[at as usize];
            self.filler.fill(&opened, newest)?;
            self.loaded.add(&opened);
            let same = opened.same() & newest;
            if let (true, Some(base), Some(reader)) = (same != 0, self.image.base(), &mut own.base) {
                self.fill_same(base, same, &opened, reader)?;
            }
        }
        Ok(())
    }

    /// Fills in pages that are as in the base.
    fn fill_same(
        &self,
        base: &Image,
        same: u64,
        opened: &Opened<'_>,
        reader: &mut ChunkReader,
    ) -> Result<(), ArchiveError> {
        let chunk = opened.header.chunk;
        let content = base.read(chunk, same, reader)?;
        let unlike = content.unlike(same, self.image.archive().hasher(), |bit| opened.seal(bit));
        if unlike != 0 {
            return Err(self.image.damaged(chunk, unlike));
        }
        for bit in bits(content.filled) {
            self.filler.fill_page(chunk, bit, &content.pages[bit as usize])?;
        }
        Ok(())
    }
}
