//! Control messages: kind, flags and length (8 bytes), the fields, and a checksum over both.

use std::fmt;

use pagecopy::backend::StateBlob;
use pagecopy::layout::{Layout, REGION_NAME_MAX, REGIONS_MAX, Region};
use xxhash_rust::xxh3::xxh3_64;

use super::{Reader, STREAMS_MAX, WireError, Writer};

/// Bytes before a message's fields.
pub const HEADER_LEN: usize = 8;
/// Bytes after them.
pub const CHECKSUM_LEN: usize = 8;
/// Longest text in a message, in bytes.
pub const TEXT_MAX: usize = 4096;
/// Longest description of a machine, in bytes.
pub const MACHINE_MAX: usize = 64 << 10;
/// Longest presence map: one bit for every 2 MiB of the largest guest.
pub const PRESENCE_MAX: usize = 4 << 20;
/// Most pieces of device state.
pub const STATE_BLOBS_MAX: usize = 4096;
/// Longest message that carries device state.
pub const STATE_LEN_MAX: usize = 64 << 20;
/// Longest HELLO; nothing that may come first is longer.
pub const FIRST_LEN_MAX: usize = 2 * PRESENCE_MAX + MACHINE_MAX + REGIONS_MAX * (REGION_NAME_MAX + 32);
/// Most connections of postcopy besides the one for requests.
pub const STREAMS_PUSHING_MAX: u16 = 255;
/// Most runs of missing pages in a message; more take several.
pub const MISSING_RUNS_MAX: usize = 1 << 16;
/// Chunks that one bit of a presence map stands for (2 MiB).
pub const PRESENCE_CHUNKS: u32 = 8;

/// What both sides can do beyond raw and zero pages; a bit each.
pub mod capability {
    /// XBZRLE deltas.
    pub const DELTA: u64 = 1;
    /// zstd frames.
    pub const ZSTD: u64 = 2;
    /// Lost streams are connected anew, and the session goes on over a new control connection.
    pub const RESUME: u64 = 4;
    /// Pages that follow a guest which runs at the destination already.
    pub const POSTCOPY: u64 = 8;
    /// zstd frames that refer to pages which were sent before.
    pub const REFERENCES: u64 = 16;
    /// zstd frames in the sealed frames of postcopy.
    pub const POSTCOPY_ZSTD: u64 = 32;
    /// What encoded pages in postcopy need.
    pub const SEALED: u64 = ZSTD | POSTCOPY | POSTCOPY_ZSTD;
    /// What `auto` chooses from.
    pub const CODECS: u64 = DELTA | ZSTD;
    /// What says how pages may be encoded.
    pub const ENCODINGS: u64 = CODECS | REFERENCES | POSTCOPY_ZSTD;
    /// All that this version knows.
    pub const ALL: u64 = ENCODINGS | RESUME | POSTCOPY;
}

/// What a session is about, from the source.
#[derive(Clone, PartialEq, Eq)]
pub struct Hello {
    /// Seed of every digest and checksum of the session's data.
    pub seed: u64,
    /// What the source can do: [`capability`] bits; unknown bits are ignored.
    pub capabilities: u64,
    /// Data streams the source wants.
    pub streams: u16,
    /// The guest runs and will be handed over; else it is memory alone.
    pub live: bool,
    /// Silence after which the source gives its peer up, in milliseconds.
    pub timeout_ms: u32,
    /// How long the source tries to connect again what was lost, in milliseconds; means nothing without
    /// [`capability::RESUME`].
    pub reconnect_ms: u32,
    /// What the source says of its host, see [`crate::host`]; 0: nothing.
    pub host: u64,
    /// Guest-physical layout.
    pub regions: Vec<Region>,
    /// One bit for every [`PRESENCE_CHUNKS`] chunks: the source may have data there.
    pub presence: Vec<u8>,
    /// The same bits: no page there is a hole, and most are no zeros. May be empty.
    pub dense: Vec<u8>,
    /// Bytes of all pages that are no holes at the source: what the destination needs room for.
    pub data_bytes: u64,
    /// The machine, for the destination to compare with its own; opaque to the protocol.
    pub machine: String,
}

