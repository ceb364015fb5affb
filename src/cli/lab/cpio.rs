//! Writes archives in cpio's "newc" format, the one that Linux unpacks its first file system from.
//!
//! The format is described in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`: every entry is a header of
//! 110 characters, its name and its content, each padded to four bytes; an entry of a certain name is the last.

use std::io::{self, Write};

/// Kinds of files, as `st_mode` has them.
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";
/// Length of a header, in bytes.
const HEADER_BYTES: usize = 110;

/// An archive being written. Everything in it belongs to root and is of 1970, so that the same content gives the same bytes.
pub(super) struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    /// An archive with nothing in it yet.
    pub(super) fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    /// Adds a folder that everyone may read. Folders come before what is in them.
    pub(super) fn folder(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, FOLDER | 0o755, &[])
    }

    /// Adds a file that everyone may read, and run if `executable`.
    pub(super) fn file(&mut self, name: &str, executable: bool, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | if executable { 0o755 } else { 0o644 }, content)
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, LINK | 0o777, target.as_bytes())
    }

    /// Ends the archive and returns what it was written to.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entries = 0;
        self.entry(TRAILER, 0, &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{name}: 4 GiB or more"));
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let inode = if mode == 0 { 0 } else { self.entries + 1 };
        let links = if mode & 0o170_000 == FOLDER { 2 } else { 1 };
        let name_size = name.len() as u32 + 1;
        // Inode, mode, user, group, links, time, size, device (2), device of a node (2), size of the name, checksum (none).
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        debug_assert_eq!(header.len(), HEADER_BYTES);
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(HEADER_BYTES + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())?;
        self.entries += 1;
        Ok(())
    }

    fn pad(&mut self, length: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..length.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> String {
        bytes.iter().map(|b| if *b == 0 { '.' } else { char::from(*b) }).collect()
    }

    #[test]
    fn an_empty_archive_is_its_trailer() {
        let bytes = Archive::new(Vec::new()).finish().unwrap();
        let zeros = "00000000";
        let expected = format!(
            "070701{zeros}{zeros}{zeros}{zeros}00000001{zeros}{zeros}{zeros}{zeros}{zeros}{zeros}0000000B{zeros}TRAILER!!!...."
        );
        assert_eq!(text(&bytes), expected);
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn entries_byte_by_byte() {
        let mut archive = Archive::new(Vec::new());
        archive.folder("bin").unwrap();
        archive.file("bin/a", true, b"hello").unwrap();
        archive.link("b", "bin/a").unwrap();
        archive.file("c", false, b"").unwrap();
        let bytes = text(&archive.finish().unwrap());
        let head = |inode, mode, links, size, name| {
            format!(
                "070701{inode}{mode}0000000000000000{links}00000000{size}{}{name}00000000",
                "0".repeat(32)
            )
        };
        let expected = [
            head("00000001", "000041ED", "00000002", "00000000", "00000004") + "bin...",
            head("00000002", "000081ED", "00000001", "00000005", "00000006") + "bin/a.hello...",
            head("00000003", "0000A1FF", "00000001", "00000005", "00000002") + "b.bin/a...",
            head("00000004", "000081A4", "00000001", "00000000", "00000002") + "c.",
        ];
        let mut rest = bytes.as_str();
        for entry in &expected {
            assert_eq!(&rest[..entry.len()], entry);
            rest = &rest[entry.len()..];
        }
        assert!(rest.contains("TRAILER!!!"));
    }
}
