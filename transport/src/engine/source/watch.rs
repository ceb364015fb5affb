//! What the source hears while it works: control messages, ends of streams, and requests to cancel.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::carrier::SourceEnd;
use crate::link::{Link, LinkError, LinkEvent};
use crate::session::{Learnt, SessionError, SourceEvent, SourceSession, check_welcome};
use crate::source::{Batch, Lane, LaneEnd, LaneError, PageSource, Unreceipted};
use crate::streams::{SourceStreams, StreamsError};
use crate::uri::Uri;
use crate::wire::control::{Message, SessionStatus, StreamEnd, Totals, Welcome, capability};
use crate::wire::{Role, SessionId};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use tokio::runtime::Runtime;

use super::leave::{Doing, Leave};
use super::reopen::{Opener, Reopening};
use super::resume::connect;
use super::{Cause, random};
use crate::engine::progress::{Outage, Progress};
use crate::engine::report::{Similar, Status};
use crate::engine::{Options, explain};

/// How often somebody who waits looks at everything that may have happened.
pub(super) const TICK: Duration = Duration::from_millis(20);
/// How often the report that others see is renewed.
const REPORT_EVERY: Duration = Duration::from_millis(50);
/// How long a destination has to take the last message.
const FAREWELL: Duration = Duration::from_millis(500);

pub(super) struct Watch {
    pub(super) session: SourceSession,
    pub(super) id: SessionId,
    pub(super) link: Link,
    pub(super) inbox: Receiver<LinkEvent>,
    pub(super) streams: SourceStreams<Unreceipted>,
    pub(super) lane_ends: (Sender<LaneEnd>, Receiver<LaneEnd>),
    /// All that were started and have not ended.
    lanes: Vec<Lane>,
    /// What new lanes take from; none while the streams are being ended.
    work: Option<Receiver<Batch>>,
    /// Connects lost streams again, where the destination takes them.
    pub(super) reopening: Option<Reopening>,
    /// What is sent goes nowhere.
    pub(super) link_lost: bool,
    /// How long what was lost may take to be connected again; zero where nothing is.
    pub(super) reconnect: Duration,
    reconnect_max: Duration,
    /// The guest is paused, or streams are being ended: none are waited for.
    hurried: bool,
    /// There is no stream, and the guest runs.
    pub(super) outage: Option<Outage>,
    /// Since when streams are lost without a receipt in between, and the bytes that had one.
    fruitless: Option<(Instant, u64)>,
    pub(super) progress: Progress,
    pub(super) leave: Leave,
    began: Instant,
    reported: Instant,
    pub(super) timeout: Duration,
    source: Option<Arc<PageSource>>,
    /// Last, so that the link's task outlives what uses it.
    pub(super) runtime: Runtime,
}

impl Watch {
    /// Connects the control link.
    pub(super) fn connect(
        uri: &Uri,
        options: &Options,
        progress: &Progress,
        leave: &Leave,
    ) -> Result<Self, Cause> {
        let began = Instant::now();
        let id = random()?;
        let connection = connect(uri, Role::Control, id, options.timeout, &|| leave.is_over())?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (deliver, inbox) = unbounded();
        let link = Link::spawn(runtime.handle(), connection, options.timeout, deliver, |event| event)?;
        Ok(Self {
            session: SourceSession::new(),
            id,
            link,
            inbox,
            streams: SourceStreams::new(),
            lane_ends: unbounded(),
            lanes: Vec::new(),
            work: None,
            reopening: None,
            link_lost: false,
            reconnect: Duration::ZERO,
            reconnect_max: options.reconnect_timeout,
            hurried: false,
            outage: None,
            fruitless: None,
            progress: progress.clone(),
            leave: leave.clone(),
            began,
            reported: began,
            timeout: options.timeout,
            source: None,
            runtime,
        })
    }

    pub(super) fn session_id(&self) -> SessionId {
        self.id
    }

    pub(super) fn owns_guest(&self) -> bool {
        self.session.owns_guest()
    }

    pub(super) fn send(&self, message: Message) {
        self.link.send(message);
    }

    /// Takes note of the data plane whose numbers the report shows.
    pub(super) fn observe(&mut self, source: Arc<PageSource>) {
        self.source = Some(source);
    }

