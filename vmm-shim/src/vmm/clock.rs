//! The guest's clocks: how they are saved, and set so that they never go back. See [`super::state`].

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, Msrs, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use pagecopy::backend::{BackendError, StateSink};

use super::Vm;
use super::blobs::{Reader, vcpu_error};
use super::vcpu::lock;
use crate::kvm::sys::{set_tsc_offset, tsc_offset};

/// MSR of the time-stamp counter.
pub(super) const MSR_TSC: u32 = 0x10;
/// Bytes of `vm/clock`.
pub(super) const LEN: usize = 32;
/// Longest time that is taken for the move itself, in nanoseconds: ten minutes.
const GAP_MAX: u64 = 600_000_000_000;

/// The clocks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clock {
    kvmclock: u64,
    realtime: u64,
    tsc: u64,
    pub(super) tsc_khz: u32,
}

impl Clock {
    pub(super) fn decode(bytes: &[u8]) -> Self {
        let mut r = Reader::new(bytes);
        Self { kvmclock: r.u64(), realtime: r.u64(), tsc: r.u64(), tsc_khz: r.u32() }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LEN);
        for word in [self.kvmclock, self.realtime, self.tsc, self.tsc_khz.into()] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Sets TSCs and kvmclock; `deltas` are the vCPUs' TSC distances from vCPU 0.
    pub(super) fn apply(&self, vm: &Vm, deltas: &[i64]) -> Result<(), BackendError> {
        let vcpus = &vm.machine.vcpus;
        let first = lock(&vcpus[0].fd);
        let offset = tsc_offset(&first);
        let now = read_tsc(&first).map_err(|e| vcpu_error(0, "reading its TSC", e))?;
        drop(first);
        let target = self.tsc.wrapping_add(ticks(self.gap(wall_clock()), self.tsc_khz));
        for (vcpu, &delta) in vcpus.iter().zip(deltas) {
            let fd = lock(&vcpu.fd);
            let result = match &offset {
                // All offsets are relative to one host TSC, so that the time this takes does not matter.
                Ok(o) => {
                    set_tsc_offset(&fd, o.wrapping_add(target).wrapping_sub(now).wrapping_add_signed(delta))
                }
                Err(_) => write_tsc(&fd, target.wrapping_add_signed(delta)),
            };
            result.map_err(|e| vcpu_error(vcpu.index, "setting its TSC", e))?;
            // A para-virtual KVM may take the offset and ignore it. On one host that is well: its TSC has
            // gone on.
            let (got, least) = (
                read_tsc(&fd).map_err(|e| vcpu_error(vcpu.index, "reading its TSC", e))?,
                self.tsc.wrapping_add_signed(delta),
            );
            if (got.wrapping_sub(least) as i64) < 0 {
                let why = format!(
                    "its TSC would go back from {least} to {got}: this host's KVM does not let it be set; move the \
                     guest to a host whose KVM does"
                );
                return Err(vcpu_error(vcpu.index, &why, io::ErrorKind::Unsupported));
            }
        }
        let vm_fd = &vm.machine.vm;
        let clock = self.kvmclock.saturating_add(self.gap(wall_clock()));
        let data = kvm_clock_data { clock, ..kvm_clock_data::default() };
        vm_fd.set_clock(&data).map_err(|e| BackendError::new("KVM_SET_CLOCK", io::Error::from(e)))
    }

    /// Nanoseconds that have passed, where that is believable.
    fn gap(&self, now: u64) -> u64 {
        now.checked_sub(self.realtime).filter(|&gap| gap <= GAP_MAX).unwrap_or(0)
    }
}

/// Saves `vm/clock` and each `vcpu/N/tsc`.
pub(super) fn save(vm: &Vm, out: &mut dyn StateSink) -> Result<(), BackendError> {
    let vcpus = &vm.machine.vcpus;
    let first = lock(&vcpus[0].fd);
    let offset = tsc_offset(&first).ok();
    let data =
        vm.machine.vm.get_clock().map_err(|e| BackendError::new("KVM_GET_CLOCK", io::Error::from(e)))?;
    // Where KVM does not tell the wall clock of the same moment, ours is a little late: then the destination
    // adds that little less. The TSC, read last, is never early.
    let realtime = if data.flags & KVM_CLOCK_REALTIME != 0 { data.realtime } else { wall_clock() };
    let late = read_tsc(&first).map_err(|e| vcpu_error(0, "reading its TSC", e))?;
    drop(first);
    let exact = offset.map(|o| data.host_tsc.wrapping_add(o));
    let tsc = match exact {
        // Only without scaling is it the sum; scaled, it is far from what was read.
        Some(exact)
            if data.flags & KVM_CLOCK_HOST_TSC != 0
                && late.wrapping_sub(exact) < ticks(GAP_MAX / 600, vm.tsc_khz) =>
        {
            exact
        }
        _ => late,
    };
    let clock = Clock { kvmclock: data.clock, realtime, tsc, tsc_khz: vm.tsc_khz };
    out.piece("vm/clock", 1, &clock.encode())?;
    for vcpu in vcpus {
        let own = if offset.is_some() { tsc_offset(&lock(&vcpu.fd)).ok() } else { None };
        // Without offsets KVM keeps the TSCs of a VM equal that were written equal.
        let delta = own.zip(offset).map_or(0, |(own, first)| own.wrapping_sub(first) as i64);
        out.piece(&format!("vcpu/{}/tsc", vcpu.index), 1, &delta.to_le_bytes())?;
    }
    Ok(())
}

fn wall_clock() -> u64 {
    // Before 1970 or after 2554 no gap will be believable, whatever this is.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64)
}

/// Ticks of a TSC of `khz` in `ns`, rounded up.
fn ticks(ns: u64, khz: u32) -> u64 {
    (u128::from(ns) * u128::from(khz)).div_ceil(1_000_000) as u64
}

fn read_tsc(vcpu: &VcpuFd) -> io::Result<u64> {
    let entry = kvm_msr_entry { index: MSR_TSC, ..kvm_msr_entry::default() };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::OutOfMemory)?;
    match vcpu.get_msrs(&mut msrs)? {
        1 => Ok(msrs.as_slice()[0].data),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn write_tsc(vcpu: &VcpuFd, data: u64) -> io::Result<()> {
    let entry = kvm_msr_entry { index: MSR_TSC, data, ..kvm_msr_entry::default() };
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::OutOfMemory)?;
    match vcpu.set_msrs(&msrs)? {
        1 => Ok(()),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_believable_gap_counts() {
        let clock = Clock { kvmclock: 5, realtime: 1_000, tsc: 7, tsc_khz: 2_000_000 };
        assert_eq!(clock.gap(1_500), 500);
        assert_eq!(clock.gap(999), 0);
        assert_eq!(clock.gap(1_001 + GAP_MAX), 0);
        assert_eq!(Clock::decode(&clock.encode()), clock);
        assert_eq!(clock.encode().len(), LEN);
        assert_eq!(ticks(3, 2_000_000), 6);
    }
}
