//! Ctrl-C and SIGTERM: what runs is ended, and the program with it, so that everything is taken down in order.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry::print;
use tokio::signal::unix::{SignalKind, signal};

static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Whether somebody wants an end.
pub(crate) fn cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}

/// From here on signals end the transfer that runs, and [`cancelled`] tells.
///
/// They are handled, not blocked: a child inherits what is blocked, and could then not be told to end.
///
/// # Errors
/// The system's.
pub(crate) fn catch() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut streams = Vec::new();
    {
        let _within = runtime.enter();
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            streams.push(signal(kind)?);
        }
    }
    for mut stream in streams {
        let runtime = runtime.handle().clone();
        runtime.spawn(async move {
            while stream.recv().await.is_some() {
                end();
            }
        });
    }
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    Ok(())
}

fn end() {
    CANCELLED.store(true, Ordering::Relaxed);
    print::note("peers: stopping");
    for child in children() {
        // One that has ended meanwhile is no matter. The lab ends its guest; the others leave nothing behind.
        let _ = kill(child, Signal::SIGTERM);
    }
}

/// Child processes that move something. The shells that clean up after us are in process groups of their own, and stay.
fn children() -> Vec<Pid> {
    let mut found = Vec::new();
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|id| id.parse().ok()).map(Pid::from_raw));
    }
    let own = nix::unistd::getpgrp();
    found.retain(|child| nix::unistd::getpgid(Some(*child)) == Ok(own));
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn helpers_with_a_group_of_their_own_are_spared() {
        let sleep = || {
            let mut command = Command::new("sleep");
            command.arg("100");
            command
        };
        let mut worker = sleep().spawn().unwrap();
        let mut helper = sleep().process_group(0).spawn().unwrap();
        let found = children();
        for (child, expected) in [(&mut worker, true), (&mut helper, false)] {
            assert_eq!(found.contains(&Pid::from_raw(child.id() as i32)), expected);
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
