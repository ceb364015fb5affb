//! Memory that an adapter may use: domains, regions of a guest's memory, and buffers.

use std::io;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use pagecopy::backend::GuestRam;
use rdma_sys as ffi;

use super::cm::Id;

/// Buffers start at a page, so that no two registrations share one.
const ALIGN: usize = 4096;

/// A protection domain: what regions and queue pairs must share to work together.
#[derive(Debug)]
pub(in crate::rdma) struct Domain {
    pub(super) raw: NonNull<ffi::ibv_pd>,
    on_demand: bool,
    id: Arc<Id>,
}

// SAFETY: verbs are thread-safe, and the handle never changes.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    /// A domain on the device of a connection.
    pub(in crate::rdma) fn new(id: &Arc<Id>) -> io::Result<Arc<Self>> {
        let device = id.device()?;
        // SAFETY: the device stays open while `id` lives, which the domain holds.
        let raw = unsafe { ffi::ibv_alloc_pd(device.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self { raw, on_demand: on_demand(device), id: id.clone() }))
    }

    /// Whether a connection is on this domain's device.
    pub(in crate::rdma) fn is_of(&self, id: &Id) -> bool {
        matches!((self.id.device(), id.device()), (Ok(a), Ok(b)) if a == b)
    }

    /// Whether memory is registered without being pinned: the device faults pages in as it needs them.
    pub(in crate::rdma) fn on_demand(&self) -> bool {
        self.on_demand
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: made by `new`; regions and queue pairs hold the domain, so none is left on it.
        let result = unsafe { ffi::ibv_dealloc_pd(self.raw.as_ptr()) };
        debug_assert_eq!(result, 0, "ibv_dealloc_pd");
    }
}

/// Whether the device does on-demand paging for sends and writes over reliable connections.
fn on_demand(device: NonNull<ffi::ibv_context>) -> bool {
    // SAFETY: the structure is integers only, for which zeros are valid.
    let mut attributes: ffi::ibv_device_attr_ex = unsafe { std::mem::zeroed() };
    // SAFETY: the device is open; the library fills in the structure, whose size the binding passes.
    if unsafe { ffi::ibv_query_device_ex(device.as_ptr(), ptr::null(), &raw mut attributes) } != 0 {
        return false;
    }
    let caps = &attributes.odp_caps;
    let needed = ffi::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE.0;
    caps.general_caps & u64::from(ffi::ibv_odp_general_caps::IBV_ODP_SUPPORT.0) != 0
        && caps.per_transport_caps.rc_odp_caps & needed != 0
}

