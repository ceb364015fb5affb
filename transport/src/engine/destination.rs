//! The destination: listens, takes one session in, and owns the guest from GO on.
//!
//! One listening socket serves control, streams and queries. A connection that never becomes a session (a stranger, another
//! version, a guest that does not fit) is refused with a reason on both sides, and the destination goes on listening; once
//! a session has touched memory, its failure is the destination's end.

pub(crate) mod environment;
mod error;
mod front;
mod host;
mod lobby;
pub(crate) mod opening;
mod session;
mod threads;

use std::sync::Arc;

use pagecopy::backend::{Guest, GuestRam};
use pagecopy::layout::Layout;

use super::Options;
use super::progress::Progress;
use super::report::Report;
use super::source::host::block;
use crate::local::guarded;
use crate::uri::Uri;
use crate::wire::control::Hello;
pub use error::IncomingError;
use host::Host;
use opening::Reception;

/// The VMM's side of a destination: makes the memory for a guest that is offered, or refuses it.
pub trait Incoming {
    /// Memory for this guest, all zeros, or why not. Called once a source has said what it brings; may be called again after a refusal.
    fn open(&mut self, hello: &Hello, layout: Layout) -> Result<Arc<dyn GuestRam>, String>;
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
pub struct Arrival {
    /// Its numbers.
    pub report: Report,
    /// A guest came and runs; false for memory alone, and for a guest that was paused at the source.
    pub running: bool,
}

/// A destination that listens.
pub struct Destination {
    host: Host,
    uri: Uri,
    options: Options,
    progress: Progress,
}

impl Destination {
    /// Listens at `uri`. `notice` is told, in a line each, about connections that were refused.
    pub fn bind(
        uri: &Uri,
        options: &Options,
        progress: &Progress,
        notice: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self, IncomingError> {
        // Its runtime panics where it cannot start a thread.
        let (host, uri) = guarded(|| Host::listen(uri, options, Box::new(notice)))
            .unwrap_or_else(|what| Err(IncomingError::Panicked { what }))?;
        Ok(Self { host, uri, options: options.clone(), progress: progress.clone() })
    }

    /// Where a source connects: with the port that the system chose.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Takes a session in. Blocks until the guest is here and runs, or the session has failed. One that failed after READY is waited with
    /// until its source has heard that the guest never ran here, for as long as a source is waited for: it may have said GO, and has no
    /// other way to know. Cancelling ends that.
    pub fn receive(self, incoming: &mut dyn Incoming) -> Result<Arrival, IncomingError> {
        block(Reception::new(&self.host, &self.options, &self.progress).receive(incoming))
    }
}
