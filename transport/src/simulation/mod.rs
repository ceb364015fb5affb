//! Source, destination, network and clock as one deterministic simulation.
//!
//! What runs is the real thing: the session machines, the stream bookkeeping, every message and frame encoded and decoded, lanes
//! and workers with their codecs, delta cache, digests, receipts and chunk ownership, the pending bitmap, the feeder's batches,
//! the windows and the precopy policy, both ends of postcopy's connections, and both sides' phases, on environments of this world
//! ([`source`], [`destination`]). What is simulated is what they stand on: connections ([`network`]), the clock ([`world`]), guest
//! memory and its dirty log ([`guest`]), and two processes, of which one goes on at a time. One number, the seed, decides
//! everything, so a run that went wrong can be
//! repeated and looked at:
//!
//! ```text
//! PAGEFERRY_SEED=17 cargo test -p pageferry-transport simulation -- --nocapture      one run, step by step
//! PAGEFERRY_SEEDS=100000 cargo test -p pageferry-transport --release simulation      many of them
//! ```
//!
//! What must hold, in every run:
//!
//! - the guest never runs on two sides, and the source never resumes it after the destination has run it;
//! - when it runs at the destination, every byte of its memory and its device state is what it was when it was paused;
//! - every receipt matches: no delta meets another base than the one it was made from, and no old version of a page is written
//!   over a newer one;
//! - no side ever takes the other's messages, frames or accounts for wrong;
//! - pages that follow a guest are those that it left, each once, and it never runs on zeros instead;
//! - it ends: in fair weather at the destination, and there, too, where nothing but connections was lost that both sides take up
//!   again; after any fault with exactly one side running the guest, unless a process that may have had it died, pages that it misses
//!   never come, somebody ended the asking, or the two could not hear each other for longer than an abandoned session is answered for.

mod base;
mod destination;
pub(crate) mod fault;
mod guest;
mod network;
mod rng;
mod source;
#[cfg(test)]
mod tests;
mod weather;
mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use self::base::OldCopy;
use self::destination::DestinationHost;
use self::fault::Fault;
use self::guest::Guest;
use self::network::Side;
use self::rng::Rng;
use self::source::{Env, Fate, SourceHost, Task};
use self::weather::{Plan, Strike, Trigger};
use self::world::{Event, Micros, World};
use crate::clock::virtual_time;
use crate::destination::PageSink;
use crate::source::stepped::LaneSlot;
use crate::wire::SessionId;

/// Silence after which a side gives the other up, in microseconds.
const TIMEOUT: Micros = 1_000_000;
/// How long the destination waits for GO without a source.
const HANDOVER_TIMEOUT: Micros = 5_000_000;
/// How long the destination waits without a source for pages of a guest that runs.
const POSTCOPY_TIMEOUT: Micros = 20_000_000;
/// A destination that gave up answers for longer than this, and its source asks at least as often.
const ANSWERED_FOR: Micros = 2_500_000;
/// How often a side looks at the clock.
const TICK: Micros = 100_000;
const SESSION: SessionId = [7; 16];
/// A run that takes longer than this does not end.
const END_OF_TIME: Micros = 120_000_000;
const EVENTS_MAX: u64 = 100_000;
/// Questions after which a source that hears nothing will never hear anything.
const ASKED_MAX: u32 = 6;
/// Lanes of a run.
const LANES_MAX: usize = 96;

/// What a process says that panics because it was struck.
const STRUCK: &str = "struck by the simulation";

/// Panics without a word: it is meant.
fn panic_silently() -> ! {
    std::panic::resume_unwind(Box::new(STRUCK))
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The guest runs at the destination.
    Moved,
    /// It runs on at the source.
    Stayed,
    /// It runs nowhere, because a process died that had it or may have had it, or because the two could not reach each other for
    /// too long.
    Gone,
}

impl Ending {
    fn name(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Stayed => "stayed",
            Self::Gone => "gone",
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// What must never happen, and did.
    pub(super) violation: Option<String>,
    /// A digest of everything that happened.
    pub(super) digest: u64,
    pub(super) trace: Vec<String>,
    /// What may happen and did, and how often.
    pub(super) seen: BTreeMap<&'static str, u64>,
}

/// What lives longer than the processes that use it.
struct Ground {
    lanes: Vec<LaneSlot>,
    sink: OnceLock<Arc<PageSink>>,
}

struct Run<'a> {
    world: Rc<RefCell<World>>,
    source: Option<SourceHost<'a>>,
    destination: Option<DestinationHost<'a>>,
    /// The guest's memory at the source, and at the destination.
    guests: [Arc<Guest>; 2],
    strikes: Vec<(Trigger, Strike)>,
    struck: bool,
    /// Nothing struck but cuts, after pages had begun to move, and both sides take what was lost up again.
    survivable: bool,
    /// The destination had the guest.
    arrived: bool,
    events: u64,
    /// For how long something kept the two from hearing each other, in all.
    obstructed: Micros,
    /// When GO was said, in events.
    go_at: Option<u64>,
    /// Messages of [`World::said`] that were looked at.
    heard: usize,
}

