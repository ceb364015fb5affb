//! Tools that the tests of all crates share. It knows none of pageferry's crates, and only tests depend on it.

pub mod proxy;
mod replay;
mod rng;
mod wait;

pub use replay::replay;
pub use rng::Rng;
pub use wait::{PATIENCE, wait_for, wait_until};
