//! What travels over a queue pair of RDMA: the private data of the connection request and its answers, and messages.
//!
//! A message is a header of 32 bytes and a payload. [`Kind::Data`] messages carry the bytes of a stream as a socket would, cut
//! anywhere; raw pages of frames that say so are placed by RDMA WRITE before the message that ends their header.

use pagecopy::digest::PageHasher;
use xxhash_rust::xxh3::xxh3_64;

use super::control::ErrorCode;
use super::{Preamble, Reader, WireError, Writer};

/// Longest message of either side, header included.
pub const MESSAGE_BYTES: usize = 64 << 10;
/// Longest message of the destination, header included.
pub const ANSWER_BYTES: usize = 8 << 10;
/// Most buffers that a side may announce.
pub const BUFFERS_MAX: u32 = 4096;
/// Fewest buffers that a side may announce.
pub const BUFFERS_MIN: u32 = 16;
/// Most chunks in one registration (64 MiB).
pub const REGISTER_CHUNKS_MAX: u32 = 256;
/// Longest text of a refusal.
pub const REFUSAL_TEXT_MAX: usize = 128;

const ACCEPT_MAGIC: u32 = u32::from_le_bytes(*b"PGA1");
const REFUSE_MAGIC: u32 = u32::from_le_bytes(*b"PGX1");
const MESSAGE_MAGIC: u32 = u32::from_le_bytes(*b"PGM1");

/// Private data of the connection request, from the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// As on every connection; the role is a stream.
    pub preamble: Preamble,
}

impl Request {
    /// Bytes on the wire.
    pub const LEN: usize = Preamble::LEN + 8;

    /// Offset 0 preamble, 32 checksum of bytes 0 to 32 (no seed).
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = Writer::default();
        out.bytes(&self.preamble.encode());
        sealed(out)
    }

    /// Reads a request; bytes after it are the transport's filling.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let bytes = opened::<{ Self::LEN }>(bytes, "connection request")?;
        let preamble = bytes.first_chunk().ok_or(WireError::Truncated { field: "preamble" })?;
        Ok(Self { preamble: Preamble::decode(preamble)? })
    }
}

/// Private data of the answer, from the destination: the stream is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accept {
    /// The stream, as in the preamble.
    pub stream: u16,
    /// Messages that the source may send ahead of their buffers' reuse.
    pub buffers: u32,
    /// Names the adapter that the stream came in on: registrations hold for streams of one adapter.
    pub adapter: u32,
    /// Bytes of guest memory that the destination keeps registered at most.
    pub pinned_max: u64,
}

impl Accept {
    /// Bytes on the wire.
    pub const LEN: usize = 32;

    /// Offset 0 magic, 4 stream, 6 zero (u16), 8 buffers, 12 adapter, 16 pinned_max, 24 checksum of bytes 0 to 24 (no seed).
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = Writer::default();
        out.u32(ACCEPT_MAGIC);
        out.u16(self.stream);
        out.u16(0);
        out.u32(self.buffers);
        out.u32(self.adapter);
        out.u64(self.pinned_max);
        sealed(out)
    }

    /// Reads an answer; bytes after it are the transport's filling.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let bytes = opened::<{ Self::LEN }>(bytes, "connection answer")?;
        let mut r = Reader::new(&bytes);
        magic(&mut r, ACCEPT_MAGIC, "connection answer")?;
        let stream = r.u16("stream")?;
        zero(r.u16("reserved")?.into())?;
        let buffers = r.u32("buffers").and_then(check_buffers)?;
        Ok(Self { stream, buffers, adapter: r.u32("adapter")?, pinned_max: r.u64("pinned_max")? })
    }
}

/// Private data of a rejection, from the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub code: u32,
    /// For people; cut to [`REFUSAL_TEXT_MAX`] bytes.
    pub text: String,
}

impl Refusal {
    /// Bytes on the wire: all that a rejection has room for.
    pub const LEN: usize = 12 + REFUSAL_TEXT_MAX + 8;

