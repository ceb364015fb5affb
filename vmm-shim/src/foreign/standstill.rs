//! What stands a guest still around a look at its page table.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::backend::BackendError;

/// Stands the guest of another process still: its vCPUs, and its block I/O. The connection to its VMM does so.
///
/// It comes in pairs: [`go_on`](Self::go_on) is called once for each [`stop`](Self::stop) that succeeded, also when what was done in
/// between failed.
pub trait Standstill: Send + Sync {
    /// *When*: before each look at the page table, also while the guest is paused for another reason.
    /// *Must*: return when no vCPU runs, and when no read of a device that was asked for is still to arrive in guest memory.
    /// *Error*: the guest does not stand; it runs on as before, and the look fails.
    fn stop(&self) -> Result<(), BackendError>;

    /// *When*: after the look.
    /// *Must*: make what `stop` found: a guest that ran runs on, one that was paused before stays so.
    /// *Error*: the guest may stand still for good; the look fails.
    fn go_on(&self) -> Result<(), BackendError>;
}

impl<T: Standstill + ?Sized> Standstill for Arc<T> {
    fn stop(&self) -> Result<(), BackendError> {
        (**self).stop()
    }
    fn go_on(&self) -> Result<(), BackendError> {
        (**self).go_on()
    }
}

/// How long a guest stood still for looks: each from the call of [`Standstill::stop`] to the return of [`Standstill::go_on`], so never
/// less than the guest's own downtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standstills {
    /// How many there were.
    pub count: u64,
    /// All of them together.
    pub total: Duration,
    /// The last one.
    pub last: Duration,
    /// The longest one.
    pub longest: Duration,
}

impl Standstills {
    fn note(&mut self, took: Duration) {
        self.count += 1;
        self.total += took;
        self.last = took;
        self.longest = self.longest.max(took);
    }
}

/// A guest that stands still; dropped, it goes on.
struct Standing<'a> {
    standstill: &'a dyn Standstill,
    since: Instant,
    pauses: &'a Mutex<Standstills>,
    ended: bool,
}

impl Standing<'_> {
    fn end(&mut self) -> Result<(), BackendError> {
        self.ended = true;
        let result = self.standstill.go_on();
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner).note(self.since.elapsed());
        result
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // There was a panic, and that is what will be told.
            let _ = self.end();
        }
    }
}

/// Does something while the guest stands still, and lets it go on whatever came of it; counts how long that took.
pub(super) fn while_standing<T>(
    standstill: &dyn Standstill,
    pauses: &Mutex<Standstills>,
    work: impl FnOnce() -> Result<T, BackendError>,
) -> Result<T, BackendError> {
    let since = Instant::now();
    standstill.stop()?;
    let mut standing = Standing { standstill, since, pauses, ended: false };
    let worked = work();
    let gone_on = standing.end();
    let value = worked?;
    gone_on.map(|()| value)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Counts calls, and fails as it is told.
    #[derive(Default)]
    struct Counted {
        calls: Mutex<(u64, u64)>,
        fail: (bool, bool),
    }

    impl Counted {
        fn calls(&self) -> (u64, u64) {
            *self.calls.lock().unwrap()
        }
    }

    impl Standstill for Counted {
        fn stop(&self) -> Result<(), BackendError> {
            self.calls.lock().unwrap().0 += 1;
            if self.fail.0 { Err(BackendError::invalid("no stop")) } else { Ok(()) }
        }
        fn go_on(&self) -> Result<(), BackendError> {
            self.calls.lock().unwrap().1 += 1;
            if self.fail.1 { Err(BackendError::invalid("no going on")) } else { Ok(()) }
        }
    }

    #[test]
    fn each_stop_is_followed_by_going_on() {
        let (guest, pauses) = (Counted::default(), Mutex::default());
        while_standing(&guest, &pauses, || {
            assert_eq!(guest.calls(), (1, 0));
            Ok(())
        })
        .unwrap();
        assert_eq!(guest.calls(), (1, 1));
        let failed = while_standing::<()>(&guest, &pauses, || Err(BackendError::invalid("no look")));
        assert_eq!(failed.unwrap_err().what, "no look");
        assert_eq!(guest.calls(), (2, 2));
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            while_standing::<()>(&guest, &pauses, || panic!("the test's own"))
        }));
        assert!(panicked.is_err());
        assert_eq!((guest.calls(), pauses.lock().unwrap().count), ((3, 3), 3));
    }

    #[test]
    fn a_guest_that_does_not_stop_is_not_let_go_and_one_that_stays_is_told_of() {
        let pauses = Mutex::default();
        let guest = Counted { fail: (true, false), ..Counted::default() };
        let failed = while_standing(&guest, &pauses, || -> Result<(), _> { panic!("it runs") });
        assert_eq!((failed.unwrap_err().what.as_str(), guest.calls()), ("no stop", (1, 0)));
        assert_eq!(*pauses.lock().unwrap(), Standstills::default());
        let guest = Counted { fail: (false, true), ..Counted::default() };
        let failed = while_standing(&guest, &pauses, || Ok(()));
        assert_eq!((failed.unwrap_err().what.as_str(), guest.calls()), ("no going on", (1, 1)));
    }

    #[test]
    fn times_add_up() {
        let mut sum = Standstills::default();
        for ms in [3, 7, 2] {
            sum.note(Duration::from_millis(ms));
        }
        let ms = Duration::from_millis;
        assert_eq!(sum, Standstills { count: 3, total: ms(12), last: ms(2), longest: ms(7) });
    }
}
