//! Archives that a fuzz target reads: any bytes, or frames with right checksums but where the input says otherwise.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use pagecopy::bitmap::bits;
use pagecopy::chunk::ChunkDecoder;
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::PAGE_SIZE;
use rustix::fs::{MemfdFlags, memfd_create};

use super::input::{Frame, SEED, layout};
use crate::archive::format::{
    Base, Footer, FrameHeader, FrameKind, Header, IndexEntry, MAGIC, Record, RecordKind, VERSION, feature,
    pad,
};
use crate::archive::frames::Opener;
use crate::archive::reader::{Item, Sequence};
use crate::archive::{Archive, ArchiveError, Image, Walk, verify};

/// Chunks of a guest that are looked at one by one.
const CHUNKS_MAX: u32 = 1 << 10;

/// Reads an archive in every way there is. What is whole read in order is whole read by its index.
pub(super) fn read(bytes: &[u8]) {
    let in_order = read_in_order(bytes);
    let file = File::from(memfd_create("archive", MemfdFlags::CLOEXEC).expect("a memfd"));
    (&file).write_all(bytes).expect("memory has room");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(archive) = Archive::open(&path) else {
        return assert_ne!(in_order, Ok(true), "what is whole cannot be opened");
    };
    let checked = verify(&archive, None, &Walk::new(1)).expect("nobody cancels it");
    assert_eq!(in_order == Ok(true), checked.faults.is_empty(), "{in_order:?}, and {:?}", checked.faults);
    let mut opener = Opener::new().expect("there is memory for a frame");
    for entry in archive.entries().iter().filter(|entry| entry.pages != 0) {
        let seals = archive.head(entry);
        if let Ok(opened) = archive.read(entry, &mut opener) {
            let (header, seals) = seals.expect("what can be read has a head");
            // Behind those of the pages is the section's, which has been used up.
            assert_eq!((header, &seals[..opened.seals.len()]), (opened.header, &opened.seals[..]));
        }
    }
    let Ok(image) = Image::open(&path, None) else { return };
    for chunk in 0..image.layout().chunks().min(CHUNKS_MAX) {
        read_chunk(&image, chunk);
    }
}

/// Reads it to its end; says whether it is whole, or why it does not come to that.
fn read_in_order(bytes: &[u8]) -> Result<bool, String> {
    let mut next = 0;
    let mut sequence = Sequence::begin(|offset, buffer: &mut [u8]| {
        assert_eq!(offset, next, "it goes back, or leaves something out");
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let cut = || ArchiveError::Truncated { offset: bytes.len() as u64, what: "it" };
        buffer.copy_from_slice(rest.get(..buffer.len()).ok_or_else(cut)?);
        next += buffer.len() as u64;
        Ok(())
    })
    .map_err(|error| error.to_string())?;
    let mut opener = Opener::new().expect("there is memory for a frame");
    let mut damaged = 0;
    loop {
        match sequence.next(&mut opener).map_err(|error| error.to_string())? {
            Item::Frame(_, opened) => {
                let pages = opened.header.pages();
                assert_eq!(opened.damaged & !pages, 0);
                for bit in bits(opened.filled() & !opened.damaged) {
                    assert!(opened.page(bit).is_some() && opened.seal(bit).is_some());
                }
                damaged |= opened.damaged;
            }
            Item::State(_) => {}
            Item::End(_) => return Ok(damaged == 0 && sequence.position() == bytes.len() as u64),
        }
    }
}

/// Whatever is read of a chunk is what its seals say.
fn read_chunk(image: &Image, chunk: u32) {
    let mut reader = image.reader().expect("there is memory for a chunk").forgiving();
    let valid = image.layout().valid(chunk);
    let content = image.read(chunk, valid, &mut reader);
    let (Ok(content), Ok((seals, known))) = (content, image.seals(chunk, valid)) else { return };
    let masks = [content.filled, content.zero, content.damaged];
    let count: u32 = masks.iter().map(|mask| mask.count_ones()).sum();
    assert_eq!(count, masks.iter().fold(0, |all, mask| all | mask).count_ones(), "{masks:x?} overlap");
    assert_eq!((content.filled | content.zero) & !known, 0, "there are pages that no frame has");
    let hasher = image.archive().hasher();
    assert_eq!(content.unlike(content.filled | content.zero, hasher, |bit| Some(seals[bit as usize])), 0);
}

