//! The state of one vCPU: registers, interrupts, model-specific registers, CPUID. See [`super::state`].

use std::collections::HashMap;
use std::io;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use pagecopy::backend::{BackendError, StateBlob, StateSink};

use super::Vm;
use super::blobs::{Blobs, Reader, check_len, vcpu_error};
use super::clock::MSR_TSC;
use super::vcpu::{Vcpu, lock};
use crate::kvm::sys::{get_struct, get_xsave2, ior, iow, set_struct, set_xsave, xsave_len};

/// A structure of KVM's that moves as it is.
struct Plain {
    name: &'static str,
    get: u64,
    set: u64,
    len: usize,
}

const fn plain(name: &'static str, get: u64, set: u64, len: usize) -> Plain {
    Plain { name, get: ior(get, len), set: iow(set, len), len }
}

const MP_STATE: Plain = plain("mp-state", 0x98, 0x99, size_of::<kvm_mp_state>());
const EVENTS: Plain = plain("events", 0x9f, 0xa0, size_of::<kvm_vcpu_events>());
const LAPIC: Plain = plain("lapic", 0x8e, 0x8f, size_of::<kvm_lapic_state>());
const SREGS: Plain = plain("sregs", 0x83, 0x84, size_of::<kvm_sregs>());
const SREGS2: Plain = plain("sregs", 0xcc, 0xcd, size_of::<kvm_sregs2>());
/// What is applied after the special registers, in this order.
const PLAIN: [Plain; 4] = [
    plain("regs", 0x81, 0x82, size_of::<kvm_regs>()),
    plain("fpu", 0x8c, 0x8d, size_of::<kvm_fpu>()),
    plain("xcrs", 0xa6, 0xa7, size_of::<kvm_xcrs>()),
    plain("debugregs", 0xa1, 0xa2, size_of::<kvm_debugregs>()),
];
const CAP_SREGS2: u64 = 200;

/// MSRs that are written only when the TSC is right: the deadline timer, and where kvmclock is (both
/// generations).
const MSRS_LAST: [u32; 5] = [0x6e0, 0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01];
const MSR_LEN: usize = size_of::<kvm_msr_entry>();
const CPUID_LEN: usize = size_of::<kvm_cpuid_entry2>();

/// CPUID registers that hold feature bits, as (function, index, registers): what the source's guest was told
/// it has, this host must have.
const FEATURES: [(u32, u32, &[Register]); 9] = [
    (1, 0, &[Register::Ecx, Register::Edx]),
    (7, 0, &[Register::Ebx, Register::Ecx, Register::Edx]),
    (7, 1, &[Register::Eax, Register::Ebx, Register::Edx]),
    (7, 2, &[Register::Edx]),
    (0xd, 0, &[Register::Eax, Register::Edx]),
    (0xd, 1, &[Register::Eax]),
    (0x8000_0001, 0, &[Register::Ecx, Register::Edx]),
    (0x8000_0007, 0, &[Register::Edx]),
    (0x8000_0008, 0, &[Register::Ebx]),
];

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

/// The checked state of a vCPU.
pub(super) struct VcpuState<'a> {
    cpuid: CpuId,
    sregs: &'a StateBlob,
    plain: Vec<&'a [u8]>,
    xsave: Vec<u8>,
    lapic: &'a [u8],
    msrs: Vec<kvm_msr_entry>,
    events: &'a [u8],
    mp_state: &'a [u8],
    pub(super) tsc_delta: i64,
}

/// The CPUID of a vCPU: what KVM supports, with the vCPU's number where CPUID tells it.
pub(super) fn cpuid_of(supported: &CpuId, index: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(index) << 24,
            0xb | 0x1f => entry.edx = index.into(),
            _ => {}
        }
    }
    cpuid
}

fn get(fd: &VcpuFd, index: u8, what: &Plain) -> Result<Vec<u8>, BackendError> {
    let mut bytes = vec![0; what.len];
    get_struct(fd, what.get, &mut bytes)
        .map_err(|e| vcpu_error(index, &format!("reading {}", what.name), e))?;
    Ok(bytes)
}

