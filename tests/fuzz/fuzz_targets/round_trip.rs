//! A guest whose writes the input dictates, sent through encoder and decoder in any mode: memory ends equal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagecopy::bitmap::bits;
use pagecopy::choose::CodecMode;
use pagecopy::chunk::{ChunkDecoder, ChunkEncoder, Shared};
use pagecopy::digest::PageHasher;
use pagecopy::layout::PAGE_SIZE;

/// Pages of the guest: few, so that inputs write to the same one again.
const PAGES: usize = 6;

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, rest)) = bytes.split_first() else { return };
    let mode = match mode % 4 {
        0 => CodecMode::Auto,
        1 => CodecMode::Raw,
        2 => CodecMode::Zstd { level: Some(i32::from(mode) % 4 - 2) },
        _ => CodecMode::Delta,
    };
    let shared = Shared::new(PageHasher::new(1), 1, u64::from(bytes[0]) * 400);
    let (mut encoder, mut decoder) = (ChunkEncoder::new(mode, || 0), ChunkDecoder::new());
    let (mut source, mut destination) = (vec![0u8; PAGES * PAGE_SIZE], vec![0xee; PAGES * PAGE_SIZE]);
    let mut first = true;
    let (mut dirty, all) = ((1u64 << PAGES) - 1, (1u64 << PAGES) - 1);
    for write in rest.chunks(6) {
        let &[page, offset, high, length, value, end] = write else { break };
        let start = usize::from(page) % PAGES * PAGE_SIZE;
        let at = (usize::from(offset) | usize::from(high) << 8) % PAGE_SIZE;
        let until = (at + usize::from(length) * 17).min(PAGE_SIZE);
        for (i, byte) in source[start + at..start + until].iter_mut().enumerate() {
            *byte = if value & 1 == 0 { value } else { value.wrapping_mul(i as u8 ^ offset) };
        }
        dirty |= 1 << (usize::from(page) % PAGES);
        match end % 4 {
            0 => {
                pass(&shared, &mut encoder, &mut decoder, &source, &mut destination, dirty, first);
                (dirty, first) = (0, false);
            }
            // A stream dies: what was sent for these pages is no longer certain.
            1 if end > 200 => {
                let lost = u64::from(value) & all;
                shared.void(0, lost);
                for bit in bits(lost) {
                    destination[bit as usize * PAGE_SIZE..][..PAGE_SIZE].fill(0xdd);
                }
                dirty |= lost;
            }
            _ => {}
        }
    }
    pass(&shared, &mut encoder, &mut decoder, &source, &mut destination, dirty, first);
    assert!(source == destination);
});

fn pass(
    shared: &Shared,
    encoder: &mut ChunkEncoder,
    decoder: &mut ChunkDecoder,
    source: &[u8],
    destination: &mut [u8],
    pages: u64,
    first: bool,
) {
    let chunk = encoder.encode(shared, 0, source, pages, first);
    let masks = [chunk.zero, chunk.unchanged, chunk.delta, chunk.zstd, chunk.raw];
    assert_eq!(masks.iter().fold(0, |all, mask| all | mask), pages);
    assert_eq!(masks.iter().map(|mask| mask.count_ones()).sum::<u32>(), pages.count_ones());
    let of = |bit: u32| bit as usize * PAGE_SIZE..(bit as usize + 1) * PAGE_SIZE;
    let decoded = decoder
        .decode(chunk.delta, chunk.zstd, chunk.encoded, |bit, page| {
            page.copy_from_slice(&destination[of(bit)]);
        })
        .expect("an encoder's output decodes");
    let pages: Vec<_> = decoded.iter().map(|(bit, page)| (bit, *page)).collect();
    for (bit, page) in pages {
        destination[of(bit)].copy_from_slice(&page);
    }
    for bit in bits(chunk.zero) {
        destination[of(bit)].fill(0);
    }
    for bit in bits(chunk.raw) {
        destination[of(bit)].copy_from_slice(&source[of(bit)]);
    }
}
