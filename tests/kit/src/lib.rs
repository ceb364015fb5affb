//! Tools that the tests of all crates share. It knows none of pageferry's crates, and only tests depend on it.

mod rng;

pub use rng::Rng;
