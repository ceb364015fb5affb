//! Chunks through encoder and decoder.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagecopy::fuzz::round_trip(bytes));
