//! The monotonic clock of the data plane. Under test a thread may bring its own, so that what it does can be repeated exactly.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use pagecopy::choose::Busy;
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since the first reading.
pub(crate) fn nanos() -> u64 {
    #[cfg(test)]
    if let Some(nanos) = virtual_time::nanos() {
        return nanos;
    }
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// How long this thread has run or waited for a core, in all; `None` where the system does not tell.
pub(crate) fn busy() -> Option<Busy> {
    #[cfg(test)]
    if virtual_time::is_set() {
        return None;
    }
    thread_local!(static STAT: Option<File> = File::open("/proc/thread-self/schedstat").ok());
    STAT.with(|stat| {
        let mut text = [0; 64];
        let length = stat.as_ref()?.read_at(&mut text, 0).ok()?;
        // Time on a core, time in which it was ready and none was free, turns. Source: proc_pid_schedstat(5), the kernel's
        // Documentation/scheduler/sched-stats.rst.
        let ready = std::str::from_utf8(&text[..length]).ok()?.split_whitespace().nth(1)?.parse().ok()?;
        // The first of the three is not kept up to date while the thread runs; this is.
        Some(Busy { worked_nanos: thread_nanos(), ready_nanos: ready })
    })
}

/// Nanoseconds that this thread has run.
pub(crate) fn worked_nanos() -> u64 {
    #[cfg(test)]
    if let Some(nanos) = virtual_time::nanos() {
        return nanos;
    }
    thread_nanos()
}

fn thread_nanos() -> u64 {
    let worked = clock_gettime(ClockId::ThreadCPUTime);
    // Neither is negative.
    (worked.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(worked.tv_nsec as u64)
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

    /// Moves this thread's clock on, unless it is there already: reading it has moved it, too.
    pub(crate) fn advance(nanos: u64) {
        NANOS.set(NANOS.get().max(Some(nanos)));
    }

    pub(super) fn is_set() -> bool {
        NANOS.get().is_some()
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

    /// However busy the host: a thread works, waits for a core, or sleeps, and what it does all the time adds up to the time.
    #[test]
    fn a_thread_that_sleeps_is_not_busy() {
        const WHILE: Duration = Duration::from_millis(50);
        // The account is kept in other steps than the clock.
        const SLACK: Duration = Duration::from_millis(5);
        let begin = Instant::now();
        let busy = || busy().map(|busy| Duration::from_nanos(busy.worked_nanos + busy.ready_nanos));
        let Some(start) = busy() else {
            println!("skipped: this kernel keeps no account of its scheduler");
            return;
        };
        std::thread::sleep(WHILE);
        let asleep = busy().unwrap() - start;
        assert!(asleep + WHILE <= begin.elapsed() + SLACK, "busy for {asleep:?} of {:?}", begin.elapsed());
        let (begin, start, worked) = (Instant::now(), busy().unwrap(), thread_nanos());
        while u128::from(thread_nanos() - worked) < WHILE.as_nanos() {}
        let awake = busy().unwrap() - start;
        let all = begin.elapsed();
        assert!(awake + SLACK >= WHILE && awake <= all + SLACK, "busy for {awake:?} of {all:?}");
    }

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
