//! One session at the destination: its phases, from WELCOME until the guest is here and lacks nothing, or never will be.

mod base;
mod postcopy;
mod prepare;
mod resume;
mod verdict;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pagecopy::backend::{Claim, Guest, GuestRam, Room, StateBlob};

use super::environment::{Environment, Event, Speaks, say_no};
use super::{Incoming, IncomingError};
use crate::clock;
use crate::destination::{PageSink, ReceiveError};
use crate::engine::progress::Progress;
use crate::engine::report::Status;
use crate::engine::source::RUN_STATE;
use crate::engine::{Options, explain, usage};
use crate::link::{LinkError, LinkEvent};
use crate::local::{guarded, guarded_while};
use crate::session::{DestinationEvent, DestinationSession, SessionError, compare_totals};
use crate::streams::{DestinationStreams, Stop};
use crate::wire::control::{ErrorCode, Hello, Message, SessionStatus, StreamEnd, Totals, state_digest};
use crate::wire::stream_number;
use postcopy::Postcopy;
use resume::Outages;

/// How long a source has to take the last message.
const FAREWELL: Duration = Duration::from_secs(1);

/// Panics that a destination which has the guest bears before it stops bringing pages in.
const PANICS_MAX: u32 = 16;

/// What comes of READY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handover {
    /// The guest is this side's.
    Go,
    /// The source lost its connections, and pages move again.
    TakenBack,
}

/// One session.
pub(super) struct Session<'a, E: Environment> {
    env: &'a E,
    options: &'a Options,
    progress: &'a Progress,
    machine: DestinationSession,
    /// `None` once it broke.
    link: Option<E::Link>,
    generation: u64,
    hello: Hello,
    ram: Arc<dyn GuestRam>,
    guest: Option<Arc<dyn Guest>>,
    sink: Arc<PageSink>,
    /// Room that is spoken for, until all pages are here.
    claim: Option<Box<dyn Claim>>,
    /// What is to be brought in as large pages, once all streams are open: all cores are then busy, and opening them would take
    /// longer than the memory.
    dense: Option<Vec<Range<u32>>>,
    /// Threads that populate memory.
    populating: usize,
    streams: DestinationStreams,
    /// Once the source has announced it.
    postcopy: Option<Postcopy>,
    state: Vec<StateBlob>,
    /// By the clock.
    began: Duration,
    setup: Duration,
    outages: Outages<E>,
    /// After GO: the guest was told to run, where there is one that is to.
    resumed: bool,
    /// After GO: the source and the VMM were told.
    announced: bool,
}

/// Who is to have which session.
pub(super) struct Agreed<L> {
    pub(super) machine: DestinationSession,
    pub(super) link: L,
    pub(super) generation: u64,
    pub(super) hello: Hello,
    /// How long a source may stay away; zero where it does not come back at all.
    pub(super) patience: Duration,
}

/// What was made for the guest.
pub(super) struct Made {
    pub(super) ram: Arc<dyn GuestRam>,
    pub(super) guest: Option<Arc<dyn Guest>>,
    /// Room that is spoken for.
    pub(super) claim: Option<Box<dyn Claim>>,
}

