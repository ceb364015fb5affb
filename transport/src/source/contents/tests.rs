//! Memory that is compared with what was sent of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pagecopy::backend::{BackendError, ContentLog, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, Layout};
use vm_memory::volatile_memory::VolatileSlice;

use crate::guest_memory::Memory;
use crate::source::PageSource;
use crate::source::contents::Comparing;
use crate::source::doubles::options;

/// Memory of one chunk more than a stretch, in whose last chunk are holes.
struct Holed {
    memory: Memory,
    holes: AtomicU64,
}

const LAST: u32 = super::STRETCH;
/// In place of holes: nobody can tell.
const UNKNOWN: u64 = u64::MAX;

impl GuestRam for Holed {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }
    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.memory.region(region)
    }
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        pages.fill(u64::MAX);
        if self.holes.load(Ordering::Relaxed) == UNKNOWN {
            return Err(BackendError::invalid("no holes are known"));
        }
        if let Some(last) = pages.get_mut((LAST - first) as usize) {
            *last &= !self.holes.load(Ordering::Relaxed);
        }
        Ok(())
    }
    fn discard(&self, _chunk: u32, _pages: u64) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A source whose pages were all sent as they are, but for the holes.
fn sent(holes: u64) -> (Arc<Holed>, PageSource) {
    let memory = Memory::new(Layout::flat(u64::from(LAST + 1) * CHUNK_SIZE as u64).unwrap());
    let ram = Arc::new(Holed { memory, holes: AtomicU64::new(holes) });
    (0..64).for_each(|bit| ram.memory.write(LAST, bit, &[bit as u8; 4096]));
    let pending = PageBitmap::new(LAST + 1);
    let source = PageSource::new(ram.clone(), Arc::new(ContentLog), PageHasher::new(1), options(), pending);
    for chunk in 0..=LAST {
        let pages = if chunk == LAST { !holes } else { u64::MAX };
        bits(pages).for_each(|bit| as_sent(&ram, &source, chunk, bit));
    }
    (ram, source)
}

/// A page leaves as it is now.
fn as_sent(ram: &Holed, source: &PageSource, chunk: u32, bit: u32) {
    let digest = source.shared.hasher.page(&ram.memory.read(chunk, bit));
    source.shared.table.set(chunk, bit, digest);
}

#[test]
fn what_is_not_as_it_was_sent_is_found() {
    let (ram, source) = sent(0);
    assert_eq!(source.dirty_sync().unwrap(), 0);
    ram.memory.write(0, 5, &[1; 4096]);
    ram.memory.write(LAST, 63, &[1; 4096]);
    assert_eq!(source.dirty_sync().unwrap(), 2);
    assert_eq!((source.pending.get(0), source.pending.get(LAST)), (1 << 5, 1 << 63));
    // What is pending is not found again.
    assert_eq!(source.dirty_sync().unwrap(), 0);
}

#[test]
fn a_content_that_comes_back_is_found_where_another_was_sent_in_between() {
    let (ram, source) = sent(0);
    let before = ram.memory.read(LAST, 7);
    ram.memory.write(LAST, 7, &[9; 4096]);
    as_sent(&ram, &source, LAST, 7);
    ram.memory.write(LAST, 7, &before);
    assert_eq!(source.dirty_sync().unwrap(), 1);
    assert_eq!(source.pending.get(LAST), 1 << 7);
}

#[test]
fn pages_that_come_and_go_are_found() {
    let (ram, source) = sent(0b11);
    assert_eq!(source.dirty_sync().unwrap(), 0, "holes are as they were");
    // One hole is filled with something, and one with zeros, which the destination has; a third page is taken away.
    ram.memory.write(LAST, 1, &[1; 4096]);
    ram.holes.store(1 << 2, Ordering::Relaxed);
    assert_eq!(source.dirty_sync().unwrap(), 2);
    assert_eq!(source.pending.get(LAST), 0b110);
}

#[test]
fn what_the_destination_may_have_is_not_taken_for_zeros() {
    let (ram, source) = sent(0);
    source.carried.insert(LAST, 1 << 9);
    source.shared.void(LAST, 1 << 9);
    ram.memory.write(LAST, 9, &[0; 4096]);
    assert_eq!(source.dirty_sync().unwrap(), 1);
    assert_eq!(source.pending.get(LAST), 1 << 9);
}

#[test]
fn threads_beside_find_the_same_and_end_when_nobody_waits() {
    let (ram, source) = sent(0);
    let source = Arc::new(source);
    ram.memory.write(0, 5, &[1; 4096]);
    ram.memory.write(LAST, 63, &[1; 4096]);
    let comparing = Comparing::begin(&source);
    assert_eq!(comparing.end().unwrap().pages, 2);
    assert_eq!((source.pending.get(0), source.pending.get(LAST)), (1 << 5, 1 << 63));
    drop(Comparing::begin(&source));
    assert_eq!(Arc::strong_count(&source), 1, "no thread is left");
    // Without a thread whoever ends it does the work.
    ram.memory.write(LAST, 3, &[1; 4096]);
    let alone = Comparing { source: source.clone(), search: Arc::default(), threads: Vec::new() };
    assert!(alone.is_over());
    assert_eq!(alone.end().unwrap().pages, 1);
}

#[test]
fn memory_that_cannot_tell_its_holes_ends_a_comparison() {
    let (ram, source) = sent(0);
    let source = Arc::new(source);
    ram.holes.store(UNKNOWN, Ordering::Relaxed);
    assert!(source.compare().unwrap_err().to_string().contains("no holes"));
    assert!(Comparing::begin(&source).end().unwrap_err().to_string().contains("no holes"));
}
