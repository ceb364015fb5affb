//! Bodies of the fuzz targets in `tests/fuzz`: each takes any bytes and panics where something is wrong. Unit tests call them as well, on
//! the targets' corpora, so that they keep pace with what they test. Not part of the library: built for tests and fuzzers only.

use std::cell::{Cell, RefCell};

use crate::bitmap::bits;
use crate::choose::CodecMode;
use crate::chunk::{
    Announced, ChunkDecoder, ChunkEncoder, Clocks, EncodedChunk, Job, REFERENCES_MAX, Reference, Shared,
};
use crate::compress::Decompress;
use crate::digest::PageHasher;
use crate::layout::PAGE_SIZE;
use crate::xbzrle::{self, Encoded, Page};

/// Chunks of the guest of [`round_trip`]: two, so that one can refer to the other.
const CHUNKS: usize = 2;
/// Pages of each: few, so that inputs write to the same one again.
const PAGES: usize = 5;
const ALL: u64 = (1 << PAGES) - 1;

/// Any bytes as a delta: an error or a page; and what decodes encodes again to something that decodes alike.
pub fn xbzrle_decode(bytes: &[u8]) {
    let old = [0x5a; PAGE_SIZE];
    let mut new = old;
    let Ok(end) = xbzrle::decode(bytes, &mut new) else { return };
    assert!(end <= PAGE_SIZE);
    assert!(new[end..] == old[end..], "written past the reported end");
    let (mut out, mut reference) = (vec![0; 2 * PAGE_SIZE], vec![0; 2 * PAGE_SIZE]);
    let encoded = xbzrle::encode(&old, &new, &mut out);
    assert_eq!(encoded, xbzrle::encode_reference(&old, &new, &mut reference));
    if let Encoded::Len(length) = encoded {
        assert!(out[..length] == reference[..length]);
        let mut again = old;
        xbzrle::decode(&out[..length], &mut again).expect("an encoder's output decodes");
        assert!(again == new);
    }
}

/// Any bytes as the zstd frame of some pages, with a dictionary or without: the first byte says both.
pub fn zstd_decode(bytes: &[u8]) {
    let Some((&what, frame)) = bytes.split_first() else { return };
    let dictionary: &[u8] = if what & 1 == 0 { &[] } else { &[0x61; 2 * PAGE_SIZE] };
    let pages = usize::from(what >> 1) % 8 + 1;
    thread_local!(static DECOMPRESS: RefCell<Decompress> = Decompress::new().into());
    let mut content = vec![0x5a; (pages + 1) * PAGE_SIZE];
    let (inside, behind) = content.split_at_mut(pages * PAGE_SIZE);
    let first = DECOMPRESS.with_borrow_mut(|context| context.decompress(dictionary, frame, inside));
    assert!(behind.iter().all(|&byte| byte == 0x5a), "written past the announced pages");
    if first.is_ok() {
        // What came before leaves no trace in a context.
        let mut again = vec![0; pages * PAGE_SIZE];
        Decompress::new().decompress(dictionary, frame, &mut again).expect("it has decoded before");
        assert!(again == inside);
    }
}

/// Any bytes as the encoded section of a chunk: the first 17 are its masks and whether it has references.
pub fn chunk_decode(bytes: &[u8]) {
    let Some((masks, rest)) = bytes.split_first_chunk::<16>() else { return };
    let Some((references, section)) = rest.split_first() else { return };
    let references = references & 1 != 0;
    let (masks, _) = masks.as_chunks::<8>();
    let (delta, zstd) = (u64::from_le_bytes(masks[0]), u64::from_le_bytes(masks[1]));
    // The decoder lives through many sections, good and bad, in use; here too.
    thread_local!(static DECODER: RefCell<ChunkDecoder> = ChunkDecoder::new().into());
    DECODER.with_borrow_mut(|decoder| {
        let mut asked = 0u64;
        let base = |bit: u32, page: &mut Page| {
            assert!(asked & 1 << bit == 0, "asked twice for a base");
            asked |= 1 << bit;
            page.fill(bit as u8);
        };
        let mut referred = 0;
        let announced = Announced { delta, zstd, references };
        let result = decoder.decode_with(announced, section, base, |reference, pages| {
            assert_eq!(pages.len() as u32, reference.pages.count_ones());
            referred += pages.len();
            pages.iter_mut().for_each(|page| page.fill(reference.chunk as u8));
            reference.chunk % 16 != 3
        });
        assert!(referred <= REFERENCES_MAX);
        if let Ok(decoded) = result {
            assert_eq!((decoded.pages(), asked), (delta | zstd, delta));
            assert_eq!(decoded.iter().count() as u32, (delta | zstd).count_ones());
        }
    });
}

/// A guest whose writes the input dictates, sent through encoder and decoder in any mode: memory ends equal.
pub fn round_trip(bytes: &[u8]) {
    let Some((&first, writes)) = bytes.split_first() else { return };
    let mode = match first % 4 {
        0 => CodecMode::Auto,
        1 => CodecMode::Raw,
        2 => CodecMode::Zstd { level: Some(i32::from(first / 4) % 8 - 4) },
        _ => CodecMode::Delta,
    };
    let mut pair = Pair::new(mode, u64::from(first) * 400);
    for write in writes.as_chunks::<6>().0 {
        pair.turn(*write);
    }
    for chunk in 0..CHUNKS {
        pair.send(chunk);
    }
    assert!(pair.source == pair.destination);
}

