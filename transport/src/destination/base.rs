//! Pages that come from an older copy of the guest, which the source has found to be the same.

use std::sync::atomic::Ordering;

use pagecopy::bitmap::runs;
use pagecopy::layout::PAGE_SIZE;
use pagecopy::xbzrle::Page;

use super::receiver::{ReceiveError, Worker};
use crate::spent::Lap;
use crate::wire::frame::FrameHeader;

impl Worker<'_> {
    /// Takes pages of a frame from the base. Those that are not to be had stay what they are, and the receipt says so.
    pub(super) fn take_same(&mut self, header: &FrameHeader) -> Result<(), ReceiveError> {
        let mut lap = Lap::start();
        let (sink, spent) = (self.sink, &self.sink.received.spent);
        if self.base.is_none()
            && let Some(base) = &sink.base
        {
            let reader = base.clone().reader();
            self.base = Some(reader.map_err(|source| ReceiveError::Local { stream: self.stream(), source })?);
        }
        let mut reader = self.base.take();
        let (has, pages) = match &mut reader {
            Some(reader) => reader.read(header.chunk, header.raw),
            None => (0, &[][..]),
        };
        lap.to(&spent.apply);
        let filled = self.fill(header, has, pages);
        lap.to(&spent.fault_in);
        self.base = reader;
        filled?;
        let count = |pages: u64| u64::from(pages.count_ones());
        sink.received.same.fetch_add(count(has), Ordering::Relaxed);
        sink.received.logical.fetch_add(count(has) * PAGE_SIZE as u64, Ordering::Relaxed);
        sink.received.same_lacking.fetch_add(count(header.raw & !has), Ordering::Relaxed);
        self.answer(header, header.raw & !has);
        lap.to(&spent.hash);
        Ok(())
    }

    /// Writes these pages to the guest's memory, or places them where they are fresh.
    fn fill(&mut self, header: &FrameHeader, has: u64, pages: &[Page]) -> Result<(), ReceiveError> {
        let fresh = self.fresh(header.chunk, has);
        let placed = if self.placer.is_some() { fresh } else { 0 };
        self.bring_in(header, fresh & !placed)?;
        self.sink.touched.insert(header.chunk, has & !placed);
        let memory = self.sink.ram.chunk(header.chunk);
        for (first, count) in runs(has & !placed) {
            let bytes = pages[first as usize..(first + count) as usize].as_flattened();
            let run = memory.subslice(first as usize * PAGE_SIZE, bytes.len());
            run.expect("the header was checked by the layout").copy_from(bytes);
        }
        for (first, count) in runs(placed) {
            self.place(header.chunk, first, pages[first as usize..(first + count) as usize].as_flattened())?;
        }
        Ok(())
    }
}
