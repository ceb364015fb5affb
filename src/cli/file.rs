//! Files that a user names: opened without waiting for whoever is at the other end of what is no file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

const NO_FILE: &str = "it is no regular file, but a pipe, a socket, a device or a folder";

/// Opens a regular file to read it.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other(NO_FILE)) }
}

/// All of a regular file.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut open(path)?, &mut bytes)?;
    Ok(bytes)
}

/// Opens a file to write to it, made where there is none: at its end, or emptied. A device will do, such as a terminal; a pipe will
/// not, for it is read or not as others please.
pub(super) fn write(path: &Path, append: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).append(append).truncate(!append).create(true).custom_flags(libc::O_NONBLOCK);
    let kind = path.metadata().map(|meta| meta.file_type());
    if kind.is_ok_and(|kind| kind.is_fifo() || kind.is_socket()) {
        return Err(io::Error::other("it is a pipe or a socket; give a file"));
    }
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_the_other_end_of_a_pipe() {
        let folder = tempfile::tempdir().unwrap();
        let (fifo, file) = (folder.path().join("fifo"), folder.path().join("file"));
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(open(&fifo).unwrap_err().to_string().contains("no regular file"));
        assert!(open(Path::new("/dev/null")).is_err());
        for append in [false, true] {
            assert!(write(&fifo, append).unwrap_err().to_string().contains("a pipe"));
            assert!(write(folder.path(), append).is_err());
            assert!(write(Path::new("/dev/null"), append).is_ok());
            io::Write::write_all(&mut write(&file, append).unwrap(), b"text").unwrap();
        }
        assert_eq!(read(&file).unwrap(), b"texttext");
        io::Write::write_all(&mut write(&file, false).unwrap(), b"new").unwrap();
        assert_eq!(read(&file).unwrap(), b"new");
    }
}
