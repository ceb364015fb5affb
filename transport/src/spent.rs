//! Where the time of the threads that move pages goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock;

/// Nanoseconds that one side's threads have spent, all of them together, by what they did; waits are counted as well as work. All
/// counters only rise.
#[derive(Debug, Default)]
pub struct Spent {
    /// Source: finding holes, dirty pages and pages of zeros, and hashing pages that are sent from where they lie.
    pub scan: AtomicU64,
    /// Source: copying pages out of guest memory, where they are not sent from where they lie.
    pub copy: AtomicU64,
    /// Source: hashing, deltas and compression of what was copied.
    pub encode: AtomicU64,
    /// Source: the kernel's copy into sockets (RDMA: posting and registering), and waits for room there or in the window.
    pub send: AtomicU64,
    /// Destination: the kernel's copy out of sockets, and waits for something to come.
    pub receive: AtomicU64,
    /// Destination: bringing fresh memory in, where that is done by a call; where it is not, receiving or applying brings it in.
    pub fault_in: AtomicU64,
    /// Destination: decoding, and writing to guest memory what was decoded.
    pub apply: AtomicU64,
    /// Destination: hashing what memory holds.
    pub hash: AtomicU64,
}

impl Spent {
    /// Adds time to a counter.
    pub fn add(counter: &AtomicU64, time: Duration) {
        counter.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Divides a thread's time among counters.
pub(crate) struct Lap(u64);

impl Lap {
    pub(crate) fn start() -> Self {
        Self(clock::nanos())
    }

    /// The time since the start, or since this was called last, went there.
    pub(crate) fn to(&mut self, counter: &AtomicU64) {
        let now = clock::nanos();
        counter.fetch_add(now.saturating_sub(self.0), Ordering::Relaxed);
        self.0 = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::virtual_time;

    #[test]
    fn every_nanosecond_goes_somewhere_once() {
        let spent = Spent::default();
        virtual_time::set(Some(1_000));
        let mut lap = Lap::start();
        virtual_time::set(Some(4_000));
        lap.to(&spent.copy);
        virtual_time::set(Some(9_000));
        lap.to(&spent.send);
        lap.to(&spent.copy);
        virtual_time::set(None);
        Spent::add(&spent.scan, Duration::from_micros(2));
        let [copy, send, scan] = [&spent.copy, &spent.send, &spent.scan].map(|c| c.load(Ordering::Relaxed));
        assert!((3_000..3_500).contains(&copy), "{copy}");
        assert!((4_500..5_500).contains(&send), "{send}");
        assert_eq!(scan, 2_000);
    }
}
