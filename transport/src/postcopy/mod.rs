//! Postcopy: pages that follow a guest which runs at the destination already.
//!
//! The guest stands still at the source from the handover on, so its memory does not change any more: a page has one version, and
//! it does not matter which connection brings it, or whether it comes twice. The [`PageServer`]'s bitmap of pages that wait is
//! the one truth about who sends a page: whoever takes it from there. Frames that die with their connection make their pages wait
//! again, and a page stays at the source until its receipt came.
//!
//! Connection 0 carries what the guest asks for, at once, by itself and raw; the others everything else, in the order of
//! [`pagecopy::postcopy::Order`], encoded as pays off, with little under way so that nobody waits long for a page that is (`pace`).
//! A limit of bandwidth holds back the others only: what the guest asks for is charged to it and never waits for it. At the
//! destination the [`MissingSink`] places what fits its seal, and lets those go on who wait for it.

pub(crate) mod channel;
mod lane;
mod missing;
mod pace;
#[cfg(test)]
mod partial;
mod receiver;
pub(crate) mod sealed;
mod server;
mod sink;
#[cfg(test)]
pub(crate) mod stepped;
#[cfg(test)]
mod tests;

use std::io;

use pagecopy::backend::BackendError;
use pagecopy::chunk::DecodeError;

pub use lane::{Lane, LaneEnd};
pub use missing::MissingRuns;
pub use server::{PageServer, ServerCounters, ServerOptions};
pub use sink::{MissingSink, SinkStatistics};

use crate::link::LinkError;
use crate::socket::SocketError;
use crate::wire::WireError;

/// Why a connection of postcopy ended.
#[derive(Debug, thiserror::Error)]
pub enum PostcopyError {
    /// It could not be opened.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The destination refused it, or did not answer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It broke.
    #[error("postcopy connection {stream} broke")]
    Io {
        /// Which.
        stream: u16,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The peer closed it.
    #[error("the peer closed postcopy connection {stream}")]
    Closed {
        /// Which.
        stream: u16,
    },
    /// The peer takes nothing, or the rest of what it began to say does not come.
    #[error("postcopy connection {stream}: the peer is silent for {seconds} s")]
    Timeout {
        /// Which.
        stream: u16,
        /// How long.
        seconds: u64,
    },
    /// Not the bytes that the protocol wants.
    #[error("postcopy connection {stream}")]
    Wire {
        /// Which.
        stream: u16,
        /// What is wrong with them.
        #[source]
        source: WireError,
    },
    /// An encoded section that fits its checksum and does not decode.
    #[error("postcopy connection {stream}, chunk {chunk}")]
    Decode {
        /// Which.
        stream: u16,
        /// The chunk.
        chunk: u32,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
    /// Guest memory could not be had.
    #[error("postcopy connection {stream}")]
    Memory {
        /// Which.
        stream: u16,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// Its thread panicked.
    #[error(
        "postcopy connection {stream} panicked, which is a fault of pageferry's: please report it: {what}"
    )]
    Panicked {
        /// Which.
        stream: u16,
        /// What it said.
        what: String,
    },
    /// Told to stop.
    #[error("postcopy connection {stream} was stopped")]
    Stopped {
        /// Which.
        stream: u16,
    },
}
