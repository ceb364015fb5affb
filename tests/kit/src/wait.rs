//! Waits for what must happen: as long as a busy machine may need, and no longer than it takes.

use std::time::{Duration, Instant};

/// Longest wait for anything that a test has not set a time for itself: far more than any needs, on a machine that is busy.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// How often another process is asked.
const ASKED_EVERY: Duration = Duration::from_millis(5);
/// How often this process looks at what it has itself.
const SEEN_EVERY: Duration = Duration::from_millis(1);

/// Waits until `holds` has a value, for which it asks another process; fails with `what` where it never has.
#[track_caller]
pub fn wait_for<T>(what: &str, timeout: Duration, holds: impl FnMut() -> Option<T>) -> T {
    poll(what, timeout, ASKED_EVERY, holds)
}

/// Waits until `holds`, by what this process knows; fails with `what` where it never does.
#[track_caller]
pub fn wait_until(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
    poll(what, timeout, SEEN_EVERY, || holds().then_some(()));
}

#[track_caller]
fn poll<T>(what: &str, timeout: Duration, pause: Duration, mut holds: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = holds() {
            return value;
        }
        assert!(start.elapsed() < timeout, "{what}: not within {timeout:?}");
        std::thread::sleep(pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_is_had() {
        let mut asked = 0;
        let value = wait_for("the third", PATIENCE, || {
            asked += 1;
            (asked == 3).then_some("third")
        });
        assert_eq!((value, asked), ("third", 3));
    }

    #[test]
    #[should_panic(expected = "what never comes: not within 0ns")]
    fn what_never_comes_fails_by_its_name() {
        wait_until("what never comes", Duration::ZERO, || false);
    }
}
