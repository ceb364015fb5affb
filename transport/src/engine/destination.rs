//! The destination: listens, takes one session in, and owns the guest from GO on.
//!
//! One listening socket serves control, streams and queries. A connection that never becomes a session (a stranger, another
//! version, a guest that does not fit) is refused with a reason on both sides, and the destination goes on listening; once
//! a session has touched memory, its failure is the destination's end.

mod error;
mod front;
mod lobby;
mod opening;
mod populate;
mod postcopy;
mod resume;
mod verdict;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::accept::{Acceptor, StreamRequest};
use crate::carrier::Breaker;
use crate::destination::{PageSink, ReceiveError, receive_stream};
use crate::host::Host;
use crate::link::{Link, LinkError, LinkEvent};
use crate::local::{check_headroom, destination_bytes, guarded};
use crate::session::{DestinationEvent, DestinationSession, SessionError, compare_totals};
use crate::socket::Listener;
use crate::streams::{DestinationStreams, Stop};
use crate::uri::Uri;
use crate::wire::control::{
    ErrorCode, Hello, Message, SessionStatus, StreamEnd, Totals, Welcome, capability, state_digest,
};
use crate::wire::stream_number;
use crossbeam_channel::{Receiver, Sender};
use pagecopy::backend::{Guest, GuestRam, Room, StateBlob};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{Layout, PAGE_SIZE};

use super::progress::Progress;
use super::report::{Report, Status};
use super::source::RUN_STATE;
use super::{Options, explain, usage};
pub use error::IncomingError;
use front::{Event, Front};
use opening::{Caller, Opening};
use populate::Enlarger;
use resume::Outages;

/// How often somebody who waits looks at everything that may have happened.
const TICK: Duration = Duration::from_millis(20);

/// How long a source has to take the last message.
const FAREWELL: Duration = Duration::from_secs(1);

/// Panics that a destination which has the guest bears before it stops bringing pages in.
const PANICS_MAX: u32 = 16;

/// The VMM's side of a destination: makes the memory for a guest that is offered, or refuses it.
pub trait Incoming {
    /// Memory for this guest, all zeros, or why not. Called once a source has said what it brings; may be called again after a refusal.
    fn open(&mut self, hello: &Hello, layout: Layout) -> Result<Arc<dyn GuestRam>, String>;
    /// The guest whose state is to be loaded and that is to run, for a live migration.
    fn guest(&self) -> Option<Arc<dyn Guest>>;
    /// Everything is here and handed over; the guest runs, if there is one and it was not paused at the source. The session
    /// lasts on, for a source that may not have heard so.
    fn arrived(&mut self, running: bool) {
        let _ = running;
    }
}

/// A session that came to its end.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Its numbers.
    pub report: Report,
    /// A guest came and runs; false for memory alone, and for a guest that was paused at the source.
    pub running: bool,
}

/// A destination that listens.
pub struct Destination {
    front: Front,
    events: Receiver<Event>,
    event_sender: Sender<Event>,
    uri: Uri,
    options: Options,
    progress: Progress,
    notice: Box<dyn Fn(&str) + Send + Sync>,
    /// Those who have not said HELLO yet.
    callers: Vec<Caller>,
}

