//! Postcopy at the source: the guest is handed over before all its pages are there, and they follow.
//!
//! Until GO it is like any switchover: whatever fails, the guest runs on here. From GO on its newest state is at the destination,
//! and nothing brings it back; but its memory is here, so this side keeps every page, and opens lost connections again for as long
//! as it takes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::clock;
use crate::postcopy::{PageServer, PostcopyError, ServerOptions};
use crate::session::{SessionError, SourceEvent};
#[cfg(test)]
use crate::simulation::fault;
use crate::source::{Feeder, SourceOptions};
use crate::wire::SessionId;
use crate::wire::control::{Arrived, MISSING_RUNS_MAX, Message, StreamEnd, Totals, Welcome, capability};
use pagecopy::backend::{Guest, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::choose::CodecMode;
use pagecopy::digest::PageHasher;

use super::environment::Environment;
use super::watch::Watch;
use super::{Attempt, Cause, state, told_downtime};
use crate::engine::progress::{Phase, Progress};
use crate::engine::report::{Postcopy, Status};
use crate::engine::{explain, populated};

/// Pause before lost connections are opened again; doubled from one attempt to the next.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Most connections for what nobody asks for; more only queue on the same path.
const PUSHING_MAX: u16 = 4;

/// The connections that serve missing pages. Dropping it ends them.
pub(super) struct Service<'a, E: Environment> {
    env: &'a E,
    server: Arc<PageServer>,
    /// Those that are open.
    open: BTreeSet<u16>,
    session: SessionId,
    version: u16,
    /// How many connections there are to be.
    wanted: u16,
    timeout: Duration,
    reconnects: u64,
}

impl<E: Environment> Service<'_, E> {
    fn start(&mut self, stream: u16, connection: E::Postcopy) -> Result<(), Cause> {
        self.env.start_postcopy(&self.server, connection, stream)?;
        self.open.insert(stream);
        Ok(())
    }

    /// Forgets connections that have ended; returns why the last one did.
    fn bury(&mut self, watch: &mut Watch<'_, E>) -> Option<PostcopyError> {
        let mut last = None;
        for (stream, error) in watch.take_postcopy_ends() {
            self.open.remove(&stream);
            last = Some(error);
        }
        last
    }

    /// None of them can be trusted: one that is dead and idle would never tell.
    fn break_all(&mut self) {
        self.env.end_postcopy();
        self.open.clear();
    }

    fn is_whole(&self) -> bool {
        self.open.len() == usize::from(self.wanted)
    }

    /// Opens what is not open.
    async fn reopen(&mut self) -> Result<(), Cause> {
        for stream in 0..self.wanted {
            if !self.open.contains(&stream) {
                let (session, version, timeout) = (self.session, self.version, self.timeout);
                let connection = self.env.dial_postcopy(session, version, stream, timeout, &|| false).await?;
                self.start(stream, connection)?;
            }
        }
        Ok(())
    }
}

impl<E: Environment> Drop for Service<'_, E> {
    fn drop(&mut self) {
        self.server.stop();
        self.env.end_postcopy();
    }
}