    /// A refusal with as much of the text as has room.
    pub fn new(code: ErrorCode, text: &str) -> Self {
        let mut end = text.len().min(REFUSAL_TEXT_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self { code: code as u32, text: text[..end].into() }
    }

    /// Offset 0 magic, 4 code, 8 length of the text, 12 text (filled up with zeros to 128 bytes), 140 checksum of bytes 0 to 140
    /// (no seed).
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = Writer::default();
        let text = &self.text.as_bytes()[..self.text.len().min(REFUSAL_TEXT_MAX)];
        out.u32(REFUSE_MAGIC);
        out.u32(self.code);
        out.u32(text.len() as u32);
        out.bytes(text);
        out.bytes(&[0; REFUSAL_TEXT_MAX][text.len()..]);
        sealed(out)
    }

    /// Reads a refusal.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let bytes = opened::<{ Self::LEN }>(bytes, "refusal")?;
        let mut r = Reader::new(&bytes);
        magic(&mut r, REFUSE_MAGIC, "refusal")?;
        let code = r.u32("code")?;
        Ok(Self { code, text: r.string(REFUSAL_TEXT_MAX, "text")? })
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Either: bytes of the stream: frames from the source, receipts from the destination.
    Data = 1,
    /// Source: register this range. Destination: what came of it.
    Register = 2,
    /// Source: it writes to this range no more.
    Release = 3,
    /// Destination: nothing follows.
    End = 4,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageHeader {
    /// What it is.
    pub kind: Kind,
    /// Bytes of payload.
    pub len: u32,
    /// Messages of the peer that were taken in all: their buffers are posted again.
    pub taken: u64,
}

impl MessageHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 32;

    /// Offset 0 magic, 4 kind, 6 zero (u16), 8 len, 12 zero (u32), 16 taken, 24 checksum of bytes 0 to 24.
    pub fn encode(&self, hasher: &PageHasher) -> [u8; Self::LEN] {
        let mut out = Writer::default();
        out.u32(MESSAGE_MAGIC);
        out.u16(self.kind as u16);
        out.u16(0);
        out.u32(self.len);
        out.u32(0);
        out.u64(self.taken);
        let mut bytes = out.into_vec();
        bytes.extend_from_slice(&hasher.checksum(&bytes).to_le_bytes());
        bytes.try_into().expect("the fields have the structure's fixed length")
    }

    /// Reads the header of a whole message and returns its payload with it.
    pub fn decode<'a>(message: &'a [u8], hasher: &PageHasher) -> Result<(Self, &'a [u8]), WireError> {
        let (head, payload) = message
            .split_first_chunk::<{ Self::LEN }>()
            .ok_or(WireError::Truncated { field: "message header" })?;
        let mut r = Reader::new(head);
        magic(&mut r, MESSAGE_MAGIC, "message")?;
        let kind = r.u16("message kind")?;
        zero(r.u16("reserved")?.into())?;
        let len = r.u32("message length")?;
        zero(r.u32("reserved")?.into())?;
        let taken = r.u64("taken")?;
        let (expected, found) = (r.u64("checksum")?, hasher.checksum(&head[..24]));
        if expected != found {
            return Err(WireError::Checksum { what: "message header", expected, found });
        }
        let kind = match kind {
            1 => Kind::Data,
            2 => Kind::Register,
            3 => Kind::Release,
            4 => Kind::End,
            value => return Err(WireError::BadValue { field: "message kind", value: value.into() }),
        };
        if len as usize != payload.len() {
            return Err(WireError::BadValue { field: "message length", value: len.into() });
        }
        Ok((Self { kind, len, taken }, payload))
    }
}

/// A range of chunks of one region, to be registered or let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// First chunk.
    pub first: u32,
    /// Number of chunks, 1 to [`REGISTER_CHUNKS_MAX`].
    pub count: u32,
}

impl Range {
    /// Bytes on the wire.
    pub const LEN: usize = 16;

    /// Offset 0 first, 4 count, 8 checksum of bytes 0 to 8.
    pub fn encode(&self, hasher: &PageHasher) -> [u8; Self::LEN] {
        let mut out = Writer::default();
        out.u32(self.first);
        out.u32(self.count);
        let mut bytes = out.into_vec();
        bytes.extend_from_slice(&hasher.checksum(&bytes).to_le_bytes());
        bytes.try_into().expect("the fields have the structure's fixed length")
    }

