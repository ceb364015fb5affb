//! Why a side gives up, and what became of a session.

use crate::wire::WireError;

/// Why a side gives up, as a number that programs can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// Bytes that are not the protocol.
    Protocol = 1,
    /// No common version.
    Version = 2,
    /// The destination serves another session.
    Busy = 3,
    /// The destination cannot hold this guest.
    Layout = 4,
    /// Content did not arrive as it was sent.
    Integrity = 5,
    /// The sender of the message failed by itself: disk, memory, KVM.
    Local = 6,
    /// Somebody cancelled.
    Cancelled = 7,
    /// No such session here.
    UnknownSession = 8,
    /// Nothing was heard for too long.
    Timeout = 9,
    /// The sender of the message has no room for the guest's memory.
    NoRoom = 10,
}

impl ErrorCode {
    pub(super) fn from_wire(value: u32) -> Result<Self, WireError> {
        Ok(match value {
            1 => Self::Protocol,
            2 => Self::Version,
            3 => Self::Busy,
            4 => Self::Layout,
            5 => Self::Integrity,
            6 => Self::Local,
            7 => Self::Cancelled,
            8 => Self::UnknownSession,
            9 => Self::Timeout,
            10 => Self::NoRoom,
            _ => return Err(WireError::BadValue { field: "error code", value: value.into() }),
        })
    }
}

/// What became of a session, from the destination's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum SessionStatus {
    /// Not complete: the destination cannot run the guest.
    Moving = 1,
    /// Complete and waiting for [`Go`](super::Message::Go).
    Ready = 2,
    /// The destination was told to go: the guest is its own.
    Running = 3,
    /// Given up without having run the guest, for good.
    Abandoned = 4,
}

impl SessionStatus {
    pub(super) fn from_wire(value: u16) -> Result<Self, WireError> {
        Ok(match value {
            1 => Self::Moving,
            2 => Self::Ready,
            3 => Self::Running,
            4 => Self::Abandoned,
            _ => return Err(WireError::BadValue { field: "session status", value: value.into() }),
        })
    }
}
