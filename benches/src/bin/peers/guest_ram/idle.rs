//! A guest that has booted and waits: a few services, and what their start left in memory.

use std::path::Path;
use std::process::{Command, Stdio};

use pageferry::measure::process::program;

use super::cache::{self, Files};
use super::guest;

/// What a boot reads: configuration, and the package database.
const FOLDERS: [&str; 3] = ["/etc", "/var/lib/dpkg/info", "/usr/lib/systemd"];
/// At most so much of each.
const READ_MAX: u64 = 8 << 20;
/// Commands that run once, as scripts of a boot do.
const ONCE: [&str; 4] = ["ls -lR /etc /usr/bin", "ps aux", "dpkg -l", "grep -r daemon /etc"];
/// Programs that stay, each waiting for something to do.
const STAY: [&str; 4] = [
    "exec sleep infinity",
    "while sleep 60; do :; done",
    "exec python3 -c 'import http.server, json, logging, ssl, threading, time; time.sleep(1 << 30)'",
    "exec perl -MPOSIX -e 'sleep 1 while 1'",
];

/// Runs what an idle guest has run.
pub(super) fn fill() -> Result<(), String> {
    let shell = program("sh").ok_or("the guest has no sh")?;
    for line in STAY {
        // What is not installed is one service less.
        guest::start(Command::new(&shell).args(["-c", line]))?;
    }
    for line in ONCE {
        let mut command = Command::new(&shell);
        command.args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().map_err(|e| format!("{line}: {e}"))?;
    }
    for folder in FOLDERS {
        let mut left = READ_MAX;
        cache::read_all(Path::new(folder), Files::All, 0, &mut left)?;
    }
    // The services are up, too, then.
    std::thread::sleep(std::time::Duration::from_secs(10));
    Ok(())
}
