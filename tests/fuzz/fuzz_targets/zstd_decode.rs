//! zstd frames of pages, with a dictionary and without.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagecopy::fuzz::zstd_decode(bytes));
