//! When lost streams are connected again, as the engine does it: each by itself, with back-off, and another id for every attempt.

use std::collections::BTreeMap;

use super::world::{Event, Micros, World};
use crate::wire::{next_incarnation, stream_number};

const PAUSE_MIN: Micros = 50_000;
const PAUSE_MAX: Micros = 2_000_000;

/// What a number waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Its stream's end, or that of an attempt.
    Loss,
    /// The time of its next attempt.
    Attempt(Micros),
}

#[derive(Debug)]
struct Slot {
    id: u16,
    next: Next,
    pause: Micros,
}

/// The numbers of a session.
#[derive(Debug, Default)]
pub(super) struct Reopening {
    slots: BTreeMap<u16, Slot>,
}

impl Reopening {
    pub(super) fn add(&mut self, stream: u16) {
        self.slots.insert(stream, Slot { id: stream, next: Next::Loss, pause: PAUSE_MIN });
    }

    /// An incarnation works.
    pub(super) fn opened(&mut self, id: u16, _world: &World) {
        if let Some(slot) = self.slots.get_mut(&stream_number(id)) {
            slot.next = Next::Loss;
        }
    }

    /// A stream is dead on both sides.
    pub(super) fn lost(&mut self, id: u16, world: &mut World) {
        self.failed(id, world);
    }

    /// An attempt failed.
    pub(super) fn failed(&mut self, id: u16, world: &mut World) {
        let Some(slot) = self.slots.get_mut(&stream_number(id)).filter(|slot| slot.id == id) else { return };
        if slot.next == Next::Loss {
            slot.next = Next::Attempt(world.now + slot.pause);
            world.schedule(slot.pause, Event::Alarm);
            slot.pause = (slot.pause * 2).min(PAUSE_MAX);
        }
    }

    /// All streams are dead on both sides, and the way is open again.
    pub(super) fn all_lost(&mut self, world: &World) {
        for slot in self.slots.values_mut() {
            (slot.next, slot.pause) = (Next::Attempt(world.now), PAUSE_MIN);
        }
    }

    /// Gives attempts up.
    pub(super) fn stop(&mut self) {
        self.slots.values_mut().for_each(|slot| slot.next = Next::Loss);
    }

    /// The ids with which streams are to be connected now.
    pub(super) fn due(&mut self, world: &World) -> Vec<u16> {
        let mut due = Vec::new();
        for slot in self.slots.values_mut() {
            if matches!(slot.next, Next::Attempt(at) if at <= world.now) {
                slot.id = next_incarnation(slot.id);
                slot.next = Next::Loss;
                due.push(slot.id);
            }
        }
        due
    }
}
