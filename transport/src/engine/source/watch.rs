//! What the source hears while it works: control messages, ends of streams, and requests to cancel.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Receiver;
use pagecopy::layout::Layout;

use super::environment::{Environment, Event, Opening, Patience};
use super::leave::{Doing, Leave};
use super::reopen::Reopening;
use super::{Cause, OPENING_MAX};
use crate::carrier::SourceEnd;
use crate::clock;
use crate::dial::OpenError;
use crate::engine::explain;
use crate::engine::progress::{Outage, Progress};
use crate::engine::report::Status;
use crate::link::LinkEvent;
use crate::postcopy::PostcopyError;
use crate::session::{Learnt, SessionError, SourceEvent, SourceSession, check_welcome};
#[cfg(test)]
use crate::simulation::fault;
use crate::source::{BaseSeals, Batch, LaneEnd, LaneError, PageSource, Unreceipted};
use crate::streams::{SourceStreams, StreamsError};
use crate::wire::control::{Message, SessionStatus, StreamEnd, Totals, Welcome, capability};
use crate::wire::{Role, SessionId};

/// How often somebody who waits looks at everything that may have happened.
pub(super) const TICK: Duration = Duration::from_millis(20);
/// How often the report that others see is renewed.
const REPORT_EVERY: Duration = Duration::from_millis(50);
/// How long the destination's last word may be under way after it was seen to be gone.
const LAST_WORD: Duration = Duration::from_millis(250);
/// How long a destination has to take the last message.
const FAREWELL: Duration = Duration::from_millis(500);

/// An attempt to open a stream that has ended.
type Opened = (u16, Result<SourceEnd, OpenError>, Duration);

pub(super) struct Watch<'a, E: Environment> {
    pub(super) env: &'a E,
    pub(super) session: SourceSession,
    pub(super) id: SessionId,
    pub(super) streams: SourceStreams<Unreceipted>,
    /// What new lanes take from; none while the streams are being ended.
    work: Option<Receiver<Batch>>,
    /// Attempts to open streams that have ended.
    opened: VecDeque<Opened>,
    /// Connects lost streams again, where the destination takes them.
    pub(super) reopening: Option<Reopening>,
    /// Connections of postcopy that have ended, and why.
    postcopy_ends: VecDeque<(u16, PostcopyError)>,
    /// What is sent goes nowhere.
    pub(super) link_lost: bool,
    /// How long what was lost may take to be connected again: zero where nothing is.
    pub(super) patience: Patience,
    reconnect_max: Duration,
    /// The guest is paused, or streams are being ended: none are waited for.
    hurried: bool,
    /// There is no stream, and the guest runs.
    pub(super) outage: Option<Outage>,
    /// FINISH was, or is about to be, said of pages that are on their way.
    in_flight: bool,
    /// What became of them, where they were lost.
    late_loss: Option<String>,
    /// Since when streams are lost without a receipt in between, and the bytes that had one.
    fruitless: Option<(Duration, u64)>,
    pub(super) progress: Progress,
    pub(super) leave: Leave,
    began: Duration,
    reported: Duration,
    source: Option<Arc<PageSource>>,
}

impl<'a, E: Environment> Watch<'a, E> {
    /// Connects the control link. Lost ones are to be connected again for `patience`, if the destination agrees.
    pub(super) async fn connect(
        env: &'a E,
        patience: Patience,
        progress: &Progress,
        leave: &Leave,
    ) -> Result<Self, Cause> {
        let (began, id) = (clock::now(), env.session_id()?);
        env.connect(Role::Control, id, patience.timeout, &|| leave.is_over()).await?;
        Ok(Self {
            env,
            session: SourceSession::new(),
            id,
            streams: SourceStreams::new(),
            work: None,
            opened: VecDeque::new(),
            reopening: None,
            postcopy_ends: VecDeque::new(),
            link_lost: false,
            patience: Patience { reconnect: Duration::ZERO, ..patience },
            reconnect_max: patience.reconnect,
            hurried: false,
            outage: None,
            in_flight: false,
            late_loss: None,
            fruitless: None,
            progress: progress.clone(),
            leave: leave.clone(),
            began,
            reported: began,
            source: None,
        })
    }

