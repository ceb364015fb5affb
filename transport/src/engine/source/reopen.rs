//! When lost streams are connected again: each by itself, with back-off, while the others go on. It opens nothing: it says what is due.

use std::time::Duration;

use crate::clock;
use crate::wire::{next_incarnation, stream_number};

/// Pause before a stream that was lost is connected again, and between attempts; doubled from one to the next.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A stream that lasted this long was a good one: the next pause is the shortest again.
const STEADY: Duration = Duration::from_millis(250);

/// The streams of a session, as far as their connections go, by number.
#[derive(Debug)]
pub(super) struct Reopening {
    slots: Vec<Slot>,
}

/// One number.
#[derive(Debug)]
struct Slot {
    /// Id of its last incarnation, or of the attempt at the next.
    id: u16,
    next: Next,
    pause: Duration,
    since: Duration,
}

/// What a number waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Its stream's end.
    Loss,
    /// The time of its next attempt.
    Attempt(Duration),
    /// The end of an attempt.
    Opened,
}

impl Reopening {
    /// For streams with the ids 0 to `streams` that are connected now.
    pub(super) fn new(streams: u16) -> Self {
        let since = clock::now();
        let slot = |id| Slot { id, next: Next::Loss, pause: PAUSE_MIN, since };
        Self { slots: (0..streams).map(slot).collect() }
    }

    /// A stream is dead on both sides.
    pub(super) fn lost(&mut self, id: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(stream_number(id))) else { return };
        if slot.id != id || slot.next != Next::Loss {
            return;
        }
        if clock::now() - slot.since >= STEADY {
            slot.pause = PAUSE_MIN;
        }
        slot.wait();
    }

    /// All streams are dead on both sides, and the way is open again.
    pub(super) fn all_lost(&mut self) {
        let now = clock::now();
        for slot in &mut self.slots {
            (slot.next, slot.pause) = (Next::Attempt(now), PAUSE_MIN);
        }
    }

    /// Attempts are given up.
    pub(super) fn stop(&mut self) {
        for slot in &mut self.slots {
            slot.next = Next::Loss;
        }
    }

    /// The id with which a stream is to be opened now, if one is due: another for every attempt, for the destination may have let one in
    /// whose answer was lost.
    pub(super) fn due(&mut self) -> Option<u16> {
        let now = clock::now();
        let slot = self.slots.iter_mut().find(|slot| matches!(slot.next, Next::Attempt(at) if at <= now))?;
        (slot.id, slot.next) = (next_incarnation(slot.id), Next::Opened);
        Some(slot.id)
    }

    /// An attempt has ended.
    pub(super) fn on_opened(&mut self, id: u16, opened: bool) {
        let slot = &mut self.slots[usize::from(stream_number(id))];
        if opened {
            (slot.next, slot.since) = (Next::Loss, clock::now());
        } else {
            slot.wait();
        }
    }
}

impl Slot {
    /// Waits for the next attempt.
    fn wait(&mut self) {
        self.next = Next::Attempt(clock::now() + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}
