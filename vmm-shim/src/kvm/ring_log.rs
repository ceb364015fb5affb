//! The dirty tracker on KVM's per-vCPU dirty rings.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn};
use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;

use super::sys;
use super::sys::DirtyRing;
use super::sys::slots::KvmSlots;

/// KVM keeps some hundred entries in reserve.
const ENTRIES_MIN: u32 = 1 << 10;
/// Resets that are cut short in a row before that is an error.
const RESETS_MAX: u32 = 1000;

/// That a VM's vCPUs have dirty rings, and of how many entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRings {
    entries: u32,
}

impl DirtyRings {
    /// Gives a VM's vCPUs rings of `entries`, a power of two from 1024 on, or of fewer where KVM allows no more. Before the VM has a
    /// vCPU.
    ///
    /// # Errors
    /// Another number, a kernel without rings (before Linux 5.11), and what it refuses.
    pub fn enable(vm: &impl AsRawFd, entries: u32) -> Result<Self, BackendError> {
        if !entries.is_power_of_two() || entries < ENTRIES_MIN {
            return Err(BackendError::invalid(format!(
                "a dirty ring of {entries} entries; a power of two from {ENTRIES_MIN} on is needed"
            )));
        }
        let entry = size_of::<kvm_dirty_gfn>() as u32;
        for cap in [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING] {
            let bytes = sys::check_extension(vm, cap).min(entries.saturating_mul(entry));
            if bytes >= ENTRIES_MIN * entry {
                // A power of two, which both are.
                let entries = 1 << (bytes / entry).ilog2();
                sys::enable_cap(vm, cap, u64::from(entries) * u64::from(entry)).map_err(|e| {
                    BackendError::new(
                        format!("giving vCPUs dirty rings of {entries} entries, KVM_ENABLE_CAP {cap}"),
                        e,
                    )
                })?;
                return Ok(Self { entries });
            }
        }
        let none = io::Error::new(io::ErrorKind::Unsupported, "KVM_CAP_DIRTY_LOG_RING is 0");
        Err(BackendError::new("this kernel's KVM has no dirty ring (Linux 5.11): use the bitmap", none))
    }

    /// Entries of each ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }
}

/// `KVM_CAP_DIRTY_LOG_RING` or `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.
///
/// Each vCPU appends the pages it dirties to a ring of its own. [`sync`](DirtyLog::sync), and the vCPU's own
/// thread when its ring is full, *harvest*: they take the entries into an internal bitmap and then re-arm
/// them (`KVM_RESET_DIRTY_RINGS`). Only what is re-armed is ever reported, so a page is read after it was
/// re-armed, and `clear` has nothing to do.
///
/// A processor may hold dirty pages back in a buffer of its own (Intel PML) until the vCPU leaves the guest;
/// `sync` therefore makes each running vCPU leave it once before harvesting. A paused guest has none held
/// back.
///
/// Since Linux 6.16 a pending signal ends a reset early, and up to 64 pages around the entry it ended at are then neither re-armed nor
/// in a ring any more (`kvm_dirty_ring_reset` in `virt/kvm/dirty_ring.c`): what is written to them is never logged again. So signals
/// are held back during a reset. Some cannot be: where a reset has come to less than was harvested, the pages in question are reported
/// by every [`sync`](DirtyLog::sync) from then on.
///
/// Only what vCPUs write is logged.
///
/// ```no_run
/// # use std::sync::Arc;
/// # use pagecopy::layout::Layout;
/// # use vmm_shim::guest_memory::{Backing, GuestMemory};
/// use vmm_shim::kvm::{DirtyRings, KvmRingLog, KvmSlots, Slot};
///
/// # let ram = Arc::new(GuestMemory::create(Layout::flat(64 << 20)?, &Backing::Memfd)?);
/// let vm = vmm_shim::kvm::open()?.create_vm()?;
/// let rings = DirtyRings::enable(&vm, 65_536)?;
/// let vcpu = vm.create_vcpu(0)?;
/// // SAFETY: `ram` is guest memory, and outlives the VM.
/// let slots = unsafe { KvmSlots::new(&vm, ram.clone(), &Slot::of_regions(&*ram)) }?;
/// let kick_vcpus = || { /* a signal to each thread in KVM_RUN, and a wait until it has left */ };
/// let log = KvmRingLog::new(Arc::new(slots), rings, &[&vcpu], kick_vcpus)?;
/// // In the vCPU's thread, where KVM_RUN ends with KVM_EXIT_DIRTY_RING_FULL (31):
/// log.harvest()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KvmRingLog {
    slots: Arc<KvmSlots>,
    flush: Box<dyn Fn() + Send + Sync>,
    state: Mutex<State>,
    full: AtomicU64,
}

struct State {
    on: bool,
    rings: Vec<DirtyRing>,
    /// Entries harvested from each ring since logging was started.
    written: Vec<u64>,
    /// Harvested and re-armed, not reported yet.
    pending: PageBitmap,
    /// Perhaps never re-armed: always dirty.
    unarmed: PageBitmap,
}