    /// Reads a range; whether the layout has it is the caller's to check.
    pub fn decode(payload: &[u8], hasher: &PageHasher) -> Result<Self, WireError> {
        let body = checked(payload, Self::LEN, "range", hasher)?;
        let mut r = Reader::new(body);
        let (first, count) = (r.u32("first chunk")?, r.u32("number of chunks")?);
        if !(1..=REGISTER_CHUNKS_MAX).contains(&count) {
            return Err(WireError::BadValue { field: "number of chunks", value: count.into() });
        }
        Ok(Self { first, count })
    }
}

/// What came of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// The range.
    pub range: Range,
    /// Where its first byte lies and the key to write there; `None`: it cannot be registered, its pages travel in messages.
    pub place: Option<(u64, u32)>,
}

impl Registered {
    /// Bytes on the wire.
    pub const LEN: usize = 32;

    /// Offset 0 first, 4 count, 8 status (0 registered, 1 not), 12 key, 16 address, 24 checksum of bytes 0 to 24.
    pub fn encode(&self, hasher: &PageHasher) -> [u8; Self::LEN] {
        let (address, key) = self.place.unwrap_or_default();
        let mut out = Writer::default();
        out.u32(self.range.first);
        out.u32(self.range.count);
        out.u32(self.place.is_none().into());
        out.u32(key);
        out.u64(address);
        let mut bytes = out.into_vec();
        bytes.extend_from_slice(&hasher.checksum(&bytes).to_le_bytes());
        bytes.try_into().expect("the fields have the structure's fixed length")
    }

    /// Reads an answer.
    pub fn decode(payload: &[u8], hasher: &PageHasher) -> Result<Self, WireError> {
        let body = checked(payload, Self::LEN, "answer to a registration", hasher)?;
        let mut r = Reader::new(body);
        let range = Range { first: r.u32("first chunk")?, count: r.u32("number of chunks")? };
        let (status, key, address) = (r.u32("status")?, r.u32("key")?, r.u64("address")?);
        let place = match status {
            0 => Some((address, key)),
            1 => None,
            value => return Err(WireError::BadValue { field: "status", value: value.into() }),
        };
        Ok(Self { range, place })
    }
}

/// Appends the checksum without a seed: for what travels before the seed is known to be.
fn sealed<const N: usize>(out: Writer) -> [u8; N] {
    let mut bytes = out.into_vec();
    bytes.extend_from_slice(&xxh3_64(&bytes).to_le_bytes());
    bytes.try_into().expect("the fields have the structure's fixed length")
}

fn opened<const N: usize>(bytes: &[u8], what: &'static str) -> Result<[u8; N], WireError> {
    let bytes = *bytes.first_chunk::<N>().ok_or(WireError::Truncated { field: what })?;
    let (body, checksum) = bytes.split_last_chunk::<8>().ok_or(WireError::Truncated { field: what })?;
    let (expected, found) = (u64::from_le_bytes(*checksum), xxh3_64(body));
    if expected == found { Ok(bytes) } else { Err(WireError::Checksum { what, expected, found }) }
}

/// The body of a payload of exactly `len` bytes whose checksum is right.
fn checked<'a>(
    payload: &'a [u8],
    len: usize,
    what: &'static str,
    hasher: &PageHasher,
) -> Result<&'a [u8], WireError> {
    let (body, checksum) = payload.split_last_chunk::<8>().ok_or(WireError::Truncated { field: what })?;
    if payload.len() != len {
        return Err(WireError::BadValue { field: "message length", value: payload.len() as u64 });
    }
    let (expected, found) = (u64::from_le_bytes(*checksum), hasher.checksum(body));
    if expected == found { Ok(body) } else { Err(WireError::Checksum { what, expected, found }) }
}

fn magic(r: &mut Reader<'_>, magic: u32, what: &'static str) -> Result<(), WireError> {
    let found = r.u32("magic")?;
    if found == magic { Ok(()) } else { Err(WireError::BadMagic { what, found: found.into() }) }
}

