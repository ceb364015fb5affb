//! Saving a guest, or memory alone, into an archive: a migration without a peer.
//!
//! Its rounds are those of any migration. What differs is the end: there is no handover. The guest is paused for its last pages and its
//! state, and stays this side's; once the archive is whole it stays paused, or goes on where that was asked for. Whatever fails before
//! leaves no archive, and a guest that runs on.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, unbounded};
use pagecopy::backend::StateBlob;
use pagecopy::bitmap::PageBitmap;
use pagecopy::choose::CodecMode;
use pagecopy::digest::PageHasher;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::policy::OnTimeout;

use super::converge::{Mover, rounds_without_a_peer};
use super::host::block;
use super::leave::{Doing, Leave};
use super::{Account, Cause, Failure, Fate, SourceBackend, base, caught_while, state, told_downtime};
use crate::archive::ArchiveError;
use crate::archive::format::{Base, Header, VERSION, feature};
use crate::archive::image::Image;
use crate::archive::writer::ArchiveWriter;
use crate::clock;
use crate::engine::Options;
use crate::engine::progress::Progress;
use crate::engine::report::{Report, Status};
use crate::local::{check_headroom, random, source_bytes};
use crate::source::{Feeder, Lane, LaneError, LaneNews, PageSource, SourceOptions, Waits};
use crate::spent::Spent;
use crate::uri::Uri;

/// How often the report that others see is renewed.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// Saves `backend` to `uri`. Blocks until the archive is whole, or the attempt has failed and was unwound.
pub(crate) fn save(
    backend: &SourceBackend,
    uri: &Uri,
    options: &Options,
    progress: &Progress,
) -> Result<Report, Failure> {
    let account = Account::begin(backend, progress);
    let leave = Leave::new(progress, account.began);
    let mut saving = Saving {
        backend,
        options,
        progress,
        leave,
        began: account.began,
        paused_at: None,
        stood_still: None,
    };
    let result = block(caught_while(saving.run(uri)));
    let failure = result.err().map(|cause| saving.unwind(cause));
    // Nobody needs it any more, whether it stops or not.
    let _ = backend.log.stop();
    let stood_still = saving.stood_still.or(saving.paused_at.map(|at| clock::now() - at));
    account.end(progress, failure.as_ref(), stood_still.unwrap_or_default());
    failure.map_or_else(|| Ok(progress.report()), Err)
}

/// One attempt.
pub(super) struct Saving<'a> {
    pub(super) backend: &'a SourceBackend,
    pub(super) options: &'a Options,
    pub(super) progress: &'a Progress,
    pub(super) leave: Leave,
    began: Duration,
    /// The guest stands still by this.
    pub(super) paused_at: Option<Duration>,
    /// For how long it did, once it went on.
    stood_still: Option<Duration>,
}