/// One run.
pub(super) fn run(seed: u64, broken: Option<Fault>, traced: bool) -> Outcome {
    fault::set(broken);
    virtual_time::set(Some(0));
    let plan = Plan::new(seed);
    let ground =
        Ground { lanes: (0..LANES_MAX).map(|_| LaneSlot::default()).collect(), sink: OnceLock::new() };
    let mut rng = Rng::new(plan.rng.clone().next());
    let origin = Guest::new(plan.layout.clone(), plan.habits[0], rng.fork(), None);
    let home = Guest::new(plan.layout.clone(), plan.habits[1], rng.fork(), Some(origin.clone()));
    // By chance of its own: without a copy a seed is what it was.
    let base = plan.base.then(|| OldCopy::new(&origin, Rng::new(!seed)));
    let guests = [origin, home];
    let world = Rc::new(RefCell::new(World::new(rng.fork(), plan.weather, traced)));
    world.borrow_mut().note(|| format!("{plan:#?}"));
    let task = Task::new(&guests[0], &plan.attempt);
    let env = Env::new(&ground.lanes, &world, &task);
    let waits = destination::Task::new(&guests[1], plan.reconnect_max);
    let there = destination::Env::new(&ground.sink, base, &world);
    let source = SourceHost::start(&env, &task);
    let destination = DestinationHost::start(&there, &waits);
    let outcome = Run::new(&plan, world, guests, source, destination).run();
    virtual_time::set(None);
    fault::set(None);
    outcome
}

