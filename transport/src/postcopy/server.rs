//! The source of pages that are missing at the destination.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagecopy::backend::GuestRam;
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::choose::{CodecMode, Effort};
use pagecopy::digest::PageHasher;
use pagecopy::layout::Layout;
use pagecopy::postcopy::Order;

use super::missing::runs_of;
use crate::clock;
use crate::source::{Bandwidth, HostShare};
use crate::wire::control::ChunkRun;
use crate::wire::frame::FrameHeader;
use crate::wire::postcopy::PageRequest;

/// How long everything else is held back, at most, while a page that was asked for goes out.
const YIELDS_MAX: u32 = 200;

/// Longest wait for the limit of bandwidth, after which receipts are looked for.
const HELD_BACK: Duration = Duration::from_millis(20);

/// How pages are sent.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Silence after which a connection is given up.
    pub timeout: Duration,
    /// How what nobody asked for is encoded: as the destination can decode it. Deltas are never sent.
    pub codec: CodecMode,
}

/// What was sent so far; all counters only rise.
#[derive(Debug, Default)]
pub struct ServerCounters {
    /// Pages that the guest asked for, or its units.
    pub requests: AtomicU64,
    /// Requests whose pages were under way or delivered already.
    pub under_way: AtomicU64,
    /// Pages by what became of them when they were sent: zeros.
    pub zero: AtomicU64,
    /// Pages in zstd frames.
    pub compressed: AtomicU64,
    /// Pages sent as they are.
    pub raw: AtomicU64,
    /// Bytes written to the connections.
    pub wire: AtomicU64,
    /// Pages that arrived other than they were sent, and were sent again.
    pub mismatches: AtomicU64,
    /// Pages of frames that died with their connection, and were sent again.
    pub taken_back: AtomicU64,
}

/// The memory of a guest that runs elsewhere, shared by all connections that bring it there.
pub struct PageServer {
    pub(super) ram: Arc<dyn GuestRam>,
    pub(super) hasher: PageHasher,
    /// How hard what nobody asked for is compressed.
    pub(super) effort: Arc<Effort>,
    pub(super) options: ServerOptions,
    /// Holds back what nobody asked for.
    pub(super) bandwidth: Bandwidth,
    pub(super) counters: ServerCounters,
    /// Pages that nobody has taken to send them.
    pub(super) pending: PageBitmap,
    /// Pages that are to be sent and read as zero without being looked at, which would allocate them.
    holes: PageBitmap,
    /// The runs of all that was missing.
    runs: Vec<ChunkRun>,
    unit_chunks: u32,
    total: u64,
    /// Pages without a receipt.
    left: AtomicU64,
    order: Mutex<Order>,
    /// Requests that are being answered.
    urgent: AtomicU32,
    stop: AtomicBool,
    /// Something waits again, or it is time to stop.
    changed: (Mutex<()>, Condvar),
}

impl PageServer {
    /// A server of `missing` pages, of which `holes` are never read. `unit_chunks` is what the destination brings in at a time,
    /// from a region's start, or 0: `missing` must be whole units, see [`whole_units`](Self::whole_units).
    pub fn new(
        ram: Arc<dyn GuestRam>,
        hasher: PageHasher,
        missing: PageBitmap,
        holes: PageBitmap,
        unit_chunks: u32,
        options: ServerOptions,
    ) -> Self {
        let total = missing.count();
        Self {
            runs: runs_of(&missing),
            effort: Arc::new(Effort::new(options.codec)),
            ram,
            hasher,
            options,
            bandwidth: Bandwidth::new(None),
            counters: ServerCounters::default(),
            pending: missing,
            holes,
            unit_chunks,
            total,
            left: AtomicU64::new(total),
            order: Mutex::new(Order::new()),
            urgent: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            changed: (Mutex::new(()), Condvar::new()),
        }
    }

    /// One that shares with others what their host has, if that is to be shared. What the guest asks for does not wait for it.
    pub fn sharing(self, host: Option<Arc<HostShare>>) -> Self {
        Self { bandwidth: Bandwidth::new(host), ..self }
    }

    /// Adds to `missing` what belongs to the same units.
    pub fn whole_units(missing: &PageBitmap, layout: &Layout, unit_chunks: u32) {
        if unit_chunks == 0 {
            return;
        }
        for region in 0..layout.regions().len() {
            let chunks = layout.region_chunks(region);
            for first in chunks.clone().step_by(unit_chunks as usize) {
                let unit = first..chunks.end.min(first.saturating_add(unit_chunks));
                if unit.clone().any(|chunk| missing.get(chunk) != 0) {
                    unit.for_each(|chunk| {
                        missing.insert(chunk, layout.valid(chunk));
                    });
                }
            }
        }
    }

    /// What was missing at the start, as [`MissingRuns`](super::MissingRuns) takes it.
    pub fn runs(&self) -> &[ChunkRun] {
        &self.runs
    }

    /// Pages that were missing at the start.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Pages that have no receipt yet.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// The counters.
    pub fn counters(&self) -> &ServerCounters {
        &self.counters
    }

