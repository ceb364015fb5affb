//! The memory of a guest that runs and misses pages: who waits for which, and what has come.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagecopy::backend::{BackendError, Fault, GuestRam, MissingPages};
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::digest::PageHasher;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::postcopy::Latencies;
use pagecopy::xbzrle::Page;

use super::channel::{Channel, send_bytes};
use super::lane::FAULTS;
use crate::clock;
use crate::sys::{self, Soon};
use crate::wire::control::{Arrived, capability};
use crate::wire::frame::FrameHeader;
use crate::wire::postcopy::PageRequest;

/// How often a thread that waits looks whether it should stop.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// How it stands with a guest that misses pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SinkStatistics {
    /// Pages that were missing at the start.
    pub total: u64,
    /// Pages that still are.
    pub left: u64,
    /// Waits of threads that have ended.
    pub faults: u64,
    /// Threads that wait now.
    pub waiting: usize,
    /// Microseconds that half of the waits did not exceed.
    pub p50_us: u64,
    /// Microseconds that all but one in a hundred did not exceed.
    pub p99_us: u64,
    /// The longest wait, in microseconds.
    pub max_us: u64,
    /// Microseconds that each thread has waited, in the order of the threads' numbers.
    pub blocked_us: Vec<u64>,
    /// Bytes that were read from the connections.
    pub wire_bytes: u64,
    /// Pages that were missing, by how they came: zeros.
    pub zero: u64,
    /// In zstd frames.
    pub compressed: u64,
    /// As they are.
    pub raw: u64,
    /// Pages that came other than they were sent, and were not placed.
    pub damaged: u64,
}

/// The guest's memory. One thread tells it of faults ([`serve_faults`](Self::serve_faults)), one a connection brings pages
/// ([`receive`](Self::receive)).
pub struct MissingSink {
    pub(super) ram: Arc<dyn GuestRam>,
    pub(super) hasher: PageHasher,
    /// Silence after which the rest of a frame is given up.
    pub(super) timeout: Duration,
    /// Encoded pages were agreed on.
    pub(super) encoded: bool,
    memory: Box<dyn MissingPages>,
    missing: PageBitmap,
    unit_chunks: u32,
    total: u64,
    left: AtomicU64,
    waits: Mutex<Waits>,
    /// The connection that requests go out on, one at a time.
    requests: Mutex<Option<Arc<dyn Channel>>>,
    wire: AtomicU64,
    /// Pages that were missing, by how they came.
    came: Came,
    pub(super) damaged: AtomicU64,
    stop: AtomicBool,
}

/// Pages by how they came.
#[derive(Default)]
struct Came {
    zero: AtomicU64,
    compressed: AtomicU64,
    raw: AtomicU64,
}

/// Who waits.
#[derive(Default)]
pub(super) struct Waits {
    /// Chunk and page of the fault; thread and since when, by the clock.
    pub(super) pages: BTreeMap<(u32, u32), Vec<(u32, Duration)>>,
    latencies: Latencies,
    threads: HashMap<u32, Duration>,
}

