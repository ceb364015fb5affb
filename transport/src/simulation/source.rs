//! The source's process: the engine's phases around the real session machine, stream bookkeeping, feeder, lanes and policy.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pagecopy::backend::{DirtyLog, GuestRam, StateBlob};
use pagecopy::bitmap::PageBitmap;
use pagecopy::choose::CodecMode;
use pagecopy::digest::PageHasher;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::policy::{Decision, Limits, Precopy, Sample};

use super::fault::{self, Fault};
use super::guest::Guest;
use super::network::Side;
use super::reopen::Reopening;
use super::world::{Event, Link, Micros, World};
use super::{HANDOVER_TIMEOUT, SESSION, TIMEOUT};
use crate::session::{Learnt, SourceEvent, SourceSession, check_welcome};
use crate::source::stepped::{LaneSlot, SteppedLane};
use crate::source::{Batch, LaneError, PageSource, SourceOptions, Unreceipted};
use crate::streams::{SourceStreams, StreamsError};
use crate::wire::control::{ErrorCode, Hello, Message, Totals, capability, state_digest};
use crate::wire::{Role, stream_number};

const ME: Side = Side::Source;
/// Batches that may wait for a lane.
const WAITING_MAX: usize = 4;

/// Who has the guest after the source's part is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The destination runs it.
    Moved,
    /// It runs on at the source.
    RunsOn,
}

#[derive(Debug)]
enum Phase {
    ExpectWelcome {
        deadline: Micros,
    },
    ExpectPrepared,
    Opening,
    Round {
        not_before: Micros,
    },
    LastPass,
    Settle {
        next_pass: Micros,
    },
    Ending,
    ExpectReady {
        deadline: Micros,
    },
    Gone {
        deadline: Micros,
    },
    Asking {
        link: Option<Link>,
        until: Micros,
        pause: Micros,
        asked: u32,
    },
    /// Takes the session up again over other connections.
    Resuming {
        link: Option<Link>,
        until: Micros,
        pause: Micros,
        began: Micros,
    },
    Over(Fate),
}

/// What an attempt is like.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    pub(super) streams: u16,
    /// How long lost connections may take to come back; 0: they do not.
    pub(super) reconnect: Micros,
    pub(super) codec: CodecMode,
    pub(super) cache_bytes: u64,
    pub(super) limits: Limits,
    /// Page bytes that may be under way when a round ends.
    pub(super) drain_to: u64,
    pub(super) batch_chunks: u32,
}

/// Why an attempt cannot go on as it is.
#[derive(Debug)]
enum Cause {
    /// Connections were lost, which may come back.
    Lost(String),
    Other(String),
}

impl From<String> for Cause {
    fn from(text: String) -> Self {
        Self::Other(text)
    }
}

impl From<&str> for Cause {
    fn from(text: &str) -> Self {
        Self::Other(text.into())
    }
}

impl Attempt {
    fn capabilities(&self) -> u64 {
        capability::ENCODINGS | if self.reconnect == 0 { 0 } else { capability::RESUME }
    }
}

struct Lane<'a> {
    wire: usize,
    /// What comes before ATTACHED.
    opening: Option<Link>,
    stepped: Option<SteppedLane<'a>>,
}

/// The process.
pub(super) struct SourceHost<'a> {
    slots: &'a [LaneSlot],
    slots_used: usize,
    guest: Arc<Guest>,
    attempt: Attempt,
    phase: Phase,
    session: SourceSession,
    link: Option<Link>,
    pages: Option<Arc<PageSource>>,
    hasher: PageHasher,
    streams: SourceStreams<Unreceipted>,
    lanes: BTreeMap<u16, Lane<'a>>,
    policy: Precopy,
    /// Where the pass goes on; `None`: it is over.
    cursor: Option<u32>,
    waiting: VecDeque<Batch>,
    /// Lanes whose turn is scheduled.
    awake: BTreeSet<u16>,
    state: u64,
    pub(super) cancelled: bool,
    /// A stream died.
    lost: bool,
    /// How long lost connections may take to come back, as agreed.
    reconnect: Micros,
    reopening: Reopening,
    /// Since when there is no stream.
    outage: Option<Micros>,
    resumed: bool,
}

