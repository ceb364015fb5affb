//! Memory of a guest that a fuzz target fills.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::{BackendError, Fault, GuestRam, MissingPages, Placer};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileSlice;

use crate::guest_memory::Memory;

/// Memory that is filled in every way there is, and whose guest touches nothing.
pub(super) struct Ram(Memory);

impl Ram {
    pub(super) fn new(layout: Layout) -> Self {
        Self(Memory::new(layout))
    }

    /// The pages of a chunk that are not zeros.
    pub(super) fn filled(&self, chunk: u32) -> u64 {
        let filled = |bit: &u32| self.0.read(chunk, *bit) != [0; PAGE_SIZE];
        bits(self.layout().valid(chunk)).filter(filled).fold(0, |pages, bit| pages | 1 << bit)
    }

    fn fill(&self, chunk: u32, first: u32, bytes: &[u8]) {
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
        assert!(rest.is_empty() && !pages.is_empty());
        (first..).zip(pages).for_each(|(bit, page)| self.0.write(chunk, bit, page));
    }
}

impl GuestRam for Ram {
    fn layout(&self) -> &Layout {
        self.0.layout()
    }

    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.0.region(region)
    }

    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        self.0.populated(first, pages)
    }

    fn placer(self: Arc<Self>) -> Option<Box<dyn Placer>> {
        Some(Box::new(Filler(self)))
    }

    fn missing_unit(&self) -> Result<u32, BackendError> {
        Ok(0)
    }

    fn miss(self: Arc<Self>, _missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        Ok(Box::new(Filler(self)))
    }

    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.0.discard(chunk, pages)
    }
}

struct Filler(Arc<Ram>);

impl Placer for Filler {
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        self.0.fill(chunk, first, bytes);
        Ok(())
    }
}

impl MissingPages for Filler {
    fn wait(&self, _faults: &mut Vec<Fault>, _timeout: Duration) -> Result<(), BackendError> {
        Ok(())
    }

    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        self.0.fill(chunk, first, bytes);
        Ok(())
    }

    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError> {
        self.0.fill(chunk, first, &vec![0; count as usize * PAGE_SIZE]);
        Ok(())
    }

    fn settle(&self, _fault: Fault) -> Result<(), BackendError> {
        Ok(())
    }

    fn end(&self) -> Result<(), BackendError> {
        Ok(())
    }
}
