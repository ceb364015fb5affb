//! How hard a session compresses: the longer what was sent waits to arrive, the harder.
//!
//! What is under way on a stream says all that has to be known of the link: where it waits, the link is what limits, and there is time to
//! compress what follows; where nothing waits, the source is what limits, and each byte that it encodes less gives it time. So nothing is
//! guessed of rates, cores or where the peer is. Source: Jeannot, Knutsson, Björkman, Adaptive online data compression, HPDC 2002.
//!
//! Two loops share the work. Each chunk gets so much effort as waits before it, at once ([`Effort::pressure`]). And the effort that chunks
//! get where as much waits as is wanted follows slowly, so that as much does (`State::decide`).
//!
//! What waits may wait for the destination, too: it decompresses, brings memory in, or has no core. That it says itself ([`Load`]): a
//! destination whose threads hardly wait for frames is what limits, and gets pages as they are.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ladder::{Corner, FIRST, Ladder};
use super::{CodecMode, Load, Sent};

/// It is decided again after this much time, in nanoseconds.
const WINDOW_NANOS: u64 = 10_000_000;
/// What is under way on a stream is to take this long to arrive, beyond the path's own time: then a chunk gets the session's effort.
/// Where it takes twice as long, the chunk gets twice the effort; where nothing waits, none.
const AHEAD_NANOS: f64 = 10e6;
const AHEAD_MAX: f64 = 2.0;
/// What the effort changes in a window, where streams have twice as much ahead as they are to have, or nothing.
const GAIN: (f64, f64) = (0.15, 0.4);
/// The destination is what limits where its threads wait for less than this part of the time.
const WAITS_MIN: f64 = 0.05;
/// What is left of the effort after a window in which it did.
const FALL: f64 = 0.6;
/// How many times as much it is after a window in which streams had as much ahead as counts.
const RISE: f64 = 1.5;
/// Frames wait for cores, too. That part of the time in which threads of either end had none counts so much against what waits.
const CROWDED: f64 = 0.5;
/// Least effort, of what the lightest step takes.
const LEAST: f64 = 0.01;
/// A stream that has planned nothing in so many windows says nothing of the link any more.
const SILENT_WINDOWS: u64 = 8;

/// What the streams of a session decide together.
#[derive(Debug)]
pub struct Effort {
    mode: CodecMode,
    state: Mutex<State>,
    /// Rises with each decision.
    version: AtomicU64,
}

/// What one of the two ends did in a window, all its threads together.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    passed: f64,
    worked: f64,
    ready: f64,
}

impl End {
    fn add(&mut self, load: Load) {
        self.passed += load.passed_nanos as f64;
        self.worked += load.worked_nanos as f64;
        self.ready += load.ready_nanos as f64;
    }

    /// The part of the time in which they had no core.
    fn crowded(&self) -> f64 {
        (self.ready / self.passed.max(1.0)).min(1.0)
    }

    /// The part of the time in which they waited for the other end.
    fn waits(&self) -> f64 {
        1.0 - ((self.worked + self.ready) / self.passed.max(1.0)).min(1.0)
    }
}

/// What is decided.
#[derive(Clone, Debug)]
pub(super) struct Decision {
    /// What may be spent on a byte, in nanoseconds of a core, and what can be had for it.
    pub(super) budget: f64,
    pub(super) corners: Vec<Corner>,
    /// Nanoseconds for which a thread of the source has a byte, however it is sent; `None` before that was seen.
    pub(super) nanos: Option<f64>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) ladder: Ladder,
    decision: Decision,
    /// When the window began.
    began: Option<u64>,
    source: End,
    destination: End,
    /// The part of the time that the destination waits, as it last said.
    destination_waits: Option<f64>,
    sent: Sent,
    /// The part of the time in which threads of the end that lacks cores most had none.
    crowded: f64,
    /// What each stream has ahead, as a part of what it is to have, and in which window that was; nothing of places that are free.
    pressures: Vec<Option<(f64, u64)>>,
    window: u64,
}

impl Effort {
    /// For a session that has not sent anything.
    pub fn new(mode: CodecMode) -> Self {
        let ladder = Ladder::new(mode == CodecMode::Auto);
        let (budget, corners) = (ladder.estimate(FIRST).nanos, ladder.corners());
        let state = State {
            ladder,
            decision: Decision { budget, corners, nanos: None },
            began: None,
            source: End::default(),
            destination: End::default(),
            destination_waits: None,
            sent: Sent::default(),
            crowded: 0.0,
            pressures: Vec::new(),
            window: 0,
        };
        Self { mode, state: Mutex::new(state), version: AtomicU64::new(1) }
    }