/// What lies below a region.
#[derive(Clone)]
enum Memory {
    /// A guest's mapping.
    Guest(#[expect(dead_code, reason = "keeps the mapping")] Arc<dyn GuestRam>),
    /// Buffers of our own.
    Own(#[expect(dead_code, reason = "keeps the allocation")] Arc<Allocation>),
}

/// What the adapter may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rdma) enum Access {
    /// Send from it.
    Read,
    /// Receive into it.
    Receive,
    /// Let the peer write to it.
    RemoteWrite,
}

/// Registered memory.
pub(in crate::rdma) struct Region {
    raw: NonNull<ffi::ibv_mr>,
    base: u64,
    len: u64,
    _domain: Arc<Domain>,
    memory: ManuallyDrop<Memory>,
}

// SAFETY: a registration is a handle that never changes; its memory is accessed by the adapter only.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Registers `len` bytes at `offset` of a guest's region. Unless the device pages on demand that brings them all into
    /// memory and pins them.
    pub(in crate::rdma) fn guest(
        domain: &Arc<Domain>,
        ram: &Arc<dyn GuestRam>,
        region: usize,
        offset: u64,
        len: u64,
        access: Access,
    ) -> io::Result<Arc<Self>> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let at = usize::try_from(offset).map_err(|_| outside())?;
        let count = usize::try_from(len).map_err(|_| outside())?;
        let memory = ram.region(region);
        let piece = memory.subslice(at, count).map_err(|_| outside())?;
        let base = piece.ptr_guard_mut().as_ptr();
        Self::register(domain, base, count, access, domain.on_demand, Memory::Guest(ram.clone()))
    }

    fn register(
        domain: &Arc<Domain>,
        base: *mut u8,
        len: usize,
        access: Access,
        on_demand: bool,
        memory: Memory,
    ) -> io::Result<Arc<Self>> {
        use ffi::ibv_access_flags as a;
        let mut flags = match access {
            Access::Read => 0,
            Access::Receive => a::IBV_ACCESS_LOCAL_WRITE.0,
            Access::RemoteWrite => a::IBV_ACCESS_LOCAL_WRITE.0 | a::IBV_ACCESS_REMOTE_WRITE.0,
        };
        if on_demand {
            flags |= a::IBV_ACCESS_ON_DEMAND.0;
        }
        // SAFETY: `base..base + len` is mapped: a guest's mapping stays where it is as long as its GuestRam (which the trait demands),
        // an allocation as long as its Arc, and the region holds either until it is deregistered. No Rust reference to guest
        // memory exists, and own buffers are only referenced while no work request names them (Slot).
        let raw = unsafe { ffi::ibv_reg_mr(domain.raw.as_ptr(), base.cast(), len, flags as i32) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self {
            raw,
            base: base as u64,
            len: len as u64,
            _domain: domain.clone(),
            memory: ManuallyDrop::new(memory),
        }))
    }

    /// What a peer needs to write here: the address of the first byte, and the key.
    pub(in crate::rdma) fn remote(&self) -> (u64, u32) {
        // SAFETY: the registration lives until `self` is dropped.
        (self.base, unsafe { self.raw.as_ref().rkey })
    }

    fn key(&self) -> u32 {
        // SAFETY: as in `remote`.
        unsafe { self.raw.as_ref().lkey }
    }

    /// A piece of the region as a scatter-gather entry.
    pub(super) fn entry(&self, offset: u64, len: u32) -> io::Result<ffi::ibv_sge> {
        if offset.checked_add(len.into()).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(ffi::ibv_sge { addr: self.base + offset, length: len, lkey: self.key() })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by `register`; queue pairs hold the regions of what is posted, so no work request names it.
        let result = unsafe { ffi::ibv_dereg_mr(self.raw.as_ptr()) };
        debug_assert_eq!(result, 0, "ibv_dereg_mr");
        if result == 0 {
            // SAFETY: dropped once, here. Where the registration lives on, so does the memory, for ever: the adapter may write to it.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

/// Bytes of our own that the adapter reads and writes.
struct Allocation {
    base: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: plain memory; who may touch which part is decided by Slot.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(len: usize) -> io::Result<Arc<Self>> {
        let layout =
            std::alloc::Layout::from_size_align(len, ALIGN).map_err(|_| io::ErrorKind::InvalidInput)?;
        assert_ne!(len, 0, "an allocation has bytes");
        // SAFETY: the layout is not empty.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(Self { base, layout }))
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; slots and regions hold it, so none is left.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// A message buffer. Whoever owns it may read and write it; while it is posted the queue pair owns it.
pub(in crate::rdma) struct Slot {
    pub(super) region: Arc<Region>,
    memory: Arc<Allocation>,
    pub(super) at: usize,
    pub(super) len: usize,
}

impl Slot {
    /// `count` buffers of `len` bytes in one registration.
    pub(in crate::rdma) fn make(
        domain: &Arc<Domain>,
        count: usize,
        len: usize,
        access: Access,
    ) -> io::Result<Vec<Self>> {
        let memory = Allocation::new(count * len)?;
        let own = Memory::Own(memory.clone());
        let region = Region::register(domain, memory.base.as_ptr(), count * len, access, false, own)?;
        let slot = |i| Self { region: region.clone(), memory: memory.clone(), at: i * len, len };
        Ok((0..count).map(slot).collect())
    }

    pub(in crate::rdma) fn bytes(&self) -> &[u8] {
        // SAFETY: `at..at + len` lies in the allocation and is this slot's alone (make). It was zeroed, and the adapter writes to it only
        // while the slot is posted, when nobody can call this.
        unsafe { std::slice::from_raw_parts(self.memory.base.as_ptr().add(self.at), self.len) }
    }

    pub(in crate::rdma) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the exclusive borrow of the slot is one of its bytes.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base.as_ptr().add(self.at), self.len) }
    }
}
