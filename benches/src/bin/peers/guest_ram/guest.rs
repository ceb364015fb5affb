//! What everything that fills the guest needs: processes that stay, and the kernel's figures.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;

/// Where processes say that they have what they hold.
pub(super) const READY: &str = "/run/pageferry-fill";
/// How long that may take: everything is emulated.
const PATIENCE: Duration = Duration::from_secs(600);

/// Starts a process that stays when this program has ended.
pub(super) fn start(command: &mut Command) -> Result<(), String> {
    // It must not hold this program's pipes.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let name = command.get_program().display().to_string();
    command.spawn().map(drop).map_err(|e| format!("{name} cannot be started: {e}"))
}

/// Starts this program again, to hold `bytes` of what `option` and `what` name.
pub(super) fn start_own<T: ValueEnum>(option: &str, what: &T, bytes: u64) -> Result<(), String> {
    let own = std::env::current_exe().map_err(|e| format!("this program's own place: {e}"))?;
    start(Command::new(own).args(["fill-guest", option, &name(what), "--bytes", &bytes.to_string()]))
}

/// The name of one of an option's values.
pub(super) fn name<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Says that a process has what it holds.
pub(super) fn say_ready(name: &str) -> Result<(), String> {
    let path = Path::new(READY).join(name);
    File::create(&path).map(drop).map_err(|e| format!("{}: {e}", path.display()))
}

/// Where a process that fails leaves what it said.
pub(super) fn failure_file() -> String {
    format!("{READY}.failed")
}

/// Fails if a process has failed.
pub(super) fn check_failures() -> Result<(), String> {
    fs::read_to_string(failure_file())
        .map_or(Ok(()), |said| Err(format!("a process of the guest's failed: {}", said.trim())))
}

/// Waits until so many processes have said so, or one has failed.
pub(super) fn wait_until_ready(started: usize) -> Result<(), String> {
    let ready = || fs::read_dir(READY).map_err(|e| format!("{READY}: {e}")).map(Iterator::count);
    wait_until("its processes", || {
        check_failures()?;
        Ok(ready()? >= started)
    })
}

/// Waits for something that takes its time where everything is emulated.
pub(super) fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    while !done()? {
        if Instant::now() > deadline {
            return Err(format!("the guest: {what}: too slow, not done after {} s", PATIENCE.as_secs()));
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    Ok(())
}

/// Keeps the process, and what it holds.
pub(super) fn stay() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// A figure of the kernel's, in bytes.
pub(super) fn meminfo(name: &str) -> Result<u64, String> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|e| format!("/proc/meminfo: {e}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| format!("/proc/meminfo has no {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figures_are_read() {
        assert!(meminfo("MemTotal:").unwrap() >= meminfo("MemFree:").unwrap());
        assert!(meminfo("Nothing:").is_err());
    }

    #[test]
    fn what_cannot_be_started_is_named() {
        let error = start(&mut Command::new("/nothing/here")).unwrap_err();
        assert!(error.starts_with("/nothing/here cannot be started"), "{error}");
    }

    #[test]
    fn waiting_ends_when_it_is_done_or_fails() {
        let mut asked = 0;
        let third = || {
            asked += 1;
            Ok(asked == 3)
        };
        assert_eq!(wait_until("counting", third), Ok(()));
        assert_eq!(asked, 3);
        assert_eq!(wait_until("failing", || Err("no".into())), Err("no".into()));
    }
}
