//! Signals: the first one cancels in order, the second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};

use super::Exit;

/// Calls `cancel` at the first SIGINT or SIGTERM.
pub(super) fn on_signals(cancel: impl Fn() + Send + 'static) {
    // Without the thread signals do what they do by default.
    let _ = std::thread::Builder::new().name("signals".into()).spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            let mut asked = false;
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if asked {
                    std::process::exit(Exit::Cancelled as i32);
                }
                asked = true;
                eprintln!("pageferry: stopping in order; once more to stop at once");
                cancel();
            }
        });
    });
}