impl Saving<'_> {
    /// The phases.
    async fn run(&mut self, uri: &Uri) -> Result<(), Cause> {
        match &self.backend.guest {
            // A guest that stands still is of one instant.
            Some(guest) if self.options.snapshot && !self.backend.paused => {
                self.run_snapshot(uri, &guest.clone()).await
            }
            _ => self.run_rounds(uri).await,
        }
    }

    /// Before anything is begun.
    pub(super) fn prepare(&self, uri: &Uri) -> Result<(), Cause> {
        self.check_options()?;
        self.options.tls.as_ref().map_or(Ok(()), |tls| tls.check(uri))?;
        crate::reserve::fill();
        let layout = self.backend.ram.layout();
        Ok(check_headroom(source_bytes(layout, self.options.streams, 0))?)
    }

    /// The phases of a save in rounds.
    async fn run_rounds(&mut self, uri: &Uri) -> Result<(), Cause> {
        self.prepare(uri)?;
        // After the log was started, so that no page falls between the two.
        self.backend.log.start()?;
        let scanning = clock::now();
        let populated = crate::engine::populated(&*self.backend.ram)?;
        let scanned = clock::now() - scanning;
        let base = self.base(uri)?;
        let header = self.header(&populated, base.as_ref())?;
        let archive = Arc::new(ArchiveWriter::create(uri, &header)?);
        self.foretell_room(&archive, header.data_bytes);
        let source = self.page_source(self.backend, PageHasher::new(header.seed), populated);
        Spent::add(&source.counters().spent.scan, scanned);
        if let Some((image, _)) = &base {
            base::keep_same(&source, &archive, image, &|_, _| Ok(()), &|| self.leave.check())?;
        }
        let env = Threads::default();
        let feeder = Feeder::new(source.clone(), self.options.streams);
        let mut watch = SaveWatch::start(&env, &archive, &source, self, &feeder)?;
        self.progress.update(|r| {
            r.status = Status::Active;
            r.streams = self.options.streams;
            r.setup_ms = (clock::now() - self.began).as_secs_f64() * 1e3;
        });
        let moved = caught_while(self.move_pages(&mut watch, &source, feeder)).await;
        if moved.is_err() {
            source.stop();
            archive.stop();
        }
        env.join();
        // A lane that failed was told what the system said, and the archive knows more.
        let state = match (moved, archive.take_error()) {
            (Ok(state), None) => state,
            (Err(cause @ (Cause::Cancelled | Cause::OutOfTime { .. })), _) | (Err(cause), None) => {
                return Err(cause);
            }
            (_, Some(error)) => return Err(error.into()),
        };
        watch.report();
        drop(watch);
        self.finish(archive, &state, source.carried_pages())
    }

    /// What cannot be where nobody answers.
    fn check_options(&self) -> Result<(), Cause> {
        let limits = self.progress.tuning().limits;
        let postcopy = self.options.postcopy_after_rounds.is_some();
        if postcopy || limits.on_timeout == OnTimeout::Postcopy {
            return Err(Cause::OneWay { what: "postcopy: no guest runs at the other end" });
        }
        if self.progress.tuning().pause_before_switchover {
            return Err(Cause::OneWay { what: "wait before a switchover: nothing is handed over" });
        }
        if self.options.codec == CodecMode::Delta {
            return Err(Cause::OneWay { what: "deltas: every frame of an archive stands for itself" });
        }
        Ok(())
    }

    /// The archive that this one is to stand on, and what it will say of it.
    pub(super) fn base(&self, uri: &Uri) -> Result<Option<(Image, Base)>, Cause> {
        let Some(path) = &self.options.base else { return Ok(None) };
        let Uri::File(to) = uri else {
            return Err(Cause::OneWay { what: "base unless it is a file, which is found beside its base" });
        };
        let image = Image::open(path, None)?;
        if image.layout() != self.backend.ram.layout() {
            let why = "it is of a guest with other memory".into();
            return Err(ArchiveError::Base { name: path.display().to_string(), why }.into());
        }
        let base = base::named(path, &image, to)?;
        Ok(Some((image, base)))
    }

    pub(super) fn header(
        &self,
        populated: &PageBitmap,
        base: Option<&(Image, Base)>,
    ) -> Result<Header, Cause> {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Header {
            version: VERSION,
            features: feature::ZSTD | if base.is_some() { feature::BASE } else { 0 },
            id: random()?,
            // Seals of both are compared.
            seed: match base {
                Some((image, _)) => image.header().seed,
                None => random().map(u64::from_le_bytes)?,
            },
            created,
            live: self.backend.guest.is_some(),
            data_bytes: populated.count() * PAGE_SIZE as u64,
            regions: self.backend.ram.layout().regions().to_vec(),
            machine: self.backend.machine.clone(),
            base: base.map(|(_, base)| base.clone()),
        })
    }

    /// Says where there may not be room enough; compressed it may fit all the same.
    pub(super) fn foretell_room(&self, archive: &ArchiveWriter, data_bytes: u64) {
        if let Some(room) = archive.room().filter(|&room| room < data_bytes) {
            tracing::warn!(
                room,
                data_bytes,
                "the archive takes up to {data_bytes} bytes, and its file system has room for {room}"
            );
        }
    }

    pub(super) fn page_source(
        &self,
        backend: &SourceBackend,
        hasher: PageHasher,
        populated: PageBitmap,
    ) -> Arc<PageSource> {
        let options = SourceOptions {
            references: false,
            streams: self.options.streams,
            codec: self.options.codec,
            cache_bytes: 0,
            timeout: Duration::MAX,
            mismatches_max: 0,
        };
        let SourceBackend { ram, log, .. } = backend.clone();
        self.progress.update(|r| r.pages.hole = ram.layout().pages() - populated.count());
        let source = PageSource::new(ram, log, hasher, options, populated);
        let source = source.sharing(self.options.shared.clone());
        if self.backend.paused {
            source.stands_still();
        }
        Arc::new(source)
    }

    /// Rounds, the last pages, and the state; the lanes end in order.
    async fn move_pages(
        &mut self,
        watch: &mut SaveWatch<'_>,
        source: &Arc<PageSource>,
        feeder: Feeder,
    ) -> Result<Vec<StateBlob>, Cause> {
        self.leave.begin(Doing::MovingPages);
        let (backend, progress) = (self.backend, self.progress);
        let rounds = rounds_without_a_peer(backend, progress, source, self.began, watch, &feeder).await?;
        self.leave.begin(Doing::SwitchingOver);
        let state = self.switch_over(watch, source, &feeder, rounds).await?;
        drop(feeder);
        watch.lanes_ended()?;
        match source.never_carried() {
            0 => Ok(state),
            pages => Err(crate::source::FatalError::NeverSent { pages }.into()),
        }
    }

    /// Pauses the guest, saves the last pages and its state.
    async fn switch_over(
        &mut self,
        watch: &mut SaveWatch<'_>,
        source: &Arc<PageSource>,
        feeder: &Feeder,
        rounds: u64,
    ) -> Result<Vec<StateBlob>, Cause> {
        let Some(guest) = &self.backend.guest else { return Ok(Vec::new()) };
        self.progress.update(|r| r.status = Status::Device);
        self.paused_at = Some(clock::now());
        guest.pause()?;
        source.hurry();
        let dirtied = feeder.sync(watch.waits(), || watch.check()).await?;
        feeder.settle(watch.waits(), || watch.check()).await?;
        let state = state::pieces(&**guest, u8::from(!self.backend.paused))?;
        watch.end_round(dirtied);
        self.progress.update(|r| r.rounds = rounds + 1);
        if self.options.resume_after_save && !self.backend.paused {
            // All that the archive will hold is in it.
            guest.resume()?;
            self.ran_on();
        }
        Ok(state)
    }

    /// The guest runs again.
    pub(super) fn ran_on(&mut self) {
        let stood_still = self.paused_at.take().map(|at| clock::now() - at);
        self.stood_still = told_downtime(self.progress, stood_still);
        let ms = stood_still.unwrap_or_default().as_secs_f64() * 1e3;
        self.progress.update(|r| r.downtime_ms = ms);
    }

    /// Ends the archive, and makes it durable.
    pub(super) fn finish(
        &self,
        archive: Arc<ArchiveWriter>,
        state: &[StateBlob],
        pages: u64,
    ) -> Result<(), Cause> {
        let archive = Arc::into_inner(archive).expect("its streams have ended, and those who watched them");
        let bytes = archive.finish(state, pages, &|| !self.leave.is_over())?;
        self.progress.update(|r| r.wire_bytes = bytes);
        Ok(())
    }

    /// Says who has the guest after a failure; one that this has paused runs on.
    fn unwind(&mut self, cause: Cause) -> Failure {
        let panicked = matches!(cause, Cause::Panicked { .. });
        let fate = match &self.backend.guest {
            None => Fate::Unmoved,
            Some(_) if self.backend.paused => Fate::StaysPaused,
            Some(guest) if (self.paused_at.is_some() || panicked) && guest.resume().is_err() => Fate::Stuck,
            Some(_) => Fate::RunsOn,
        };
        Failure { fate, cause }
    }
}

