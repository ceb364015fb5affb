//! Archives, in order and by their index.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| transport::fuzz::archive(bytes));
