//! The dirty tracker on KVM's per-slot bitmap.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_PAGES, PAGE_SIZE};

use super::sys;
use super::sys::slots::{KvmSlots, Slot, of_slot};

/// Most pages re-armed by one ioctl in [`start`](DirtyLog::start): 256 MiB of guest memory. The kernel holds
/// the lock that every page fault of the guest takes, for a time in proportion.
const ARM_PAGES: u64 = 1 << 16;

/// `KVM_GET_DIRTY_LOG`, with `KVM_CLEAR_DIRTY_LOG` where the kernel has `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
///
/// With manual protection, reading the log does not re-arm: a page stays in the kernel's bitmap from its
/// first write until [`clear`](DirtyLog::clear). So pages are re-armed late, just before they are read, which
/// saves faults and repeats, and the log hides what it has already reported: it reports the kernel's pages
/// *without* those reported and not yet cleared.
///
/// With `KVM_DIRTY_LOG_INITIALLY_SET` turning the log on does not walk the page tables with the VM's lock
/// held; all pages are then marked, and none armed. [`start`](DirtyLog::start) arms them in pieces, between
/// which vCPUs go on: whoever sends all of memory first need not clear what was never reported, and gets
/// every write that follows.
///
/// Without manual protection, [`sync`](DirtyLog::sync) reads and re-arms at once, and `clear` does nothing.
///
/// Only what vCPUs write is logged. [`KvmSlots`] shows how one is made.
pub struct KvmBitmapLog {
    slots: Arc<KvmSlots>,
    manual: Manual,
    state: Mutex<State>,
}

/// What `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` offers and the VM has enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manual {
    No,
    Protect,
    ProtectInitiallySet,
}

struct State {
    on: bool,
    /// Reported, not cleared since: set in the kernel's bitmap, too. Only with manual protection.
    reported: Vec<u64>,
    /// What the kernel's bitmap of a slot is read into.
    words: Vec<u64>,
}

impl KvmBitmapLog {
    /// A log over these slots. Enables manual protection for the whole VM, where the kernel has it: whoever reads the log of another slot
    /// of this VM has to clear it, too.
    ///
    /// # Errors
    /// When the kernel refuses to enable what it offers.
    pub fn new(slots: Arc<KvmSlots>) -> Result<Self, BackendError> {
        let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let offered = sys::check_extension(slots.vm(), cap);
        let wanted = offered & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        if wanted & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            return Ok(Self::with(slots, Manual::No));
        }
        sys::enable_cap(slots.vm(), cap, wanted.into()).map_err(|e| {
            BackendError::new(
                format!("enabling manual protection of dirty logs, KVM_ENABLE_CAP {cap} ({wanted:#x})"),
                e,
            )
        })?;
        let set = wanted & KVM_DIRTY_LOG_INITIALLY_SET != 0;
        Ok(Self::with(slots, if set { Manual::ProtectInitiallySet } else { Manual::Protect }))
    }

    /// A log without manual protection, for a VM that must not have it. Where it has been enabled all the same, pages are reported again
    /// and again.
    pub fn without_manual_protection(slots: Arc<KvmSlots>) -> Self {
        Self::with(slots, Manual::No)
    }

    fn with(slots: Arc<KvmSlots>, manual: Manual) -> Self {
        let chunks = slots.ram().layout().chunks() as usize;
        let reported = vec![0; if manual == Manual::No { 0 } else { chunks }];
        Self { slots, manual, state: Mutex::new(State { on: false, reported, words: Vec::new() }) }
    }

    /// Held over the ioctls, too: a report between the kernel's clear and our own would name pages that
    /// nobody wrote.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clears pages of a slot, from the start of chunk `skip` of it on.
    fn clear_range(&self, slot: &Slot, skip: usize, bitmap: &[u64]) -> Result<(), BackendError> {
        let first_page = (skip * CHUNK_PAGES) as u64;
        // The ioctl wants whole words, but for a slot's end, where it wants the exact number of pages.
        let pages = (slot.len / PAGE_SIZE as u64 - first_page).min((bitmap.len() * CHUNK_PAGES) as u64);
        sys::clear_dirty_log(self.slots.vm(), slot.number, first_page, pages as u32, bitmap)
            .map_err(|e| of_slot(slot, &format!("KVM_CLEAR_DIRTY_LOG of {pages} pages from {first_page}"), e))
    }

    /// Arms every page of every slot.
    fn arm_all(&self) -> Result<(), BackendError> {
        let ones = vec![u64::MAX; ARM_PAGES as usize / CHUNK_PAGES];
        for (slot, chunks) in self.slots.iter() {
            for skip in (0..chunks.len()).step_by(ones.len()) {
                let count = (chunks.len() - skip).min(ones.len());
                self.clear_range(slot, skip, &ones[..count])?;
            }
        }
        Ok(())
    }
}

impl DirtyLog for KvmBitmapLog {
    fn name(&self) -> &str {
        "kvm-bitmap"
    }

    fn start(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        // Logging that is on already has bits from before.
        self.slots.log(false)?;
        state.on = false;
        self.slots.log(true)?;
        if self.manual == Manual::ProtectInitiallySet {
            self.arm_all()?;
        }
        state.reported.fill(0);
        state.on = true;
        Ok(())
    }

    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        let mut state = self.state();
        if !state.on {
            return Err(BackendError::not_started(self.name()));
        }
        let layout = self.slots.ram().layout();
        let State { reported, words, .. } = &mut *state;
        let mut count = 0;
        for (slot, chunks) in self.slots.iter() {
            words.resize(chunks.len(), 0);
            sys::get_dirty_log(self.slots.vm(), slot, words)
                .map_err(|e| of_slot(slot, "KVM_GET_DIRTY_LOG", e))?;
            // One chunk of the layout is one word of the slot's bitmap.
            for (chunk, &word) in chunks.zip(words.iter()) {
                let mut pages = word & layout.valid(chunk);
                if pages == 0 {
                    continue;
                }
                if let Some(reported) = reported.get_mut(chunk as usize) {
                    pages &= !*reported;
                    *reported |= pages;
                }
                count += u64::from(pages.count_ones());
                dirty.insert(chunk, pages);
            }
        }
        Ok(count)
    }

    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        if self.manual == Manual::No {
            return Ok(());
        }
        let chunks = self.slots.ram().layout().chunks();
        let end = first as usize + pages.len();
        if end > chunks as usize {
            return Err(BackendError::invalid(format!("chunks {first}..{end} to clear; there are {chunks}")));
        }
        let asked = first..end as u32;
        let mut state = self.state();
        if !state.on {
            return Err(BackendError::not_started(self.name()));
        }
        for (slot, of) in self.slots.iter() {
            let Range { start, end } = asked.start.max(of.start)..asked.end.min(of.end);
            if start >= end {
                continue;
            }
            let words = &pages[(start - first) as usize..(end - first) as usize];
            if words.iter().any(|&w| w != 0) {
                self.clear_range(slot, (start - of.start) as usize, words)?;
                for (reported, word) in state.reported[start as usize..].iter_mut().zip(words) {
                    *reported &= !word;
                }
            }
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        if state.on {
            self.slots.log(false)?;
            state.on = false;
        }
        Ok(())
    }
}
