//! Bodies of the fuzz targets in `tests/fuzz`; see `pagecopy::fuzz`.
//!
//! A checksum that is part of an input would stop all inputs but those that are right: most targets put checksums in themselves.

mod files;
mod input;
mod memory;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE};
use xxhash_rust::xxh3::xxh3_64;

use self::input::{Frame, SEED, layout};
use self::memory::Ram;
use crate::carrier::{Breaker, DestinationEnd, FrameReceiver};
use crate::destination::{BaseCopy, BaseReader, PageSink, receive_stream};
use crate::postcopy::{MissingRuns, MissingSink, PostcopyError};
use crate::socket::Connection;
use crate::sys::ReceiveList;
use crate::wire::control::{ChunkRun, HEADER_LEN, Message, capability};
use crate::wire::frame::{
    LOAD_LEN, RECEIPT_HEADER_LEN, check_receipt, decode_load, decode_receipt_header, encode_load,
    encode_receipt, fold_receipt,
};
use crate::wire::postcopy::{PageRequest, REQUEST_MAGIC, sealed_receipt};
use crate::wire::queue::{Accept, Kind, MessageHeader, Range, Refusal, Registered, Request};
use crate::wire::{Preamble, WireError};

/// Never waited for: all bytes are there, or will never be.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Any 32 bytes as a preamble; what is read is written alike.
pub fn preamble(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    let Ok(preamble) = Preamble::decode(bytes) else { return };
    assert_eq!(preamble.encode(), *bytes);
    if let Ok(version) = preamble.agree() {
        assert!((preamble.version_min..=preamble.version_max).contains(&version));
    }
}

/// Any bytes as a control message. The first says its kind; with its highest bit set, all that follow are the message, else its
/// fields.
pub fn control(bytes: &[u8]) {
    let Some((&what, fields)) = bytes.split_first() else { return };
    let message = if what & 0x80 != 0 {
        if let Some(header) = fields.first_chunk::<HEADER_LEN>() {
            let _ = Message::decode_header(header);
        }
        fields.to_vec()
    } else {
        let header = [u16::from(what).to_le_bytes(), [0; 2]].concat();
        let mut message = [&header[..], &(fields.len() as u32).to_le_bytes(), fields].concat();
        message.extend_from_slice(&xxh3_64(&message).to_le_bytes());
        message
    };
    let Ok(decoded) = Message::decode(&message) else { return };
    assert_eq!(decoded.encode(), message, "{decoded:?} is not written as it was read");
}

/// Any bytes as a receipt, as what comes beside it and as a request for pages, with a checksum in place of their last 8.
pub fn receipts(bytes: &[u8]) {
    let hasher = PageHasher::new(SEED);
    let sealed = |bytes: &[u8]| [bytes, &hasher.checksum(bytes).to_le_bytes()].concat();
    let body = &bytes[..bytes.len().saturating_sub(8)];
    for receipt in [bytes.to_vec(), sealed(body)] {
        let header = receipt.first_chunk::<RECEIPT_HEADER_LEN>().map(decode_receipt_header);
        let (Some(Ok((count, seq))), Ok(digests)) = (header, check_receipt(&receipt, &hasher)) else {
            continue;
        };
        assert!(count <= 64);
        let digests: Vec<_> = digests.as_chunks::<8>().0.iter().map(|d| u64::from_le_bytes(*d)).collect();
        if digests.len() == count && receipt.len() == RECEIPT_HEADER_LEN + count * 8 + 8 {
            let mut again = Vec::new();
            encode_receipt(&mut again, seq, &digests, &hasher);
            assert_eq!(again, receipt);
            assert_eq!(fold_receipt(7, &again, &hasher), fold_receipt(7, &receipt, &hasher));
        }
    }
    for load in [bytes.to_vec(), sealed(body)] {
        let Some(load) = load.first_chunk::<LOAD_LEN>() else { continue };
        if let Ok(decoded) = decode_load(load, &hasher) {
            let mut again = Vec::new();
            encode_load(&mut again, decoded, &hasher);
            assert_eq!(again, load);
        }
    }
    let Some((fields, _)) = bytes.split_first_chunk::<12>() else { return };
    let request = sealed(&[&REQUEST_MAGIC.to_le_bytes(), &fields[..]].concat());
    let request = request.first_chunk().expect("a request's length");
    if let Ok(decoded) = PageRequest::decode(request, &hasher, &layout()) {
        assert!(decoded.pages != 0 && decoded.pages & !layout().valid(decoded.chunk) == 0);
        assert_eq!(decoded.encode(&hasher), *request);
    }
}

