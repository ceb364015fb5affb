//! The destination's process: the engine's phases around the real session machine, stream bookkeeping and workers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pagecopy::backend::{self, StateBlob};
use pagecopy::digest::PageHasher;
use pagecopy::layout::Layout;

use super::guest::Guest;
use super::network::Side;
use super::world::{Event, Link, Micros, World};
use super::{HANDOVER_TIMEOUT, SESSION, TIMEOUT};
use crate::destination::stepped::SteppedWorker;
use crate::destination::{PageSink, ReceiveError};
use crate::session::{DestinationEvent, DestinationSession, SessionError, compare_totals};
use crate::streams::{DestinationStreams, Stop};
use crate::wire::control::{
    ErrorCode, Message, SessionStatus, StreamEnd, Totals, Welcome, capability, state_digest,
};
use crate::wire::{Preamble, Role, stream_number};

const ME: Side = Side::Destination;

#[derive(Debug)]
enum Phase {
    Listening,
    Preparing,
    Moving,
    /// Until the workers have ended.
    Finishing {
        theirs: Totals,
        deadline: Micros,
    },
    /// Loads device state, which takes a while.
    Loading {
        mine: Totals,
    },
    /// Since when there is no source.
    WaitGo {
        lost: Option<Micros>,
    },
    Linger {
        deadline: Micros,
    },
    Over,
}

/// The process.
pub(super) struct DestinationHost<'a> {
    sink_slot: &'a OnceLock<PageSink>,
    guest: Arc<Guest>,
    /// Its device state cannot be loaded.
    refuses_state: bool,
    phase: Phase,
    machine: DestinationSession,
    link: Option<Link>,
    /// Connections whose preamble has not come.
    strangers: BTreeMap<usize, Vec<u8>>,
    /// Connections that said what they are for.
    greeted: BTreeSet<usize>,
    streams_agreed: u16,
    streams: DestinationStreams,
    /// By wire.
    workers: BTreeMap<usize, (u16, SteppedWorker<'a>)>,
    state: Vec<StateBlob>,
    waited_for_go: bool,
    /// How long the source may stay away; 0: it does not come back.
    patience: Micros,
    reconnect_max: Micros,
    /// Since when the source is away.
    outage: Option<Micros>,
    /// A connection on which RESUME is to come.
    knocking: Option<Link>,
    /// What is said on a new control connection once all streams of before have stopped.
    taking_up: Option<(Link, Message)>,
    /// Streams, and their wires, whose number is still held by an earlier incarnation.
    waiting: BTreeMap<u16, (u16, usize)>,
}

impl<'a> DestinationHost<'a> {
    pub(super) fn new(
        sink_slot: &'a OnceLock<PageSink>,
        guest: &Arc<Guest>,
        refuses_state: bool,
        reconnect_max: Micros,
    ) -> DestinationHost<'a> {
        Self {
            sink_slot,
            guest: guest.clone(),
            refuses_state,
            phase: Phase::Listening,
            machine: DestinationSession::new(),
            link: None,
            strangers: BTreeMap::new(),
            greeted: BTreeSet::new(),
            streams_agreed: 0,
            streams: DestinationStreams::new(),
            workers: BTreeMap::new(),
            state: Vec::new(),
            waited_for_go: false,
            patience: 0,
            reconnect_max,
            outage: None,
            knocking: None,
            taking_up: None,
            waiting: BTreeMap::new(),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// Nobody has come.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Listening) && self.link.is_none()
    }

    pub(super) fn status(&self) -> SessionStatus {
        self.machine.status()
    }

    pub(super) fn describe(&self) -> String {
        format!("{:?}", self.phase)
    }

    /// It had said READY, and no GO came for as long as it waits without a source.
    pub(super) fn waited_for_go(&self) -> bool {
        self.waited_for_go
    }

    /// The clock went on.
    pub(super) fn ticked(&mut self, world: &mut World) {
        let wires: Vec<usize> = self.workers.keys().copied().collect();
        wires.into_iter().for_each(|wire| self.worker_turn(wire, world));
    }

    /// Something came on a wire, or its end.
    pub(super) fn touched(&mut self, wire: usize, world: &mut World) {
        if self.workers.contains_key(&wire) {
            let after = world.rng.range(0, 300);
            return world.schedule(after, Event::Worker(wire));
        }
        if !self.greeted.contains(&wire) && !world.connection(wire).is_down(ME) {
            self.greet(wire, world);
        }
    }

