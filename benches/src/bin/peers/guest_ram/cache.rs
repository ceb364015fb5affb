//! A page cache: files that are read until memory is full.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::Path;

use super::guest::meminfo;

/// Memory that stays free, in percent.
pub(super) const FREE_PERCENT: u64 = 8;
/// Files that are read, in this order.
const FOLDERS: [&str; 4] = ["/usr/bin", "/usr/lib", "/usr/share", "/usr/sbin"];
/// Larger files are read so far.
const FILE_MAX: u64 = 32 << 20;
/// What a program or a library begins with.
const ELF: [u8; 4] = *b"\x7fELF";

/// Which files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Files {
    /// All of them.
    All,
    /// Programs, libraries and other machine code.
    Programs,
}

/// Reads the host's files until `free` bytes of memory are free, or at most `bytes` of them.
pub(super) fn fill(files: Files, free: u64, bytes: u64) -> Result<(), String> {
    // The kernel may begin to drop pages before so little is free; what was read by then is as much as it keeps.
    let mut left = bytes;
    for folder in FOLDERS {
        read_all(Path::new(folder), files, free, &mut left)?;
    }
    Ok(())
}

/// Reads files, folder by folder in the order of their names, until only `free` bytes of memory are free, or `left` were read.
pub(super) fn read_all(folder: &Path, files: Files, free: u64, left: &mut u64) -> Result<(), String> {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(kind) = entry.file_type() else { continue };
        if *left == 0 || meminfo("MemFree:")? < free {
            return Ok(());
        }
        if kind.is_dir() {
            read_all(&entry.path(), files, free, left)?;
        } else if kind.is_file()
            && let Ok(file) = File::open(entry.path())
            && (files == Files::All || is_program(&file))
        {
            read(file, FILE_MAX, left);
        }
    }
    Ok(())
}

/// Reads a file, at most `most` bytes of it and no more than `left`.
pub(super) fn read(file: File, most: u64, left: &mut u64) {
    // A file that cannot be read is one less.
    let read = io::copy(&mut file.take(most.min(*left)), &mut io::sink()).unwrap_or(0);
    *left = left.saturating_sub(read);
}

/// Whether a file is machine code. The file is at its start again.
fn is_program(mut file: &File) -> bool {
    let mut first = [0; ELF.len()];
    file.read_exact(&mut first).is_ok() && first == ELF && file.rewind().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_ends_where_memory_does() {
        // There is never as much free memory, so nothing is read, and nothing fails.
        assert_eq!(read_all(Path::new("/"), Files::All, u64::MAX, &mut 1), Ok(()));
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::write(folder.path().join(name), [1; 100]).unwrap();
        }
        let mut left = 150;
        assert_eq!(read_all(folder.path(), Files::All, 0, &mut left), Ok(()));
        assert_eq!(left, 0);
        let mut left = 1000;
        assert_eq!(read_all(folder.path(), Files::All, 0, &mut left), Ok(()));
        assert_eq!(left, 700);
    }

    #[test]
    fn programs_are_told_from_other_files() {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in
            [("program", &b"\x7fELF and more"[..]), ("text", b"#!/bin/sh\n"), ("empty", b"")]
        {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let mut left = 1000;
        assert_eq!(read_all(folder.path(), Files::Programs, 0, &mut left), Ok(()));
        assert_eq!(left, 1000 - 13, "the program, all of it");
    }
}
