//! The source's process: the engine's phases, on an environment of this world.

mod process;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError};
use pagecopy::choose::CodecMode;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::policy::Limits;

pub(super) use self::process::SourceHost;
use super::guest::Guest;
use super::network::Side;
use super::world::{Event as Happening, Link, Micros, NextTurn, World, sleep};
use super::{SESSION, TIMEOUT, panic_silently};
use crate::carrier::SourceEnd;
use crate::clock;
use crate::engine::progress::Progress;
use crate::engine::source::environment::{Environment, Event, Opening, Patience};
use crate::engine::source::{Cause, SourceBackend};
use crate::engine::tuning::Tuning;
use crate::engine::{Options, explain};
use crate::link::{LinkError, LinkEvent};
use crate::postcopy::stepped::SteppedServer;
use crate::postcopy::{PageServer, PostcopyError};
use crate::source::stepped::{LaneSlot, SteppedLane};
use crate::source::{Batch, LaneError, PageSource, Waits};
use crate::uri::Uri;
use crate::wire::control::Message;
use crate::wire::{Role, SessionId, stream_number};

const ME: Side = Side::Source;

/// Who has the guest after the source's part is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The destination runs it.
    Moved,
    /// It runs on at the source.
    RunsOn,
    /// Nobody here knows, and somebody has ended the asking.
    Unknown,
    /// The destination ran it, and lost it before its pages were there.
    Lost,
}

/// What an attempt is like.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    pub(super) streams: u16,
    /// How long lost connections may take to come back; 0: they do not.
    pub(super) reconnect: Micros,
    pub(super) codec: CodecMode,
    pub(super) cache_bytes: u64,
    /// Rounds after which the guest is handed over before its pages.
    pub(super) postcopy_after_rounds: Option<u64>,
    pub(super) limits: Limits,
}

/// What the process is told, and what it shows.
pub(super) struct Task {
    backend: SourceBackend,
    options: Options,
    progress: Progress,
}

impl Task {
    pub(super) fn new(guest: &Arc<Guest>, attempt: &Attempt) -> Self {
        let options = Options {
            streams: attempt.streams,
            codec: attempt.codec,
            timeout: Duration::from_micros(TIMEOUT),
            reconnect_timeout: Duration::from_micros(attempt.reconnect),
            cache_bytes: attempt.cache_bytes,
            postcopy_after_rounds: attempt.postcopy_after_rounds,
            ..Options::default()
        };
        Self {
            backend: SourceBackend {
                ram: guest.clone(),
                log: guest.clone(),
                guest: Some(guest.clone()),
                paused: false,
                machine: "simulated".into(),
            },
            options,
            progress: Progress::new(Tuning { limits: attempt.limits, ..Tuning::default() }),
        }
    }
}

struct Lane<'a> {
    wire: usize,
    /// What comes before ATTACHED.
    opening: Option<Link>,
    stepped: Option<SteppedLane<'a>>,
    work: Option<Receiver<Batch>>,
    begun: Duration,
}

/// A connection of postcopy.
struct Served {
    wire: usize,
    lane: SteppedServer,
}

#[derive(Default)]
struct State<'a> {
    link: Option<Link>,
    /// By number.
    postcopy: BTreeMap<u16, Served>,
    server: Option<Arc<PageServer>>,
    lanes: BTreeMap<u16, Lane<'a>>,
    slots_used: usize,
    events: VecDeque<Event>,
    /// Lanes whose turn is scheduled.
    awake: BTreeSet<u16>,
    pages: Option<Arc<PageSource>>,
    /// Streams are being ended: lanes look for that.
    ending: bool,
    said_go: bool,
    /// How often it has asked what became of the guest.
    asked: u32,
    /// A stream died.
    lost: bool,
    /// The phases panic where they wait next.
    panics: bool,
}

/// The environment: connections of the world, and lanes that take their turns when the world says so.
pub(super) struct Env<'a> {
    slots: &'a [LaneSlot],
    world: Rc<RefCell<World>>,
    state: RefCell<State<'a>>,
    progress: Progress,
}

impl<'a> Env<'a> {
    pub(super) fn new(slots: &'a [LaneSlot], world: &Rc<RefCell<World>>, task: &Task) -> Self {
        let progress = task.progress.clone();
        Self { slots, world: world.clone(), state: RefCell::default(), progress }
    }

    fn wake(&self, stream: u16, within: Micros) {
        if self.state.borrow_mut().awake.insert(stream) {
            let mut world = self.world.borrow_mut();
            let after = world.rng.range(0, within);
            world.schedule(after, Happening::Lane(stream));
        }
    }

