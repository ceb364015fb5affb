//! The destination's data plane: stream workers that validate, apply and receipt frames.

mod base;
mod older;
mod receiver;
#[cfg(test)]
pub(crate) mod stepped;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use pagecopy::backend::{GuestRam, Placer};
use pagecopy::bitmap::PageBitmap;
use pagecopy::chunk::Reference;
use pagecopy::digest::PageHasher;
use pagecopy::xbzrle::Page;

pub(crate) use older::{BaseCopy, BaseReader};
pub use receiver::{ReceiveError, receive_stream};

use crate::carrier::Landing;
use crate::spent::Spent;

/// What arrived so far; all counters only rise.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes read from the streams.
    pub wire: AtomicU64,
    /// Page bytes applied.
    pub logical: AtomicU64,
    /// Pages by how they came.
    pub raw: AtomicU64,
    /// Pages of zeros.
    pub zero: AtomicU64,
    /// Pages that came as deltas.
    pub delta: AtomicU64,
    /// Pages that came in zstd frames.
    pub compressed: AtomicU64,
    /// Pages that were taken from the base.
    pub same: AtomicU64,
    /// Pages that were to be, and could not be read, or were not what was said of them.
    pub same_lacking: AtomicU64,
    /// Bytes of memory that were brought in ahead of their content.
    pub populated: AtomicU64,
    /// Where the time of the threads went.
    pub spent: Spent,
}

/// The memory of a guest on its way in, shared by all stream workers of a session.
///
/// Its memory must be fresh: all zeros. A page that no frame ever carried is a hole at the source, and stays one here.
pub struct PageSink {
    ram: Arc<dyn GuestRam>,
    /// Fills fresh pages, once [`Self::begin_placing`] was called and where the memory has that.
    placer: Mutex<Option<Arc<dyn Placer>>>,
    /// Pages whose memory was brought in ahead of their content.
    there: PageBitmap,
    /// Pages whose memory is about to be brought in.
    coming: PageBitmap,
    /// Told when some of them are there.
    came: (Mutex<()>, Condvar),
    hasher: PageHasher,
    /// An older copy of the guest.
    base: Option<Arc<dyn BaseCopy>>,
    capabilities: u64,
    timeout: Duration,
    /// Pages that may hold something other than zeros.
    touched: PageBitmap,
    carried: PageBitmap,
    received: Received,
    stop: AtomicBool,
}

impl PageSink {
    /// A sink over fresh memory. `capabilities` is what both sides agreed on: other encodings are refused.
    pub fn new(ram: Arc<dyn GuestRam>, hasher: PageHasher, capabilities: u64, timeout: Duration) -> Self {
        let chunks = ram.layout().chunks();
        Self {
            touched: PageBitmap::new(chunks),
            carried: PageBitmap::new(chunks),
            received: Received::default(),
            stop: AtomicBool::new(false),
            placer: Mutex::new(None),
            there: PageBitmap::new(chunks),
            coming: PageBitmap::new(chunks),
            came: (Mutex::new(()), Condvar::new()),
            ram,
            hasher,
            base: None,
            capabilities,
            timeout,
        }
    }

    /// One that may take pages from an older copy of the guest.
    pub(crate) fn with_base(self, base: Option<Arc<dyn BaseCopy>>) -> Self {
        Self { base, ..self }
    }

    /// That copy.
    pub(crate) fn base(&self) -> Option<&Arc<dyn BaseCopy>> {
        self.base.as_ref()
    }

    /// The counters.
    pub fn received(&self) -> &Received {
        &self.received
    }

    /// Distinct pages that frames carried.
    pub fn carried_pages(&self) -> u64 {
        self.carried.count()
    }

    /// The same without pages that are still to come.
    pub fn carried_pages_without(&self, missing: &PageBitmap) -> u64 {
        self.carried.count_outside(missing)
    }

    /// What both sides agreed on.
    pub fn capabilities(&self) -> u64 {
        self.capabilities
    }

    /// Silence after which the rest of a frame is given up.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Copies pages that a frame refers to; false when they are not all pages that were sent and hold something.
    fn refer(&self, reference: Reference, pages: &mut [Page]) -> bool {
        let Reference { chunk, pages: mask } = reference;
        // Memory that no frame has filled must not be read: it may be a hole, which has to be fetched before it can be.
        if chunk >= self.ram.layout().chunks()
            || mask & !(self.carried.get(chunk) & self.touched.get(chunk)) != 0
        {
            return false;
        }
        reference.copy(&self.ram.chunk(chunk), pages);
        true
    }

