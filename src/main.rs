//! pageferry
fn main() {}