/// Any bytes as what travels over a queue pair; the first says what. Checksums are put in where its highest bit is clear.
pub fn queue(bytes: &[u8]) {
    let hasher = PageHasher::new(SEED);
    let Some((&what, body)) = bytes.split_first() else { return };
    let with = |body: &[u8], len: usize, checksum: &dyn Fn(&[u8]) -> u64| {
        let (body, rest) = body.split_at(body.len().min(len - 8));
        if what & 0x80 != 0 {
            return [body, rest].concat();
        }
        [body, &checksum(body).to_le_bytes(), rest].concat()
    };
    let plain = |len| with(body, len, &xxh3_64);
    match what & 0x7f {
        0 => again(&plain(Request::LEN), Request::decode, |value| value.encode().into()),
        1 => again(&plain(Accept::LEN), Accept::decode, |value| value.encode().into()),
        2 => again(&plain(Refusal::LEN), Refusal::decode, |value| value.encode().into()),
        3 => {
            let message = with(body, MessageHeader::LEN, &|body| hasher.checksum(body));
            let Ok((header, payload)) = MessageHeader::decode(&message, &hasher) else { return };
            assert_eq!(payload.len(), header.len as usize);
            assert_eq!(header.encode(&hasher), message[..MessageHeader::LEN]);
            if matches!(header.kind, Kind::Register | Kind::Release) {
                let _ = (Range::decode(payload, &hasher), Registered::decode(payload, &hasher));
            }
        }
        4 => {
            let range = with(body, Range::LEN, &|body| hasher.checksum(body));
            again(&range, |bytes| Range::decode(bytes, &hasher), |value| value.encode(&hasher).into());
        }
        _ => {
            let answer = with(body, Registered::LEN, &|body| hasher.checksum(body));
            again(&answer, |bytes| Registered::decode(bytes, &hasher), |value| value.encode(&hasher).into());
        }
    }
}

/// What is read is written to be read alike.
fn again<T: PartialEq + std::fmt::Debug>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, WireError>,
    encode: impl Fn(&T) -> Vec<u8>,
) {
    let Ok(value) = decode(bytes) else { return };
    assert_eq!(decode(&encode(&value)), Ok(value));
}

/// What a stream brings, as it is asked for.
struct Brought {
    bytes: Vec<u8>,
    at: usize,
    /// Bytes at a time.
    piece: usize,
    places: bool,
    sent: Arc<Mutex<Vec<u8>>>,
}

#[derive(Debug)]
struct Nothing;

impl Breaker for Nothing {
    fn shutdown(&self) {}
}

impl FrameReceiver for Brought {
    fn receive(&mut self, list: &mut ReceiveList<'_>, _wait: bool) -> io::Result<usize> {
        let end = self.bytes.len().min(self.at + self.piece);
        let got = list.fill(&self.bytes[self.at..end]);
        self.at += got;
        Ok(got)
    }

    fn send(&mut self, receipts: &[u8]) -> io::Result<()> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(receipts);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn places(&self) -> bool {
        self.places
    }
}

/// An older copy of the guest: of each chunk it has every other page, and they are alike.
struct Older;

impl BaseCopy for Older {
    fn seed(&self) -> u64 {
        SEED
    }

    fn seals(&self, _chunk: u32) -> Result<(u64, [u64; CHUNK_PAGES]), String> {
        Err("nobody asks here".into())
    }

    fn reader(self: Arc<Self>) -> io::Result<Box<dyn BaseReader>> {
        Ok(Box::new(OlderReader(vec![[7; PAGE_SIZE]; CHUNK_PAGES])))
    }
}