impl<'a> SourceHost<'a> {
    pub(super) fn start(
        slots: &'a [LaneSlot],
        guest: &Arc<Guest>,
        attempt: &Attempt,
        world: &mut World,
    ) -> SourceHost<'a> {
        let wire = world.connect(Role::Control, 0, SESSION);
        guest.start().expect("a simulated log starts");
        let layout = guest.layout();
        let seed = world.rng.next();
        let hello = Message::Hello(Hello {
            seed,
            capabilities: attempt.capabilities(),
            streams: attempt.streams,
            live: true,
            timeout_ms: (TIMEOUT / 1000) as u32,
            reconnect_ms: (attempt.reconnect / 1000) as u32,
            host: 0,
            regions: layout.regions().to_vec(),
            presence: vec![0xff; Hello::presence_len(layout)],
            dense: vec![],
            data_bytes: 0,
            machine: "simulated".into(),
        });
        world.say(wire, ME, &hello);
        Self {
            slots,
            slots_used: 0,
            guest: guest.clone(),
            attempt: attempt.clone(),
            phase: Phase::ExpectWelcome { deadline: world.now + TIMEOUT },
            session: SourceSession::new(),
            link: Some(Link::new(wire, Vec::new())),
            pages: None,
            hasher: PageHasher::new(seed),
            streams: SourceStreams::new(),
            lanes: BTreeMap::new(),
            policy: Precopy::new(attempt.limits, 0),
            cursor: None,
            waiting: VecDeque::new(),
            awake: BTreeSet::new(),
            state: 0,
            cancelled: false,
            lost: false,
            reconnect: 0,
            reopening: Reopening::default(),
            outage: None,
            resumed: false,
        }
    }

    pub(super) fn fate(&self) -> Option<Fate> {
        if let Phase::Over(fate) = self.phase { Some(fate) } else { None }
    }

    pub(super) fn owns_guest(&self) -> bool {
        self.session.owns_guest()
    }

    /// Pages have begun to move.
    pub(super) fn has_moved_pages(&self) -> bool {
        !matches!(self.phase, Phase::ExpectWelcome { .. } | Phase::ExpectPrepared | Phase::Opening)
    }

    /// How often it has asked in vain what became of the guest.
    pub(super) fn asked(&self) -> u32 {
        if let Phase::Asking { asked, .. } = self.phase { asked } else { 0 }
    }

    pub(super) fn describe(&self) -> String {
        format!("{:?}", self.phase)
    }

    /// Something came on a wire, or its end.
    pub(super) fn touched(&mut self, wire: usize, world: &mut World) {
        let stream = self.lanes.iter().find(|(_, lane)| lane.wire == wire).map(|(&stream, _)| stream);
        if let Some(stream) = stream {
            self.wake(stream, 100, world);
        }
    }

    /// A connection could not be opened.
    pub(super) fn refused(&mut self, wire: usize, world: &mut World) {
        world.connection(wire).notice(ME);
        self.touched(wire, world);
    }

    /// The clock went on: whatever waits for too long gives up.
    pub(super) fn ticked(&mut self, world: &mut World) {
        let streams: Vec<u16> = self.lanes.keys().copied().collect();
        streams.into_iter().for_each(|stream| self.wake(stream, 1000, world));
    }

    fn wake(&mut self, stream: u16, within: Micros, world: &mut World) {
        if self.awake.insert(stream) {
            let after = world.rng.range(0, within);
            world.schedule(after, Event::Lane(stream));
        }
    }

    /// Looks at everything that may have happened, and goes on.
    pub(super) fn turn(&mut self, world: &mut World) {
        if let Err(cause) = self.try_turn(world) {
            self.fail(&cause, world);
        }
    }

    fn try_turn(&mut self, world: &mut World) -> Result<(), Cause> {
        while self.fate().is_none()
            && let Some(link) = &mut self.link
            && let Some(heard) = link.next(world, ME)
        {
            match heard {
                Some(message) => self.hear(message, world)?,
                None => {
                    self.link = None;
                    return Err(Cause::Lost("the control connection".into()));
                }
            }
        }
        if self.cancelled && self.session.owns_guest() {
            return Err("cancelled".into());
        }
        if matches!(
            self.phase,
            Phase::Opening | Phase::Round { .. } | Phase::LastPass | Phase::Settle { .. } | Phase::Ending
        ) {
            self.reopen(world);
            self.check_streams(world)?;
        }
        while self.advance(world)? {}
        if !self.waiting.is_empty() || matches!(self.phase, Phase::Ending) {
            let streams: Vec<u16> = self.lanes.keys().copied().collect();
            streams.into_iter().for_each(|stream| self.wake(stream, 1500, world));
        }
        Ok(())
    }

    fn hear(&mut self, message: Message, world: &mut World) -> Result<(), Cause> {
        let event = self.session.handle(message).map_err(|e| self.judge(&e, world))?;
        match event {
            SourceEvent::Welcome(welcome) => {
                check_welcome(&welcome, self.attempt.streams, self.attempt.capabilities())
                    .map_err(|e| e.to_string())?;
                if welcome.capabilities & capability::RESUME != 0 {
                    self.reconnect = self.attempt.reconnect.min(u64::from(welcome.reconnect_ms) * 1000);
                }
                self.phase = Phase::ExpectPrepared;
            }
            SourceEvent::Prepared => self.prepare(world),
            SourceEvent::Reply(reply) => self.say(&reply, world),
            SourceEvent::StreamStopped { stream, reason } => {
                let frames = self.streams.stopped(stream, reason);
                self.take_back(frames, world);
            }
            SourceEvent::Ready if self.cancelled => return Err("cancelled".into()),
            SourceEvent::Ready => self.go(world),
            SourceEvent::Running => {
                self.say(&Message::Running, world);
                self.over(Fate::Moved, world);
            }
            SourceEvent::Nothing
            | SourceEvent::Resumed
            | SourceEvent::PostcopyReady { .. }
            | SourceEvent::Arrived(_) => {}
        }
        Ok(())
    }

    /// The point of no return.
    fn go(&mut self, world: &mut World) {
        let go = self.session.go();
        self.say(&go, world);
        self.phase = Phase::Gone { deadline: world.now + TIMEOUT };
    }

    /// Only what the other side says by itself may end a session; that it broke the protocol may not happen.
    fn judge(&self, error: &crate::session::SessionError, world: &mut World) -> Cause {
        if !matches!(error, crate::session::SessionError::Peer { .. }) {
            world.violated(format!("at the source: {error}"));
        }
        error.to_string().into()
    }

    fn say(&self, message: &Message, world: &mut World) {
        if let Some(link) = &self.link {
            world.say(link.wire, ME, message);
        }
    }

    /// The destination is prepared: the data plane is built and its streams are opened.
    fn prepare(&mut self, world: &mut World) {
        let layout = self.guest.layout();
        let pending = PageBitmap::new(layout.chunks());
        let mut words = vec![0; layout.chunks() as usize];
        self.guest.populated(0, &mut words).expect("simulated memory knows its holes");
        (0..).zip(&words).for_each(|(chunk, &pages)| {
            pending.insert(chunk, pages);
        });
        let options = SourceOptions {
            streams: self.attempt.streams,
            near: false,
            codec: self.attempt.codec,
            references: true,
            cache_bytes: self.attempt.cache_bytes,
            timeout: Duration::from_micros(TIMEOUT),
            mismatches_max: 64,
        };
        let (ram, log) = (self.guest.clone(), self.guest.clone());
        self.pages = Some(Arc::new(PageSource::new(ram, log, self.hasher.clone(), options, pending)));
        for stream in 0..self.attempt.streams {
            self.reopening.add(stream);
            let wire = world.connect(Role::Stream, stream, SESSION);
            let opening = Some(Link::new(wire, Vec::new()));
            self.lanes.insert(stream, Lane { wire, opening, stepped: None });
        }
        self.policy = Precopy::new(self.attempt.limits, world.now);
        self.phase = Phase::Opening;
    }

    /// A lane's turn: receipts, then a batch.
    pub(super) fn lane_turn(&mut self, stream: u16, world: &mut World) {
        self.awake.remove(&stream);
        let Some(lane) = self.lanes.get_mut(&stream) else { return };
        let connection = world.connection(lane.wire);
        if let Some(link) = &mut lane.opening {
            match link.next(world, ME) {
                Some(Some(Message::Attached { stream: attached })) if attached == stream => {
                    lane.opening = None;
                    let slot = &self.slots[self.slots_used];
                    self.slots_used += 1;
                    self.reopening.opened(stream, world);
                    if fault::is(Fault::EarlyStopForgotten) {
                        self.streams.forget(stream);
                    }
                    world.saw("streams connected again", u64::from(stream != stream_number(stream)));
                    let pages = self.pages.as_ref().expect("made before the streams");
                    lane.stepped = Some(SteppedLane::new(slot, pages, connection.source_end(), stream));
                    self.streams.started();
                }
                Some(_) if stream != stream_number(stream) => {
                    connection.close(ME);
                    self.lanes.remove(&stream);
                    return self.reopening.failed(stream, world);
                }
                Some(_) => return self.fail(&format!("stream {stream} could not be opened").into(), world),
                None => return,
            }
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
        if !over {
            let pages = self.guest.layout().pages();
            let full = !self.waiting.is_empty() && !stepped.has_room(pages * (PAGE_SIZE as u64 + 512));
            let alive = match if full { None } else { self.waiting.pop_front() } {
                _ if full => true,
                Some(batch) => stepped.send(batch, world.rng.percent(80)),
                None if matches!(self.phase, Phase::Ending) => stepped.end_sending(),
                None => stepped.idle(),
            };
            over = !alive;
        }
        if over {
            self.lane_over(stream, world);
        } else if !self.waiting.is_empty() {
            self.wake(stream, 1500, world);
        }
        self.no_damage(world);
    }

    fn lane_over(&mut self, stream: u16, world: &mut World) {
        let Some(lane) = self.lanes.remove(&stream) else { return };
        world.connection(lane.wire).close(ME);
        let Some(stepped) = lane.stepped else { return };
        let end = stepped.into_end();
        world.note(|| format!("lane {stream} is over: {:?}", end.result));
        self.lost |= end.result.is_err();
        match end.result {
            Ok(account) => self.streams.ended(account),
            Err(error) => {
                if matches!(error, LaneError::Fatal { .. } | LaneError::Receipt { .. }) {
                    world
                        .violated(format!("at the source: {error}: {:?}", std::error::Error::source(&error)));
                }
                self.say(&Message::StreamLost { stream }, world);
                let now = Duration::from_micros(world.now);
                let frames = self.streams.died(stream, error.to_string(), end.unreceipted, now);
                self.take_back(frames, world);
            }
        }
    }

    fn take_back(&mut self, frames: Vec<Unreceipted>, world: &mut World) {
        world.saw("frames taken back", frames.len() as u64);
        for stream in self.streams.take_buried() {
            if self.reconnect != 0 {
                self.reopening.lost(stream, world);
            }
        }
        if let Some(pages) = &self.pages {
            pages.take_back(frames);
        }
    }

    /// Nothing damages what travels, so that every receipt matches unless its page was sent from where the guest writes.
    fn no_damage(&self, world: &mut World) {
        let Some(pages) = &self.pages else { return };
        let mismatches = pages.counters().mismatches.load(Ordering::Relaxed);
        if mismatches != 0 {
            world.violated(format!(
                "{mismatches} pages arrived other than they were sent: a delta on a wrong base, or two streams at once"
            ));
        }
    }

    /// One step of the phases; whether another may follow at once.
    fn advance(&mut self, world: &mut World) -> Result<bool, Cause> {
        let now = world.now;
        match self.phase {
            Phase::ExpectWelcome { deadline } if now > deadline => Err("no WELCOME".into()),
            Phase::ExpectReady { deadline } if now > deadline => Err("no READY".into()),
            Phase::Gone { deadline } if now > deadline => Err("no RUNNING".into()),
            Phase::Opening if self.lanes.values().all(|lane| lane.stepped.is_some()) => {
                self.begin_pass();
                self.phase = Phase::Round { not_before: now };
                Ok(true)
            }
            Phase::Round { not_before } => {
                let drain_to = self.attempt.drain_to;
                Ok(self.pass(world) && now >= not_before && self.pages().drained_to(drain_to) && {
                    self.end_round(world)?;
                    true
                })
            }
            Phase::LastPass => Ok(self.pass(world) && {
                let mut blobs = self.guest.save_state();
                blobs.push(StateBlob { name: "pageferry/run-state".into(), version: 1, bytes: vec![1] });
                self.state = state_digest(&blobs);
                self.say(&Message::State(blobs), world);
                self.phase = Phase::Settle { next_pass: now };
                true
            }),
            Phase::Settle { next_pass } => {
                if self.pages().settled() {
                    self.close(world);
                    self.phase = Phase::Ending;
                    return Ok(true);
                }
                if self.pass(world) && now >= next_pass {
                    self.begin_pass();
                    let after = world.rng.range(1000, 20_000);
                    self.phase = Phase::Settle { next_pass: now + after };
                    world.schedule(after, Event::Alarm);
                    self.pass(world);
                }
                Ok(false)
            }
            Phase::Ending if self.streams.all_over() => {
                self.finish(world);
                Ok(false)
            }
            Phase::Asking { .. } => {
                self.ask(world);
                Ok(false)
            }
            Phase::Resuming { .. } => self.try_resume(world),
            _ => Ok(false),
        }
    }

    fn pages(&self) -> &Arc<PageSource> {
        self.pages.as_ref().expect("made before any phase that needs it")
    }

    fn begin_pass(&mut self) {
        self.cursor = Some(0);
    }

    /// Feeds the lanes; whether the pass is over.
    fn pass(&mut self, world: &mut World) -> bool {
        while let Some(cursor) = self.cursor
            && self.waiting.len() < WAITING_MAX
        {
            let count_max = world.rng.range(1, self.attempt.batch_chunks.into()) as u32;
            match self.pages().give_out(cursor, count_max) {
                Some((batch, next)) => {
                    self.waiting.push_back(batch);
                    self.cursor = Some(next);
                }
                None => self.cursor = None,
            }
        }
        self.cursor.is_none()
    }

    /// A dirty sync ends the round; the policy says what follows.
    fn end_round(&mut self, world: &mut World) -> Result<(), Cause> {
        let pages = self.pages().clone();
        let dirtied_pages = pages.dirty_sync().map_err(|e| e.to_string())?;
        let counters = pages.counters();
        let sample = Sample {
            remaining_logical_bytes: pages.remaining_bytes(),
            dirtied_pages,
            acked_logical_bytes: counters.logical_acked.load(Ordering::Relaxed),
            acked_wire_bytes: counters.wire_acked.load(Ordering::Relaxed),
            state_time_us: 100,
        };
        match self.policy.on_sync(world.now, sample) {
            Decision::NextRound => {
                let after = world.rng.range(0, 3000);
                world.schedule(after, Event::Alarm);
                self.phase = Phase::Round { not_before: world.now + after };
            }
            Decision::SwitchOver { .. } => {
                world.note(|| "the guest is paused".into());
                self.guest.set_running(false);
                pages.dirty_sync().map_err(|e| e.to_string())?;
                self.phase = Phase::LastPass;
            }
            Decision::GiveUp { reason } => return Err(reason.to_string().into()),
            Decision::Postcopy => unreachable!("these limits do not ask for it"),
        }
        self.begin_pass();
        Ok(())
    }

    fn finish(&mut self, world: &mut World) {
        let lost = self.pages().never_carried();
        if lost != 0 {
            world.violated(format!("{lost} pages were never sent"));
        }
        let totals = Totals {
            streams: self.streams.take_accounts(),
            pages: self.pages().carried_pages(),
            state: self.state,
        };
        let finish = self.session.finish(totals);
        self.say(&finish, world);
        self.phase = Phase::ExpectReady { deadline: world.now + TIMEOUT };
        if fault::is(Fault::GoBeforeReady) {
            self.go(world);
        }
    }

    /// Asks on a connection of its own what became of the guest, again and again.
    fn ask(&mut self, world: &mut World) {
        let Phase::Asking { link, until, pause, asked } = &mut self.phase else { return };
        let Some(open) = link else {
            if world.now >= *until {
                let wire = world.connect(Role::Query, 0, SESSION);
                *link = Some(Link::new(wire, Vec::new()));
                *asked += 1;
                (*until, *pause) = (world.now + TIMEOUT, (*pause * 2).min(HANDOVER_TIMEOUT / 2));
                world.say(wire, ME, &Message::Query);
            }
            return;
        };
        let wire = open.wire;
        let mut learnt = None;
        while learnt.is_none()
            && let Some(heard) = open.next(world, ME)
        {
            learnt = match heard {
                None | Some(Message::Error { .. }) => Some(Learnt::Unknown),
                Some(Message::Status(status)) => Some(self.session.learn(status)),
                Some(Message::Running) => {
                    Some(self.session.learn(crate::wire::control::SessionStatus::Running))
                }
                Some(_) => None,
            };
            if learnt == Some(Learnt::SayGoAgain) {
                world.say(wire, ME, &Message::Go);
                world.saw("GO said again", 1);
                learnt = None;
            }
        }
        if world.now > *until {
            learnt = learnt.or(Some(Learnt::Unknown));
        }
        match learnt {
            None | Some(Learnt::SayGoAgain) => {}
            Some(Learnt::Unknown) => {
                world.connection(wire).close(ME);
                *link = None;
                *until = world.now + *pause;
            }
            Some(Learnt::Running) => {
                world.saw("asked, and heard that it runs", 1);
                world.say(wire, ME, &Message::Running);
                world.connection(wire).close(ME);
                self.over(Fate::Moved, world);
            }
            Some(Learnt::Abandoned) => {
                world.saw("abandoned, and heard of it", 1);
                world.connection(wire).close(ME);
                self.over(Fate::RunsOn, world);
            }
        }
    }

    /// Begins the attempts to connect lost streams again that are due.
    fn reopen(&mut self, world: &mut World) {
        if self.reconnect == 0 || matches!(self.phase, Phase::Opening | Phase::Ending) {
            return;
        }
        for stream in self.reopening.due(world) {
            if self.slots_used + self.lanes.len() >= self.slots.len() {
                // No run needs that many.
                return;
            }
            self.streams.forget(stream);
            let wire = world.connect(Role::Stream, stream, SESSION);
            let opening = Some(Link::new(wire, Vec::new()));
            self.lanes.insert(stream, Lane { wire, opening, stepped: None });
        }
    }

    /// No stream is opened any more: those that there are will be ended.
    fn close(&mut self, world: &mut World) {
        self.reopening.stop();
        let opening: Vec<u16> =
            self.lanes.iter().filter(|(_, lane)| lane.stepped.is_none()).map(|(&stream, _)| stream).collect();
        for stream in opening {
            if let Some(lane) = self.lanes.remove(&stream) {
                world.connection(lane.wire).close(ME);
            }
        }
    }

    /// Fails when there is no stream any more, and none in time.
    fn check_streams(&mut self, world: &mut World) -> Result<(), Cause> {
        let (now, timeout) = (Duration::from_micros(world.now), Duration::from_micros(TIMEOUT));
        if let Err(error) = self.streams.check_stopped(now, timeout) {
            let heard = self.link.as_ref().is_some_and(|link| world.carries(link.wire, TIMEOUT));
            if heard {
                world.violated(format!("over a control connection that works, {error}"));
            }
            return Err(Cause::Lost(error.to_string()));
        }
        let Some(last) = self.streams.all_lost(now) else {
            if self.streams.any_live() {
                self.outage = None;
            }
            return Ok(());
        };
        let lost = Cause::Lost(StreamsError::AllLost { last: last.into() }.to_string());
        // With a paused guest there is no time to wait for streams.
        let hurried = !matches!(self.phase, Phase::Round { .. });
        if hurried || self.reconnect == 0 {
            return Err(lost);
        }
        let since = *self.outage.get_or_insert(world.now);
        if world.now - since < self.reconnect { Ok(()) } else { Err(lost) }
    }

    /// The connections are lost, some perhaps only as far as the others are: what is left of them ends here, and the guest runs on.
    /// Frames without receipt are kept until the destination has stopped its workers.
    fn lose_all(&mut self, world: &mut World) {
        self.outage = None;
        self.close(world);
        let streams: Vec<u16> = self.lanes.keys().copied().collect();
        for stream in streams {
            if let Some(stepped) = self.lanes.get(&stream).and_then(|lane| lane.stepped.as_ref()) {
                stepped.abort();
            }
            self.lane_over(stream, world);
        }
        self.awake.clear();
        self.cursor = None;
        self.waiting.clear();
        if let Some(link) = self.link.take() {
            world.connection(link.wire).close(ME);
        }
        self.guest.set_running(true);
        self.phase = Phase::Resuming { link: None, until: world.now, pause: 50_000, began: world.now };
    }

    /// One attempt after the other, until the destination says RESUMED.
    fn try_resume(&mut self, world: &mut World) -> Result<bool, Cause> {
        let Phase::Resuming { link, until, pause, began } = &mut self.phase else { return Ok(false) };
        let Some(open) = link else {
            if world.now - *began >= self.reconnect {
                return Err("the connections did not come back".into());
            }
            if world.now >= *until {
                let wire = world.connect(Role::Resume, 0, SESSION);
                let resume = self.session.resume();
                world.say(wire, ME, &resume);
                (*link, *until) = (Some(Link::new(wire, Vec::new())), world.now + TIMEOUT);
            }
            return Ok(false);
        };
        let wire = open.wire;
        match open.next(world, ME) {
            Some(Some(message)) => {
                let resumed = self.session.handle(message).map_err(|e| self.judge(&e, world))?;
                if resumed != SourceEvent::Resumed {
                    return Ok(true);
                }
            }
            Some(None) => {
                *link = None;
                *until = world.now + *pause;
                *pause = (*pause * 2).min(2 * TIMEOUT);
                return Ok(false);
            }
            None if world.now > *until => {
                world.connection(wire).close(ME);
                return Ok(true);
            }
            None => return Ok(false),
        }
        world.saw("resumed", 1);
        self.resumed = true;
        let Phase::Resuming { link, .. } = &mut self.phase else { return Ok(false) };
        self.link = link.take();
        let frames = self.streams.void();
        self.take_back(frames, world);
        self.reopening.all_lost(world);
        self.policy = Precopy::new(self.attempt.limits, world.now);
        self.begin_pass();
        self.phase = Phase::Round { not_before: world.now };
        Ok(true)
    }

    /// Undoes what a failed attempt did; after GO it asks instead.
    fn fail(&mut self, cause: &Cause, world: &mut World) {
        if self.fate().is_some() {
            return;
        }
        world.note(|| format!("the source fails: {cause:?}"));
        let moves = matches!(
            self.phase,
            Phase::Round { .. }
                | Phase::LastPass
                | Phase::Settle { .. }
                | Phase::Ending
                | Phase::ExpectReady { .. }
        );
        if matches!(cause, Cause::Lost(_)) && moves && self.reconnect != 0 && self.session.owns_guest() {
            return self.lose_all(world);
        }
        let cause = match cause {
            Cause::Lost(text) | Cause::Other(text) => text,
        };
        if !self.session.owns_guest() {
            if !matches!(self.phase, Phase::Asking { .. }) {
                self.phase = Phase::Asking { link: None, until: world.now, pause: 50_000, asked: 0 };
            }
            return;
        }
        let error = Message::Error { code: ErrorCode::Local, text: cause.clone() };
        if self.link.is_none() && self.reconnect != 0 {
            // The destination waits for a source that will not come back.
            let wire = world.connect(Role::Resume, 0, SESSION);
            world.say(wire, ME, &error);
            world.connection(wire).close(ME);
        }
        if let Phase::Resuming { link: Some(link), .. } = &self.phase {
            world.connection(link.wire).close(ME);
        }
        self.say(&error, world);
        if let Some(pages) = &self.pages {
            pages.stop();
        }
        self.over(Fate::RunsOn, world);
    }

    fn over(&mut self, fate: Fate, world: &mut World) {
        if let Some(pages) = &self.pages {
            let counters = pages.counters();
            for (what, counter) in [
                ("pages of zeros", &counters.zero),
                ("unchanged pages", &counters.unchanged),
                ("deltas", &counters.delta),
                ("compressed pages", &counters.compressed),
                ("pages referred to", &counters.referred),
                ("raw pages", &counters.raw),
                ("torn pages", &counters.torn),
            ] {
                world.saw(what, counter.load(Ordering::Relaxed));
            }
        }
        world.note(|| format!("the source's part is over: {fate:?}"));
        for lane in std::mem::take(&mut self.lanes).into_values() {
            if let Some(stepped) = &lane.stepped {
                stepped.abort();
            }
            world.connection(lane.wire).close(ME);
        }
        self.awake.clear();
        if let Some(link) = self.link.take() {
            world.connection(link.wire).close(ME);
        }
        self.guest.stop().expect("a simulated log stops");
        world.saw("moved although streams died", u64::from(self.lost && fate == Fate::Moved));
        world.saw("resumed, and moved", u64::from(self.resumed && fate == Fate::Moved));
        if fate == Fate::RunsOn {
            self.guest.set_running(true);
        }
        self.phase = Phase::Over(fate);
    }
}
