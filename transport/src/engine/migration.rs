//! A migration out, as a VMM has it: what is to be moved, and the handle of a migration under way.

use std::io;
use std::ops::Deref;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::{BackendError, DirtyLog, Guest, GuestRam};
use pagecopy::choose::CodecMode;
use pagecopy::throttle::PERCENT_MAX;
use tokio::runtime::Handle;

use super::awaited::Ending;
use super::plan::{self, Plan};
use super::progress::Progress;
use super::report::Report;
use super::source::{Failure, SourceBackend, migrate, panicked};
use super::tuning::Tuning;
use super::{Options, STREAMS_MAX};
use crate::local::guarded;
use crate::rdma::RdmaOptions;
use crate::socket::Tls;
use crate::source::HostShare;
use crate::uri::Uri;

/// An option that cannot be had so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {why}")]
pub struct InvalidOption {
    /// Its name: the builder's method, or the field of [`Tuning`].
    pub option: &'static str,
    /// What would do.
    pub why: &'static str,
}

/// What is to be moved, and how. It can be moved several times: an attempt that fails costs what it sent, and nothing else.
#[derive(Clone)]
pub struct Source {
    backend: SourceBackend,
    options: Options,
    tuning: Tuning,
}

/// Makes a [`Source`]. All but the memory and its dirty log has a default that serves.
#[derive(Clone)]
#[must_use]
pub struct SourceBuilder {
    source: Source,
}

impl Source {
    /// Of guest memory, and of what tells which of its pages were written. Memory that nobody writes has a
    /// [`StaticLog`](pagecopy::backend::StaticLog).
    pub fn builder(ram: Arc<dyn GuestRam>, log: Arc<dyn DirtyLog>) -> SourceBuilder {
        let backend = SourceBackend { ram, log, guest: None, paused: false, machine: String::new() };
        SourceBuilder { source: Self { backend, options: Options::default(), tuning: Tuning::default() } }
    }

    /// Begins to move it to the destination at `uri`, on threads of its own, and returns at once. Where nobody answers at `uri`
    /// ([`Uri::is_one_way`]), it is saved there.
    ///
    /// # Errors
    /// When the system has no thread for it; nothing was begun then.
    pub fn start(&self, uri: &Uri) -> io::Result<Migration> {
        let progress = Progress::new(self.tuning);
        let (source, uri, own) = (self.clone(), uri.clone(), progress.clone());
        let ending = Ending::of("migration", move || {
            let Self { backend, options, .. } = &source;
            let result = guarded(|| migrate(backend, &uri, options, &own))
                .unwrap_or_else(|what| Err(panicked(backend, &own, what)));
            own.end();
            result
        })?;
        Ok(Migration { progress, ending })
    }

    /// Watches the guest for `time`, with its dirty log on, and says what moving it over a link of `link_bytes_per_s` would come to.
    /// Nothing is sent. Blocks for that long.
    ///
    /// # Errors
    /// Those of the memory and the dirty log.
    pub fn plan(
        &self,
        time: Duration,
        link_bytes_per_s: u64,
        downtime_limit_ms: u64,
    ) -> Result<Plan, BackendError> {
        plan::plan(&self.backend, time, link_bytes_per_s, downtime_limit_ms)
    }
}

impl SourceBuilder {
    /// The guest whose memory it is: it is paused at the end, and its state goes along. Without one, memory alone is moved, which nobody
    /// writes meanwhile.
    pub fn guest(mut self, guest: Arc<dyn Guest>) -> Self {
        self.source.backend.guest = Some(guest);
        self
    }

    /// Whether the guest is paused now, and is to stay so wherever it ends.
    pub fn paused(mut self, paused: bool) -> Self {
        self.source.backend.paused = paused;
        self
    }

    /// Describes the machine; the destination compares it with its own.
    pub fn machine(mut self, machine: impl Into<String>) -> Self {
        self.source.backend.machine = machine.into();
        self
    }

    /// Data streams, 1 to 256 (4).
    pub fn streams(mut self, streams: u16) -> Self {
        self.source.options.streams = streams;
        self
    }

    /// How pages are encoded (by what is measured).
    pub fn codec(mut self, codec: CodecMode) -> Self {
        self.source.options.codec = codec;
        self
    }

    /// Bound of the memory that is kept to make deltas from, in bytes (64 MiB).
    pub fn cache_bytes(mut self, bytes: u64) -> Self {
        self.source.options.cache_bytes = bytes;
        self
    }

    /// Rounds after which the guest is to run at the destination before its pages are there, if it was not handed over by then (none).
    pub fn postcopy_after_rounds(mut self, rounds: impl Into<Option<u64>>) -> Self {
        self.source.options.postcopy_after_rounds = rounds.into();
        self
    }

    /// Whether a guest that is saved into an archive is saved as of one instant: it stands still for milliseconds and runs on, and who
    /// writes a page that was not saved waits until it is (no). It takes memory that can be
    /// [guarded](pagecopy::backend::GuestRam::guard).
    pub fn snapshot(mut self, snapshot: bool) -> Self {
        self.source.options.snapshot = snapshot;
        self
    }

    /// Whether a guest that is saved into an archive runs on afterwards (no: it stays paused, so that there are not two of it).
    pub fn resume_after_save(mut self, resume: bool) -> Self {
        self.source.options.resume_after_save = resume;
        self
    }

