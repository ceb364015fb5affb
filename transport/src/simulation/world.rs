//! Clock, network and chance of one run: what source and destination share, and nothing else.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use super::network::{Connection, Side};
use super::rng::Rng;
use crate::clock::{self, virtual_time};
use crate::wire::control::{CHECKSUM_LEN, HEADER_LEN, Message};
use crate::wire::{Preamble, Role, SessionId, VERSION_MAX, VERSION_MIN};

/// Microseconds.
pub(super) type Micros = u64;

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// The oldest segment that a side wrote arrives.
    Arrive(usize, bool),
    /// A side learns that a connection is broken.
    Notice(usize, bool),
    /// A side looks at a connection on which something arrived.
    Look(usize, bool),
    /// Something is due at the source, or at the destination.
    Alarm(bool),
    /// The source gives a data stream up.
    Abort(usize),
    /// A connection could not be opened.
    Refuse(usize),
    /// A lane of the source takes its turn.
    Lane(u16),
    /// A worker of the destination takes its turn.
    Worker(usize),
    /// An end of a connection of postcopy takes its turn.
    Postcopy(usize, bool),
    /// Somebody looks at the clock, and whatever waits is looked at again.
    Tick(bool),
    /// The guest runs for a moment.
    Guest(bool),
}

/// How the network of a run is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    /// Microseconds that a segment takes at least, and at most.
    pub(super) latency: (Micros, Micros),
    /// Percent of the segments that take up to twenty times as long.
    pub(super) stragglers: u64,
}

/// A connection, with what the world knows of it.
pub(super) struct Wire {
    pub(super) connection: Connection,
    pub(super) role: Role,
    /// When the last segment of each side arrives: those that follow arrive no earlier.
    busy_until: [Micros; 2],
    /// Nothing that is written arrives before this.
    stalled_until: Micros,
    cut: bool,
}

impl Wire {
    /// It carries pages, and no pings.
    pub(super) fn is_for_data(&self) -> bool {
        matches!(self.role, Role::Stream | Role::Postcopy)
    }
}

/// Clock, network and chance.
pub(super) struct World {
    pub(super) now: Micros,
    pub(super) rng: Rng,
    pub(super) weather: Weather,
    pub(super) wires: Vec<Wire>,
    /// Wires that may still carry something.
    alive: BTreeSet<usize>,
    queue: BinaryHeap<Reverse<(Micros, u64, Event)>>,
    scheduled: u64,
    /// No connection can be opened before this.
    pub(super) parted_until: Micros,
    /// Until when each process stands still.
    pub(super) frozen: [Micros; 2],
    /// The destination's process is there, and listens.
    pub(super) listening: bool,
    /// Control messages that were written, by kind and writer, in order.
    pub(super) said: Vec<(&'static str, Side)>,
    /// What happened, if somebody wants to know.
    pub(super) trace: Option<Vec<String>>,
    /// What must never happen, and did.
    pub(super) violation: Option<String>,
    /// A digest of everything that happened.
    pub(super) digest: u64,
    /// How often what may happen did, so that it can be told whether a simulation is worth anything.
    pub(super) seen: BTreeMap<&'static str, u64>,
}

impl World {
    pub(super) fn new(rng: Rng, weather: Weather, traced: bool) -> Self {
        Self {
            now: 0,
            rng,
            weather,
            wires: Vec::new(),
            alive: BTreeSet::new(),
            queue: BinaryHeap::new(),
            scheduled: 0,
            parted_until: 0,
            frozen: [0; 2],
            listening: true,
            said: Vec::new(),
            trace: traced.then(Vec::new),
            violation: None,
            digest: 0,
            seen: BTreeMap::new(),
        }
    }