    /// Limits the wire bytes of all connections together to so many a second, from now on; `None` lifts the limit. What the guest asks
    /// for is sent at once all the same, and everything else waits the longer for it.
    pub fn limit_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.bandwidth.set_rate(bytes_per_s);
    }

    /// Tells the connections to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.changed.1.notify_all();
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Pages of a chunk that are not to be looked at.
    pub(super) fn holes(&self, chunk: u32) -> u64 {
        self.holes.get(chunk)
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        // It only proposes: any state of it is right.
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up to `pages_max` pages that nobody asked for, of one chunk.
    pub(super) fn take_next(&self, pages_max: u32) -> Option<(u32, u64)> {
        let mut order = self.order();
        loop {
            let chunk = order.next(&self.pending)?;
            let waiting = self.pending.get(chunk);
            let wanted = bits(waiting).take(pages_max as usize).fold(0, |pages, bit| pages | 1u64 << bit);
            // Somebody who asked for one may have been faster.
            let taken = self.pending.remove(chunk, wanted);
            if taken != 0 {
                return Some((chunk, taken));
            }
        }
    }

    /// Takes what was asked for, as far as nobody else has, with what belongs to its unit.
    pub(super) fn take_requested(&self, request: PageRequest) -> Vec<(u32, u64)> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.order().fault(request.chunk);
        let taken: Vec<_> = if self.unit_chunks == 0 {
            vec![(request.chunk, self.pending.remove(request.chunk, request.pages))]
        } else {
            self.unit_of(request.chunk).map(|chunk| (chunk, self.pending.take(chunk))).collect()
        };
        let taken: Vec<_> = taken.into_iter().filter(|&(_, pages)| pages != 0).collect();
        if taken.is_empty() {
            self.counters.under_way.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    fn unit_of(&self, chunk: u32) -> std::ops::Range<u32> {
        let layout = self.ram.layout();
        let region = layout.locate(chunk).expect("a request was checked by the layout").region;
        let chunks = layout.region_chunks(region);
        let first = chunk - (chunk - chunks.start) % self.unit_chunks;
        first..chunks.end.min(first + self.unit_chunks)
    }

    /// Pages that were taken and have not arrived, or not as they were sent, wait again, and go next.
    pub(super) fn give_back(&self, chunk: u32, pages: u64) {
        self.pending.insert(chunk, pages);
        self.order().fault(chunk);
        self.changed.1.notify_all();
    }

    /// So many pages have arrived.
    pub(super) fn receipted(&self, pages: u32) {
        let before = self.left.fetch_sub(pages.into(), Ordering::AcqRel);
        assert!(before >= pages.into(), "a page is receipted once");
    }

    /// A frame is about to be sent.
    pub(super) fn sends(&self, header: &FrameHeader, wire_bytes: u64) {
        self.bandwidth.spend(wire_bytes);
        let c = &self.counters;
        for (counter, pages) in [(&c.zero, header.zero), (&c.compressed, header.zstd), (&c.raw, header.raw)] {
            counter.fetch_add(pages.count_ones().into(), Ordering::Relaxed);
        }
    }

    /// A request is being answered until what is returned is dropped.
    pub(super) fn answering(&self) -> Answering<'_> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        Answering(self)
    }

    /// Lets requests that are being answered go first.
    pub(super) fn give_way(&self) {
        let mut yields = 0;
        while self.urgent.load(Ordering::Relaxed) != 0 && yields < YIELDS_MAX {
            std::thread::yield_now();
            yields += 1;
        }
    }

    /// Waits until the limit of bandwidth lets a frame go that nobody asked for, for a moment at most; returns whether one may.
    pub(super) fn wait_bandwidth(&self) -> bool {
        let until = clock::now() + HELD_BACK;
        self.bandwidth.is_open() || {
            self.bandwidth.wait(|| self.stopped() || clock::now() >= until);
            self.bandwidth.is_open()
        }
    }

    /// Waits until something waits again, at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) {
        let guard = self.changed.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Spurious or early wake-ups only cost the caller one more look.
        drop(self.changed.1.wait_timeout(guard, timeout));
    }
}

/// A request is being answered.
pub(super) struct Answering<'a>(&'a PageServer);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.urgent.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use pagecopy::layout::{CHUNK_SIZE, Region};

    use super::*;

    #[test]
    fn units_are_counted_from_their_regions_start() {
        let region = |name: &str, gpa, chunks| Region::new(name, gpa, chunks * CHUNK_SIZE as u64);
        let layout = Layout::new(vec![region("a", 0, 3), region("b", 1 << 32, 4)]).unwrap();
        let missing = PageBitmap::new(7);
        missing.insert(2, 1);
        missing.insert(6, 4);
        PageServer::whole_units(&missing, &layout, 2);
        // Chunk 2 is half a unit, at its region's end; 5 and 6 the second one of the other region.
        let all = |chunk| (chunk, u64::MAX);
        assert_eq!(missing.iter().collect::<Vec<_>>(), [all(2), all(5), all(6)]);
    }
}
