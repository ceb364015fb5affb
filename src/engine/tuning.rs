//! What may be changed while a migration runs.

use pagecopy::policy::Limits;

/// The limits of a migration that may change while it runs. The defaults serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    /// When it switches over, and when it gives up.
    pub limits: Limits,
    /// Most wire bytes a second of all streams together, until the guest is paused. `None`: no limit.
    pub bandwidth: Option<u64>,
    /// Pause the guest, and wait for [`go_on`](super::progress::Progress::go_on) before its state is saved.
    pub pause_before_switchover: bool,
}
