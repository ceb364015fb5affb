//! The source: moves a guest, or memory alone, to a destination.
//!
//! `migrate` reads as the list of its phases. Whatever fails before GO unwinds in one place: the workers stop, the
//! dirty log stops, and a guest that was paused runs on. A failed attempt costs only what it sent: the next one starts anew.

mod base;
mod converge;
pub(crate) mod environment;
mod error;
pub(super) mod host;
pub(crate) mod leave;
mod postcopy;
mod reopen;
mod resume;
mod save;
mod snapshot;
mod state;
#[cfg(test)]
mod tests;
mod watch;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use crate::archive::format::RUN_STATE;
use crate::clock;
use crate::local::{check_headroom, guarded, guarded_while, source_bytes};
use crate::source::{BaseSeals, FatalError, Feeder, PageSource, SourceOptions};
use crate::spent::Spent;
use crate::uri::Uri;
use crate::wire::control::{Hello, Message, PRESENCE_CHUNKS, Totals, Welcome, capability};
use pagecopy::backend::{DirtyLog, Guest, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::choose::CodecMode;
use pagecopy::digest::PageHasher;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::policy::OnTimeout;
use pagecopy::zero::is_zero;

use super::Options;
use super::events::Event;
use super::progress::{Phase, Progress};
use super::report::{Report, Status};
use super::usage;
use converge::Next;
use environment::{Environment, Opening, Patience};
pub use error::{Cause, Failure, Fate};
use host::{Host, block};
use leave::{Doing, Leave};
use watch::Watch;

/// Bytes of a dense map that a thread looks at, at least: 256 MiB of memory.
const DENSE_SHARE_MIN: usize = 16;
/// Bytes of a chunk that are looked at to see whether its memory is worth enlarging at the destination.
const SAMPLE_BYTES: usize = 256;

/// Receipts that may mismatch before the migration fails.
const MISMATCHES_MAX: u64 = 64;
/// Pause before a migration that panicked after GO goes on.
const AFTER_PANIC: Duration = Duration::from_secs(1);
/// Streams that are opened at the same time.
const OPENING_MAX: u16 = 16;
/// How soon a migration that waits before its switchover notices that it may go on.
const GO_ON_TICK: Duration = Duration::from_millis(2);

/// What is to be moved; see [`SourceBuilder`](super::migration::SourceBuilder).
#[derive(Clone)]
pub(crate) struct SourceBackend {
    pub(crate) ram: Arc<dyn GuestRam>,
    pub(crate) log: Arc<dyn DirtyLog>,
    /// Unless it is memory alone.
    pub(crate) guest: Option<Arc<dyn Guest>>,
    /// The guest is paused before the migration and is to stay so, wherever it ends.
    pub(crate) paused: bool,
    pub(crate) machine: String,
}

/// Moves `backend` to the destination at `uri`, or saves it there where nobody answers. Blocks until the guest is there, or the attempt
/// has failed and was unwound.
pub(crate) fn migrate(
    backend: &SourceBackend,
    uri: &Uri,
    options: &Options,
    progress: &Progress,
) -> Result<Report, Failure> {
    if uri.is_one_way() {
        return save::save(backend, uri, options, progress);
    }
    let account = Account::begin(backend, progress);
    let leave = Leave::new(progress, account.began);
    let env = Host::new(uri, options, leave.clone());
    let prepared = caught(|| {
        if let Some(tls) = &options.tls {
            tls.check(uri)?;
            progress.update(|r| r.protection = tls.protection(uri));
        }
        crate::reserve::fill();
        let bytes = source_bytes(backend.ram.layout(), options.streams, options.cache_bytes);
        check_headroom(bytes)?;
        crate::dial::warm_up(uri);
        Ok(())
    });
    let mut attempt = Attempt::new(&env, backend, options, progress, leave);
    let result = prepared.and_then(|()| block(attempt.carry_out()));
    let downtime = attempt.downtime.or_else(|| attempt.stood_still()).unwrap_or_default();
    let failure = block(attempt.end(result));
    account.end(progress, failure.as_ref(), downtime);
    if failure.is_none() && backend.guest.is_some() && attempt.downtime.is_none() {
        told_downtime(progress, Some(downtime));
    }
    failure.map_or_else(|| Ok(progress.report()), Err)
}

/// What a migration's report is made of that nobody but its beginning and its end knows.
struct Account {
    began: Duration,
    cpu: f64,
}

impl Account {
    fn begin(backend: &SourceBackend, progress: &Progress) -> Self {
        let account = Self { began: clock::now(), cpu: usage::cpu_seconds() };
        progress.update(|r| {
            *r = Report { status: Status::Setup, page_size: PAGE_SIZE as u32, ..Report::default() };
            r.pages.total = backend.ram.layout().pages();
        });
        account
    }

    fn end(self, progress: &Progress, failure: Option<&Failure>, downtime: Duration) {
        let total = clock::now() - self.began;
        progress.update(|r| {
            r.cpu_s = usage::cpu_seconds() - self.cpu;
            r.max_rss_bytes = usage::max_rss_bytes();
            r.rates(total);
            match failure {
                None => {
                    r.status = Status::Completed;
                    r.downtime_ms = downtime.as_secs_f64() * 1e3;
                    r.remaining_bytes = 0;
                    r.stalled = None;
                    r.verified = true;
                }
                Some(failure) => {
                    r.status = match (failure.fate, &failure.cause) {
                        (Fate::Unknown, _) => Status::Unknown,
                        (Fate::Lost, _) => Status::PostcopyLost,
                        (_, cause) if cause.is_cancelled() => Status::Cancelled,
                        _ => Status::Failed,
                    };
                    r.error = Some(super::explain(failure));
                }
            }
        });
    }
}

/// The guest runs at the destination, after it ran nowhere for so long, as far as that is known: tells so.
fn told_downtime(progress: &Progress, downtime: Option<Duration>) -> Option<Duration> {
    let expected_ms = progress.report().expected_downtime_ms;
    let ms = downtime.map(|time| (time.as_secs_f64() * 1e6).round() / 1e3);
    ms.into_iter().for_each(|ms| progress.tell(Event::Downtime { ms, expected_ms }));
    downtime
}

/// What is left to say of a migration whose thread panicked where nothing catches it. Before GO the guest is this side's, whatever became
/// of the rest.
pub(super) fn panicked(backend: &SourceBackend, progress: &Progress, what: String) -> Failure {
    let owns = progress.phase() == Phase::Precopy;
    let fate = match &backend.guest {
        _ if !owns => Fate::Unknown,
        None => Fate::Unmoved,
        Some(_) if backend.paused => Fate::StaysPaused,
        Some(guest) if guarded(|| guest.resume().is_ok()) == Ok(true) => Fate::RunsOn,
        Some(_) => Fate::Stuck,
    };
    let failure = Failure { fate, cause: Cause::Panicked { what } };
    progress.update(|r| {
        r.status = if owns { Status::Failed } else { Status::Unknown };
        r.error = Some(super::explain(&failure));
    });
    failure
}

/// Makes an error of a panic: whoever has the guest then decides as after any other failure.
fn caught<T>(run: impl FnOnce() -> Result<T, Cause>) -> Result<T, Cause> {
    guarded(run).unwrap_or_else(|what| Err(Cause::Panicked { what }))
}

/// The same of what waits.
async fn caught_while<T>(run: impl Future<Output = Result<T, Cause>>) -> Result<T, Cause> {
    guarded_while(run).await.unwrap_or_else(|what| Err(Cause::Panicked { what }))
}

/// One attempt, and what it must undo.
pub(crate) struct Attempt<'a, E: Environment> {
    env: &'a E,
    backend: &'a SourceBackend,
    options: &'a Options,
    progress: &'a Progress,
    began: Duration,
    leave: Leave,
    paused_at: Option<Duration>,
    /// Of a guest that runs at the destination before the migration's end.
    downtime: Option<Duration>,
    /// The shortest that was seen: of opening a stream.
    round_trip: Option<Duration>,
    /// Since when connections of postcopy could not be opened.
    undialled: Option<Duration>,
    running: Option<Running<'a, E>>,
}

