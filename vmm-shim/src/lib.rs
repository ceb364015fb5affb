//! Where memory lives: memory backends, dirty trackers and a small VMM on KVM.

pub mod guests;
pub mod kvm;
pub mod vmm;