    pub(super) fn session_id(&self) -> SessionId {
        self.id
    }

    pub(super) fn owns_guest(&self) -> bool {
        self.session.owns_guest()
    }

    pub(super) fn send(&self, message: Message) {
        self.env.send(message);
    }

    /// Takes note of the data plane whose numbers the report shows.
    pub(super) fn observe(&mut self, source: Arc<PageSource>) {
        self.source = Some(source);
    }

    /// Waits for WELCOME, which must lie within what was offered, and PREPARED; returns besides what the destination has an older copy of.
    pub(super) async fn welcome(
        &mut self,
        streams: u16,
        capabilities: u64,
        layout: &Layout,
    ) -> Result<(Welcome, Option<BaseSeals>), Cause> {
        let (mut welcome, mut base) = (None::<Welcome>, None);
        let mut deadline = self.deadline();
        loop {
            if self.env.is_sending() {
                deadline = self.deadline();
            }
            if welcome.is_none() && clock::now() > deadline {
                return Err(self.overdue("WELCOME"));
            }
            match self.next_event().await? {
                SourceEvent::Welcome(w) => {
                    check_welcome(&w, streams, capabilities)?;
                    if w.capabilities & capability::RESUME != 0 {
                        self.patience.reconnect =
                            self.reconnect_max.min(Duration::from_millis(w.reconnect_ms.into()));
                    }
                    welcome = Some(w);
                }
                SourceEvent::Base(said) => {
                    if welcome.is_none_or(|w| w.capabilities & capability::BASE == 0) {
                        return Err(SessionError::NotOffered { what: "BASE".into() }.into());
                    }
                    let seals = match base.take() {
                        Some(seals) => seals,
                        None => BaseSeals::new(layout, said.seed)?,
                    };
                    base.insert(seals).add(&said, layout)?;
                }
                SourceEvent::Prepared => {
                    return Ok((welcome.expect("the session machine orders the two"), base));
                }
                _ => {}
            }
        }
    }

    /// Looks at everything that may have happened. Called often while pages move.
    pub(super) fn check(&mut self) -> Result<(), Cause> {
        self.leave.check()?;
        while let Some(event) = self.env.next() {
            self.on_event(event)?;
        }
        self.reopen()?;
        self.check_streams()?;
        if clock::now() - self.reported >= REPORT_EVERY {
            self.report();
        }
        Ok(())
    }

    /// Fails when there is no stream any more, and none in time.
    fn check_streams(&mut self) -> Result<(), Cause> {
        let now = clock::now() - self.began;
        let Some(last) = self.streams.all_lost(now) else {
            if self.streams.any_live()
                && let Some(outage) = self.outage.take()
            {
                outage.end(&self.progress);
                // Where nothing waits to be sent, no receipt is missed.
                if self.source.as_ref().is_some_and(|source| source.remaining_bytes() == 0) {
                    self.fruitless = None;
                }
            }
            return Ok(self.streams.check_stopped(now, self.patience.timeout)?);
        };
        let last: String = last.into();
        let lost = StreamsError::AllLost { last: last.clone() };
        if self.hurried || self.patience.reconnect.is_zero() {
            return Err(lost.into());
        }
        let progress = &self.progress;
        let outage = self.outage.get_or_insert_with(|| Outage::begin(progress, &explain(&lost)));
        outage.lasts(progress);
        // Nothing can be switched over without a stream.
        self.leave.check_while(Doing::Reconnecting)?;
        self.check_fruitless(last)?;
        Ok(self.streams.check_stopped(now, self.patience.timeout)?)
    }

    /// A stream was lost with frames that had no receipt. Fails when that has gone on for as long as connections are waited for, without a
    /// receipt on any stream in between: a path that lets itself be connected and carries nothing is no better than none.
    fn check_fruitless(&mut self, last: String) -> Result<(), Cause> {
        let acked = self.source.as_ref().map_or(0, |s| s.counters().wire_acked.load(Ordering::Relaxed));
        match self.fruitless {
            Some((since, before)) if before == acked => {
                let lasted = clock::now() - since;
                if lasted >= self.patience.reconnect {
                    let seconds = lasted.as_secs();
                    return Err(StreamsError::NothingArrives { seconds, last }.into());
                }
            }
            _ => self.fruitless = Some((clock::now(), acked)),
        }
        Ok(())
    }

