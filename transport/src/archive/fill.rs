//! Filling a guest's memory with frames that were opened.

use std::sync::Arc;

use pagecopy::backend::{BackendError, GuestRam, Placer};
use pagecopy::bitmap::{PageBitmap, bits, runs};
use pagecopy::layout::PAGE_SIZE;
use pagecopy::xbzrle::Page;

use super::frames::Opened;

/// Memory that is being filled; it was fresh, all zeros. Several threads fill it at once, each chunks of its own.
pub(crate) struct Filler {
    ram: Arc<dyn GuestRam>,
    placer: Option<Box<dyn Placer>>,
    /// Pages that may hold something other than zeros.
    touched: PageBitmap,
}

impl Filler {
    pub(crate) fn new(ram: Arc<dyn GuestRam>) -> Self {
        let touched = PageBitmap::new(ram.layout().chunks());
        Self { placer: ram.clone().placer(), touched, ram }
    }

    /// Fills in these pages of a frame, of those that it holds itself.
    pub(crate) fn fill(&self, opened: &Opened<'_>, pages: u64) -> Result<(), BackendError> {
        let chunk = opened.header.chunk;
        let raw = opened.header.raw & opened.filled() & pages;
        let others = opened.filled() & pages & !raw;
        self.bring_in(chunk, raw | others)?;
        for (first, count) in runs(raw) {
            self.put(chunk, first, opened.raw_run(first, count))?;
        }
        for bit in bits(others) {
            let page = opened.page(bit).expect("a frame that is whole has its pages");
            self.put(chunk, bit, page)?;
        }
        self.touched.insert(chunk, raw | others);
        self.clear(chunk, opened.header.zero & pages)
    }

    /// Fills in one page.
    pub(crate) fn fill_page(&self, chunk: u32, bit: u32, page: &Page) -> Result<(), BackendError> {
        self.bring_in(chunk, 1 << bit)?;
        self.put(chunk, bit, page)?;
        self.touched.insert(chunk, 1 << bit);
        Ok(())
    }

    /// Makes these pages zeros.
    pub(crate) fn clear(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let written = pages & self.touched.get(chunk);
        if written == 0 {
            return Ok(());
        }
        self.touched.remove(chunk, written);
        self.ram.discard(chunk, written)
    }

    /// Brings fresh pages in that are not placed: a first touch that finds no room would end the process.
    fn bring_in(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let fresh = pages & !self.touched.get(chunk);
        if fresh == 0 || self.placer.is_some() {
            return Ok(());
        }
        if fresh == self.ram.layout().valid(chunk) {
            self.ram.populate(chunk, 1)
        } else {
            self.ram.bring_in(chunk, fresh)
        }
    }

    /// Writes pages from `first` on.
    fn put(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        if let Some(placer) = &self.placer {
            return placer.place(chunk, first, bytes);
        }
        let memory = self.ram.chunk(chunk);
        let target = memory.subslice(first as usize * PAGE_SIZE, bytes.len());
        target.expect("the frame was checked by the layout").copy_from(bytes);
        Ok(())
    }
}
