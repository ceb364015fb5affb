//! How fast the link of a stream drains, from what sending took; and how fast its worker could fill it.

use super::WEIGHT;

/// The link is judged after this many wire bytes ...
const WINDOW_BYTES: f64 = (2 << 20) as f64;
/// ... but not before this much time, in nanoseconds, ...
const WINDOW_NANOS_MIN: f64 = 10e6;
/// ... or, however few they were, after this much.
const WINDOW_NANOS: f64 = 100e6;
/// The link limits when at least this share of a window was spent waiting for it ...
const LINK_BOUND_SHARE: f64 = 0.1;
/// ... or this share where few bytes went: headers of zero pages, each with its system call, say nothing about a link.
const LINK_BOUND_SHARE_FEW: f64 = 0.8;
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
    /// Nanoseconds for which the worker is busy with a logical byte, however it is encoded: to find, hash, copy and write it.
    base: Option<f64>,
    /// Of the current window: bytes sent and what that took, nanoseconds of encoding, bytes looked at and what that part of it took.
    wire: f64,
    sent: f64,
    encoded: f64,
    logical: f64,
    scanned: f64,
    /// What all workers had sent when it began.
    all_before: u64,
    /// For how long the worker had been busy when it began.
    busy_before: Option<u64>,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            nanos: None,
            seen: f64::MAX,
            rise: RISE.0,
            unseen: 0,
            base: None,
            wire: 0.0,
            sent: 0.0,
            encoded: 0.0,
            logical: 0.0,
            scanned: 0.0,
            all_before: 0,
            busy_before: None,
        }
    }

    /// Nanoseconds that a wire byte takes, once known.
    pub(super) fn nanos(&self) -> Option<f64> {
        self.nanos
    }

    /// Nanoseconds for which the worker is busy with a logical byte, however it is encoded, as far as known.
    pub(super) fn base_nanos(&self) -> f64 {
        self.base.unwrap_or(0.0)
    }

    /// Sending so many bytes took so long, waits included.
    pub(super) fn sent(&mut self, wire_bytes: u64, nanos: u64) {
        self.wire += wire_bytes as f64;
        self.sent += nanos as f64;
    }

    /// So much of the time that went into encoding was for looking at so many bytes.
    pub(super) fn scanned(&mut self, bytes: u64, nanos: u64) {
        self.logical += bytes as f64;
        self.scanned += nanos as f64;
    }

    /// So much time went into encoding.
    pub(super) fn encoded(&mut self, nanos: u64) {
        self.encoded += nanos as f64;
    }

    fn begin_window(&mut self, all: u64, busy: Option<u64>) {
        (self.wire, self.sent, self.encoded, self.logical, self.scanned) = (0.0, 0.0, 0.0, 0.0, 0.0);
        (self.all_before, self.busy_before) = (all, busy);
    }

    /// Ends the window if it is long enough to tell something; returns whether it did. `all`: bytes that all `workers` have sent so far.
    /// `busy`: for how long this one was busy, if that is known.
    pub(super) fn close_window(&mut self, all: u64, workers: f64, busy: impl Fn() -> Option<u64>) -> bool {
        // The first window begins with the first frame.
        self.busy_before = self.busy_before.or_else(&busy);
        let elapsed = self.encoded + self.sent;
        let short = elapsed < WINDOW_NANOS && (self.wire < WINDOW_BYTES || elapsed < WINDOW_NANOS_MIN);
        if short || self.wire == 0.0 {
            return false;
        }
        // A write copies as well as waits, and copying does not tell anything about the link: nor does waiting for a core.
        let busy = busy();
        let worked = match (self.busy_before, busy) {
            (Some(before), Some(now)) => (now.saturating_sub(before) as f64).min(elapsed),
            _ => self.encoded,
        };
        // Streams take turns at a link that they share, for longer than a window: this one's part is what is fair, unless the others
        // have nothing to send.
        let fair = all.saturating_sub(self.all_before) as f64 / workers;
        let part = if self.wire > ALONE * fair { self.wire } else { fair };
        let sample = (elapsed / part).max(1e-3);
        let few = self.wire < WINDOW_BYTES;
        let share = if few { LINK_BOUND_SHARE_FEW } else { LINK_BOUND_SHARE };
        let limits = elapsed - worked >= share * elapsed;
        if self.logical != 0.0 {
            let new = (worked - self.encoded + self.scanned).max(0.0) / self.logical;
            self.base = Some(self.base.map_or(new, |old| old + (new - old) * WEIGHT));
        }
        self.begin_window(all, busy);
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