    /// Waits for WELCOME, which must lie within what was offered, and PREPARED.
    pub(super) fn welcome(&mut self, streams: u16, capabilities: u64) -> Result<Welcome, Cause> {
        let mut welcome = None;
        let mut deadline = Instant::now() + self.timeout;
        loop {
            if self.link.is_sending() {
                deadline = Instant::now() + self.timeout;
            }
            if welcome.is_none() && Instant::now() > deadline {
                return Err(self.overdue("WELCOME"));
            }
            match self.next_event()? {
                SourceEvent::Welcome(w) => {
                    check_welcome(&w, streams, capabilities)?;
                    if w.capabilities & capability::RESUME != 0 {
                        self.reconnect = self.reconnect_max.min(Duration::from_millis(w.reconnect_ms.into()));
                    }
                    welcome = Some(w);
                }
                SourceEvent::Prepared => return Ok(welcome.expect("the session machine orders the two")),
                _ => {}
            }
        }
    }

    /// Looks at everything that may have happened. Called often while pages move.
    pub(super) fn check(&mut self) -> Result<(), Cause> {
        self.leave.check()?;
        while let Ok(event) = self.inbox.try_recv() {
            self.on_link(event)?;
        }
        while let Ok(end) = self.lane_ends.1.try_recv() {
            self.on_lane_end(end)?;
        }
        self.reopen()?;
        self.check_streams()?;
        if self.reported.elapsed() >= REPORT_EVERY {
            self.report();
        }
        Ok(())
    }

