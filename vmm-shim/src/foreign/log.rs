//! The dirty log of another process's memory.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{Layout, PAGE_SIZE};

use super::losses::Losses;
use super::maps::{self, Mapping, MappingKind};
use super::process::Process;
use super::soft_dirty;
use super::standstill::{Standstill, Standstills, while_standing};
use crate::uffd_log::insert_run;

/// Written pages of another process, by the soft-dirty bits of its page table. What it sees, what it does not, and what it costs is
/// in the documentation of [`foreign`](super).
///
/// Each look stands the guest still, scans the page table, clears all bits of the process, and lets the guest go on. What was written
/// between the scan and the clearing is in neither this report nor the next: that nothing is, is the [`Standstill`]'s to see to.
///
/// A page that was in the page table at the last look and is not any more counts as written: it may have been taken away.
///
/// Shared memory that the kernel takes out of the page table loses its bits. It does so where the host swaps, and with huge pages that
/// come and go. It counts what it does, and where the counts have moved since the last look, all shared memory counts as written
/// ([`doubted`](Self::doubted)): whoever wants guests to be moved in few rounds keeps their memory from being swapped. A process that
/// asks for it by itself, by `MADV_DONTNEED` or `MADV_PAGEOUT` on shared memory that it keeps, is not noticed.
#[derive(Debug)]
pub struct SoftDirtyLog<S> {
    process: Process,
    layout: Layout,
    pieces: Vec<Piece>,
    /// Whether shared memory may have huge pages.
    huge: bool,
    standstill: S,
    /// Between `start` and `stop`.
    started: Mutex<Option<Started>>,
    pauses: Mutex<Standstills>,
    doubted: AtomicU64,
}

/// A range of addresses that holds a part of a region.
#[derive(Debug)]
struct Piece {
    addresses: Range<u64>,
    /// The region's first chunk.
    chunk: u32,
    /// The piece's first page, counted from the start of the region.
    page: u64,
    /// What was mapped there at first.
    mapped: Vec<Mapping>,
}

impl Piece {
    /// All of its pages, counted from the start of the region.
    fn pages(&self) -> Range<u64> {
        self.page..self.page + (self.addresses.end - self.addresses.start) / PAGE_SIZE as u64
    }

    fn is_shared(&self) -> bool {
        self.mapped.iter().any(|mapping| mapping.shared)
    }
}

/// What is known since the last look.
#[derive(Debug)]
struct Started {
    /// The pages that were there.
    present: PageBitmap,
    /// Where there is shared memory.
    losses: Option<Losses>,
}

/// What one look found.
struct Look {
    written: PageBitmap,
    present: PageBitmap,
}

