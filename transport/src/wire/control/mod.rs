//! Control messages: kind, flags and length (8 bytes), the fields, and a checksum over both.

mod base;
pub mod capability;
mod hello;
mod kind;
mod limits;
mod postcopy;
mod state;
mod status;
mod totals;

use pagecopy::backend::StateBlob;
use xxhash_rust::xxh3::xxh3_64;

pub use base::{BASE_CHUNKS_MAX, Base, BaseChunk};
pub use hello::{FIRST_LEN_MAX, Hello, MACHINE_MAX, PRESENCE_CHUNKS, PRESENCE_MAX, Welcome};
pub(crate) use hello::{read_regions, write_regions};
use kind::Kind;
pub use postcopy::{Arrived, ChunkRun, MISSING_RUNS_MAX, STREAMS_PUSHING_MAX};
use postcopy::{check_runs, decode_runs, encode_runs};
use state::check_state;
pub use state::{STATE_BLOBS_MAX, STATE_LEN_MAX, state_digest};
pub(crate) use state::{decode_state, encode_state};
pub use status::{ErrorCode, SessionStatus};
pub use totals::{StreamEnd, Totals};

use super::{Reader, WireError, Writer};

/// Bytes before a message's fields.
pub const HEADER_LEN: usize = 8;
/// Bytes after them.
pub const CHECKSUM_LEN: usize = 8;
/// Longest text in a message, in bytes.
pub const TEXT_MAX: usize = 4096;

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: opens the session.
    Hello(Hello),
    /// Destination: accepts it.
    Welcome(Welcome),
    /// Either: it is over, and why.
    Error {
        /// For programs.
        code: ErrorCode,
        /// For people.
        text: String,
    },
    /// Either: are you there?
    Ping(u64),
    /// Either: yes.
    Pong(u64),
    /// Destination: what an older copy of the guest holds, so that it need not come again. Several add up.
    Base(Base),
    /// Destination: memory is ready, streams may connect.
    Prepared,
    /// Destination, on a data stream: frames may come.
    Attached {
        /// Which stream.
        stream: u16,
    },
    /// Source: this stream is dead to it; stop its worker.
    StreamLost {
        /// Which stream.
        stream: u16,
    },
    /// Destination: that worker has stopped; nothing more of it reaches memory.
    StreamStopped {
        /// Which stream.
        stream: u16,
        /// Why, if the destination knows more than that it was told to; else empty.
        reason: String,
    },
    /// Source: device state of the paused guest.
    State(Vec<StateBlob>),
    /// Source: everything was sent and receipted.
    Finish(Totals),
    /// Destination: everything is applied and equal; only [`Message::Go`] is missing.
    Ready(Totals),
    /// Source: the guest is yours. The source never resumes it by itself from here on.
    Go,
    /// Destination: it is mine. Source, last of all: I know, nobody will ask after the session any more.
    Running,
    /// Source, on a query connection: what became of the session?
    Query,
    /// Destination's answer.
    Status(SessionStatus),
    /// Source, first on a connection that takes the place of the lost one: stop every stream, take back READY and the device
    /// state, and go on.
    Resume {
        /// Counts a session's attempts to resume; only one above all others that came is taken.
        epoch: u32,
    },
    /// Destination: done. Streams may connect.
    Resumed {
        /// Of the RESUME that it answers.
        epoch: u32,
    },
    /// Source: this much was sent on streams that were lost, and is sent again; for the destination's report.
    Resent {
        /// Wire bytes in all.
        bytes: u64,
    },
    /// Source: the guest will run before all its pages are there; get ready for that.
    Postcopy,
    /// Destination: so be it.
    PostcopyReady {
        /// Chunks that memory is brought in by at a time, from a region's start; 0 for single pages.
        unit_chunks: u32,
    },
    /// Source: these pages are still to come; whatever is there of them is stale. Several add up.
    Missing(Vec<ChunkRun>),
    /// Source: this many pages were said to be missing, and all were receipted.
    Sent {
        /// How many.
        pages: u64,
    },
    /// Destination: no page is missing any more; the source may forget the guest.
    Arrived(Arrived),
}

impl Message {
    /// The number that stands for the message's kind.
    pub fn kind(&self) -> u16 {
        Kind::from(self) as u16
    }

