//! Guest memory that is kept as it was at one moment, while its guest runs on.

use std::time::Duration;

use super::{BackendError, Fault};

/// Memory whose pages still have the content of one moment, while its guest may run: who is about to write one waits until it was
/// copied. Reading waits for nothing. When it is dropped, nobody waits any more.
///
/// What it cannot stop is a page that is taken away, and who writes through another mapping of the same memory: see
/// [`GuestRam::guard`](super::GuestRam::guard).
///
/// An error of any method means that the copy cannot be completed. The guest has lost nothing: it runs on once this is dropped.
pub trait GuardedPages: Send + Sync {
    /// *When*: by one thread, in a loop, from before the guest runs until [`end`](Self::end).
    /// *Must*: wait until somebody is about to write a guarded page, at most `timeout`; add who waits for what to `faults`, one for each
    /// chunk that has to be copied before he goes on. A fault may tell of pages that were released meanwhile, and nobody waits then. It
    /// may return early and add nothing: whoever was stopped though nothing has to be copied for him, because more is protected than
    /// guarded, goes on without a word.
    fn wait(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), BackendError>;

    /// *When*: by several threads at once, each for chunks of its own, after these pages of a chunk were copied.
    /// *Must*: let whoever waits to write one of them go on, and stop nobody there any more for longer than until somebody
    /// [waits](Self::wait). Memory that comes apart only in pieces of more than a chunk is released when all of a piece was. Pages that are
    /// not guarded, or were released before, are left as they are. After [`end`](Self::end) this does nothing.
    fn release(&self, chunk: u32, pages: u64) -> Result<(), BackendError>;

    /// *When*: when all was copied, or the copy is given up; by any thread.
    /// *Must*: stop nobody from here on, and let whoever waits go on.
    fn end(&self) -> Result<(), BackendError>;
}
