//! The loader: puts a guest into RAM before it starts, and vCPUs into the mode it begins in.
//!
//! 64-bit images begin in long mode at CPL 3, on page tables that map all memory one to one in 2 MiB pages;
//! no supervisor code exists, so no descriptor tables do: any exception is a triple fault. They may use all
//! ports for two reasons, either of which is enough for a processor: `IOPL` is 3, which a para-virtual KVM
//! was seen to lose, and a task state segment has an I/O permission bitmap of zeros, which an emulator of SVM
//! was seen not to look at. Segment and task registers satisfy the checks that VMX and SVM make on entry
//! (Intel SDM 3C, 27.3.1). Page-table entries carry their accessed and dirty bits from the start, so that the
//! processor has no reason to write the tables later.

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use pagecopy::backend::GuestRam;
use pagecopy::layout::PAGE_SIZE;
use vm_memory::Bytes;

use super::{GuestImage, VmError};
use crate::guests::counter::CounterParams;
use crate::guests::{counter, map};

const GIB: u64 = 1 << 30;
/// End of low memory and start of high memory: between them are the interrupt controllers and KVM's own
/// pages.
pub(crate) const LOW_END: u64 = 3 * GIB;
/// See [`LOW_END`].
pub(crate) const HIGH_START: u64 = 4 * GIB;
/// Least size of the region at address 0 for a 64-bit guest.
pub(crate) const LOW_MIN: u64 = 16 << 20;
/// One PML4 entry.
const TABLES_MAX: u64 = 512 * GIB;

/// Bytes of a 64-bit TSS before its I/O bitmap, and where in it that one's offset stands.
const TSS_LEN: u32 = 104;
const TSS_IO_BASE: usize = 102;
/// One bit for each port.
const IO_BITMAP_LEN: usize = 8192;
const _: () = assert!(map::TSS_LIMIT == TSS_LEN + IO_BITMAP_LEN as u32);

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT | WRITE | USER | ACCESSED;
const LEAF: u64 = TABLE | DIRTY | LARGE;

/// Where working memory may lie: everything from [`map::FREE`], low memory first, then high memory.
pub(crate) struct Room {
    pub(crate) low_end: u64,
    pub(crate) gap: u64,
    pub(crate) bytes: u64,
}

/// Writes an image and what it needs into RAM. Nothing is written for an incoming guest.
pub(crate) fn load(ram: &dyn GuestRam, image: &GuestImage, cpus: u8, tsc_khz: u32) -> Result<(), VmError> {
    match image {
        GuestImage::Incoming => Ok(()),
        GuestImage::RealMode(bytes) => put(ram, map::BOOT_SECTOR, bytes),
        GuestImage::User64(code) => load_64(ram, code),
        GuestImage::Writer => load_64(ram, crate::guests::writer_code()),
        GuestImage::MemTest { bytes } => {
            let room = room(ram)?;
            if *bytes == 0 || bytes % 1024 != 0 || *bytes > room.bytes {
                let why =
                    format!("mem-test array of {bytes} bytes: a multiple of 1024 up to {} fits", room.bytes);
                return Err(VmError::Image { why });
            }
            load_64(ram, crate::guests::mem_test_code())?;
            put_words(ram, map::PARAMS, &[map::FREE, *bytes, room.low_end, room.gap])
        }
        GuestImage::Counter(params) => load_counter(ram, params, cpus, tsc_khz),
    }
}

fn load_counter(ram: &dyn GuestRam, params: &CounterParams, cpus: u8, tsc_khz: u32) -> Result<(), VmError> {
    let room = room(ram)?;
    let page = PAGE_SIZE as u64;
    let pages = params.pages(cpus);
    if pages == 0 || params.working_set > room.bytes {
        let (set, most, least) = (params.working_set, room.bytes, page * u64::from(cpus));
        let why = format!("working set of {set} bytes: at least {least} and at most {most} fit this guest");
        return Err(VmError::Image { why });
    }
    if params.page_words > counter::PAGE_WORDS_MAX {
        let (words, most) = (params.page_words, counter::PAGE_WORDS_MAX);
        return Err(VmError::Image { why: format!("{words} pattern words per page; at most {most} fit") });
    }
    let ticks = match params.pages_per_s {
        0 => 0,
        rate => (u64::from(tsc_khz) * 1000 / rate).max(1),
    };
    load_64(ram, crate::guests::counter_code())?;
    let (low_end, gap, words) = (room.low_end, room.gap, u64::from(params.page_words));
    let catch_up = u64::from(tsc_khz) * counter::CATCH_UP_MS;
    let block = [u64::from(cpus), map::FREE, pages, low_end, gap, ticks, words, catch_up, map::LOCK];
    put_words(ram, map::PARAMS, &block)?;
    put_words(ram, map::LOCK, &[0])?;
    put_words(ram, map::GAPS, &[0; super::CPUS_MAX as usize])
}