    /// Counts something that may happen.
    pub(super) fn saw(&mut self, what: &'static str, times: u64) {
        if times != 0 {
            *self.seen.entry(what).or_default() += times;
        }
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>10} us  {}", self.now, text()));
        }
    }

    /// Something happened that must not.
    pub(super) fn violated(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.note(|| format!("VIOLATION: {what}"));
        self.violation.get_or_insert(what);
    }

    pub(super) fn schedule(&mut self, after: Micros, event: Event) {
        self.scheduled += 1;
        self.queue.push(Reverse((self.now + after, self.scheduled, event)));
    }

    /// The next event; the clock moves to it.
    pub(super) fn next(&mut self) -> Option<Event> {
        let Reverse((at, number, event)) = self.queue.pop()?;
        self.now = self.now.max(at);
        virtual_time::advance(self.now * 1000);
        let mixed = self.digest.rotate_left(5) ^ at ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.digest = mixed.wrapping_mul(0xff51_afd7_ed55_8ccd);
        Some(event)
    }

    /// Opens a connection to the destination and sends its preamble. What is returned may turn out not to exist.
    pub(super) fn connect(&mut self, role: Role, stream: u16, session: SessionId) -> usize {
        let wire = self.wires.len();
        self.wires.push(Wire {
            connection: Connection::default(),
            role,
            busy_until: [0; 2],
            stalled_until: 0,
            cut: false,
        });
        self.alive.insert(wire);
        self.note(|| format!("source connects wire {wire} for {role:?} {stream}"));
        if self.now < self.parted_until || !self.listening {
            self.wires[wire].cut = true;
            self.connection(wire).cut(|_, _| (0, 0));
            let after = self.rng.range(500, 300_000);
            self.schedule(after, Event::Refuse(wire));
        } else {
            let preamble =
                Preamble { version_min: VERSION_MIN, version_max: VERSION_MAX, role, stream, session };
            let _ = self.connection(wire).write(Side::Source, preamble.encode().to_vec());
        }
        wire
    }

    pub(super) fn connection(&self, wire: usize) -> Connection {
        self.wires[wire].connection.clone()
    }

    /// Writes a control message.
    pub(super) fn say(&mut self, wire: usize, side: Side, message: &Message) {
        self.note(|| format!("{side:?} says {message:?} on wire {wire}"));
        self.said.push((message.name(), side));
        // On a broken connection it goes nowhere, as on a link.
        let _ = self.connection(wire).write(side, message.encode());
    }

    /// Puts everything that was written on its way.
    pub(super) fn depart(&mut self) {
        let mut done = Vec::new();
        for &wire in &self.alive {
            for side in [Side::Source, Side::Destination] {
                let count = self.wires[wire].connection.depart(side);
                for _ in 0..count {
                    let (low, high) = self.weather.latency;
                    let mut takes = self.rng.range(low, high);
                    if self.rng.percent(self.weather.stragglers) {
                        takes *= self.rng.range(2, 20);
                    }
                    let entry = &mut self.wires[wire];
                    let busy = &mut entry.busy_until[side as usize];
                    *busy = (*busy).max(self.now + takes).max(entry.stalled_until);
                    self.scheduled += 1;
                    let event = Event::Arrive(wire, side == Side::Source);
                    self.queue.push(Reverse((*busy, self.scheduled, event)));
                }
            }
            if self.wires[wire].connection.is_done() {
                done.push(wire);
            }
        }
        for wire in done {
            self.alive.remove(&wire);
        }
    }

    /// Wires that are not cut and that somebody uses.
    pub(super) fn open_wires(&self) -> Vec<usize> {
        self.alive.iter().copied().filter(|&wire| !self.wires[wire].cut).collect()
    }

    /// Whether what was said on a wire at least `since` ago is heard by now: the destination lives, and nothing holds it or the wire up.
    pub(super) fn carries(&self, wire: usize, since: Micros) -> bool {
        let wire = &self.wires[wire];
        let held_until = self.frozen.into_iter().fold(wire.stalled_until, Micros::max);
        self.listening && !wire.cut && held_until + since < self.now
    }

    /// Cuts a connection: some of what is under way still arrives, and each side learns of it within `notice_max`.
    pub(super) fn cut(&mut self, wire: usize, notice_max: Micros) {
        if std::mem::replace(&mut self.wires[wire].cut, true) {
            return;
        }
        self.note(|| format!("wire {wire} is cut"));
        let rng = &mut self.rng;
        self.wires[wire].connection.cut(|_, under_way| {
            let whole = rng.below(under_way as u64 + 1) as usize;
            (whole, rng.below(9000) as usize)
        });
        for source in [true, false] {
            // One side may know at once, and the other long after.
            let longest = if self.rng.percent(50) { 2000 } else { notice_max };
            let after = self.rng.range(0, longest);
            self.schedule(after, Event::Notice(wire, source));
        }
    }

    /// A side gives a connection up after a while.
    pub(super) fn notice_later(&mut self, wire: usize, side: Side, after: Micros) {
        let after = after + self.rng.range(0, 300_000);
        self.schedule(after, Event::Notice(wire, side == Side::Source));
    }

    /// Nothing arrives on a connection for a while. Both sides of a control connection give it up when that is longer than they
    /// wait for a ping.
    pub(super) fn stall(&mut self, wire: usize, during: Micros, timeout: Micros) {
        self.note(|| format!("wire {wire} stalls for {during} us"));
        let until = &mut self.wires[wire].stalled_until;
        *until = (*until).max(self.now + during);
        if !self.wires[wire].is_for_data() && during > timeout {
            self.notice_later(wire, Side::Source, timeout);
            self.notice_later(wire, Side::Destination, timeout);
        }
    }
}

/// Pending once: until the side's next turn.
pub(super) struct NextTurn(bool);

impl NextTurn {
    pub(super) fn new() -> Self {
        Self(false)
    }
}

impl Future for NextTurn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// A side does nothing for so long.
pub(super) async fn sleep(world: &RefCell<World>, time: Micros, side: Side) {
    let until = clock::now() + Duration::from_micros(time);
    world.borrow_mut().schedule(time + 1, Event::Alarm(side == Side::Source));
    while clock::now() < until {
        NextTurn::new().await;
    }
}

/// What a side has of a control connection: a wire, and the bytes of the message that is not whole yet.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) wire: usize,
    buffer: Vec<u8>,
    dead: bool,
}

impl Link {
    /// A link whose first bytes may have come along with the preamble.
    pub(super) fn new(wire: usize, buffer: Vec<u8>) -> Self {
        Self { wire, buffer, dead: false }
    }

    /// What came after the last message.
    pub(super) fn rest(&self) -> &[u8] {
        &self.buffer
    }

    /// The next whole message; `Some(None)`, once, when the link is dead.
    pub(super) fn next(&mut self, world: &mut World, side: Side) -> Option<Option<Message>> {
        if self.dead {
            return None;
        }
        let connection = world.connection(self.wire);
        let open = connection.read_all(side, &mut self.buffer);
        if let Some(header) = self.buffer.first_chunk::<HEADER_LEN>() {
            let (_, len) = Message::decode_header(header).expect("the network damages nothing");
            let whole = HEADER_LEN + len + CHECKSUM_LEN;
            if self.buffer.len() >= whole {
                let bytes: Vec<u8> = self.buffer.drain(..whole).collect();
                let message = Message::decode(&bytes).expect("the network damages nothing");
                world.note(|| format!("{side:?} hears {} on wire {}", message.name(), self.wire));
                return Some(Some(message));
            }
        }
        if open {
            return None;
        }
        self.dead = true;
        connection.close(side);
        world.note(|| format!("{side:?} has lost its control connection, wire {}", self.wire));
        Some(None)
    }
}
