//! The last that was seen of a vCPU before its guest shut down.
//!
//! A triple fault leaves nothing to look at: KVM on AMD puts the vCPU into its reset state, so that the registers it then tells are those
//! of a processor at power-on. So the registers of the exits before are kept, which KVM leaves in `kvm_run` at each exit without a further
//! call (`KVM_CAP_SYNC_REGS`), and after a shutdown they are told with the code and the page tables that memory has there now: whether
//! the guest's memory was damaged or its processor's state, this tells.

use std::fmt::Write;
use std::time::Instant;

use kvm_bindings::{KVM_CAP_SYNC_REGS, kvm_regs};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};
use pagecopy::backend::GuestRam;
use vm_memory::Bytes;

/// Exits that are kept.
const KEPT: usize = 4;
/// Bytes of code that are told.
const CODE_LEN: u64 = 16;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What was seen at one exit.
#[derive(Clone, Copy)]
struct Seen {
    at: Instant,
    reason: u32,
    regs: kvm_regs,
    cr3: u64,
}

/// The exits of one vCPU, the last few.
#[derive(Default)]
pub(super) struct Last {
    on: bool,
    seen: [Option<Seen>; KEPT],
    next: usize,
}

impl Last {
    /// Asks KVM for the registers at each exit, where it can tell them.
    pub(super) fn new(vm: &VmFd, vcpu: &mut VcpuFd) -> Self {
        let wanted = [SyncReg::Register, SyncReg::SystemRegister];
        let offered = vm.check_extension_raw(KVM_CAP_SYNC_REGS.into());
        let on = wanted.iter().all(|&reg| offered & reg as i32 != 0);
        if on {
            wanted.into_iter().for_each(|reg| vcpu.set_sync_valid_reg(reg));
        }
        Self { on, ..Self::default() }
    }

    /// Takes note of the exit that `vcpu` has just made.
    pub(super) fn note(&mut self, vcpu: &mut VcpuFd) {
        if self.on {
            let (registers, reason) = (vcpu.sync_regs(), vcpu.get_kvm_run().exit_reason);
            let (regs, cr3) = (registers.regs, registers.sregs.cr3);
            self.seen[self.next] = Some(Seen { at: Instant::now(), reason, regs, cr3 });
            self.next = (self.next + 1) % KEPT;
        }
    }

    /// The exits before this one, the last first, in words; nothing where none is known.
    pub(super) fn tell(&self, ram: &dyn GuestRam) -> String {
        let mut text = String::new();
        let now = Instant::now();
        let of = |back: usize| self.seen[(self.next + KEPT - back) % KEPT];
        for (back, seen) in (1..=KEPT).filter_map(|back| Some((back, of(back)?))) {
            let r = &seen.regs;
            let before = now.duration_since(seen.at).as_micros();
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                "; {before} us before: exit reason {}, rip {:#x}, rflags {:#x}",
                seen.reason, r.rip, r.rflags
            );
            if back > 1 {
                continue;
            }
            let _ = write!(
                text,
                ", rax {:x} rbx {:x} rcx {:x} rdx {:x} rsi {:x} rdi {:x} rbp {:x} rsp {:x} r8 {:x} r9 {:x} r10 {:x} r11 {:x} r12 {:x} \
                 r13 {:x} r14 {:x} r15 {:x} cr3 {:x}",
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                r.rbp,
                r.rsp,
                r.r8,
                r.r9,
                r.r10,
                r.r11,
                r.r12,
                r.r13,
                r.r14,
                r.r15,
                seen.cr3
            );
            let (entries, code) = walk(ram, seen.cr3, r.rip);
            let _ = write!(text, ", page table entries now {entries:x?}, code now");
            match code {
                Some(code) => text.extend(code.iter().map(|byte| format!(" {byte:02x}"))),
                None => text.push_str(" not mapped"),
            }
        }
        text
    }
}

/// The page-table entries that lead to a linear address in 64-bit mode, and the bytes there, as memory has them now.
fn walk(ram: &dyn GuestRam, cr3: u64, address: u64) -> (Vec<u64>, Option<Vec<u8>>) {
    let mut entries = Vec::new();
    let mut table = cr3;
    for shift in [39u32, 30, 21, 12] {
        let Some(bytes) = read(ram, (table & ADDRESS) + 8 * (address >> shift & 511), 8) else { break };
        let entry = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        entries.push(entry);
        if entry & PRESENT == 0 {
            break;
        }
        if shift == 12 || (shift < 39 && entry & LARGE != 0) {
            let within = (1u64 << shift) - 1;
            let page_left = 4096 - (address & 4095);
            return (
                entries,
                read(ram, (entry & ADDRESS & !within) | (address & within), CODE_LEN.min(page_left)),
            );
        }
        table = entry;
    }
    (entries, None)
}

/// Bytes of guest memory; `None` where there is none.
fn read(ram: &dyn GuestRam, gpa: u64, len: u64) -> Option<Vec<u8>> {
    let (region, offset) = ram.layout().find(gpa, len)?;
    let mut bytes = vec![0; len as usize];
    ram.region(region).read_slice(&mut bytes, offset as usize).ok()?;
    Some(bytes)
}
