//! Which pages of memory are holes: never touched, so they read as zero and need not be moved.
//!
//! A file says so by itself, whichever process wrote it ([`of_file`]). Private memory has a page table entry for each page that is no
//! hole ([`of_anonymous`]). Privately mapped files have both: what either finds is no hole. Both set bits and clear none, so a
//! [`GuestRam::populated`](pagecopy::backend::GuestRam::populated) calls what it needs, one after the other.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use pagecopy::layout::PAGE_SIZE;
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::volatile_memory::VolatileSlice;

pub use crate::pagemap::Pagemap;
use crate::pagemap::Query;
use crate::ram_file::{Kind, kind_of_fd, seek_data};
use crate::sys::{in_core, scan};

/// The unit in which the system counts a file's blocks, in bytes.
const BLOCK_SIZE: u64 = 512;

/// Sets the bits of the pages in `bytes` of a file that are no holes: bit 0 of the first word is the page at `bytes.start`, a multiple of
/// 4096.
///
/// File systems other than tmpfs may tell data from holes by blocks larger than a page, and those that know no holes have none. Files
/// in hugetlbfs are a hole only as a whole. The position of the descriptor moves.
///
/// # Errors
/// What the system refuses, and fewer words than the pages need.
///
/// ```
/// use std::os::unix::fs::FileExt;
///
/// let file = vmm_shim::guest_memory::GuestMemory::create(
///     pagecopy::layout::Layout::flat(1 << 20)?,
///     &vmm_shim::guest_memory::Backing::Memfd,
/// )?;
/// let (fd, offset) = file.fd_of(0).expect("a memfd");
/// let file = std::fs::File::from(fd.try_clone_to_owned()?);
/// file.write_all_at(b"x", offset + 3 * 4096)?;
/// let mut pages = [0; 4];
/// vmm_shim::holes::of_file(&file, 0..1 << 20, &mut pages)?;
/// assert_eq!(pages, [1 << 3, 0, 0, 0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn of_file(file: impl AsFd, bytes: Range<u64>, pages: &mut [u64]) -> io::Result<()> {
    let file = file.as_fd();
    check_words(&bytes, pages)?;
    let whole = bytes.end.saturating_sub(bytes.start);
    let kind = kind_of_fd(file)?;
    // hugetlbfs does not look for holes; but a file without any block is one.
    if matches!(kind, Kind::Hugetlb(_)) {
        if rustix::fs::fstat(file)?.st_blocks != 0 {
            set_pages(pages, 0, whole);
        }
        return Ok(());
    }
    // A file in memory that has all its blocks has no hole. That is known without a walk, which takes 11 ms for 1 GiB.
    if kind == Kind::Shmem {
        let stat = rustix::fs::fstat(file)?;
        if (stat.st_blocks as u64).saturating_mul(BLOCK_SIZE) >= stat.st_size as u64 {
            set_pages(pages, 0, whole);
            return Ok(());
        }
    }
    seek_data(file, bytes.start, 0..whole, |from, to| set_pages(pages, from, to))
}

/// The same for a part of a file in memory, all of which is mapped as `memory`.
///
/// The search for a hole ends at the next one, however far behind the part that is: looking through a file of few holes part by part goes
/// over it many times. The mapping tells of just these pages; only of what is in swap the file has to be asked.
pub(crate) fn of_part(
    file: BorrowedFd<'_>,
    base: u64,
    memory: &VolatileSlice<'_>,
    pages: &mut [u64],
) -> io::Result<()> {
    let bytes = base..base + memory.len() as u64;
    let stat = rustix::fs::fstat(file)?;
    let may_write = rustix::fs::fcntl_getfl(file)?.contains(OFlags::RDWR);
    // Nobody else is told what is in memory.
    if !may_write && stat.st_uid != rustix::process::geteuid().as_raw() {
        return of_file(file, bytes, pages);
    }
    check_words(&bytes, pages)?;
    let page = PAGE_SIZE as u64;
    let there = in_core(memory)?;
    let mut from = 0;
    for run in there.chunk_by(|a, b| a == b) {
        let to = from + run.len() as u64 * page;
        if run[0] {
            set_pages(pages, from, to.min(memory.len() as u64));
        } else {
            in_swap(file, base + from..base + to, |at| set_pages(pages, at - base, at - base + page))?;
        }
        from = to;
    }
    Ok(())
}

/// Calls `each` with the places of the pages in a range of a file that are data, one by one: most are none.
fn in_swap(file: BorrowedFd<'_>, range: Range<u64>, mut each: impl FnMut(u64)) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < range.end => {
                each(data);
                at = data + PAGE_SIZE as u64;
            }
            Ok(_) | Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Sets the bits of the pages in `addresses` of this process that are private and were touched: bit 0 of the first word is the page at