fn set(fd: &VcpuFd, index: u8, what: &Plain, bytes: &[u8]) -> Result<(), BackendError> {
    set_struct(fd, what.set, bytes).map_err(|e| vcpu_error(index, &format!("setting {}", what.name), e))
}

/// Whether special registers have the second form here.
fn sregs_of(vm: &Vm) -> Plain {
    if vm.machine.vm.check_extension_raw(CAP_SREGS2) > 0 { SREGS2 } else { SREGS }
}

pub(super) fn save_mp_state(vcpu: &Vcpu) -> Result<Vec<u8>, BackendError> {
    get(&lock(&vcpu.fd), vcpu.index, &MP_STATE)
}

pub(super) fn save(
    vm: &Vm,
    vcpu: &Vcpu,
    mp_state: &[u8],
    out: &mut dyn StateSink,
) -> Result<(), BackendError> {
    let (fd, index) = (&*lock(&vcpu.fd), vcpu.index);
    let name = |of: &str| format!("vcpu/{index}/{of}");
    out.piece(&name(MP_STATE.name), 1, mp_state)?;
    let sregs = sregs_of(vm);
    let version = if sregs.len == SREGS.len { 1 } else { 2 };
    out.piece(&name(sregs.name), version, &get(fd, index, &sregs)?)?;
    for what in &PLAIN {
        out.piece(&name(what.name), 1, &get(fd, index, what)?)?;
    }
    let vm_fd = &vm.machine.vm;
    let mut xsave = vec![0; xsave_len(vm_fd)];
    if xsave.len() > 4096 || vm_fd.check_extension_raw(208) > 0 {
        get_xsave2(fd, vm_fd, &mut xsave).map_err(|e| vcpu_error(index, "KVM_GET_XSAVE2", e))?;
    } else {
        get_struct(fd, ior(0xa4, 4096), &mut xsave).map_err(|e| vcpu_error(index, "KVM_GET_XSAVE", e))?;
    }
    out.piece(&name("xsave"), 1, &xsave)?;
    out.piece(&name(LAPIC.name), 1, &get(fd, index, &LAPIC)?)?;
    let msrs = read_msrs(vm, fd).map_err(|e| vcpu_error(index, "reading its MSRs", e))?;
    let msrs: Vec<u8> = msrs.iter().flat_map(encode_msr).collect();
    out.piece(&name("msrs"), 1, &msrs)?;
    // Last: the other calls may move pending events.
    out.piece(&name(EVENTS.name), 1, &get(fd, index, &EVENTS)?)?;
    let cpuid = lock(&vm.cpuids);
    let cpuid: Vec<u8> = cpuid[usize::from(index)].as_slice().iter().flat_map(encode_cpuid).collect();
    out.piece(&name("cpuid"), 1, &cpuid)
}

fn encode_msr(msr: &kvm_msr_entry) -> Vec<u8> {
    [&msr.index.to_le_bytes()[..], &[0; 4], &msr.data.to_le_bytes()].concat()
}

fn encode_cpuid(e: &kvm_cpuid_entry2) -> Vec<u8> {
    [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx, 0, 0, 0]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect()
}

/// All MSRs that KVM lists and lets us read, but the TSC.
fn read_msrs(vm: &Vm, fd: &VcpuFd) -> io::Result<Vec<kvm_msr_entry>> {
    let list = vm.kvm.get_msr_index_list()?;
    let wanted: Vec<kvm_msr_entry> = list
        .as_slice()
        .iter()
        .filter(|&&index| index != MSR_TSC)
        .map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() })
        .collect();
    let mut read = Vec::with_capacity(wanted.len());
    let mut left = &wanted[..];
    // KVM_GET_MSRS stops at the first that it refuses: one that this vCPU's CPUID does not have.
    while !left.is_empty() {
        let mut msrs = Msrs::from_entries(left).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let count = fd.get_msrs(&mut msrs)?;
        read.extend_from_slice(&msrs.as_slice()[..count]);
        left = left.get(count + 1..).unwrap_or(&[]);
    }
    Ok(read)
}

