//! The mini VMM on real KVM: guests run, stop, and go on in another VM.

mod common;

use common::*;
use pagecopy::backend::Guest;
use vmm_shim::guests::counter::{Checker, CounterParams, Side};
use vmm_shim::vmm::{GuestImage, Tracker, VmState};

const MIB: u64 = 1 << 20;

fn counter(working_set: u64, page_words: u32) -> CounterParams {
    CounterParams { working_set, pages_per_s: 0, page_words }
}

/// Runs a counter, moves it, and checks that it went on.
fn moves(cpus: u8, params: CounterParams) {
    let (ram_a, ram_b) = (AnonRam::flat(32 * MIB), AnonRam::flat(32 * MIB));
    let (a, console_a) = vm(cpus, GuestImage::Counter(params), Tracker::Bitmap, &ram_a);
    assert_eq!(a.state(), VmState::Paused);
    a.resume().unwrap();
    wait_for(&a, "20 passes", || console_a.lines() >= 20 * usize::from(cpus));
    a.pause().unwrap();
    let printed = console_a.len();
    let state = a.save_state().unwrap();

    let (b, console_b) = vm(cpus, GuestImage::Incoming, Tracker::Bitmap, &ram_b);
    copy_ram(&ram_a, &ram_b);
    b.load_state(&state).unwrap();
    b.resume().unwrap();
    wait_for(&b, "20 more passes", || console_b.lines() >= 20 * usize::from(cpus));
    b.pause().unwrap();

    assert_eq!(console_a.len(), printed, "a paused guest prints nothing");
    let mut checker = Checker::new(cpus, params.pages(cpus));
    checker.feed(Side::Source, &console_a.bytes()).unwrap();
    checker.feed(Side::Destination, &console_b.bytes()).unwrap();
    println!("passes: {:?}", checker.passes());
    assert!(
        checker.passes().iter().all(|&(before, after)| before > 0 && after > 0),
        "{:?}",
        checker.passes()
    );
}

#[test]
fn a_counter_goes_on_in_another_vm() {
    if kvm() {
        moves(1, counter(4 * MIB, 64));
    }
}

#[test]
fn two_vcpus_go_on_in_another_vm() {
    if kvm() {
        moves(2, counter(8 * MIB, 508));
    }
}