impl MissingSink {
    /// Takes `missing` pages away from the memory, so that whoever touches one waits. `capabilities` is what both sides agreed on.
    pub fn new(
        ram: Arc<dyn GuestRam>,
        hasher: PageHasher,
        missing: PageBitmap,
        capabilities: u64,
        timeout: Duration,
    ) -> Result<Self, BackendError> {
        let unit_chunks = ram.missing_unit()?;
        let memory = ram.clone().miss(&missing)?;
        let total = missing.count();
        Ok(Self {
            ram,
            hasher,
            timeout,
            encoded: capabilities & capability::SEALED == capability::SEALED,
            memory,
            missing,
            unit_chunks,
            total,
            left: AtomicU64::new(total),
            waits: Mutex::new(Waits::default()),
            requests: Mutex::new(None),
            wire: AtomicU64::new(0),
            came: Came::default(),
            damaged: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }

    /// Pages that are missing.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// Nothing is missing: nobody is stopped any more who touches this memory, also while the threads end.
    pub fn end(&self) -> Result<(), BackendError> {
        self.memory.end()
    }

    /// Tells the threads to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What the source is told in the end.
    pub fn arrived(&self) -> Arrived {
        let s = self.statistics();
        let blocked_us = s.blocked_us.iter().sum();
        Arrived { pages: self.total, faults: s.faults, p50_us: s.p50_us, p99_us: s.p99_us, blocked_us }
    }

    /// How it stands.
    pub fn statistics(&self) -> SinkStatistics {
        let waits = self.waits();
        let mut threads: BTreeMap<u32, Duration> =
            waits.threads.iter().map(|(&id, &time)| (id, time)).collect();
        for &(thread, since) in waits.pages.values().flatten() {
            *threads.entry(thread).or_default() += clock::now() - since;
        }
        SinkStatistics {
            total: self.total,
            left: self.left(),
            faults: waits.latencies.count(),
            waiting: waits.pages.values().map(Vec::len).sum(),
            p50_us: waits.latencies.quantile(50.0),
            p99_us: waits.latencies.quantile(99.0),
            max_us: waits.latencies.max(),
            blocked_us: threads.values().map(|time| micros(*time)).collect(),
            wire_bytes: self.wire.load(Ordering::Relaxed),
            zero: self.came.zero.load(Ordering::Relaxed),
            compressed: self.came.compressed.load(Ordering::Relaxed),
            raw: self.came.raw.load(Ordering::Relaxed),
            damaged: self.damaged.load(Ordering::Relaxed),
        }
    }

    pub(super) fn waits(&self) -> MutexGuard<'_, Waits> {
        // A thread that panicked left at worst a wait that is counted and over.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn writer(&self) -> MutexGuard<'_, Option<Arc<dyn Channel>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for pages that somebody touches, until [`stop`](Self::stop). Blocks.
    pub fn serve_faults(&self) -> Result<(), BackendError> {
        sys::run_soon(Soon::Urgent);
        let mut faults = Vec::new();
        while !self.stopped() {
            self.serve(&mut faults, TICK)?;
        }
        Ok(())
    }

    /// Asks for pages that somebody touches, or waits for that, at most `limit`.
    pub(super) fn serve(&self, faults: &mut Vec<Fault>, limit: Duration) -> Result<(), BackendError> {
        faults.clear();
        self.memory.wait(faults, limit)?;
        let now = clock::now();
        faults.iter().try_for_each(|&fault| self.on_fault(fault, now))
    }

    fn on_fault(&self, fault: Fault, now: Duration) -> Result<(), BackendError> {
        let mut waits = self.waits();
        if !self.is_missing(fault) {
            drop(waits);
            return self.memory.settle(fault);
        }
        let waiting = waits.pages.entry((fault.chunk, fault.page)).or_default();
        let asked = !waiting.is_empty();
        // Whoever was interrupted while he waited comes again.
        if !waiting.iter().any(|&(thread, _)| thread == fault.thread) {
            waiting.push((fault.thread, now));
        }
        drop(waits);
        if !asked {
            self.request(fault.chunk, fault.page);
        }
        Ok(())
    }

    fn is_missing(&self, fault: Fault) -> bool {
        if self.unit_chunks == 0 {
            self.missing.get(fault.chunk) >> fault.page & 1 != 0
        } else {
            self.unit_is_missing(fault.chunk)
        }
    }

    /// Whether a page is missing of the unit that starts at a chunk.
    fn unit_is_missing(&self, first: u32) -> bool {
        (first..self.missing.chunks().min(first + self.unit_chunks)).any(|chunk| self.missing.get(chunk) != 0)
    }

    /// Sends a request. Where there is no connection for it, the next one begins with it.
    pub(super) fn request(&self, chunk: u32, page: u32) {
        let request = PageRequest { chunk, pages: 1 << page }.encode(&self.hasher);
        if let Some(connection) = &*self.writer()
            && send_bytes(&**connection, &request).is_err()
        {
            // Its worker notices, and the source opens another.
            connection.shutdown();
        }
    }

    /// Sends a receipt; between requests where these share the connection.
    pub(super) fn send_receipt(
        &self,
        connection: &dyn Channel,
        stream: u16,
        receipt: &[u8],
    ) -> std::io::Result<()> {
        let _turn = (stream == FAULTS).then(|| self.writer());
        send_bytes(connection, receipt)
    }

    pub(super) fn count_wire(&self, bytes: usize) {
        self.wire.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Places what is still missing of a frame's pages, of which `raw` and `compressed` are those that are not zeros. Lets go on who
    /// waited for them.
    pub(super) fn place(
        &self,
        header: &FrameHeader,
        raw: &[u8],
        compressed: &[Page],
    ) -> Result<(), BackendError> {
        let chunk = header.chunk;
        let missing = self.missing.get(chunk);
        for (pages, bytes) in [(header.raw, raw), (header.zstd, compressed.as_flattened())] {
            for (first, count) in runs(pages & missing) {
                let before = (pages & ((1u64 << first) - 1)).count_ones() as usize * PAGE_SIZE;
                self.memory.place(chunk, first, &bytes[before..before + count as usize * PAGE_SIZE])?;
            }
        }
        for (first, count) in runs(header.zero & missing) {
            self.memory.place_zeros(chunk, first, count)?;
        }
        let mut waits = self.waits();
        let came = self.missing.remove(chunk, header.pages());
        let c = &self.came;
        for (counter, pages) in [(&c.zero, header.zero), (&c.compressed, header.zstd), (&c.raw, header.raw)] {
            counter.fetch_add((pages & came).count_ones().into(), Ordering::Relaxed);
        }
        self.left.fetch_sub(came.count_ones().into(), Ordering::AcqRel);
        if !waits.pages.is_empty() {
            self.end_waits(&mut waits, chunk, came);
        }
        Ok(())
    }

    /// Those who waited for these pages go on.
    fn end_waits(&self, waits: &mut Waits, chunk: u32, came: u64) {
        let over: Vec<_> = if self.unit_chunks == 0 {
            let of_chunk = waits.pages.range((chunk, 0)..=(chunk, 63));
            of_chunk.map(|(&key, _)| key).filter(|(_, page)| came >> page & 1 != 0).collect()
        } else {
            let first = chunk.saturating_sub(self.unit_chunks - 1);
            let near = waits.pages.range((first, 0)..=(chunk, 63)).map(|(&key, _)| key);
            near.filter(|&(first, _)| !self.unit_is_missing(first)).collect()
        };
        for key in over {
            for (thread, since) in waits.pages.remove(&key).unwrap_or_default() {
                let waited = clock::now() - since;
                waits.latencies.record(micros(waited));
                *waits.threads.entry(thread).or_default() += waited;
            }
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