/// Without the seed, which the guest must not learn, and the maps, which are long.
impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Hello");
        f.field("capabilities", &self.capabilities).field("streams", &self.streams);
        f.field("live", &self.live).field("regions", &self.regions).field("machine", &self.machine);
        f.finish_non_exhaustive()
    }
}

/// The destination's answer to [`Hello`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Version of the protocol from here on.
    pub version: u16,
    /// What both sides can do.
    pub capabilities: u64,
    /// Data streams the destination takes, 1 up to what was asked.
    pub streams: u16,
    /// Silence after which the destination gives its peer up, in milliseconds.
    pub timeout_ms: u32,
    /// How long both sides wait for what was lost to be connected again, in milliseconds: at most what the source said.
    pub reconnect_ms: u32,
    /// What the destination says of its host, to a source that is there as well; 0: nothing.
    pub host: u64,
}

/// Where one stream ended: the source says what it sent, the destination what it applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamEnd {
    /// Which stream.
    pub stream: u16,
    /// Frames, without the end frame.
    pub frames: u64,
    /// [`super::frame::fold_receipt`] over all receipts.
    pub fold: u64,
}

/// What a whole transfer came to; equal on both sides or the handover does not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Every stream that ended in order.
    pub streams: Vec<StreamEnd>,
    /// Distinct pages that were carried at least once.
    pub pages: u64,
    /// xxh3-64 of the encoded device state, 0 where there is none.
    pub state: u64,
}

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
    fn from_wire(value: u32) -> Result<Self, WireError> {
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
    /// Complete and waiting for [`Message::Go`].
    Ready = 2,
    /// The destination was told to go: the guest is its own.
    Running = 3,
    /// Given up without having run the guest, for good.
    Abandoned = 4,
}

impl SessionStatus {
    fn from_wire(value: u16) -> Result<Self, WireError> {
        Ok(match value {
            1 => Self::Moving,
            2 => Self::Ready,
            3 => Self::Running,
            4 => Self::Abandoned,
            _ => return Err(WireError::BadValue { field: "session status", value: value.into() }),
        })
    }
}

/// The same pages of some chunks that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRun {
    /// First chunk.
    pub first: u32,
    /// Number of chunks, not 0.
    pub count: u32,
    /// The pages in each of them.
    pub pages: u64,
}

