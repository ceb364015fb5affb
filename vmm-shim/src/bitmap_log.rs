//! The dirty log of what a VMM itself writes, where vm-memory marks it.
//!
//! vm-memory sets a bit in a region's [`AtomicBitmap`] after each write that goes through it: emulated devices, loaders, `read(2)` into a
//! slice of it. It sees neither vCPUs, whose writes KVM logs, nor who writes by an address of the mapping. So this is one half of a
//! [`UnionLog`](crate::union_log::UnionLog), except where there is no VM at all.

use std::sync::atomic::{AtomicBool, Ordering};

use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{Layout, PAGE_SIZE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Memory that has a bitmap for each region, in which those who write it mark what they wrote, after they wrote it.
///
/// A VMM whose memory is of another type than [`GuestMemoryMmap`] implements it: vm-memory's own traits do not let the bitmap out.
pub trait MarkedMemory: Send + Sync {
    /// Calls `each` with the length in bytes and the bitmap of every region, by ascending guest-physical address.
    fn each_bitmap(&self, each: &mut dyn FnMut(u64, &AtomicBitmap));
}

impl MarkedMemory for GuestMemoryMmap<AtomicBitmap> {
    fn each_bitmap(&self, each: &mut dyn FnMut(u64, &AtomicBitmap)) {
        for region in self.iter() {
            // The mapping's own, not the slice of it that the trait has.
            let mapping: &vm_memory::MmapRegion<AtomicBitmap> = region;
            each(region.len(), mapping.bitmap());
        }
    }
}

/// Reports the pages that are marked in vm-memory's bitmaps, and takes the marks away. See the [module](self).
///
/// ```
/// use pagecopy::backend::DirtyLog;
/// use pagecopy::bitmap::PageBitmap;
/// use pagecopy::layout::Layout;
/// use vmm_shim::bitmap_log::BitmapLog;
/// use vmm_shim::vm_memory::bitmap::AtomicBitmap;
/// use vmm_shim::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let layout = Layout::flat(1 << 20)?;
/// let log = BitmapLog::new(memory.clone(), &layout)?;
/// log.start()?;
/// memory.write_obj(1u64, GuestAddress(5 << 12))?;
/// let dirty = PageBitmap::new(layout.chunks());
/// log.sync(&dirty)?;
/// assert_eq!(dirty.get(0), 1 << 5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct BitmapLog<M> {
    memory: M,
    /// First chunk of each region.
    first_chunks: Vec<u32>,
    on: AtomicBool,
}

impl<M: MarkedMemory> BitmapLog<M> {
    /// A log over the bitmaps of `memory`, whose regions are those of `layout` that have an address.
    ///
    /// # Errors
    /// Where the regions are others, or a bitmap has not one bit for each page of 4 KiB.
    pub fn new(memory: M, layout: &Layout) -> Result<Self, BackendError> {
        let regions = layout.regions();
        let mut first_chunks = Vec::with_capacity(regions.len());
        let mut wrong = None;
        memory.each_bitmap(&mut |len, bitmap| {
            let region = first_chunks.len();
            let pages = len.div_ceil(PAGE_SIZE as u64);
            match regions.get(region) {
                Some(r) if r.len != len => {
                    wrong = wrong.take().or_else(|| {
                        Some(format!("region {region} has {len} bytes; the layout's has {}", r.len))
                    });
                }
                Some(_) if bitmap.len() as u64 != pages => {
                    wrong = wrong.take().or_else(|| {
                        let bits = bitmap.len();
                        Some(format!(
                            "the bitmap of region {region} has {bits} bits for {pages} pages of {PAGE_SIZE} bytes"
                        ))
                    });
                }
                _ => {}
            }
            first_chunks.push(if region < regions.len() { layout.region_chunks(region).start } else { 0 });
        });
        if let Some(wrong) = wrong {
            return Err(BackendError::invalid(format!("log what is marked: {wrong}")));
        }
        if first_chunks.len() != regions.len() {
            let (marked, known) = (first_chunks.len(), regions.len());
            return Err(BackendError::invalid(format!(
                "log what is marked: the memory has {marked} regions, the layout {known}"
            )));
        }
        Ok(Self { memory, first_chunks, on: AtomicBool::new(false) })
    }

    /// Takes all marks away, and calls `each` with chunks that had some and their pages.
    fn take(&self, mut each: impl FnMut(u32, u64)) {
        let mut firsts = self.first_chunks.iter();
        self.memory.each_bitmap(&mut |_, bitmap| {
            let Some(&first) = firsts.next() else { return };
            for (chunk, pages) in (first..).zip(bitmap.get_and_reset()) {
                if pages != 0 {
                    each(chunk, pages);
                }
            }
        });
    }
}

impl<M: MarkedMemory> DirtyLog for BitmapLog<M> {
    fn name(&self) -> &str {
        "marks"
    }

    fn start(&self) -> Result<(), BackendError> {
        self.take(|_, _| ());
        self.on.store(true, Ordering::Release);
        Ok(())
    }

    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        if !self.on.load(Ordering::Acquire) {
            return Err(BackendError::not_started(self.name()));
        }
        let mut count = 0;
        self.take(|chunk, pages| {
            count += u64::from(pages.count_ones());
            dirty.insert(chunk, pages);
        });
        Ok(count)
    }

    /// Marks are set as ever; nobody looks at them.
    fn stop(&self) -> Result<(), BackendError> {
        self.on.store(false, Ordering::Release);
        Ok(())
    }
}