    /// Fails when there is no stream any more, and none in time.
    fn check_streams(&mut self) -> Result<(), Cause> {
        let now = self.began.elapsed();
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
            return Ok(self.streams.check_stopped(now, self.timeout)?);
        };
        let last: String = last.into();
        let lost = StreamsError::AllLost { last: last.clone() };
        if self.hurried || self.reconnect.is_zero() {
            return Err(lost.into());
        }
        let progress = &self.progress;
        let outage = self.outage.get_or_insert_with(|| Outage::begin(progress, &explain(&lost)));
        outage.lasts(progress);
        // Nothing can be switched over without a stream.
        self.leave.check_while(Doing::Reconnecting)?;
        self.check_fruitless(last)?;
        Ok(self.streams.check_stopped(now, self.timeout)?)
    }

    /// A stream was lost with frames that had no receipt. Fails when that has gone on for as long as connections are waited for, without a
    /// receipt on any stream in between: a path that lets itself be connected and carries nothing is no better than none.
    fn check_fruitless(&mut self, last: String) -> Result<(), Cause> {
        let acked = self.source.as_ref().map_or(0, |s| s.counters().wire_acked.load(Ordering::Relaxed));
        match self.fruitless {
            Some((since, before)) if before == acked => {
                if since.elapsed() >= self.reconnect {
                    let seconds = since.elapsed().as_secs();
                    return Err(StreamsError::NothingArrives { seconds, last }.into());
                }
            }
            _ => self.fruitless = Some((Instant::now(), acked)),
        }
        Ok(())
    }

    /// Starts the streams that were opened anew.
    fn reopen(&mut self) -> Result<(), Cause> {
        let Some(work) = self.work.clone() else { return Ok(()) };
        loop {
            let (reopening, streams) = (self.reopening.as_mut(), &mut self.streams);
            // Before the attempt: the destination may say that the stream has stopped before this side knows that it was opened.
            let opened = reopening.and_then(|r| r.poll(|id| streams.forget(id)));
            let Some((id, end)) = opened else { return Ok(()) };
            self.start(end, id, work.clone())?;
            self.progress.update(|r| r.streams_reconnected += 1);
        }
    }

    /// Starts the lane of a stream that was opened.
    pub(super) fn start(&mut self, end: SourceEnd, id: u16, work: Receiver<Batch>) -> Result<(), Cause> {
        let Some(source) = self.source.clone() else { return Ok(()) };
        self.lanes.retain(|lane| !lane.is_finished());
        self.lanes.push(Lane::spawn(source, end, id, work, self.lane_ends.0.clone())?);
        self.streams.started();
        Ok(())
    }

    /// Lost streams are to be connected again, once pages move.
    pub(super) fn keep_open(&mut self, opener: Arc<Opener>, streams: u16) {
        if !self.reconnect.is_zero() {
            self.reopening = Some(Reopening::new(opener, streams));
        }
    }

    /// Pages move: lanes of streams that are opened from here on take from `work`.
    pub(super) fn feed(&mut self, work: Receiver<Batch>) {
        self.work = Some(work);
        self.hurried = false;
    }

    /// The guest is paused: nobody waits for streams to come back.
    pub(super) fn hurry(&mut self) {
        self.hurried = true;
    }

    /// No stream is opened any more: those that there are will be ended.
    pub(super) fn close(&mut self) {
        self.work = None;
        self.hurried = true;
        if let Some(reopening) = &mut self.reopening {
            reopening.stop();
        }
    }

    /// Breaks all streams, so that they end at once.
    pub(super) fn abort(&mut self) {
        self.close();
        self.lanes.iter().for_each(Lane::abort);
    }

    /// Waits until all streams have ended.
    pub(super) fn join(&mut self) {
        self.lanes.drain(..).for_each(Lane::join);
    }

    /// Waits until every stream has ended, in order or dead on both sides; returns the accounts of the former.
    pub(super) fn streams_ended(&mut self) -> Result<Vec<StreamEnd>, Cause> {
        while !self.streams.all_over() {
            self.check()?;
            if let Ok(end) = self.lane_ends.1.recv_timeout(Duration::from_millis(1)) {
                self.on_lane_end(end)?;
            }
        }
        Ok(self.streams.take_accounts())
    }

    /// FINISH; waits for READY. With a paused guest not for ever: `bounded`.
    pub(super) fn finish(&mut self, totals: Totals, bounded: bool) -> Result<(), Cause> {
        let finish = self.session.finish(totals);
        self.send(finish);
        let mut deadline = Instant::now() + self.timeout;
        while self.next_event()? != SourceEvent::Ready {
            if self.link.is_sending() {
                // A long STATE takes its time on a slow path; the link ends by itself where nothing of it is taken.
                deadline = Instant::now() + self.timeout;
            }
            if bounded && Instant::now() > deadline {
                return Err(self.overdue("READY"));
            }
        }
        Ok(())
    }

    /// The destination lives and does not answer.
    fn overdue(&self, message: &'static str) -> Cause {
        Cause::Overdue { message, seconds: self.timeout.as_secs() }
    }

    /// GO: see [`SourceSession::go`].
    pub(super) fn go(&mut self) {
        let go = self.session.go();
        self.send(go);
    }

    /// Waits for RUNNING. Not to be cancelled any more.
    pub(super) fn running(&mut self) -> Result<(), Cause> {
        let deadline = Instant::now() + self.timeout;
        loop {
            match self.inbox.recv_deadline(deadline) {
                Ok(event) => {
                    if self.on_link(event)? == SourceEvent::Running {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Err(self.overdue("RUNNING")),
                Err(RecvTimeoutError::Disconnected) => return Err(LinkError::Closed.into()),
            }
        }
    }

    /// POSTCOPY; waits for the destination to be ready for it. Returns how many chunks it brings in at a time, or 0.
    pub(super) fn postcopy(&mut self) -> Result<u32, Cause> {
        let postcopy = self.session.postcopy();
        self.send(postcopy);
        let deadline = Instant::now() + self.timeout;
        loop {
            if let SourceEvent::PostcopyReady { unit_chunks } = self.next_event()? {
                return Ok(unit_chunks);
            }
            if Instant::now() > deadline {
                return Err(self.overdue("POSTCOPY_READY"));
            }
        }
    }

    /// The next event after GO, which nobody can cancel, or nothing for a tick.
    pub(super) fn event_after_go(&mut self) -> Result<SourceEvent, Cause> {
        match self.inbox.recv_timeout(TICK) {
            Ok(event) => self.on_link(event),
            Err(RecvTimeoutError::Timeout) => Ok(SourceEvent::Nothing),
            Err(RecvTimeoutError::Disconnected) => Err(LinkError::Closed.into()),
        }
    }

    /// Takes a query connection for the control link that was lost; the destination says on it that it runs the guest. Says GO again
    /// where that did not arrive. Nothing is said any more once it is given up.
    pub(super) fn relink(&mut self, uri: &Uri, given_up: &dyn Fn() -> bool) -> Result<(), Cause> {
        let connection = connect(uri, Role::Query, self.id, self.timeout, given_up)?;
        let (deliver, inbox) = unbounded();
        self.link = Link::spawn(self.runtime.handle(), connection, self.timeout, deliver, |event| event)?;
        self.inbox = inbox;
        let deadline = Instant::now() + self.timeout;
        // Pings alone are no answer: the destination's network lives longer than its session may.
        while Instant::now() < deadline {
            if given_up() {
                return Err(Cause::Cancelled);
            }
            let status = match self.inbox.recv_timeout(TICK) {
                Ok(LinkEvent::Message(Message::Status(status))) => status,
                Ok(LinkEvent::Message(Message::Running)) => SessionStatus::Running,
                Ok(LinkEvent::Message(Message::Error { code, text })) => {
                    let peer = "destination";
                    return Err(SessionError::Peer { peer, code, text }.into());
                }
                Ok(LinkEvent::Message(_)) | Err(RecvTimeoutError::Timeout) => continue,
                Ok(LinkEvent::Dead(error)) => return Err(error.into()),
                Err(RecvTimeoutError::Disconnected) => return Err(LinkError::Closed.into()),
            };
            match self.session.learn(status) {
                Learnt::Running => {
                    self.link_lost = false;
                    // Lets the destination know that it is known; if this is lost, it only waits longer.
                    self.send(Message::Running);
                    return Ok(());
                }
                Learnt::SayGoAgain => self.send(Message::Go),
                Learnt::Abandoned => {
                    // As above.
                    self.send(Message::Status(SessionStatus::Abandoned));
                    self.link.flush(FAREWELL);
                    return Err(Cause::Abandoned);
                }
                Learnt::Unknown => return Err(self.overdue("that it runs the guest")),
            }
        }
        Err(self.overdue("STATUS"))
    }

    /// Tells the destination why, unless it was the one to say so.
    pub(super) fn say_error(&self, uri: &Uri, cause: &Cause) {
        if !self.session.owns_guest() {
            return;
        }
        if self.link_lost && !self.reconnect.is_zero() && !matches!(cause, Cause::Session(_)) {
            self.say_error_later(uri, cause);
        } else {
            self.send(Message::Error { code: cause.code(), text: explain(cause) });
        }
    }

    /// Renews the report that others see.
    pub(super) fn report(&mut self) {
        self.reported = Instant::now();
        let Some(source) = &self.source else { return };
        let counters = source.counters();
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let remaining = source.remaining_bytes();
        let total = self.began.elapsed();
        self.progress.update(|r| {
            r.pages.zero = get(&counters.zero);
            r.pages.unchanged = get(&counters.unchanged);
            r.pages.delta = get(&counters.delta);
            r.pages.compressed = get(&counters.compressed);
            r.pages.raw = get(&counters.raw);
            r.similar = Similar {
                pages: get(&counters.similar),
                referred: get(&counters.referred),
                wire_bytes: get(&counters.similar_bytes),
            };
            r.logical_bytes = get(&counters.logical_acked);
            r.wire_bytes = get(&counters.wire_acked);
            r.mismatches = get(&counters.mismatches);
            r.torn = get(&counters.torn);
            r.time_ms = (&counters.spent).into();
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

    /// The next event of the session, or nothing for a tick, while pages do not move.
    pub(super) fn next_event(&mut self) -> Result<SourceEvent, Cause> {
        self.leave.check()?;
        match self.inbox.recv_timeout(TICK) {
            Ok(event) => self.on_link(event),
            Err(RecvTimeoutError::Timeout) => Ok(SourceEvent::Nothing),
            Err(RecvTimeoutError::Disconnected) => Err(LinkError::Closed.into()),
        }
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
            SourceEvent::StreamStopped { stream, reason } => {
                let frames = self.streams.stopped(*stream, reason.clone());
                self.take_back(frames);
            }
            _ => {}
        }
        Ok(event)
    }

    pub(super) fn on_lane_end(&mut self, end: LaneEnd) -> Result<(), Cause> {
        match end.result {
            Ok(account) => self.streams.ended(account),
            Err(LaneError::Fatal { source, .. }) => return Err(source.into()),
            Err(error) => {
                self.progress.update(|r| r.streams_lost += 1);
                self.send(Message::StreamLost { stream: end.stream });
                let now = self.began.elapsed();
                let waited = !end.unreceipted.is_empty();
                let last = explain(&error);
                let frames = self.streams.died(end.stream, last.clone(), end.unreceipted, now);
                self.take_back(frames);
                if waited && !self.reconnect.is_zero() {
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
            self.say_resent();
        }
    }

    /// Tells the destination's report, too.
    pub(super) fn say_resent(&mut self) {
        let bytes = self.progress.report().resent_bytes;
        if bytes != 0 && !self.reconnect.is_zero() {
            self.send(Message::Resent { bytes });
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.report();
        // A link that is lost takes nothing any more.
        if !self.link_lost {
            self.link.flush(FAREWELL);
        }
    }
}