    /// Begins the attempts to open lost streams again that are due; starts the streams that were opened.
    fn reopen(&mut self) -> Result<(), Cause> {
        let Some(work) = self.work.clone() else { return Ok(()) };
        let Some(reopening) = &mut self.reopening else { return Ok(()) };
        while let Some(id) = reopening.due() {
            // Before the attempt: the destination may say that the stream has stopped before this side knows that it was opened.
            self.streams.forget(id);
            if self.env.open(id).is_err() {
                // Out of threads, for now.
                reopening.on_opened(id, false);
            }
        }
        while let Some((id, end, _)) = self.opened.pop_front() {
            if let Some(reopening) = &mut self.reopening {
                reopening.on_opened(id, end.is_ok());
            }
            if let Ok(end) = end {
                self.start(end, id, work.clone())?;
                self.progress.update(|r| r.streams_reconnected += 1);
            }
        }
        Ok(())
    }

    /// Starts the lane of a stream that was opened.
    fn start(&mut self, end: SourceEnd, id: u16, work: Receiver<Batch>) -> Result<(), Cause> {
        let Some(source) = &self.source else { return Ok(()) };
        self.env.start_lane(source, end, id, work)?;
        #[cfg(test)]
        if fault::is(fault::Fault::EarlyStopForgotten) {
            self.streams.forget(id);
        }
        self.streams.started();
        Ok(())
    }

    /// Opens the streams with the numbers 0 to `streams` at the same time, for what takes long is the way there and back, and starts them.
    /// Lost ones are opened again from then on. Returns the shortest round trip that was seen.
    pub(super) async fn open_streams(
        &mut self,
        opening: &Opening,
        streams: u16,
        work: Receiver<Batch>,
    ) -> Result<Duration, Cause> {
        self.env.prepare_streams(opening, self.patience.timeout);
        if !self.patience.reconnect.is_zero() {
            // Also those that are lost before the last is open: they come again once pages move.
            self.reopening = Some(Reopening::new(streams));
        }
        let mut round_trip = Duration::MAX;
        let (mut begun, mut started) = (0, 0);
        let result = loop {
            while begun < streams && begun < started + OPENING_MAX {
                if let Err(error) = self.env.open(begun) {
                    break_all(self.env);
                    return Err(error.into());
                }
                begun += 1;
            }
            let mut result = self.check();
            while let Some((stream, end, took)) = self.opened.pop_front().filter(|_| result.is_ok()) {
                result = match end {
                    Ok(end) => {
                        started += 1;
                        round_trip = round_trip.min(took);
                        self.start(end, stream, work.clone())
                    }
                    Err(source) => Err(self.last_word(Cause::Stream { stream, source }).await),
                };
            }
            if result.is_err() || started == streams {
                break result;
            }
            self.env.wait().await;
        };
        if result.is_err() {
            // Nobody waits for the others.
            break_all(self.env);
        }
        result?;
        self.feed(work);
        Ok(round_trip)
    }

    /// Why a stream could not be opened. Where the destination is ending, it has said why on the control connection, which is the better
    /// reason.
    async fn last_word(&mut self, cause: Cause) -> Cause {
        let deadline = clock::now() + LAST_WORD;
        while clock::now() < deadline {
            match self.check() {
                Err(said @ (Cause::Session(_) | Cause::Cancelled)) => return said,
                Err(_) => return cause,
                Ok(()) => self.env.wait().await,
            }
        }
        cause
    }

    /// Pages move: lanes of streams that are opened from here on take from `work`.
    pub(super) fn feed(&mut self, work: Receiver<Batch>) {
        self.work = Some(work);
        (self.hurried, self.in_flight, self.late_loss) = (false, false, None);
    }

    /// The guest is paused: nobody waits for streams to come back.
    pub(super) fn hurry(&mut self) {
        self.hurried = true;
    }

    /// No stream is opened any more: those that there are will be ended.
    pub(super) fn close(&mut self) {
        self.work = None;
        self.hurried = true;
        self.env.give_up_opening();
        self.opened.clear();
        if let Some(reopening) = &mut self.reopening {
            reopening.stop();
        }
    }

