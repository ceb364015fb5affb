//! Deltas of pages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagecopy::fuzz::xbzrle_decode(bytes));