struct OlderReader(Vec<[u8; PAGE_SIZE]>);

impl BaseReader for OlderReader {
    fn read(&mut self, _chunk: u32, pages: u64) -> (u64, &[[u8; PAGE_SIZE]]) {
        (pages & 0x5555_5555_5555_5555, &self.0)
    }
}

/// Frames of a data stream, which the destination's worker takes. The first byte says how they come in; see [`Frame`].
pub fn frames(bytes: &[u8]) {
    let Some((&how, mut input)) = bytes.split_first() else { return };
    let hasher = PageHasher::new(SEED);
    let ram = Arc::new(Ram::new(layout()));
    let chunks = layout().chunks();
    let (mut bytes, mut named) = (Vec::new(), vec![0u64; chunks as usize]);
    let mut seq = 0;
    while let Some(frame) = Frame::take(&mut input) {
        bytes.extend_from_slice(&frame.header(seq, &hasher));
        bytes.extend_from_slice(frame.section);
        if !frame.placed() {
            bytes.extend_from_slice(&frame.raw());
        }
        if let Some(pages) = named.get_mut(frame.chunk as usize) {
            *pages |= frame.masks.iter().fold(0, |all, mask| all | mask);
        }
        seq += 1;
        if bytes.len() > 4 * CHUNK_SIZE {
            break;
        }
    }
    // Some codecs are not agreed on.
    let capabilities = if how & 4 == 0 { u64::MAX } else { u64::from(how >> 3) };
    let sink = PageSink::new(ram.clone(), hasher.clone(), capabilities, TIMEOUT);
    let sink = sink.with_base(Some(Arc::new(Older)));
    if how & 2 != 0 {
        sink.begin_placing();
    }
    let sent = Arc::new(Mutex::default());
    let piece = if how & 8 == 0 { usize::MAX } else { 1 + usize::from(how) * 64 };
    let stream =
        Brought { bytes, at: 0, piece: piece.min(1 << 30), places: how & 1 != 0, sent: sent.clone() };
    let end = receive_stream(&sink, DestinationEnd::new(Box::new(stream), Arc::new(Nothing)), 0);
    let sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
    let (count, fold) = check_sent(&sent, &hasher);
    assert!(count <= seq);
    if let Ok(end) = end {
        assert_eq!((end.frames, end.fold), (count, fold));
    }
    for (chunk, named) in (0..chunks).zip(named) {
        assert_eq!(ram.filled(chunk) & !named, 0, "chunk {chunk}: written without a frame that says so");
    }
}

/// Checks that these are whole receipts of frames from 0 on; returns how many, and their fold.
fn check_sent(mut sent: &[u8], hasher: &PageHasher) -> (u64, u64) {
    let (mut seq, mut fold) = (0, 0);
    while !sent.is_empty() {
        let header = sent.first_chunk().expect("a whole receipt");
        let (count, found) = decode_receipt_header(header).expect("a receipt's header");
        assert_eq!(found, seq);
        let (receipt, rest) = sent.split_at(RECEIPT_HEADER_LEN + count * 8 + 8);
        check_receipt(receipt, hasher).expect("a receipt's checksum");
        fold = fold_receipt(fold, receipt, hasher);
        (sent, seq) = (rest, seq + 1);
    }
    (seq, fold)
}

/// Most bytes of frames: what a socket takes before anybody reads.
const SOCKET_BYTES: usize = 64 << 10;

