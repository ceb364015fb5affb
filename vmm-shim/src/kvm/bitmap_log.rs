//! The dirty tracker on KVM's per-slot bitmap.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::CHUNK_PAGES;

use super::{Slots, sys};

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
/// Only what vCPUs write is logged.
pub struct KvmBitmapLog {
    slots: Arc<Slots>,
    manual: Manual,
    state: Mutex<State>,
}

/// What `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` offers and the VM has enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manual {
    No,
    Protect,
    ProtectInitiallySet,
}

struct State {
    on: bool,
    /// Reported, not cleared since: set in the kernel's bitmap, too. Only with manual protection.
    reported: Vec<u64>,
}

impl KvmBitmapLog {
    pub(crate) fn new(slots: Arc<Slots>, manual: Manual) -> Self {
        let reported = match manual {
            Manual::No => Vec::new(),
            _ => vec![0; slots.ram.layout().chunks() as usize],
        };
        Self { slots, manual, state: Mutex::new(State { on: false, reported }) }
    }

    /// Held over the ioctls, too: a report between the kernel's clear and our own would name pages that
    /// nobody wrote.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clear_range(&self, region: usize, first_page: u64, bitmap: &[u64]) -> Result<(), BackendError> {
        let region_pages = self.slots.ram.layout().regions()[region].len / pagecopy::layout::PAGE_SIZE as u64;
        // The ioctl wants whole words, but for a slot's end, where it wants the exact number of pages.
        let pages = (region_pages - first_page).min((bitmap.len() * CHUNK_PAGES) as u64);
        sys::clear_dirty_log(&self.slots.vm, region as u32, first_page, pages as u32, bitmap).map_err(|e| {
            BackendError::new(
                format!("KVM_CLEAR_DIRTY_LOG of slot {region}, {pages} pages from {first_page}"),
                e,
            )
        })
    }

    /// Arms every page of every slot.
    fn arm_all(&self) -> Result<(), BackendError> {
        let layout = self.slots.ram.layout();
        let ones = vec![u64::MAX; ARM_PAGES as usize / CHUNK_PAGES];
        for region in 0..layout.regions().len() {
            let words = layout.region_chunks(region).len();
            for first in (0..words).step_by(ones.len()) {
                let count = (words - first).min(ones.len());
                self.clear_range(region, (first * CHUNK_PAGES) as u64, &ones[..count])?;
            }
        }
        Ok(())
    }
}

impl DirtyLog for KvmBitmapLog {
    fn name(&self) -> &'static str {
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
            return Err(not_started(self.name()));
        }
        let layout = self.slots.ram.layout();
        let mut count = 0;
        for (region, r) in layout.regions().iter().enumerate() {
            let log = self.slots.vm.get_dirty_log(region as u32, r.len as usize).map_err(|e| {
                BackendError::new(format!("KVM_GET_DIRTY_LOG of slot {region}"), io::Error::from(e))
            })?;
            // One chunk of the layout is one word of the slot's bitmap.
            for (chunk, word) in layout.region_chunks(region).zip(log) {
                let mut pages = word & layout.valid(chunk);
                if pages == 0 {
                    continue;
                }
                if let Some(reported) = state.reported.get_mut(chunk as usize) {
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
        let layout = self.slots.ram.layout();
        let end = first as usize + pages.len();
        if end > layout.chunks() as usize {
            let chunks = layout.chunks();
            return Err(BackendError::invalid(format!("chunks {first}..{end} to clear; there are {chunks}")));
        }
        let mut state = self.state();
        if !state.on {
            return Err(not_started(self.name()));
        }
        let mut at = first;
        while (at as usize) < end {
            let Some(place) = layout.locate(at) else { break };
            let region_end = layout.region_chunks(place.region).end.min(end as u32);
            let words = &pages[(at - first) as usize..(region_end - first) as usize];
            if words.iter().any(|&w| w != 0) {
                self.clear_range(place.region, place.offset / pagecopy::layout::PAGE_SIZE as u64, words)?;
                for (reported, word) in state.reported[at as usize..].iter_mut().zip(words) {
                    *reported &= !word;
                }
            }
            at = region_end;
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

pub(super) fn not_started(name: &str) -> BackendError {
    BackendError::new(format!("the dirty log {name} is not started"), io::ErrorKind::InvalidInput.into())
}