    /// The destination takes references, or not.
    pub fn refer(&self, references: bool) {
        self.lock().ladder.refer(references);
    }

    /// What the user asked for.
    pub fn mode(&self) -> CodecMode {
        self.mode
    }

    /// Notes what a thread of the destination did, as it says itself.
    pub fn observe_destination(&self, load: Load) {
        self.lock().destination.add(load);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream of the session begins; returns its number here.
    pub(super) fn join(&self) -> usize {
        let mut state = self.lock();
        let begun = Some((0.0, state.window));
        if let Some(free) = state.pressures.iter().position(Option::is_none) {
            state.pressures[free] = begun;
            return free;
        }
        state.pressures.push(begun);
        state.pressures.len() - 1
    }

    /// A stream has ended.
    pub(super) fn leave(&self, stream: usize) {
        self.lock().pressures[stream] = None;
    }

    /// How much harder than was decided the session compresses now that this stream has so much ahead.
    pub(super) fn pressure(&self, stream: usize, ahead_nanos: u64) -> f64 {
        let mut state = self.lock();
        let own = (ahead_nanos as f64 / AHEAD_NANOS).min(AHEAD_MAX) * (1.0 - CROWDED * state.crowded);
        state.pressures[stream] = Some((own, state.window));
        // They share the link, and take turns at it.
        let oldest = state.window.saturating_sub(SILENT_WINDOWS);
        let all = state.pressures.iter().flatten().filter(|(_, at)| *at >= oldest);
        let (sum, count) = all.fold((0.0, 0.0), |(sum, count), (one, _)| (sum + one, count + 1.0));
        sum / count
    }

    /// What is decided, if that is another than the one with this number.
    pub(super) fn decided(&self, version: &mut u64) -> Option<Decision> {
        let now = self.version.load(Ordering::Acquire);
        if *version == now {
            return None;
        }
        *version = now;
        Some(self.lock().decision.clone())
    }

    /// Notes what a thread of the source did, until `now`.
    pub(super) fn observe_source(&self, now: u64, load: Load, sent: Sent) {
        let mut state = self.lock();
        state.source.add(load);
        state.sent.add(sent);
        let began = *state.began.get_or_insert(now.saturating_sub(load.passed_nanos));
        if now.saturating_sub(began) >= WINDOW_NANOS {
            state.began = Some(now);
            state.decide();
            self.version.fetch_add(1, Ordering::Release);
        }
    }
}

impl State {
    /// Places that streams have.
    #[cfg(test)]
    pub(super) fn streams(&self) -> usize {
        self.pressures.len()
    }

    /// Ends a window, and decides by what it showed.
    fn decide(&mut self) {
        let source = std::mem::take(&mut self.source);
        let destination = std::mem::take(&mut self.destination);
        let Sent { logical, ahead } = std::mem::take(&mut self.sent);
        self.window += 1;
        if destination.passed > 0.0 {
            self.destination_waits = Some(destination.waits());
        }
        self.crowded = source.crowded().max(destination.crowded());
        if logical == 0.0 {
            return;
        }
        let corners = self.ladder.corners();
        let costs = || corners.iter().map(|(_, at)| at.nanos).filter(|nanos| *nanos > 0.0);
        let (least, most) = (costs().fold(f64::MAX, f64::min), costs().fold(0.0, f64::max));
        let ahead = ahead / logical;
        let factor = if self.destination_waits.is_some_and(|waits| waits < WAITS_MIN) {
            FALL
        } else if ahead > 0.95 * AHEAD_MAX {
            RISE
        } else {
            1.0 + (if ahead < 1.0 { GAIN.1 } else { GAIN.0 }) * (ahead - 1.0)
        };
        // Where nothing shrinks, nothing is learnt of how much is worth spending.
        let budget = match self.decision.budget {
            budget if most == 0.0 => budget,
            budget => (budget * factor).min(most).max(least * LEAST),
        };
        self.decision = Decision { budget, corners, nanos: Some(source.passed / logical) };
    }
}
