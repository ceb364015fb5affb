//! Files that hold guest RAM: making, opening and refusing them, what kind they are, and where their data lies.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use pagecopy::backend::BackendError;
use pagecopy::layout::{Layout, PAGE_SIZE};
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

/// What the kernel keeps the pages in: decides how holes are found and made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// tmpfs or a memfd.
    Shmem,
    /// hugetlbfs or a memfd of huge pages, with the size of these in bytes.
    Hugetlb(u64),
    /// A file system on a disk, or anything else.
    Disk,
}

/// Calls `each` with the runs of data in `range`, counted from `base` in the file. A file system that knows no holes
/// has one run.
pub(crate) fn seek_data(
    file: BorrowedFd<'_>,
    base: u64,
    range: Range<u64>,
    mut each: impl FnMut(u64, u64),
) -> io::Result<()> {
    let end = base + range.end;
    let mut at = base + range.start;
    while at < end {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e.into()),
        };
        if data >= end {
            break;
        }
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(end),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(e) => return Err(e.into()),
        };
        // A hole that was punched between the two calls can be at `data` itself; that page is then said to be
        // populated, which it was.
        let hole = hole.max((data + 1).next_multiple_of(PAGE_SIZE as u64)).min(end);
        each(data - base, hole - base);
        at = hole;
    }
    Ok(())
}

/// A new, sealed memfd with room for the layout.
pub(crate) fn memfd(layout: &Layout, extra: MemfdFlags) -> Result<File, BackendError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | extra;
    let fd = rustix::fs::memfd_create("pageferry-ram", flags).map_err(|e| {
        let what = if extra.is_empty() {
            "make a memfd".to_owned()
        } else {
            "make a memfd of 2 MiB pages: does this kernel have hugetlbfs, with pages of that size?"
                .to_owned()
        };
        BackendError::new(what, io::Error::from(e))
    })?;
    let file = File::from(fd);
    file.set_len(layout.bytes())
        .map_err(|e| BackendError::new(format!("give a memfd {} bytes", layout.bytes()), e))?;
    // Nobody who gets the descriptor can then cut the memory off under our feet.
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|e| BackendError::new("seal a memfd against a change of size", io::Error::from(e)))?;
    Ok(file)
}

/// Makes a file of the layout's size without any data.
pub(crate) fn create_file(path: &Path, layout: &Layout) -> Result<File, BackendError> {
    let failed = |doing: &str, e| BackendError::new(format!("{}: {doing}", path.display()), e);
    // Not O_TRUNC: that would empty whatever this is before it is known to be a regular file.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|e| failed("make the RAM file", e))?;
    require_regular(path, &file)?;
    if let Kind::Hugetlb(size) = kind_of(&file)? {
        check_huge_regions(layout, size)?;
    }
    file.set_len(0).map_err(|e| failed("empty the RAM file", e))?;
    file.set_len(layout.bytes())
        .map_err(|e| failed(&format!("give the RAM file {} bytes", layout.bytes()), e))?;
    Ok(file)
}

/// Opens a file that holds RAM; returns it with its length in bytes.
pub(crate) fn open_file(path: &Path, writable: bool) -> Result<(File, u64), BackendError> {
    // Of a pipe this would wait for its other end, before it is known to be one.
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| BackendError::new(format!("{}: open the RAM file", path.display()), e))?;
    let len = require_regular(path, &file)?;
    if len == 0 || len % PAGE_SIZE as u64 != 0 {
        return Err(BackendError::invalid(format!(
            "{}: the file has {len} bytes; a RAM file has a multiple of {PAGE_SIZE}, and is not empty",
            path.display()
        )));
    }
    Ok((file, len))
}

/// Refuses what is not a regular file; returns its length in bytes.
pub(crate) fn require_regular(path: &Path, file: &File) -> Result<u64, BackendError> {
    let meta = file
        .metadata()
        .map_err(|e| BackendError::new(format!("{}: look at the RAM file", path.display()), e))?;
    if meta.is_file() {
        return Ok(meta.len());
    }
    Err(BackendError::invalid(format!(
        "{}: not a regular file; RAM is kept in regular files only",
        path.display()
    )))
}

/// What file system a file is on.
pub(crate) fn kind_of(file: &File) -> Result<Kind, BackendError> {
    kind_of_fd(file.as_fd()).map_err(|e| BackendError::new("ask what file system the RAM file is on", e))
}

/// What file system a file is on.
pub(crate) fn kind_of_fd(file: BorrowedFd<'_>) -> io::Result<Kind> {
    let fs = rustix::fs::fstatfs(file)?;
    // The types differ between C libraries; all magic numbers are 32 bits.
    Ok(match fs.f_type as u32 {
        magic if magic == libc::TMPFS_MAGIC as u32 => Kind::Shmem,
        magic if magic == libc::HUGETLBFS_MAGIC as u32 => Kind::Hugetlb(fs.f_bsize as u64),
        _ => Kind::Disk,
    })
}

/// Refuses a layout whose regions are not multiples of a huge page.
pub(crate) fn check_huge_regions(layout: &Layout, size: u64) -> Result<(), BackendError> {
    match layout.regions().iter().find(|r| r.len % size != 0) {
        None => Ok(()),
        Some(r) => Err(BackendError::invalid(format!(
            "region {:?} has {} bytes, which is no multiple of the huge page size, {size} bytes: choose another size of \
             guest or a backing of small pages",
            r.name, r.len
        ))),
    }
}