impl<E: Environment> Attempt<'_, E> {
    /// Hands the guest over with the pages that are there, and serves the others until the destination has all.
    pub(super) async fn postcopy(&mut self, feeder: Feeder, rounds: u64) -> Result<(), Cause> {
        let Some(guest) = self.backend.guest.clone() else {
            return Err(Cause::NoPostcopy { needed_by: None });
        };
        let (env, timeout) = (self.env, self.options.timeout);
        let running = self.running.as_mut().expect("set before any phase that needs it");
        let welcome = running.welcome;
        if welcome.capabilities & capability::POSTCOPY == 0 {
            return Err(Cause::NoPostcopy { needed_by: None });
        }
        // While the guest still runs: what is under way arrives, the streams end in order, and others are opened.
        let unit_chunks = running.watch.postcopy().await?;
        running.watch.close();
        drop(feeder);
        let streams = running.watch.streams_ended().await?;
        let given_up = || self.leave.is_over();
        let connections = dial_all(env, running.watch.session_id(), &welcome, timeout, &given_up)
            .await
            .inspect_err(|_| {
                self.undialled.get_or_insert_with(clock::now);
            })?;
        self.undialled = None;
        let hasher = running.source.hasher().clone();
        let options = server_options(running.source.options(), &welcome);
        let (totals, server) = self.leave(&guest, streams, unit_chunks, hasher, options, rounds)?;
        let running = self.running.as_mut().expect("as above");
        // Of a handover that was taken back.
        running.watch.take_postcopy_ends();
        let service = running.postcopy.insert(Service {
            env,
            server,
            open: BTreeSet::new(),
            session: running.watch.session_id(),
            version: welcome.version,
            wanted: connections.len() as u16,
            timeout,
            reconnects: 0,
        });
        let mut tuned = u64::MAX;
        tune(self.progress, &service.server, &mut tuned);
        let mut connections = (0..).zip(connections);
        // The one for requests before GO already: whatever waits at the destination for a page then gets it.
        if let Some((stream, connection)) = connections.next() {
            service.start(stream, connection)?;
        }
        running.watch.finish(totals, true).await?;
        let unheard = self.say_go(Phase::Postcopy).await?;
        if unheard.is_none() {
            self.downtime = told_downtime(self.progress, self.stood_still());
        }
        let running = self.running.as_mut().expect("as above");
        if let Some(service) = &mut running.postcopy {
            for (stream, connection) in connections {
                // Past GO nothing ends this: what cannot be started now is opened again.
                let _ = service.start(stream, connection);
            }
        }
        self.serve(unheard).await
    }

    /// Pauses the guest; says what is missing at the destination, and the guest's state.
    fn leave(
        &mut self,
        guest: &Arc<dyn Guest>,
        streams: Vec<StreamEnd>,
        unit_chunks: u32,
        hasher: PageHasher,
        options: ServerOptions,
        rounds: u64,
    ) -> Result<(Totals, Arc<PageServer>), Cause> {
        let ran = u8::from(!self.backend.paused);
        self.progress.update(|r| (r.status, r.rounds) = (Status::Device, rounds + 1));
        self.paused_at = Some(clock::now());
        guest.pause()?;
        let ram = self.backend.ram.clone();
        let (_, source) = self.parts();
        source.dirty_sync()?;
        let (missing, holes) = missing_pages(&*ram, source.missing(), unit_chunks)?;
        let all = PageBitmap::new(missing.chunks());
        missing.iter().for_each(|(chunk, pages)| {
            all.insert(chunk, pages);
        });
        let pages = source.carried_pages_without(&missing);
        #[cfg(test)]
        let pages = if fault::is(fault::Fault::MissingCarried) { source.carried_pages() } else { pages };
        let server = PageServer::new(ram, hasher, missing, holes, unit_chunks, options);
        let server = server.sharing(self.options.shared.clone());
        self.running.as_mut().expect("set before any phase that needs it").missing = Some(all);
        let (watch, _) = self.parts();
        for runs in server.runs().chunks(MISSING_RUNS_MAX) {
            watch.send(Message::Missing(runs.to_vec()));
        }
        let (state, digest) = state::save(&**guest, ran)?;
        let totals = Totals { streams, pages, state: digest };
        watch.send(state);
        Ok((totals, Arc::new(server)))
    }

    /// GO was not said, and will not be before pages have moved again: what the destination may have taken away waits like anything else.
    pub(super) fn take_postcopy_back(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.postcopy = None;
        if let Some(missing) = running.missing.take() {
            running.source.give_back(&missing);
        }
    }

    /// Serves pages until the destination misses none. After GO: it does not give up by itself, and nobody ends it. Where RUNNING was not
    /// heard, it asks what came of GO meanwhile, for the guest may need its pages already.
    pub(super) async fn serve(&mut self, unheard: Option<Cause>) -> Result<(), Cause> {
        let (env, progress, began) = (self.env, self.progress, clock::now());
        #[cfg(test)]
        let unheard = self.ask_instead(unheard).await?;
        let (paused_at, way) = (self.paused_at, self.way());
        let stood_still = || paused_at.map(|at| (clock::now() - at).saturating_sub(way));
        let running = self.running.as_mut().expect("set before any phase that needs it");
        let service = running.postcopy.as_mut().expect("set before GO");
        let watch = &mut running.watch;
        let (mut linked, mut said, mut unlinked) = (unheard.is_none(), false, began);
        // Whether the destination is known to run the guest.
        let mut known = linked;
        if let Some(cause) = unheard {
            progress.update(|r| (r.status, r.error) = (Status::Unknown, Some(explain(&cause))));
        }
        let mut trying = Trying { pause: PAUSE_MIN, next: clock::now() };
        let mut tuned = u64::MAX;
        loop {
            tune(progress, &service.server, &mut tuned);
            match watch.event_after_go().await {
                Ok(SourceEvent::Arrived(arrived)) => {
                    // The last word, as after any handover: nobody will ask after the session any more.
                    watch.send(Message::Running);
                    report(progress, service, began, Some(arrived));
                    progress.update(|r| r.error = None);
                    return Ok(());
                }
                Ok(SourceEvent::Running) => {
                    // It came late.
                    (linked, known) = (true, true);
                    self.downtime = told_downtime(progress, stood_still());
                    watch.send(Message::Running);
                    progress.update(|r| r.error = None);
                }
                Ok(_) => {}
                Err(Cause::Abandoned) => return Err(Cause::Abandoned),
                // The destination has failed with the guest. One that never ran it is asked for another word.
                Err(cause @ Cause::Session(SessionError::Peer { .. })) if known => return Err(cause),
                Err(cause) if linked => {
                    // A new link knows nothing of what was said on this one.
                    (linked, said, unlinked) = (false, false, clock::now());
                    service.break_all();
                    progress.update(|r| r.error = Some(explain(&cause)));
                }
                Err(_) => env.sleep(Duration::from_millis(10)).await,
            }
            if let Some(error) = service.bury(watch) {
                progress.update(|r| r.error = Some(explain(&error)));
            }
            if let Some(other) = progress.take_recovery() {
                env.set_address(other);
                trying.next = clock::now();
            }
            if (!linked || !service.is_whole()) && clock::now() >= trying.next {
                match reconnect(watch, service, &mut linked).await {
                    // It never ran it, and never will: no page is needed there.
                    Err(Cause::Abandoned) => return Err(Cause::Abandoned),
                    result => trying.on_result(progress, result),
                }
                if linked && !known {
                    known = true;
                    self.downtime = told_downtime(progress, stood_still());
                }
            }
            let delivered = service.server.left() == 0;
            if delivered && known && !linked && clock::now() - unlinked > self.options.timeout {
                // Every page was placed and receipted: the guest needs nothing more, whether its host says so or not.
                report(progress, service, began, None);
                progress.update(|r| r.error = None);
                return Ok(());
            }
            if linked && !said && delivered {
                said = true;
                watch.send(Message::Sent { pages: service.server.total() });
            }
            let status = status_of(known, linked && !service.open.is_empty());
            progress.update(|r| r.status = status);
            report(progress, service, began, None);
        }
    }

    /// Broken on purpose: asks what came of GO without serving pages meanwhile.
    #[cfg(test)]
    async fn ask_instead(&mut self, unheard: Option<Cause>) -> Result<Option<Cause>, Cause> {
        match unheard {
            Some(cause) if fault::is(fault::Fault::AskingEndsService) => self.ask(cause).await.map(|()| None),
            other => Ok(other),
        }
    }
}

