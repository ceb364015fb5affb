//! Files of traces.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pageferry::cli::fuzz::trace(bytes));