    /// A connection that has not said yet what it is for.
    fn greet(&mut self, wire: usize, world: &mut World) {
        let mut bytes = self.strangers.remove(&wire).unwrap_or_default();
        let open = world.connection(wire).read_all(ME, &mut bytes);
        let Some(preamble) = bytes.first_chunk::<{ Preamble::LEN }>() else {
            if open {
                self.strangers.insert(wire, bytes);
            } else {
                world.connection(wire).close(ME);
            }
            return;
        };
        self.greeted.insert(wire);
        let preamble = Preamble::decode(preamble).expect("the network damages nothing");
        assert_eq!(preamble.session, SESSION);
        let link = Link::new(wire, bytes[Preamble::LEN..].to_vec());
        match preamble.role {
            _ if self.is_over() => self.refuse(wire, ErrorCode::UnknownSession, world),
            Role::Control if self.is_idle() => self.link = Some(link),
            Role::Control => self.refuse(wire, ErrorCode::Busy, world),
            Role::Stream => self.attach(wire, preamble.stream, world),
            Role::Postcopy => self.refuse(wire, ErrorCode::Protocol, world),
            // The last who came is the one who did not give up.
            Role::Resume => {
                if let Some(old) = self.knocking.replace(link) {
                    world.connection(old.wire).close(ME);
                }
            }
            Role::Query => {
                let status = self.machine.status();
                world.say(wire, ME, &Message::Status(status));
                let lost = self.link.is_none();
                if (lost || matches!(status, SessionStatus::Ready | SessionStatus::Running))
                    && let Some(old) = self.link.replace(link)
                {
                    world.connection(old.wire).close(ME);
                }
            }
        }
    }

    fn refuse(&self, wire: usize, code: ErrorCode, world: &mut World) {
        world.say(wire, ME, &Message::Error { code, text: "refused".into() });
        world.connection(wire).close(ME);
    }

    fn attach(&mut self, wire: usize, stream: u16, world: &mut World) {
        let again = stream != stream_number(stream);
        let moving =
            matches!(self.phase, Phase::Moving) && self.machine.is_moving() && self.taking_up.is_none();
        let agreed = if again && self.patience == 0 { 0 } else { self.streams_agreed };
        let sink = self.sink_slot.get().filter(|_| self.streams.admit(stream, agreed, moving).is_ok());
        let Some(sink) = sink else { return self.refuse(wire, ErrorCode::Protocol, world) };
        if let Some(earlier) = self.streams.running(stream) {
            self.waiting.insert(stream_number(stream), (stream, wire));
            world.saw("streams that replaced an earlier incarnation", 1);
            return self.stop_stream(earlier, world);
        }
        world.say(wire, ME, &Message::Attached { stream });
        let worker = SteppedWorker::new(sink, Box::new(world.connection(wire)), stream);
        self.streams.started(stream);
        self.workers.insert(wire, (stream, worker));
    }

    /// A worker's turn: some frames, then the receipts.
    pub(super) fn worker_turn(&mut self, wire: usize, world: &mut World) {
        let Some((stream, worker)) = self.workers.get_mut(&wire) else { return };
        let connection = world.connection(wire);
        let mut frames = world.rng.range(1, 4);
        let result = loop {
            if !worker.buffered() && !connection.readable(ME) {
                break worker.idle().map(|()| None);
            }
            if frames == 0 {
                let after = world.rng.range(0, 500);
                return world.schedule(after, Event::Worker(wire));
            }
            frames -= 1;
            match worker.frame() {
                Ok(None) => {}
                other => break other,
            }
        };
        let stream = *stream;
        match result {
            Ok(None) => {}
            Ok(Some(end)) => self.worker_over(wire, stream, Ok(end), world),
            Err(error) => self.worker_over(wire, stream, Err(error), world),
        }
    }

    fn worker_over(
        &mut self,
        wire: usize,
        stream: u16,
        result: Result<StreamEnd, ReceiveError>,
        world: &mut World,
    ) {
        self.workers.remove(&wire);
        if let Err(error) = &result {
            let lost = matches!(error, ReceiveError::Io { .. } | ReceiveError::Closed { .. });
            if !lost {
                world
                    .violated(format!("at the destination: {error}: {:?}", std::error::Error::source(error)));
            }
        }
        world.note(|| format!("worker {stream} is over: {result:?}"));
        world.connection(wire).close(ME);
        let stopped = self.streams.ended(stream, result.map_err(|e| e.to_string()));
        if let Some(stopped) = stopped {
            self.say(&stopped, world);
        }
        self.take_up(world);
        if let Some((stream, wire)) = self.waiting.remove(&stream_number(stream)) {
            self.attach(wire, stream, world);
        }
    }

    fn say(&self, message: &Message, world: &mut World) {
        if let Some(link) = &self.link {
            world.say(link.wire, ME, message);
        }
    }

    /// Looks at everything that may have happened, and goes on.
    pub(super) fn turn(&mut self, world: &mut World) {
        if let Err(cause) = self.try_turn(world) {
            self.fail(&cause, world);
        }
    }