    /// The message's name, for errors.
    pub fn name(&self) -> &'static str {
        Kind::from(self).name()
    }

    /// Header, fields and checksum. Of a message that keeps within [its limits](Self::check): whoever takes content from elsewhere, such
    /// as a VMM's, asks first.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert_eq!(self.check(), Ok(()), "{} is checked before it is sent", self.name());
        let mut w = Writer::default();
        self.encode_fields(&mut w);
        let fields = w.into_vec();
        let mut out = Writer::default();
        out.u16(self.kind());
        out.u16(0);
        out.u32(fields.len() as u32);
        out.bytes(&fields);
        let mut out = out.into_vec();
        let checksum = xxh3_64(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    fn encode_fields(&self, w: &mut Writer) {
        match self {
            Self::Hello(hello) => hello.encode(w),
            Self::Welcome(welcome) => welcome.encode(w),
            Self::Error { code, text } => {
                w.u32(*code as u32);
                w.blob(shorten(text).as_bytes());
            }
            Self::Ping(nonce) | Self::Pong(nonce) => w.u64(*nonce),
            Self::Attached { stream } | Self::StreamLost { stream } => w.u16(*stream),
            Self::StreamStopped { stream, reason } => {
                w.u16(*stream);
                w.blob(shorten(reason).as_bytes());
            }
            Self::State(blobs) => encode_state(blobs, w),
            Self::Finish(totals) | Self::Ready(totals) => totals.encode(w),
            Self::Status(status) => w.u16(*status as u16),
            Self::Resume { epoch } | Self::Resumed { epoch } => w.u32(*epoch),
            Self::Resent { bytes } => w.u64(*bytes),
            Self::PostcopyReady { unit_chunks } => w.u32(*unit_chunks),
            Self::Base(base) => base.encode(w),
            Self::Missing(runs) => encode_runs(runs, w),
            Self::Sent { pages } => w.u64(*pages),
            Self::Arrived(arrived) => arrived.encode(w),
            Self::Prepared | Self::Go | Self::Running | Self::Query | Self::Postcopy => {}
        }
    }

    /// Reads the header: kind, and how many bytes of fields follow (checked against the kind's limit, so that they
    /// can be allocated).
    pub fn decode_header(bytes: &[u8; HEADER_LEN]) -> Result<(u16, usize), WireError> {
        Self::header(bytes).map(|(kind, len)| (kind as u16, len))
    }

    fn header(bytes: &[u8; HEADER_LEN]) -> Result<(Kind, usize), WireError> {
        let mut r = Reader::new(bytes);
        let (kind, flags, len) = (r.u16("kind")?, r.u16("flags")?, r.u32("length")?);
        let kind = Kind::try_from(kind).map_err(|error| {
            let is_text = bytes.iter().all(|b| b.is_ascii_graphic() || b" \r\n".contains(b));
            if is_text { WireError::Foreign { first: *bytes } } else { error }
        })?;
        if flags != 0 {
            return Err(WireError::BadValue { field: "message flags", value: flags.into() });
        }
        if len as usize > kind.limit() {
            let max = kind.limit() as u64;
            return Err(WireError::TooLong { field: kind.name(), len: len.into(), max });
        }
        Ok((kind, len as usize))
    }

    /// Reads a whole message: header, fields, checksum.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (body, checksum) =
            bytes.split_last_chunk::<CHECKSUM_LEN>().ok_or(WireError::Truncated { field: "checksum" })?;
        let (header, fields) =
            body.split_first_chunk::<HEADER_LEN>().ok_or(WireError::Truncated { field: "message header" })?;
        let (kind, len) = Self::header(header)?;
        if fields.len() != len {
            return Err(WireError::Truncated { field: kind.name() });
        }
        let (expected, found) = (u64::from_le_bytes(*checksum), xxh3_64(body));
        if expected != found {
            return Err(WireError::Checksum { what: kind.name(), expected, found });
        }
        let mut r = Reader::new(fields);
        let message = Self::decode_fields(kind, &mut r)?;
        r.end(kind.name())?;
        message.check()?;
        Ok(message)
    }

    /// Whether the message keeps within the protocol's limits. Both sides ask: who sends before it does, who receives after it has read.
    ///
    /// # Errors
    /// The field that does not, by name.
    pub fn check(&self) -> Result<(), WireError> {
        match self {
            Self::Hello(hello) => hello.check(),
            Self::State(blobs) => check_state(blobs),
            Self::Finish(totals) | Self::Ready(totals) => totals.check(),
            Self::Base(base) => base.check(),
            Self::Missing(runs) => check_runs(runs),
            _ => Ok(()),
        }
    }

    fn decode_fields(kind: Kind, r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            Kind::Hello => Self::Hello(Hello::decode(r)?),
            Kind::Welcome => Self::Welcome(Welcome::decode(r)?),
            Kind::Error => Self::Error {
                code: ErrorCode::from_wire(r.u32("error code")?)?,
                text: r.string(TEXT_MAX, "error text")?,
            },
            Kind::Ping => Self::Ping(r.u64("nonce")?),
            Kind::Pong => Self::Pong(r.u64("nonce")?),
            Kind::Prepared => Self::Prepared,
            Kind::Attached => Self::Attached { stream: r.u16("stream")? },
            Kind::StreamLost => Self::StreamLost { stream: r.u16("stream")? },
            Kind::StreamStopped => {
                Self::StreamStopped { stream: r.u16("stream")?, reason: r.string(TEXT_MAX, "reason")? }
            }
            Kind::State => Self::State(decode_state(r)?),
            Kind::Finish => Self::Finish(Totals::decode(r)?),
            Kind::Ready => Self::Ready(Totals::decode(r)?),
            Kind::Go => Self::Go,
            Kind::Running => Self::Running,
            Kind::Query => Self::Query,
            Kind::Status => Self::Status(SessionStatus::from_wire(r.u16("session status")?)?),
            Kind::Resume => Self::Resume { epoch: r.u32("epoch")? },
            Kind::Resumed => Self::Resumed { epoch: r.u32("epoch")? },
            Kind::Resent => Self::Resent { bytes: r.u64("bytes")? },
            Kind::Base => Self::Base(Base::decode(r)?),
            Kind::Postcopy => Self::Postcopy,
            Kind::PostcopyReady => Self::PostcopyReady { unit_chunks: r.u32("unit")? },
            Kind::Missing => Self::Missing(decode_runs(r)?),
            Kind::Sent => Self::Sent { pages: r.u64("pages")? },
            Kind::Arrived => Self::Arrived(Arrived::decode(r)?),
        })
    }
}

