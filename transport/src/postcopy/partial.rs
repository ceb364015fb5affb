//! Memory of a guest for tests, some of whose pages are still to come.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pagecopy::backend::{BackendError, Fault, GuestRam, MissingPages};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileSlice;

use crate::guest_memory::Memory;

/// Memory of a guest, some of whose pages are still to come.
pub(crate) struct Partial {
    pub(crate) memory: Memory,
    presence: Mutex<Presence>,
}

struct Presence {
    /// For each chunk, pages that are not there.
    missing: Vec<u64>,
    /// How often each page was placed.
    placed: BTreeMap<(u32, u32), u32>,
}

impl Partial {
    pub(crate) fn new(layout: Layout) -> Arc<Self> {
        let presence = Presence { missing: vec![0; layout.chunks() as usize], placed: BTreeMap::new() };
        Arc::new(Self { memory: Memory::new(layout), presence: Mutex::new(presence) })
    }

    fn presence(&self) -> MutexGuard<'_, Presence> {
        self.presence.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn is_missing(&self, (chunk, page): (u32, u32)) -> bool {
        self.presence().missing[chunk as usize] >> page & 1 != 0
    }
}

impl GuestRam for Partial {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }
    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.memory.region(region)
    }
    fn populated(&self, _first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        pages.fill(u64::MAX);
        Ok(())
    }
    fn missing_unit(&self) -> Result<u32, BackendError> {
        Ok(0)
    }
    fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        let mut presence = self.presence();
        for (chunk, pages) in missing.iter() {
            presence.missing[chunk as usize] |= pages;
            bits(pages).for_each(|bit| self.memory.write(chunk, bit, &[0xee; PAGE_SIZE]));
        }
        drop(presence);
        Ok(Box::new(Missing(self)))
    }
    fn discard(&self, _chunk: u32, _pages: u64) -> Result<(), BackendError> {
        Ok(())
    }
}

struct Missing(Arc<Partial>);

impl MissingPages for Missing {
    fn wait(&self, _faults: &mut Vec<Fault>, _timeout: Duration) -> Result<(), BackendError> {
        unreachable!("the simulated guest asks by itself")
    }
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        let mut presence = self.0.presence();
        for (bit, page) in (first..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
            *presence.placed.entry((chunk, bit)).or_default() += 1;
            // As the kernel does: what is there stays.
            if presence.missing[chunk as usize] >> bit & 1 != 0 {
                presence.missing[chunk as usize] &= !(1 << bit);
                self.0.memory.write(chunk, bit, page);
            }
        }
        Ok(())
    }
    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError> {
        (first..first + count).try_for_each(|bit| self.place(chunk, bit, &[0; PAGE_SIZE]))
    }
    fn settle(&self, _fault: Fault) -> Result<(), BackendError> {
        Ok(())
    }
    fn end(&self) -> Result<(), BackendError> {
        Ok(())
    }
}
