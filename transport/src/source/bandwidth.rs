//! What a session has of its link: what limits its wire bytes, a bucket of its own and its part of the host's; and who shares it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::pace::Pace;
use super::share::{HostShare, Share, Sharing};

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

    /// A stream shares the link until what is returned is dropped.
    pub(crate) fn join(&self) -> Option<Sharing> {
        self.share.as_ref().map(|share| Sharing::new(share.host().clone()))
    }

    /// So many bytes were delivered.
    pub(crate) fn delivered(&self, bytes: u64) {
        if let Some(share) = &self.share {
            share.delivered(bytes);
        }
    }

    /// How many streams share the link, and what was delivered of them all, as the codec choice wants to know: of the host's sessions,
    /// or, where it knows of no others, of this one.
    pub(crate) fn all(&self, session: (u16, u64)) -> (u32, u64) {
        match &self.share {
            Some(share) => (share.host().streams(), share.host().delivered_bytes()),
            None => (session.0.into(), session.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_knows_of_the_hosts_others() {
        let alone = Bandwidth::new(None);
        assert!(alone.join().is_none());
        alone.delivered(7);
        assert_eq!(alone.all((3, 500)), (3, 500));
        let host = Arc::new(HostShare::new());
        let [session, other] = [(); 2].map(|()| Bandwidth::new(Some(host.clone())));
        let streams = [session.join(), other.join(), other.join()];
        session.delivered(100);
        other.delivered(20);
        assert_eq!((session.all((1, 100)), other.all((2, 20))), ((3, 120), (3, 120)));
        drop(streams);
        assert_eq!(session.all((1, 100)), (0, 120));
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
