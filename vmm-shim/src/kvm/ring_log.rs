//! The dirty tracker on KVM's per-vCPU dirty rings.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::CHUNK_PAGES;

use super::bitmap_log::not_started;
use super::kick::Kicker;
use super::sys::DirtyRing;
use super::{Slots, sys};

/// Longest time that [`sync`](DirtyLog::sync) waits for a vCPU to leave the guest.
const FLUSH_MAX: Duration = Duration::from_millis(50);
/// Resets that are cut short in a row before that is an error.
const RESETS_MAX: u32 = 1000;

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
pub struct KvmRingLog {
    slots: Arc<Slots>,
    vcpus: Vec<Arc<Kicker>>,
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
    pub(crate) fn new(slots: Arc<Slots>, vcpus: Vec<Arc<Kicker>>, rings: Vec<DirtyRing>) -> Self {
        let chunks = slots.ram.layout().chunks();
        let written = vec![0; rings.len()];
        let (pending, unarmed) = (PageBitmap::new(chunks), PageBitmap::new(chunks));
        let state = Mutex::new(State { on: false, rings, written, pending, unarmed });
        Self { slots, vcpus, state, full: AtomicU64::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the rings: what a vCPU's thread does when `KVM_RUN` says `KVM_EXIT_DIRTY_RING_FULL`.
    pub(crate) fn harvest(&self) -> Result<(), BackendError> {
        self.full.fetch_add(1, Ordering::Relaxed);
        self.harvest_locked(&mut self.state())
    }

    /// How often a vCPU stopped because its ring was full.
    pub(crate) fn full_exits(&self) -> u64 {
        self.full.load(Ordering::Relaxed)
    }

    fn harvest_locked(&self, state: &mut State) -> Result<(), BackendError> {
        let layout = self.slots.ram.layout();
        let State { rings, written, pending, unarmed, .. } = state;
        let mut taken = 0;
        for (ring, written) in rings.iter_mut().zip(written) {
            let harvested = ring.harvest(|slot, page| {
                // Slots are the layout's regions; the upper half, an address space, is always 0 here.
                let chunks = layout.region_chunks(slot as usize);
                let chunk = chunks.start + (page / CHUNK_PAGES as u64) as u32;
                assert!(chunk < chunks.end, "the kernel reports pages of the slots it was given");
                pending.insert(chunk, 1 << (page % CHUNK_PAGES as u64));
            });
            *written += u64::from(harvested);
            taken += harvested;
        }
        let _quiet = sys::SignalsBlocked::new();
        let mut reset = 0;
        for _ in 0..RESETS_MAX {
            reset += match sys::reset_dirty_rings(&self.slots.vm) {
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

    fn flush_vcpus(&self) {
        let until = Instant::now() + FLUSH_MAX;
        let exits: Vec<u64> = self.vcpus.iter().map(|v| v.start_flush()).collect();
        for (vcpu, since) in self.vcpus.iter().zip(exits) {
            vcpu.flushed(since, until);
        }
    }
}

impl DirtyLog for KvmRingLog {
    fn name(&self) -> &'static str {
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
        self.flush_vcpus();
        let mut state = self.state();
        if !state.on {
            return Err(not_started(self.name()));
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

/// The error of a kernel without rings.
pub(crate) fn unsupported() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "KVM_CAP_DIRTY_LOG_RING is 0")
}
