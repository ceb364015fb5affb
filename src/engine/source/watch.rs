//! What the source hears while it works: control messages, ends of streams, and requests to cancel.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use tokio::runtime::Runtime;
use transport::link::{Link, LinkError, LinkEvent};
use transport::session::{Learnt, SessionError, SourceEvent, SourceSession, check_welcome};
use transport::socket::Connection;
use transport::source::{LaneEnd, LaneError, PageSource, Unreceipted};
use transport::streams::SourceStreams;
use transport::uri::Uri;
use transport::wire::control::{Message, SessionStatus, StreamEnd, Totals, Welcome};
use transport::wire::{Preamble, Role, SessionId, VERSION_MAX, VERSION_MIN};

use super::{Cause, random};
use crate::engine::progress::Progress;
use crate::engine::report::Status;
use crate::engine::{Options, explain};

/// How often somebody who waits looks at everything that may have happened.
const TICK: Duration = Duration::from_millis(20);
/// How often the report that others see is renewed.
const REPORT_EVERY: Duration = Duration::from_millis(50);
/// How long a destination has to take the last message.
const FAREWELL: Duration = Duration::from_secs(1);

pub(super) struct Watch {
    session: SourceSession,
    id: SessionId,
    link: Link,
    inbox: Receiver<LinkEvent>,
    streams: SourceStreams<Unreceipted>,
    lane_ends: (Sender<LaneEnd>, Receiver<LaneEnd>),
    progress: Progress,
    began: Instant,
    reported: Instant,
    timeout: Duration,
    source: Option<Arc<PageSource>>,
    /// Last, so that the link's task outlives what uses it.
    runtime: Runtime,
}

impl Watch {
    /// Connects the control link.
    pub(super) fn connect(uri: &Uri, options: &Options, progress: &Progress) -> Result<Self, Cause> {
        let began = Instant::now();
        let connection = Connection::connect(uri, options.timeout)?;
        connection.tune(options.timeout)?;
        connection.set_timeouts(None, Some(options.timeout))?;
        let id = random()?;
        let preamble = Preamble {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            role: Role::Control,
            stream: 0,
            session: id,
        };
        std::io::Write::write_all(&mut &connection, &preamble.encode())?;
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
            progress: progress.clone(),
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

    /// Where a new lane reports its end.
    pub(super) fn lane_started(&mut self) -> Sender<LaneEnd> {
        self.streams.started();
        self.lane_ends.0.clone()
    }

    /// Waits for WELCOME, which must lie within what was offered, and PREPARED.
    pub(super) fn welcome(&mut self, streams: u16, capabilities: u64) -> Result<Welcome, Cause> {
        let mut welcome = None;
        let deadline = Instant::now() + self.timeout;
        loop {
            if welcome.is_none() && Instant::now() > deadline {
                return Err(self.overdue("WELCOME"));
            }
            match self.next_event()? {
                SourceEvent::Welcome(w) => {
                    check_welcome(&w, streams, capabilities)?;
                    welcome = Some(w);
                }
                SourceEvent::Prepared => return Ok(welcome.expect("the session machine orders the two")),
                _ => {}
            }
        }
    }

    /// Looks at everything that may have happened. Called often while pages move.
    pub(super) fn check(&mut self) -> Result<(), Cause> {
        if self.progress.is_cancelled() {
            return Err(Cause::Cancelled);
        }
        while let Ok(event) = self.inbox.try_recv() {
            self.on_link(event)?;
        }
        while let Ok(end) = self.lane_ends.1.try_recv() {
            self.on_lane_end(end)?;
        }
        self.streams.check(self.began.elapsed(), self.timeout)?;
        if self.reported.elapsed() >= REPORT_EVERY {
            self.report();
        }
        Ok(())
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
        let deadline = Instant::now() + self.timeout;
        while self.next_event()? != SourceEvent::Ready {
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

    /// Takes a query connection for the control link that was lost; the destination says on it that it runs the guest.
    pub(super) fn relink(&mut self, uri: &Uri) -> Result<(), Cause> {
        let connection = Connection::connect(uri, self.timeout)?;
        connection.tune(self.timeout)?;
        connection.set_timeouts(None, Some(self.timeout))?;
        let preamble = Preamble {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            role: Role::Query,
            stream: 0,
            session: self.id,
        };
        std::io::Write::write_all(&mut &connection, &preamble.encode())?;
        let (deliver, inbox) = unbounded();
        self.link = Link::spawn(self.runtime.handle(), connection, self.timeout, deliver, |event| event)?;
        self.inbox = inbox;
        let deadline = Instant::now() + self.timeout;
        loop {
            match self.inbox.recv_deadline(deadline) {
                Ok(LinkEvent::Message(Message::Status(status))) => match self.session.learn(status) {
                    Learnt::Running => return Ok(()),
                    _ => return Err(self.overdue("that it runs the guest")),
                },
                Ok(LinkEvent::Message(Message::Error { code, text })) => {
                    let peer = "destination";
                    return Err(SessionError::Peer { peer, code, text }.into());
                }
                Ok(LinkEvent::Message(_)) => {}
                Ok(LinkEvent::Dead(error)) => return Err(error.into()),
                Err(_) => return Err(self.overdue("STATUS")),
            }
        }
    }

    pub(super) fn learn(&mut self, status: SessionStatus) -> Learnt {
        self.session.learn(status)
    }

    /// Tells the destination why, unless it was the one to say so.
    pub(super) fn say_error(&self, cause: &Cause) {
        if self.session.owns_guest() {
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
            r.logical_bytes = get(&counters.logical_acked);
            r.wire_bytes = get(&counters.wire_acked);
            r.mismatches = get(&counters.mismatches);
            r.torn = get(&counters.torn);
            r.remaining_bytes = remaining;
            if matches!(r.status, Status::Setup | Status::Active | Status::Device) {
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
    fn next_event(&mut self) -> Result<SourceEvent, Cause> {
        if self.progress.is_cancelled() {
            return Err(Cause::Cancelled);
        }
        match self.inbox.recv_timeout(TICK) {
            Ok(event) => self.on_link(event),
            Err(RecvTimeoutError::Timeout) => Ok(SourceEvent::Nothing),
            Err(RecvTimeoutError::Disconnected) => Err(LinkError::Closed.into()),
        }
    }

    fn on_link(&mut self, event: LinkEvent) -> Result<SourceEvent, Cause> {
        let message = match event {
            LinkEvent::Message(message) => message,
            LinkEvent::Dead(error) => return Err(error.into()),
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

    fn on_lane_end(&mut self, end: LaneEnd) -> Result<(), Cause> {
        match end.result {
            Ok(account) => self.streams.ended(account),
            Err(LaneError::Fatal { source, .. }) => return Err(source.into()),
            Err(error) => {
                self.progress.update(|r| r.streams_lost += 1);
                self.send(Message::StreamLost { stream: end.stream });
                let now = self.began.elapsed();
                let frames = self.streams.died(end.stream, explain(&error), end.unreceipted, now);
                self.take_back(frames);
            }
        }
        Ok(())
    }

    /// Frames of a stream that is dead on both sides: their pages are dirty again, and any stream may take them.
    fn take_back(&self, frames: Vec<Unreceipted>) {
        if let Some(source) = &self.source {
            source.take_back(frames);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.report();
        self.link.flush(FAREWELL);
    }
}