impl<'a> Run<'a> {
    fn new(
        plan: &Plan,
        world: Rc<RefCell<World>>,
        guests: [Arc<Guest>; 2],
        source: SourceHost<'a>,
        destination: DestinationHost<'a>,
    ) -> Run<'a> {
        let mut happens = world.borrow_mut();
        for side in [true, false] {
            happens.schedule(TICK, Event::Tick(side));
            happens.schedule(0, Event::Guest(side));
        }
        happens.depart();
        drop(happens);
        Run {
            world,
            source: Some(source),
            destination: Some(destination),
            guests,
            strikes: plan.strikes.clone(),
            struck: plan.habits[1].is_faulty(),
            survivable: !plan.habits[1].is_faulty() && plan.attempt.reconnect != 0 && plan.reconnect_max != 0,
            arrived: false,
            events: 0,
            obstructed: 0,
            go_at: None,
            heard: 0,
        }
    }

    fn run(mut self) -> Outcome {
        while self.world.borrow().violation.is_none() && !self.is_over() {
            self.events += 1;
            if self.events > EVENTS_MAX || self.world.borrow().now > END_OF_TIME {
                self.violated("the run does not end");
                break;
            }
            let next = self.world.borrow_mut().next();
            let Some(event) = next else {
                self.violated("nothing will ever happen, and the run is not over");
                break;
            };
            self.happen(event);
            self.world.borrow_mut().depart();
            self.strike();
            self.world.borrow_mut().depart();
            self.check_owners();
        }
        let ending = self.ending();
        let mut world = self.world.borrow_mut();
        if world.violation.is_some() {
            let source = self.source.as_ref().map_or("dead".into(), SourceHost::describe);
            let destination = self.destination.as_ref().map_or("dead".into(), DestinationHost::describe);
            world.note(|| format!("source: {source}; destination: {destination}"));
        }
        world.saw(ending.name(), 1);
        world.saw("both died", u64::from(self.source.is_none() && self.destination.is_none()));
        world.saw("waits for a page", self.guests[1].waits());
        world.saw("pages taken away, and the handover taken back", self.guests[1].taken_back());
        world.saw("lost before its pages were there", u64::from(self.guests[1].is_lost()));
        Outcome {
            violation: world.violation.take(),
            digest: world.digest,
            trace: world.trace.take().unwrap_or_default(),
            seen: std::mem::take(&mut world.seen),
        }
    }

    fn violated(&self, what: &str) {
        self.world.borrow_mut().violated(what);
    }

    /// Lets an event happen, or puts it off while its process stands still.
    fn happen(&mut self, event: Event) {
        let mut world = self.world.borrow_mut();
        let of_source = match event {
            Event::Arrive(wire, by_source) => {
                let by = if by_source { Side::Source } else { Side::Destination };
                world.connection(wire).arrive(by);
                !by_source
            }
            Event::Notice(wire, source) => {
                world.connection(wire).notice(if source { Side::Source } else { Side::Destination });
                source
            }
            Event::Abort(_) | Event::Refuse(_) | Event::Lane(_) => true,
            Event::Worker(_) => false,
            Event::Look(_, source)
            | Event::Postcopy(_, source)
            | Event::Tick(source)
            | Event::Guest(source)
            | Event::Alarm(source) => source,
        };
        let thaws = world.frozen[usize::from(!of_source)];
        if world.now < thaws {
            // What arrived lies in the system's buffers until somebody looks.
            let again = match event {
                Event::Arrive(wire, by_source) => Event::Look(wire, !by_source),
                Event::Notice(wire, source) => Event::Look(wire, source),
                other => other,
            };
            let after = thaws - world.now;
            return world.schedule(after, again);
        }
        drop(world);
        if of_source { self.at_source(event) } else { self.at_destination(event) }
    }

    fn at_source(&mut self, event: Event) {
        if event == Event::Guest(true) {
            self.guests[0].run();
            if self.guests[0].is_busy() || self.source.as_ref().is_some_and(|s| s.fate().is_none()) {
                let mut world = self.world.borrow_mut();
                let after = world.rng.range(50, 1500);
                world.schedule(after, event);
            }
            return;
        }
        if let Some(source) = &mut self.source {
            source.happen(event);
        }
    }

    fn at_destination(&mut self, event: Event) {
        if event == Event::Guest(false) {
            self.guests[1].run();
            if !self.guests[1].is_busy() && self.arrived {
                return;
            }
            let mut world = self.world.borrow_mut();
            let after = world.rng.range(50, 1500);
            world.schedule(after, event);
        }
        let Some(destination) = &mut self.destination else { return };
        let had = self.arrived;
        destination.happen(event);
        if let Some(what) = self.guests[1].violation() {
            self.violated(&what);
        }
        self.arrived |= self.guests[1].runs();
        if self.arrived
            && !had
            && let Some(what) = self.guests[0].difference(&self.guests[1])
        {
            self.violated(&format!("the guest runs at the destination with something stale: {what}"));
        }
    }

    /// Never two owners, and never back once it has run elsewhere.
    fn check_owners(&mut self) {
        let at_source = self.guests[0].runs();
        if at_source && self.arrived {
            self.violated("the guest runs at the source although it has run at the destination");
        }
        if self.arrived && self.source.as_ref().is_some_and(SourceHost::owns_guest) {
            self.violated("the source thinks that it owns a guest that runs at the destination");
        }
    }

    fn is_over(&self) -> bool {
        let destination_over =
            self.destination.as_ref().is_none_or(|d| d.is_over() || (d.is_idle() && self.source_is_over()));
        let source_lost = self.source.as_ref().is_some_and(|s| s.asked() > ASKED_MAX);
        destination_over && (self.source_is_over() || source_lost)
    }

    fn source_is_over(&self) -> bool {
        self.source.as_ref().is_none_or(|s| s.fate().is_some())
    }

    /// Who runs the guest in the end; nobody must have a reason.
    fn ending(&mut self) -> Ending {
        let at_destination = self.destination.is_some() && self.guests[1].runs();
        let at_source = self.source.is_some() && self.guests[0].runs();
        let ending = match (at_source, at_destination) {
            (true, true) => {
                self.violated("two owners");
                Ending::Moved
            }
            (true, false) => Ending::Stayed,
            (false, true) => Ending::Moved,
            (false, false) => Ending::Gone,
        };
        if self.world.borrow().violation.is_some() {
            return ending;
        }
        let fate = self.source.as_ref().and_then(SourceHost::fate);
        let asked_no_more = fate == Some(Fate::Unknown);
        // Its source could not be reached, or memory ran out.
        let lost = self.struck && self.guests[1].is_lost();
        let unheard = self.obstructed > ANSWERED_FOR;
        let alive = self.source.is_some() && self.destination.is_some();
        if ending == Ending::Gone && alive && !asked_no_more && !lost && !unheard {
            self.violated("both processes live and nobody runs the guest");
        }
        if ending != Ending::Moved && !self.struck {
            self.violated("the migration failed in fair weather");
        }
        if ending != Ending::Moved && self.survivable {
            self.violated("the migration did not survive lost connections");
        }
        let through = self.destination.as_ref().is_some_and(DestinationHost::is_through);
        if through && self.guests[1].missing() != 0 {
            self.violated("the destination is through, and pages are missing");
        }
        if fate == Some(Fate::Lost) && !self.guests[1].is_lost() {
            self.violated("the source believes that the guest is lost, and it is not");
        }
        if fate == Some(Fate::Moved) && !self.arrived {
            self.violated("the source believes that the guest has moved, and it has not");
        }
        ending
    }
}
