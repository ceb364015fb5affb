//! The one source of chance: everything a seed does follows from it.

pub(super) use testkit::Rng;
