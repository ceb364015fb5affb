//! Any bytes as a delta: an error or a page, and what decodes encodes again to something that decodes alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::xbzrle::{Encoded, decode, encode, encode_reference};

fuzz_target!(|bytes: &[u8]| {
    let old = [0x5a; PAGE_SIZE];
    let mut new = old;
    let Ok(end) = decode(bytes, &mut new) else { return };
    assert!(end <= PAGE_SIZE);
    assert!(new[end..] == old[end..], "written past the reported end");
    let (mut out, mut reference) = (vec![0; 2 * PAGE_SIZE], vec![0; 2 * PAGE_SIZE]);
    let encoded = encode(&old, &new, &mut out);
    assert_eq!(encoded, encode_reference(&old, &new, &mut reference));
    if let Encoded::Len(length) = encoded {
        assert!(out[..length] == reference[..length]);
        let mut again = old;
        decode(&out[..length], &mut again).expect("an encoder's output decodes");
        assert!(again == new);
    }
});
