//! Receipts, and requests for pages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| transport::fuzz::receipts(bytes));
