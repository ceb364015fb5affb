//! VMs that are dropped leave nothing behind. Alone in its file: other tests' threads would count.

mod common;

use common::*;
use pagecopy::backend::Guest;
use vmm_shim::guests::counter::CounterParams;
use vmm_shim::vmm::{GuestImage, Tracker};

/// Open files, threads and mappings of this process.
fn held() -> [usize; 3] {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    [count("/proc/self/fd"), count("/proc/self/task"), maps]
}

#[test]
fn dropped_vms_leave_nothing() {
    if !kvm() {
        return;
    }
    let params = CounterParams { working_set: 1 << 20, pages_per_s: 0, page_words: 8 };
    let mut before = [0; 3];
    for i in 0..105 {
        if i == 5 {
            before = held();
        }
        let ram = AnonRam::flat(16 << 20);
        let tracker = if i % 2 == 0 { Tracker::Ring } else { Tracker::Bitmap };
        let (vm, console) = vm(2, GuestImage::Counter(params), tracker, &ram);
        let log = vm.dirty_log().unwrap();
        log.start().unwrap();
        if i % 3 != 0 {
            vm.throttle().unwrap().set(if i % 5 == 0 { 60 } else { 0 }).unwrap();
            vm.resume().unwrap();
            wait_for(&vm, "output", || console.lines() > 0);
        }
        if i % 4 == 0 {
            vm.pause().unwrap();
        }
    }
    let after = held();
    println!("fds, threads, mappings: {before:?} -> {after:?}");
    assert_eq!(before[..2], after[..2]);
    // The allocator may add a few of its own; a leak would show a hundred times.
    assert!(after[2] < before[2] + 50, "{before:?} -> {after:?}");
}