impl KvmRingLog {
    /// A log over these slots, of a VM whose vCPUs, all of them, have these rings.
    ///
    /// `flush` is called by each sync, with no lock held, while vCPUs may run. It makes each vCPU that is in `KVM_RUN` leave it once, and
    /// returns when it has; where one does not within a moment, `flush` gives up: what that vCPU has not told of yet is in a later
    /// report. On a VM that is paused it has nothing to do.
    ///
    /// # Errors
    /// When a ring cannot be mapped.
    pub fn new(
        slots: Arc<KvmSlots>,
        rings: DirtyRings,
        vcpus: &[&dyn AsRawFd],
        flush: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, BackendError> {
        let map = |(index, vcpu): (usize, &&dyn AsRawFd)| {
            DirtyRing::new(*vcpu, rings.entries)
                .map_err(|e| BackendError::new(format!("mapping the dirty ring of vCPU {index}"), e))
        };
        let rings = vcpus.iter().enumerate().map(map).collect::<Result<Vec<_>, _>>()?;
        let chunks = slots.ram().layout().chunks();
        let written = vec![0; rings.len()];
        let (pending, unarmed) = (PageBitmap::new(chunks), PageBitmap::new(chunks));
        let state = Mutex::new(State { on: false, rings, written, pending, unarmed });
        Ok(Self { slots, flush: Box::new(flush), state, full: AtomicU64::new(0) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the rings: what a vCPU's thread does when `KVM_RUN` ends with `KVM_EXIT_DIRTY_RING_FULL`, and then runs on.
    ///
    /// # Errors
    /// When the kernel does not re-arm what was taken out; the vCPU must not run on.
    pub fn harvest(&self) -> Result<(), BackendError> {
        self.full.fetch_add(1, Ordering::Relaxed);
        self.harvest_locked(&mut self.state())
    }

    /// How often a vCPU stopped because its ring was full.
    pub fn full_exits(&self) -> u64 {
        self.full.load(Ordering::Relaxed)
    }

    fn harvest_locked(&self, state: &mut State) -> Result<(), BackendError> {
        let State { rings, written, pending, unarmed, .. } = state;
        let mut taken = 0;
        for (ring, written) in rings.iter_mut().zip(written) {
            let harvested = ring.harvest(|slot, page| {
                // Others' slots are in the same rings.
                if let Some((chunk, bit)) = self.slots.page(slot, page) {
                    pending.insert(chunk, bit);
                }
            });
            *written += u64::from(harvested);
            taken += harvested;
        }
        let _quiet = sys::SignalsBlocked::new();
        let mut reset = 0;
        for _ in 0..RESETS_MAX {
            reset += match sys::reset_dirty_rings(self.slots.vm()) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                result => result.map_err(|e| {
                    BackendError::new(format!("KVM_RESET_DIRTY_RINGS of {taken} harvested pages"), e)
                })?,
            };
            if reset >= taken {
                return Ok(());
            }
            // All that was harvested now is among what was not reported yet.
            for (chunk, pages) in pending.iter() {
                unarmed.insert(chunk, pages);
            }
        }
        let error = io::Error::new(io::ErrorKind::Interrupted, format!("only {reset} were re-armed"));
        Err(BackendError::new(
            format!("KVM_RESET_DIRTY_RINGS of {taken} harvested pages, {RESETS_MAX} times"),
            error,
        ))
    }

    fn discard(&self, state: &mut State) -> Result<(), BackendError> {
        self.harvest_locked(state)?;
        // Switching the log on re-arms everything.
        for chunk in 0..state.pending.chunks() {
            state.pending.take(chunk);
            state.unarmed.take(chunk);
        }
        Ok(())
    }
}

impl DirtyLog for KvmRingLog {
    fn name(&self) -> &str {
        "kvm-ring"
    }

    fn start(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        self.slots.log(false)?;
        state.on = false;
        // With logging off nothing is appended any more: this empties the rings.
        self.discard(&mut state)?;
        state.written.fill(0);
        self.slots.log(true)?;
        state.on = true;
        Ok(())
    }

    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        // Without the lock: a vCPU with a full ring needs it before it can leave.
        (self.flush)();
        let mut state = self.state();
        if !state.on {
            return Err(BackendError::not_started(self.name()));
        }
        self.harvest_locked(&mut state)?;
        for (chunk, pages) in state.unarmed.iter() {
            state.pending.insert(chunk, pages);
        }
        let mut count = 0;
        let mut from = 0;
        while let Some(chunk) = state.pending.next_chunk(from) {
            let pages = state.pending.take(chunk);
            count += u64::from(pages.count_ones());
            dirty.insert(chunk, pages);
            from = chunk + 1;
        }
        Ok(count)
    }

    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        Some(self.state().written.clone())
    }

    fn stop(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        if state.on {
            self.slots.log(false)?;
            state.on = false;
            self.discard(&mut state)?;
        }
        Ok(())
    }
}
