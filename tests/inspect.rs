//! `pageferry inspect`, and what it is made of: real archives, archives built by hand, and damaged ones.

#[path = "inspect/checked.rs"]
mod checked;
mod common;
#[path = "inspect/compared.rs"]
mod compared;
#[path = "inspect/described.rs"]
mod described;
#[path = "inspect/flips.rs"]
mod flips;
#[path = "inspect/hand.rs"]
mod hand;
#[path = "inspect/made.rs"]
mod made;
#[allow(dead_code, reason = "shared with tests/live.rs, of which this is a part")]
#[path = "live/vm.rs"]
mod vm;

use std::path::Path;

use common::{Ended, Ferry};

/// Runs `pageferry inspect` with these arguments.
fn inspect<P: AsRef<Path>>(args: &[P]) -> Ended {
    let args = args.iter().map(|arg| arg.as_ref().as_os_str());
    Ferry::run([std::ffi::OsStr::new("inspect")].into_iter().chain(args))
}
