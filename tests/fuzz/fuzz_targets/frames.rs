//! Frames of a data stream, through the destination's worker.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| transport::fuzz::frames(bytes));
