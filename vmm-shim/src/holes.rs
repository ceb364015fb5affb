//! Which pages of memory are holes: never touched, so they read as zero and need not be moved.
//!
//! A file says so by itself, whichever process wrote it ([`of_file`]). Private memory has a page table entry for each page that is no
//! hole ([`of_anonymous`]). Privately mapped files have both: what either finds is no hole. Both set bits and clear none, so a
//! [`GuestRam::populated`](pagecopy::backend::GuestRam::populated) calls what it needs, one after the other.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use pagecopy::layout::PAGE_SIZE;
use rustix::io::Errno;

pub use crate::pagemap::Pagemap;
use crate::pagemap::Query;
use crate::ram_file::{Kind, kind_of_fd, seek_data};
use crate::sys::scan;

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

    #[test]
    fn too_few_words_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let text = of_file(&file, 0..65 * 4096, &mut [0]).unwrap_err().to_string();
        assert!(text.contains("1 words"), "{text}");
        assert!(of_anonymous(&Pagemap::open().unwrap(), 1..4096, &mut [0]).is_err());
    }
}
