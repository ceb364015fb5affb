//! This very program, run in the lab's guest, where there is no device here.

use crate::{device, in_lab};

/// Removing the device takes a process that never used it.
const SCRIPT: &str = "
    set -- --test-threads 1 --show-output --color never
    \"$0\" \"$@\" --skip is_removed && PAGEFERRY_TEST_REMOVAL=1 timeout 100 \"$0\" \"$@\" is_removed";

#[test]
fn the_labs_guest_passes_all_of_this() {
    if !cfg!(feature = "rdma") {
        return println!("skipped: the feature rdma is not built in");
    }
    if device().is_ok() {
        return println!("skipped: there is a device here, the lab is not needed");
    }
    in_lab::run(&[], SCRIPT);
}