    fn wake_all(&self, within: Micros) {
        let streams: Vec<u16> = self.state.borrow().lanes.keys().copied().collect();
        streams.into_iter().for_each(|stream| self.wake(stream, within));
    }

    fn panic_if_told(&self) {
        if std::mem::take(&mut self.state.borrow_mut().panics) {
            panic_silently();
        }
    }

    fn wake_postcopy(&self) {
        let mut world = self.world.borrow_mut();
        for served in self.state.borrow().postcopy.values() {
            let after = world.rng.range(0, 1000);
            world.schedule(after, Happening::Postcopy(served.wire, true));
        }
    }

    /// Something came on a wire, or its end.
    fn touched(&self, wire: usize) {
        let state = self.state.borrow();
        if state.postcopy.values().any(|served| served.wire == wire) {
            let mut world = self.world.borrow_mut();
            let after = world.rng.range(0, 100);
            return world.schedule(after, Happening::Postcopy(wire, true));
        }
        let stream = state.lanes.iter().find(|(_, lane)| lane.wire == wire).map(|(&stream, _)| stream);
        drop(state);
        if let Some(stream) = stream {
            self.wake(stream, 100);
        }
    }

    /// Lanes that have something to do get to do it.
    fn look_after_lanes(&self) {
        let state = self.state.borrow();
        let work = |lane: &Lane<'_>| lane.work.as_ref().is_some_and(|work| !work.is_empty());
        let busy = state.ending || state.lanes.values().any(work);
        drop(state);
        if busy {
            self.wake_all(1500);
        }
    }

    /// A lane's turn: receipts, then a batch.
    fn lane_turn(&self, stream: u16) {
        let mut state = self.state.borrow_mut();
        state.awake.remove(&stream);
        let Some(lane) = state.lanes.get_mut(&stream) else { return };
        let connection = self.world.borrow().connection(lane.wire);
        if let Some(link) = &mut lane.opening {
            let heard = link.next(&mut self.world.borrow_mut(), ME);
            let end = match heard {
                None => return,
                Some(Some(Message::Attached { stream: attached })) if attached == stream => {
                    lane.opening = None;
                    Ok(connection.source_end())
                }
                Some(Some(Message::Error { text, .. })) => Err(LinkError::Refused(text).into()),
                Some(_) => Err(LinkError::Closed.into()),
            };
            let took = clock::now() - lane.begun;
            if end.is_err() {
                connection.close(ME);
                state.lanes.remove(&stream);
            }
            state.events.push_back(Event::Opened { id: stream, end, took });
            return;
        }
        let Some(stepped) = &mut lane.stepped else { return };
        let mut over = false;
        loop {
            let more = connection.readable(ME);
            match stepped.receive() {
                Ok(true) | Err(()) => over = true,
                Ok(false) => {}
            }
            if over || !more {
                break;
            }
        }
        let work = lane.work.as_ref().expect("a lane that was started takes from something");
        let (mut more, mut sent) = (false, None);
        if !over {
            let pages = stepped.pages();
            let full = !work.is_empty() && !stepped.has_room(pages * (PAGE_SIZE as u64 + 512));
            let alive = match if full { Err(TryRecvError::Empty) } else { work.try_recv() } {
                _ if full => true,
                Ok(batch) => stepped.send(batch, self.world.borrow_mut().rng.percent(80)),
                Err(TryRecvError::Disconnected) => {
                    let (account, alive) = stepped.end_sending();
                    sent = account;
                    alive
                }
                Err(TryRecvError::Empty) => stepped.idle(),
            };
            over = !alive;
            more = !work.is_empty();
        }
        state.events.extend(sent.map(Event::LaneSent));
        drop(state);
        if over {
            self.lane_over(stream);
        } else if more {
            self.wake(stream, 1500);
        }
        self.no_damage();
    }

    fn lane_over(&self, stream: u16) {
        let mut state = self.state.borrow_mut();
        let Some(lane) = state.lanes.remove(&stream) else { return };
        let mut world = self.world.borrow_mut();
        world.connection(lane.wire).close(ME);
        let Some(stepped) = lane.stepped else { return };
        let end = stepped.into_end();
        world.note(|| format!("lane {stream} is over: {:?}", end.result));
        if let Err(error) = &end.result {
            state.lost = true;
            if matches!(error, LaneError::Fatal { .. } | LaneError::Receipt { .. }) {
                world.violated(format!("at the source: {error}: {:?}", std::error::Error::source(error)));
            }
        }
        world.saw("frames taken back", end.unreceipted.len() as u64);
        state.events.push_back(Event::LaneEnd(end));
    }