    /// Whether all of memory is compared with what was sent, once the guest stands still (no): pages that its dirty log did not tell of
    /// are sent all the same, and counted ([`Report::final_check_pages`]). It takes about 0.05 s for each GiB and core, of the downtime.
    pub fn final_check(mut self, final_check: bool) -> Self {
        self.source.options.final_check = final_check;
        self
    }

    /// Whether a destination is told which of the guest's memory is dense (no), so that it may have large pages for that; of memory alone
    /// it always is. It takes a look at a part of all memory, some 4 ms for each GiB.
    pub fn dense(mut self, dense: bool) -> Self {
        self.source.options.dense = dense;
        self
    }

    /// The archive of an older state of this guest, of which one that it is saved into now has no more than the difference (none).
    pub fn base(mut self, base: impl Into<Option<PathBuf>>) -> Self {
        self.source.options.base = base.into();
        self
    }

    /// The downtime that is aimed for (300 ms); shorthand for [`Limits::downtime_ms`](pagecopy::policy::Limits).
    pub fn downtime_limit(mut self, limit: Duration) -> Self {
        self.source.tuning.limits.downtime_ms = limit.as_millis().try_into().unwrap_or(u64::MAX);
        self
    }

    /// Most wire bytes a second of all streams together (no limit); shorthand for [`Tuning::bandwidth`].
    pub fn bandwidth(mut self, bytes_per_s: impl Into<Option<u64>>) -> Self {
        self.source.tuning.bandwidth = bytes_per_s.into();
        self
    }

    /// All limits that may change while it runs; replaces those that were set before.
    pub fn tuning(mut self, tuning: Tuning) -> Self {
        self.source.tuning = tuning;
        self
    }

    /// Silence after which a peer, or a stream, is given up: 1 ms to 49 days (10 s).
    pub fn link_timeout(mut self, timeout: Duration) -> Self {
        self.source.options.timeout = timeout;
        self
    }

    /// How long connections that were lost may take to be made anew before the migration fails (300 s). Zero: it fails at once.
    pub fn reconnect_timeout(mut self, timeout: Duration) -> Self {
        self.source.options.reconnect_timeout = timeout;
        self
    }

    /// What protects its connections (nothing).
    pub fn tls(mut self, tls: impl Into<Option<Tls>>) -> Self {
        self.source.options.tls = tls.into();
        self
    }

    /// How memory is registered for RDMA.
    pub fn rdma(mut self, rdma: RdmaOptions) -> Self {
        self.source.options.rdma = rdma;
        self
    }

    /// What it shares with the host's other migrations, which are given the same (nothing).
    pub fn shared(mut self, shared: Arc<HostShare>) -> Self {
        self.source.options.shared = Some(shared);
        self
    }

    /// A runtime for the control link, where the process has one: with I/O and time enabled, and there for longer than the migration.
    /// Without, all migrations of the process share one that is made for them. Pages never go through it.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.source.options.runtime = Some(runtime);
        self
    }

    /// The source.
    ///
    /// # Errors
    /// When an option is out of its range.
    pub fn build(self) -> Result<Source, InvalidOption> {
        let Source { backend, options, tuning } = &self.source;
        let check =
            |holds: bool, option, why| if holds { Ok(()) } else { Err(InvalidOption { option, why }) };
        let hello = Duration::from_millis(1)..=Duration::from_millis(u32::MAX.into());
        check((1..=STREAMS_MAX).contains(&options.streams), "streams", "there are 1 to 256")?;
        check(hello.contains(&options.timeout), "link_timeout", "it is 1 ms to 49 days")?;
        check(&options.reconnect_timeout <= hello.end(), "reconnect_timeout", "it is at most 49 days")?;
        check(tuning.throttle_max <= PERCENT_MAX, "throttle_max", "it is at most 99 percent")?;
        check(tuning.bandwidth != Some(0), "bandwidth", "nothing could be sent; None is no limit")?;
        check(!backend.paused || backend.guest.is_some(), "paused", "there is no guest")?;
        Ok(self.source)
    }
}

/// A migration out that was started; it goes on whether this is kept or dropped. What can be asked of it, and told, is in
/// [`Progress`], which this dereferences to: `migration.events()`, `migration.cancel()`.
///
/// It ends by [`wait`](Self::wait), which blocks, or by `migration.await`, on any runtime.
#[derive(Debug)]
pub struct Migration {
    progress: Progress,
    ending: Ending<Result<Report, Failure>>,
}

impl Migration {
    /// A handle for other threads.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Whether it has ended: [`wait`](Self::wait) does not block then.
    pub fn is_over(&self) -> bool {
        self.ending.is_over()
    }

    /// Blocks until the guest is at the destination, or the migration has failed and what it did here was undone.
    ///
    /// # Errors
    /// Why it failed, and who has the guest.
    pub fn wait(self) -> Result<Report, Failure> {
        self.ending.wait()
    }
}

impl Deref for Migration {
    type Target = Progress;

    fn deref(&self) -> &Progress {
        &self.progress
    }
}

impl IntoFuture for Migration {
    type Output = Result<Report, Failure>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        self.ending.future()
    }
}
