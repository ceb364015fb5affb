//! What a seed decides ahead: the guest, the network, the attempt, and what strikes when.

use pagecopy::choose::CodecMode;
use pagecopy::layout::{Layout, PAGE_SIZE, Region};
use pagecopy::policy::Limits;

use super::destination::DestinationHost;
use super::guest::Habits;
use super::network::Side;
use super::rng::Rng;
use super::source::{Attempt, SourceHost};
use super::world::{Event, Micros, Weather};
use super::{Run, TIMEOUT};

/// When something strikes.
#[derive(Clone, Debug)]
pub(super) enum Trigger {
    /// After this many events.
    Event(u64),
    /// When a side has said this, the first time.
    Said(&'static str, Side),
    /// This many events after GO was said.
    AfterGo(u64),
}

/// What strikes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Strike {
    /// One data stream breaks.
    CutStream,
    /// The source gives one data stream up, while what is under way on it still arrives and the destination does not hear of it for
    /// this long.
    AbortStream(Micros),
    /// The control connection breaks.
    CutControl,
    /// All connections break.
    CutAll,
    /// All connections break, and none can be opened for this long.
    Part(Micros),
    /// Nothing arrives on one connection for this long.
    Stall(Micros),
    /// Nothing arrives on any connection for this long.
    StallAll(Micros),
    /// A process is killed; the other side hears of it at once, or only by its own clock.
    Crash(Side, bool),
    /// A process stands still for this long.
    Freeze(Side, Micros),
    /// Somebody cancels at the source.
    Cancel,
    /// A process panics where it waits.
    Panic(Side),
}

/// What strikes a process.
#[derive(Clone, Copy, Debug)]
enum Blow {
    Dies,
    StandsStill,
    Panics,
}

/// How blows are counted: each at the source and at the destination, before GO was said, after that, and while the guest that runs misses
/// pages.
pub(super) const ROWS: [[[&str; 3]; 2]; 3] = [
    [
        ["source died before GO", "source died after GO", "source died while pages were missing"],
        [
            "destination died before GO",
            "destination died after GO",
            "destination died while pages were missing",
        ],
    ],
    [
        [
            "source stood still before GO",
            "source stood still after GO",
            "source stood still while pages were missing",
        ],
        [
            "destination stood still before GO",
            "destination stood still after GO",
            "destination stood still while pages were missing",
        ],
    ],
    [
        ["source panicked before GO", "source panicked after GO", "source panicked while pages were missing"],
        [
            "destination panicked before GO",
            "destination panicked after GO",
            "destination panicked while pages were missing",
        ],
    ],
];

/// Everything that a seed decides ahead.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) rng: Rng,
    pub(super) layout: Layout,
    pub(super) habits: [Habits; 2],
    pub(super) weather: Weather,
    pub(super) attempt: Attempt,
    /// How long the destination waits for a source that lost its connections.
    pub(super) reconnect_max: Micros,
    pub(super) strikes: Vec<(Trigger, Strike)>,
    /// The destination has an older copy of the guest.
    pub(super) base: bool,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let layout = layout(&mut rng);
        let places = [false, rng.percent(50)];
        let mut habits = places.map(|places| Habits {
            interferes: rng.pick(&[0, 5, 20, 40]),
            log_rearms: rng.percent(40),
            places,
            populates: places && rng.percent(50),
            refuses_state: false,
            refuses_to_run: false,
            misses: false,
            lacks_room: false,
            places_max: None,
            writes: rng.range(0, 1000) as u32,
        });
        let low = rng.range(20, 500);
        let weather =
            Weather { latency: (low, low + rng.pick(&[10, 500, 5000])), stragglers: rng.pick(&[0, 2, 20]) };
        let codec = rng.pick(&[
            CodecMode::Auto,
            CodecMode::Delta,
            CodecMode::Delta,
            CodecMode::Delta,
            CodecMode::Raw,
            CodecMode::Zstd { level: Some(1) },
            CodecMode::Zstd { level: Some(2) },
            CodecMode::Zstd { level: Some(2) },
        ]);
        let postcopy_after_rounds = rng.pick(&[None, None, None, Some(0), Some(1), Some(3)]);
        let attempt = Attempt {
            postcopy_after_rounds,
            streams: rng.pick(&[1, 2, 2, 3, 4]),
            reconnect: rng.pick(&[0, 4 * TIMEOUT, 20 * TIMEOUT]),
            codec,
            cache_bytes: rng.pick(&[8 << 20, 8 << 20, 40 << 10]),
            limits: Limits {
                downtime_ms: rng.pick(&[0, 0, 1, 20]),
                max_rounds: Some(rng.range(2, 14) as u32),
                ..Limits::default()
            },
        };
        habits[1].refuses_state = rng.percent(4);
        habits[1].refuses_to_run = rng.percent(2);
        habits[1].lacks_room = rng.percent(2);
        habits[1].places_max = rng.percent(2).then(|| rng.below(20) as u32);
        habits[1].misses = postcopy_after_rounds.is_some() || rng.percent(50);
        let reconnect_max = rng.pick(&[0, 4 * TIMEOUT, 20 * TIMEOUT, 20 * TIMEOUT]);
        let count = rng.pick(&[0, 1, 1, 2, 2, 3, 4]);
        let mut strikes: Vec<_> = (0..count).map(|_| (trigger(&mut rng), strike(&mut rng))).collect();
        if postcopy_after_rounds.is_some() && rng.percent(25) {
            strikes = in_the_handover(&mut rng);
        }
        let base = seed % 4 == 3;
        Self { layout, habits, weather, attempt, reconnect_max, strikes, base, rng }
    }
}