/// Both sides.
struct Pair {
    shared: Shared,
    encoder: ChunkEncoder,
    decoder: ChunkDecoder,
    source: [Vec<u8>; CHUNKS],
    destination: [Vec<u8>; CHUNKS],
    dirty: [u64; CHUNKS],
    first: [bool; CHUNKS],
}

impl Pair {
    fn new(mode: CodecMode, cache_bytes: u64) -> Self {
        // Time goes on whenever it is read, the same in each run of an input.
        thread_local!(static NANOS: Cell<u64> = const { Cell::new(0) });
        NANOS.set(0);
        let tick = || NANOS.replace(NANOS.get() + 700);
        let chunk = |fill: u8| vec![fill; PAGES * PAGE_SIZE];
        Self {
            shared: Shared::new(PageHasher::new(1), CHUNKS as u32, cache_bytes),
            encoder: ChunkEncoder::new(mode, Clocks { now: tick, worked: tick }).referring(true),
            decoder: ChunkDecoder::new(),
            source: [chunk(0), chunk(0)],
            destination: [chunk(0xee), chunk(0xee)],
            dirty: [ALL; CHUNKS],
            first: [true; CHUNKS],
        }
    }

    /// One write, and what happens after it.
    fn turn(&mut self, [page, offset, high, length, value, end]: [u8; 6]) {
        let (chunk, bit) = (usize::from(page) / PAGES % CHUNKS, usize::from(page) % PAGES);
        let at = (usize::from(offset) | usize::from(high) << 8) % PAGE_SIZE;
        let until = (at + usize::from(length) * 17).min(PAGE_SIZE);
        let page = &mut self.source[chunk][bit * PAGE_SIZE..][..PAGE_SIZE];
        for (i, byte) in page[at..until].iter_mut().enumerate() {
            *byte = if value & 1 == 0 { value } else { value.wrapping_mul(i as u8 ^ offset) };
        }
        self.dirty[chunk] |= 1 << bit;
        match end % 4 {
            0 => self.send(chunk),
            // A stream dies: what was sent for these pages is no longer certain.
            1 if end > 200 => {
                let lost = u64::from(value) & ALL;
                self.shared.void(chunk as u32, lost);
                for bit in bits(lost) {
                    self.destination[chunk][of(bit)].fill(0xdd);
                }
                self.dirty[chunk] |= lost;
            }
            _ => {}
        }
    }

    /// Sends what is dirty of a chunk.
    fn send(&mut self, chunk: usize) {
        let Self { shared, encoder, decoder, source, destination, .. } = self;
        let (pages, first_pass) = (self.dirty[chunk], self.first[chunk]);
        let plan = encoder.plan(chunk as u32, 10_000_000);
        let job = Job { chunk: chunk as u32, snapshot: &source[chunk], pages, first_pass };
        // Pages that were written, or got lost, since they were sent are lent as well: the encoder must tell them.
        let sent = encoder.encode_as(plan, shared, job, &mut |reference, pages| {
            copy(source, reference, pages);
            true
        });
        let masks = [sent.zero, sent.unchanged, sent.delta, sent.zstd, sent.raw];
        assert_eq!(masks.iter().fold(0, |all, mask| all | mask), pages);
        assert_eq!(masks.iter().map(|mask| mask.count_ones()).sum::<u32>(), pages.count_ones());
        deliver(&sent, decoder, chunk, source, destination);
        (self.dirty[chunk], self.first[chunk]) = (0, false);
    }
}

/// What the destination does with a chunk.
fn deliver(
    sent: &EncodedChunk<'_>,
    decoder: &mut ChunkDecoder,
    chunk: usize,
    source: &[Vec<u8>; CHUNKS],
    destination: &mut [Vec<u8>; CHUNKS],
) {
    let announced = Announced { delta: sent.delta, zstd: sent.zstd, references: !sent.references.is_empty() };
    let held = &*destination;
    let base = |bit: u32, page: &mut Page| page.copy_from_slice(&held[chunk][of(bit)]);
    let decoded = decoder.decode_with(announced, sent.encoded, base, |reference, pages| {
        copy(held, reference, pages);
        true
    });
    let decoded = decoded.expect("an encoder's output decodes");
    let memory = &mut destination[chunk];
    for (bit, page) in decoded.iter() {
        memory[of(bit)].copy_from_slice(page);
    }
    for bit in bits(sent.zero) {
        memory[of(bit)].fill(0);
    }
    for bit in bits(sent.raw) {
        memory[of(bit)].copy_from_slice(&source[chunk][of(bit)]);
    }
}

/// Where a page lies in its chunk.
fn of(bit: u32) -> std::ops::Range<usize> {
    bit as usize * PAGE_SIZE..(bit as usize + 1) * PAGE_SIZE
}

fn copy(memory: &[Vec<u8>; CHUNKS], reference: Reference, pages: &mut [Page]) {
    for (page, bit) in pages.iter_mut().zip(bits(reference.pages)) {
        page.copy_from_slice(&memory[reference.chunk as usize][of(bit)]);
    }
}

#[cfg(test)]
mod tests {
    use testkit::replay;

    #[test]
    fn xbzrle_decode() {
        replay("xbzrle_decode", 4000, super::xbzrle_decode);
    }

    #[test]
    fn zstd_decode() {
        replay("zstd_decode", 4000, super::zstd_decode);
    }

    #[test]
    fn chunk_decode() {
        replay("chunk_decode", 4000, super::chunk_decode);
    }

    #[test]
    fn round_trip() {
        replay("round_trip", 1000, super::round_trip);
    }
}
