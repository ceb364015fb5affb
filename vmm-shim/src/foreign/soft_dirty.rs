//! The soft-dirty bits of a page table: reading them, and finding out whether the kernel keeps them at all.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE};

use crate::guest_memory::{Backing, GuestMemory};
use crate::pagemap::{ENTRY_PRESENT_OR_SWAPPED, ENTRY_SOFT_DIRTY, Pagemap, Query};
use crate::sys::scan;

/// What clears all soft-dirty bits of a process when it is written to its `clear_refs`.
const CLEAR_SOFT_DIRTY: &[u8] = b"4";

/// What a page table says of some pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Written since the bits were cleared.
    pub(super) written: bool,
    /// There, or swapped out.
    pub(super) present: bool,
}

/// Calls `each` with runs of addresses of which the page table knows something. A run can be named twice.
pub(super) fn look(
    pagemap: &Pagemap,
    addresses: &Range<u64>,
    mut each: impl FnMut(Range<u64>, Found),
) -> io::Result<()> {
    match scan_bits(pagemap, addresses, &mut each) {
        // Before Linux 6.7.
        Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => read_bits(pagemap, addresses, each),
        result => result,
    }
}

/// By `PAGEMAP_SCAN`.
fn scan_bits(
    pagemap: &Pagemap,
    addresses: &Range<u64>,
    mut each: impl FnMut(Range<u64>, Found),
) -> io::Result<()> {
    const PRESENT: u64 = scan::PRESENT | scan::SWAPPED;
    let query =
        Query { any_of: PRESENT | scan::SOFT_DIRTY, report: PRESENT | scan::SOFT_DIRTY, ..Query::default() };
    pagemap.scan_categories(&query, addresses.start, addresses.end, |from, to, categories| {
        let found = Found { written: categories & scan::SOFT_DIRTY != 0, present: categories & PRESENT != 0 };
        each(from..to, found);
    })
}

/// Entry by entry.
fn read_bits(
    pagemap: &Pagemap,
    addresses: &Range<u64>,
    mut each: impl FnMut(Range<u64>, Found),
) -> io::Result<()> {
    pagemap.read_entries(addresses.start, addresses.end, |at, entry| {
        let found =
            Found { written: entry & ENTRY_SOFT_DIRTY != 0, present: entry & ENTRY_PRESENT_OR_SWAPPED != 0 };
        if found.written || found.present {
            each(at..at + PAGE_SIZE as u64, found);
        }
    })
}

/// Clears the bits of a process, all of them, by its open `clear_refs`.
pub(super) fn clear(mut clear_refs: impl Write) -> io::Result<()> {
    clear_refs.write_all(CLEAR_SOFT_DIRTY)
}

/// Finds out whether this kernel notes written pages, before anybody relies on it. One without `CONFIG_MEM_SOFT_DIRTY` takes all calls,
/// and says of every page that it was not written. So a little memory is written and read, shared memory and private, and its bits must
/// tell the one from the other.
///
/// It clears the bits of this process, whose next write to each page costs it a fault.
///
/// # Errors
/// When the kernel does not note them, or does so wrongly; and when `/proc` cannot be used.
pub fn check() -> Result<(), BackendError> {
    // One after the other: whoever clears takes the bits of all.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for (what, backing) in [("shared", Backing::Memfd), ("private", Backing::Anonymous { huge: false })] {
        let found = written_of(&backing).map_err(|e| {
            BackendError::new(
                "try whether the kernel notes written pages, by clear_refs and pagemap in /proc/self: mount /proc",
                e,
            )
        })?;
        judge(what, &found)?;
    }
    Ok(())
}

/// Pages of the trial that are written before its bits are cleared, written after that, and read after that, some of them for the
/// first time.
const TOUCHED: [u64; 6] = [1, 2, 3, 8, 9, 63];
const WRITTEN: [u64; 4] = [2, 9, 20, 63];
const READ: [u64; 4] = [1, 8, 33, 40];

