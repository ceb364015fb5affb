//! Files that a user names: opened without waiting for whoever is at the other end of what is no file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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

/// Whether these are one file, by whatever names.
pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    file(one).is_some_and(|one| file(other) == Some(one))
}

/// A file that has its name once it is whole, in place of one that had it before. Dropped earlier, it leaves everything as it was.
#[derive(Debug)]
pub(super) struct NewFile {
    path: PathBuf,
    /// Where it is until then: in the same folder.
    part: PathBuf,
    file: File,
}

impl NewFile {
    /// Begins one.
    ///
    /// # Errors
    /// When the folder takes no file, or something else than a regular file has the name.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let link = path.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
        let path = if link { path.canonicalize()? } else { path.to_owned() };
        if path.metadata().is_ok_and(|meta| !meta.is_file()) || path.file_name().is_none() {
            return Err(io::Error::other(NO_FILE));
        }
        let mut random = [0u8; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let part = path.with_file_name(format!(".pageferry-{:016x}.part", u64::from_le_bytes(random)));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&part)?;
        let new = Self { path, part, file };
        if let Ok(old) = new.path.metadata() {
            // Whoever could not read that is not to read this.
            new.file.set_permissions(old.permissions())?;
        }
        Ok(new)
    }

    /// What is written.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// It is whole, and durable once this returns.
    pub(super) fn commit(self) -> io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.part, &self.path)?;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Where it was committed there is none.
        let _ = std::fs::remove_file(&self.part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_is_there_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("file"), folder.path().join("link"));
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        std::fs::write(&path, b"old").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        for (name, text, whole) in [(&path, "new", false), (&path, "new", true), (&link, "newer", true)] {
            let before = std::fs::read(&path).unwrap();
            let new = NewFile::create(name).unwrap();
            io::Write::write_all(&mut new.file(), text.as_bytes()).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), before);
            if whole {
                new.commit().unwrap();
            } else {
                drop(new);
            }
            assert_eq!((std::fs::read(&path).unwrap() == text.as_bytes(), names()), (whole, 2), "{text}");
        }
        assert!(
            is_same(&path, &link) && !is_same(&path, folder.path()) && !is_same(&path, Path::new("/none"))
        );
        for bad in [folder.path().to_owned(), folder.path().join("none/x"), "/dev/null".into(), "..".into()] {
            assert!(NewFile::create(&bad).is_err(), "{}", bad.display());
        }
    }

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
