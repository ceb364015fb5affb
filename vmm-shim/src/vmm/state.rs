//! A VM's state as named, versioned blobs.
//!
//! | name | version | content |
//! |---|---|---|
//! | `vm/info` | 1 | u32 vCPUs |
//! | `vm/clock` | 1 | u64 kvmclock ns, u64 wall clock ns since 1970, u64 TSC of vCPU 0 then, u32 TSC frequency in kHz, u32 zero |
//! | `vm/irqchip/0`, `/1`, `/2` | 1 | `struct kvm_irqchip`: the two PICs and the IOAPIC |
//! | `vm/pit` | 1 | `struct kvm_pit_state2` |
//! | `vm/serial` | 1 | IER, LCR, MCR, scratch, DLL, DLM, FCR, zero: a byte each |
//! | `vcpu/N/cpuid` | 1 | entries of `struct kvm_cpuid_entry2` |
//! | `vcpu/N/mp-state`, `regs`, `fpu`, `xcrs`, `debugregs`, `lapic`, `events` | 1 | KVM's structure of that name |
//! | `vcpu/N/sregs` | 1 or 2 | `struct kvm_sregs` or `struct kvm_sregs2` |
//! | `vcpu/N/xsave` | 1 | `struct kvm_xsave` with as much of its tail as `KVM_CAP_XSAVE2` tells, at least 4096 bytes |
//! | `vcpu/N/msrs` | 1 | u32 index, u32 zero, u64 value, for each MSR of `KVM_GET_MSR_INDEX_LIST` but the TSC |
//! | `vcpu/N/tsc` | 1 | i64 what this vCPU's TSC is ahead of vCPU 0's |
//!
//! Numbers are little-endian; KVM's structures are as the x86-64 kernel ABI has them. All blobs must be
//! there, and no others; names, versions and lengths are checked before anything is applied. What a kernel
//! refuses later makes the VM unusable.
//!
//! # Time
//!
//! Guest time never goes back. The state holds the guest's TSC and kvmclock together with the wall clock of
//! the same moment, after the pause. The destination sets both to those values plus what its own wall clock
//! says has passed since; so the guest's clocks lose nothing by the move, as far as the hosts' wall clocks
//! agree. Where the destination's wall clock is behind, or ahead by more than ten minutes (hosts without time
//! synchronisation, or a state that lay in a file), nothing is added: time goes on from the pause. The TSCs
//! of all vCPUs keep their exact distances, by setting offsets (`KVM_VCPU_TSC_OFFSET`); kernels before 5.16
//! synchronise equal TSC writes themselves. A KVM that ignores both (a para-virtual one was seen to) is found
//! out by reading the TSC back: where it would go back, the state is refused. A TSC of another frequency
//! needs hardware that scales, else the state is refused.

use kvm_bindings::{kvm_irqchip, kvm_pit_state2};
use pagecopy::backend::{BackendError, StateBlob, StateSink};

use super::blobs::{Blobs, Reader};
use super::clock::{self, Clock};
use super::serial::Serial;
use super::state_vcpu::{self, VcpuState};
use super::vcpu::lock;
use super::{CPUS_MAX, Vm};
use crate::kvm::sys::{get_struct, ior, iow, iowr, set_struct};

const IRQCHIP_LEN: usize = size_of::<kvm_irqchip>();
const PIT_LEN: usize = size_of::<kvm_pit_state2>();
const GET_IRQCHIP: u64 = iowr(0x62, IRQCHIP_LEN);
const SET_IRQCHIP: u64 = ior(0x63, IRQCHIP_LEN);
const GET_PIT2: u64 = ior(0x9f, PIT_LEN);
const SET_PIT2: u64 = iow(0xa0, PIT_LEN);

/// State that has been checked, ready to be applied.
pub(super) struct Plan<'a> {
    irqchips: [&'a [u8]; 3],
    pit: &'a [u8],
    serial: &'a [u8],
    clock: Clock,
    vcpus: Vec<VcpuState<'a>>,
}