impl Destination {
    /// Listens at `uri`. `notice` is told, in a line each, about connections that were refused.
    pub fn bind(
        uri: &Uri,
        options: &Options,
        progress: &Progress,
        notice: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self, IncomingError> {
        let listener = Listener::bind(uri)?;
        let (event_sender, events) = crossbeam_channel::unbounded();
        // Its runtime panics where it cannot start a thread.
        let start = || Front::start(listener, uri, options.timeout, &event_sender);
        let (front, uri) = caught(start)?;
        Ok(Self {
            front,
            events,
            event_sender,
            uri,
            options: options.clone(),
            progress: progress.clone(),
            notice: Box::new(notice),
            callers: Vec::new(),
        })
    }

    /// Where a source connects: with the port that the system chose.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Takes a session in. Blocks until the guest is here and runs, or the session has failed. One that failed after READY is waited with
    /// until its source has heard that the guest never ran here, for as long as a source is waited for: it may have said GO, and has no
    /// other way to know. Cancelling ends that.
    pub fn receive(mut self, incoming: &mut dyn Incoming) -> Result<Arrival, IncomingError> {
        loop {
            let opening = self.opening()?;
            let Some(mut session) = self.accept(opening, incoming) else { continue };
            let cpu = usage::cpu_seconds();
            let result = caught(|| session.run(&self, incoming));
            if let Err(error) = &result {
                if error.loses_guest() && session.has_begun_postcopy() {
                    // What panics here leaves a guest that waits for pages, and no other's to run.
                    let _ = guarded(|| session.stop_guest_for_good(&self.progress));
                }
                let _ = guarded(|| session.fail(error));
            }
            session.report(&self.progress, cpu, result.as_ref().err());
            if let Err(error) = &result {
                let _ = guarded(|| session.answer_late(&self, error));
            }
            result?;
            let running = session.runs();
            return Ok(Arrival { report: self.progress.report(), running });
        }
    }

    /// Tells whoever started this destination; what it does with that is its own affair.
    fn tell(&self, notice: &str) {
        let _ = guarded(|| (self.notice)(notice));
    }

    /// Decides on an offer; `None` when it was refused.
    fn accept(&mut self, opening: Opening, incoming: &mut dyn Incoming) -> Option<Session> {
        let Opening { call, session, hello } = opening;
        let (peer, version, generation) = (&call.peer, call.version, call.generation);
        let opened = guarded(|| open(&hello, incoming)).unwrap_or_else(|what| {
            Err((
                ErrorCode::Local,
                format!("this destination panicked as it made memory for the guest: {what}"),
            ))
        });
        let (ram, guest) = match opened {
            Ok(opened) => opened,
            Err((code, reason)) => {
                self.tell(&format!("refused the guest offered by {peer}: {reason}"));
                call.link.send(Message::Error { code, text: reason });
                return None;
            }
        };
        let reconnect = self.options.reconnect_timeout.min(Duration::from_millis(hello.reconnect_ms.into()));
        let resume = if reconnect.is_zero() { 0 } else { capability::RESUME };
        let capabilities = hello.capabilities & (self.capabilities(&hello, &*ram) | resume);
        let agreed = capabilities & capability::RESUME != 0;
        let outages = Outages::new(if agreed { reconnect } else { Duration::ZERO });
        let (hasher, timeout) = (PageHasher::new(hello.seed), self.options.timeout);
        let sink = Arc::new(PageSink::new(ram.clone(), hasher, capabilities, timeout));
        self.front.give_to(&call);
        self.refuse_callers();
        let link = call.link;
        link.send(Message::Welcome(Welcome {
            version,
            capabilities,
            streams: hello.streams,
            timeout_ms: self.options.timeout.as_millis().try_into().unwrap_or(u32::MAX),
            reconnect_ms: reconnect.as_millis().try_into().unwrap_or(u32::MAX),
            host: Host::this().answer(hello.host, hello.seed),
        }));
        self.progress.update(|r| {
            *r = Report { status: Status::Setup, page_size: PAGE_SIZE as u32, ..Report::default() };
            r.pages.total = ram.layout().pages();
            r.streams = hello.streams;
        });
        Some(Session {
            machine: session,
            link: Some(link),
            generation,
            hello,
            ram,
            guest,
            acceptor: Acceptor::new(sink.clone(), self.options.rdma.pinned_max),
            sink,
            dense: None,
            enlarger: None,
            streams: DestinationStreams::new(),
            workers: BTreeMap::new(),
            postcopy: None,
            state: Vec::new(),
            began: Instant::now(),
            setup: Duration::ZERO,
            event_sender: self.event_sender.clone(),
            outages,
            resumed: false,
            announced: false,
        })
    }
}

impl Destination {
    /// What this side can do for such a guest, besides taking a session up again.
    fn capabilities(&self, hello: &Hello, ram: &dyn GuestRam) -> u64 {
        if !hello.live {
            return capability::ENCODINGS;
        }
        match ram.missing_unit() {
            Ok(_) => capability::ENCODINGS | capability::POSTCOPY,
            Err(error) => {
                self.tell(&format!("no postcopy here: {}", explain(&error)));
                capability::ENCODINGS
            }
        }
    }
}

/// Memory for the guest that is offered, and who is to run it; or why not.
fn open(hello: &Hello, incoming: &mut dyn Incoming) -> Result<Opened, (ErrorCode, String)> {
    let refused = |reason| (ErrorCode::Layout, reason);
    let layout = Layout::new(hello.regions.clone()).map_err(|e| refused(e.to_string()))?;
    let layout = check_presence(hello, layout).map_err(refused)?;
    let ram = incoming.open(hello, layout).map_err(refused)?;
    let guest = incoming.guest();
    if hello.live != guest.is_some() {
        return Err(refused(
            if hello.live {
                "this destination takes memory alone, not a running guest; use `pageferry vm --incoming`"
            } else {
                "this destination waits for a running guest, not for memory alone; use `pageferry recv`"
            }
            .into(),
        ));
    }
    let brought = format!("the guest brings {} bytes", hello.data_bytes);
    check_room(&brought, hello.data_bytes, ram.room()).map_err(|reason| (ErrorCode::NoRoom, reason))?;
    crate::reserve::fill();
    check_headroom(destination_bytes(ram.layout(), hello.streams))
        .map_err(|e| (ErrorCode::Local, e.to_string()))?;
    Ok((ram, guest))
}

type Opened = (Arc<dyn GuestRam>, Option<Arc<dyn Guest>>);

/// Refuses a guest whose pages have no room here, before the first of them comes; `what` says how much `needed` is.
fn check_room(what: &str, needed: u64, room: Option<Room>) -> Result<(), String> {
    match room {
        Some(Room { bytes, of, hint }) if bytes < needed => {
            Err(format!("{what}, but {of} has {bytes} left: {hint}"))
        }
        _ => Ok(()),
    }
}

/// Does `work`; a panic in it is an error like another.
fn caught<T>(work: impl FnOnce() -> Result<T, IncomingError>) -> Result<T, IncomingError> {
    guarded(work).unwrap_or_else(|what| Err(IncomingError::Panicked { what }))
}

/// Starts a thread that serves a session.
fn start_thread(
    name: String,
    work: impl FnOnce() + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, IncomingError> {
    let started = std::thread::Builder::new().name(name.clone()).spawn(work);
    started.map_err(|source| IncomingError::Thread { name, source })
}

/// Refuses maps that are not the layout's.
fn check_presence(hello: &Hello, layout: Layout) -> Result<Layout, String> {
    let (found, expected) = (hello.presence.len(), Hello::presence_len(&layout));
    if found != expected {
        return Err(format!("field presence map has {found} bytes; the layout's has {expected}"));
    }
    match hello.dense.len() {
        0 => Ok(layout),
        len if len == expected => Ok(layout),
        len => Err(format!("field dense map has {len} bytes; the layout's presence map has {expected}")),
    }
}

/// A data stream's worker.
struct Worker {
    breaker: Arc<dyn Breaker>,
    thread: std::thread::JoinHandle<()>,
}

/// What comes of READY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handover {
    /// The guest is this side's.
    Go,
    /// The source lost its connections, and pages move again.
    TakenBack,
}

/// One session.
struct Session {
    machine: DestinationSession,
    /// `None` once it broke.
    link: Option<Link>,
    generation: u64,
    hello: Hello,
    ram: Arc<dyn GuestRam>,
    guest: Option<Arc<dyn Guest>>,
    sink: Arc<PageSink>,
    acceptor: Acceptor,
    /// What is to be brought in as large pages, once all streams are open: all cores are then busy, and opening them would take
    /// longer than the memory.
    dense: Option<Vec<Range<u32>>>,
    /// Works while pages come.
    enlarger: Option<Enlarger>,
    streams: DestinationStreams,
    /// By number, as `streams` has them.
    workers: BTreeMap<u16, Worker>,
    /// Once the source has announced it.
    postcopy: Option<postcopy::Postcopy>,
    state: Vec<StateBlob>,
    began: Instant,
    setup: Duration,
    event_sender: Sender<Event>,
    outages: Outages,
    /// After GO: the guest was told to run, where there is one that is to.
    resumed: bool,
    /// After GO: the source and the VMM were told.
    announced: bool,
}

impl Session {
    /// The phases: populate, move, finish, hand over.
    fn run(&mut self, listening: &Destination, incoming: &mut dyn Incoming) -> Result<(), IncomingError> {
        self.populate(listening)?;
        let prepared = self.machine.prepared();
        self.send(prepared);
        self.setup = self.began.elapsed();
        listening.progress.update(|r| r.status = Status::Active);
        loop {
            let theirs = self.take_pages(listening)?;
            // A source that lost its connections meanwhile takes the session back to where pages move.
            let Some(mine) = self.finish(listening, &theirs)? else { continue };
            let ready = self.machine.ready(mine);
            self.send(ready);
            if self.wait_go(listening)? == Handover::Go {
                break;
            }
        }
        self.hold(listening, incoming)
    }

