//! What may be changed while a migration runs.

use pagecopy::policy::Limits;
use pagecopy::throttle::PERCENT_MAX;

/// The limits of a migration that may change while it runs. The defaults serve: `let mut tuning = Tuning::default()`, and then the fields
/// that are to differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tuning {
    /// When it switches over, and when it gives up.
    pub limits: Limits,
    /// Most wire bytes a second of all streams together, until the guest is paused; and in postcopy of all that follows it, where what it
    /// waits for is sent at once all the same, and counts. `None`: no limit.
    pub bandwidth: Option<u64>,
    /// Take time from the vCPUs of a guest that writes faster than it is copied.
    pub auto_converge: bool,
    /// The most that is taken, in percent; at most [`PERCENT_MAX`].
    pub throttle_max: u8,
    /// Pause the guest, and wait for [`continue_`](super::progress::Progress::continue_) before its state is saved.
    pub pause_before_switchover: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            bandwidth: None,
            auto_converge: false,
            throttle_max: PERCENT_MAX,
            pause_before_switchover: false,
        }
    }
}
