//! Why a guest does not do what it was asked.

use crate::cli::api::RunState;

/// The reason, by where the guest is; `forcible` where the request has a `--force`.
pub(super) fn not_here(state: RunState, forcible: bool) -> String {
    match state {
        RunState::Incoming => "no guest has come in yet",
        RunState::Migrated if forcible => {
            "the guest was migrated away and runs at the destination; --force overrides, and then it may run twice"
        }
        RunState::Migrated => "the guest was migrated away and runs at the destination",
        RunState::Unknown if forcible => {
            "the last handover was not confirmed: make sure that the destination does not run the guest, then use --force"
        }
        RunState::Unknown => {
            "the last handover was not confirmed: make sure that the destination does not run the guest, then `resume --force`"
        }
        _ => "the guest does not run",
    }
    .into()
}