    /// From GO on the guest is this side's, whatever becomes of the source, and whatever fails here: a panic ends neither the guest nor
    /// the bringing of its pages.
    fn hold(&mut self, listening: &Destination, incoming: &mut dyn Incoming) -> Result<(), IncomingError> {
        let mut panics = 0;
        loop {
            match caught(|| self.own(listening, incoming)) {
                Err(IncomingError::Panicked { what }) if panics < PANICS_MAX => {
                    panics += 1;
                    listening.tell(&format!("panicked, and goes on, for the guest is here: {what}"));
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
    fn own(&mut self, listening: &Destination, incoming: &mut dyn Incoming) -> Result<(), IncomingError> {
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
                listening.progress.update(|r| r.status = Status::PostcopyActive);
            }
            incoming.arrived(self.runs());
        }
        self.take_rest(listening)?;
        self.linger(listening);
        self.end_postcopy();
        Ok(())
    }

    fn send(&self, message: Message) {
        if let Some(link) = &self.link {
            link.send(message);
        }
    }

    /// Whether there is a guest that ran at the source when it was moved.
    fn runs(&self) -> bool {
        self.guest.is_some() && !self.state.iter().any(|blob| blob.name == RUN_STATE && blob.bytes == [0])
    }

    /// Serves streams and messages until FINISH.
    fn take_pages(&mut self, listening: &Destination) -> Result<Totals, IncomingError> {
        loop {
            self.check_outage(listening)?;
            let Some(event) = self.next(listening)? else { continue };
            let event = match event {
                LinkEvent::Message(message) => self.machine.handle(message)?,
                LinkEvent::Dead(error) => {
                    self.lose_link(listening, error)?;
                    continue;
                }
            };
            match event {
                DestinationEvent::StreamLost(stream) => self.stop_stream(stream),
                DestinationEvent::State(blobs) => self.state = blobs,
                DestinationEvent::Finish(totals) => return Ok(totals),
                DestinationEvent::Reply(reply) => self.send(reply),
                DestinationEvent::Resent(bytes) => listening.progress.update(|r| r.resent_bytes = bytes),
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
    fn next(&mut self, listening: &Destination) -> Result<Option<LinkEvent>, IncomingError> {
        if listening.progress.is_cancelled() && self.machine.status() != SessionStatus::Running {
            return Err(IncomingError::Cancelled);
        }
        // Once all is here, what is left to do takes next to nothing.
        if self.machine.is_moving() {
            usage::short_of_memory()?;
        }
        self.show(&listening.progress);
        let Ok(event) = listening.events.recv_timeout(TICK) else { return Ok(None) };
        match event {
            Event::Link { generation, event } if generation == self.generation => return Ok(Some(event)),
            Event::Link { generation, event } => return self.on_other_link(listening, generation, event),
            Event::Resume { link, generation } => self.outages.knock(link, generation),
            Event::Stream { request, stream, place } => {
                drop(place);
                self.attach(request, stream, listening)?;
            }
            Event::StreamEnded { stream, result } => {
                self.stream_ended(stream, result)?;
                self.take_up(listening);
                if let Some(request) = self.outages.waiting.remove(&stream_number(stream)) {
                    self.attach(request.1, request.0, listening)?;
                }
            }
            Event::Postcopy(event) => self.on_postcopy(event)?,
            Event::Refused { peer, reason } => {
                listening.tell(&format!("refused a connection from {peer}: {reason}"));
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
            Event::Control(call) => opening::refuse_busy(&call.link),
            Event::Notice(text) => listening.tell(&text),
        }
        Ok(None)
    }

    /// A data stream of this session was opened.
    fn attach(
        &mut self,
        request: StreamRequest,
        stream: u16,
        listening: &Destination,
    ) -> Result<(), IncomingError> {
        let (number, again) = (stream_number(stream), stream != stream_number(stream));
        let moving = self.machine.is_moving() && !self.setup.is_zero() && !self.outages.is_taking_up();
        let agreed = if again && self.outages.patience.is_zero() { 0 } else { self.hello.streams };
        if let Err(why) = self.streams.admit(stream, agreed, moving) {
            request.refuse(ErrorCode::Protocol, format!("stream {number} is refused: {why}"));
            return Ok(());
        }
        if let Some(earlier) = self.streams.running(stream) {
            self.outages.waiting.insert(number, (stream, request));
            self.stop_stream(earlier);
            return Ok(());
        }
        if again {
            listening.progress.update(|r| r.streams_reconnected += 1);
        }
        let Some(carrier) = self.acceptor.accept(request, stream)? else { return Ok(()) };
        let breaker = carrier.breaker();
        let (sink, events, broken) = (self.sink.clone(), self.event_sender.clone(), breaker.clone());
        let thread = start_thread(format!("recv-{stream}"), move || {
            let result = receive_stream(&sink, carrier, stream);
            if result.is_err() {
                broken.shutdown();
            }
            let _ = events.send(Event::StreamEnded { stream, result });
        })?;
        self.streams.started(stream);
        self.workers.insert(number, Worker { breaker, thread });
        if self.workers.len() == usize::from(self.hello.streams)
            && let Some(dense) = self.dense.take()
        {
            self.enlarger = Some(Enlarger::start(&self.sink, dense));
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
        if self.streams.runs(stream)
            && let Some(worker) = self.workers.remove(&stream_number(stream))
        {
            let _ = worker.thread.join();
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
            Stop::Worker => self.break_stream(stream),
            Stop::Nothing => {}
        }
    }

    fn break_stream(&self, stream: u16) {
        if let Some(worker) = self.workers.get(&stream_number(stream)) {
            worker.breaker.shutdown();
        }
    }

    /// Waits for the streams' ends, compares accounts, loads device state, makes memory durable. `None` when the source has lost its
    /// connections meanwhile, and pages move again.
    fn finish(&mut self, listening: &Destination, theirs: &Totals) -> Result<Option<Totals>, IncomingError> {
        let deadline = Instant::now() + listening.options.timeout;
        while let Some(stream) = self.streams.unfinished() {
            if Instant::now() > deadline {
                return Err(IncomingError::Stream { stream: stream_number(stream) });
            }
            match self.next(listening)? {
                Some(LinkEvent::Dead(error)) => {
                    self.lose_link(listening, error)?;
                    self.wait_resumed(listening)?;
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
        self.enlarger = None;
        self.sink.end_placing();
        let streams = self.streams.accounts();
        let mine = Totals { streams, pages: self.carried_pages(), state: state_digest(&self.state) };
        let mut theirs = theirs.clone();
        // What the source may not have heard yet when it said FINISH.
        theirs.streams.retain(|end| !self.streams.is_lost(end.stream));
        compare_totals(&mine, &theirs)?;
        self.miss_pages()?;
        if let Some(guest) = &self.guest {
            let state: Vec<_> = self.state.iter().filter(|blob| blob.name != RUN_STATE).cloned().collect();
            guest.load_state(&state)?;
        }
        self.ram.persist()?;
        Ok(Some(mine))
    }

    /// Waits for GO, over whatever link the source has, or for a source that lost its connections and takes READY back.
    fn wait_go(&mut self, listening: &Destination) -> Result<Handover, IncomingError> {
        let timeout = listening.options.handover_timeout.max(self.outages.patience);
        let mut lost = None::<Instant>;
        loop {
            // A query brings a new link.
            lost = if self.link.is_some() { None } else { lost.or_else(|| Some(Instant::now())) };
            if lost.is_some_and(|at| at.elapsed() > timeout) {
                return Err(IncomingError::NoGo { seconds: timeout.as_secs() });
            }
            match self.next(listening)? {
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
    fn linger(&mut self, listening: &Destination) {
        let live = self.guest.is_some();
        let mut patience = self.patience_for_questions(listening, false);
        if self.postcopy.is_some() {
            // For as long as it would have waited for the source: that one asks without end.
            patience = patience.max(listening.options.postcopy_timeout);
        }
        let deadline = Instant::now() + patience;
        // After postcopy the last word follows ARRIVED. One that comes before only says that the source knows who has the guest.
        let mut answered = self.postcopy.is_none();
        while Instant::now() < deadline {
            match self.next(listening) {
                Ok(Some(LinkEvent::Message(Message::Running))) if !answered => {}
                Ok(Some(LinkEvent::Message(Message::Running))) | Err(_) => return,
                Ok(Some(LinkEvent::Dead(LinkError::Closed))) if !live => return,
                Ok(Some(LinkEvent::Dead(_))) => self.link = None,
                Ok(Some(LinkEvent::Message(Message::Query))) => {
                    self.send(Message::Status(self.machine.status()));
                }
                Ok(Some(LinkEvent::Message(message))) => match self.machine.handle(message) {
                    Ok(DestinationEvent::Reply(reply)) => self.send(reply),
                    // Nothing is missing, or the guest would be lost; whatever the source thinks.
                    Ok(DestinationEvent::Sent(pages)) => answered |= self.on_sent(pages).is_ok(),
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
        self.end_postcopy();
        for worker in std::mem::take(&mut self.workers).into_values() {
            worker.breaker.shutdown();
            let _ = worker.thread.join();
        }
        let peer_knows = matches!(error, IncomingError::Session(SessionError::Peer { .. }));
        if !peer_knows {
            self.send(Message::Error { code: error.code(), text: explain(error) });
        }
        if let Some(link) = &self.link {
            // The process may end next, and the source is to hear why.
            link.flush(FAREWELL);
        }
    }

    /// Shows how far it is.
    fn show(&self, progress: &Progress) {
        let received = self.sink.received();
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        progress.update(|r| {
            r.logical_bytes = get(&received.logical);
            r.wire_bytes = get(&received.wire);
            r.pages.zero = get(&received.zero);
            r.pages.raw = get(&received.raw);
            r.pages.delta = get(&received.delta);
            r.pages.compressed = get(&received.compressed);
            r.time_ms = (&received.spent).into();
        });
        self.show_postcopy(progress);
    }

    fn report(&self, progress: &Progress, cpu: f64, error: Option<&IncomingError>) {
        self.show(progress);
        let (total, setup) = (self.began.elapsed(), self.setup);
        let untouched = self.ram.layout().pages() - self.sink.carried_pages();
        progress.update(|r| {
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