/// A few regions of a few pages: each is a chunk of its own.
pub(super) fn layout(rng: &mut Rng) -> Layout {
    let mut gpa = 0;
    let regions = (0..rng.range(1, 6)).map(|region| {
        let len = rng.range(1, 9) * PAGE_SIZE as u64;
        gpa += len + 0x10_0000;
        Region::new(format!("ram{region}"), gpa - len, len)
    });
    Layout::new(regions.collect()).expect("the regions lie apart")
}

fn trigger(rng: &mut Rng) -> Trigger {
    const SOURCE: [&str; 10] =
        ["HELLO", "STREAM_LOST", "STATE", "FINISH", "GO", "RUNNING", "RESUME", "POSTCOPY", "MISSING", "SENT"];
    const DESTINATION: [&str; 9] = [
        "WELCOME",
        "PREPARED",
        "ATTACHED",
        "STREAM_STOPPED",
        "READY",
        "RUNNING",
        "RESUMED",
        "POSTCOPY_READY",
        "ARRIVED",
    ];
    if rng.percent(15) {
        let most = 1 << rng.range(3, 8);
        return Trigger::AfterGo(rng.below(most));
    }
    if rng.percent(50) {
        // As often in the first steps as in the many that move pages.
        let most = 1 << rng.range(3, 11);
        return Trigger::Event(rng.below(most));
    }
    if rng.percent(50) {
        Trigger::Said(rng.pick(&SOURCE), Side::Source)
    } else {
        Trigger::Said(rng.pick(&DESTINATION), Side::Destination)
    }
}

/// What is hit in a handover before all pages are there: pages that were taken away come back, and who asks is told to stop.
fn in_the_handover(rng: &mut Rng) -> Vec<(Trigger, Strike)> {
    if rng.percent(50) {
        let (message, side) =
            rng.pick(&[("FINISH", Side::Source), ("READY", Side::Destination), ("READY", Side::Destination)]);
        return vec![(Trigger::Said(message, side), rng.pick(&[Strike::CutControl, Strike::CutAll]))];
    }
    let lost = rng.pick(&[("GO", Side::Source), ("RUNNING", Side::Destination)]);
    let strike = rng.pick(&[Strike::CutControl, Strike::CutAll, Strike::Part(3 * TIMEOUT)]);
    let cancel = Trigger::AfterGo(rng.below(60));
    vec![(Trigger::Said(lost.0, lost.1), strike), (cancel, Strike::Cancel)]
}

fn strike(rng: &mut Rng) -> Strike {
    let side = rng.pick(&[Side::Source, Side::Destination]);
    // About as long as a side waits, and far longer or shorter.
    let during = rng.pick(&[3_000, 100_000, TIMEOUT - 20_000, TIMEOUT + 20_000, 3 * TIMEOUT, 8 * TIMEOUT]);
    match rng.below(21) {
        0..=5 => Strike::CutStream,
        6..=8 => Strike::AbortStream(rng.range(0, 30_000)),
        9 | 10 => Strike::CutControl,
        11 => Strike::CutAll,
        12 => Strike::Part(during),
        13..=15 => Strike::Stall(during),
        16 => Strike::StallAll(during),
        17 => Strike::Crash(side, rng.percent(50)),
        18 => Strike::Freeze(side, during),
        19 => Strike::Panic(side),
        _ => Strike::Cancel,
    }
}

