//! What the source hears while it works: control messages, ends of streams, and requests to cancel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use tokio::runtime::Runtime;
use transport::link::{Link, LinkError, LinkEvent};
use transport::session::{Learnt, SourceEvent, SourceSession, check_welcome};
use transport::socket::Connection;
use transport::source::{LaneEnd, LaneError, PageSource, Unreceipted};
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
/// How long a destination that dropped all streams has to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a destination has to take the last message.
const FAREWELL: Duration = Duration::from_secs(1);

/// A stream that died here, until the destination has stopped its worker, too.
struct Dead {
    frames: Vec<Unreceipted>,
    error: String,
    since: Instant,
}

pub(super) struct Watch {
    session: SourceSession,
    id: SessionId,
    link: Link,
    inbox: Receiver<LinkEvent>,
    lanes_live: u32,
    lane_ends: (Sender<LaneEnd>, Receiver<LaneEnd>),
    ended: Vec<StreamEnd>,
    dead: BTreeMap<u16, Dead>,
    /// Streams whose worker the destination has stopped, with its reason.
    stopped: BTreeMap<u16, String>,
    last_error: Option<String>,
    progress: Progress,
    began: Instant,
    reported: Instant,
    timeout: Duration,
    source: Option<Arc<PageSource>>,
    /// Last, so that the link's task outlives what uses it.
    _runtime: Runtime,
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
            lanes_live: 0,
            lane_ends: unbounded(),
            ended: Vec::new(),
            dead: BTreeMap::new(),
            stopped: BTreeMap::new(),
            last_error: None,
            progress: progress.clone(),
            began,
            reported: began,
            timeout: options.timeout,
            source: None,
            _runtime: runtime,
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
        self.lanes_live += 1;
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
        // The destination may be about to say why it dropped the streams.
        let silent = |dead: &Dead| dead.since.elapsed() > LAST_WORDS;
        if self.lanes_live == 0
            && self.ended.is_empty()
            && self.last_error.is_some()
            && (self.dead.is_empty() || self.dead.values().any(silent))
        {
            let last = self.last_error.take().unwrap_or_default();
            return Err(Cause::NoStreams { last });
        }
        // Until its worker has stopped, what a stream had under way cannot be sent again.
        let never_stopped = |dead: &Dead| dead.since.elapsed() > self.timeout.max(LAST_WORDS);
        if let Some((&stream, _)) = self.dead.iter().find(|(_, dead)| never_stopped(dead)) {
            return Err(Cause::NotStopped { stream, seconds: self.timeout.max(LAST_WORDS).as_secs() });
        }
        if self.reported.elapsed() >= REPORT_EVERY {
            self.report();
        }
        Ok(())
    }

    /// Waits until every stream has ended, in order or dead on both sides; returns the accounts of the former.
    pub(super) fn streams_ended(&mut self) -> Result<Vec<StreamEnd>, Cause> {
        while self.lanes_live != 0 || !self.dead.is_empty() {
            self.check()?;
            if let Ok(end) = self.lane_ends.1.recv_timeout(Duration::from_millis(1)) {
                self.on_lane_end(end)?;
            }
        }
        self.ended.sort_by_key(|end| end.stream);
        Ok(std::mem::take(&mut self.ended))
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
            SourceEvent::StreamStopped { stream, reason } => self.on_stopped(*stream, reason.clone()),
            _ => {}
        }
        Ok(event)
    }

    fn on_stopped(&mut self, stream: u16, reason: String) {
        if !reason.is_empty() {
            // Which side was first is not known: the other one's reason is a consequence.
            let theirs = format!("the destination stopped stream {stream}: {reason}");
            let own = self.dead.get(&stream).map(|dead| format!("{}; ", dead.error));
            self.last_error = Some(own.unwrap_or_default() + &theirs);
        }
        self.stopped.insert(stream, reason);
        self.bury(stream);
    }

    fn on_lane_end(&mut self, end: LaneEnd) -> Result<(), Cause> {
        self.lanes_live -= 1;
        match end.result {
            Ok(account) => self.ended.push(account),
            Err(LaneError::Fatal { source, .. }) => return Err(source.into()),
            Err(error) => {
                let error = explain(&error);
                let theirs = self.stopped.get(&end.stream).filter(|reason| !reason.is_empty());
                self.last_error = Some(match theirs {
                    Some(reason) => {
                        format!("{error}; the destination stopped stream {}: {reason}", end.stream)
                    }
                    None => error.clone(),
                });
                self.progress.update(|r| r.streams_lost += 1);
                self.send(Message::StreamLost { stream: end.stream });
                let dead = Dead { frames: end.unreceipted, error, since: Instant::now() };
                self.dead.insert(end.stream, dead);
                self.bury(end.stream);
            }
        }
        Ok(())
    }

    /// A stream that is dead on both sides: its unreceipted pages are dirty again, and any stream may take them.
    fn bury(&mut self, stream: u16) {
        if self.stopped.contains_key(&stream)
            && let Some(dead) = self.dead.remove(&stream)
        {
            if self.last_error.is_none() {
                self.last_error = Some(dead.error);
            }
            if let Some(source) = &self.source {
                source.take_back(dead.frames);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.report();
        self.link.flush(FAREWELL);
    }
}