/// `addresses.start`, a multiple of 4096. Pages of files and shared memory are not among them, unless they were written through a
/// private mapping.
///
/// Before Linux 6.7 pages of files, and untouched ones that were only read, are among them, and it takes longer.
///
/// # Errors
/// What the system refuses, and fewer words than the pages need.
///
/// ```
/// use vmm_shim::holes::{Pagemap, of_anonymous};
/// use vmm_shim::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// memory.write_obj(1u8, GuestAddress(3 * 4096))?;
/// let region = memory.iter().next().expect("one region");
/// let start = region.get_host_address(MemoryRegionAddress(0))? as u64;
/// let mut pages = [0; 4];
/// of_anonymous(&Pagemap::open()?, start..start + (1 << 20), &mut pages)?;
/// assert_eq!(pages[0] & 0b1000, 0b1000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn of_anonymous(pagemap: &Pagemap, addresses: Range<u64>, pages: &mut [u64]) -> io::Result<()> {
    check_words(&addresses, pages)?;
    let (start, end) = (addresses.start, addresses.end);
    let not = scan::PFNZERO | scan::FILE;
    let query = Query {
        inverted: not,
        all_of: not,
        any_of: scan::PRESENT | scan::SWAPPED,
        report: scan::PRESENT,
        ..Query::default()
    };
    match pagemap.scan(&query, start, end, |from, to| set_pages(pages, from - start, to - start)) {
        // Before Linux 6.7.
        Err(e) if e.raw_os_error() == Some(Errno::NOTTY.raw_os_error()) => {
            pagemap.read_present(start, end, |from, to| set_pages(pages, from - start, to - start))
        }
        other => other,
    }
}

/// Refuses words that are fewer than the bits.
fn check_words(bytes: &Range<u64>, pages: &[u64]) -> io::Result<()> {
    let needed = bytes.end.saturating_sub(bytes.start).div_ceil(PAGE_SIZE as u64);
    if !bytes.start.is_multiple_of(PAGE_SIZE as u64) || needed > pages.len() as u64 * 64 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} words for the pages of {bytes:#x?}", pages.len()),
        ));
    }
    Ok(())
}

/// Sets the bits of the pages that the bytes `from..to` touch; byte 0 is the start of `words[0]`.
pub(crate) fn set_pages(words: &mut [u64], from: u64, to: u64) {
    let mut page = (from / PAGE_SIZE as u64) as usize;
    let end = (to.div_ceil(PAGE_SIZE as u64) as usize).min(words.len() * 64);
    while page < end {
        let (word, bit) = (page / 64, page % 64);
        let count = (end - page).min(64 - bit);
        words[word] |= (u64::MAX >> (64 - count)) << bit;
        page += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_pages_rounds_outwards_and_stays_in_the_words() {
        let mut words = [0u64; 3];
        set_pages(&mut words, 63 * 4096 + 1, 65 * 4096 + 1);
        assert_eq!(words, [1 << 63, 0b11, 0]);
        set_pages(&mut words, 64 * 4096, 128 * 4096);
        assert_eq!(words, [1 << 63, u64::MAX, 0]);
        set_pages(&mut words, 191 * 4096, 400 * 4096);
        assert_eq!(words[2], 1 << 63);
    }

    /// Pages that this process has touched, pages that another mapping has, and holes, some of which were pages.
    #[test]
    fn a_part_is_told_as_the_whole_is() {
        use std::os::unix::fs::FileExt;

        use pagecopy::backend::GuestRam;
        use pagecopy::layout::{CHUNK_SIZE, Layout};
        use rustix::fs::FallocateFlags;

        use crate::guest_memory::{Backing, GuestMemory};

        let chunks = 6;
        let layout = Layout::flat(chunks * CHUNK_SIZE as u64).unwrap();
        let memory = GuestMemory::create(layout, &Backing::Memfd).unwrap();
        let (fd, offset) = memory.fd_of(0).unwrap();
        let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
        let page = |chunk: u64, bit: u64| chunk * CHUNK_SIZE as u64 + bit * PAGE_SIZE as u64;
        for (chunk, bit) in [(0, 0), (0, 63), (1, 0), (1, 1), (3, 5), (5, 62), (5, 63)] {
            memory.region(0).subslice(page(chunk, bit) as usize, 1).unwrap().copy_from(&[1u8]);
        }
        for (chunk, bit) in [(1, 2), (2, 0), (2, 63), (4, 9)] {
            file.write_all_at(b"x", offset + page(chunk, bit)).unwrap();
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for (chunk, bit) in [(0, 63), (2, 0)] {
            rustix::fs::fallocate(&file, punch, offset + page(chunk, bit), PAGE_SIZE as u64).unwrap();
        }
        let expected = [1, 0b111, 1 << 63, 1 << 5, 1 << 9, 3 << 62];
        let mut whole = [0; 6];
        memory.populated(0, &mut whole).unwrap();
        assert_eq!(whole, expected);
        for first in 0..6 {
            for count in 1..=6 - first {
                let mut part = vec![0; count];
                memory.populated(first as u32, &mut part).unwrap();
                assert_eq!(part, expected[first..first + count], "{first} {count}");
            }
        }
    }

    /// What is in swap is data for a file, and not in memory.
    #[test]
    fn data_is_told_page_by_page() {
        use std::os::unix::fs::FileExt;

        let file =
            std::fs::File::from(rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(64 * 4096).unwrap();
        for page in [3, 4, 40] {
            file.write_all_at(b"x", page * 4096).unwrap();
        }
        let found = |range: Range<u64>| {
            let mut found = Vec::new();
            in_swap(file.as_fd(), range.start * 4096..range.end * 4096, |at| found.push(at / 4096)).unwrap();
            found
        };
        assert_eq!(found(0..64), [3, 4, 40]);
        assert_eq!((found(4..40), found(41..64), found(0..3)), (vec![4], vec![], vec![]));
    }

    #[test]
    fn too_few_words_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let text = of_file(&file, 0..65 * 4096, &mut [0]).unwrap_err().to_string();
        assert!(text.contains("1 words"), "{text}");
        assert!(of_anonymous(&Pagemap::open().unwrap(), 1..4096, &mut [0]).is_err());
    }
}