/// How far a transfer came.
enum Stage {
    /// The destination has everything and waits for GO.
    Ready,
    /// The guest is there.
    Moved,
}

/// What both sides said.
struct Agreed {
    welcome: Welcome,
    hasher: PageHasher,
    /// What the destination has an older copy of.
    base: Option<BaseSeals>,
}

/// What exists once the destination has answered.
struct Running<'a, E: Environment> {
    watch: Watch<'a, E>,
    source: Arc<PageSource>,
    welcome: Welcome,
    /// What serves the pages that are missing at the destination.
    postcopy: Option<postcopy::Service<'a, E>>,
    /// All pages that the destination was told, or is about to be told, are missing.
    missing: Option<PageBitmap>,
}

impl<'a, E: Environment> Attempt<'a, E> {
    /// One that has connected to nobody yet.
    pub(crate) fn new(
        env: &'a E,
        backend: &'a SourceBackend,
        options: &'a Options,
        progress: &'a Progress,
        leave: Leave,
    ) -> Self {
        Self {
            env,
            backend,
            options,
            progress,
            began: leave.requested(),
            leave,
            paused_at: None,
            downtime: None,
            round_trip: None,
            undialled: None,
            running: None,
        }
    }

    /// The phases, and what is left of them after a panic.
    pub(crate) async fn carry_out(&mut self) -> Result<(), Cause> {
        let mut result = caught_while(self.run()).await;
        while let Err(cause @ Cause::Panicked { .. }) = result {
            if self.owns_guest() || self.progress.is_cancelled() {
                return Err(cause);
            }
            // GO was said, and the destination may need what is here.
            self.env.sleep(AFTER_PANIC).await;
            result = caught_while(self.go_on(cause)).await;
        }
        result
    }

