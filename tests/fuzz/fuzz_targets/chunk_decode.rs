//! Any bytes as the encoded section of a chunk: the first 16 are its masks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagecopy::chunk::ChunkDecoder;

fuzz_target!(|bytes: &[u8]| {
    let Some((masks, section)) = bytes.split_first_chunk::<16>() else { return };
    let (masks, _) = masks.as_chunks::<8>();
    let (delta, zstd) = (u64::from_le_bytes(masks[0]), u64::from_le_bytes(masks[1]));
    // The decoder lives through many sections, good and bad, in use; here too.
    thread_local!(static DECODER: std::cell::RefCell<ChunkDecoder> = ChunkDecoder::new().into());
    DECODER.with_borrow_mut(|decoder| {
        let mut asked = 0u64;
        let result = decoder.decode(delta, zstd, section, |bit, page| {
            assert!(asked & 1 << bit == 0, "asked twice for a base");
            asked |= 1 << bit;
            page.fill(bit as u8);
        });
        if let Ok(decoded) = result {
            assert_eq!((decoded.pages(), asked), (delta | zstd, delta));
            assert_eq!(decoded.iter().count() as u32, (delta | zstd).count_ones());
        }
    });
});