    /// Breaks all streams, so that they end at once.
    pub(super) fn abort(&mut self) {
        self.close();
        self.env.abort_lanes();
    }

    /// Waits until all streams have ended.
    pub(super) async fn join(&mut self) {
        self.env.join_lanes().await;
    }

    /// Waits until every stream has ended, in order or dead on both sides; returns the accounts of the former.
    pub(super) async fn streams_ended(&mut self) -> Result<Vec<StreamEnd>, Cause> {
        while !self.streams.all_over() {
            self.env.wait().await;
            self.check()?;
        }
        Ok(self.streams.take_accounts())
    }

    /// Whether FINISH may be said while the last pages are on their way: where they are lost, or damaged, the session is resumed.
    pub(super) fn may_finish_in_flight(&self) -> bool {
        self.is_resumable()
    }

    /// Waits until every stream has sent all that it will, and its end, or is over; returns the accounts that they have or will have, if
    /// all arrives.
    pub(super) async fn streams_sent(&mut self) -> Result<Vec<StreamEnd>, Cause> {
        self.in_flight = true;
        while !self.streams.all_sent() {
            self.env.wait().await;
            self.check()?;
            self.check_flight()?;
        }
        Ok(self.streams.promised())
    }

    /// Fails where pages of the handover were lost on their way, or arrived other than they were sent.
    fn check_flight(&self) -> Result<(), Cause> {
        if !self.in_flight {
            return Ok(());
        }
        let damaged = self.source.as_ref().is_some_and(|source| source.has_pending());
        let damaged = damaged.then(|| "a receipt does not fit".to_owned());
        let stopped =
            self.streams.stopped_in_flight().map(|why| format!("the destination stopped a stream: {why}"));
        match self.late_loss.clone().or(stopped).or(damaged) {
            Some(last) => Err(StreamsError::LateLoss { last }.into()),
            None => Ok(()),
        }
    }

    /// FINISH; waits for READY, and for what is still on its way. With a paused guest not for ever: `bounded`.
    pub(super) async fn finish(&mut self, totals: Totals, bounded: bool) -> Result<(), Cause> {
        let finish = self.session.finish(totals);
        self.send(finish);
        #[cfg(test)]
        if fault::is(fault::Fault::GoBeforeReady) {
            return Ok(());
        }
        let mut deadline = self.deadline();
        let (mut ready, mut acked) = (false, 0);
        while !ready || (self.in_flight && !self.streams.all_over()) {
            ready |= self.next_event().await? == SourceEvent::Ready;
            self.check_flight()?;
            let now_acked =
                self.source.as_ref().map_or(0, |s| s.counters().wire_acked.load(Ordering::Relaxed));
            if self.env.is_sending() || now_acked != acked {
                // A long STATE and many pages take their time on a slow path; links and streams end by themselves where nothing of it is
                // taken.
                (deadline, acked) = (self.deadline(), now_acked);
            }
            // Streams end by themselves where nothing comes.
            if bounded && !ready && clock::now() > deadline {
                return Err(self.overdue("READY"));
            }
        }
        self.check_flight()
    }

    /// The destination lives and does not answer.
    fn overdue(&self, message: &'static str) -> Cause {
        Cause::Overdue { message, seconds: self.patience.timeout.as_secs() }
    }

    /// When something that is asked for now is overdue.
    fn deadline(&self) -> Duration {
        clock::now() + self.patience.timeout
    }

    /// GO: see [`SourceSession::go`].
    pub(super) fn go(&mut self) {
        let go = self.session.go();
        self.send(go);
    }

    /// Waits for RUNNING. Not to be cancelled any more.
    pub(super) async fn running(&mut self) -> Result<(), Cause> {
        let deadline = self.deadline();
        while self.event_after_go().await? != SourceEvent::Running {
            if clock::now() > deadline {
                return Err(self.overdue("RUNNING"));
            }
        }
        Ok(())
    }