    /// The phases.
    async fn run(&mut self) -> Result<(), Cause> {
        let patience = Patience { timeout: self.options.timeout, reconnect: self.options.reconnect_timeout };
        let mut watch = Watch::connect(self.env, patience, self.progress, &self.leave).await?;
        self.backend.log.start()?;
        // After the log was started, so that no page falls between the two.
        let scanning = clock::now();
        let populated = super::populated(&*self.backend.ram)?;
        let scanned = clock::now() - scanning;
        let agreed = self.hello(&mut watch, &populated).await;
        let agreed = agreed.and_then(|agreed| {
            self.check_postcopy(agreed.welcome.capabilities)?;
            Ok(agreed)
        });
        let agreed = agreed.inspect_err(|cause| watch.say_error(cause))?;
        let welcome = agreed.welcome;
        let source = self.page_source(agreed, populated);
        let source = source.inspect_err(|cause| watch.say_error(cause))?;
        Spent::add(&source.counters().spent.scan, scanned);
        let mut feeder = Feeder::new(source.clone(), welcome.streams);
        watch.observe(source.clone());
        self.running = Some(Running { watch, source, welcome, postcopy: None, missing: None });
        self.progress.offer_postcopy(welcome.capabilities & capability::POSTCOPY != 0);
        self.leave.begin(Doing::OpeningStreams);
        self.open_streams(welcome, &feeder).await?;
        self.progress.update(|r| {
            r.status = Status::Active;
            r.setup_ms = (clock::now() - self.began).as_secs_f64() * 1e3;
        });
        loop {
            match self.transfer(feeder).await {
                Ok(Stage::Ready) => return self.hand_over().await,
                Ok(Stage::Moved) => return Ok(()),
                Err(cause) if self.is_resumable(&cause) => self.resume(&cause).await?,
                Err(cause) => return Err(cause),
            }
            let (watch, source) = self.parts();
            feeder = Feeder::new(source.clone(), welcome.streams);
            watch.feed(feeder.work());
        }
    }