/// What the report says of a source that serves pages, or cannot now.
fn status_of(known: bool, serves: bool) -> Status {
    match serves {
        _ if !known => Status::Unknown,
        true => Status::PostcopyActive,
        false => Status::PostcopyPaused,
    }
}

/// When lost connections are opened again.
struct Trying {
    pause: Duration,
    next: Duration,
}

impl Trying {
    /// Takes note of an attempt. Whatever it came to may change, also that somebody else answers at the address.
    fn on_result(&mut self, progress: &Progress, result: Result<(), Cause>) {
        match result {
            Ok(()) => {
                self.pause = PAUSE_MIN;
                progress.update(|r| r.error = None);
            }
            Err(cause) => {
                progress.update(|r| r.error = Some(explain(&cause)));
                self.next = clock::now() + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Opens what was lost: the control link first, for it tells whether the destination lives.
async fn reconnect<E: Environment>(
    watch: &mut Watch<'_, E>,
    service: &mut Service<'_, E>,
    linked: &mut bool,
) -> Result<(), Cause> {
    if !*linked {
        watch.relink(&|| false).await?;
        *linked = true;
    }
    service.reopen().await?;
    service.reconnects += 1;
    Ok(())
}

/// Keeps to the limit of bandwidth as it is now.
fn tune(progress: &Progress, server: &PageServer, seen: &mut u64) {
    if let Some(tuning) = progress.tuned_since(seen) {
        server.limit_bandwidth(tuning.bandwidth);
        progress.update(|r| r.bandwidth_limit = tuning.bandwidth);
    }
}

/// How pages are sent over so many connections: as in precopy, as far as the destination can decode it.
fn server_options(precopy: &SourceOptions, welcome: &Welcome) -> ServerOptions {
    let encoded = welcome.capabilities & capability::SEALED == capability::SEALED;
    ServerOptions { timeout: precopy.timeout, codec: if encoded { precopy.codec } else { CodecMode::Raw } }
}

/// Opens the connection for requests, and those for everything else.
async fn dial_all<E: Environment>(
    env: &E,
    session: SessionId,
    welcome: &Welcome,
    timeout: Duration,
    given_up: &dyn Fn() -> bool,
) -> Result<Vec<E::Postcopy>, Cause> {
    // More of them than cores only keep each other, and faults, from running.
    let cores =
        std::thread::available_parallelism().map_or(1, |cores| cores.get().try_into().unwrap_or(PUSHING_MAX));
    let mut connections = Vec::new();
    for stream in 0..=welcome.streams.min(PUSHING_MAX).min(cores) {
        connections.push(env.dial_postcopy(session, welcome.version, stream, timeout, given_up).await?);
    }
    Ok(connections)
}

/// Adds to missing pages what comes in with them, and says which of all are holes here.
fn missing_pages(
    ram: &dyn GuestRam,
    missing: PageBitmap,
    unit_chunks: u32,
) -> Result<(PageBitmap, PageBitmap), Cause> {
    let holes = PageBitmap::new(missing.chunks());
    if unit_chunks != 0 {
        PageServer::whole_units(&missing, ram.layout(), unit_chunks);
        let data = populated(ram)?;
        for (chunk, pages) in missing.iter() {
            holes.insert(chunk, pages & !data.get(chunk));
        }
    }
    Ok((missing, holes))
}

/// Shows others how it goes.
fn report(
    progress: &Progress,
    service: &Service<'_, impl Environment>,
    began: Duration,
    arrived: Option<Arrived>,
) {
    let server = &service.server;
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let counters = server.counters();
    let (total, left, elapsed) = (server.total(), server.left(), (clock::now() - began).as_secs_f64());
    let page = pagecopy::layout::PAGE_SIZE as u64;
    progress.update(|r| {
        let before = r.postcopy.take().unwrap_or_default();
        let drain_ms = if left == 0 && before.pages_left == 0 && before.pages != 0 {
            before.drain_ms
        } else {
            elapsed * 1e3
        };
        r.remaining_bytes = left * page;
        r.postcopy = Some(Postcopy {
            pages: total,
            pages_left: left,
            // The destination's word on waits comes at the end; until then, what was asked for here.
            faults: arrived.map_or(get(&counters.requests), |arrived| arrived.faults),
            fault_p50_us: arrived.map(|arrived| arrived.p50_us),
            fault_p99_us: arrived.map(|arrived| arrived.p99_us),
            blocked_ms: arrived.map(|arrived| arrived.blocked_us as f64 / 1e3),
            zero: get(&counters.zero),
            compressed: get(&counters.compressed),
            raw: get(&counters.raw),
            wire_bytes: get(&counters.wire),
            logical_bytes: (total - left) * page,
            drain_ms,
            drain_mib_s: ((total - left) * page) as f64 / (drain_ms / 1e3).max(1e-6) / f64::from(1 << 20),
            resent: get(&counters.taken_back),
            damaged: get(&counters.mismatches),
            reconnects: service.reconnects,
            ..Postcopy::default()
        });
    });
}