    /// Tells the workers to stop between frames.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.came.1.notify_all();
    }

    /// Brings fresh chunks in as large pages, ahead of what comes for them. What cannot be had as such comes in as its content does.
    /// Before [`Self::begin_placing`].
    pub fn enlarge(&self, first: u32, count: u32) {
        if self.ram.enlarge(first, count) {
            for chunk in first..first + count {
                self.there.insert(chunk, self.ram.layout().valid(chunk));
            }
        }
        self.end_waiting(first..first + count);
    }

    /// These chunks are about to be [enlarged](Self::enlarge): whoever has something for them waits.
    pub fn announce(&self, chunks: Range<u32>) {
        for chunk in chunks {
            self.coming.insert(chunk, self.ram.layout().valid(chunk));
        }
    }

    /// Nobody needs to wait for these chunks any more.
    fn end_waiting(&self, chunks: Range<u32>) {
        for chunk in chunks {
            self.coming.take(chunk);
        }
        // Who looked before waits by now.
        drop(self.came.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.came.1.notify_all();
    }

    /// Waits until a chunk is there that was announced: small pages in its place cost three times as much, and would be thrown away.
    fn await_announced(&self, chunk: u32) {
        /// For a whole run of chunks, however slow the host. Nobody brings in what takes longer.
        const LIMIT: Duration = Duration::from_secs(1);
        if self.coming.get(chunk) == 0 {
            return;
        }
        let guard = self.came.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |_: &mut ()| self.coming.get(chunk) != 0 && !self.stopped();
        let waited = self.came.1.wait_timeout_while(guard, LIMIT, waits);
        let (guard, result) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(guard);
        if result.timed_out() {
            self.end_waiting(0..self.ram.layout().chunks());
        }
    }

    /// No memory is enlarged any more. From here on fresh pages are placed, where the memory has that.
    pub fn begin_placing(&self) {
        self.end_waiting(0..self.ram.layout().chunks());
        *self.placing() = self.ram.clone().placer().map(Arc::from);
    }

    /// All pages are here: memory goes to its guest as it was before, in nobody's hands but its own. Workers have ended.
    pub fn end_placing(&self) {
        self.placing().take();
    }

    fn placing(&self) -> std::sync::MutexGuard<'_, Option<Arc<dyn Placer>>> {
        self.placer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Landing for PageSink {
    fn ram(&self) -> &Arc<dyn GuestRam> {
        &self.ram
    }

    fn hasher(&self) -> &PageHasher {
        &self.hasher
    }

    fn bring_in(&self, chunk: u32) -> io::Result<()> {
        let fresh = self.ram.layout().valid(chunk) & !self.touched.get(chunk) & !self.there.get(chunk);
        if fresh == 0 {
            return Ok(());
        }
        self.ram.bring_in(chunk, fresh).map_err(|error| {
            let kind = error.io().map_or(io::ErrorKind::Other, io::Error::kind);
            io::Error::new(kind, format!("{error}: {}", error.source))
        })
    }

    fn touch(&self, chunk: u32) {
        self.touched.insert(chunk, self.ram.layout().valid(chunk));
    }
}

#[cfg(test)]
mod tests {
    use pagecopy::layout::{CHUNK_SIZE, Layout};

    use super::*;
    use crate::nowhere::Nowhere;

    #[test]
    fn what_is_announced_is_waited_for_and_not_for_ever() {
        let ram = Arc::new(Nowhere(Layout::flat(16 * CHUNK_SIZE as u64).unwrap()));
        let sink = PageSink::new(ram, PageHasher::new(1), 0, Duration::from_secs(1));
        let announced = |chunk| sink.coming.get(chunk) != 0;
        sink.await_announced(0);
        sink.announce(0..8);
        // Who waits goes on when it is there, and not before; nobody's patience has ended, which would end it for all.
        let there = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                sink.await_announced(3);
                there.load(Ordering::Acquire)
            });
            // Time to go on too early in.
            std::thread::sleep(Duration::from_millis(20));
            there.store(true, Ordering::Release);
            sink.enlarge(0, 4);
            assert!(waiting.join().unwrap(), "it went on before the chunk was there");
        });
        assert!(!announced(3) && announced(5), "the wait has ended by itself");
        // Nobody brings in the others: the first to wait finds out, for all.
        sink.await_announced(5);
        assert!((0..16).all(|chunk| !announced(chunk)));
        sink.announce(8..16);
        sink.begin_placing();
        assert!(!announced(9));
        sink.announce(8..16);
        sink.stop();
        sink.await_announced(9);
        assert!(announced(9), "the wait has ended by itself, and not because all is over");
    }
}
