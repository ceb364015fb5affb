//! Lines of a control socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pageferry::cli::fuzz::control_request(bytes));
