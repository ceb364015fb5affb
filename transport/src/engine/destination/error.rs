//! Why a destination ended without the guest.

use std::io;
use std::path::PathBuf;

use pagecopy::backend::BackendError;

use crate::archive::ArchiveError;
use crate::archive::format::RUN_STATE;
use crate::destination::ReceiveError;
use crate::engine::usage;
use crate::link::LinkError;
use crate::local::is_no_room;
use crate::session::SessionError;
use crate::socket::{SocketError, TlsError};
use crate::uri::Uri;
use crate::wire::WireError;
use crate::wire::control::ErrorCode;

/// Why a destination ended without the guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// No socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Certificates that cannot be used, or TLS where there is none.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Whoever reaches the address could hand a guest over, or read one that comes.
    #[error(
        "others can reach {uri}, and nothing protects what comes there: give it certificates, or allow it to be insecure"
    )]
    Unprotected {
        /// The address.
        uri: Uri,
    },
    /// No RDMA.
    #[cfg(feature = "rdma")]
    #[error("cannot listen for RDMA")]
    Rdma(#[from] crate::rdma::RdmaError),
    /// The control connection ended before READY.
    #[error("the source is gone; what arrived is incomplete and was given up")]
    Link(#[source] LinkError),
    /// The source gave up, or broke the protocol.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The VMM failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The source did not come back.
    #[error(
        "the source was lost and did not come back within {seconds} s; what arrived is incomplete and was given up"
    )]
    NotResumed {
        /// How long was waited.
        seconds: u64,
        /// How it was lost.
        #[source]
        source: LinkError,
    },
    /// Pages cannot be taken in, over whatever stream they come.
    #[error("this host cannot take the guest's pages in")]
    Receive(#[source] ReceiveError),
    /// A thread cannot be started.
    #[error("cannot start thread {name}: {}", usage::thread_limits())]
    Thread {
        /// Its name.
        name: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The destination panicked: pageferry or the VMM has a fault.
    #[error("the destination panicked: {what}")]
    Panicked {
        /// What it said.
        what: String,
    },
    /// A stream that should have ended in order did not.
    #[error("stream {stream} did not end in order")]
    Stream {
        /// Which.
        stream: u16,
    },
    /// The source vanished between READY and GO.
    #[error(
        "the source did not say GO within {seconds} s after it was lost; the guest was never run here and never will be"
    )]
    NoGo {
        /// How long was waited.
        seconds: u64,
    },
    /// The guest ran here before all its pages were there, and its source is gone.
    #[error(
        "the source was not heard of for {seconds} s while {left} pages of the running guest were missing: the guest was stopped, and is lost"
    )]
    PostcopyLost {
        /// Pages that are missing.
        left: u64,
        /// How long was waited.
        seconds: u64,
    },
    /// The guest ran here before all its pages were there, and they cannot be brought in.
    #[error("pages of the running guest cannot be brought in: the guest was stopped, and is lost: {why}")]
    PostcopyFailed {
        /// Why.
        why: String,
    },
    /// The older copy of the guest cannot be used.
    #[error("cannot use {} as a base: {why}", path.display())]
    Base {
        /// Where it is.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The archive cannot be read, or is damaged.
    #[error("the archive cannot be loaded; what was read of it is given up")]
    Archive(#[from] ArchiveError),
    /// The archive is of something else than what was to be loaded.
    #[error("the archive cannot be loaded here: {why}")]
    Unfit {
        /// Why.
        why: String,
    },
    /// The system lacks something.
    #[error("this host lacks a resource")]
    System(#[from] io::Error),
    /// Somebody asked.
    #[error("cancelled")]
    Cancelled,
}

impl IncomingError {
    /// Of an archive whose state does not say whether its guest ran.
    pub(super) fn no_run_state() -> Self {
        Self::Unfit { why: format!("its state does not say in {RUN_STATE:?} whether the guest ran") }
    }

    /// Whether somebody asked for it to end.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled) || matches!(self, Self::Archive(error) if error.is_cancelled())
    }

    /// Whether a guest that ran here before its pages is lost by it.
    pub(super) fn loses_guest(&self) -> bool {
        matches!(self, Self::PostcopyLost { .. } | Self::PostcopyFailed { .. })
    }

    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Session(SessionError::TotalsDiffer { .. }) => ErrorCode::Integrity,
            Self::Session(_) => ErrorCode::Protocol,
            _ if self.is_cancelled() => ErrorCode::Cancelled,
            Self::Receive(error) if error.is_no_room() => ErrorCode::NoRoom,
            Self::Backend(error) if error.io().is_some_and(is_no_room) => ErrorCode::NoRoom,
            _ => ErrorCode::Local,
        }
    }
}

impl From<WireError> for IncomingError {
    fn from(error: WireError) -> Self {
        Self::Link(LinkError::Wire(error))
    }
}
