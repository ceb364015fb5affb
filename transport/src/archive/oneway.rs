//! A guest that is saved to, or loaded from, a command or a descriptor: in order, by nobody who can go back, and who answers nothing.
//!
//! `exec:COMMAND` is a command of the shell. A save goes to its standard input, and its standard output is `/dev/null`; a load comes from
//! its standard output, and its standard input is ours, unless that is a terminal. What it writes to its standard error is told. It is a
//! process group of its own: whoever cancels ends all of it, and a terminal's Ctrl-C reaches only us, who decide. It runs behind the
//! terminal, at which it so cannot ask. What it keeps is as durable as it makes it.
//!
//! `fd:N` is a descriptor that this process has open, under a number. We work on a duplicate, which no command inherits. N itself stays
//! open, for a number does not tell whose it is: whoever opened it closes it. A reader of a pipe so sees its end when both are closed.
//! Of a socket the sending half is shut down after the last byte, whoever else has it open. A regular file is written and read from where
//! N stands, which moves.
//!
//! Nothing here waits for longer than [`TICK`] without asking whether to go on.

mod command;
mod end;
mod error;
mod said;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal};
use std::process::Stdio;
use std::time::Duration;

pub use error::{Ended, LastWords, OneWayError, Trouble};

use command::{Running, Seen};
use end::{End, Use};

use crate::uri::Uri;

/// Longest time between two questions whether to go on.
const TICK: Duration = Duration::from_millis(100);
/// How long a command may take to end that has closed its end of the pipe: how it ended says more than that it did.
const MOMENT: Duration = Duration::from_millis(500);
/// The shortest and the longest time between two looks at whether everything was read.
const DRAIN_MIN: Duration = Duration::from_millis(1);
const DRAIN_MAX: Duration = Duration::from_millis(20);

/// Where an archive is written in order, by nobody who can go back: a command's standard input, or a descriptor.
///
/// After an error, and when it is dropped before it is [finished](Self::finish), what was written is not whole: a command is killed
/// before it sees the end of its input, and a socket is shut down.
pub(crate) struct OneWayWriter {
    uri: Uri,
    command: Option<Running>,
    end: Option<End>,
}

impl OneWayWriter {
    /// Starts the command, or takes the descriptor.
    pub(crate) fn open(uri: &Uri) -> Result<Self, OneWayError> {
        let (command, end) = match uri {
            Uri::Exec(command) => {
                let started = io::pipe().and_then(|(theirs, ours)| {
                    let end = End::of_pipe(ours.into())?;
                    Ok((Running::start(command, theirs.into(), Stdio::null())?, end))
                });
                let (command, end) = started.map_err(|e| OneWayError::io("start", uri, e))?;
                (Some(command), end)
            }
            Uri::Fd(number) => (None, End::of_number(*number, Use::Write)?),
            _ => return Err(OneWayError::NotOneWay { uri: uri.clone() }),
        };
        Ok(Self { uri: uri.clone(), command, end: Some(end) })
    }

