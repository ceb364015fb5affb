//! A guest on its way in, as its VMM has it: what is offered, where it lands, and the handle of the session.

use std::error::Error;
use std::fmt;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;

use pagecopy::backend::{Guest, GuestRam};
use pagecopy::layout::Layout;

use super::{Arrival, Incoming, IncomingError};
use crate::engine::awaited::Ending;
use crate::engine::explain;
use crate::engine::progress::Progress;
use crate::engine::report::Status;
use crate::local::guarded;

/// Why a guest is refused; its text is told to the source.
pub type Refused = Box<dyn Error + Send + Sync>;

/// What a source brings.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Offer {
    /// The regions of its memory.
    pub layout: Layout,
    /// What it says of its machine; any text, since nobody has checked who it is.
    pub machine: String,
    /// A running guest, and not memory alone.
    pub live: bool,
    /// Bytes of its memory that hold data.
    pub data_bytes: u64,
}

/// Where a guest comes to.
pub struct Landing<V = ()> {
    ram: Arc<dyn GuestRam>,
    guest: Option<Arc<dyn Guest>>,
    arrived: Option<Box<dyn FnOnce(bool) + Send>>,
    vm: V,
}

impl Landing {
    /// Memory alone, all zeros, of the offered layout.
    pub fn memory(ram: Arc<dyn GuestRam>) -> Self {
        Self { ram, guest: None, arrived: None, vm: () }
    }

    /// Memory, all zeros, of the offered layout, and the VM that has it, which has not run yet.
    pub fn guest(ram: Arc<dyn GuestRam>, guest: Arc<dyn Guest>) -> Self {
        Self { ram, guest: Some(guest), arrived: None, vm: () }
    }
}

impl<V> Landing<V> {
    /// Keeps the VM, or whatever was made for the guest, for who waits for it: [`Arrival::vm`].
    #[must_use]
    pub fn keeping<W>(self, vm: W) -> Landing<W> {
        let Self { ram, guest, arrived, .. } = self;
        Landing { ram, guest, arrived, vm }
    }

    /// `arrived` is called once everything is handed over, and told whether the guest runs: not, where it was paused at the source. In
    /// postcopy pages of it may be missing still. The session lasts on, for a source that may not have heard so.
    #[must_use]
    pub fn on_arrival(mut self, arrived: impl FnOnce(bool) + Send + 'static) -> Self {
        self.arrived = Some(Box::new(arrived));
        self
    }
}

impl<V> fmt::Debug for Landing<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Landing").field("guest", &self.guest.is_some()).finish_non_exhaustive()
    }
}

/// Lands guests where a VMM's closure says.
pub(super) struct Lander<F, V> {
    land: F,
    landing: Option<Landing<V>>,
}

impl<V, F: FnMut(&Offer) -> Result<Landing<V>, Refused>> Lander<F, V> {
    pub(super) fn new(land: F) -> Self {
        Self { land, landing: None }
    }

    /// What was kept of the last that came.
    pub(super) fn into_vm(self) -> Option<V> {
        self.landing.map(|landing| landing.vm)
    }

    /// What is left to do where the session's thread panicked and nothing caught it. A guest that runs and misses pages is stopped:
    /// nobody brings them in any more. One that has all its pages runs on.
    pub(super) fn panicked(&self, progress: &Progress, what: String) -> IncomingError {
        let error = IncomingError::Panicked { what };
        let misses = matches!(progress.status(), Status::PostcopyActive | Status::PostcopyPaused);
        if let Some(guest) = self.landing.as_ref().and_then(|landing| landing.guest.as_ref())
            && misses
        {
            let _ = guarded(|| guest.stop_for_good(&|| Ok(())));
        }
        progress.update(|r| {
            r.status = if misses { Status::PostcopyLost } else { Status::Failed };
            r.error = Some(explain(&error));
        });
        error
    }
}

impl<V, F: FnMut(&Offer) -> Result<Landing<V>, Refused>> Incoming for Lander<F, V> {
    fn open(&mut self, offer: &Offer) -> Result<Arc<dyn GuestRam>, String> {
        let landing = (self.land)(offer).map_err(|refused| explain(&*refused))?;
        if landing.ram.layout() != &offer.layout {
            return Err("the memory that was made for the guest is of another layout".into());
        }
        let ram = landing.ram.clone();
        self.landing = Some(landing);
        Ok(ram)
    }

    fn guest(&self) -> Option<Arc<dyn Guest>> {
        self.landing.as_ref()?.guest.clone()
    }

    fn arrived(&mut self, running: bool) {
        if let Some(arrived) = self.landing.as_mut().and_then(|landing| landing.arrived.take()) {
            arrived(running);
        }
    }
}

/// A session that was begun; it goes on whether this is kept or dropped. What can be asked of it, and told, is in [`Progress`], which
/// this dereferences to: `arriving.events()`, `arriving.cancel()`.
///
/// It ends by [`wait`](Self::wait), which blocks, or by `arriving.await`, on any runtime.
#[derive(Debug)]
pub struct Arriving<V = ()> {
    progress: Progress,
    ending: Ending<Result<Arrival<V>, IncomingError>>,
}

impl<V: Send + 'static> Arriving<V> {
    pub(super) fn new(progress: Progress, ending: Ending<Result<Arrival<V>, IncomingError>>) -> Self {
        Self { progress, ending }
    }

    /// A handle for other threads.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Whether it has ended: [`wait`](Self::wait) does not block then.
    pub fn is_over(&self) -> bool {
        self.ending.is_over()
    }

    /// Blocks until the guest is here with all its pages, or the session has failed.
    ///
    /// # Errors
    /// Why it failed.
    pub fn wait(self) -> Result<Arrival<V>, IncomingError> {
        self.ending.wait()
    }
}

impl<V> Deref for Arriving<V> {
    type Target = Progress;

    fn deref(&self) -> &Progress {
        &self.progress
    }
}

impl<V: Send + 'static> IntoFuture for Arriving<V> {
    type Output = Result<Arrival<V>, IncomingError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        self.ending.future()
    }
}
