//! The destination's process: the engine's phases, on an environment of this world.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pagecopy::backend::{self, BackendError, GuestRam, StateBlob};
use pagecopy::layout::Layout;

use super::base::OldCopy;
use super::guest::Guest;
use super::network::{Connection, Side};
use super::world::{Event as Happening, Link, Micros, NextTurn, World, sleep};
use super::{HANDOVER_TIMEOUT, POSTCOPY_TIMEOUT, SESSION, STRUCK, TIMEOUT, panic_silently};
use crate::destination::stepped::SteppedWorker;
use crate::destination::{BaseCopy, PageSink, ReceiveError};
use crate::engine::destination::environment::{Call, Environment, Event, PostcopyEvent, Speaks};
use crate::engine::destination::opening::Reception;
use crate::engine::destination::{Arrival, Incoming, IncomingError, Offer};
use crate::engine::progress::Progress;
use crate::engine::{Options, explain};
use crate::link::{LinkError, LinkEvent};
use crate::postcopy::stepped::{HEAD_LEN, SteppedReceiver};
use crate::postcopy::{MissingSink, PostcopyError};
use crate::session::SessionError;
use crate::wire::control::{ErrorCode, Message, StreamEnd};
use crate::wire::{Preamble, Role, VERSION_MAX};

const ME: Side = Side::Destination;
/// No frame of postcopy is longer.
const FRAME_LEN_MAX: usize = 1 << 20;

/// What the process is told.
pub(super) struct Task {
    guest: Arc<Guest>,
    options: Options,
    progress: Progress,
}

impl Task {
    /// Waits for a source that lost its connections for so long; 0: not at all.
    pub(super) fn new(guest: &Arc<Guest>, reconnect_max: Micros) -> Self {
        let options = Options {
            timeout: Duration::from_micros(TIMEOUT),
            handover_timeout: Duration::from_micros(HANDOVER_TIMEOUT),
            reconnect_timeout: Duration::from_micros(reconnect_max),
            postcopy_timeout: Duration::from_micros(POSTCOPY_TIMEOUT),
            ..Options::default()
        };
        Self { guest: guest.clone(), options, progress: Progress::default() }
    }
}

/// The VMM.
struct Machine(Arc<Guest>);

impl Incoming for Machine {
    fn open(&mut self, offer: &Offer) -> Result<Arc<dyn GuestRam>, String> {
        assert_eq!(&offer.layout, GuestRam::layout(&*self.0), "the source's layout");
        Ok(self.0.clone())
    }

    fn guest(&self) -> Option<Arc<dyn backend::Guest>> {
        Some(self.0.clone())
    }
}

/// A connection that is closed with whoever has it.
struct Held {
    wire: usize,
    connection: Connection,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.connection.close(ME);
    }
}

/// A connection for messages.
pub(super) struct Spoken {
    held: Held,
    world: Rc<RefCell<World>>,
}

impl Speaks for Spoken {
    fn send(&self, message: Message) {
        self.world.borrow_mut().say(self.held.wire, ME, &message);
    }

    fn flush(&self, _limit: Duration) {}

    fn is_sending(&self) -> bool {
        false
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// A connection that is not answered.
pub(super) struct Request(Held);

type Heard = Event<Spoken, Request, Request>;

#[derive(Default)]
struct State<'a> {
    /// A session was taken.
    agreed: bool,
    /// It is over: nobody is let in.
    over: bool,
    /// Connections whose preamble has not come.
    strangers: BTreeMap<usize, Vec<u8>>,
    /// Connections that said what they are for.
    greeted: BTreeSet<usize>,
    /// Links by generation.
    links: BTreeMap<u64, Link>,
    generation: u64,
    heard: VecDeque<Heard>,
    /// By wire. The connection is closed after its worker.
    workers: BTreeMap<usize, (u16, SteppedWorker<'a>, Held)>,
    /// When memory is prepared.
    populated_at: Option<Micros>,
    /// Connections of postcopy, by wire.
    receivers: BTreeMap<usize, Receiving>,
    /// Asks for what is touched.
    missing: Option<Arc<MissingSink>>,
    /// The phases panic where they wait next.
    panics: bool,
}

/// A connection of postcopy.
struct Receiving {
    stream: u16,
    receiver: Option<SteppedReceiver>,
    held: Held,
}

/// The environment: connections of the world, and workers that take their turns when the world says so.
pub(super) struct Env<'a> {
    sink: &'a OnceLock<Arc<PageSink>>,
    /// What it has of the guest already.
    base: Option<Arc<OldCopy>>,
    world: Rc<RefCell<World>>,
    state: RefCell<State<'a>>,
}

impl<'a> Env<'a> {
    pub(super) fn new(
        sink: &'a OnceLock<Arc<PageSink>>,
        base: Option<Arc<OldCopy>>,
        world: &Rc<RefCell<World>>,
    ) -> Self {
        Self { sink, base, world: world.clone(), state: RefCell::default() }
    }

