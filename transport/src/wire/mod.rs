//! The wire format. `docs/protocol.md` describes every byte; the golden tests in `transport/tests/golden.rs` hold the
//! two together.
//!
//! Three kinds of bytes, all little-endian: a [`Preamble`] opens every connection; [`control::Message`]s travel on the
//! control connection (and answer the preamble on the others); [`frame`]s of pages travel on data streams, receipts back.

use std::fmt;

mod codec;
pub mod control;
pub mod frame;
pub mod postcopy;
pub mod queue;

pub use codec::WireError;
pub(crate) use codec::{Reader, Writer};

/// First bytes of every connection. The first is not ASCII, so that no text protocol can be mistaken for it.
pub const MAGIC: [u8; 8] = *b"\x8fPGFERRY";
/// Lowest protocol version this code speaks.
pub const VERSION_MIN: u16 = 1;
/// Highest protocol version this code speaks.
pub const VERSION_MAX: u16 = 1;
/// Most data streams in a session.
pub const STREAMS_MAX: u16 = 256;
/// Added to a stream's id every time its number is connected anew.
pub const INCARNATION: u16 = STREAMS_MAX;

/// The number of a stream, counted from 0. A stream's *id* says besides which incarnation of that number it is: a stream that was
/// lost and is connected again is another stream, of which nothing holds that was said of the first.
pub const fn stream_number(id: u16) -> u16 {
    id % INCARNATION
}

/// The id of the next incarnation; it wraps around.
pub const fn next_incarnation(id: u16) -> u16 {
    id.wrapping_add(INCARNATION)
}

/// Whether `id` is of a later incarnation than `than`, another id with the same number.
pub const fn is_later_incarnation(id: u16, than: u16) -> bool {
    let ahead = (id >> 8).wrapping_sub(than >> 8) & 0xff;
    ahead != 0 && ahead < 0x80
}

/// Names a session through all its connections; chosen at random by the source.
pub type SessionId = [u8; 16];

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Role {
    /// Control messages; opens the session.
    Control = 1,
    /// A data stream of an open session.
    Stream = 2,
    /// Asks what became of a session, or tells it to go.
    Query = 3,
    /// Takes the place of a control connection that was lost.
    Resume = 4,
    /// Carries pages that the destination's guest is still missing: stream 0 those that it asks for.
    Postcopy = 5,
}

/// First message on every connection, from the connecting side: 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// Lowest version offered.
    pub version_min: u16,
    /// Highest version offered; on streams and queries both are the version the session agreed on.
    pub version_max: u16,
    /// What the connection is for.
    pub role: Role,
    /// Which stream, by its id; 0 for other roles. See [`stream_number`].
    pub stream: u16,
    /// The session.
    pub session: SessionId,
}

/// Without the session's id, which lets whoever knows it into the session.
impl fmt::Debug for Preamble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version_min, version_max, role, stream, session: _ } = self;
        let mut f = f.debug_struct("Preamble");
        f.field("version_min", version_min).field("version_max", version_max);
        f.field("role", role).field("stream", stream).finish_non_exhaustive()
    }
}

impl Preamble {
    /// Bytes on the wire.
    pub const LEN: usize = 32;

    /// Offset 0 magic, 8 version_min, 10 version_max, 12 role, 14 stream, 16 session.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = Writer::default();
        out.bytes(&MAGIC);
        out.u16(self.version_min);
        out.u16(self.version_max);
        out.u16(self.role as u16);
        out.u16(self.stream);
        out.bytes(&self.session);
        out.array()
    }

    /// Reads a preamble; checks magic, role and that the versions offered are a range, not that one of them is spoken here.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        let magic: [u8; 8] = r.array("preamble magic")?;
        if magic != MAGIC {
            return Err(WireError::BadMagic { what: "preamble", found: u64::from_le_bytes(magic) });
        }
        let (version_min, version_max) = (r.u16("version_min")?, r.u16("version_max")?);
        if version_min > version_max {
            return Err(WireError::BadValue { field: "version_min", value: version_min.into() });
        }
        let role = match r.u16("role")? {
            1 => Role::Control,
            2 => Role::Stream,
            3 => Role::Query,
            4 => Role::Resume,
            5 => Role::Postcopy,
            value => return Err(WireError::BadValue { field: "role", value: value.into() }),
        };
        let stream = r.u16("stream")?;
        let most = match role {
            Role::Stream => u16::MAX,
            Role::Postcopy => STREAMS_MAX - 1,
            Role::Control | Role::Query | Role::Resume => 0,
        };
        if stream > most {
            return Err(WireError::BadValue { field: "stream", value: stream.into() });
        }
        Ok(Self { version_min, version_max, role, stream, session: r.array("session id")? })
    }

    /// The highest version both sides speak.
    pub fn agree(&self) -> Result<u16, WireError> {
        let version = self.version_max.min(VERSION_MAX);
        if version < self.version_min || version < VERSION_MIN {
            return Err(WireError::NoCommonVersion { min: self.version_min, max: self.version_max });
        }
        Ok(version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preamble_round_trip_and_refusals() {
        let p = Preamble { version_min: 1, version_max: 3, role: Role::Stream, stream: 7, session: [9; 16] };
        let bytes = p.encode();
        assert_eq!(Preamble::decode(&bytes), Ok(p));
        assert_eq!(p.agree(), Ok(1));
        let future = Preamble { version_min: 2, ..p };
        assert_eq!(future.agree(), Err(WireError::NoCommonVersion { min: 2, max: 3 }));
        for (at, value) in [(0, 0), (8, 9), (12, 9), (12, 1), (13, 1)] {
            let mut bad = bytes;
            bad[at] = value;
            assert!(Preamble::decode(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_is_secret_is_not_printed() {
        let p = Preamble { version_min: 1, version_max: 1, role: Role::Query, stream: 0, session: [217; 16] };
        let text = format!("{p:?}");
        assert!(text.contains("Query") && !text.contains("217"), "{text}");
    }

    #[test]
    fn incarnations_follow_each_other_for_ever() {
        let mut id = 7;
        for _ in 0..1000 {
            let next = next_incarnation(id);
            assert_eq!(stream_number(next), 7);
            assert!(is_later_incarnation(next, id) && !is_later_incarnation(id, next));
            assert!(!is_later_incarnation(id, id));
            id = next;
        }
        assert!(is_later_incarnation(0x7f07, 0x0007) && !is_later_incarnation(0x8007, 0x0007));
    }
}
