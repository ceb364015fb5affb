//! The runtime on which control links live: one that was handed in, or one for the process.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use tokio::runtime::{Builder, Handle, Runtime};

/// The process's own. Nothing drops it: it lives as long as the process, so that no migration has to be where a runtime may be dropped.
static OWN: Mutex<Option<Runtime>> = Mutex::new(None);

/// The one that was handed in, or else the process's own, which is made when it is first asked for and kept.
///
/// # Errors
/// Where the system lacks what a runtime needs: the next call tries again. Where the one that was handed in does not run a task within
/// `patience`.
///
/// # Panics
/// Where the system has no thread for it; the same holds.
pub(super) fn handle(given: Option<&Handle>, patience: Duration) -> io::Result<Handle> {
    if let Some(handle) = given {
        check(handle, patience)?;
        return Ok(handle.clone());
    }
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = &*own {
        return Ok(runtime.handle().clone());
    }
    // Links say little: one thread serves those of many migrations.
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("links").enable_all().build()?;
    Ok(own.insert(runtime).handle().clone())
}

/// A link on a runtime that does not run would be waited for without end.
fn check(handle: &Handle, patience: Duration) -> io::Result<()> {
    let (tell, told) = bounded(1);
    handle.spawn(async move { tell.send(()) });
    told.recv_timeout(patience).map_err(|error| {
        io::Error::other(match error {
            RecvTimeoutError::Disconnected => "the runtime that was handed in was shut down",
            RecvTimeoutError::Timeout => {
                "the runtime that was handed in runs no tasks: a migration must not block a thread of it (spawn_blocking)"
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use std::thread::current;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn own() -> Handle {
        handle(None, PATIENCE).unwrap()
    }

    /// The thread that a task runs on.
    fn thread_of(handle: &Handle) -> std::thread::ThreadId {
        let (tell, told) = bounded(1);
        handle.spawn(async move { tell.send(current().id()) });
        told.recv().unwrap()
    }

    #[test]
    fn there_is_one_for_the_process() {
        let first = thread_of(&own());
        // Whoever asks, and even within another.
        let other = Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let asked = std::thread::spawn(|| thread_of(&own())).join().unwrap();
        let within = other.block_on(async { own() });
        assert_eq!([asked, thread_of(&within)], [first, first]);
        let given = handle(Some(other.handle()), PATIENCE).unwrap();
        assert_eq!(thread_of(&given), thread_of(other.handle()));
        assert_ne!(thread_of(&given), first);
    }

    #[test]
    fn one_that_does_not_run_is_refused() {
        let other = Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let given = other.handle().clone();
        let refused = |patience| handle(Some(&given), patience).unwrap_err().to_string();
        let (hold, held) = bounded::<()>(0);
        let (begin, begun) = bounded(0);
        other.spawn(async move {
            begin.send(()).unwrap();
            let _ = held.recv();
        });
        begun.recv().unwrap();
        assert!(refused(Duration::from_millis(1)).contains("spawn_blocking"));
        drop(hold);
        drop(other);
        assert!(refused(PATIENCE).contains("shut down"));
    }
}