/// Runs of missing pages, then frames with seals, as postcopy's receiver takes them from a socket. The first byte is the number of runs
/// (20 bytes each: first chunk, number of chunks, pages), and whether seals are right.
pub fn postcopy(bytes: &[u8]) {
    let Some((&how, mut input)) = bytes.split_first() else { return };
    let hasher = PageHasher::new(SEED);
    let ram = Arc::new(Ram::new(layout()));
    let mut runs = Vec::new();
    for _ in 0..how % 8 {
        let Some((&[a, b, c, d, e, f, g, h, ref pages @ ..], rest)) = input.split_first_chunk::<16>() else {
            break;
        };
        input = rest;
        let [first, count] = [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes);
        runs.push(ChunkRun { first, count, pages: u64::from_le_bytes(*pages) });
    }
    let mut announced = MissingRuns::new(&layout());
    if announced.add(&runs, &layout()).is_err() {
        return;
    }
    let missing = announced.into_pages();
    let was_missing: Vec<_> = (0..missing.chunks()).map(|chunk| missing.get(chunk)).collect();
    assert!((0..missing.chunks()).all(|chunk| missing.get(chunk) & !layout().valid(chunk) == 0));
    let sink = MissingSink::new(ram.clone(), hasher.clone(), missing, capability::ALL, TIMEOUT)
        .expect("it can miss pages");
    let (source, destination) = UnixStream::pair().expect("a pair of sockets");
    let mut seq = 0;
    let mut sent = 0;
    while let Some(frame) = Frame::take(&mut input) {
        let bytes = sealed(&frame, seq, how & 0x80 == 0, &hasher);
        sent += bytes.len();
        if sent > SOCKET_BYTES {
            break;
        }
        (&source).write_all(&bytes).expect("a socket takes that much");
        seq += 1;
    }
    source.shutdown(std::net::Shutdown::Write).expect("it is connected");
    let end = sink.receive(&Arc::new(Connection::unix(destination)), u16::from(how & 8));
    assert!(
        !matches!(end, Ok(()) | Err(PostcopyError::Timeout { .. } | PostcopyError::Memory { .. })),
        "{end:?}"
    );
    let mut receipts = Vec::new();
    if let Err(e) = (&source).read_to_end(&mut receipts) {
        assert_eq!(e.kind(), io::ErrorKind::ConnectionReset, "all that it left unread may do");
    }
    let (count, _) = check_sent(&receipts, &hasher);
    assert!(count <= seq);
    for (chunk, missing) in (0..).zip(was_missing) {
        assert_eq!(ram.filled(chunk) & !missing, 0, "chunk {chunk}: a page was placed that was there");
    }
}

/// A frame of postcopy: header, seal, section, raw pages. What a section decodes to is in no seal here.
fn sealed(frame: &Frame<'_>, seq: u64, right: bool, hasher: &PageHasher) -> Vec<u8> {
    let raw = frame.raw();
    let mut pages = raw.as_chunks::<PAGE_SIZE>().0.iter();
    let [raw_mask, zero_mask, ..] = frame.masks;
    let digest = |bit: u32| {
        let page = if raw_mask >> bit & 1 != 0 { pages.next() } else { None };
        pagecopy::digest::receipt(page.map_or(hasher.zero(), |page| hasher.page(page)))
    };
    let digests: Vec<_> = pagecopy::bitmap::bits(raw_mask | zero_mask).map(digest).collect();
    let seal = sealed_receipt(&mut Vec::new(), seq, &digests, hasher) ^ u64::from(!right);
    [&frame.header(seq, hasher)[..], &seal.to_le_bytes(), frame.section, &raw].concat()
}

/// An archive, in order and by its index. The first byte says how: with its highest bit set, all that follow are the archive; else it is
/// made of frames, with right seals and checksums unless an input says otherwise.
pub fn archive(bytes: &[u8]) {
    let Some((&how, mut input)) = bytes.split_first() else { return };
    if how & 0x80 != 0 { files::read(input) } else { files::read(&files::make(how, &mut input)) }
}

#[cfg(test)]
mod tests {
    use testkit::replay;

    #[test]
    fn preamble() {
        replay("preamble", 4000, super::preamble);
    }

    #[test]
    fn control() {
        replay("control", 4000, super::control);
    }

    #[test]
    fn receipts() {
        replay("receipts", 4000, super::receipts);
    }

    #[test]
    fn queue() {
        replay("queue", 4000, super::queue);
    }

    #[test]
    fn frames() {
        replay("frames", 1000, super::frames);
    }

    #[test]
    fn archive() {
        replay("archive", 1000, super::archive);
    }

    #[test]
    fn postcopy() {
        replay("postcopy", 1000, super::postcopy);
    }
}