    fn try_turn(&mut self, world: &mut World) -> Result<(), String> {
        if matches!(self.phase, Phase::Loading { .. }) {
            // Whatever comes waits until it is done.
            return Ok(());
        }
        while !self.is_over()
            && let Some(link) = &mut self.link
            && let Some(heard) = link.next(world, ME)
        {
            match heard {
                Some(message) => self.hear(message, world)?,
                None => {
                    self.link = None;
                    if !matches!(self.phase, Phase::WaitGo { .. } | Phase::Linger { .. } | Phase::Listening) {
                        self.taking_up = None;
                        if self.patience == 0 || !self.streams.any() {
                            return Err("the source is gone".into());
                        }
                        self.outage = Some(world.now);
                    }
                }
            }
        }
        if !self.is_over()
            && let Some(heard) = self.knocking.as_mut().and_then(|link| link.next(world, ME))
        {
            self.hear_other(heard, world)?;
        }
        let now = world.now;
        if self.outage.is_some_and(|since| now - since >= self.patience) {
            return Err("the source did not come back".into());
        }
        match &mut self.phase {
            // Until the source comes back.
            Phase::Finishing { .. } if self.outage.is_some() => {}
            Phase::Finishing { deadline, .. } => match self.streams.unfinished() {
                Some(_) if now > *deadline => return Err("a stream did not end in order".into()),
                Some(_) => {}
                None => self.compare(world)?,
            },
            Phase::WaitGo { lost } => {
                *lost = if self.link.is_some() { None } else { lost.or(Some(now)) };
                if lost.is_some_and(|at| now - at > HANDOVER_TIMEOUT.max(self.patience)) {
                    self.waited_for_go = true;
                    return Err("no GO came".into());
                }
            }
            Phase::Linger { deadline } if now > *deadline => self.over(world),
            _ => {}
        }
        Ok(())
    }

    fn hear(&mut self, message: Message, world: &mut World) -> Result<(), String> {
        match (&self.phase, &message) {
            (Phase::WaitGo { .. } | Phase::Linger { .. }, Message::Query) => {
                self.say(&Message::Status(self.machine.status()), world);
                return Ok(());
            }
            (Phase::Linger { .. }, Message::Running) => {
                self.over(world);
                return Ok(());
            }
            _ => {}
        }
        let event = match self.machine.handle(message) {
            Ok(event) => event,
            Err(_) if matches!(self.phase, Phase::Linger { .. }) => return Ok(()),
            Err(error) => {
                if !matches!(error, SessionError::Peer { .. }) {
                    world.violated(format!("at the destination: {error}"));
                }
                return Err(error.to_string());
            }
        };
        match event {
            DestinationEvent::Hello(hello) => {
                let layout = Layout::new(hello.regions).expect("a real layout was offered");
                assert_eq!(&layout, backend::GuestRam::layout(&*self.guest));
                let (hasher, timeout) = (PageHasher::new(hello.seed), Duration::from_micros(TIMEOUT));
                self.patience = self.reconnect_max.min(u64::from(hello.reconnect_ms) * 1000);
                let resume = if self.patience == 0 { 0 } else { capability::RESUME };
                let capabilities = hello.capabilities & (capability::ENCODINGS | resume);
                if capabilities & capability::RESUME == 0 {
                    self.patience = 0;
                }
                let sink = PageSink::new(self.guest.clone(), hasher, capabilities, timeout);
                assert!(self.sink_slot.set(sink).is_ok(), "a destination serves one session");
                self.streams_agreed = hello.streams;
                let timeout_ms = (TIMEOUT / 1000) as u32;
                let reconnect_ms = (self.patience / 1000) as u32;
                let welcome = Welcome {
                    version: 1,
                    capabilities,
                    streams: hello.streams,
                    timeout_ms,
                    reconnect_ms,
                    host: 0,
                };
                self.say(&Message::Welcome(welcome), world);
                self.phase = Phase::Preparing;
                let after = world.rng.range(0, 5000);
                world.schedule(after, Event::Done);
            }
            DestinationEvent::StreamLost(stream) => self.stop_stream(stream, world),
            DestinationEvent::State(blobs) => self.state = blobs,
            DestinationEvent::Finish(theirs) => {
                self.phase = Phase::Finishing { theirs, deadline: world.now + TIMEOUT };
            }
            DestinationEvent::Reply(reply) => self.say(&reply, world),
            DestinationEvent::Go => self.run_guest(world),
            DestinationEvent::Nothing | DestinationEvent::Resent(_) => {}
            // The simulated source never says POSTCOPY.
            DestinationEvent::Postcopy | DestinationEvent::Missing(_) | DestinationEvent::Sent(_) => {}
        }
        Ok(())
    }