/// An archive of frames, as the input says: `how` it is told of, then frames, and state of what is left.
pub(super) fn make(how: u8, input: &mut &[u8]) -> Vec<u8> {
    let is = |bit: u8| u64::from(how & bit != 0);
    let (hasher, mut decoder) = (PageHasher::new(SEED), ChunkDecoder::new());
    let base = (how & 2 != 0).then(|| Base { id: [1; 16], name: "none".into() });
    let header = Header {
        version: VERSION,
        features: feature::ZSTD | if base.is_some() { feature::BASE } else { 0 },
        id: [2; 16],
        seed: SEED,
        created: 3,
        live: how & 1 != 0,
        data_bytes: 4,
        regions: layout().regions().to_vec(),
        machine: "m".into(),
        base,
    };
    let mut out = MAGIC.to_vec();
    record(RecordKind::Header, &header.encode(), &PageHasher::new(0), &mut out);
    let (mut entries, mut pages) = (Vec::new(), vec![0u64; layout().chunks() as usize]);
    while let Some(frame) = Frame::take(input) {
        let start = out.len();
        let lies = |bit: u8| frame.what & bit != 0;
        let header = frame_header(&frame);
        let mut entry =
            IndexEntry { offset: start as u64, pages: header.pages(), chunk: header.chunk, len: 0 };
        if lies(2) {
            pad(&mut out);
            (entry.pages, entry.chunk) = (0, 0);
            if lies(4) {
                *out.last_mut().expect("a pad has a head") ^= 1;
            }
        } else {
            header.encode(seals(&frame, &header, &mut decoder, &hasher), &hasher, &mut out);
            out.extend_from_slice(frame.section);
            if header.kind == FrameKind::Pages {
                out.extend_from_slice(&frame.raw());
            }
            out[start + 41] ^= u8::from(lies(8));
            if let Some(known) = pages.get_mut(header.chunk as usize) {
                *known |= header.pages();
            }
        }
        entry.len = (out.len() - start) as u32;
        entry.offset += u64::from(lies(32));
        entry.pages ^= u64::from(lies(64));
        entries.push(entry);
        if out.len() > 64 * PAGE_SIZE {
            break;
        }
    }
    let state_at = out.len() as u64;
    if how & 1 != 0 {
        // None of its own, or whatever is left.
        let state = if input.is_empty() { &[0; 4][..] } else { input };
        record(RecordKind::State, state, &hasher, &mut out);
    }
    let index_at = out.len() as u64;
    record(
        RecordKind::Index,
        &entries.iter().flat_map(IndexEntry::encode).collect::<Vec<_>>(),
        &hasher,
        &mut out,
    );
    let footer = Footer {
        state_at: if how & 1 != 0 { state_at ^ is(64) } else { is(64) },
        index_at,
        frames: entries.len() as u64 + is(8),
        pages: pages.iter().map(|pages| u64::from(pages.count_ones())).sum::<u64>() + is(16),
        bytes: (out.len() + Footer::RECORD_LEN) as u64 + is(32),
    };
    record(RecordKind::Footer, &footer.encode(), &hasher, &mut out);
    if how & 4 != 0 {
        out.push(0);
    }
    out
}

fn record(kind: RecordKind, payload: &[u8], hasher: &PageHasher, out: &mut Vec<u8>) {
    let record = Record::of(kind, out.len() as u64, payload, hasher);
    out.extend_from_slice(&record.encode(hasher));
    out.extend_from_slice(payload);
}

fn frame_header(frame: &Frame<'_>) -> FrameHeader {
    let [raw, zero, zstd, _] = frame.masks;
    let kind = if frame.what & 1 != 0 { FrameKind::Same } else { FrameKind::Pages };
    FrameHeader { kind, chunk: frame.chunk, encoded_len: frame.section.len() as u32, raw, zero, zstd }
}

/// What its pages are, or are said to be.
fn seals(
    frame: &Frame<'_>,
    header: &FrameHeader,
    decoder: &mut ChunkDecoder,
    hasher: &PageHasher,
) -> Vec<u64> {
    let raw = frame.raw();
    let mut raw = raw.as_chunks::<PAGE_SIZE>().0.iter();
    let decoded = decoder.decode(0, header.zstd, frame.section, |_, _| {}).ok();
    let seal = |bit: u32| {
        let page = if header.raw >> bit & 1 != 0 {
            raw.next()
        } else {
            decoded.as_ref().and_then(|decoded| decoded.page(bit))
        };
        receipt(page.map_or(hasher.zero(), |page| hasher.page(page)))
    };
    let mut seals: Vec<u64> = bits(header.pages()).map(seal).collect();
    if !frame.section.is_empty() {
        seals.push(hasher.checksum(frame.section));
    }
    if let (true, Some(last)) = (frame.what & 16 != 0, seals.last_mut()) {
        *last ^= 1;
    }
    seals
}
