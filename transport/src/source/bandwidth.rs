//! What limits a session's wire bytes: a bucket of its own and its part of the host's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::pace::Pace;
use super::share::{HostShare, Share};

/// What waiting for a limit counts as at most, as if so much were on its way.
const HELD_BACK: Duration = Duration::from_millis(20);
/// It counts as that where at least one part in so many of the time is waited.
const HELD_BACK_PART: f64 = 4.0;

/// What chooses the codec wants to know how long what was sent waits to arrive. A limit is a slow link, before which nothing queues up: its
/// thread waits instead, for this part of the time that has passed since the last frame.
pub(crate) fn held_back(waited: Duration, passed: Duration) -> Duration {
    let share = waited.as_secs_f64() / passed.max(waited).as_secs_f64().max(1e-9);
    HELD_BACK.mul_f64((share * HELD_BACK_PART).min(1.0))
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Bandwidth {
    own: Pace,
    share: Option<Share>,
    /// Nothing waits for the host's bucket.
    hurries: AtomicBool,
    /// Held by the one stream that waits; the others wait for it, so that one frame's worth wakes one thread, and a session of many
    /// streams waits once among the host's.
    turn: Mutex<()>,
}

impl Bandwidth {
    /// Without a limit of its own.
    pub(crate) fn new(host: Option<Arc<HostShare>>) -> Self {
        let (share, hurries) = (host.map(Share::new), AtomicBool::new(false));
        Self { own: Pace::new(), share, hurries, turn: Mutex::default() }
    }

    /// So many bytes a second of its own from now on, also for those who wait; `None` lifts that limit.
    pub(crate) fn set_rate(&self, rate: Option<u64>) {
        self.hurries.store(false, Ordering::Relaxed);
        self.own.set_rate(rate);
    }

    /// Nothing waits any more, until a rate is set. What is sent still counts in the host's bucket: the others wait the longer for it.
    pub(crate) fn hurry(&self) {
        self.hurries.store(true, Ordering::Relaxed);
        self.own.set_rate(None);
        if let Some(share) = &self.share {
            share.wake();
        }
    }

    /// What is to be waited for of the host.
    fn awaited(&self) -> Option<&Share> {
        self.share.as_ref().filter(|_| !self.hurries.load(Ordering::Relaxed))
    }

    /// Whether a frame may go now.
    pub(crate) fn is_open(&self) -> bool {
        self.own.is_open() && self.awaited().is_none_or(Share::is_open)
    }

    /// Waits until a frame may go, or `stopped` says yes.
    pub(crate) fn wait(&self, stopped: impl Fn() -> bool) {
        let _turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        self.own.wait(&stopped);
        if let Some(share) = self.awaited() {
            share.wait(|| stopped() || self.hurries.load(Ordering::Relaxed));
        }
    }

    /// Takes out what a frame came to.
    pub(crate) fn spend(&self, bytes: u64) {
        self.own.spend(bytes);
        if let Some(share) = &self.share {
            share.spend(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_held_back_has_much_ahead() {
        let ms = Duration::from_millis;
        assert_eq!(held_back(Duration::ZERO, ms(5)), Duration::ZERO);
        assert_eq!(held_back(ms(1), ms(8)), ms(10));
        assert_eq!((held_back(ms(2), ms(8)), held_back(ms(9), ms(8))), (HELD_BACK, HELD_BACK));
        assert_eq!(held_back(Duration::ZERO, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_session_waits_for_its_own_limit_and_for_the_hosts() {
        let host = Arc::new(HostShare::new());
        let session = Bandwidth::new(Some(host.clone()));
        assert!(session.is_open());
        for (own, shared) in [(Some(1), None), (None, Some(1))] {
            session.set_rate(own);
            host.limit_bandwidth(shared);
            session.spend(1 << 20);
            assert!(!session.is_open(), "{own:?} {shared:?}");
            session.set_rate(None);
            host.limit_bandwidth(None);
            assert!(session.is_open());
        }
    }

    #[test]
    fn who_hurries_waits_for_nothing_and_others_for_what_it_sends() {
        let host = Arc::new(HostShare::new());
        host.limit_bandwidth(Some(1));
        let [session, other] = [(); 2].map(|()| Bandwidth::new(Some(host.clone())));
        session.set_rate(Some(1));
        assert!(other.is_open());
        session.spend(1 << 20);
        assert!(!session.is_open() && !other.is_open());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| session.wait(|| false));
            session.hurry();
            waiting.join().unwrap();
        });
        assert!(session.is_open() && !other.is_open());
        // It has failed to hand over, and is limited again.
        session.set_rate(None);
        assert!(!session.is_open());
    }
}
