//! Ctrl-C and SIGTERM: what runs is ended, and the program with it, so that everything is taken down in order.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Whether somebody wants an end.
pub(crate) fn cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}

/// From here on signals end the transfer that runs, and [`cancelled`] tells. To be called before there are other threads.
///
/// # Errors
/// The system's.
pub(crate) fn catch() -> nix::Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    // Children do not inherit this: the standard library gives them an empty set.
    set.thread_block()?;
    std::thread::spawn(move || {
        while set.wait().is_ok() {
            CANCELLED.store(true, Ordering::Relaxed);
            eprintln!("peers: stopping");
            for child in children() {
                // One that has ended meanwhile is no matter.
                let _ = kill(child, Signal::SIGKILL);
            }
        }
    });
    Ok(())
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