fn zero(value: u64) -> Result<(), WireError> {
    if value == 0 { Ok(()) } else { Err(WireError::BadValue { field: "reserved", value }) }
}

fn check_buffers(buffers: u32) -> Result<u32, WireError> {
    if (BUFFERS_MIN..=BUFFERS_MAX).contains(&buffers) {
        Ok(buffers)
    } else {
        Err(WireError::BadValue { field: "buffers", value: buffers.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Role;
    use proptest::prelude::*;

    #[test]
    fn private_data_round_trip_and_every_flipped_bit() {
        let preamble =
            Preamble { version_min: 1, version_max: 1, role: Role::Stream, stream: 2, session: [7; 16] };
        let request = Request { preamble };
        let accept = Accept { stream: 2, buffers: 32, adapter: 1, pinned_max: 1 << 40 };
        let refusal = Refusal::new(ErrorCode::Protocol, &"ä".repeat(100));
        assert_eq!(refusal.text.len(), REFUSAL_TEXT_MAX);
        // The transport fills private data up.
        let padded = |bytes: &[u8]| [bytes, &[0; 8]].concat();
        assert_eq!(Request::decode(&padded(&request.encode())), Ok(request));
        assert_eq!(Accept::decode(&padded(&accept.encode())), Ok(accept));
        assert_eq!(Refusal::decode(&refusal.encode()), Ok(refusal.clone()));
        let flips = |good: &[u8], refused: &dyn Fn(&[u8]) -> bool| {
            for bit in 0..good.len() * 8 {
                let mut bad = good.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(refused(&bad), "bit {bit}");
            }
        };
        flips(&request.encode(), &|bad| Request::decode(bad).is_err());
        flips(&accept.encode(), &|bad| Accept::decode(bad).is_err());
        flips(&refusal.encode(), &|bad| Refusal::decode(bad).is_err());
    }

    #[test]
    fn messages_round_trip_and_every_flipped_bit() {
        let hasher = PageHasher::new(5);
        let range = Range { first: 9, count: 4 };
        let header = MessageHeader { kind: Kind::Register, len: 16, taken: 3 };
        let message = [&header.encode(&hasher)[..], &range.encode(&hasher)].concat();
        let (found, payload) = MessageHeader::decode(&message, &hasher).unwrap();
        assert_eq!((found, Range::decode(payload, &hasher)), (header, Ok(range)));
        for bit in 0..message.len() * 8 {
            let mut bad = message.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let whole = MessageHeader::decode(&bad, &hasher);
            assert!(whole.is_err() || Range::decode(whole.unwrap().1, &hasher).is_err(), "bit {bit}");
        }
        for place in [None, Some((0x7f00_0000_0000, 77))] {
            let answer = Registered { range, place };
            assert_eq!(Registered::decode(&answer.encode(&hasher), &hasher), Ok(answer));
        }
    }

    #[test]
    fn refuses_impossible_values() {
        let hasher = PageHasher::new(5);
        for count in [0, REGISTER_CHUNKS_MAX + 1] {
            assert!(Range::decode(&Range { first: 0, count }.encode(&hasher), &hasher).is_err(), "{count}");
        }
        for buffers in [0, BUFFERS_MIN - 1, BUFFERS_MAX + 1] {
            let accept = Accept { stream: 0, buffers, adapter: 0, pinned_max: 0 };
            assert!(Accept::decode(&accept.encode()).is_err(), "{buffers}");
        }
        let header = MessageHeader { kind: Kind::Data, len: 5, taken: 0 }.encode(&hasher);
        assert!(MessageHeader::decode(&[&header[..], &[0; 4]].concat(), &hasher).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes: Vec<u8>) {
            let hasher = PageHasher::new(0);
            let _ = (Request::decode(&bytes), Accept::decode(&bytes), Refusal::decode(&bytes));
            let _ = (MessageHeader::decode(&bytes, &hasher).is_ok(), Range::decode(&bytes, &hasher));
            let _ = Registered::decode(&bytes, &hasher);
        }
    }
}