    fn held(&self, wire: usize) -> Held {
        Held { wire, connection: self.world.borrow().connection(wire) }
    }

    /// The clock went on.
    fn ticked(&self) {
        let wires: Vec<usize> = self.state.borrow().workers.keys().copied().collect();
        wires.into_iter().for_each(|wire| self.worker_turn(wire));
        let wires: Vec<usize> = self.state.borrow().receivers.keys().copied().collect();
        wires.into_iter().for_each(|wire| self.postcopy_turn(wire));
    }

    /// Something came on a wire, or its end.
    fn touched(&self, wire: usize) {
        let mut world = self.world.borrow_mut();
        let state = self.state.borrow();
        if state.workers.contains_key(&wire) {
            let after = world.rng.range(0, 300);
            world.schedule(after, Happening::Worker(wire));
        } else if state.receivers.contains_key(&wire) {
            let after = world.rng.range(0, 300);
            world.schedule(after, Happening::Postcopy(wire, false));
        } else if !state.greeted.contains(&wire) && !world.connection(wire).is_down(ME) {
            drop((world, state));
            self.greet(wire);
        }
    }

    /// A connection that has not said yet what it is for.
    fn greet(&self, wire: usize) {
        let state = &mut *self.state.borrow_mut();
        let connection = self.world.borrow().connection(wire);
        let mut bytes = state.strangers.remove(&wire).unwrap_or_default();
        let open = connection.read_all(ME, &mut bytes);
        let Some(preamble) = bytes.first_chunk::<{ Preamble::LEN }>() else {
            if open {
                state.strangers.insert(wire, bytes);
            } else {
                connection.close(ME);
            }
            return;
        };
        state.greeted.insert(wire);
        let preamble = Preamble::decode(preamble).expect("the network damages nothing");
        assert_eq!(preamble.session, SESSION);
        let held = self.held(wire);
        let stream = preamble.stream;
        let event = match preamble.role {
            Role::Control if state.agreed => return self.say_no(&held, ErrorCode::Busy),
            Role::Control => {
                let (link, generation) = self.link(state, held, &bytes);
                let peer = "the source".into();
                Event::Control(Call { link, peer, version: VERSION_MAX, generation, session: SESSION })
            }
            _ if state.over || !state.agreed => return self.say_no(&held, ErrorCode::UnknownSession),
            Role::Stream => Event::Stream { request: Request(held), stream },
            Role::Postcopy => Event::Postcopy(PostcopyEvent::Opened { connection: Request(held), stream }),
            Role::Resume => {
                let (link, generation) = self.link(state, held, &bytes);
                Event::Resume { link, generation }
            }
            Role::Query => {
                let (link, generation) = self.link(state, held, &bytes);
                Event::Query { link, generation }
            }
        };
        state.heard.push_back(event);
    }

    /// A link whose first bytes may have come along with the preamble.
    fn link(&self, state: &mut State<'_>, held: Held, bytes: &[u8]) -> (Spoken, u64) {
        state.generation += 1;
        state.links.insert(state.generation, Link::new(held.wire, bytes[Preamble::LEN..].to_vec()));
        (Spoken { held, world: self.world.clone() }, state.generation)
    }

    fn say_no(&self, held: &Held, code: ErrorCode) {
        self.world.borrow_mut().say(held.wire, ME, &Message::Error { code, text: "refused".into() });
    }