impl<S: Standstill> SoftDirtyLog<S> {
    /// A log of a layout whose regions lie at `addresses` in the process: for each region, in the order of the layout, the ranges that
    /// hold it one after the other. Nothing is touched before [`start`](DirtyLog::start).
    ///
    /// # Errors
    /// Ranges that do not make up the regions, or that are not mapped; memory whose bits say nothing: huge pages of hugetlbfs, and shared
    /// files of a disk, whose pages leave the page table with their bits.
    pub fn new(
        process: Process,
        layout: Layout,
        addresses: &[Vec<Range<u64>>],
        standstill: S,
    ) -> Result<Self, BackendError> {
        let (mut pieces, mut huge) = (Vec::new(), false);
        if addresses.len() != layout.regions().len() {
            return Err(BackendError::invalid(format!(
                "track {} regions of process {}: addresses of {} are known",
                layout.regions().len(),
                process.pid(),
                addresses.len()
            )));
        }
        for (at, (region, ranges)) in layout.regions().iter().zip(addresses).enumerate() {
            let aligned = |n: u64| n.is_multiple_of(PAGE_SIZE as u64);
            let whole =
                |range: &Range<u64>| range.start < range.end && aligned(range.start) && aligned(range.end);
            let bytes = ranges.iter().try_fold(0u64, |sum, r| sum.checked_add(r.end.saturating_sub(r.start)));
            if !ranges.iter().all(whole) || bytes != Some(region.len) {
                return Err(BackendError::invalid(format!(
                    "track region {:?} of process {} at {ranges:#x?}: they are to be whole pages, and {:#x} bytes together",
                    region.name,
                    process.pid(),
                    region.len
                )));
            }
            let mut page = 0;
            for range in ranges {
                let mut mapped = mapped_in(&process, &region.name, range)?;
                for mapping in &mut mapped {
                    // Comes and goes, and is no other mapping.
                    huge |= mapping.shared & std::mem::take(&mut mapping.transparent_huge);
                }
                pieces.push(Piece {
                    addresses: range.clone(),
                    chunk: layout.region_chunks(at).start,
                    page,
                    mapped,
                });
                page += (range.end - range.start) / PAGE_SIZE as u64;
            }
        }
        let (started, pauses) = (Mutex::default(), Mutex::default());
        Ok(Self { process, layout, pieces, huge, standstill, started, pauses, doubted: AtomicU64::new(0) })
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// How long the guest stood still for looks, since the log was made.
    pub fn paused(&self) -> Standstills {
        *self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many looks counted all shared memory as written, because the kernel may have lost bits of it.
    pub fn doubted(&self) -> u64 {
        self.doubted.load(Ordering::Relaxed)
    }

    fn started(&self) -> MutexGuard<'_, Option<Started>> {
        // It is one value, replaced whole.
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for what a look finds, taken before the guest stands still.
    fn room(&self) -> Look {
        let empty = || PageBitmap::new(self.layout.chunks());
        Look { written: empty(), present: empty() }
    }

    fn scan(&self, look: &Look) -> Result<(), BackendError> {
        for piece in &self.pieces {
            let page = |address: u64| piece.page + (address - piece.addresses.start) / PAGE_SIZE as u64;
            soft_dirty::look(self.process.pagemap(), &piece.addresses, |run, found| {
                let pages = page(run.start)..page(run.end);
                if found.written {
                    insert_run(&look.written, piece.chunk, pages.clone());
                }
                if found.present {
                    insert_run(&look.present, piece.chunk, pages);
                }
            })
            .map_err(|e| self.process.error("look for written pages of", e))?;
        }
        Ok(())
    }

    fn clear_bits(&self) -> Result<(), BackendError> {
        soft_dirty::clear(self.process.clear_refs())
            .map_err(|e| self.process.error("clear the soft-dirty bits of", e))
    }

    /// That the memory is still what it was. A process that has ended, or that runs another program, has an empty page table, which looks
    /// as if nothing was written.
    fn require_mapped(&self) -> Result<(), BackendError> {
        self.process.require_alive()?;
        let mapped = self.process.mapped()?;
        for piece in &self.pieces {
            let now = maps::within(&mapped, &piece.addresses);
            if now != piece.mapped {
                return Err(BackendError::invalid(format!(
                    "track memory of process {}: at {:#x?} it has mapped something else: {now:x?} in place of {:x?}; begin anew",
                    self.process.pid(),
                    piece.addresses,
                    piece.mapped
                )));
            }
        }
        Ok(())
    }
}

impl<S: Standstill> DirtyLog for SoftDirtyLog<S> {
    /// As [`paused`](Self::paused) has it in all.
    fn paused(&self) -> Duration {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner).total
    }

    fn name(&self) -> &str {
        "soft-dirty"
    }

    /// Tries first whether the kernel notes written pages at all ([`check`](soft_dirty::check)). The guest stands still meanwhile, so
    /// that no DMA is on its way which was noted before.
    fn start(&self) -> Result<(), BackendError> {
        let mut started = self.started();
        *started = None;
        soft_dirty::check()?;
        let look = self.room();
        let shared = self.pieces.iter().any(Piece::is_shared);
        let losses = shared.then(|| Losses::begin(self.huge)).transpose()?;
        while_standing(&self.standstill, &self.pauses, || {
            self.clear_bits()?;
            self.scan(&look)
        })?;
        self.require_mapped()?;
        *started = Some(Started { present: look.present, losses });
        Ok(())
    }

    /// After an error it is to be started again: what the look found is lost.
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        if dirty.chunks() != self.layout.chunks() {
            return Err(BackendError::invalid(format!(
                "sync into a bitmap of {} chunks: the layout has {}",
                dirty.chunks(),
                self.layout.chunks()
            )));
        }
        let mut started = self.started();
        let mut last = started.take().ok_or_else(|| BackendError::not_started(self.name()))?;
        let look = self.room();
        while_standing(&self.standstill, &self.pauses, || {
            self.scan(&look)?;
            self.clear_bits()
        })?;
        self.require_mapped()?;
        if let Some(losses) = &mut last.losses
            && losses.may_have_been()?
        {
            self.doubted.fetch_add(1, Ordering::Relaxed);
            for piece in self.pieces.iter().filter(|piece| piece.is_shared()) {
                insert_run(&look.written, piece.chunk, piece.pages());
            }
        }
        let mut count = 0;
        for chunk in 0..self.layout.chunks() {
            let pages = look.written.get(chunk) | last.present.get(chunk) & !look.present.get(chunk);
            count += u64::from(pages.count_ones());
            if pages != 0 {
                dirty.insert(chunk, pages);
            }
        }
        *started = Some(Started { present: look.present, ..last });
        Ok(count)
    }

    fn stop(&self) -> Result<(), BackendError> {
        *self.started() = None;
        Ok(())
    }
}

/// What is mapped in a range of a region, if its bits can be relied on.
fn mapped_in(process: &Process, region: &str, range: &Range<u64>) -> Result<Vec<Mapping>, BackendError> {
    let refuse = |why: &str| {
        Err(BackendError::new(
            format!("track region {region:?} of process {} at {range:#x?}: {why}", process.pid()),
            io::Error::from(io::ErrorKind::Unsupported),
        ))
    };
    let found = process.mappings_in(range)?;
    let bytes: u64 = found.iter().map(|m| m.addresses.end - m.addresses.start).sum();
    if bytes != range.end - range.start {
        return refuse("not all of it is mapped");
    }
    for mapping in &found {
        match mapping.kind {
            MappingKind::Hugetlb(_) => {
                return refuse(
                    "huge pages of hugetlbfs have no soft-dirty bits to rely on; compare contents instead",
                );
            }
            MappingKind::Other if mapping.shared => {
                return refuse(
                    "pages of a file that is not in memory lose their soft-dirty bits when they are written back; compare contents instead",
                );
            }
            _ => {}
        }
    }
    Ok(found)
}
