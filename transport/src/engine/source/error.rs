//! Why a migration failed, and who has the guest then.

use std::fmt;

use pagecopy::backend::BackendError;
use pagecopy::choose::CodecMode;

use crate::archive::ArchiveError;
use crate::dial::OpenError;
use crate::engine::usage;
use crate::link::LinkError;
use crate::postcopy::PostcopyError;
use crate::session::SessionError;
use crate::socket::{SocketError, TlsError};
use crate::source::FatalError;
use crate::streams::StreamsError;
use crate::wire::WireError;
use crate::wire::control::ErrorCode;

/// Who has the guest after a migration that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// Memory alone was to be moved: it is where it was.
    Unmoved,
    /// It was paused before the migration and still is.
    StaysPaused,
    /// It runs on at the source.
    RunsOn,
    /// It could not be resumed at the source, whose it is.
    Stuck,
    /// It ran at the destination before all its pages were there, and is lost there; what is here is as old as the handover.
    Lost,
    /// GO was said and nothing heard: the source must not resume it before somebody has looked at the destination.
    Unknown,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unmoved => "the transfer failed; the source is unchanged",
            Self::StaysPaused => "the migration failed; the guest stays paused at the source",
            Self::RunsOn => "the migration failed; the guest runs on at the source",
            Self::Stuck => "the migration failed, and the guest could not be resumed at the source, where it is whole",
            Self::Lost => {
                "the destination lost the guest before all its pages were there; what is here is as old as the handover, and stays paused"
            }
            Self::Unknown => {
                "the handover was not confirmed; the source is unchanged, and a guest stays paused there until you know that the destination does not run it"
            }
        })
    }
}

/// A migration that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[error("{fate}")]
pub struct Failure {
    /// Who has the guest.
    pub fate: Fate,
    /// Why it failed.
    #[source]
    pub cause: Cause,
}

/// Why a migration failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// No connection.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Certificates that cannot be used, or TLS where there is none.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The control connection ended.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The destination refused, gave up, or disagrees.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The VMM failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The data plane cannot go on.
    #[error(transparent)]
    Fatal(#[from] FatalError),
    /// A stream could not be opened.
    #[error("data stream {stream} could not be opened")]
    Stream {
        /// Which.
        stream: u16,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// Too many streams died.
    #[error(transparent)]
    Streams(#[from] StreamsError),
    /// Postcopy was asked for.
    #[error(
        "the destination cannot run a guest before its pages are there: it is an older one, or says itself why (userfaultfd){}", hint(.needed_by)
    )]
    NoPostcopy {
        /// What will need it, where nobody has asked for it yet.
        needed_by: Option<&'static str>,
    },
    /// A connection of postcopy could not be opened.
    #[error(transparent)]
    Postcopy(#[from] PostcopyError),
    /// The connections did not come back.
    #[error(
        "the connections were lost ({lost}) and not made anew within {seconds} s; the last attempt: {last}"
    )]
    NotReconnected {
        /// How long was tried.
        seconds: u64,
        /// What was lost.
        lost: String,
        /// Why the last attempt failed.
        last: String,
    },
    /// The policy gave up.
    #[error("{0}")]
    Policy(String),
    /// The pinned codec needs what the destination cannot do.
    #[error("codec {codec} was asked for and the destination does not support it")]
    Codec {
        /// What was pinned.
        codec: CodecMode,
    },
    /// What the VMM describes or saves is more than the protocol carries.
    #[error("the guest cannot be migrated: its {name} would be refused")]
    Unsendable {
        /// The message.
        name: &'static str,
        /// Why.
        #[source]
        source: WireError,
    },
    /// The destination answers pings and nothing else.
    #[error("the destination lives but has not sent {message} for {seconds} s")]
    Overdue {
        /// What was waited for.
        message: &'static str,
        /// How long.
        seconds: u64,
    },
    /// Its time is up where nothing can be done about it.
    #[error(
        "the migration has run for {elapsed_s:.1} s of the {limit_s} s allowed and is still {doing}; allow more time"
    )]
    OutOfTime {
        /// What it was doing.
        doing: &'static str,
        /// How long it ran.
        elapsed_s: f64,
        /// What was allowed.
        limit_s: f64,
    },
    /// The archive cannot be written.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Something was asked for that needs somebody who answers.
    #[error("an archive can have no {what}")]
    OneWay {
        /// What, and why not.
        what: &'static str,
    },
    /// Somebody asked.
    #[error("cancelled")]
    Cancelled,
    /// The destination gave up after GO was said and before it arrived.
    #[error("the destination gave the session up before it was told to go")]
    Abandoned,
    /// The migration's own thread panicked.
    #[error("the migration panicked, which is a fault of pageferry's: please report it: {what}")]
    Panicked {
        /// What it said.
        what: String,
    },
    /// The system has no threads or randomness.
    #[error("this host lacks a resource{}", usage::short_of_threads(.0))]
    System(#[from] std::io::Error),
}

fn hint(needed_by: &Option<&str>) -> String {
    needed_by.map(|option| format!("; {option} needs it")).unwrap_or_default()
}

impl Cause {
    /// Whether somebody asked for it to end.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled) || matches!(self, Self::Archive(error) if error.is_cancelled())
    }

    /// The number the destination is told.
    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Fatal(FatalError::Integrity { .. }) => ErrorCode::Integrity,
            Self::Link(LinkError::Timeout(_)) => ErrorCode::Timeout,
            Self::Session(SessionError::TotalsDiffer { .. }) => ErrorCode::Integrity,
            Self::Session(_) | Self::Link(LinkError::Wire(_)) => ErrorCode::Protocol,
            _ => ErrorCode::Local,
        }
    }
}