    /// A turn of a connection of postcopy: what has come, and some frames.
    fn postcopy_turn(&self, wire: usize) {
        let state = &mut *self.state.borrow_mut();
        let Some(server) = state.server.clone() else { return };
        let Some((&stream, served)) = state.postcopy.iter_mut().find(|(_, served)| served.wire == wire)
        else {
            return;
        };
        let mut world = self.world.borrow_mut();
        let waiting = server.waiting();
        for _ in 0..world.rng.range(1, 3) {
            if let Err(end) = served.lane.turn() {
                world.note(|| format!("postcopy connection {stream} is over: {}", end.error));
                if !matches!(
                    end.error,
                    PostcopyError::Io { .. } | PostcopyError::Closed { .. } | PostcopyError::Timeout { .. }
                ) {
                    world.violated(format!("at the source: {}", explain(&end.error)));
                }
                world.saw("postcopy connections lost", 1);
                state.postcopy.remove(&stream);
                state.events.push_back(Event::PostcopyEnd(end));
                return;
            }
        }
        if server.waiting() != waiting {
            let after = world.rng.range(0, 1500);
            world.schedule(after, Happening::Postcopy(wire, true));
        }
    }

    /// Nothing damages what travels, so that every receipt matches unless its page was sent from where the guest writes.
    fn no_damage(&self) {
        let state = self.state.borrow();
        let Some(pages) = &state.pages else { return };
        let mismatches = pages.counters().mismatches.load(Ordering::Relaxed);
        if mismatches != 0 {
            self.world.borrow_mut().violated(format!(
                "{mismatches} pages arrived other than they were sent: a delta on a wrong base, or two streams at once"
            ));
        }
    }

    /// Whether there is something to hear.
    fn has_news(&self) -> bool {
        let mut state = self.state.borrow_mut();
        if state.events.is_empty()
            && let Some(heard) =
                state.link.as_mut().and_then(|link| link.next(&mut self.world.borrow_mut(), ME))
        {
            let event = heard.map_or(LinkEvent::Dead(LinkError::Closed), LinkEvent::Message);
            state.events.push_back(Event::Link(event));
        }
        !state.events.is_empty()
    }

    /// A source takes its session up again. It has a reason for that, which a stream that did not stop is not while what it said of it is
    /// heard.
    fn judge_resumption(&self, world: &mut World, old: Option<&Link>) {
        let why = self.progress.report().error.unwrap_or_default();
        if why.contains("did not stop") && old.is_some_and(|link| world.carries(link.wire, TIMEOUT)) {
            world.violated(format!("over a control connection that works, {why}"));
        }
    }
}

impl Waits for Env<'_> {
    fn batch_pages_min(&self) -> u64 {
        self.world.borrow_mut().rng.pick(&[1, 4, 64])
    }

    async fn offer(&self, work: &Sender<Batch>, batch: Batch, _limit: Duration) -> Option<Batch> {
        let batch = match work.try_send(batch) {
            Ok(()) => return None,
            Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) => batch,
        };
        NextTurn::new().await;
        work.try_send(batch).err().map(TrySendError::into_inner)
    }

    async fn progress(&self, _source: &PageSource, _limit: Duration) {
        self.panic_if_told();
        NextTurn::new().await;
    }
}

