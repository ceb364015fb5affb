//! What is done with one region of guest memory, whoever mapped it: bringing pages in, taking them away, finding out which are there.

use std::io;
use std::os::fd::BorrowedFd;

use pagecopy::backend::{BackendError, Room};
use pagecopy::layout::{ChunkPlace, Layout, PAGE_SIZE};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::Advice;
use vm_memory::volatile_memory::VolatileSlice;

use crate::holes::{self, Pagemap};
use crate::ram_file::Kind;
use crate::room;
use crate::sys::advise;

/// A region: its mapping, and what is behind it.
#[derive(Debug)]
pub(crate) struct Mapped<'a> {
    pub(crate) memory: VolatileSlice<'a>,
    /// The file that is mapped, and the region's offset in it.
    pub(crate) file: Option<(BorrowedFd<'a>, u64)>,
    pub(crate) kind: Kind,
    /// Whether the file is mapped privately, so that writes stay in this process.
    pub(crate) private: bool,
}

/// Where the chunk of pages that are to be discarded lies.
pub(crate) fn place_of(layout: &Layout, chunk: u32, pages: u64) -> Result<ChunkPlace, BackendError> {
    layout.locate(chunk).filter(|place| pages & !place.valid() == 0).ok_or_else(|| {
        BackendError::invalid(format!("discard pages {pages:#x} of chunk {chunk}: no such pages"))
    })
}

impl Mapped<'_> {
    /// A part of the mapping; it must lie in it.
    fn part(&self, offset: u64, len: u64) -> VolatileSlice<'_> {
        self.memory.subslice(offset as usize, len as usize).expect("a run of pages lies in its region")
    }

    /// Sets the bits of the pages from `offset` on that are no holes. Where nobody can tell of private memory, because there is no page
    /// map, that is all of it.
    pub(crate) fn populated(
        &self,
        pagemap: Option<&Pagemap>,
        offset: u64,
        len: u64,
        pages: &mut [u64],
    ) -> io::Result<()> {
        if let Some((file, base)) = self.file {
            if self.kind == Kind::Shmem && !self.private && (len as usize) < self.memory.len() {
                holes::of_part(file, base + offset, &self.part(offset, len), pages)?;
            } else {
                holes::of_file(file, base + offset..base + offset + len, pages)?;
            }
        }
        if self.file.is_none() || self.private {
            let Some(pagemap) = pagemap else {
                holes::set_pages(pages, 0, len);
                return Ok(());
            };
            let start = self.memory.ptr_guard_mut().as_ptr() as u64 + offset;
            holes::of_anonymous(pagemap, start..start + len, pages)?;
        }
        Ok(())
    }

    /// Brings a run of pages in.
    pub(crate) fn bring_in(&self, offset: u64, len: u64, advice: Advice) -> io::Result<()> {
        match advise(&self.part(offset, len), advice) {
            // Before Linux 5.14: pages come in as they are touched, which those of a file that has its blocks can be.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                let Some((file, base)) = self.file.filter(|_| !self.private) else { return Ok(()) };
                match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, base + offset, len) {
                    Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
                    other => other.map_err(io::Error::from),
                }
            }
            other => other,
        }
    }

    /// Whether a range of the region is whole pages of what it is kept in.
    fn whole_pages(&self, offset: u64, len: u64) -> bool {
        match self.kind {
            Kind::Hugetlb(size) => offset.is_multiple_of(size) && len.is_multiple_of(size),
            _ => true,
        }
    }

    /// Makes `len` bytes at `offset` of the region read as zero, and holes again where that can be.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.file {
            None if self.kind == Kind::Anonymous => {
                return advise(&self.part(offset, len), Advice::LinuxDontNeed);
            }
            Some((file, base)) if !self.private && self.whole_pages(offset, len) => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match rustix::fs::fallocate(file, flags, base + offset, len) {
                    // A file system without holes.
                    Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                    other => return other.map_err(io::Error::from),
                }
            }
            _ => {}
        }
        self.zero(offset, len);
        Ok(())
    }

    /// Writes zeros.
    fn zero(&self, offset: u64, len: u64) {
        let range = self.part(offset, len);
        let zeros = [0u8; PAGE_SIZE];
        for page in (0..len as usize).step_by(PAGE_SIZE) {
            range.subslice(page, PAGE_SIZE).expect("whole pages").copy_from(&zeros);
        }
    }
}

/// What memory of this host can still grow by.
pub(crate) fn memory_room() -> Room {
    Room {
        bytes: room::memory_bytes(),
        of: "this host's memory and swap, within its cgroup's limit,".into(),
        hint: "free some, raise the limit, or use a smaller guest",
    }
}

/// Whether what is mapped at an address is private to this process; also where nobody says so: what is private is handled with more care.
pub(crate) fn is_private(address: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    is_private_in(&maps, address).unwrap_or(true)
}

/// The same by the text of `/proc/PID/maps` (proc_pid_maps(5)).
fn is_private_in(maps: &str, address: u64) -> Option<bool> {
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let range = u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?;
        range.contains(&address).then(|| rest.as_bytes().get(3) != Some(&b's'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_tells_what_is_private() {
        let maps = "7f00-8000 rw-s 00000000 00:01 1  /memfd:a (deleted)\n8000-9000 rw-p 00000000 00:00 0\n";
        assert_eq!(is_private_in(maps, 0x7f00), Some(false));
        assert_eq!(is_private_in(maps, 0x8000), Some(true));
        assert_eq!(is_private_in(maps, 0x9000), None);
        let here = [0u8; 1];
        assert!(is_private(here.as_ptr() as u64));
    }
}
