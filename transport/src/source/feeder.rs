//! Gives pending chunks to the stream workers, pass after pass.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{Receiver, SendTimeoutError, Sender, bounded};

use pagecopy::backend::BackendError;

use super::contents::{Compared, Comparing};
use super::{Batch, PageSource};

/// Batches that may wait for a worker: few, so that a chunk is taken late and with its newest content.
const WAITING_MAX: usize = 4;
/// A pass with little to send is cut into at least so many batches for each stream, so that none goes without and they end together.
const BATCHES_PER_STREAM: u64 = 4;
/// Batches of fewer pages are not worth their calls.
const BATCH_PAGES_MIN: u64 = 64;
/// Longest wait before the caller's conditions are looked at again.
const TICK: Duration = Duration::from_millis(20);

/// How whoever feeds waits for the workers; by blocking its thread, unless it says otherwise.
pub(crate) trait Waits {
    /// Batches of fewer pages are not worth their calls.
    fn batch_pages_min(&self) -> u64 {
        BATCH_PAGES_MIN
    }

    /// Hands a batch to a worker; gives it back when none has taken it within `limit`.
    async fn offer(&self, work: &Sender<Batch>, batch: Batch, limit: Duration) -> Option<Batch> {
        work.send_timeout(batch, limit).err().map(SendTimeoutError::into_inner)
    }

    /// Waits until pages were receipted or became pending again, or a stream ended, at most `limit`.
    async fn progress(&self, source: &PageSource, limit: Duration) {
        source.wait_progress(limit);
    }
}

/// The one thread that feeds a session's workers owns this; dropping it ends the streams in order. Batches that no worker has taken by
/// then go back with it: their pages are still pending.
pub struct Feeder {
    source: Arc<PageSource>,
    work: Sender<Batch>,
    taken: Receiver<Batch>,
    streams: u64,
}

impl Feeder {
    /// A feeder for the workers of `source`, which are about so many.
    pub fn new(source: Arc<PageSource>, streams: u16) -> Self {
        let (work, taken) = bounded(WAITING_MAX);
        Self { source, work, taken, streams: streams.max(1).into() }
    }

    /// The end of the channel that workers take from.
    pub fn work(&self) -> Receiver<Batch> {
        self.taken.clone()
    }

    /// Gives out every chunk that is pending now or becomes so while the pass goes over it. `go_on` is asked now and then and
    /// ends the pass by its error.
    pub(crate) async fn pass<E>(
        &self,
        waits: &impl Waits,
        mut go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let share = self.source.pending.count() / (self.streams * BATCHES_PER_STREAM);
        let mut chunk = 0;
        while let Some(span) = self.source.next_batch(chunk, share.max(waits.batch_pages_min())) {
            chunk = span.first + span.count;
            let mut batch = Batch::new(&self.source, span);
            loop {
                go_on()?;
                match waits.offer(&self.work, batch, TICK).await {
                    None => break,
                    Some(back) => batch = back,
                }
            }
        }
        Ok(())
    }

    /// Passes until nothing is pending and nothing under way: every page that was dirty is delivered and receipted.
    pub(crate) async fn settle<E>(
        &self,
        waits: &impl Waits,
        go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        self.pass_until(waits, PageSource::is_settled, go_on).await
    }

    /// Passes until nothing is pending: every page that was dirty is on its way, and none of those is in doubt.
    pub(crate) async fn send_out<E>(
        &self,
        waits: &impl Waits,
        go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        self.pass_until(waits, PageSource::is_sent, go_on).await
    }

    async fn pass_until<E>(
        &self,
        waits: &impl Waits,
        is_done: fn(&PageSource) -> bool,
        mut go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        while !is_done(&self.source) {
            go_on()?;
            self.pass(waits, &mut go_on).await?;
            // Chunks that belong to a stream with frames under way stayed pending; a receipt frees them.
            waits.progress(&self.source, Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Adds what was written to the pending pages, as [`PageSource::dirty_sync`] does, while the guest stands still: what a comparison
    /// finds is given out meanwhile. Returns how many pages there were.
    pub(crate) async fn sync<E: From<BackendError>>(
        &self,
        waits: &impl Waits,
        go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<u64, E> {
        let noted = self.source.sync_log()?;
        if !self.source.compared() {
            return Ok(noted);
        }
        Ok(noted + self.compare(waits, go_on).await?.pages)
    }

    /// Compares all memory with what was sent of it, and gives out what is found meanwhile. What a stream has taken just then, and not
    /// read yet, is found too, and leaves twice.
    async fn compare<E: From<BackendError>>(
        &self,
        waits: &impl Waits,
        mut go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<Compared, E> {
        let comparing = Comparing::begin(&self.source);
        while !comparing.is_over() {
            go_on()?;
            self.pass(waits, &mut go_on).await?;
            waits.progress(&self.source, Duration::from_millis(1)).await;
        }
        Ok(comparing.end()?)
    }

    /// Waits until at most `bytes` page bytes are under way, so that the next dirty sync finds a round's work done but the
    /// streams not yet idle.
    pub(crate) async fn drain_to<E>(
        &self,
        waits: &impl Waits,
        bytes: u64,
        mut go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        while self.source.counters.logical_under_way.load(Ordering::Acquire) > bytes
            || self.source.outstanding.load(Ordering::Acquire) > 1
        {
            go_on()?;
            waits.progress(&self.source, TICK).await;
        }
        Ok(())
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        // None are left where everything was delivered; some where the streams are dead.
        while self.taken.try_recv().is_ok() {}
    }
}