    /// A worker's turn: some frames, then the receipts.
    fn worker_turn(&self, wire: usize) {
        let mut state = self.state.borrow_mut();
        let mut world = self.world.borrow_mut();
        let Some((stream, worker, held)) = state.workers.get_mut(&wire) else { return };
        let mut frames = world.rng.range(1, 4);
        let result = loop {
            if !worker.buffered() && !held.connection.readable(ME) {
                break worker.idle().map(|()| None);
            }
            if frames == 0 {
                let after = world.rng.range(0, 500);
                return world.schedule(after, Happening::Worker(wire));
            }
            frames -= 1;
            match worker.frame() {
                Ok(None) => {}
                other => break other,
            }
        };
        let stream = *stream;
        drop((state, world));
        match result {
            Ok(None) => {}
            Ok(Some(end)) => self.worker_over(wire, stream, Ok(end)),
            Err(error) => self.worker_over(wire, stream, Err(error)),
        }
    }

    fn worker_over(&self, wire: usize, stream: u16, result: Result<StreamEnd, ReceiveError>) {
        let mut world = self.world.borrow_mut();
        if let Err(error) = &result {
            let lost = matches!(error, ReceiveError::Io { .. } | ReceiveError::Closed { .. });
            if !lost {
                world
                    .violated(format!("at the destination: {error}: {:?}", std::error::Error::source(error)));
            }
        }
        world.note(|| format!("worker {stream} is over: {result:?}"));
        let mut state = self.state.borrow_mut();
        state.workers.remove(&wire);
        state.heard.push_back(Event::StreamEnded { stream, result });
    }

    /// A turn of a connection of postcopy: some frames, some of which are damaged.
    fn postcopy_turn(&self, wire: usize) {
        let state = &mut *self.state.borrow_mut();
        let mut world = self.world.borrow_mut();
        let Some(Receiving { stream, receiver: Some(receiver), held }) = state.receivers.get_mut(&wire)
        else {
            return;
        };
        let stream = *stream;
        for _ in 0..world.rng.range(1, 3) {
            let head = held.connection.peek(ME, HEAD_LEN);
            let len = head.first_chunk().map_or(usize::MAX, |head| receiver.frame_len(head));
            let whole = held.connection.peek(ME, len.min(FRAME_LEN_MAX)).len() == len;
            if !whole && !held.connection.is_over(ME) {
                return;
            }
            if whole && len > HEAD_LEN && world.rng.percent(5) {
                let at = world.rng.range(HEAD_LEN as u64, len as u64 - 1) as usize;
                held.connection.damage(ME, at, world.rng.below(8) as u32);
                world.saw("postcopy frames damaged", 1);
            }
            if let Err(error) = receiver.frame() {
                world.note(|| format!("postcopy receiver {stream} is over: {error}"));
                use PostcopyError as E;
                if !matches!(error, E::Io { .. } | E::Closed { .. } | E::Memory { .. }) {
                    world.violated(format!("at the destination: {}", explain(&error)));
                }
                state.receivers.remove(&wire);
                state.heard.push_back(Event::Postcopy(PostcopyEvent::Ended(error)));
                return;
            }
        }
        let after = world.rng.range(0, 500);
        world.schedule(after, Happening::Postcopy(wire, false));
    }

    /// Asks for pages that the guest has touched.
    fn serve_touched(&self) {
        let missing = self.state.borrow().missing.clone();
        if let Some(Err(error)) = missing.map(|missing| missing.step_faults()) {
            self.state.borrow_mut().heard.push_back(Event::Postcopy(PostcopyEvent::Faults(error)));
        }
    }

    /// Whether there is something to hear.
    fn has_news(&self) -> bool {
        let state = &mut *self.state.borrow_mut();
        let mut world = self.world.borrow_mut();
        if state.populated_at.is_some_and(|at| at <= world.now) {
            state.populated_at = None;
            state.heard.push_back(Event::Populated(Ok(())));
        }
        if state.heard.is_empty() {
            for (&generation, link) in &mut state.links {
                if let Some(heard) = link.next(&mut world, ME) {
                    let event = heard.map_or(LinkEvent::Dead(LinkError::Closed), LinkEvent::Message);
                    state.heard.push_back(Event::Link { generation, event });
                    break;
                }
            }
        }
        !state.heard.is_empty()
    }
}

impl Environment for Env<'_> {
    type Link = Spoken;
    type Request = Request;
    type Postcopy = Request;

