//! Any bytes as the encoded section of a chunk: the first 17 are its masks and whether it has references.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagecopy::chunk::{Announced, ChunkDecoder};

fuzz_target!(|bytes: &[u8]| {
    let Some((masks, rest)) = bytes.split_first_chunk::<16>() else { return };
    let Some((references, section)) = rest.split_first() else { return };
    let references = references & 1 != 0;
    let (masks, _) = masks.as_chunks::<8>();
    let (delta, zstd) = (u64::from_le_bytes(masks[0]), u64::from_le_bytes(masks[1]));
    // The decoder lives through many sections, good and bad, in use; here too.
    thread_local!(static DECODER: std::cell::RefCell<ChunkDecoder> = ChunkDecoder::new().into());
    DECODER.with_borrow_mut(|decoder| {
        let mut asked = 0u64;
        let base = |bit: u32, page: &mut [u8; 4096]| {
            assert!(asked & 1 << bit == 0, "asked twice for a base");
            asked |= 1 << bit;
            page.fill(bit as u8);
        };
        let announced = Announced { delta, zstd, references };
        let mut referred = 0;
        let result = decoder.decode_with(announced, section, base, |reference, pages| {
            assert_eq!(pages.len() as u32, reference.pages.count_ones());
            referred += pages.len();
            pages.iter_mut().for_each(|page| page.fill(reference.chunk as u8));
            reference.chunk % 16 != 3
        });
        assert!(referred <= 64);
        if let Ok(decoded) = result {
            assert_eq!((decoded.pages(), asked), (delta | zstd, delta));
            assert_eq!(decoded.iter().count() as u32, (delta | zstd).count_ones());
        }
    });
});