/// Cuts an error text at the protocol's limit, on a character's border.
fn shorten(text: &str) -> &str {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use pagecopy::layout::{REGION_NAME_MAX, REGIONS_MAX, Region};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_hello_is_printed_without_its_seed() {
        let Some(Message::Hello(hello)) = samples().into_iter().next() else {
            unreachable!("it is the first")
        };
        let text = format!("{:?}", Hello { seed: 0x7e57_5eed, ..hello });
        assert!(text.contains("streams: 4") && !text.contains(&0x7e57_5eed_u64.to_string()), "{text}");
    }

    #[test]
    fn a_peer_that_would_not_wait_for_pings_is_refused() {
        for timeout_ms in [0, 999, 1000] {
            let messages = samples().into_iter().take(2).map(|message| match message {
                Message::Hello(hello) => Message::Hello(Hello { timeout_ms, ..hello }),
                Message::Welcome(welcome) => Message::Welcome(Welcome { timeout_ms, ..welcome }),
                other => other,
            });
            for message in messages {
                let decoded = Message::decode(&message.encode());
                let refused = Err(WireError::BadValue { field: "timeout_ms", value: timeout_ms.into() });
                assert_eq!(decoded, if timeout_ms < 1000 { refused } else { Ok(message) });
            }
        }
    }

    fn samples() -> Vec<Message> {
        let totals =
            Totals { streams: vec![StreamEnd { stream: 1, frames: 2, fold: 3 }], pages: 4, state: 5 };
        vec![
            Message::Hello(Hello {
                seed: 1,
                capabilities: 3,
                streams: 4,
                live: true,
                timeout_ms: 10_000,
                reconnect_ms: 300_000,
                regions: vec![Region::new("ram", 0, 1 << 20), Region::unplaced("vram", 4096)],
                presence: vec![1],
                dense: vec![1],
                data_bytes: 4096,
                machine: "{}".into(),
            }),
            Message::Welcome(Welcome {
                version: 1,
                capabilities: 3,
                streams: 4,
                timeout_ms: 10_000,
                reconnect_ms: 60_000,
            }),
            Message::Error { code: ErrorCode::Busy, text: "no".into() },
            Message::Ping(1),
            Message::Pong(2),
            Message::Prepared,
            Message::Attached { stream: 3 },
            Message::StreamLost { stream: 3 },
            Message::StreamStopped { stream: 3, reason: "cut".into() },
            Message::State(vec![StateBlob { name: "vm".into(), version: 1, bytes: vec![1, 2, 3] }]),
            Message::Finish(totals.clone()),
            Message::Ready(totals),
            Message::Go,
            Message::Running,
            Message::Query,
            Message::Status(SessionStatus::Ready),
            Message::Resume { epoch: 1 },
            Message::Resumed { epoch: 2 },
            Message::Resent { bytes: 3 },
            Message::Base(Base {
                seed: 1,
                chunks: vec![BaseChunk { chunk: 3, pages: 0b101, seals: vec![7, 8] }],
            }),
            Message::Postcopy,
            Message::PostcopyReady { unit_chunks: 8 },
            Message::Missing(vec![ChunkRun { first: 3, count: 2, pages: 5 }]),
            Message::Sent { pages: 4 },
            Message::Arrived(Arrived { pages: 4, faults: 3, p50_us: 2, p99_us: 1, blocked_us: 9 }),
        ]
    }

    #[test]
    fn round_trip_and_every_flipped_bit_and_every_cut() {
        for message in samples() {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Ok(message.clone()));
            for bit in 0..bytes.len() * 8 {
                let mut bad = bytes.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(Message::decode(&bad).is_err(), "{} bit {bit}", message.name());
            }
            for len in 0..bytes.len() {
                assert!(Message::decode(&bytes[..len]).is_err(), "{} cut at {len}", message.name());
            }
        }
    }

    #[test]
    fn hostile_lengths_are_refused_before_allocation() {
        for &kind in Kind::ALL {
            let mut header = [0; 8];
            header[..2].copy_from_slice(&(kind as u16).to_le_bytes());
            header[4..].copy_from_slice(&u32::MAX.to_le_bytes());
            assert!(matches!(Message::decode_header(&header), Err(WireError::TooLong { .. })));
        }
        assert!(Message::decode_header(&[99, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn whoever_sends_knows_the_limits() {
        let hello = |change: &dyn Fn(&mut Hello)| {
            let Message::Hello(mut hello) = samples().remove(0) else { unreachable!() };
            change(&mut hello);
            Message::Hello(hello)
        };
        let name = "n".repeat(REGION_NAME_MAX + 1);
        let blob = |name: &str, len| StateBlob { name: name.into(), version: 1, bytes: vec![0; len] };
        let whole = STATE_LEN_MAX - 4 - 12 - 1;
        let totals = Totals { streams: vec![], pages: 0, state: 0 };
        let end = StreamEnd { stream: 0, frames: 0, fold: 0 };
        let base = |chunks: &[(u32, u64, usize)]| {
            let of = |&(chunk, pages, seals)| BaseChunk { chunk, pages, seals: vec![0; seals] };
            Message::Base(Base { seed: 0, chunks: chunks.iter().map(of).collect() })
        };
        for (message, field) in [
            (hello(&|h| h.machine = "m".repeat(MACHINE_MAX + 1)), "machine"),
            (hello(&|h| h.regions[0].name.clone_from(&name)), "region name"),
            (hello(&|h| h.regions = vec![h.regions[0].clone(); REGIONS_MAX + 1]), "regions"),
            (hello(&|h| h.presence = vec![0; PRESENCE_MAX + 1]), "presence map"),
            (hello(&|h| h.dense = vec![0; PRESENCE_MAX + 1]), "dense map"),
            (hello(&|h| h.streams = 0), "streams"),
            (Message::State(vec![blob(&name, 1)]), "state name"),
            (Message::State(vec![blob("s", 0); STATE_BLOBS_MAX + 1]), "state blobs"),
            (Message::State(vec![blob("s", whole + 1)]), "STATE"),
            (Message::Finish(Totals { streams: vec![end; 257], ..totals }), "streams"),
            (Message::Missing(vec![ChunkRun { first: 0, count: 0, pages: 1 }]), "empty"),
            (base(&[(0, 0, 0)]), "without pages"),
            (base(&[(0, 3, 1)]), "without pages"),
            (base(&[(1, 1, 1), (1, 1, 1)]), "out of order"),
            (base(&vec![(0, 1, 1); BASE_CHUNKS_MAX + 1]), "chunks of a base"),
        ] {
            let error = message.check().expect_err(field);
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
        let longest = Message::State(vec![blob("s", whole)]);
        assert_eq!(longest.check(), Ok(()));
        assert_eq!(Message::decode(&longest.encode()), Ok(longest));
        let full: Vec<_> = (0..BASE_CHUNKS_MAX as u32).map(|chunk| (chunk, u64::MAX, 64)).collect();
        let longest = base(&full);
        assert_eq!(Message::decode(&longest.encode()), Ok(longest));
        let longest = hello(&|h| h.machine = "m".repeat(MACHINE_MAX));
        assert_eq!(Message::decode(&longest.encode()), Ok(longest));
    }

    #[test]
    fn another_protocol_is_called_that() {
        let error = Message::decode_header(b"HTTP/1.1").unwrap_err().to_string();
        assert!(error.contains("something else than pageferry answers there") && error.contains("HTTP/1.1"));
    }

    #[test]
    fn long_error_texts_are_cut() {
        let text = "ä".repeat(TEXT_MAX);
        let bytes = Message::Error { code: ErrorCode::Local, text }.encode();
        assert!(matches!(Message::decode(&bytes), Ok(Message::Error { text, .. }) if text.len() == TEXT_MAX));
    }

    proptest! {
        #[test]
        fn any_fields_are_refused_or_read(kind in 0u16..32, fields: Vec<u8>) {
            let mut bytes = [kind.to_le_bytes(), [0, 0]].concat();
            bytes.extend_from_slice(&(fields.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&fields);
            let checksum = xxh3_64(&bytes);
            bytes.extend_from_slice(&checksum.to_le_bytes());
            let _ = Message::decode(&bytes);
        }
    }
}