    /// POSTCOPY; waits for the destination to be ready for it. Returns how many chunks it brings in at a time, or 0.
    pub(super) async fn postcopy(&mut self) -> Result<u32, Cause> {
        let postcopy = self.session.postcopy();
        self.send(postcopy);
        let deadline = self.deadline();
        loop {
            if let SourceEvent::PostcopyReady { unit_chunks } = self.next_event().await? {
                return Ok(unit_chunks);
            }
            if clock::now() > deadline {
                return Err(self.overdue("POSTCOPY_READY"));
            }
        }
    }

    /// The next event after GO, which nobody can cancel, or nothing for a moment.
    pub(super) async fn event_after_go(&mut self) -> Result<SourceEvent, Cause> {
        self.env.wait().await;
        self.env.next().map_or(Ok(SourceEvent::Nothing), |event| self.on_event(event))
    }

    /// Takes a query connection for the control link that was lost; the destination says on it that it runs the guest. Says GO again
    /// where that did not arrive. Nothing is said any more once it is given up.
    pub(super) async fn relink(&mut self, given_up: &dyn Fn() -> bool) -> Result<(), Cause> {
        self.env.connect(Role::Query, self.id, self.patience.timeout, given_up).await?;
        let deadline = self.deadline();
        // Pings alone are no answer: the destination's network lives longer than its session may.
        while clock::now() < deadline {
            if given_up() {
                return Err(Cause::Cancelled);
            }
            let status = match self.env.next() {
                Some(Event::Link(LinkEvent::Message(Message::Status(status)))) => status,
                Some(Event::Link(LinkEvent::Message(Message::Running))) => SessionStatus::Running,
                Some(Event::Link(LinkEvent::Message(Message::Error { code, text }))) => {
                    let peer = "destination";
                    return Err(SessionError::Peer { peer, code, text }.into());
                }
                Some(Event::Link(LinkEvent::Message(_))) => continue,
                Some(Event::Link(LinkEvent::Dead(error))) => return Err(error.into()),
                Some(other) => {
                    self.on_event(other)?;
                    continue;
                }
                None => {
                    self.env.wait().await;
                    continue;
                }
            };
            match self.session.learn(status) {
                Learnt::Running => {
                    self.link_lost = false;
                    // Lets the destination know that it is known; if this is lost, it only waits longer.
                    self.send(Message::Running);
                    return Ok(());
                }
                Learnt::SayGoAgain => self.send(Message::Go),
                Learnt::Abandoned => return Err(self.hear_abandoned()),
                Learnt::Unknown => return Err(self.overdue("that it runs the guest")),
            }
        }
        Err(self.overdue("STATUS"))
    }

    /// The destination never runs the guest. Lets it know that it is known; if this is lost, it only waits longer.
    fn hear_abandoned(&self) -> Cause {
        self.send(Message::Status(SessionStatus::Abandoned));
        self.env.flush(FAREWELL);
        Cause::Abandoned
    }

    /// Tells the destination why, unless it was the one to say so.
    pub(super) fn say_error(&self, cause: &Cause) {
        if !self.session.owns_guest() {
            return;
        }
        if self.link_lost && !self.patience.reconnect.is_zero() && !matches!(cause, Cause::Session(_)) {
            self.say_error_later(cause);
        } else {
            self.send(Message::Error { code: cause.code(), text: explain(cause) });
        }
    }

    /// Renews the report that others see.
    pub(super) fn report(&mut self) {
        self.reported = clock::now();
        let Some(source) = &self.source else { return };
        let counters = source.counters();
        let remaining = source.remaining_bytes();
        let total = clock::now() - self.began;
        let paused_ms = source.paused().as_secs_f64() * 1e3;
        self.progress.update(|r| {
            r.count(counters);
            r.paused_ms = paused_ms;
            r.remaining_bytes = remaining;
            if matches!(r.status, Status::Setup | Status::Active | Status::Device | Status::Reconnecting) {
                r.rates(total);
            }
        });
    }

    /// A round has ended, by whose sync so many pages were found dirty.
    pub(super) fn end_round(&mut self, dirtied_pages: u64) {
        self.report();
        self.progress.end_round(dirtied_pages);
    }

    /// The next event of the session, or nothing for a moment, while pages do not move.
    pub(super) async fn next_event(&mut self) -> Result<SourceEvent, Cause> {
        self.leave.check()?;
        self.event_after_go().await
    }

