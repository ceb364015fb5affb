//! How fast the link of a stream drains, from what arrives; and how fast its worker could fill it.

use super::{Busy, Delivered, Took, WEIGHT};

/// The link is judged after this many wire bytes ...
const WINDOW_BYTES: f64 = (2 << 20) as f64;
/// ... but not before this much time, in nanoseconds, ...
const WINDOW_NANOS_MIN: f64 = 10e6;
/// ... or, however few they were, after this much.
const WINDOW_NANOS: f64 = 100e6;
/// For the first time a link that is waited for is judged after this many bytes, and this much time: what goes before is not compressed.
const FIRST_BYTES: f64 = (512 << 10) as f64;
const FIRST_NANOS_MIN: f64 = 20e6;
/// The link limits when at least this share of a window was spent waiting for it ...
const LINK_BOUND_SHARE: f64 = 0.1;
/// ... or this share where few bytes went: headers of zero pages, each with its system call, say nothing about a link.
const LINK_BOUND_SHARE_FEW: f64 = 0.8;
/// Weight of a window in the average of how crowded cores are.
const WEIGHT_CROWDING: f64 = 0.25;
/// A stream that gets more than this many times its fair part of the link has it because others do not want theirs.
const ALONE: f64 = 2.0;
/// How much faster the link is taken to be after each window that did not show its rate: at first, and at least.
const RISE: (f64, f64) = (0.02, 0.001);
/// The same for a link that was never seen to limit.
const RISE_UNSEEN: f64 = 0.2;
/// The rise is twice what it was after so many windows in a row that did not show the rate, three times after twice as many, and so on.
const UNSEEN_WINDOWS: f64 = 16.0;

