//! The memory of the VM.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use pagecopy::backend::{BackendError, GuestRam};

use crate::kvm::{KvmSlots, Slot};

/// Gives the VM its memory: slot `i` is region `i`.
pub(super) fn give_memory(vm: &VmFd, ram: &Arc<dyn GuestRam>) -> Result<KvmSlots, BackendError> {
    // SAFETY: each slot is a whole mapping of guest memory. Whoever has the VM keeps it: the VM's machine, whose field it is and that drops
    // it after the VM, and what is made here. Nobody else knows the VM.
    unsafe { KvmSlots::new(vm, ram.clone(), &Slot::of_regions(&**ram)) }
}
