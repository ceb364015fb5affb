//! Connects lost streams anew, each by itself, with back-off and in the background, while the others go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::carrier::SourceEnd;
use crate::dial::{Dialler, OpenError};
use crate::link::LinkError;
use crate::panic_text;
use crate::wire::{next_incarnation, stream_number};
use crossbeam_channel::{Receiver, Sender, unbounded};

use super::leave::Leave;

/// Pause before a stream that was lost is connected again, and between attempts; doubled from one to the next.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A stream that lasted this long was a good one: the next pause is the shortest again.
const STEADY: Duration = Duration::from_millis(250);

/// What all streams of a session are opened with.
pub(super) struct Opener {
    pub(super) dialler: Dialler,
    pub(super) leave: Leave,
}

impl Opener {
    /// Opens the stream with this id, unless that comes to be in vain meanwhile.
    pub(super) fn open(&self, id: u16, vain: &AtomicBool) -> Result<SourceEnd, OpenError> {
        let given_up = || vain.load(Ordering::Relaxed) || self.leave.is_over();
        self.dialler.open(id, &given_up)
    }
}

/// How attempts of the background end.
type Opened = (u16, Result<SourceEnd, OpenError>);

/// The streams of a session, as far as their connections go.
pub(super) struct Reopening {
    opener: Arc<Opener>,
    opened: (Sender<Opened>, Receiver<Opened>),
    /// Nobody waits for the attempts that are under way.
    vain: Arc<AtomicBool>,
    /// By number.
    slots: Vec<Slot>,
}

/// One number.
struct Slot {
    /// Id of its last incarnation, or of the attempt at the next.
    id: u16,
    next: Next,
    pause: Duration,
    since: Instant,
}

/// What a number waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Its stream's end.
    Loss,
    /// The time of its next attempt.
    Attempt(Instant),
    /// The end of an attempt.
    Opened,
}

impl Reopening {
    /// For streams with the ids 0 to `streams` that are connected now.
    pub(super) fn new(opener: Arc<Opener>, streams: u16) -> Self {
        let since = Instant::now();
        let slot = |id| Slot { id, next: Next::Loss, pause: PAUSE_MIN, since };
        let vain = Arc::default();
        Self { opener, opened: unbounded(), vain, slots: (0..streams).map(slot).collect() }
    }

    /// A stream is dead on both sides.
    pub(super) fn lost(&mut self, id: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(stream_number(id))) else { return };
        if slot.id != id || slot.next != Next::Loss {
            return;
        }
        if slot.since.elapsed() >= STEADY {
            slot.pause = PAUSE_MIN;
        }
        slot.wait();
    }

    /// All streams are dead on both sides, and the way is open again.
    pub(super) fn all_lost(&mut self) {
        self.stop();
        let now = Instant::now();
        for slot in &mut self.slots {
            (slot.next, slot.pause) = (Next::Attempt(now), PAUSE_MIN);
        }
    }

    /// Gives attempts up that are under way: what they still open is closed at once.
    pub(super) fn stop(&mut self) {
        self.opened = unbounded();
        std::mem::take(&mut self.vain).store(true, Ordering::Relaxed);
        for slot in &mut self.slots {
            slot.next = Next::Loss;
        }
    }

    /// Begins the attempts that are due, of each of which `begins` hears the id before the destination does; returns a stream that was
    /// opened, with its id.
    pub(super) fn poll(&mut self, mut begins: impl FnMut(u16)) -> Option<(u16, SourceEnd)> {
        let now = Instant::now();
        for slot in &mut self.slots {
            if matches!(slot.next, Next::Attempt(at) if at <= now) {
                // Another id for every attempt: the destination may have let one in whose answer was lost.
                slot.id = next_incarnation(slot.id);
                begins(slot.id);
                slot.attempt(&self.opener, &self.opened.0, &self.vain);
            }
        }
        while let Ok((id, end)) = self.opened.1.try_recv() {
            let slot = &mut self.slots[usize::from(stream_number(id))];
            match end {
                Ok(end) => {
                    (slot.next, slot.since) = (Next::Loss, now);
                    return Some((id, end));
                }
                Err(_) => slot.wait(),
            }
        }
        None
    }
}

impl Drop for Reopening {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Slot {
    /// Waits for the next attempt.
    fn wait(&mut self) {
        self.next = Next::Attempt(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    fn attempt(&mut self, opener: &Arc<Opener>, opened: &Sender<Opened>, vain: &Arc<AtomicBool>) {
        let (id, opener, opened, vain) = (self.id, opener.clone(), opened.clone(), vain.clone());
        let name = format!("reopen-{}", stream_number(id));
        let begun = std::thread::Builder::new().name(name).spawn(move || {
            // Nobody listens any more where the session went on without it.
            let end = catch_unwind(AssertUnwindSafe(|| opener.open(id, &vain))).unwrap_or_else(|payload| {
                let text = format!("opening it panicked: {}", panic_text(&*payload));
                Err(LinkError::Io(std::io::Error::other(text)).into())
            });
            let _ = opened.send((id, end));
        });
        match begun {
            Ok(_) => self.next = Next::Opened,
            // Out of threads, for now.
            Err(_) => self.wait(),
        }
    }
}
