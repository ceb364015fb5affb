//! Encoded sections of chunks.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagecopy::fuzz::chunk_decode(bytes));
