//! A child process that does not outlive its owner.

use std::io;
use std::process::{Child, ChildStderr, Command, Output};
use std::time::{Duration, Instant};

/// How often it is looked whether a child has ended.
const TICK: Duration = Duration::from_millis(10);

/// A running process; killed when dropped.
#[derive(Debug)]
pub(super) struct Running(Option<Child>);

impl Running {
    /// Starts it.
    pub(super) fn start(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(|child| Self(Some(child)))
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&mut self) -> bool {
        self.0.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// Its standard error, if that is a pipe that nobody took before.
    pub(super) fn stderr(&mut self) -> Option<ChildStderr> {
        self.0.as_mut()?.stderr.take()
    }

    /// Waits for its end; returns what it wrote into pipes, which must fit into them.
    pub(super) fn wait(mut self, patience: Duration) -> Result<Output, String> {
        let deadline = Instant::now() + patience;
        while !self.has_ended() {
            if Instant::now() > deadline {
                return Err(format!("it had not ended after {} s", patience.as_secs()));
            }
            std::thread::sleep(TICK);
        }
        let output = self.0.take().map(Child::wait_with_output);
        output.and_then(Result::ok).ok_or_else(|| "it cannot be waited for".into())
    }

    /// Ends it.
    pub(super) fn kill(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    fn shell(line: &str) -> Running {
        Running::start(Command::new("sh").args(["-c", line]).stdout(Stdio::piped())).unwrap()
    }

    #[test]
    fn output_and_status_are_returned() {
        let output = shell("echo x; exit 4").wait(Duration::from_secs(60)).unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(4), &b"x\n"[..]));
    }

    #[test]
    fn a_slow_child_is_killed() {
        let mut slow = shell("exec sleep 100");
        assert!(!slow.has_ended());
        slow.kill();
        assert!(slow.has_ended());
        assert!(shell("exec sleep 100").wait(Duration::ZERO).unwrap_err().contains("had not ended"));
    }
}