    fn stop_stream(&mut self, stream: u16, world: &mut World) {
        match self.streams.lost(stream) {
            Stop::Say(stopped) => self.say(&stopped, world),
            Stop::Worker => self.break_worker(stream, world),
            Stop::Nothing => {}
        }
    }

    /// The first message on a connection that wants to take the place of the control connection.
    fn hear_other(&mut self, heard: Option<Message>, world: &mut World) -> Result<(), String> {
        let Some(link) = self.knocking.take() else { return Ok(()) };
        match heard {
            Some(Message::Resume { epoch }) => match self.machine.resume(epoch) {
                Ok(resumed) => {
                    if let Some(old) = self.link.take() {
                        world.connection(old.wire).close(ME);
                    }
                    self.taking_up = Some((link, resumed));
                    self.state.clear();
                    self.phase = Phase::Moving;
                    for stream in self.streams.void() {
                        self.break_worker(stream, world);
                    }
                    self.take_up(world);
                }
                Err(error) => {
                    world.note(|| error.to_string());
                    self.refuse(link.wire, ErrorCode::Protocol, world);
                }
            },
            Some(Message::Error { text, .. }) if self.machine.status() != SessionStatus::Running => {
                return Err(text);
            }
            Some(_) | None => world.connection(link.wire).close(ME),
        }
        Ok(())
    }

    /// Goes on over another control connection once nothing of the streams of before reaches memory any more.
    fn take_up(&mut self, world: &mut World) {
        if self.streams.unfinished().is_some() {
            return;
        }
        let Some((link, resumed)) = self.taking_up.take() else { return };
        self.link = Some(link);
        self.outage = None;
        self.say(&resumed, world);
    }

    /// The connection is broken; its worker sees that after what has arrived already.
    fn break_worker(&self, stream: u16, world: &mut World) {
        if let Some((&wire, _)) = self.workers.iter().find(|(_, (s, _))| *s == stream) {
            world.connection(wire).close(ME);
            let after = world.rng.range(0, 5000);
            world.schedule(after, Event::Worker(wire));
        }
    }

    /// Something that took a while is done.
    pub(super) fn done(&mut self, world: &mut World) {
        match std::mem::replace(&mut self.phase, Phase::Moving) {
            Phase::Preparing => {
                let prepared = self.machine.prepared();
                self.say(&prepared, world);
            }
            Phase::Loading { mine } => {
                if self.refuses_state || backend::Guest::load_state(&*self.guest, &self.state).is_err() {
                    return self.fail("device state cannot be loaded", world);
                }
                let ready = self.machine.ready(mine);
                self.phase = Phase::WaitGo { lost: None };
                self.say(&ready, world);
            }
            other => self.phase = other,
        }
    }

    fn compare(&mut self, world: &mut World) -> Result<(), String> {
        let Phase::Finishing { theirs, .. } = &self.phase else { return Ok(()) };
        let sink = self.sink_slot.get().expect("made at HELLO");
        let streams = self.streams.accounts();
        let mine = Totals { streams, pages: sink.carried_pages(), state: state_digest(&self.state) };
        if let Err(error) = compare_totals(&mine, theirs) {
            world.violated(format!("at the destination: {error}"));
            return Err(error.to_string());
        }
        sink.end_placing();
        self.phase = Phase::Loading { mine };
        let after = world.rng.range(0, 5000);
        world.schedule(after, Event::Done);
        Ok(())
    }

    /// GO: the guest is this side's from here on.
    fn run_guest(&mut self, world: &mut World) {
        world.note(|| "the guest runs at the destination".into());
        self.guest.set_running(true);
        self.say(&Message::Running, world);
        self.phase = Phase::Linger { deadline: world.now + HANDOVER_TIMEOUT };
    }

    /// The guest is not this side's and never will be, unless it already was.
    fn fail(&mut self, cause: &str, world: &mut World) {
        world.note(|| format!("the destination fails: {cause}"));
        self.machine.abandon();
        if let Some(sink) = self.sink_slot.get() {
            sink.stop();
        }
        self.say(&Message::Error { code: ErrorCode::Local, text: cause.into() }, world);
        self.over(world);
    }

    fn over(&mut self, world: &mut World) {
        for wire in std::mem::take(&mut self.workers).into_keys() {
            world.connection(wire).close(ME);
        }
        let others = [self.link.take(), self.knocking.take(), self.taking_up.take().map(|(link, _)| link)];
        for link in others.into_iter().flatten() {
            world.connection(link.wire).close(ME);
        }
        for (_, wire) in std::mem::take(&mut self.waiting).into_values() {
            world.connection(wire).close(ME);
        }
        world.listening = false;
        self.phase = Phase::Over;
    }
}
