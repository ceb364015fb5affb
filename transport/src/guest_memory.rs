//! Memory of guests that are simulated or fuzzed.

use std::sync::atomic::AtomicU8;

use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::bitmap::bits;
use pagecopy::layout::{Layout, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileSlice;

/// All regions of a layout, zeros at first.
pub(crate) struct Memory {
    layout: Layout,
    regions: Vec<Box<[AtomicU8]>>,
}

impl Memory {
    pub(crate) fn new(layout: Layout) -> Self {
        let regions = layout.regions().iter();
        let regions = regions.map(|r| bytemuck::zeroed_slice_box(r.len as usize)).collect();
        Self { layout, regions }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn region(&self, region: usize) -> VolatileSlice<'_> {
        let bytes = &self.regions[region];
        // SAFETY: the bytes live as long as the slice, which borrows them; they are atomics, so writing through a shared
        // reference is allowed, and nobody makes a reference to what is in them.
        unsafe { VolatileSlice::new(bytes.as_ptr().cast_mut().cast(), bytes.len()) }
    }

    /// One page.
    pub(crate) fn page(&self, chunk: u32, bit: u32) -> VolatileSlice<'_> {
        let place = self.layout.locate(chunk).expect("the simulation names its own chunks");
        let offset = place.offset as usize + bit as usize * PAGE_SIZE;
        self.region(place.region).subslice(offset, PAGE_SIZE).expect("the page lies in its region")
    }

    pub(crate) fn read(&self, chunk: u32, bit: u32) -> [u8; PAGE_SIZE] {
        let mut bytes = [0; PAGE_SIZE];
        self.page(chunk, bit).copy_to(&mut bytes[..]);
        bytes
    }

    pub(crate) fn write(&self, chunk: u32, bit: u32, bytes: &[u8; PAGE_SIZE]) {
        self.page(chunk, bit).copy_from(&bytes[..]);
    }
}

/// Memory without holes, of a guest that does nothing with it.
impl GuestRam for Memory {
    fn layout(&self) -> &Layout {
        self.layout()
    }

    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.region(region)
    }

    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        (first..).zip(pages).for_each(|(chunk, pages)| *pages = self.layout.valid(chunk));
        Ok(())
    }

    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        bits(pages).for_each(|bit| self.write(chunk, bit, &[0; PAGE_SIZE]));
        Ok(())
    }
}
