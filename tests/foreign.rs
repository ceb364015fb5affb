//! Written pages of another process: all tests of `vmm-shim/tests/foreign.rs`, in a lab guest where this kernel notes none.

#[path = "common/in_lab.rs"]
mod in_lab;
#[path = "../vmm-shim/tests/foreign.rs"]
mod suite;

/// What must have kept all rules of dirty logs there.
const CONFORM: [&str; 3] = ["conforms: memfd: ", "conforms: tmpfs: ", "conforms: vCPU: "];

#[test]
fn the_labs_guest_passes_all_of_this() {
    if vmm_shim::foreign::check().is_ok() {
        return println!("skipped: this kernel notes written pages, the lab is not needed");
    }
    let script = "exec \"$0\" --test-threads 1 --show-output --color never suite::";
    let Some(lines) = in_lab::run(&["--no-rdma"], script) else { return };
    for part in CONFORM {
        assert!(lines.iter().any(|line| line.starts_with(part)), "no line {part:?}: {}", lines.join("\n"));
    }
}