/// The memory that a 64-bit guest may use; an error where it cannot run at all.
fn room(ram: &dyn GuestRam) -> Result<Room, VmError> {
    let regions = ram.layout().regions();
    let low = &regions[0];
    if low.gpa != Some(0) || low.len < LOW_MIN {
        let (gpa, len) = (low.gpa, low.len);
        let why = format!(
            "the first region ({len:#x} bytes at {gpa:#x?}) must start at 0 and hold {LOW_MIN:#x} bytes"
        );
        return Err(VmError::Image { why });
    }
    let high = regions.get(1).filter(|r| r.gpa == Some(HIGH_START));
    if let Some(r) = regions.get(1 + usize::from(high.is_some())) {
        let why =
            format!("region {:?} at {:#x?}: guests know low memory and one region at 4 GiB", r.name, r.gpa);
        return Err(VmError::Image { why });
    }
    let (high_len, gap) = high.map_or((0, 0), |r| (r.len, HIGH_START - low.len));
    if HIGH_START + high_len > TABLES_MAX {
        return Err(VmError::Image {
            why: format!("guests of more than {TABLES_MAX:#x} bytes are not supported"),
        });
    }
    Ok(Room { low_end: low.len, gap, bytes: low.len - map::FREE + high_len })
}

/// Page tables and code.
fn load_64(ram: &dyn GuestRam, code: &[u8]) -> Result<(), VmError> {
    room(ram)?;
    let most = (map::CODE_END - map::CODE) as usize;
    if code.is_empty() || code.len() > most {
        return Err(VmError::Image { why: format!("code of {} bytes; 1 to {most} fit", code.len()) });
    }
    put(ram, map::CODE, code)?;
    let mut tss = vec![0; TSS_LEN as usize + IO_BITMAP_LEN + 1];
    tss[TSS_IO_BASE..][..2].copy_from_slice(&(TSS_LEN as u16).to_le_bytes());
    // The processor reads two bytes at a time; the last must be ones (Intel SDM 1, 19.5.2).
    tss[TSS_LEN as usize + IO_BITMAP_LEN] = 0xff;
    put(ram, map::TSS, &tss)?;
    let end = ram.layout().regions().iter().filter_map(|r| Some(r.addresses()?.end)).max().unwrap_or(0);
    let (page, gibs) = (PAGE_SIZE as u64, end.div_ceil(GIB));
    let pdpt = map::TABLES + page;
    put_words(ram, map::TABLES, &[pdpt | TABLE])?;
    for gib in 0..gibs {
        let directory = pdpt + page * (1 + gib);
        put_words(ram, pdpt + 8 * gib, &[directory | TABLE])?;
        let entries: Vec<u64> = (0..512).map(|i| (gib * GIB + (i << 21)) | LEAF).collect();
        put_words(ram, directory, &entries)?;
    }
    Ok(())
}

/// Puts a vCPU into the state an image begins in.
pub(crate) fn set_registers(vcpu: &VcpuFd, image: &GuestImage, index: u8) -> Result<(), kvm_ioctls::Error> {
    match image {
        GuestImage::Incoming => return Ok(()),
        // The other vCPUs wait for INIT and SIPI, as after power-on.
        GuestImage::RealMode(_) if index != 0 => return Ok(()),
        GuestImage::RealMode(_) => {
            let mut sregs = vcpu.get_sregs()?;
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            vcpu.set_sregs(&sregs)?;
            let rip = map::BOOT_SECTOR;
            return vcpu.set_regs(&kvm_regs { rip, rsp: rip, rdx: 0x80, rflags: 2, ..kvm_regs::default() });
        }
        _ => {}
    }
    let mut sregs = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, dpl: 3, s: 1, g: 1, ..kvm_segment::default() };
    // Type 11: code, readable, accessed. Type 3: data, writable, accessed.
    sregs.cs = kvm_segment { selector: 0x1b, type_: 11, l: 1, ..flat };
    let data = kvm_segment { selector: 0x23, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 64-bit TSS, which long mode demands, with its I/O bitmap.
    sregs.tr = kvm_segment {
        base: map::TSS,
        selector: 0x28,
        type_: 11,
        present: 1,
        limit: map::TSS_LIMIT,
        ..kvm_segment::default()
    };
    sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
    (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit) = (0, 0, 0, 0);
    // PG, WP, NE, ET, MP, PE; PAE, OSFXSR, OSXMMEXCPT; LMA, LME.
    sregs.cr0 = 0x8001_0033;
    sregs.cr4 = 0x620;
    sregs.cr3 = map::TABLES;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: map::CODE,
        rsp: map::STACKS + PAGE_SIZE as u64 * (u64::from(index) + 1),
        rdi: index.into(),
        rsi: map::PARAMS,
        rflags: 0x3002,
        ..kvm_regs::default()
    })?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
}

fn put(ram: &dyn GuestRam, gpa: u64, bytes: &[u8]) -> Result<(), VmError> {
    let Some((region, offset)) = ram.layout().find(gpa, bytes.len() as u64) else {
        let len = bytes.len();
        return Err(VmError::Image {
            why: format!("{len} bytes at {gpa:#x} do not lie in one region of guest memory"),
        });
    };
    ram.region(region)
        .write_slice(bytes, offset as usize)
        .map_err(|e| VmError::Image { why: format!("writing {} bytes at {gpa:#x}: {e}", bytes.len()) })
}

fn put_words(ram: &dyn GuestRam, gpa: u64, words: &[u64]) -> Result<(), VmError> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    put(ram, gpa, &bytes)
}