/// How postcopy went, from the destination's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Pages that came after the guest.
    pub pages: u64,
    /// Times that a thread had to wait for one of them.
    pub faults: u64,
    /// Microseconds that half of these waits did not exceed.
    pub p50_us: u64,
    /// Microseconds that all but one in a hundred did not exceed.
    pub p99_us: u64,
    /// Microseconds that threads waited, all of them together.
    pub blocked_us: u64,
}

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
        match self {
            Self::Hello(_) => 1,
            Self::Welcome(_) => 2,
            Self::Error { .. } => 3,
            Self::Ping(_) => 4,
            Self::Pong(_) => 5,
            Self::Prepared => 6,
            Self::Attached { .. } => 7,
            Self::StreamLost { .. } => 8,
            Self::StreamStopped { .. } => 9,
            Self::State(_) => 10,
            Self::Finish(_) => 11,
            Self::Ready(_) => 12,
            Self::Go => 13,
            Self::Running => 14,
            Self::Query => 15,
            Self::Status(_) => 16,
            Self::Resume { .. } => 17,
            Self::Resumed { .. } => 18,
            Self::Resent { .. } => 19,
            Self::Postcopy => 24,
            Self::PostcopyReady { .. } => 25,
            Self::Missing(_) => 26,
            Self::Sent { .. } => 27,
            Self::Arrived(_) => 28,
        }
    }

    /// The message's name, for errors.
    pub fn name(&self) -> &'static str {
        kind_name(self.kind())
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
            Self::Welcome(welcome) => {
                w.u16(welcome.version);
                w.u16(welcome.streams);
                w.u32(welcome.timeout_ms);
                w.u32(welcome.reconnect_ms);
                w.u64(welcome.capabilities);
                w.u64(welcome.host);
            }
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
            Self::Missing(runs) => {
                w.u32(runs.len() as u32);
                for run in runs {
                    w.u32(run.first);
                    w.u32(run.count);
                    w.u64(run.pages);
                }
            }
            Self::Sent { pages } => w.u64(*pages),
            Self::Arrived(arrived) => {
                let Arrived { pages, faults, p50_us, p99_us, blocked_us } = *arrived;
                [pages, faults, p50_us, p99_us, blocked_us].into_iter().for_each(|value| w.u64(value));
            }
            Self::Prepared | Self::Go | Self::Running | Self::Query | Self::Postcopy => {}
        }
    }

    /// Reads the header: kind, and how many bytes of fields follow (checked against the kind's limit, so that they
    /// can be allocated).
    pub fn decode_header(bytes: &[u8; HEADER_LEN]) -> Result<(u16, usize), WireError> {
        let mut r = Reader::new(bytes);
        let (kind, flags, len) = (r.u16("kind")?, r.u16("flags")?, r.u32("length")?);
        if kind_name(kind) == INVALID && bytes.iter().all(|b| b.is_ascii_graphic() || b" \r\n".contains(b)) {
            return Err(WireError::Foreign { first: *bytes });
        }
        if kind_name(kind) == INVALID {
            return Err(WireError::BadValue { field: "message kind", value: kind.into() });
        }
        if flags != 0 {
            return Err(WireError::BadValue { field: "message flags", value: flags.into() });
        }
        let max = match kind {
            1 => FIRST_LEN_MAX,
            10 => STATE_LEN_MAX,
            26 => 4 + MISSING_RUNS_MAX * 16,
            _ => 16 << 10,
        };
        if len as usize > max {
            return Err(WireError::TooLong { field: kind_name(kind), len: len.into(), max: max as u64 });
        }
        Ok((kind, len as usize))
    }

    /// Reads a whole message: header, fields, checksum.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (body, checksum) =
            bytes.split_last_chunk::<CHECKSUM_LEN>().ok_or(WireError::Truncated { field: "checksum" })?;
        let (header, fields) =
            body.split_first_chunk::<HEADER_LEN>().ok_or(WireError::Truncated { field: "message header" })?;
        let (kind, len) = Self::decode_header(header)?;
        if fields.len() != len {
            return Err(WireError::Truncated { field: kind_name(kind) });
        }
        let (expected, found) = (u64::from_le_bytes(*checksum), xxh3_64(body));
        if expected != found {
            return Err(WireError::Checksum { what: kind_name(kind), expected, found });
        }
        let mut r = Reader::new(fields);
        let message = Self::decode_fields(kind, &mut r)?;
        r.end(kind_name(kind))?;
        message.check()?;
        Ok(message)
    }

    fn decode_fields(kind: u16, r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            1 => Self::Hello(Hello::decode(r)?),
            2 => {
                let (version, streams) = (r.u16("version")?, r.u16("streams")?);
                Self::Welcome(Welcome {
                    version,
                    streams,
                    timeout_ms: timeout_ms(r)?,
                    reconnect_ms: r.u32("reconnect_ms")?,
                    capabilities: r.u64("capabilities")?,
                    host: r.u64("host")?,
                })
            }
            3 => Self::Error {
                code: ErrorCode::from_wire(r.u32("error code")?)?,
                text: r.string(TEXT_MAX, "error text")?,
            },
            4 => Self::Ping(r.u64("nonce")?),
            5 => Self::Pong(r.u64("nonce")?),
            6 => Self::Prepared,
            7 => Self::Attached { stream: r.u16("stream")? },
            8 => Self::StreamLost { stream: r.u16("stream")? },
            9 => Self::StreamStopped { stream: r.u16("stream")?, reason: r.string(TEXT_MAX, "reason")? },
            10 => Self::State(decode_state(r)?),
            11 => Self::Finish(Totals::decode(r)?),
            12 => Self::Ready(Totals::decode(r)?),
            13 => Self::Go,
            14 => Self::Running,
            15 => Self::Query,
            16 => Self::Status(SessionStatus::from_wire(r.u16("session status")?)?),
            17 => Self::Resume { epoch: r.u32("epoch")? },
            18 => Self::Resumed { epoch: r.u32("epoch")? },
            19 => Self::Resent { bytes: r.u64("bytes")? },
            24 => Self::Postcopy,
            25 => Self::PostcopyReady { unit_chunks: r.u32("unit")? },
            26 => Self::Missing(decode_runs(r)?),
            27 => Self::Sent { pages: r.u64("pages")? },
            28 => Self::Arrived(Arrived {
                pages: r.u64("pages")?,
                faults: r.u64("faults")?,
                p50_us: r.u64("p50")?,
                p99_us: r.u64("p99")?,
                blocked_us: r.u64("blocked")?,
            }),
            _ => return Err(WireError::BadValue { field: "message kind", value: kind.into() }),
        })
    }
}