/// Which pages of new memory count as written after the trial.
fn written_of(backing: &Backing) -> Result<BTreeSet<u64>, BackendError> {
    let memory = GuestMemory::create(Layout::flat(CHUNK_SIZE as u64)?, backing)?;
    let page =
        |page: u64| memory.region(0).subslice(page as usize * PAGE_SIZE, 1).expect("a page of the chunk");
    let io = |e: io::Error| BackendError::new("read or clear this process's soft-dirty bits", e);
    let pagemap = Pagemap::open().map_err(io)?;
    TOUCHED.iter().for_each(|&at| page(at).copy_from(&[1u8]));
    OpenOptions::new().write(true).open("/proc/self/clear_refs").and_then(clear).map_err(io)?;
    WRITTEN.iter().for_each(|&at| page(at).copy_from(&[2u8]));
    READ.iter().for_each(|&at| {
        page(at).copy_to(&mut [0u8]);
    });
    let range = memory.host_range(0);
    let mut found = BTreeSet::new();
    look(&pagemap, &range, |run, bits| {
        if bits.written {
            let pages =
                (run.start - range.start) / PAGE_SIZE as u64..(run.end - range.start) / PAGE_SIZE as u64;
            found.extend(pages);
        }
    })
    .map_err(io)?;
    Ok(found)
}

/// Whether the trial's pages are just those that were written.
fn judge(memory: &str, found: &BTreeSet<u64>) -> Result<(), BackendError> {
    if *found == BTreeSet::from(WRITTEN) {
        return Ok(());
    }
    let kernel = rustix::system::uname();
    let release = kernel.release().to_string_lossy();
    if found.is_empty() {
        return Err(BackendError::new(
            format!(
                "find pages that another process writes: this kernel ({release}) does not note them; compare contents instead, or boot a \
                 kernel with CONFIG_MEM_SOFT_DIRTY"
            ),
            io::Error::from(io::ErrorKind::Unsupported),
        ));
    }
    Err(BackendError::invalid(format!(
        "find pages that another process writes: of a trial in {memory} memory this kernel ({release}) says that pages {found:?} were \
         written, and {WRITTEN:?} were; compare contents instead"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_believed_when_it_tells_written_from_read() {
        judge("shared", &BTreeSet::from(WRITTEN)).unwrap();
        let error = judge("shared", &BTreeSet::new()).unwrap_err();
        assert!(error.what.contains("CONFIG_MEM_SOFT_DIRTY") && error.what.contains("compare contents"));
        assert_eq!(error.io().unwrap().kind(), io::ErrorKind::Unsupported);
        let all: BTreeSet<u64> = (0..64).collect();
        let text = judge("private", &all).unwrap_err().what;
        assert!(text.contains("private memory"), "{text}");
        assert!(judge("shared", &BTreeSet::from([2, 9, 20])).is_err(), "one is missing");
    }

    #[test]
    fn both_ways_say_the_same() {
        if let Err(e) = check() {
            return println!("skipped: {e}");
        }
        let memory =
            GuestMemory::create(Layout::flat(4 * CHUNK_SIZE as u64).unwrap(), &Backing::Memfd).unwrap();
        // New mappings count as written whole, by one of the ways.
        OpenOptions::new().write(true).open("/proc/self/clear_refs").and_then(clear).unwrap();
        for page in (0..256).step_by(3) {
            memory.region(0).subslice(page * PAGE_SIZE, 1).unwrap().copy_from(&[1u8]);
        }
        let (pagemap, range) = (Pagemap::open().unwrap(), memory.host_range(0));
        let add = |(written, present): &mut (BTreeSet<u64>, BTreeSet<u64>), run: Range<u64>, found: Found| {
            for page in run.step_by(PAGE_SIZE) {
                written.extend(found.written.then_some(page));
                present.extend(found.present.then_some(page));
            }
        };
        let (mut read, mut scanned) = Default::default();
        read_bits(&pagemap, &range, |run, found| add(&mut read, run, found)).unwrap();
        assert_eq!(read.0.len(), 86);
        match scan_bits(&pagemap, &range, |run, found| add(&mut scanned, run, found)) {
            Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => {
                println!("skipped the half about PAGEMAP_SCAN: this kernel is older than 6.7");
            }
            result => {
                result.unwrap();
                assert_eq!(scanned, read);
            }
        }
    }
}
