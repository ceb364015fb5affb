//! The destination: listens, takes one session in, and owns the guest from GO on.
//!
//! One listening socket serves control, streams and queries. A connection that never becomes a session (a stranger, another
//! version, a guest that does not fit) is refused with a reason on both sides, and the destination goes on listening; once
//! a session has touched memory, its failure is the destination's end.

mod arriving;
mod base;
mod builder;
mod demand;
pub(crate) mod environment;
mod error;
mod front;
mod host;
mod load;
mod lobby;
pub(crate) mod opening;
mod session;
mod threads;

use std::io;
use std::sync::Arc;

use pagecopy::backend::{Guest, GuestRam};

use super::awaited::Ending;
use super::progress::Progress;
use super::report::{Protection, Report, Status};
use super::source::host::block;
use super::{Options, explain};
use crate::local::guarded;
use crate::uri::Uri;
use arriving::Lander;
pub use arriving::{Arriving, Landing, Offer, Refused};
pub use builder::DestinationBuilder;
pub use error::IncomingError;
use host::Host;
use load::{Loading, load};
use opening::Reception;

/// Threads that read an archive at most: beyond these a disk or memory is what limits.
const LOADERS_MAX: usize = 8;

/// The VMM's side of a session: makes the memory for a guest that is offered, or refuses it.
pub(crate) trait Incoming {
    /// Memory for this guest, all zeros, or why not. Called once a source has said what it brings; may be called again after a refusal.
    fn open(&mut self, offer: &Offer) -> Result<Arc<dyn GuestRam>, String>;
    /// The guest whose state is to be loaded and that is to run, for a live migration.
    fn guest(&self) -> Option<Arc<dyn Guest>>;
    /// Everything is here and handed over; the guest runs, if there is one and it was not paused at the source. The session
    /// lasts on, for a source that may not have heard so.
    fn arrived(&mut self, running: bool) {
        let _ = running;
    }
}

/// A session that came to its end.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Arrival<V = ()> {
    /// Its numbers.
    pub report: Report,
    /// A guest came and runs; false for memory alone, and for a guest that was paused at the source.
    pub running: bool,
    /// What was handed to [`Landing::keeping`]: the VM.
    pub vm: V,
}

/// A destination that listens, or is to load an archive.
pub struct Destination {
    way: Way,
    uri: Uri,
    options: Options,
    progress: Progress,
}

/// Where guests come from.
enum Way {
    /// Whoever connects.
    Listens(Box<Host>),
    Loads(Loading),
}

impl Destination {
    /// Sets it up.
    pub fn builder() -> DestinationBuilder {
        DestinationBuilder::new()
    }

    /// Listens at `uri`. `notice` is told, in a line each, about connections that were refused.
    pub(crate) fn bind(
        uri: &Uri,
        options: &Options,
        progress: &Progress,
        notice: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self, IncomingError> {
        options.tls.as_ref().map_or(Ok(()), |tls| tls.check(uri))?;
        if uri.is_one_way() {
            let base = options.base.clone();
            let threads = std::thread::available_parallelism().map_or(1, usize::from).min(LOADERS_MAX);
            let (uri, on_demand) = (uri.clone(), options.on_demand);
            let way = Way::Loads(Loading { uri: uri.clone(), base, threads, on_demand });
            return Ok(Self { way, uri, options: options.clone(), progress: progress.clone() });
        }
        // Its runtime panics where it cannot start a thread.
        let (host, uri) = guarded(|| Host::listen(uri, options, Box::new(notice)))
            .unwrap_or_else(|what| Err(IncomingError::Panicked { what }))?;
        let way = Way::Listens(Box::new(host));
        let protection = options.tls.as_ref().map_or(Protection::None, |tls| tls.protection(&uri));
        progress.update(|r| r.protection = protection);
        Ok(Self { way, uri, options: options.clone(), progress: progress.clone() })
    }

    /// Where a source connects: with the port that the system chose.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// A handle to watch or command it by, also before a source has come. Cancelling ends the waiting for one.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Takes a guest in, on threads of its own, and returns at once. `land` is called with what a source brings, once it has said so,
    /// and makes memory for it, all zeros, and a VM; what it refuses is refused to the source with its reason, and the destination goes on
    /// listening. It may be called again then.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn receive<V: Send + 'static>(
        self,
        land: impl FnMut(&Offer) -> Result<Landing<V>, Refused> + Send + 'static,
    ) -> io::Result<Arriving<V>> {
        let progress = self.progress.clone();
        let ending = Ending::of("incoming", move || {
            let mut lander = Lander::new(land);
            let own = self.progress.clone();
            let arrival = guarded(|| self.receive_here(&mut lander))
                .unwrap_or_else(|what| Err(lander.panicked(&own, what)))?;
            let vm = lander.into_vm().expect("whatever arrived has landed");
            Ok(Arrival { report: arrival.report, running: arrival.running, vm })
        })?;
        Ok(Arriving::new(progress, ending))
    }

    /// Takes a session in. Blocks until the guest is here and runs, or the session has failed. One that failed after READY is waited with
    /// until its source has heard that the guest never ran here, for as long as a source is waited for: it may have said GO, and has no
    /// other way to know. Cancelling ends that.
    pub(crate) fn receive_here(self, incoming: &mut dyn Incoming) -> Result<Arrival, IncomingError> {
        let result = match &self.way {
            Way::Listens(host) => {
                block(Reception::new(&**host, &self.options, &self.progress).receive(incoming))
            }
            Way::Loads(loading) => load(loading, &self.progress, incoming),
        };
        if let (Err(error), Status::None) = (&result, self.progress.status()) {
            // It ended before a source came.
            self.progress.update(|r| {
                let cancelled = matches!(error, IncomingError::Cancelled);
                r.status = if cancelled { Status::Cancelled } else { Status::Failed };
                r.error = Some(explain(error));
            });
        }
        result
    }
}

impl Drop for Destination {
    /// Whoever reads events has heard all.
    fn drop(&mut self) {
        self.progress.end();
    }
}