/// The bit of a map for a chunk, where the map goes so far.
fn bit_of(map: &[u8], chunk: u32) -> Option<bool> {
    let bit = chunk / PRESENCE_CHUNKS;
    map.get(bit as usize / 8).map(|byte| byte & (1 << (bit % 8)) != 0)
}

impl Hello {
    fn encode(&self, w: &mut Writer) {
        w.u64(self.seed);
        w.u64(self.capabilities);
        w.u16(self.streams);
        w.u16(u16::from(self.live));
        w.u32(self.timeout_ms);
        w.u32(self.reconnect_ms);
        w.u64(self.host);
        w.u32(pagecopy::layout::PAGE_SIZE as u32);
        w.u32(pagecopy::layout::CHUNK_PAGES as u32);
        w.u32(self.regions.len() as u32);
        for region in &self.regions {
            w.u64(region.gpa);
            w.u64(region.len);
            w.blob(region.name.as_bytes());
        }
        w.blob(&self.presence);
        w.blob(&self.dense);
        w.u64(self.data_bytes);
        w.blob(self.machine.as_bytes());
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let (seed, capabilities, streams) = (r.u64("seed")?, r.u64("capabilities")?, r.u16("streams")?);
        super::check::streams(streams)?;
        let live = match r.u16("live")? {
            0 => false,
            1 => true,
            value => return Err(WireError::BadValue { field: "live", value: value.into() }),
        };
        let (timeout_ms, reconnect_ms) = (timeout_ms(r)?, r.u32("reconnect_ms")?);
        let host = r.u64("host")?;
        for (field, expected) in
            [("page_size", pagecopy::layout::PAGE_SIZE), ("chunk_pages", pagecopy::layout::CHUNK_PAGES)]
        {
            let value = r.u32(field)?;
            if value as usize != expected {
                return Err(WireError::BadValue { field, value: value.into() });
            }
        }
        let mut regions = Vec::new();
        for _ in 0..r.count(REGIONS_MAX, "regions")? {
            let (gpa, len) = (r.u64("region gpa")?, r.u64("region length")?);
            regions.push(Region { gpa, len, name: r.string(REGION_NAME_MAX, "region name")? });
        }
        let presence = r.blob(PRESENCE_MAX, "presence map")?.to_vec();
        let dense = r.blob(PRESENCE_MAX, "dense map")?.to_vec();
        let data_bytes = r.u64("data_bytes")?;
        let machine = r.string(MACHINE_MAX, "machine")?;
        Ok(Self {
            seed,
            capabilities,
            streams,
            live,
            timeout_ms,
            reconnect_ms,
            host,
            regions,
            presence,
            dense,
            data_bytes,
            machine,
        })
    }

    /// Whether the source may have data in a chunk, by the presence map; chunks beyond the map count as present.
    pub fn present(&self, chunk: u32) -> bool {
        bit_of(&self.presence, chunk).unwrap_or(true)
    }

    /// Whether memory around a chunk is full of data, by the dense map.
    pub fn is_dense(&self, chunk: u32) -> bool {
        bit_of(&self.dense, chunk).unwrap_or(false)
    }

    /// The bytes a presence map of this layout has.
    pub fn presence_len(layout: &Layout) -> usize {
        layout.chunks().div_ceil(PRESENCE_CHUNKS).div_ceil(8) as usize
    }
}

