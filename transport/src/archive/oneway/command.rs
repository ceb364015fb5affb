//! A command of the shell, at one end of a pipe: started, watched, ended, and never left behind.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, waitid};

use super::error::{Ended, LastWords, OneWayError, Trouble};
use super::said::Said;

/// The shell: by its path, for a program that is found so can be started without a copy of this process, whose memory is the guest's.
const SHELL: &str = "/bin/sh";
/// The shortest and the longest time between two looks at whether a command has ended.
const LOOK_MIN: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(20);
/// How long a command may take to end once it is asked to.
const GRACE: Duration = Duration::from_millis(300);
/// How long the system may take to end one that it is told to end. More than that only takes one that is stuck in the system.
const KILLING: Duration = Duration::from_millis(300);
/// How long last words are waited for once a command has ended: others that it started may go on.
const WORDS: Duration = Duration::from_millis(200);

/// A command that was started, and all that it starts: a process group of its own, which a terminal's Ctrl-C does not reach. Dropped
/// before it is [done](Self::done), it is killed with its whole group.
pub(super) struct Running {
    pid: Pid,
    command: String,
    said: Said,
    reaped: bool,
}

/// What a command is seen to do that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Ended(Ended),
    /// It asks at a terminal, from behind: the system has stopped it by this signal.
    Asks(i32),
}

impl Running {
    /// Starts it, with these as its standard input and output. It has no other descriptor of this process, and signals do to it what they
    /// do by default.
    pub(super) fn start(command: &str, input: Stdio, output: Stdio) -> io::Result<Self> {
        let (said, errors) = Said::listen()?;
        let child = Command::new(SHELL)
            .args(["-c", "--", command])
            .stdin(input)
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()?;
        // The parent's copies of what the command was given are closed by now; nothing else is left of the child here but its number.
        Ok(Self { pid: Pid::from_child(&child), command: command.into(), said, reaped: false })
    }

    #[cfg(test)]
    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// What has become of it. One that has ended is still there to be reaped, so that its number is nobody else's.
    pub(super) fn look(&self) -> Option<Seen> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
        let status = match waitid(WaitId::Pid(self.pid), options | WaitIdOptions::NOWAIT) {
            Ok(status) => status?,
            Err(Errno::INTR) => return None,
            // Somebody else has reaped it.
            Err(_) => return Some(Seen::Ended(Ended::Unknown)),
        };
        let asks = |signal: &i32| [libc::SIGTTIN, libc::SIGTTOU].contains(signal);
        match how(&status) {
            Some(ended) => Some(Seen::Ended(ended)),
            None => status.stopping_signal().filter(asks).map(Seen::Asks),
        }
    }

    /// Waits until there is something to see; at most for `limit`, which nothing bounds where it is `None`.
    ///
    /// # Errors
    /// [`OneWayError::Cancelled`].
    pub(super) fn wait(
        &self,
        limit: Option<Duration>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Seen>, OneWayError> {
        let (began, mut pause) = (Instant::now(), LOOK_MIN);
        loop {
            let seen = self.look();
            if seen.is_some() {
                return Ok(seen);
            }
            if !go_on() {
                return Err(OneWayError::Cancelled);
            }
            if limit.is_some_and(|limit| began.elapsed() >= limit) {
                return Ok(None);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_MAX);
        }
    }

    /// The error of a command that did not do its part.
    pub(super) fn error(&self, trouble: Trouble) -> OneWayError {
        let runs = matches!(trouble, Trouble::Deaf | Trouble::Asks(_) | Trouble::Unread(None, _));
        // One that runs on may say more for ever.
        self.said.all(if runs { Duration::ZERO } else { WORDS });
        OneWayError::Command {
            command: self.command.clone(),
            trouble,
            words: LastWords(self.said.last_words()),
        }
    }

    /// Waits until it ends, with success.
    pub(super) fn done(mut self, go_on: &dyn Fn() -> bool) -> Result<(), OneWayError> {
        match self.wait(None, go_on)? {
            Some(Seen::Ended(ended)) if ended.is_success() => {
                // What it left running in the background, on purpose, goes on.
                self.reap();
                Ok(())
            }
            Some(Seen::Ended(ended)) => Err(self.error(Trouble::Failed(ended))),
            Some(Seen::Asks(signal)) => Err(self.error(Trouble::Asks(signal))),
            None => Err(OneWayError::Cancelled),
        }
    }

    /// Asks all of it to end, and then makes it.
    fn kill(&mut self) {
        if self.look() == Some(Seen::Ended(Ended::Unknown)) {
            // The number may be another's by now.
            self.reaped = true;
            return;
        }
        let signal = |signal| {
            // Fails where none is left who could be told.
            let _ = kill_process_group(self.pid, signal);
        };
        signal(Signal::TERM);
        // One that is stopped hears it only when it goes on.
        signal(Signal::CONT);
        let began = Instant::now();
        while began.elapsed() < GRACE {
            // With the last of the group ends what it says.
            if matches!(self.look(), Some(Seen::Ended(_))) && self.said.all(Duration::ZERO) {
                break;
            }
            std::thread::sleep(LOOK_MIN);
        }
        signal(Signal::KILL);
        self.reap();
    }

    /// Takes its exit status from the system, which forgets it then.
    fn reap(&mut self) {
        self.reaped = true;
        let pid = self.pid;
        let began = Instant::now();
        while began.elapsed() < KILLING {
            match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(None) | Err(Errno::INTR) => std::thread::sleep(LOOK_MIN),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        // It is stuck in the system, as over a network file system that does not answer, and ends when that does. Without a thread it
        // would stay there as an entry in a table.
        let _ = std::thread::Builder::new().name("command-stuck".into()).spawn(move || {
            while matches!(waitid(WaitId::Pid(pid), WaitIdOptions::EXITED), Err(Errno::INTR)) {}
        });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
        }
    }
}

/// How it ended, if it did.
fn how(status: &WaitIdStatus) -> Option<Ended> {
    let signal = || status.terminating_signal().map(Ended::Killed);
    status.exit_status().map(Ended::Exited).or_else(signal)
}