/// The lanes of an archive, and how their feeder waits.
pub(super) struct Threads {
    lanes: RefCell<Vec<Lane>>,
    ends: (Sender<LaneNews>, Receiver<LaneNews>),
}

impl Default for Threads {
    fn default() -> Self {
        Self { lanes: RefCell::default(), ends: unbounded() }
    }
}

impl Threads {
    /// Waits until all have ended.
    pub(super) fn join(&self) {
        self.lanes.take().into_iter().for_each(Lane::join);
    }
}

impl Waits for Threads {}

/// Looks at everything that may happen while pages move.
pub(super) struct SaveWatch<'a> {
    env: &'a Threads,
    source: Arc<PageSource>,
    progress: Progress,
    leave: Leave,
    began: Duration,
    reported: Duration,
    /// Lanes that have ended in order.
    ended: u16,
    streams: u16,
}

impl<'a> SaveWatch<'a> {
    /// Starts the lanes.
    pub(super) fn start(
        env: &'a Threads,
        archive: &Arc<ArchiveWriter>,
        source: &Arc<PageSource>,
        saving: &Saving<'_>,
        feeder: &Feeder,
    ) -> Result<Self, Cause> {
        let streams = saving.options.streams;
        for stream in 0..streams {
            let ends = env.ends.0.clone();
            let lane = Lane::start(source.clone(), archive.carrier(), stream, feeder.work(), ends);
            let lane = lane.inspect_err(|_| {
                source.stop();
                env.join();
            })?;
            env.lanes.borrow_mut().push(lane);
        }
        Ok(Self {
            env,
            source: source.clone(),
            progress: saving.progress.clone(),
            leave: saving.leave.clone(),
            began: saving.began,
            reported: saving.began,
            ended: 0,
            streams,
        })
    }

