//! Signals: the first one cancels in order, the second ends the process at once.

use pageferry::engine::progress::Progress;
use tokio::signal::unix::{SignalKind, signal};

use super::Exit;

/// Cancels `progress` on SIGINT or SIGTERM.
pub(super) fn on_signals(progress: &Progress) {
    let progress = progress.clone();
    // Without the thread signals do what they do by default.
    let _ = std::thread::Builder::new().name("signals".into()).spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if progress.is_cancelled() {
                    std::process::exit(Exit::Cancelled as i32);
                }
                eprintln!("pageferry: cancelling; once more to stop at once");
                progress.cancel();
            }
        });
    });
}
