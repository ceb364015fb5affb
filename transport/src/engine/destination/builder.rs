//! How a destination is set up.

use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::Handle;

use super::{Destination, IncomingError};
use crate::engine::Options;
use crate::engine::progress::Progress;
use crate::rdma::RdmaOptions;
use crate::socket::Tls;
use crate::uri::Uri;

/// Makes a [`Destination`]. Everything has a default that serves.
#[must_use]
pub struct DestinationBuilder {
    options: Options,
    notice: Box<dyn Fn(&str) + Send + Sync>,
}

impl DestinationBuilder {
    pub(super) fn new() -> Self {
        Self { options: Options::default(), notice: Box::new(|_| {}) }
    }

    /// Silence after which a peer, or a stream, is given up (10 s).
    pub fn link_timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = timeout;
        self
    }

    /// How long a source that was lost on the way may take to connect again (300 s), where it does not say less itself. Zero: it is
    /// given up at once.
    pub fn reconnect_timeout(mut self, timeout: Duration) -> Self {
        self.options.reconnect_timeout = timeout;
        self
    }

    /// How long a destination that has everything waits for its source's last word after it lost it (60 s). Then it gives the guest up,
    /// which never ran here.
    pub fn handover_timeout(mut self, timeout: Duration) -> Self {
        self.options.handover_timeout = timeout;
        self
    }

    /// How long a guest that misses pages waits for a source that was lost (600 s). Then it is stopped, and is lost.
    pub fn postcopy_timeout(mut self, timeout: Duration) -> Self {
        self.options.postcopy_timeout = timeout;
        self
    }

    /// What protects its connections (nothing). The files are read now, and again whenever they were replaced.
    pub fn tls(mut self, tls: impl Into<Option<Tls>>) -> Self {
        self.options.tls = tls.into();
        self
    }

    /// Whether it may listen without TLS at an address that other hosts can reach (no): whoever reaches it can hand a guest over, and
    /// whoever taps the wire reads one that comes.
    pub fn insecure(mut self, insecure: bool) -> Self {
        self.options.insecure = insecure;
        self
    }

    /// How memory is registered for RDMA.
    pub fn rdma(mut self, rdma: RdmaOptions) -> Self {
        self.options.rdma = rdma;
        self
    }

    /// For a guest that comes from a peer: an older copy of it, an archive or a RAM file; what is the same need not come again. For an
    /// archive that is loaded: the one that it stands on, where that is not where the archive says.
    pub fn base(mut self, base: impl Into<Option<PathBuf>>) -> Self {
        self.options.base = base.into();
        self
    }

    /// Whether a guest that is loaded from a file is to run at once, before its pages are here, which come as it touches them (no).
    pub fn on_demand(mut self, on_demand: bool) -> Self {
        self.options.on_demand = on_demand;
        self
    }

    /// A runtime for the listening socket and the control link, where the process has one: with I/O and time enabled, running, and there
    /// for longer than the destination. Without, the destination has one of its own. Pages never go through it.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.options.runtime = Some(runtime);
        self
    }

    /// Is told, in a line each, about connections that were refused, from the session's thread; it must not block.
    pub fn notice(mut self, notice: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.notice = Box::new(notice);
        self
    }

    /// Listens at `uri`; port 0 is any that is free. Connections are heard from now on, and served from [`Destination::receive`] on.
    ///
    /// # Errors
    /// When the address cannot be had, or the system lacks what a runtime needs.
    pub fn bind(self, uri: &Uri) -> Result<Destination, IncomingError> {
        Destination::bind(uri, &self.options, &Progress::default(), self.notice)
    }
}
