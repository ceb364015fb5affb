//! Lists of missing pages and sealed frames, through postcopy's receiver.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| transport::fuzz::postcopy(bytes));
