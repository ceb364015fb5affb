//! Capabilities: all are dropped that are not needed, from every set, and for whatever the process runs.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, accessat};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs,
};

/// None of them.
pub(super) const NONE: CapabilitySet = CapabilitySet::empty();
/// More than there are.
const COUNT_MAX: u32 = 64;

/// Keeps these, where the calling thread has them, and no others. Programs that it runs have none, whatever their files say and whoever
/// runs them.
pub(super) fn keep(needed: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    let now = capabilities(None)?;
    // A kernel that knows none has none.
    let _ = clear_ambient_capability_set();
    if now.effective.contains(CapabilitySet::SETPCAP) {
        for one in (0..COUNT_MAX).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
            // The first that the kernel does not know is the end.
            let Ok(bound) = capability_is_in_bounding_set(one) else { break };
            if bound && !needed.contains(one) {
                remove_capability_from_bounding_set(one)?;
            }
        }
        // Root's programs get root's capabilities otherwise, as far as the bounding set lets them.
        type Bits = CapabilitiesSecureBits;
        let bits = Bits::NO_ROOT | Bits::NO_CAP_AMBIENT_RAISE;
        let locks = Bits::NO_ROOT_LOCKED | Bits::NO_CAP_AMBIENT_RAISE_LOCKED | Bits::KEEP_CAPS_LOCKED;
        // A container may have locked others.
        let _ = set_capabilities_secure_bits(bits | locks);
    }
    let kept = now.permitted & needed;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: NONE })?;
    Ok(())
}

/// Whether the calling thread can use one of these files and folders only by its power over others' files: such as root in the folder
/// of a user.
pub(super) fn needs_power_over<'a>(paths: impl Iterator<Item = (&'a Path, bool)>) -> bool {
    const POWER: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::DAC_READ_SEARCH);
    let Ok(now) = capabilities(None) else { return false };
    if !now.effective.contains(CapabilitySet::DAC_OVERRIDE) {
        return false;
    }
    if set_capabilities(None, CapabilitySets { effective: now.effective - POWER, ..now }).is_err() {
        return false;
    }
    let refused = |(path, writes): (&Path, bool)| {
        use rustix::fs::Access;
        let search = if path.is_dir() { Access::EXEC_OK } else { Access::empty() };
        let write = if writes { Access::WRITE_OK } else { Access::empty() };
        accessat(CWD, path, Access::READ_OK | search | write, AtFlags::EACCESS) == Err(Errno::ACCESS)
    };
    let needs = { paths }.any(refused);
    // They were there a moment ago, and are permitted still.
    let _ = set_capabilities(None, now);
    needs
}