    /// Writes all of `bytes`. `go_on` is asked several times a second.
    ///
    /// # Errors
    /// [`OneWayError::Cancelled`] soon after `go_on` says no, also where nobody reads. A command that has ended, or closed its input,
    /// with what it said.
    pub(crate) fn write_all(
        &mut self,
        mut bytes: &[u8],
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), OneWayError> {
        while !bytes.is_empty() {
            if !go_on() {
                return Err(OneWayError::Cancelled);
            }
            let error = match self.end()?.write(bytes) {
                Ok(0) => io::ErrorKind::WriteZero.into(),
                Ok(count) => {
                    bytes = &bytes[count..];
                    continue;
                }
                Err(error) => error,
            };
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => self.await_room()?,
                io::ErrorKind::BrokenPipe => return Err(self.unread(error, go_on)),
                _ => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    /// Ends it: waits until a command has read everything and exited with success.
    ///
    /// # Errors
    /// As [`Self::write_all`]; a command that exits with another status, or leaves something unread.
    pub(crate) fn finish(mut self, go_on: &dyn Fn() -> bool) -> Result<(), OneWayError> {
        let Some(command) = self.command.as_ref() else {
            return match self.end.take() {
                Some(end) => end.finish().map_err(|e| self.failed(e)),
                None => Ok(()),
            };
        };
        if let Some(trouble) = self.drain(command, go_on)? {
            return Err(command.error(trouble));
        }
        // Here its input ends. Until then it was not to take what came for all of it.
        self.end = None;
        self.command.take().map_or(Ok(()), |command| command.done(go_on))
    }

    /// Waits until the pipe is empty. What is left in it once nobody reads is lost, and after the end nobody can tell how much that was.
    fn drain(&self, command: &Running, go_on: &dyn Fn() -> bool) -> Result<Option<Trouble>, OneWayError> {
        let end = self.end()?;
        let mut pause = DRAIN_MIN;
        loop {
            let deaf = end.wait_unread(Duration::ZERO).map_err(|e| self.failed(e))?;
            let seen = command.look();
            // Asked last: what was unread when nobody was left to read it stays so.
            let unread = end.unread().map_err(|e| self.failed(e))?;
            match seen {
                _ if unread == 0 => return Ok(None),
                Some(Seen::Ended(ended)) => return Ok(Some(Trouble::Unread(Some(ended), unread))),
                Some(Seen::Asks(signal)) => return Ok(Some(Trouble::Asks(signal))),
                None if deaf => {
                    return Ok(Some(match command.wait(Some(MOMENT), go_on)? {
                        Some(Seen::Ended(ended)) => Trouble::Unread(Some(ended), unread),
                        Some(Seen::Asks(signal)) => Trouble::Asks(signal),
                        None => Trouble::Unread(None, unread),
                    }));
                }
                None => {}
            }
            if !go_on() {
                return Err(OneWayError::Cancelled);
            }
            end.wait_unread(pause).map_err(|e| self.failed(e))?;
            pause = (pause * 2).min(DRAIN_MAX);
        }
    }

    /// Waits a tick for room. Where there is none, the command may have ended, and something that it started keeps the pipe open.
    fn await_room(&self) -> Result<(), OneWayError> {
        if self.end()?.wait(Use::Write, TICK).map_err(|e| self.failed(e))? {
            return Ok(());
        }
        match self.command.as_ref().and_then(|command| Some((command, command.look()?))) {
            Some((command, Seen::Ended(ended))) => Err(command.error(Trouble::Early(ended))),
            Some((command, Seen::Asks(signal))) => Err(command.error(Trouble::Asks(signal))),
            None => Ok(()),
        }
    }

    /// The error of a write that nobody reads.
    fn unread(&self, error: io::Error, go_on: &dyn Fn() -> bool) -> OneWayError {
        let Some(command) = &self.command else { return self.failed(error) };
        match command.wait(Some(MOMENT), go_on) {
            Ok(Some(Seen::Ended(ended))) => command.error(Trouble::Early(ended)),
            Ok(Some(Seen::Asks(signal))) => command.error(Trouble::Asks(signal)),
            Ok(None) => command.error(Trouble::Deaf),
            Err(error) => error,
        }
    }

    fn failed(&self, error: io::Error) -> OneWayError {
        OneWayError::io("write to", &self.uri, error)
    }

    /// It is there until it is finished.
    fn end(&self) -> Result<&End, OneWayError> {
        self.end.as_ref().ok_or_else(|| self.failed(io::ErrorKind::NotConnected.into()))
    }
}

impl Drop for OneWayWriter {
    fn drop(&mut self) {
        // Before its input ends, or it might take what came for all of it.
        drop(self.command.take());
        if let Some(end) = self.end.take() {
            end.cut();
        }
    }
}

/// What a command that is read has for its standard input: ours, so that whoever starts us can pipe an archive in, as in `gzip -dc FILE |
/// … exec:cat`. A terminal has nothing for it.
fn input_of_ours() -> Stdio {
    if io::stdin().is_terminal() { Stdio::null() } else { Stdio::inherit() }
}

/// Where an archive is read in order: a command's standard output, or a descriptor.
///
/// A command is killed when this is dropped before it is [finished](Self::finish).
pub(crate) struct OneWayReader {
    uri: Uri,
    command: Option<Running>,
    end: Option<End>,
}

impl OneWayReader {
    /// Starts the command, or takes the descriptor.
    pub(crate) fn open(uri: &Uri) -> Result<Self, OneWayError> {
        let (command, end) = match uri {
            Uri::Exec(command) => {
                let started = io::pipe().and_then(|(ours, theirs)| {
                    let end = End::of_pipe(ours.into())?;
                    Ok((Running::start(command, input_of_ours(), theirs.into())?, end))
                });
                let (command, end) = started.map_err(|e| OneWayError::io("start", uri, e))?;
                (Some(command), end)
            }
            Uri::Fd(number) => (None, End::of_number(*number, Use::Read)?),
            _ => return Err(OneWayError::NotOneWay { uri: uri.clone() }),
        };
        Ok(Self { uri: uri.clone(), command, end: Some(end) })
    }

    /// Reads into `buffer` what is there, and waits where nothing is; 0 is the end. `go_on` is asked several times a second.
    ///
    /// # Errors
    /// [`OneWayError::Cancelled`] soon after `go_on` says no. At the end, a command that failed: what it gave is not whole.
    pub(crate) fn read(&mut self, buffer: &mut [u8], go_on: &dyn Fn() -> bool) -> Result<usize, OneWayError> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !go_on() {
                return Err(OneWayError::Cancelled);
            }
            match self.try_read(buffer)? {
                Some(0) => return self.check_end(go_on).map(|()| 0),
                Some(count) => return Ok(count),
                None => self.await_bytes()?,
            };
        }
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// As [`Self::read`]; [`OneWayError::Truncated`] where the end comes before.
    pub(crate) fn read_exact(
        &mut self,
        buffer: &mut [u8],
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), OneWayError> {
        let mut got = 0;
        while got < buffer.len() {
            match self.read(&mut buffer[got..], go_on)? {
                0 => {
                    let (uri, wanted) = (self.uri.clone(), buffer.len());
                    return Err(OneWayError::Truncated { uri, wanted, got });
                }
                count => got += count,
            }
        }
        Ok(())
    }

    /// Ends it, when everything that was wanted is read: nothing may follow, and a command must exit with success.
    ///
    /// Of a descriptor only what is there by now would follow: whoever writes to it may keep it open for long.
    pub(crate) fn finish(mut self, go_on: &dyn Fn() -> bool) -> Result<(), OneWayError> {
        let mut more = [0];
        loop {
            if !go_on() {
                return Err(OneWayError::Cancelled);
            }
            match self.try_read(&mut more)? {
                Some(0) => break,
                Some(_) => return Err(OneWayError::MoreFollows { uri: self.uri.clone() }),
                None if self.command.is_none() => break,
                None => {
                    if let Some(Ended::Exited(0)) = self.await_bytes()? {
                        // Something that it started keeps the pipe open, and says nothing.
                        break;
                    }
                }
            }
        }
        self.end = None;
        self.command.take().map_or(Ok(()), |command| command.done(go_on))
    }

    /// Reads what is there; `None` where nothing is.
    fn try_read(&self, buffer: &mut [u8]) -> Result<Option<usize>, OneWayError> {
        let end = self.end.as_ref().ok_or_else(|| self.failed(io::ErrorKind::NotConnected.into()))?;
        loop {
            match end.read(buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
    }

    /// Waits a tick for bytes. Where none come, says how a command ended that has, if with success.
    fn await_bytes(&self) -> Result<Option<Ended>, OneWayError> {
        let end = self.end.as_ref().ok_or_else(|| self.failed(io::ErrorKind::NotConnected.into()))?;
        // Asked before: what an ended command wrote is there by now.
        let seen = self.command.as_ref().and_then(|command| Some((command, command.look()?)));
        if end.wait(Use::Read, TICK).map_err(|e| self.failed(e))? {
            return Ok(None);
        }
        match seen {
            Some((_, Seen::Ended(ended))) if ended.is_success() => Ok(Some(ended)),
            Some((command, Seen::Ended(ended))) => Err(command.error(Trouble::Failed(ended))),
            Some((command, Seen::Asks(signal))) => Err(command.error(Trouble::Asks(signal))),
            None => Ok(None),
        }
    }

    /// At the end of what a command gives: it may have failed. One that closes its output and runs on is waited for in the end.
    fn check_end(&self, go_on: &dyn Fn() -> bool) -> Result<(), OneWayError> {
        let Some(command) = &self.command else { return Ok(()) };
        match command.wait(Some(MOMENT), go_on)? {
            Some(Seen::Ended(ended)) if !ended.is_success() => Err(command.error(Trouble::Failed(ended))),
            Some(Seen::Asks(signal)) => Err(command.error(Trouble::Asks(signal))),
            Some(Seen::Ended(_)) | None => Ok(()),
        }
    }

    fn failed(&self, error: io::Error) -> OneWayError {
        OneWayError::io("read from", &self.uri, error)
    }
}

impl Drop for OneWayReader {
    fn drop(&mut self) {
        drop(self.command.take());
        if let Some(end) = self.end.take() {
            end.cut();
        }
    }
}
