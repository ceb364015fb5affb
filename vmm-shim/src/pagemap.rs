//! What the kernel knows of a process's pages: present, swapped, written; from `/proc/PID/pagemap`.
//!
//! Everything here is read from that process's page table. So it says nothing about pages of shared memory that only
//! another process has touched.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use pagecopy::layout::PAGE_SIZE;

use crate::sys::{self, PageRegion, PmScanArg};

/// Reports taken in one system call.
const BATCH: usize = 512;

/// Which pages a scan selects and what it does to them; the fields are those of `struct pm_scan_arg`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Query {
    /// `PM_SCAN_*` flags.
    pub(crate) flags: u64,
    /// Categories whose meaning is turned round before they are matched.
    pub(crate) inverted: u64,
    /// Categories of which a page must have all.
    pub(crate) all_of: u64,
    /// Categories of which a page must have one; 0 asks for none.
    pub(crate) any_of: u64,
    /// Categories in the report. Runs that differ in these are reported apart.
    pub(crate) report: u64,
}

/// Bit 63 of an entry: present; bit 62: swapped.
pub(crate) const ENTRY_PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
/// Bit 55 of an entry: written since the process's bits were last cleared.
pub(crate) const ENTRY_SOFT_DIRTY: u64 = 1 << 55;

/// The page table of this process, open: `/proc/self/pagemap`. A process that gives `/proc` up later opens it before.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens it; needs no privilege, but a mounted `/proc`.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// The page table of whichever process this `pagemap` is of.
    pub(crate) fn of(file: File) -> Self {
        Self(file)
    }

    /// Calls `each` with runs of addresses, `start..end`, that cover exactly the pages of `start..end` that match. A
    /// page can be named twice: where the report vector is larger than needed, the kernel may return runs beyond the
    /// end of the walk that it states, and the next walk finds them again.
    ///
    /// Fails with `ENOTTY` on kernels before 6.7.
    pub(crate) fn scan(
        &self,
        query: &Query,
        start: u64,
        end: u64,
        mut each: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        self.scan_categories(query, start, end, |from, to, _| each(from, to))
    }

    /// The same, and tells which of the categories that are reported hold for each run.
    pub(crate) fn scan_categories(
        &self,
        query: &Query,
        start: u64,
        end: u64,
        mut each: impl FnMut(u64, u64, u64),
    ) -> io::Result<()> {
        let mut out = vec![PageRegion::default(); BATCH];
        let mut at = start;
        while at < end {
            let mut arg = PmScanArg {
                flags: query.flags,
                start: at,
                end,
                category_inverted: query.inverted,
                category_mask: query.all_of,
                category_anyof_mask: query.any_of,
                return_mask: query.report,
                ..PmScanArg::default()
            };
            let count = sys::pagemap_scan(self.0.as_fd(), &mut arg, &mut out)?;
            for run in &out[..count] {
                // The kernel only reports what it was asked for; clamped, so that no caller depends on that.
                let (from, to) = (run.start.max(start), run.end.min(end));
                if from < to {
                    each(from, to, run.categories);
                }
            }
            if arg.walk_end <= at {
                return Err(io::Error::other(format!("PAGEMAP_SCAN got no further than {at:#x}")));
            }
            at = arg.walk_end;
        }
        Ok(())
    }

    /// Calls `each` with runs of addresses whose pages are present or swapped. Works on every kernel. Costs up to 16
    /// ms/GiB where a scan costs 3, and does not know the page of zeros from others.
    pub(crate) fn read_present(
        &self,
        start: u64,
        end: u64,
        mut each: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        self.read_entries(start, end, |at, entry| {
            if entry & ENTRY_PRESENT_OR_SWAPPED != 0 {
                each(at, at + PAGE_SIZE as u64);
            }
        })
    }

    /// Calls `each` with the address of every page and its entry. Works on every kernel, and costs as much as
    /// [`Self::read_present`].
    pub(crate) fn read_entries(
        &self,
        start: u64,
        end: u64,
        mut each: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let page = PAGE_SIZE as u64;
        let mut entries = vec![0u8; BATCH * 8];
        let mut at = start;
        while at < end {
            let count = (((end - at) / page) as usize).min(BATCH);
            let bytes = &mut entries[..count * 8];
            self.0.read_exact_at(bytes, at / page * 8)?;
            for (i, entry) in bytes.chunks_exact(8).enumerate() {
                each(at + i as u64 * page, u64::from_ne_bytes(entry.try_into().expect("chunks of 8")));
            }
            at += count as u64 * page;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pagecopy::backend::GuestRam;
    use pagecopy::layout::Layout;

    use super::*;
    use crate::guest_memory::{Backing, GuestMemory};
    use crate::sys::scan;

    #[test]
    fn both_ways_find_the_same_pages_past_one_batch() {
        let pages = 5 * BATCH as u64;
        let layout = Layout::flat(pages * PAGE_SIZE as u64).unwrap();
        let memory = GuestMemory::create(layout, &Backing::Anonymous { huge: false }).unwrap();
        // Every other page, so that each is a run of its own and one call cannot report all.
        let expected: BTreeSet<u64> = (0..pages).step_by(2).collect();
        for &page in &expected {
            memory.region(0).subslice(page as usize * PAGE_SIZE, 1).unwrap().copy_from(&[1u8]);
        }
        let pagemap = Pagemap::open().unwrap();
        let range = memory.host_range(0);
        let run = |from: u64, to: u64| (from - range.start) / 4096..(to - range.start) / 4096;
        let mut read = BTreeSet::new();
        pagemap.read_present(range.start, range.end, |from, to| read.extend(run(from, to))).unwrap();
        assert_eq!(read, expected);
        let query = Query { any_of: scan::PRESENT, report: scan::PRESENT, ..Query::default() };
        let mut scanned = BTreeSet::new();
        match pagemap.scan(&query, range.start, range.end, |from, to| scanned.extend(run(from, to))) {
            Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => {
                println!("skipped the half about PAGEMAP_SCAN: this kernel is older than 6.7");
            }
            result => {
                result.unwrap();
                assert_eq!(scanned, expected);
            }
        }
    }
}