impl Run<'_> {
    /// Whatever is due strikes.
    pub(super) fn strike(&mut self) {
        let said = self.world.borrow().said[self.heard..].to_vec();
        self.heard += said.len();
        if self.strikes.is_empty() {
            return;
        }
        let events = self.events;
        if said.contains(&("GO", Side::Source)) {
            self.go_at.get_or_insert(events);
        }
        let since_go = self.go_at.map(|at| events - at);
        let due = |trigger: &Trigger| match trigger {
            Trigger::Event(number) => events >= *number,
            Trigger::AfterGo(events) => since_go.is_some_and(|since| since >= *events),
            Trigger::Said(message, side) => said.contains(&(*message, *side)),
        };
        let (due, rest) =
            std::mem::take(&mut self.strikes).into_iter().partition(|(trigger, _)| due(trigger));
        self.strikes = rest;
        for (_, strike) in due {
            self.struck = true;
            let cut = matches!(
                strike,
                Strike::CutStream | Strike::AbortStream(_) | Strike::CutControl | Strike::CutAll
            );
            self.survivable &= cut && self.source.as_ref().is_some_and(SourceHost::has_moved_pages);
            self.strike_with(strike);
        }
    }

    fn strike_with(&mut self, strike: Strike) {
        if let Strike::Part(during)
        | Strike::Stall(during)
        | Strike::StallAll(during)
        | Strike::Freeze(_, during) = strike
        {
            self.obstructed += during;
        }
        match strike {
            Strike::Crash(side, loud) => self.crash(side, loud),
            Strike::Freeze(side, during) => self.freeze(side, during),
            Strike::Panic(side) => self.panic(side),
            Strike::Cancel => {
                self.world.borrow_mut().note(|| "somebody cancels".into());
                if let Some(source) = &mut self.source {
                    self.world.borrow_mut().saw("cancelled while it asked", u64::from(source.is_asking()));
                    source.cancel();
                }
            }
            _ => self.strike_connections(strike),
        }
    }

    fn strike_connections(&mut self, strike: Strike) {
        let world = &mut *self.world.borrow_mut();
        world.note(|| format!("strike: {strike:?}"));
        let open = world.open_wires();
        let streams = |world: &super::World, stream: bool| -> Vec<usize> {
            let of_kind = |&&wire: &&usize| world.wires[wire].is_for_data() == stream;
            open.iter().filter(of_kind).copied().collect()
        };
        match strike {
            Strike::CutStream => {
                let streams = streams(world, true);
                if !streams.is_empty() {
                    let wire = world.rng.pick(&streams);
                    world.cut(wire, 2 * TIMEOUT);
                }
            }
            Strike::AbortStream(unheard) => {
                let (mut slow, streams) = (streams(world, false), streams(world, true));
                if !streams.is_empty() {
                    let wire = world.rng.pick(&streams);
                    slow.push(wire);
                    let after = world.rng.range(0, unheard);
                    world.schedule(after, Event::Abort(wire));
                }
                slow.into_iter().for_each(|wire| world.stall(wire, unheard, TIMEOUT));
            }
            Strike::CutControl => {
                streams(world, false).into_iter().for_each(|wire| world.cut(wire, TIMEOUT));
            }
            Strike::CutAll => open.iter().for_each(|&wire| world.cut(wire, TIMEOUT)),
            Strike::Part(during) => {
                open.iter().for_each(|&wire| world.cut(wire, TIMEOUT));
                world.parted_until = world.now + during;
            }
            Strike::Stall(during) => {
                if !open.is_empty() {
                    let wire = world.rng.pick(&open);
                    world.stall(wire, during, TIMEOUT);
                }
            }
            Strike::StallAll(during) => {
                open.iter().for_each(|&wire| world.stall(wire, during, TIMEOUT));
            }
            Strike::Crash(..) | Strike::Freeze(..) | Strike::Cancel | Strike::Panic(_) => {}
        }
    }

    /// Counts what strikes a side once pages move, by how far the handover is.
    fn count(&self, blow: Blow, side: Side) {
        let mut world = self.world.borrow_mut();
        let said = |what, by| world.said.contains(&(what, by));
        let when = match self.guests[1].missing() {
            _ if !said("PREPARED", Side::Destination) => return,
            _ if !said("GO", Side::Source) => 0,
            missing if missing != 0 && self.arrived => 2,
            _ => 1,
        };
        if self.source.is_some() && self.destination.is_some() {
            world.saw(ROWS[blow as usize][side as usize][when], 1);
        }
    }

    /// A thread of a process panics, where it waits next.
    fn panic(&mut self, side: Side) {
        self.world.borrow_mut().note(|| format!("{side:?} is to panic"));
        self.count(Blow::Panics, side);
        match side {
            Side::Source => self.source.iter_mut().for_each(SourceHost::panic),
            Side::Destination => self.destination.iter_mut().for_each(DestinationHost::panic),
        }
    }

    fn crash(&mut self, side: Side, loud: bool) {
        self.count(Blow::Dies, side);
        let mut world = self.world.borrow_mut();
        world.note(|| format!("the process {side:?} is killed"));
        world.listening &= side == Side::Source;
        for wire in world.open_wires() {
            if loud {
                world.connection(wire).close(side);
            } else {
                world.cut(wire, TIMEOUT + 300_000);
            }
        }
        drop(world);
        // What it held is closed with it, which nobody hears of where the connections were cut.
        match side {
            Side::Source => self.source = None,
            Side::Destination => self.destination = None,
        }
        self.guests[side as usize].set_running(false);
    }

    /// The process stands still. The other side gives it up when it hears no ping for too long.
    fn freeze(&mut self, side: Side, during: Micros) {
        self.count(Blow::StandsStill, side);
        let world = &mut *self.world.borrow_mut();
        world.note(|| format!("{side:?} stands still for {during} us"));
        world.frozen[side as usize] = world.now + during;
        if during > TIMEOUT {
            for wire in world.open_wires() {
                if !world.wires[wire].is_for_data() {
                    world.notice_later(wire, side.other(), TIMEOUT);
                }
            }
        }
    }
}