    async fn wait(&self) {
        if std::mem::take(&mut self.state.borrow_mut().panics) {
            panic_silently();
        }
        if !self.has_news() {
            NextTurn::new().await;
        }
    }

    fn next(&self) -> Option<Heard> {
        self.has_news();
        self.state.borrow_mut().heard.pop_front()
    }

    fn tell(&self, notice: &str) {
        self.world.borrow_mut().note(|| format!("the destination tells: {notice}"));
    }

    fn check_headroom(&self, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    fn base(&self, _layout: &Layout) -> Option<Arc<dyn BaseCopy>> {
        self.base.clone().map(|base| base as Arc<dyn BaseCopy>)
    }

    fn give_to(&self, _call: &Call<Spoken>) {
        self.state.borrow_mut().agreed = true;
    }

    async fn load_state(&self, guest: &dyn backend::Guest, state: &[StateBlob]) -> Result<(), BackendError> {
        let takes = self.world.borrow_mut().rng.range(0, 5000);
        sleep(&self.world, takes, ME).await;
        guest.load_state(state)
    }

    fn populate(
        &self,
        _ram: &Arc<dyn GuestRam>,
        _sink: &Arc<PageSink>,
        _runs: Vec<Range<u32>>,
    ) -> Result<usize, IncomingError> {
        let mut world = self.world.borrow_mut();
        let takes = world.rng.range(0, 5000);
        world.schedule(takes, Happening::Alarm(false));
        self.state.borrow_mut().populated_at = Some(world.now + takes);
        Ok(1)
    }

    fn end_populating(&self) {
        self.state.borrow_mut().populated_at = None;
    }

    fn enlarge(&self, _sink: &Arc<PageSink>, _runs: Vec<Range<u32>>) {}

    fn end_enlarging(&self) {}

    fn prepare_streams(&self, sink: &Arc<PageSink>) {
        assert!(self.sink.set(sink.clone()).is_ok(), "a destination serves one session");
    }

    fn refuse(&self, request: Request, code: ErrorCode, text: String) {
        self.world.borrow_mut().say(request.0.wire, ME, &Message::Error { code, text });
    }

    fn start_worker(&self, request: Request, stream: u16) -> Result<bool, IncomingError> {
        let sink = self.sink.get().expect("streams were prepared");
        let mut world = self.world.borrow_mut();
        let held = request.0;
        world.say(held.wire, ME, &Message::Attached { stream });
        let worker = SteppedWorker::new(sink, Box::new(held.connection.clone()), stream);
        let (wire, after) = (held.wire, world.rng.range(0, 300));
        world.schedule(after, Happening::Worker(wire));
        self.state.borrow_mut().workers.insert(wire, (stream, worker, held));
        Ok(true)
    }

    fn break_worker(&self, stream: u16) {
        let state = self.state.borrow();
        let Some((&wire, (_, _, held))) = state.workers.iter().find(|(_, (s, ..))| *s == stream) else {
            return;
        };
        // The connection is broken; its worker sees that after what has arrived already.
        held.connection.close(ME);
        let mut world = self.world.borrow_mut();
        let after = world.rng.range(0, 5000);
        world.schedule(after, Happening::Worker(wire));
    }

    fn join_worker(&self, _stream: u16) {}

    fn end_workers(&self) {
        self.state.borrow_mut().workers.clear();
    }

    fn refuse_postcopy(&self, connection: Request, code: ErrorCode, text: String) {
        self.refuse(connection, code, text);
    }

    fn admit_postcopy(&self, connection: Request, stream: u16) -> bool {
        let mut state = self.state.borrow_mut();
        // What has arrived on the one before it may still be taken.
        let same = state.receivers.values().filter(|receiving| receiving.stream == stream);
        same.for_each(|receiving| receiving.held.connection.close(ME));
        let held = connection.0;
        self.world.borrow_mut().say(held.wire, ME, &Message::Attached { stream });
        state.receivers.insert(held.wire, Receiving { stream, receiver: None, held });
        true
    }

    fn start_postcopy(&self, sink: &Arc<MissingSink>, stream: u16) -> Result<(), IncomingError> {
        let mut state = self.state.borrow_mut();
        let of_stream = |(_, receiving): &(&usize, &mut Receiving)| receiving.stream == stream;
        if let Some((&wire, receiving)) = state.receivers.iter_mut().rev().find(of_stream) {
            let channel = receiving.held.connection.channel(ME);
            receiving.receiver = Some(SteppedReceiver::new(sink, channel, stream));
            self.world.borrow_mut().schedule(0, Happening::Postcopy(wire, false));
        }
        Ok(())
    }

    fn serve_faults(&self, sink: &Arc<MissingSink>) -> Result<(), IncomingError> {
        self.state.borrow_mut().missing = Some(sink.clone());
        Ok(())
    }

    fn end_postcopy(&self) {
        let mut state = self.state.borrow_mut();
        state.receivers.clear();
        state.missing = None;
    }
}

type Phases<'a> = Pin<Box<dyn Future<Output = Result<Arrival, IncomingError>> + 'a>>;

/// The process.
pub(super) struct DestinationHost<'a> {
    env: &'a Env<'a>,
    phases: Option<Phases<'a>>,
    /// What it came to.
    result: Option<Result<(), IncomingError>>,
}

