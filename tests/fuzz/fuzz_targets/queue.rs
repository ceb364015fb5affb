//! What travels over queue pairs of RDMA.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| transport::fuzz::queue(bytes));