impl Environment for Env<'_> {
    type Postcopy = usize;

    fn session_id(&self) -> io::Result<SessionId> {
        Ok(SESSION)
    }

    fn seed(&self) -> io::Result<u64> {
        Ok(self.world.borrow_mut().rng.next())
    }

    fn set_address(&self, _uri: Uri) {}

    async fn wait(&self) {
        self.panic_if_told();
        if !self.has_news() {
            NextTurn::new().await;
        }
    }

    async fn sleep(&self, time: Duration) {
        self.panic_if_told();
        sleep(&self.world, time.as_micros() as Micros, ME).await;
    }

    fn next(&self) -> Option<Event> {
        self.has_news();
        self.state.borrow_mut().events.pop_front()
    }

    async fn connect(
        &self,
        role: Role,
        session: SessionId,
        _timeout: Duration,
        _given_up: &dyn Fn() -> bool,
    ) -> Result<(), Cause> {
        let mut state = self.state.borrow_mut();
        let mut world = self.world.borrow_mut();
        if role == Role::Resume {
            self.judge_resumption(&mut world, state.link.as_ref());
        }
        let wire = world.connect(role, 0, session);
        if let Some(old) = state.link.replace(Link::new(wire, Vec::new())) {
            world.connection(old.wire).close(ME);
        }
        state.events.retain(|event| !matches!(event, Event::Link(_)));
        state.asked += u32::from(role == Role::Query);
        Ok(())
    }

    fn send(&self, message: Message) {
        let mut state = self.state.borrow_mut();
        let mut world = self.world.borrow_mut();
        if message == Message::Go && std::mem::replace(&mut state.said_go, true) {
            world.saw("GO said again", 1);
        }
        if let Some(link) = &state.link {
            world.say(link.wire, ME, &message);
        }
    }

    fn is_sending(&self) -> bool {
        false
    }

    fn flush(&self, _limit: Duration) {}

    fn say_farewell(&self, session: SessionId, _resume: Message, error: Message, _patience: Patience) {
        let mut world = self.world.borrow_mut();
        let wire = world.connect(Role::Resume, 0, session);
        world.say(wire, ME, &error);
        world.connection(wire).close(ME);
    }

    fn prepare_streams(&self, _opening: &Opening, _timeout: Duration) {}

    fn open(&self, id: u16) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        if state.slots_used + state.lanes.len() >= self.slots.len() {
            // No run needs that many.
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let wire = self.world.borrow_mut().connect(Role::Stream, id, SESSION);
        let opening = Some(Link::new(wire, Vec::new()));
        state.lanes.insert(id, Lane { wire, opening, stepped: None, work: None, begun: clock::now() });
        Ok(())
    }

    fn give_up_opening(&self) {
        let mut state = self.state.borrow_mut();
        let world = self.world.borrow();
        state.events.retain(|event| !matches!(event, Event::Opened { .. }));
        state.lanes.retain(|_, lane| {
            let started = lane.stepped.is_some();
            if !started {
                world.connection(lane.wire).close(ME);
            }
            started
        });
        state.ending = true;
    }

    fn start_lane(
        &self,
        source: &Arc<PageSource>,
        end: SourceEnd,
        id: u16,
        work: Receiver<Batch>,
    ) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let slot = &self.slots[state.slots_used];
        state.slots_used += 1;
        (state.ending, state.pages) = (false, Some(source.clone()));
        let again = id != stream_number(id);
        self.world.borrow_mut().saw("streams connected again", u64::from(again));
        let lane = state.lanes.get_mut(&id).expect("it was opened");
        (lane.stepped, lane.work) = (Some(SteppedLane::new(slot, source, end, id)), Some(work));
        drop(state);
        // What came along with ATTACHED waits for it.
        self.wake(id, 100);
        Ok(())
    }

    fn abort_lanes(&self) {
        for lane in self.state.borrow().lanes.values() {
            if let Some(stepped) = &lane.stepped {
                stepped.abort();
            }
        }
        self.wake_all(100);
    }

    async fn join_lanes(&self) {
        let streams: Vec<u16> = self.state.borrow().lanes.keys().copied().collect();
        streams.into_iter().for_each(|stream| self.lane_over(stream));
    }

    async fn dial_postcopy(
        &self,
        session: SessionId,
        _version: u16,
        stream: u16,
        timeout: Duration,
        given_up: &dyn Fn() -> bool,
    ) -> Result<usize, PostcopyError> {
        let wire = self.world.borrow_mut().connect(Role::Postcopy, stream, session);
        let connection = self.world.borrow().connection(wire);
        let (mut link, until) = (Link::new(wire, Vec::new()), clock::now() + timeout);
        loop {
            let heard = link.next(&mut self.world.borrow_mut(), ME);
            let error = match heard {
                Some(Some(Message::Attached { stream: attached })) if attached == stream => {
                    connection.unread(ME, link.rest());
                    return Ok(wire);
                }
                Some(Some(Message::Error { text, .. })) => LinkError::Refused(text),
                Some(_) => LinkError::Closed,
                None if given_up() => LinkError::Cancelled,
                None if clock::now() > until => LinkError::Timeout(timeout.as_secs()),
                None => {
                    NextTurn::new().await;
                    continue;
                }
            };
            connection.close(ME);
            return Err(error.into());
        }
    }

    fn start_postcopy(&self, server: &Arc<PageServer>, wire: usize, stream: u16) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let mut world = self.world.borrow_mut();
        let lane = SteppedServer::new(server, world.connection(wire).channel(ME), stream);
        state.server = Some(server.clone());
        state.postcopy.insert(stream, Served { wire, lane });
        let after = world.rng.range(0, 100);
        world.schedule(after, Happening::Postcopy(wire, true));
        Ok(())
    }

    fn end_postcopy(&self) {
        let mut state = self.state.borrow_mut();
        std::mem::take(&mut state.postcopy).into_values().for_each(|mut served| served.lane.stop());
        state.events.retain(|event| !matches!(event, Event::PostcopyEnd(_)));
    }
}