/// What is known about the link.
#[derive(Clone, Debug)]
pub(super) struct Link {
    /// Nanoseconds that a wire byte takes, once known.
    nanos: Option<f64>,
    /// The same, when it was last seen and not only assumed.
    seen: f64,
    /// How much the rate rises after a window that did not show it.
    rise: f64,
    /// How many windows in a row did not show it.
    unseen: u32,
    /// Nanoseconds that the worker runs for a logical byte, however it is encoded: to find, hash, copy and write it.
    base: Option<f64>,
    /// How many times as long its work takes because there is not always a core for it, once known.
    crowding: Option<f64>,
    /// Of the current window: bytes sent, time, what of that encoding took, bytes looked at and for how long it ran for that part.
    wire: f64,
    elapsed: f64,
    encoded: Took,
    logical: f64,
    scanned: f64,
    /// What had arrived when it began.
    delivered_before: Option<Delivered>,
    /// How long the worker had been busy when it began.
    busy_before: Option<Busy>,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            nanos: None,
            seen: f64::MAX,
            rise: RISE.0,
            unseen: 0,
            base: None,
            crowding: None,
            wire: 0.0,
            elapsed: 0.0,
            encoded: Took::default(),
            logical: 0.0,
            scanned: 0.0,
            delivered_before: None,
            busy_before: None,
        }
    }

    /// Nanoseconds that a wire byte takes, once known.
    pub(super) fn nanos(&self) -> Option<f64> {
        self.nanos
    }

    /// Nanoseconds that the worker runs for a logical byte, however it is encoded, as far as known.
    pub(super) fn base_nanos(&self) -> f64 {
        self.base.unwrap_or(0.0)
    }

    /// How many times as long the worker's work takes because there is not always a core for it.
    pub(super) fn crowding(&self) -> f64 {
        self.crowding.unwrap_or(1.0)
    }

    /// So many bytes were sent, and so much time has passed.
    pub(super) fn sent(&mut self, wire_bytes: u64, nanos: u64) {
        self.wire += wire_bytes as f64;
        self.elapsed += nanos as f64;
    }

    /// So much of the work that went into encoding was for looking at so many bytes.
    pub(super) fn scanned(&mut self, bytes: u64, worked_nanos: u64) {
        self.logical += bytes as f64;
        self.scanned += worked_nanos as f64;
    }

    /// So much time went into encoding.
    pub(super) fn encoded(&mut self, took: Took) {
        self.encoded = self.encoded.and(took);
    }

    fn begin_window(&mut self, delivered: Delivered, busy: Option<Busy>) {
        (self.wire, self.elapsed, self.logical, self.scanned) = (0.0, 0.0, 0.0, 0.0);
        self.encoded = Took::default();
        (self.delivered_before, self.busy_before) = (Some(delivered), busy);
    }

    /// Ends the window if it is long enough to tell something; returns whether it did. `delivered`: what has arrived so far, of all
    /// `workers`. `busy`: how long this one was busy so far, if that is known.
    pub(super) fn close_window(
        &mut self,
        delivered: Delivered,
        workers: f64,
        busy: impl Fn() -> Option<Busy>,
    ) -> bool {
        // The first window begins with the first frame.
        self.busy_before = self.busy_before.or_else(&busy);
        // Others may have sent for long by then.
        let before = *self.delivered_before.get_or_insert(delivered);
        let elapsed = self.elapsed;
        let (few, long) = (self.wire < WINDOW_BYTES, elapsed >= WINDOW_NANOS);
        let first = self.nanos.is_none() && self.wire >= FIRST_BYTES && elapsed >= FIRST_NANOS_MIN;
        let short = !long && !first && (few || elapsed < WINDOW_NANOS_MIN);
        if short || self.wire == 0.0 {
            return false;
        }
        // A write copies as well as waits, and copying does not tell anything about the link; nor does waiting for a core.
        let busy = busy();
        let encoded = self.encoded;
        let (worked, ready) = match (self.busy_before, busy) {
            (Some(before), Some(now)) => (
                now.worked_nanos.saturating_sub(before.worked_nanos) as f64,
                now.ready_nanos.saturating_sub(before.ready_nanos) as f64,
            ),
            _ => (encoded.worked_nanos as f64, encoded.nanos.saturating_sub(encoded.worked_nanos) as f64),
        };
        let waited = elapsed - worked - ready;
        // Streams take turns at a link that they share, for longer than a window: this one's part is what is fair, unless the others
        // have nothing to send.
        let own = delivered.own.saturating_sub(before.own) as f64;
        let fair = delivered.all.saturating_sub(before.all) as f64 / workers;
        let part = if own > ALONE * fair { own } else { fair };
        if part == 0.0 {
            // All is still on its way: this is a long one.
            return false;
        }
        let sample = (elapsed / part).max(1e-3);
        let share = if few { LINK_BOUND_SHARE_FEW } else { LINK_BOUND_SHARE };
        let limits = waited >= share * elapsed;
        if few && !long && !limits {
            return false;
        }
        if worked > 0.0 {
            let new = (worked + ready) / worked;
            self.crowding = Some(self.crowding.map_or(new, |old| old + (new - old) * WEIGHT_CROWDING));
        }
        if self.logical != 0.0 {
            let new = (worked - encoded.worked_nanos as f64 + self.scanned).max(0.0) / self.logical;
            self.base = Some(self.base.map_or(new, |old| old + (new - old) * WEIGHT));
        }
        self.begin_window(delivered, busy);
        if few && !limits {
            return false;
        }
        if limits {
            self.unseen = 0;
            if let Some(assumed) = self.nanos
                && assumed < 0.95 * self.seen
            {
                // The rise was put to the test: was it right?
                self.rise = if sample > 0.7 * self.seen { (self.rise / 2.0).max(RISE.1) } else { RISE.0 };
            }
            // Averaged as time per byte: a buffer that swallows a burst counts little, a slow link much.
            let nanos = self.nanos.map_or(sample, |old| (old + sample) / 2.0);
            self.nanos = Some(nanos);
            self.seen = nanos;
        } else {
            // A link that never limited yet is likely a fast one: look for its limit in large steps.
            let rise = if self.seen == f64::MAX { RISE_UNSEEN } else { self.rise };
            // The longer it does not limit, the likelier it has become one.
            let rise = (rise * (1.0 + f64::from(self.unseen) / UNSEEN_WINDOWS)).min(RISE_UNSEEN);
            self.unseen = self.unseen.saturating_add(1);
            self.nanos = Some(self.nanos.map_or(sample, |old| (old * (1.0 - rise)).min(sample)));
        }
        true
    }
}