/// Takes the blobs of a vCPU and checks them.
pub(super) fn check<'a>(vm: &Vm, index: u8, blobs: &mut Blobs<'a>) -> Result<VcpuState<'a>, BackendError> {
    let name = |of: &str| format!("vcpu/{index}/{of}");
    let sregs = blobs.take(&name(SREGS.name), &[1, 2])?;
    check_len(sregs, if sregs.version == 1 { SREGS.len } else { SREGS2.len })?;
    if sregs.version == 2 && sregs_of(vm).len != SREGS2.len {
        let why = format!(
            "state: {} has version 2 (KVM_SET_SREGS2), which needs Linux 5.14 on this host",
            sregs.name
        );
        return Err(BackendError::invalid(why));
    }
    let mut plain = Vec::new();
    for what in &PLAIN {
        plain.push(blobs.take_sized(&name(what.name), what.len)?);
    }
    let xsave = blobs.take(&name("xsave"), &[1])?;
    let (len, own) = (xsave.bytes.len(), xsave_len(&vm.machine.vm));
    if !(4096..=own).contains(&len) {
        let why =
            format!("state: {} has {len} bytes; this host's processor state has 4096 to {own}", xsave.name);
        return Err(BackendError::invalid(why));
    }
    let mut xsave = xsave.bytes.clone();
    xsave.resize(own, 0);
    Ok(VcpuState {
        cpuid: check_cpuid(vm, blobs.take(&name("cpuid"), &[1])?)?,
        sregs,
        plain,
        xsave,
        lapic: blobs.take_sized(&name(LAPIC.name), LAPIC.len)?,
        msrs: check_msrs(blobs.take(&name("msrs"), &[1])?)?,
        events: blobs.take_sized(&name(EVENTS.name), EVENTS.len)?,
        mp_state: blobs.take_sized(&name(MP_STATE.name), MP_STATE.len)?,
        tsc_delta: Reader::new(blobs.take_sized(&name("tsc"), 8)?).u64() as i64,
    })
}

fn entries<'a>(
    blob: &'a StateBlob,
    len: usize,
    most: usize,
) -> Result<impl Iterator<Item = Reader<'a>>, BackendError> {
    let (name, bytes) = (&blob.name, blob.bytes.len());
    if bytes % len != 0 || bytes / len > most || bytes == 0 {
        let why = format!("state: {name} has {bytes} bytes; it must have 1 to {most} entries of {len}");
        return Err(BackendError::invalid(why));
    }
    Ok(blob.bytes.chunks_exact(len).map(Reader::new))
}

fn check_msrs(blob: &StateBlob) -> Result<Vec<kvm_msr_entry>, BackendError> {
    let read = |mut r: Reader<'_>| {
        let (index, _zero) = (r.u32(), r.u32());
        kvm_msr_entry { index, reserved: 0, data: r.u64() }
    };
    let msrs: Vec<_> = entries(blob, MSR_LEN, KVM_MAX_MSR_ENTRIES)?.map(read).collect();
    if msrs.iter().any(|m| m.index == MSR_TSC) {
        return Err(BackendError::invalid(format!(
            "state: {} holds the TSC, which vm/clock tells",
            blob.name
        )));
    }
    Ok(msrs)
}

/// Checks that this host has all features that the guest was told of.
fn check_cpuid(vm: &Vm, blob: &StateBlob) -> Result<CpuId, BackendError> {
    let read = |mut r: Reader<'_>| kvm_cpuid_entry2 {
        function: r.u32(),
        index: r.u32(),
        flags: r.u32(),
        eax: r.u32(),
        ebx: r.u32(),
        ecx: r.u32(),
        edx: r.u32(),
        padding: [0; 3],
    };
    let told: Vec<_> = entries(blob, CPUID_LEN, KVM_MAX_CPUID_ENTRIES)?.map(read).collect();
    let own: HashMap<_, _> = vm.cpuid.as_slice().iter().map(|e| ((e.function, e.index), e)).collect();
    for &(function, index, registers) in &FEATURES {
        let Some(entry) = told.iter().find(|e| (e.function, e.index) == (function, index)) else { continue };
        for register in registers {
            let here = own.get(&(function, index)).map_or(0, |e| register.of(e));
            let lacking = register.of(entry) & !here;
            if lacking != 0 {
                return Err(BackendError::invalid(format!(
                    "state: {}: this host's processor lacks features that the guest was told of: CPUID {function:#x}.\
                     {index} {register:?} bits {lacking:#x}",
                    blob.name
                )));
            }
        }
    }
    CpuId::from_entries(&told).map_err(|e| BackendError::invalid(format!("state: {}: {e:?}", blob.name)))
}