impl<'a, E: Environment> Session<'a, E> {
    /// One whose WELCOME was said.
    pub(super) fn new(
        (env, options, progress): (&'a E, &'a Options, &'a Progress),
        agreed: Agreed<E::Link>,
        Made { ram, guest, claim }: Made,
        sink: Arc<PageSink>,
    ) -> Self {
        Self {
            env,
            options,
            progress,
            machine: agreed.machine,
            link: Some(agreed.link),
            generation: agreed.generation,
            hello: agreed.hello,
            ram,
            guest,
            sink,
            claim,
            dense: None,
            populating: 0,
            streams: DestinationStreams::new(),
            postcopy: None,
            state: Vec::new(),
            began: clock::now(),
            setup: Duration::ZERO,
            outages: Outages::new(agreed.patience),
            resumed: false,
            announced: false,
        }
    }

    /// All of it; whatever fails and panics, whoever must hear of it does. Says whether a guest came that runs.
    pub(super) async fn take_in(mut self, incoming: &mut dyn Incoming) -> Result<bool, IncomingError> {
        let cpu = usage::cpu_seconds();
        let result = caught(self.run(incoming)).await;
        if let Err(error) = &result {
            if error.loses_guest() && self.has_begun_postcopy() {
                // What panics here leaves a guest that waits for pages, and no other's to run.
                let _ = guarded(|| self.stop_guest_for_good());
            }
            let _ = guarded(|| self.fail(error));
        }
        self.report(cpu, result.as_ref().err());
        if let Err(error) = result {
            for _ in 0..=PANICS_MAX {
                if guarded_while(self.answer_late(&error)).await.is_ok() {
                    break;
                }
            }
            return Err(error);
        }
        Ok(self.runs())
    }

    /// The phases: populate, move, finish, hand over.
    async fn run(&mut self, incoming: &mut dyn Incoming) -> Result<(), IncomingError> {
        self.say_base().await?;
        self.populate().await?;
        let prepared = self.machine.prepared();
        self.send(prepared);
        self.setup = clock::now() - self.began;
        self.progress.update(|r| r.status = Status::Active);
        loop {
            let theirs = self.take_pages().await?;
            // A source that lost its connections meanwhile takes the session back to where pages move.
            let Some(mine) = self.finish(&theirs).await? else { continue };
            let ready = self.machine.ready(mine);
            self.send(ready);
            if self.wait_go().await? == Handover::Go {
                break;
            }
        }
        self.hold(incoming).await
    }

    /// From GO on the guest is this side's, whatever becomes of the source, and whatever fails here: a panic ends neither the guest nor
    /// the bringing of its pages.
    async fn hold(&mut self, incoming: &mut dyn Incoming) -> Result<(), IncomingError> {
        let mut panics = 0;
        loop {
            match caught(self.own(incoming)).await {
                Err(IncomingError::Panicked { what }) if panics < PANICS_MAX => {
                    panics += 1;
                    self.tell(&format!("panicked, and goes on, for the guest is here: {what}"));
                }
                Err(IncomingError::Panicked { what }) if self.misses_pages() => {
                    let why = format!("panicked {panics} times, and then: {what}");
                    return Err(IncomingError::PostcopyFailed { why });
                }
                // Decided here, once: pages may still come while the session ends.
                Err(error) if self.misses_pages() => {
                    let why = || IncomingError::PostcopyFailed { why: explain(&error) };
                    return Err(if error.loses_guest() { error } else { why() });
                }
                // It runs, and lacks nothing.
                Err(_) if self.resumed => {
                    let _ = self.end_missing();
                    self.end_postcopy();
                    return Ok(());
                }
                ended => return ended,
            }
        }
    }

    /// What is done after GO, from where it stands.
    async fn own(&mut self, incoming: &mut dyn Incoming) -> Result<(), IncomingError> {
        if !self.resumed {
            if let Some(guest) = &self.guest
                && self.runs()
            {
                // All or nothing: a guest that does not run here never did.
                guest.resume().inspect_err(|_| self.machine.never_ran())?;
            }
            self.resumed = true;
        }
        if !self.announced {
            self.announced = true;
            self.send(Message::Running);
            if self.missing_left() != 0 {
                // Before others hear of the guest, whose memory must not be read by whoever cannot wait.
                self.progress.update(|r| r.status = Status::PostcopyActive);
            }
            incoming.arrived(self.runs());
        }
        self.take_rest().await?;
        self.claim = None;
        self.linger().await;
        self.end_postcopy();
        Ok(())
    }

    fn send(&self, message: Message) {
        if let Some(link) = &self.link {
            link.send(message);
        }
    }

    /// Tells whoever started this destination.
    fn tell(&self, notice: &str) {
        let _ = guarded(|| self.env.tell(notice));
    }

    /// Whether there is a guest that ran at the source when it was moved.
    fn runs(&self) -> bool {
        self.guest.is_some() && !self.state.iter().any(|blob| blob.name == RUN_STATE && blob.bytes == [0])
    }

    /// Serves streams and messages until FINISH.
    async fn take_pages(&mut self) -> Result<Totals, IncomingError> {
        loop {
            self.check_outage()?;
            let Some(event) = self.next().await? else { continue };
            let event = match event {
                LinkEvent::Message(message) => self.machine.handle(message)?,
                LinkEvent::Dead(error) => {
                    self.lose_link(error)?;
                    continue;
                }
            };
            match event {
                DestinationEvent::StreamLost(stream) => self.stop_stream(stream),
                DestinationEvent::State(blobs) => self.state = blobs,
                DestinationEvent::Finish(totals) => return Ok(totals),
                DestinationEvent::Reply(reply) => self.send(reply),
                DestinationEvent::Resent(bytes) => self.progress.update(|r| r.resent_bytes = bytes),
                DestinationEvent::Postcopy => self.announce_postcopy()?,
                DestinationEvent::Missing(runs) => self.add_missing(&runs)?,
                DestinationEvent::Nothing
                | DestinationEvent::Hello(_)
                | DestinationEvent::Go
                | DestinationEvent::Sent(_) => {}
            }
        }
    }

    /// Handles what is not the control link's; returns what is.
    async fn next(&mut self) -> Result<Option<LinkEvent>, IncomingError> {
        if self.progress.is_cancelled() && self.machine.status() != SessionStatus::Running {
            return Err(IncomingError::Cancelled);
        }
        // Once all is here, what is left to do takes next to nothing.
        if self.machine.is_moving() {
            usage::short_of_memory()?;
        }
        self.show();
        if let Some(claim) = &mut self.claim {
            claim.update(self.sink.received().populated.load(Ordering::Relaxed));
        }
        self.env.wait().await;
        let Some(event) = self.env.next() else { return Ok(None) };
        match event {
            Event::Link { generation, event } if generation == self.generation => return Ok(Some(event)),
            Event::Link { generation, event } => return self.on_other_link(generation, event),
            Event::Resume { link, generation } => self.outages.knock(link, generation),
            Event::Stream { request, stream } => self.attach(request, stream)?,
            Event::StreamEnded { stream, result } => {
                self.stream_ended(stream, result)?;
                self.take_up();
                if let Some((stream, request)) = self.outages.waiting.remove(&stream_number(stream)) {
                    self.attach(request, stream)?;
                }
            }
            Event::Populated(result) => {
                self.populating -= 1;
                result?;
            }
            Event::Postcopy(event) => self.on_postcopy(event)?,
            Event::Refused { peer, reason } => {
                self.tell(&format!("refused a connection from {peer}: {reason}"));
            }
            Event::Query { link, generation } => {
                // A source that lost its link and asks: this is its link from now on. Between READY and the end that holds also
                // while this side takes the old one for alive: whoever knows the session's id has given it up.
                let status = self.machine.status();
                link.send(Message::Status(status));
                if self.link.is_none() || matches!(status, SessionStatus::Ready | SessionStatus::Running) {
                    (self.link, self.generation) = (Some(link), generation);
                }
            }
            Event::Control(call) => say_busy(&call.link),
            Event::Notice(text) => self.tell(&text),
        }
        Ok(None)
    }

    /// A data stream of this session was opened.
    fn attach(&mut self, request: E::Request, stream: u16) -> Result<(), IncomingError> {
        let (number, again) = (stream_number(stream), stream != stream_number(stream));
        let moving = self.machine.is_moving() && !self.outages.is_taking_up();
        let agreed = if again && self.outages.patience.is_zero() { 0 } else { self.hello.streams };
        if let Err(why) = self.streams.admit(stream, agreed, moving) {
            let text = format!("stream {number} is refused: {why}");
            self.env.refuse(request, ErrorCode::Protocol, text);
            return Ok(());
        }
        if let Some(earlier) = self.streams.running(stream) {
            self.outages.waiting.insert(number, (stream, request));
            self.stop_stream(earlier);
            return Ok(());
        }
        if again {
            self.progress.update(|r| r.streams_reconnected += 1);
        }
        if !self.env.start_worker(request, stream)? {
            return Ok(());
        }
        self.streams.started(stream);
        if self.streams.running_count() == usize::from(self.hello.streams)
            && let Some(dense) = self.dense.take()
        {
            self.env.enlarge(&self.sink, dense);
        }
        Ok(())
    }

    /// Nothing of the stream reaches memory any more; a connection that broke is no news to the source. What this host lacks is: the
    /// session ends by it, for on another stream it would lack the same.
    fn stream_ended(
        &mut self,
        stream: u16,
        result: Result<StreamEnd, ReceiveError>,
    ) -> Result<(), IncomingError> {
        if self.streams.runs(stream) {
            self.env.join_worker(stream);
        }
        let result = match result {
            Err(error) if error.ends_session() => return Err(IncomingError::Receive(error)),
            other => other,
        };
        if let Some(stopped) = self.streams.ended(stream, result.map_err(|e| explain(&e))) {
            self.send(stopped);
        }
        Ok(())
    }

    /// The source calls a stream dead. Its worker ends as soon as it sees the closed connection, which [`Event::StreamEnded`]
    /// tells.
    fn stop_stream(&mut self, stream: u16) {
        match self.streams.lost(stream) {
            Stop::Say(stopped) => self.send(stopped),
            Stop::Worker => self.env.break_worker(stream),
            Stop::Nothing => {}
        }
    }

    /// Waits for the streams' ends, compares accounts, loads device state, makes memory durable. `None` when the source has lost its
    /// connections meanwhile, and pages move again.
    async fn finish(&mut self, theirs: &Totals) -> Result<Option<Totals>, IncomingError> {
        // A source that loses a stream at the last moment notices as late as this side would, and then resumes the session.
        let patience = self.options.timeout + self.outages.patience;
        let (mut deadline, mut before) = (clock::now() + patience, 0);
        while let Some(stream) = self.streams.unfinished() {
            let received = self.sink.received().wire.load(Ordering::Relaxed);
            if received != before {
                // The last pages may be many, on a slow path.
                (deadline, before) = (clock::now() + patience, received);
            }
            if clock::now() > deadline {
                return Err(IncomingError::Stream { stream: stream_number(stream) });
            }
            match self.next().await? {
                Some(LinkEvent::Dead(error)) => {
                    self.lose_link(error)?;
                    self.wait_resumed().await?;
                }
                Some(LinkEvent::Message(Message::Query)) => {
                    self.send(Message::Status(self.machine.status()));
                }
                // Nothing else is said between FINISH and READY.
                Some(LinkEvent::Message(message)) => {
                    self.machine.handle(message)?;
                }
                None => {}
            }
            if self.machine.is_moving() {
                return Ok(None);
            }
        }
        // Nobody but the guest touches its memory from here on.
        self.env.end_enlarging();
        self.sink.end_placing();
        let streams = self.streams.accounts();
        let mine = Totals { streams, pages: self.carried_pages(), state: state_digest(&self.state) };
        let mut heard = theirs.clone();
        // What the source may not have heard yet when it said FINISH.
        heard.streams.retain(|end| !self.streams.is_lost(end.stream));
        if let Err(error) = compare_totals(&mine, &heard) {
            let lost = heard.streams.len() != theirs.streams.len();
            return self.wait_late_loss(error, lost || mine.streams != heard.streams, deadline).await;
        }
        self.miss_pages()?;
        if let Some(guest) = &self.guest {
            let state: Vec<_> = self.state.iter().filter(|blob| blob.name != RUN_STATE).cloned().collect();
            self.env.load_state(&**guest, &state).await?;
        }
        self.ram.persist()?;
        Ok(Some(mine))
    }

    /// Waits for GO, over whatever link the source has, or for a source that lost its connections and takes READY back.
    async fn wait_go(&mut self) -> Result<Handover, IncomingError> {
        let timeout = self.options.handover_timeout.max(self.outages.patience);
        let mut lost = None::<Duration>;
        loop {
            // A query brings a new link.
            lost = if self.link.is_some() { None } else { lost.or_else(|| Some(clock::now())) };
            if lost.is_some_and(|at| clock::now() - at > timeout) {
                return Err(IncomingError::NoGo { seconds: timeout.as_secs() });
            }
            match self.next().await? {
                Some(LinkEvent::Message(Message::Query)) => {
                    self.send(Message::Status(self.machine.status()));
                }
                Some(LinkEvent::Message(message)) => match self.machine.handle(message)? {
                    DestinationEvent::Go => return Ok(Handover::Go),
                    DestinationEvent::Reply(reply) => self.send(reply),
                    _ => {}
                },
                Some(LinkEvent::Dead(_)) => self.link = None,
                None if self.machine.is_moving() => return Ok(Handover::TakenBack),
                None => {}
            }
        }
    }

    /// The guest runs. Stays for a source that has not heard so yet: until it says that it has, for a while. A link that is
    /// closed says nothing: RUNNING may have been lost with it. Memory alone has nobody who waits paused for an answer.
    async fn linger(&mut self) {
        let live = self.guest.is_some();
        let deadline = clock::now() + self.patience_for_questions(false);
        // After postcopy the last word follows ARRIVED. One that comes before only says that the source knows who has the guest.
        while clock::now() < deadline {
            match self.next().await {
                Ok(Some(LinkEvent::Message(Message::Running))) if !self.is_answered() => {}
                Ok(Some(LinkEvent::Message(Message::Running))) | Err(_) => return,
                Ok(Some(LinkEvent::Dead(LinkError::Closed))) if !live => return,
                Ok(Some(LinkEvent::Dead(_))) => self.link = None,
                Ok(Some(LinkEvent::Message(Message::Query))) => {
                    self.send(Message::Status(self.machine.status()));
                }
                Ok(Some(LinkEvent::Message(message))) => match self.machine.handle(message) {
                    Ok(DestinationEvent::Reply(reply)) => self.send(reply),
                    // Nothing is missing, or the guest would be lost; whatever the source thinks.
                    Ok(DestinationEvent::Sent(pages)) => {
                        let _ = self.on_sent(pages);
                    }
                    _ => {}
                },
                Ok(None) => {}
            }
        }
    }

    /// Ends a session that failed: the guest is not this side's and never will be, unless it already was.
    fn fail(&mut self, error: &IncomingError) {
        self.machine.abandon();
        self.sink.stop();
        self.env.end_populating();
        self.end_postcopy();
        self.env.end_workers();
        self.env.end_enlarging();
        let peer_knows = matches!(error, IncomingError::Session(SessionError::Peer { .. }));
        if let Some(link) = &self.link {
            if self.machine.may_be_asked() && !peer_knows {
                // It may have said GO, and need not ask.
                link.send(Message::Status(self.machine.status()));
            }
            if !peer_knows {
                say_no(link, error.code(), explain(error));
            }
            // The process may end next, and the source is to hear why.
            link.flush(FAREWELL);
        }
    }

    /// Shows how far it is.
    fn show(&self) {
        let received = self.sink.received();
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        self.progress.update(|r| {
            r.logical_bytes = get(&received.logical);
            r.wire_bytes = get(&received.wire);
            r.pages.zero = get(&received.zero);
            r.pages.raw = get(&received.raw);
            r.pages.delta = get(&received.delta);
            r.pages.compressed = get(&received.compressed);
            r.pages.unchanged = get(&received.same);
            r.time_ms = (&received.spent).into();
        });
        self.show_postcopy();
    }

    fn report(&self, cpu: f64, error: Option<&IncomingError>) {
        self.show();
        self.tell_of_base();
        let (total, setup) = (clock::now() - self.began, self.setup);
        let untouched = self.ram.layout().pages() - self.sink.carried_pages();
        self.progress.update(|r| {
            r.setup_ms = setup.as_secs_f64() * 1e3;
            r.pages.hole = untouched;
            r.cpu_s = usage::cpu_seconds() - cpu;
            r.max_rss_bytes = usage::max_rss_bytes();
            r.rates(total);
            r.verified = error.is_none();
            r.status = match error {
                None => Status::Completed,
                Some(IncomingError::Cancelled) => Status::Cancelled,
                Some(_) if r.status == Status::PostcopyLost => Status::PostcopyLost,
                Some(_) => Status::Failed,
            };
            r.error = error.map(|e| explain(e));
        });
    }
}

/// Says that a session is served, and not this one's.
pub(super) fn say_busy(link: &impl Speaks) {
    say_no(link, ErrorCode::Busy, "this destination already serves a session".into());
}

/// Does `work`; a panic in it is an error like another.
pub(super) async fn caught<T>(
    work: impl Future<Output = Result<T, IncomingError>>,
) -> Result<T, IncomingError> {
    guarded_while(work).await.unwrap_or_else(|what| Err(IncomingError::Panicked { what }))
}

/// Refuses a guest whose pages have no room here, before the first of them comes; `what` says how much `needed` is.
pub(super) fn check_room(what: &str, needed: u64, room: Option<Room>) -> Result<(), String> {
    match room {
        Some(room) if room.bytes < needed => Err(lacks_room(what, &room)),
        _ => Ok(()),
    }
}

/// Says that there is too little room.
pub(super) fn lacks_room(what: &str, Room { bytes, of, hint }: &Room) -> String {
    format!("{what}, but {of} has {bytes} left: {hint}")
}