    /// Takes in how it ended; undoes what a failed attempt did, and says who has the guest.
    pub(crate) async fn end(&mut self, result: Result<(), Cause>) -> Option<Failure> {
        let failure = match result {
            Ok(()) => {
                // Nobody needs it any more, whether it stops or not.
                let _ = self.backend.log.stop();
                None
            }
            Err(cause) => {
                // Whatever broke while somebody waited for it to end.
                let cause = if self.owns_guest() { self.leave.check().err().unwrap_or(cause) } else { cause };
                Some(self.unwind(cause).await)
            }
        };
        // The workers are gone and the last word is out: the numbers are final.
        self.running = None;
        failure
    }

    /// Everything up to READY, or all of postcopy. Nothing is lost for good when it fails before GO: what was not delivered is dirty
    /// again.
    async fn transfer(&mut self, feeder: Feeder) -> Result<Stage, Cause> {
        self.leave.begin(Doing::MovingPages);
        let next = self.precopy(&feeder).await?;
        self.leave.begin(Doing::SwitchingOver);
        let state = match next {
            (rounds, Next::SwitchOver) => self.switchover(&feeder, rounds).await?,
            (rounds, Next::Postcopy) => {
                self.postcopy(feeder, rounds).await?;
                return Ok(Stage::Moved);
            }
        };
        self.finish(feeder, state).await?;
        Ok(Stage::Ready)
    }

    /// How long a guest has stood still whose destination says now that it runs: since then it took the word one way, at least.
    fn stood_still(&self) -> Option<Duration> {
        self.paused_at.map(|at| (clock::now() - at).saturating_sub(self.way()))
    }

    /// The shortest way from the destination that was seen.
    fn way(&self) -> Duration {
        let opened = self.round_trip.unwrap_or_default();
        self.running.as_ref().map_or(opened, |running| running.source.counters().path(opened)) / 2
    }

    /// Whether GO was not said.
    pub(crate) fn owns_guest(&self) -> bool {
        self.running.as_ref().is_none_or(|running| running.watch.owns_guest())
    }

    fn parts(&mut self) -> (&mut Watch<'a, E>, &Arc<PageSource>) {
        let running = self.running.as_mut().expect("set before any phase that needs it");
        (&mut running.watch, &running.source)
    }

    /// HELLO, WELCOME, PREPARED.
    async fn hello(&self, watch: &mut Watch<'_, E>, populated: &PageBitmap) -> Result<Agreed, Cause> {
        let layout = self.backend.ram.layout();
        let seed = self.env.seed()?;
        let mut presence = vec![0u8; Hello::presence_len(layout)];
        let told = self.backend.guest.is_none() || self.options.dense;
        let mut dense = if told { presence.clone() } else { Vec::new() };
        for (chunk, _) in populated.iter() {
            let bit = chunk / PRESENCE_CHUNKS;
            presence[bit as usize / 8] |= 1 << (bit % 8);
        }
        find_dense(&*self.backend.ram, populated, &mut dense);
        let resume = if self.options.reconnect_timeout.is_zero() { 0 } else { capability::RESUME };
        let postcopy = if self.backend.guest.is_some() { capability::POSTCOPY } else { 0 };
        let capabilities = capability::ENCODINGS | capability::BASE | postcopy | resume;
        let hello = Message::Hello(Hello {
            seed,
            capabilities,
            streams: self.options.streams,
            live: self.backend.guest.is_some(),
            timeout_ms: self.options.timeout.as_millis().try_into().unwrap_or(u32::MAX),
            reconnect_ms: self.options.reconnect_timeout.as_millis().try_into().unwrap_or(u32::MAX),
            regions: layout.regions().to_vec(),
            presence,
            dense,
            data_bytes: populated.count() * PAGE_SIZE as u64,
            machine: self.backend.machine.clone(),
        });
        check(&hello)?;
        watch.send(hello);
        let (welcome, base) = watch.welcome(self.options.streams, capabilities, layout).await?;
        Ok(Agreed { welcome, hasher: PageHasher::new(seed), base })
    }

