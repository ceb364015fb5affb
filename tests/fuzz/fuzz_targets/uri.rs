//! Addresses of destinations.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pageferry::cli::fuzz::uri(bytes));