    /// Takes in what has happened; returns what it means to the session.
    fn on_event(&mut self, event: Event) -> Result<SourceEvent, Cause> {
        match event {
            Event::Link(event) => return self.on_link(event),
            Event::LaneSent(account) => self.streams.sent(account),
            Event::LaneEnd(end) => self.on_lane_end(end)?,
            Event::Opened { id, end, took } => self.opened.push_back((id, end, took)),
            Event::PostcopyEnd(end) => self.postcopy_ends.push_back((end.stream, end.error)),
        }
        Ok(SourceEvent::Nothing)
    }

    /// Takes in that lanes have ended; whatever else was heard is of connections that are lost.
    pub(super) fn take_lane_ends(&mut self) -> Result<(), Cause> {
        while let Some(event) = self.env.next() {
            if let Event::LaneEnd(end) = event {
                self.on_lane_end(end)?;
            }
        }
        Ok(())
    }

    /// Connections of postcopy that have ended since, and why.
    pub(super) fn take_postcopy_ends(&mut self) -> VecDeque<(u16, PostcopyError)> {
        std::mem::take(&mut self.postcopy_ends)
    }

    fn on_link(&mut self, event: LinkEvent) -> Result<SourceEvent, Cause> {
        let message = match event {
            LinkEvent::Message(message) => message,
            LinkEvent::Dead(error) => {
                self.link_lost = true;
                return Err(error.into());
            }
        };
        let event = self.session.handle(message)?;
        match &event {
            SourceEvent::Reply(reply) => self.send(reply.clone()),
            SourceEvent::Abandoned => return Err(self.hear_abandoned()),
            SourceEvent::StreamStopped { stream, reason } => {
                let frames = self.streams.stopped(*stream, reason.clone());
                self.take_back(frames);
            }
            _ => {}
        }
        Ok(event)
    }

    fn on_lane_end(&mut self, end: LaneEnd) -> Result<(), Cause> {
        match end.result {
            Ok(account) => self.streams.ended(account),
            Err(LaneError::Fatal { source, .. }) => return Err(source.into()),
            Err(error) => {
                self.progress.update(|r| r.streams_lost += 1);
                if self.in_flight {
                    // The session is resumed, which ends every stream: nothing is said of this one.
                    self.late_loss.get_or_insert_with(|| explain(&error));
                } else {
                    self.send(Message::StreamLost { stream: end.stream });
                }
                let now = clock::now() - self.began;
                let waited = !end.unreceipted.is_empty();
                let last = explain(&error);
                let frames = self.streams.died(end.stream, last.clone(), end.unreceipted, now);
                self.take_back(frames);
                if waited && !self.patience.reconnect.is_zero() {
                    self.check_fruitless(last)?;
                }
            }
        }
        Ok(())
    }

    /// Frames of streams that are dead on both sides: their pages are dirty again, and any stream may take them. Both sides' reports
    /// count what that costs.
    pub(super) fn take_back(&mut self, frames: Vec<Unreceipted>) {
        for stream in self.streams.take_buried() {
            if let Some(reopening) = &mut self.reopening {
                reopening.lost(stream);
            }
        }
        let bytes: u64 = frames.iter().map(Unreceipted::wire_bytes).sum();
        if let Some(source) = &self.source {
            source.take_back(frames);
        }
        if bytes != 0 {
            self.progress.update(|r| r.resent_bytes += bytes);
            // After FINISH nothing is said of pages; once the session is resumed, this is.
            if !self.in_flight {
                self.say_resent();
            }
        }
    }

    /// Tells the destination's report, too.
    pub(super) fn say_resent(&mut self) {
        let bytes = self.progress.report().resent_bytes;
        if bytes != 0 && !self.patience.reconnect.is_zero() {
            self.send(Message::Resent { bytes });
        }
    }
}

/// Gives up all streams, those that are open and those that are being opened.
fn break_all(env: &impl Environment) {
    env.give_up_opening();
    env.abort_lanes();
}

impl<E: Environment> Drop for Watch<'_, E> {
    fn drop(&mut self) {
        self.report();
        // A link that is lost takes nothing any more.
        if !self.link_lost {
            self.env.flush(FAREWELL);
        }
    }
}
