//! The kinds of control messages: number, name, and how long each may be.

use super::base::BASE_LEN_MAX;
use super::{FIRST_LEN_MAX, MISSING_RUNS_MAX, Message, STATE_LEN_MAX};
use crate::wire::WireError;

/// Longest fields of a message that has no long ones.
const SHORT_LEN_MAX: usize = 16 << 10;

/// Makes the one table of kinds: everything that is known of a kind besides its fields stands in its row.
macro_rules! kinds {
    ($($kind:ident = $number:literal, $name:literal, $limit:expr;)*) => {
        /// What a message is, as its header says it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub(super) enum Kind {
            $($kind = $number,)*
        }

        impl Kind {
            /// All of them.
            #[cfg(test)]
            pub(super) const ALL: &[Self] = &[$(Self::$kind),*];

            /// The name, as `docs/protocol.md` has it.
            pub(super) fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// Most bytes that its fields may have.
            pub(super) fn limit(self) -> usize {
                match self {
                    $(Self::$kind => $limit,)*
                }
            }
        }

        impl TryFrom<u16> for Kind {
            type Error = WireError;

            fn try_from(value: u16) -> Result<Self, WireError> {
                match value {
                    $($number => Ok(Self::$kind),)*
                    _ => Err(WireError::BadValue { field: "message kind", value: value.into() }),
                }
            }
        }
    };
}

kinds! {
    Hello = 1, "HELLO", FIRST_LEN_MAX;
    Welcome = 2, "WELCOME", SHORT_LEN_MAX;
    Error = 3, "ERROR", SHORT_LEN_MAX;
    Ping = 4, "PING", SHORT_LEN_MAX;
    Pong = 5, "PONG", SHORT_LEN_MAX;
    Prepared = 6, "PREPARED", SHORT_LEN_MAX;
    Attached = 7, "ATTACHED", SHORT_LEN_MAX;
    StreamLost = 8, "STREAM_LOST", SHORT_LEN_MAX;
    StreamStopped = 9, "STREAM_STOPPED", SHORT_LEN_MAX;
    State = 10, "STATE", STATE_LEN_MAX;
    Finish = 11, "FINISH", SHORT_LEN_MAX;
    Ready = 12, "READY", SHORT_LEN_MAX;
    Go = 13, "GO", SHORT_LEN_MAX;
    Running = 14, "RUNNING", SHORT_LEN_MAX;
    Query = 15, "QUERY", SHORT_LEN_MAX;
    Status = 16, "STATUS", SHORT_LEN_MAX;
    Resume = 17, "RESUME", SHORT_LEN_MAX;
    Resumed = 18, "RESUMED", SHORT_LEN_MAX;
    Resent = 19, "RESENT", SHORT_LEN_MAX;
    Base = 20, "BASE", BASE_LEN_MAX;
    Postcopy = 24, "POSTCOPY", SHORT_LEN_MAX;
    PostcopyReady = 25, "POSTCOPY_READY", SHORT_LEN_MAX;
    Missing = 26, "MISSING", 4 + MISSING_RUNS_MAX * 16;
    Sent = 27, "SENT", SHORT_LEN_MAX;
    Arrived = 28, "ARRIVED", SHORT_LEN_MAX;
}

impl From<&Message> for Kind {
    fn from(message: &Message) -> Self {
        match message {
            Message::Hello(_) => Self::Hello,
            Message::Welcome(_) => Self::Welcome,
            Message::Error { .. } => Self::Error,
            Message::Ping(_) => Self::Ping,
            Message::Pong(_) => Self::Pong,
            Message::Prepared => Self::Prepared,
            Message::Attached { .. } => Self::Attached,
            Message::StreamLost { .. } => Self::StreamLost,
            Message::StreamStopped { .. } => Self::StreamStopped,
            Message::State(_) => Self::State,
            Message::Finish(_) => Self::Finish,
            Message::Ready(_) => Self::Ready,
            Message::Go => Self::Go,
            Message::Running => Self::Running,
            Message::Query => Self::Query,
            Message::Status(_) => Self::Status,
            Message::Resume { .. } => Self::Resume,
            Message::Resumed { .. } => Self::Resumed,
            Message::Resent { .. } => Self::Resent,
            Message::Base(_) => Self::Base,
            Message::Postcopy => Self::Postcopy,
            Message::PostcopyReady { .. } => Self::PostcopyReady,
            Message::Missing(_) => Self::Missing,
            Message::Sent { .. } => Self::Sent,
            Message::Arrived(_) => Self::Arrived,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_of_one_kind_and_names_differ() {
        let known: Vec<Kind> = (0..=u16::MAX).filter_map(|number| Kind::try_from(number).ok()).collect();
        assert_eq!(known, Kind::ALL);
        for &kind in Kind::ALL {
            assert_eq!(Kind::try_from(kind as u16), Ok(kind));
            assert_eq!(Kind::ALL.iter().filter(|other| other.name() == kind.name()).count(), 1, "{kind:?}");
        }
    }
}
