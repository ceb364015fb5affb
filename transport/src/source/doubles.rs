//! Memory, and something to send it to, for tests of streams without a destination.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::choose::CodecMode;
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, Layout};

use super::flight::StreamState;
use super::window::Window;
use super::{PageSource, SourceOptions};
use crate::carrier::{Breaker, FrameSender, WINDOW_BYTES_MIN};
use crate::guest_memory::Memory;
use crate::sys::SendList;

/// The log of memory that may be written.
pub(super) struct Written;

impl DirtyLog for Written {
    fn name(&self) -> &str {
        "double"
    }
    fn start(&self) -> Result<(), BackendError> {
        Ok(())
    }
    fn sync(&self, _dirty: &PageBitmap) -> Result<u64, BackendError> {
        Ok(0)
    }
    fn clear(&self, _first: u32, _pages: &[u64]) -> Result<(), BackendError> {
        Ok(())
    }
    fn stop(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// So many chunks that wait to be sent raw over one stream, the pages of each with a content of their own.
pub(super) fn source(chunks: u32, log: Arc<dyn DirtyLog>) -> PageSource {
    let memory = Memory::new(Layout::flat(u64::from(chunks) * CHUNK_SIZE as u64).unwrap());
    let pending = PageBitmap::new(chunks);
    for chunk in 0..chunks {
        pending.insert(chunk, u64::MAX);
        (0..64).for_each(|bit| memory.write(chunk, bit, &[chunk as u8 + 1; 4096]));
    }
    PageSource::new(Arc::new(memory), log, PageHasher::new(1), options(), pending)
}

/// Raw pages over one stream.
pub(super) fn options() -> SourceOptions {
    SourceOptions {
        streams: 1,
        references: false,
        codec: CodecMode::Raw,
        cache_bytes: 0,
        timeout: Duration::from_secs(60),
        mismatches_max: 0,
    }
}

/// A stream of it, with room for all that is sent.
pub(super) fn stream(source: &Arc<PageSource>, sink: &Sink) -> StreamState {
    StreamState::new(source.clone(), 0, Arc::new(sink.clone()), Window::new(WINDOW_BYTES_MIN << 10, 1, true))
}

/// Takes whatever is sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    pub(super) fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap()
    }
}

impl Breaker for Sink {
    fn shutdown(&self) {}
}

impl FrameSender for Sink {
    fn send(&mut self, mut list: SendList<'_>) -> io::Result<u64> {
        let bytes = list.drain();
        self.bytes().extend_from_slice(&bytes);
        Ok(bytes.len() as u64)
    }
}