    /// Takes in that lanes have ended; any that did so out of order ends the save.
    fn take_ends(&mut self) -> Result<(), Cause> {
        while let Ok(news) = self.env.ends.1.try_recv() {
            self.take_end(news)?;
        }
        Ok(())
    }

    fn take_end(&mut self, news: LaneNews) -> Result<(), Cause> {
        if let LaneNews::Ended(end) = news {
            end.result.map_err(lane_error)?;
            self.ended += 1;
        }
        Ok(())
    }

    /// Waits until all lanes have ended in order.
    pub(super) fn lanes_ended(&mut self) -> Result<(), Cause> {
        while self.ended < self.streams {
            if let Ok(news) = self.env.ends.1.recv_timeout(REPORT_EVERY) {
                self.take_end(news)?;
            }
            self.check()?;
        }
        Ok(())
    }

    pub(super) fn report(&mut self) {
        self.reported = clock::now();
        let total = clock::now() - self.began;
        let remaining = self.source.remaining_bytes();
        let counters = self.source.counters();
        self.progress.update(|r| {
            r.count(counters);
            r.remaining_bytes = remaining;
            r.rates(total);
        });
    }
}

/// What a lane's end says of the whole.
fn lane_error(error: LaneError) -> Cause {
    match error {
        LaneError::Fatal { source, .. } => Cause::Fatal(source),
        LaneError::Io { source, .. } => Cause::System(source),
        other => Cause::System(std::io::Error::other(other.to_string())),
    }
}

impl<'a> Mover<'a> for SaveWatch<'a> {
    type Waits = Threads;

    fn waits(&self) -> &'a Threads {
        self.env
    }

    async fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn check(&mut self) -> Result<(), Cause> {
        self.leave.check()?;
        self.take_ends()?;
        if clock::now() - self.reported >= REPORT_EVERY {
            self.report();
        }
        Ok(())
    }

    fn end_round(&mut self, dirtied_pages: u64) {
        self.report();
        self.progress.end_round(dirtied_pages);
    }
}
