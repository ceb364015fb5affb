//! What a VMM implements so that its guest can migrate: memory, the dirty log, and control of the guest.
//!
//! Three traits, because a static file has only the first, memory without KVM the first two, and a VM all three. `vmm_shim` has
//! them ready for vm-memory, for KVM, and for memory that this process writes; so mostly a VMM writes [`Guest`] and no other.
//!
//! | trait | at the source | at the destination |
//! |---|---|---|
//! | [`GuestRam`] | what is read and sent | what is filled |
//! | [`DirtyLog`] | what was written meanwhile | none |
//! | [`Guest`] | is paused, and says its state | takes the state, and runs |
//!
//! Guest memory is never handed out by reference: it is a [`VolatileSlice`](vm_memory::VolatileSlice) (rust-vmm `vm-memory`, which is
//! re-exported), because vCPUs write it at any time.
//!
//! Every method says when it is called, what it must do, and what an error means. All are called by threads of the engine, never by two
//! of them at once for the same guest or log unless it says so. What a VMM may lack, it says by `None` or by a default: nothing has to
//! be answered that is not so.
//!
//! A guest of one counter, whose memory is a vector of pages:
//!
//! ```
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use pagecopy::backend::{BackendError, Guest, StateBlob, StateSink};
//!
//! #[derive(Default)]
//! struct Counter(AtomicU64);
//!
//! impl Guest for Counter {
//!     fn pause(&self) -> Result<(), BackendError> {
//!         Ok(()) // it has no vCPUs
//!     }
//!     fn resume(&self) -> Result<(), BackendError> {
//!         Ok(())
//!     }
//!     fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
//!         out.piece("counter", 1, &self.0.load(Ordering::SeqCst).to_le_bytes())
//!     }
//!     fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError> {
//!         let [blob] = state else { return Err(BackendError::invalid("the state is one piece")) };
//!         let bytes = blob.bytes[..].try_into().map_err(|e| BackendError::new("read the counter", e))?;
//!         self.0.store(u64::from_le_bytes(bytes), Ordering::SeqCst);
//!         Ok(())
//!     }
//! }
//!
//! let (source, destination) = (Counter::default(), Counter::default());
//! source.0.store(7, Ordering::SeqCst);
//! destination.load_state(&StateBlob::all_of(&source)?)?;
//! assert_eq!(destination.0.load(Ordering::SeqCst), 7);
//! # Ok::<(), BackendError>(())
//! ```

mod error;
mod fault;
mod guard;
mod guest;
mod log;
mod ram;

pub use error::BackendError;
pub use fault::Fault;
pub use guard::GuardedPages;
pub use guest::{Guest, PAUSE_PATIENCE, Rehearsal, StateBlob, StateSink, Throttle};
pub use log::{ContentLog, DirtyLog, StaticLog};
pub use ram::{Claim, GuestRam, MissingPages, Placer, Room, Unclaimed};