/// Applies all but what depends on the clocks and the interrupt controllers.
pub(super) fn apply(vm: &Vm, vcpu: &Vcpu, state: &VcpuState<'_>, tsc_khz: u32) -> Result<(), BackendError> {
    let (fd, index) = (&*lock(&vcpu.fd), vcpu.index);
    fd.set_cpuid2(&state.cpuid).map_err(|e| vcpu_error(index, "KVM_SET_CPUID2", e))?;
    lock(&vm.cpuids)[usize::from(index)] = state.cpuid.clone();
    if tsc_khz != vm.tsc_khz {
        // Within 250 ppm KVM takes it as equal; beyond, only hardware that scales can.
        fd.set_tsc_khz(tsc_khz).map_err(|e| {
            let own = vm.tsc_khz;
            let why = format!(
                "the guest's TSC has {tsc_khz} kHz, this host's {own} kHz, and the processor cannot scale it: move the \
                 guest to a host with the same TSC frequency"
            );
            vcpu_error(index, &why, e)
        })?;
    }
    let sregs = if state.sregs.version == 1 { SREGS } else { SREGS2 };
    // First: they hold EFER and the APIC's address, which MSRs and LAPIC depend on.
    set(fd, index, &sregs, &state.sregs.bytes)?;
    for (what, bytes) in PLAIN.iter().zip(&state.plain) {
        set(fd, index, what, bytes)?;
    }
    set_xsave(fd, &vm.machine.vm, &state.xsave).map_err(|e| vcpu_error(index, "KVM_SET_XSAVE", e))?;
    write_msrs(fd, index, state.msrs.iter().filter(|m| !MSRS_LAST.contains(&m.index)))?;
    set(fd, index, &LAPIC, state.lapic)
}

/// Applies the rest.
pub(super) fn apply_last(vcpu: &Vcpu, state: &VcpuState<'_>) -> Result<(), BackendError> {
    let (fd, index) = (&*lock(&vcpu.fd), vcpu.index);
    write_msrs(fd, index, state.msrs.iter().filter(|m| MSRS_LAST.contains(&m.index)))?;
    set(fd, index, &MP_STATE, state.mp_state)?;
    set(fd, index, &EVENTS, state.events)
}

/// Writes MSRs; one that KVM refuses must have that value already.
fn write_msrs<'a>(
    fd: &VcpuFd,
    index: u8,
    msrs: impl Iterator<Item = &'a kvm_msr_entry>,
) -> Result<(), BackendError> {
    let all: Vec<_> = msrs.copied().collect();
    let mut left = &all[..];
    let memory = |_| io::Error::from(io::ErrorKind::OutOfMemory);
    while !left.is_empty() {
        let list =
            Msrs::from_entries(left).map_err(memory).map_err(|e| vcpu_error(index, "setting MSRs", e))?;
        let count = fd.set_msrs(&list).map_err(|e| vcpu_error(index, "KVM_SET_MSRS", e))?;
        let Some(refused) = left.get(count) else { return Ok(()) };
        let mut own = Msrs::from_entries(&[kvm_msr_entry { data: 0, ..*refused }])
            .map_err(memory)
            .map_err(|e| vcpu_error(index, "reading an MSR", e))?;
        let read = fd.get_msrs(&mut own).map_err(|e| vcpu_error(index, "KVM_GET_MSRS", e))?;
        let (msr, data) = (refused.index, refused.data);
        match own.as_slice().first() {
            Some(own) if read == 1 && own.data == data => {}
            Some(own) if read == 1 => {
                let why = format!(
                    "MSR {msr:#x} is {data:#x} in the state, {:#x} here, and KVM refuses to change it",
                    own.data
                );
                return Err(vcpu_error(index, &why, io::ErrorKind::Unsupported));
            }
            _ => {
                let why = format!("MSR {msr:#x} ({data:#x} in the state) does not exist on this host");
                return Err(vcpu_error(index, &why, io::ErrorKind::Unsupported));
            }
        }
        left = &left[count + 1..];
    }
    Ok(())
}
