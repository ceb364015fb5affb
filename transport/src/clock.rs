//! The monotonic clock of the data plane. Under test a thread may bring its own, so that what it does can be repeated exactly.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Nanoseconds since the first reading.
pub(crate) fn nanos() -> u64 {
    #[cfg(test)]
    if let Some(nanos) = virtual_time::nanos() {
        return nanos;
    }
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Time since the first reading.
pub(crate) fn now() -> Duration {
    Duration::from_nanos(nanos())
}

#[cfg(test)]
pub(crate) mod virtual_time {
    use std::cell::Cell;

    /// What reading the clock takes, so that whatever is measured takes some time.
    const READING_NANOS: u64 = 100;

    thread_local!(static NANOS: Cell<Option<u64>> = const { Cell::new(None) });

    /// Sets this thread's clock; `None`: it has that of everybody.
    pub(crate) fn set(nanos: Option<u64>) {
        NANOS.set(nanos);
    }

    pub(super) fn nanos() -> Option<u64> {
        let nanos = NANOS.get()?;
        NANOS.set(Some(nanos + READING_NANOS));
        Some(nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_have_its_own_time() {
        virtual_time::set(Some(5_000));
        assert_eq!(now(), Duration::from_micros(5));
        assert!((5_001..6_000).contains(&nanos()), "reading it takes a little");
        virtual_time::set(None);
        let first = nanos();
        assert!(nanos() >= first);
    }
}
