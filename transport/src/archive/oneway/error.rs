//! What goes wrong with a stream that nobody answers.

use std::fmt;
use std::io;

use crate::uri::Uri;

/// Why a stream that nobody answers was not written, or not read, to its end.
#[derive(Debug, thiserror::Error)]
pub enum OneWayError {
    /// Whoever waited asked to wait no longer.
    #[error("cancelled")]
    Cancelled,
    /// Not written in order by anybody.
    #[error("{uri} is no stream that nobody answers: give exec:COMMAND or fd:N")]
    NotOneWay {
        /// What was given.
        uri: Uri,
    },
    /// The command did not do its part.
    #[error("the command {command:?} {trouble}{words}")]
    Command {
        /// As the shell was given it.
        command: String,
        /// What it did instead.
        trouble: Trouble,
        /// What it said last.
        words: LastWords,
    },
    /// A descriptor that does not serve.
    #[error("fd:{number} {why}")]
    BadFd {
        /// Its number.
        number: i32,
        /// What is wrong with it.
        why: String,
    },
    /// There is less than was wanted.
    #[error("{uri} ended after {got} of {wanted} bytes: what it gives is not all that was saved")]
    Truncated {
        /// Where it was read from.
        uri: Uri,
        /// Bytes that were to come.
        wanted: usize,
        /// Bytes that came.
        got: usize,
    },
    /// There is more than was wanted.
    #[error(
        "{uri} goes on behind the end of what was saved: it gives something else as well, or more than once"
    )]
    MoreFollows {
        /// Where it was read from.
        uri: Uri,
    },
    /// The system refused.
    #[error("cannot {what} {uri}{hint}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With what.
        uri: Uri,
        /// What to do.
        hint: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl OneWayError {
    pub(super) fn io(what: &'static str, uri: &Uri, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::BrokenPipe => ": nobody reads it any more; see what became of its reader",
            _ => "",
        };
        Self::Io { what, uri: uri.clone(), hint, source }
    }
}

/// What a command did instead of its part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It ended, and not with success.
    Failed(Ended),
    /// It ended before it had read everything.
    Early(Ended),
    /// It ended, or closed its input, with so many bytes of it unread; more may not have been written.
    Unread(Option<Ended>, u64),
    /// It reads no more, and has not ended.
    Deaf,
    /// It is stopped by this signal, for it asks at a terminal that it has not.
    Asks(i32),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(ended) => write!(f, "{ended}"),
            Self::Early(ended) => write!(f, "{ended} before it had read everything"),
            Self::Unread(Some(ended), bytes) => write!(f, "{ended} and did not read {bytes} bytes"),
            Self::Unread(None, bytes) => write!(f, "closed its input and did not read {bytes} bytes"),
            Self::Deaf => write!(f, "closed its input before it had read everything, and runs on"),
            Self::Asks(signal) => write!(
                f,
                "was stopped by {}: it asks at the terminal, which it has not; give it what it asks for by an option or a file",
                Signal(*signal)
            ),
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// The system does not tell.
    Unknown,
}

impl Ended {
    pub(super) fn is_success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // What shells say by their own exit status.
            Self::Exited(126) => write!(f, "exited with 126 (something of it cannot be run)"),
            Self::Exited(127) => write!(f, "exited with 127 (the shell does not find it; is it installed?)"),
            Self::Exited(status) => write!(f, "exited with {status}"),
            Self::Killed(signal) => write!(f, "was killed by {}", Signal(*signal)),
            Self::Unknown => write!(
                f,
                "ended, nobody knows how: this process ignores SIGCHLD, or waits for children that others started"
            ),
        }
    }
}

/// A signal, by number and name.
struct Signal(i32);

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            libc::SIGHUP => "SIGHUP",
            libc::SIGINT => "SIGINT",
            libc::SIGQUIT => "SIGQUIT",
            libc::SIGILL => "SIGILL",
            libc::SIGABRT => "SIGABRT",
            libc::SIGBUS => "SIGBUS",
            libc::SIGFPE => "SIGFPE",
            libc::SIGKILL => "SIGKILL, which the system sends where memory is short",
            libc::SIGSEGV => "SIGSEGV",
            libc::SIGPIPE => "SIGPIPE",
            libc::SIGALRM => "SIGALRM",
            libc::SIGTERM => "SIGTERM",
            libc::SIGTTIN => "SIGTTIN",
            libc::SIGTTOU => "SIGTTOU",
            libc::SIGXCPU => "SIGXCPU",
            libc::SIGXFSZ => "SIGXFSZ, for its file was longer than RLIMIT_FSIZE",
            other => return write!(f, "signal {other}"),
        };
        write!(f, "signal {} ({name})", self.0)
    }
}

/// What a command wrote to its standard error last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastWords(pub(super) String);

impl fmt::Display for LastWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_str() {
            "" => write!(f, "; it did not say why"),
            words => write!(f, "; it said: {words}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_say_what_where_and_what_to_do() {
        let command = |trouble, words: &str| {
            OneWayError::Command { command: "a | b".into(), trouble, words: LastWords(words.into()) }
                .to_string()
        };
        for (text, parts) in [
            (
                command(Trouble::Failed(Ended::Exited(3)), "no room"),
                ["\"a | b\" exited with 3; it said", "no room"],
            ),
            (command(Trouble::Failed(Ended::Exited(127)), ""), ["is it installed?", "; it did not say why"]),
            (
                command(Trouble::Early(Ended::Killed(9)), ""),
                ["signal 9 (SIGKILL", "before it had read everything"],
            ),
            (
                command(Trouble::Early(Ended::Killed(40)), ""),
                ["killed by signal 40 before", "it did not say"],
            ),
            (
                command(Trouble::Unread(Some(Ended::Exited(0)), 7), ""),
                ["exited with 0", "did not read 7 bytes"],
            ),
            (command(Trouble::Unread(None, 7), ""), ["closed its input", "did not read 7 bytes"]),
            (command(Trouble::Deaf, ""), ["closed its input", "runs on"]),
            (command(Trouble::Asks(libc::SIGTTIN), ""), ["SIGTTIN", "by an option or a file"]),
            (command(Trouble::Failed(Ended::Unknown), ""), ["nobody knows how", "SIGCHLD"]),
        ] {
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        assert!(
            !Ended::Unknown.is_success() && !Ended::Exited(1).is_success() && Ended::Exited(0).is_success()
        );
    }
}
