//! The memory slots whose writes are logged, of a VM that may be anybody's.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::layout::{CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE, Region};

use super::set_user_memory_region;

/// A memory slot: the fields of KVM's `struct kvm_userspace_memory_region`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its number, with the address space in the upper half, as `KVM_SET_USER_MEMORY_REGION` takes it.
    pub number: u32,
    /// Its flags but `KVM_MEM_LOG_DIRTY_PAGES`, which logs set and clear.
    pub flags: u32,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Address of the first byte in this process.
    pub host: u64,
}

impl Slot {
    /// A slot for each region of a guest's memory that has an address, numbered as the regions are, without flags.
    pub fn of_regions(ram: &dyn GuestRam) -> Vec<Self> {
        let regions = ram.layout().regions().iter().enumerate();
        let slot = |(region, r): (usize, &Region)| {
            let host = ram.region(region).ptr_guard_mut().as_ptr() as u64;
            Some(Self { number: region as u32, flags: 0, gpa: r.gpa?, len: r.len, host })
        };
        regions.filter_map(slot).collect()
    }
}

impl From<kvm_userspace_memory_region> for Slot {
    fn from(region: kvm_userspace_memory_region) -> Self {
        Self {
            number: region.slot,
            flags: region.flags & !KVM_MEM_LOG_DIRTY_PAGES,
            gpa: region.guest_phys_addr,
            len: region.memory_size,
            host: region.userspace_addr,
        }
    }
}

/// A VM of KVM, and which of its memory slots hold which pages: what [`KvmBitmapLog`](crate::kvm::KvmBitmapLog) and
/// [`KvmRingLog`](crate::kvm::KvmRingLog) need of it. The VM may have been made by any program of this process, with any version of
/// any binding.
///
/// It has a descriptor of its own of the VM, so the VM in the kernel lives for as long as this does, and keeps `ram`.
///
/// ```no_run
/// use std::sync::Arc;
/// use vmm_shim::guest_memory::{Backing, GuestMemory};
/// use vmm_shim::kvm::{KvmBitmapLog, KvmSlots, Slot};
/// use pagecopy::layout::Layout;
///
/// let vm = vmm_shim::kvm::open()?.create_vm()?;
/// let ram = Arc::new(GuestMemory::create(Layout::flat(64 << 20)?, &Backing::Memfd)?);
/// // SAFETY: `ram` is guest memory, and outlives the VM.
/// let slots = unsafe { KvmSlots::new(&vm, ram.clone(), &Slot::of_regions(&*ram)) }?;
/// let log = KvmBitmapLog::new(Arc::new(slots))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KvmSlots {
    vm: OwnedFd,
    ram: Arc<dyn GuestRam>,
    slots: Vec<(Slot, Range<u32>)>,
}

impl KvmSlots {
    /// Gives the VM these slots, where it has them not yet, with logging turned off. Slots that it has already are left as they are:
    /// KVM refuses another address or length.
    ///
    /// Each slot lies in one region of `ram` that has an address, from a whole number of chunks (256 KiB) after the region's start on,
    /// and together they hold all such regions: what has no slot is logged by nobody.
    ///
    /// # Safety
    /// `vm` is the descriptor of a VM. Each slot's `host` and `len` name memory that may be written at any time, as guest memory is,
    /// and that stays so until the VM is gone. While this value lives, nobody takes a slot away or puts another in its place.
    ///
    /// # Errors
    /// Slots that do not fit the regions, and what the system refuses; the text names the slot or the region.
    pub unsafe fn new(
        vm: &impl AsRawFd,
        ram: Arc<dyn GuestRam>,
        slots: &[Slot],
    ) -> Result<Self, BackendError> {
        // SAFETY: the caller's descriptor is open during the call.
        let vm = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
        let vm =
            vm.try_clone_to_owned().map_err(|e| BackendError::new("duplicate the descriptor of a VM", e))?;
        let slots = slots.iter().map(|slot| Ok((*slot, chunks_of(&*ram, slot)?)));
        let slots: Vec<_> = slots.collect::<Result<_, BackendError>>()?;
        let this = Self { vm, ram, slots };
        this.check_covered()?;
        this.log(false)?;
        Ok(this)
    }

