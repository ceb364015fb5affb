//! Signals: the first one cancels in order, the second ends the process at once.

use std::time::Duration;

use pageferry::cli::print;
use tokio::signal::unix::{SignalKind, signal};

use super::Exit;

/// How long a process that ends at once waits for what it said to be written.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What becomes of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The process ends in order; another one ends it at once.
    Ending,
    /// It goes on, and has said why.
    Refused,
}

/// Calls `cancel` at the first SIGINT or SIGTERM.
pub(super) fn on_signals(cancel: impl Fn() + Send + 'static) {
    on_signals_unless_refused(move || {
        stopping();
        cancel();
        Heard::Ending
    });
}

/// Says what happens.
pub(super) fn stopping() {
    tracing::info!("stopping in order; once more to stop at once");
}

/// Calls `cancel` at the first SIGINT or SIGTERM, and at each further one as long as it refuses. Signals are taken from when this returns:
/// whoever sees that the process listens, say, may send one.
pub(super) fn on_signals_unless_refused(cancel: impl Fn() -> Heard + Send + 'static) {
    let (taken, takes) = std::sync::mpsc::channel::<()>();
    // Without the thread signals do what they do by default.
    let _ = std::thread::Builder::new().name("signals".into()).spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            drop(taken);
            let mut asked = false;
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if asked {
                    print::flush(LAST_WORDS);
                    std::process::exit(Exit::Cancelled as i32);
                }
                asked = cancel() == Heard::Ending;
            }
        });
    });
    // Nothing is ever sent: the wait ends by the sender's drop, also where there is no thread.
    let _ = takes.recv();
}