/// Says the whole state of a paused VM.
pub(super) fn save(vm: &Vm, out: &mut dyn StateSink) -> Result<(), BackendError> {
    let machine = &vm.machine;
    let fd = &machine.vm;
    out.piece("vm/info", 1, &u32::from(vm.cpus()).to_le_bytes())?;
    // Before all else: asking for it may let a vCPU take a pending INIT or SIPI.
    let mut mp_states = Vec::new();
    for vcpu in &machine.vcpus {
        mp_states.push(state_vcpu::save_mp_state(vcpu)?);
    }
    for (vcpu, mp_state) in machine.vcpus.iter().zip(mp_states) {
        state_vcpu::save(vm, vcpu, &mp_state, out)?;
    }
    clock::save(vm, out)?;
    for chip in 0..3u32 {
        let mut bytes = vec![0; IRQCHIP_LEN];
        bytes[..4].copy_from_slice(&chip.to_le_bytes());
        get_struct(fd, GET_IRQCHIP, &mut bytes).map_err(|e| BackendError::new("KVM_GET_IRQCHIP", e))?;
        out.piece(&format!("vm/irqchip/{chip}"), 1, &bytes)?;
    }
    let mut pit = vec![0; PIT_LEN];
    get_struct(fd, GET_PIT2, &mut pit).map_err(|e| BackendError::new("KVM_GET_PIT2", e))?;
    out.piece("vm/pit", 1, &pit)?;
    let mut serial = lock(&machine.serial);
    serial.flush();
    out.piece("vm/serial", 1, &serial.save())
}

/// Checks names, versions, lengths, and what can be known of the content.
pub(super) fn check<'a>(vm: &Vm, blobs: &'a [StateBlob]) -> Result<Plan<'a>, BackendError> {
    let mut left = Blobs(blobs.iter().collect());
    let cpus = Reader::new(left.take_sized("vm/info", 4)?).u32();
    if cpus != u32::from(vm.cpus()) {
        let own = vm.cpus();
        return Err(BackendError::invalid(format!(
            "state: of {cpus} vCPUs; this VM has {own} (1 to {CPUS_MAX})"
        )));
    }
    let mut irqchips: [&[u8]; 3] = [&[]; 3];
    for (chip, bytes) in irqchips.iter_mut().enumerate() {
        let name = format!("vm/irqchip/{chip}");
        *bytes = left.take_sized(&name, IRQCHIP_LEN)?;
        let id = Reader::new(bytes).u32();
        if id as usize != chip {
            return Err(BackendError::invalid(format!("state: {name} is of chip {id}")));
        }
    }
    let pit = left.take_sized("vm/pit", PIT_LEN)?;
    let serial = left.take_sized("vm/serial", Serial::STATE_LEN)?;
    let clock = Clock::decode(left.take_sized("vm/clock", clock::LEN)?);
    let mut vcpus = Vec::new();
    for index in 0..vm.cpus() {
        vcpus.push(state_vcpu::check(vm, index, &mut left)?);
    }
    if let Some(extra) = left.0.first() {
        let (name, version) = (&extra.name, extra.version);
        let why = format!("state: {name} (version {version}) is unknown to this VM, or given twice");
        return Err(BackendError::invalid(why));
    }
    Ok(Plan { irqchips, pit, serial, clock, vcpus })
}

/// Puts checked state into the VM.
pub(super) fn apply(vm: &Vm, plan: &Plan<'_>) -> Result<(), BackendError> {
    let machine = &vm.machine;
    let fd = &machine.vm;
    for (vcpu, state) in machine.vcpus.iter().zip(&plan.vcpus) {
        state_vcpu::apply(vm, vcpu, state, plan.clock.tsc_khz)?;
    }
    for bytes in plan.irqchips {
        set_struct(fd, SET_IRQCHIP, bytes).map_err(|e| BackendError::new("KVM_SET_IRQCHIP", e))?;
    }
    set_struct(fd, SET_PIT2, plan.pit).map_err(|e| BackendError::new("KVM_SET_PIT2", e))?;
    lock(&machine.serial).load(plan.serial);
    let deltas: Vec<i64> = plan.vcpus.iter().map(|v| v.tsc_delta).collect();
    plan.clock.apply(vm, &deltas)?;
    for (vcpu, state) in machine.vcpus.iter().zip(&plan.vcpus) {
        state_vcpu::apply_last(vcpu, state)?;
    }
    Ok(())
}