    /// Whether each chunk of memory is in one slot.
    fn check_covered(&self) -> Result<(), BackendError> {
        let layout = self.ram.layout();
        for (region, r) in layout.regions().iter().enumerate().filter(|(_, r)| r.gpa.is_some()) {
            let chunks = layout.region_chunks(region);
            let mut within: Vec<_> = self
                .slots
                .iter()
                .filter(|(_, of)| chunks.contains(&of.start))
                .map(|(_, of)| of.clone())
                .collect();
            within.sort_by_key(|of| of.start);
            let mut covered = chunks.start;
            for of in within {
                if of.start != covered {
                    let what = if of.start < covered { "in two" } else { "in no" };
                    let chunk = of.start.min(covered);
                    return Err(BackendError::invalid(format!(
                        "chunk {chunk} of region {:?} is {what} memory slot",
                        r.name
                    )));
                }
                covered = of.end;
            }
            if covered != chunks.end {
                let what = format!("chunk {covered} of region {:?} is in no memory slot", r.name);
                return Err(BackendError::invalid(what));
            }
        }
        Ok(())
    }

    /// Turns dirty logging of all slots on or off.
    pub(crate) fn log(&self, on: bool) -> Result<(), BackendError> {
        for (slot, _) in &self.slots {
            let log = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            let region = kvm_userspace_memory_region {
                slot: slot.number,
                flags: slot.flags | log,
                guest_phys_addr: slot.gpa,
                memory_size: slot.len,
                userspace_addr: slot.host,
            };
            // SAFETY: whoever made this value has promised that this is a slot of the VM, or may be one.
            unsafe { set_user_memory_region(&self.vm, &region) }.map_err(|e| {
                let what = if on { "on" } else { "off" };
                BackendError::new(
                    format!("turning dirty logging {what} for slot {} at {:#x}", slot.number, slot.gpa),
                    e,
                )
            })?;
        }
        Ok(())
    }

    /// The VM's descriptor.
    pub(crate) fn vm(&self) -> &OwnedFd {
        &self.vm
    }

    /// The memory.
    pub fn ram(&self) -> &Arc<dyn GuestRam> {
        &self.ram
    }

    /// The slots, each with the chunks that it holds.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Slot, Range<u32>)> {
        self.slots.iter().map(|(slot, chunks)| (slot, chunks.clone()))
    }

    /// Chunk and bit of a page of a slot, counted from the slot's start; `None` where it is not in a slot that is known here.
    pub(crate) fn page(&self, slot: u32, page: u64) -> Option<(u32, u64)> {
        let (_, chunks) = self.slots.iter().find(|(s, _)| s.number == slot)?;
        let chunk = u32::try_from(page / CHUNK_PAGES as u64).ok()?.checked_add(chunks.start)?;
        chunks.contains(&chunk).then_some((chunk, 1 << (page % CHUNK_PAGES as u64)))
    }
}

impl std::fmt::Debug for KvmSlots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmSlots").field("slots", &self.slots).finish_non_exhaustive()
    }
}

/// The chunks that a slot holds.
fn chunks_of(ram: &dyn GuestRam, slot: &Slot) -> Result<Range<u32>, BackendError> {
    let Slot { number, gpa, len, .. } = *slot;
    let layout = ram.layout();
    let outside = || {
        BackendError::invalid(format!(
            "memory slot {number}, {len} bytes at {gpa:#x}, does not lie in one region of the guest's memory"
        ))
    };
    let (region, offset) = layout.find(gpa, len).filter(|_| len > 0).ok_or_else(outside)?;
    let (r, chunk) = (&layout.regions()[region], CHUNK_SIZE as u64);
    let whole = len.is_multiple_of(chunk) || (offset + len == r.len && len.is_multiple_of(PAGE_SIZE as u64));
    if !offset.is_multiple_of(chunk) || !whole {
        return Err(BackendError::invalid(format!(
            "memory slot {number}, {len} bytes at {gpa:#x}, cuts a chunk of {chunk} bytes of region {:?}",
            r.name
        )));
    }
    let first = layout.region_chunks(region).start + (offset / chunk) as u32;
    Ok(first..first + len.div_ceil(chunk) as u32)
}

/// Turns the result of a call about a slot into an error that names it.
pub(crate) fn of_slot(slot: &Slot, what: &str, error: io::Error) -> BackendError {
    BackendError::new(format!("{what} of slot {} at {:#x}", slot.number, slot.gpa), error)
}