    /// Fails where postcopy will be needed and the destination cannot do it: before the first page, and not when the time has come.
    fn check_postcopy(&self, capabilities: u64) -> Result<(), Cause> {
        if self.backend.guest.is_none() || capabilities & capability::POSTCOPY != 0 {
            return Ok(());
        }
        let limits = self.progress.tuning().limits;
        let needed_by = if self.options.postcopy_after_rounds.is_some() {
            Some("postcopy after so many rounds")
        } else {
            (limits.on_timeout == OnTimeout::Postcopy).then_some("postcopy when its time is up")
        };
        needed_by.map_or(Ok(()), |option| Err(Cause::NoPostcopy { needed_by: Some(option) }))
    }

    fn page_source(&self, agreed: Agreed, populated: PageBitmap) -> Result<Arc<PageSource>, Cause> {
        let Agreed { welcome: Welcome { capabilities, streams, .. }, hasher, base } = agreed;
        let codec = self.options.codec;
        let needs = match codec {
            CodecMode::Auto | CodecMode::Raw => 0,
            CodecMode::Zstd { .. } => capability::ZSTD,
            CodecMode::Delta => capability::DELTA,
        };
        if needs & !capabilities != 0 {
            return Err(Cause::Codec { codec });
        }
        let codec = if codec == CodecMode::Auto && capability::CODECS & !capabilities != 0 {
            CodecMode::Raw
        } else {
            codec
        };
        let options = SourceOptions {
            references: capabilities & capability::REFERENCES != 0,
            streams,
            codec,
            cache_bytes: self.options.cache_bytes,
            timeout: self.options.timeout,
            mismatches_max: MISMATCHES_MAX,
        };
        let (SourceBackend { ram, log, .. }, shared) = (self.backend.clone(), self.options.shared.clone());
        self.progress.update(|r| r.pages.hole = ram.layout().pages() - populated.count());
        let source = PageSource::new(ram, log, hasher, options, populated);
        Ok(Arc::new(source.with_base(base).sharing(shared).of_paused(self.backend.paused)))
    }

    async fn open_streams(&mut self, welcome: Welcome, feeder: &Feeder) -> Result<(), Cause> {
        let (watch, source) = self.parts();
        let opening =
            Opening { source: source.clone(), session: watch.session_id(), version: welcome.version };
        let round_trip = watch.open_streams(&opening, welcome.streams, feeder.work()).await?;
        self.round_trip = Some(round_trip);
        self.progress.update(|r| r.streams = welcome.streams);
        Ok(())
    }

    /// Pauses the guest, sends the last pages and its state, and ends the streams. Returns the state's digest.
    async fn switchover(&mut self, feeder: &Feeder, rounds: u64) -> Result<u64, Cause> {
        let mut digest = 0;
        if let Some(guest) = &self.backend.guest {
            let (guest, ran) = (guest.clone(), u8::from(!self.backend.paused));
            let (progress, final_check) = (self.progress, self.options.final_check);
            progress.update(|r| r.status = Status::Device);
            self.paused_at = Some(clock::now());
            guest.pause()?;
            let env = self.env;
            let (watch, source) = self.parts();
            // Nobody is slowed down by haste any more but the guest that waits.
            source.hurry();
            watch.hurry();
            let mut dirtied = feeder.sync(env, || watch.check()).await?;
            if final_check && !source.compared() {
                // With nothing given out meanwhile: what a stream has taken and not read yet is not as it was sent, and was noted.
                let unnoticed = source.compare()?.pages;
                progress.update(|r| r.final_check_pages = Some(unnoticed));
            }
            if progress.tuning().pause_before_switchover {
                feeder.settle(env, || watch.check()).await?;
                wait_to_go_on(watch, progress).await?;
                // Whoever let it wait may have written to its memory meanwhile.
                dirtied += source.dirty_sync()?;
            }
            // The pages are on their way while the state is saved.
            feeder.pass(env, || watch.check()).await?;
            let (state, of_state) = state::save(&*guest, ran)?;
            digest = of_state;
            watch.send(state);
            if watch.may_finish_in_flight() {
                feeder.send_out(env, || watch.check()).await?;
                // What died with a stream goes over the others, as soon as it may.
                while watch.streams.any_dead() {
                    env.wait().await;
                    watch.check()?;
                    feeder.send_out(env, || watch.check()).await?;
                }
            } else {
                feeder.settle(env, || watch.check()).await?;
            }
            watch.end_round(dirtied);
            self.progress.update(|r| r.rounds = rounds + 1);
        }
        Ok(digest)
    }