impl Totals {
    fn encode(&self, w: &mut Writer) {
        w.u32(self.streams.len() as u32);
        for end in &self.streams {
            w.u16(end.stream);
            w.u64(end.frames);
            w.u64(end.fold);
        }
        w.u64(self.pages);
        w.u64(self.state);
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut streams = Vec::new();
        for _ in 0..r.count(STREAMS_MAX.into(), "streams")? {
            streams.push(StreamEnd {
                stream: r.u16("stream")?,
                frames: r.u64("frames")?,
                fold: r.u64("fold")?,
            });
        }
        Ok(Self { streams, pages: r.u64("pages")?, state: r.u64("state digest")? })
    }
}

/// A peer's time-out; one below a second would call this side dead between two of its pings.
fn timeout_ms(r: &mut Reader<'_>) -> Result<u32, WireError> {
    match r.u32("timeout_ms")? {
        short @ 0..1000 => Err(WireError::BadValue { field: "timeout_ms", value: short.into() }),
        timeout => Ok(timeout),
    }
}

/// Digest of device state as it travels; 0 for none.
pub fn state_digest(blobs: &[StateBlob]) -> u64 {
    if blobs.is_empty() {
        return 0;
    }
    let mut w = Writer::default();
    encode_state(blobs, &mut w);
    xxh3_64(&w.into_vec())
}

fn encode_state(blobs: &[StateBlob], w: &mut Writer) {
    w.u32(blobs.len() as u32);
    for blob in blobs {
        w.blob(blob.name.as_bytes());
        w.u32(blob.version);
        w.blob(&blob.bytes);
    }
}

fn decode_state(r: &mut Reader<'_>) -> Result<Vec<StateBlob>, WireError> {
    let mut blobs = Vec::new();
    for _ in 0..r.count(STATE_BLOBS_MAX, "state blobs")? {
        let name = r.string(REGION_NAME_MAX, "state name")?;
        let version = r.u32("state version")?;
        blobs.push(StateBlob { name, version, bytes: r.blob(STATE_LEN_MAX, "state bytes")?.to_vec() });
    }
    Ok(blobs)
}

fn decode_runs(r: &mut Reader<'_>) -> Result<Vec<ChunkRun>, WireError> {
    let mut runs = Vec::new();
    for _ in 0..r.count(MISSING_RUNS_MAX, "runs of missing pages")? {
        runs.push(ChunkRun { first: r.u32("first chunk")?, count: r.u32("chunks")?, pages: r.u64("pages")? });
    }
    Ok(runs)
}

/// Cuts an error text at the protocol's limit, on a character's border.
fn shorten(text: &str) -> &str {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Name of a kind that does not exist.
const INVALID: &str = "INVALID";

fn kind_name(kind: u16) -> &'static str {
    match kind {
        1 => "HELLO",
        2 => "WELCOME",
        3 => "ERROR",
        4 => "PING",
        5 => "PONG",
        6 => "PREPARED",
        7 => "ATTACHED",
        8 => "STREAM_LOST",
        9 => "STREAM_STOPPED",
        10 => "STATE",
        11 => "FINISH",
        12 => "READY",
        13 => "GO",
        14 => "RUNNING",
        15 => "QUERY",
        16 => "STATUS",
        17 => "RESUME",
        18 => "RESUMED",
        19 => "RESENT",
        24 => "POSTCOPY",
        25 => "POSTCOPY_READY",
        26 => "MISSING",
        27 => "SENT",
        28 => "ARRIVED",
        _ => INVALID,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
                host: 7,
                regions: vec![Region { name: "ram".into(), gpa: 0, len: 1 << 20 }],
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
                host: 8,
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
        for kind in (1..=19).chain(24..=28u16) {
            let mut header = [0; 8];
            header[..2].copy_from_slice(&kind.to_le_bytes());
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
        ] {
            let error = message.check().expect_err(field);
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
        let longest = Message::State(vec![blob("s", whole)]);
        assert_eq!(longest.check(), Ok(()));
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