impl<'a> DestinationHost<'a> {
    pub(super) fn start(env: &'a Env<'a>, task: &'a Task) -> DestinationHost<'a> {
        let mut machine = Machine(task.guest.clone());
        let phases = async move {
            let reception = Reception::new(env, &task.options, &task.progress);
            reception.receive(&mut machine).await
        };
        let mut host = Self { env, phases: Some(Box::pin(phases)), result: None };
        host.turn();
        host
    }

    pub(super) fn is_over(&self) -> bool {
        self.result.is_some()
    }

    /// The guest came, whole.
    pub(super) fn is_through(&self) -> bool {
        matches!(self.result, Some(Ok(())))
    }

    /// Nobody has come.
    pub(super) fn is_idle(&self) -> bool {
        !self.env.state.borrow().agreed
    }

    pub(super) fn describe(&self) -> String {
        format!("{:?}", self.result)
    }

    /// It panics where it waits next.
    pub(super) fn panic(&mut self) {
        self.env.state.borrow_mut().panics = true;
        self.turn();
    }

    /// Something happens to it.
    pub(super) fn happen(&mut self, event: Happening) {
        let (env, world) = (self.env, &self.env.world);
        match event {
            Happening::Arrive(wire, _) | Happening::Notice(wire, _) | Happening::Look(wire, _) => {
                env.touched(wire);
            }
            Happening::Worker(wire) => env.worker_turn(wire),
            Happening::Postcopy(wire, _) => env.postcopy_turn(wire),
            // The guest has run.
            Happening::Guest(_) => env.serve_touched(),
            Happening::Tick(_) => {
                env.ticked();
                world.borrow_mut().schedule(super::TICK, event);
            }
            // The turn below is what it is for.
            Happening::Alarm(_) => {}
            Happening::Abort(_) | Happening::Refuse(_) | Happening::Lane(_) => {}
        }
        self.turn();
    }

    /// The phases look at everything that may have happened, and go on.
    fn turn(&mut self) {
        let Some(phases) = &mut self.phases else { return };
        if let Poll::Ready(result) = phases.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            self.phases = None;
            self.over(result.map(|_| ()));
        }
    }

    fn over(&mut self, result: Result<(), IncomingError>) {
        let mut world = self.env.world.borrow_mut();
        world.note(|| format!("the destination is through: {result:?}"));
        world.saw("no room for what is missing", u64::from(result.as_ref().is_err_and(is_no_room)));
        match &result {
            Err(IncomingError::Session(SessionError::Peer { .. })) => {}
            Err(IncomingError::Panicked { what }) if what == STRUCK => {}
            Err(error @ (IncomingError::Session(_) | IncomingError::Panicked { .. })) => {
                world.violated(format!("at the destination: {error}"));
            }
            _ => {}
        }
        let state = &mut *self.env.state.borrow_mut();
        (state.over, world.listening) = (true, false);
        state.workers.clear();
        state.heard.clear();
        state.receivers.clear();
        self.result = Some(result);
    }
}

/// Whether there was no room for what is missing.
fn is_no_room(error: &IncomingError) -> bool {
    matches!(error, IncomingError::Backend(error) if error.io().and_then(io::Error::raw_os_error) == Some(libc::ENOSPC))
}