    /// Ends the streams; FINISH, READY. Where a guest waits, all of it leaves at once: the last pages, their streams' ends, its state and
    /// FINISH are on their way together.
    async fn finish(&mut self, feeder: Feeder, state: u64) -> Result<(), Cause> {
        let live = self.backend.guest.is_some();
        let (watch, source) = self.parts();
        watch.close();
        drop(feeder);
        let in_flight = live && watch.may_finish_in_flight();
        let streams = if in_flight { watch.streams_sent().await? } else { watch.streams_ended().await? };
        match source.never_carried() {
            0 => {}
            pages => return Err(FatalError::NeverSent { pages }.into()),
        }
        let totals = Totals { streams, pages: source.carried_pages(), state };
        watch.finish(totals, live).await
    }

    /// GO, RUNNING.
    async fn hand_over(&mut self) -> Result<(), Cause> {
        match self.say_go(Phase::HandedOver).await? {
            None => Ok(()),
            Some(cause) => self.ask(cause).await,
        }
    }

    /// GO, RUNNING. Fails only where the guest is this side's; returns why RUNNING was not heard, if it was not.
    async fn say_go(&mut self, next: Phase) -> Result<Option<Cause>, Cause> {
        let progress = self.progress;
        let (watch, _) = self.parts();
        if !progress.say_go(next) {
            return Err(Cause::Cancelled);
        }
        // The point of no return: whatever happens from here on, only the destination's word ends this.
        watch.go();
        match watch.running().await {
            Ok(()) => {
                watch.send(Message::Running);
                Ok(None)
            }
            Err(Cause::Abandoned) => Err(Cause::Abandoned),
            Err(cause) => Ok(Some(cause)),
        }
    }

    /// Asks the destination what became of the session, until it is known: without end for a guest, that two may not run; for one
    /// timeout where memory alone was moved. Cancelling ends the asking, not the uncertainty.
    async fn ask(&mut self, first: Cause) -> Result<(), Cause> {
        self.progress.update(|r| {
            r.status = Status::Unknown;
            r.error = Some(super::explain(&first));
        });
        let (env, options, live) = (self.env, self.options, self.backend.guest.is_some());
        let (progress, leave) = (self.progress, self.leave.clone());
        let (watch, _) = self.parts();
        let mut pause = Duration::from_millis(50);
        let began = clock::now();
        loop {
            match watch.relink(&|| leave.is_over()).await {
                Ok(()) => {
                    progress.update(|r| r.error = None);
                    return Ok(());
                }
                Err(Cause::Abandoned) => return Err(Cause::Abandoned),
                Err(_) => {}
            }
            if progress.is_cancelled() || (!live && clock::now() - began > options.timeout) {
                return Err(first);
            }
            let until = clock::now() + pause;
            while clock::now() < until && !progress.is_cancelled() {
                env.sleep(Duration::from_millis(10)).await;
            }
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    /// Goes on after GO was said and this side then lost its way.
    async fn go_on(&mut self, cause: Cause) -> Result<(), Cause> {
        if self.running.as_ref().is_some_and(|running| running.postcopy.is_some()) {
            self.serve(Some(cause)).await
        } else {
            self.ask(cause).await
        }
    }

    /// Undoes what a failed attempt did, and says who has the guest. A paused guest comes first.
    async fn unwind(&mut self, cause: Cause) -> Failure {
        let owns = self.owns_guest() || matches!(cause, Cause::Abandoned);
        if let Some(running) = &mut self.running {
            // Whatever goes wrong here, the guest must not stay paused.
            let _ = caught(|| {
                running.watch.say_error(&cause);
                running.source.stop();
                running.watch.abort();
                Ok(())
            });
        }
        // Whether it stands still is then not known for sure.
        let panicked = matches!(cause, Cause::Panicked { .. });
        let fate = match &self.backend.guest {
            _ if !owns && self.downtime.is_some() => Fate::Lost,
            _ if !owns => Fate::Unknown,
            None => Fate::Unmoved,
            Some(_) if self.backend.paused => Fate::StaysPaused,
            Some(guest) if (self.paused_at.is_some() || panicked) && guest.resume().is_err() => Fate::Stuck,
            Some(_) => Fate::RunsOn,
        };
        if let Some(running) = &mut self.running {
            running.watch.join().await;
        }
        // A log that does not stop costs speed and nothing else, and the cause is what matters.
        let _ = self.backend.log.stop();
        Failure { fate, cause }
    }
}

/// Waits with a paused guest until somebody says that it may go on.
async fn wait_to_go_on(watch: &mut Watch<'_, impl Environment>, progress: &Progress) -> Result<(), Cause> {
    progress.update(|r| r.status = Status::PreSwitchover);
    while !progress.may_go_on() && progress.tuning().pause_before_switchover {
        watch.check()?;
        watch.env.sleep(GO_ON_TICK).await;
    }
    progress.update(|r| r.status = Status::Device);
    Ok(())
}

/// How long saving, sending and loading device state is taken to need until it is measured.
pub(super) fn state_time(backend: &SourceBackend) -> Duration {
    backend.guest.as_ref().map_or(Duration::ZERO, |guest| guest.state_time())
}

/// Sets the bits of a dense map, with all cores: looking at memory that nobody has looked at costs a page fault each time.
fn find_dense(ram: &dyn GuestRam, populated: &PageBitmap, dense: &mut [u8]) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = dense.len().div_ceil(cores).max(DENSE_SHARE_MIN);
    std::thread::scope(|scope| {
        for (bytes, first) in dense.chunks_mut(share).zip((0..).step_by(share)) {
            let find = move || {
                for (byte, at) in bytes.iter_mut().zip(first..) {
                    let is_dense =
                        |bit: &u32| is_dense(ram, populated, (at as u32 * 8 + bit) * PRESENCE_CHUNKS);
                    *byte = (0..8).filter(is_dense).fold(0, |byte, bit| byte | 1 << bit);
                }
            };
            // Memory of which nothing is known to be dense comes in as its content does.
            let _ = std::thread::Builder::new().name("dense".into()).spawn_scoped(scope, find);
        }
    });
}

/// Whether there is data all over the [`PRESENCE_CHUNKS`] chunks from `first`, by samples, of which half may be zeros: so little
/// of it is read that it costs next to nothing.
fn is_dense(ram: &dyn GuestRam, populated: &PageBitmap, first: u32) -> bool {
    let chunks = first..first.saturating_add(PRESENCE_CHUNKS);
    if chunks.end > ram.layout().chunks() || chunks.clone().any(|chunk| populated.get(chunk) != u64::MAX) {
        return false;
    }
    let reads_as_zeros = |chunk: &u32| {
        let mut sample = [0; SAMPLE_BYTES];
        ram.chunk(*chunk).copy_to(&mut sample[..]);
        is_zero(&sample)
    };
    chunks.step_by(2).filter(reads_as_zeros).count() as u32 <= PRESENCE_CHUNKS / 4
}

/// Refuses what the destination would: it comes from the VMM, whose limits may be others.
pub(super) fn check(message: &Message) -> Result<(), Cause> {
    let name = message.name();
    message.check().map_err(|source| Cause::Unsendable { name, source })
}
