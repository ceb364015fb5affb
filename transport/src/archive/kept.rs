//! A file that is there only when it is complete.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, fstatvfs, linkat, openat, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// For this user alone: guest memory has other people's secrets in it.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Longest name in a folder.
const NAME_MAX: usize = 255;
/// Names that are tried, each of which is free unless somebody guesses it.
const NAMES_TRIED: usize = 16;
/// Letters by chance in the name of what is not yet complete.
const CHANCE: usize = 6;

/// A file that could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// There cannot be such a file.
    #[error("cannot keep a file at {path}: {why}")]
    Refused {
        /// Where it was to be.
        path: String,
        /// What is in the way.
        why: &'static str,
    },
    /// There is no room for it.
    #[error(
        "cannot {what} {path}: its file system has {room} bytes left for it; make room, or choose another path"
    )]
    NoRoom {
        /// What was to be done.
        what: &'static str,
        /// With what.
        path: String,
        /// Bytes that are left.
        room: u64,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The system refused.
    #[error("cannot {what} {path}{hint}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With what.
        path: String,
        /// What to do.
        hint: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl KeptError {
    fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        let hint = match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => ": its folder does not exist",
            Some(libc::EACCES | libc::EPERM) => {
                ": no permission; choose a folder that this user may write to"
            }
            Some(libc::EROFS) => ": its file system is read-only; choose another path",
            Some(libc::EFBIG) => {
                ": it grows longer than RLIMIT_FSIZE (`ulimit -f`) or its file system lets it"
            }
            _ => "",
        };
        Self::Io { what, path: path.display().to_string(), hint, source }
    }
}

/// A file that is written, and comes to be at its path when it is [complete](Self::commit), at once and in place of what was there.
///
/// Until then it has no name, where the file system can do that: whatever becomes of this process, nothing is left of it. Elsewhere it is
/// `.NAME.XXXXXX.part` beside its path, and is removed when this is dropped; a process that is killed leaves it behind.
#[derive(Debug)]
pub(crate) struct KeptFile {
    file: File,
    folder: File,
    /// Where it is to be, for texts.
    path: PathBuf,
    name: OsString,
    /// The name that it has in the folder for now.
    part: Option<OsString>,
}

impl KeptFile {
    /// A new file, empty, for reading and writing, that this user alone may open.
    ///
    /// # Errors
    /// What is at `path`, unless it is a regular file, is in the way. A symbolic link is followed.
    pub(crate) fn create(path: &Path) -> Result<Self, KeptError> {
        let (folder, name) = open_folder(path)?;
        check_target(&folder, path, &name)?;
        let fail = |e: Errno| KeptError::io("make a file for", path, e.into());
        let (file, part) = match unnamed(&folder) {
            Ok(file) => (file, None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                let (file, part) = named(&folder, &name).map_err(fail)?;
                (file, Some(part))
            }
            Err(error) => return Err(fail(error)),
        };
        Ok(Self { file, folder, path: path.into(), name, part })
    }

    /// What is written.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes by which it may grow: what the file system has left for this user, and what RLIMIT_FSIZE lets it be.
    pub(crate) fn room(&self) -> Result<u64, KeptError> {
        let fail = |e: io::Error| KeptError::io("ask for the room of", &self.path, e);
        let system = fstatvfs(&self.file).map_err(|e| fail(e.into()))?;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        let Some(longest) = getrlimit(Resource::Fsize).current else { return Ok(free) };
        let len = self.file.metadata().map_err(fail)?.len();
        Ok(free.min(longest.saturating_sub(len)))
    }

    /// The error of something that was done with [`Self::file`].
    pub(crate) fn failed(&self, what: &'static str, source: io::Error) -> KeptError {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                let path = self.path.display().to_string();
                KeptError::NoRoom { what, path, room: self.room().unwrap_or(0), source }
            }
            _ => KeptError::io(what, &self.path, source),
        }
    }

    /// Makes it durable, and puts it at its path.
    ///
    /// # Errors
    /// What was at the path is still there then; unless it is the folder that could not be written, which the text says.
    pub(crate) fn commit(mut self) -> Result<(), KeptError> {
        // Before it has its name: what is there under that is complete, also after the host lost power.
        self.file.sync_all().map_err(|e| self.failed("write all of", e))?;
        if self.part.is_none() && self.link()? {
            return self.sync_folder();
        }
        check_target(&self.folder, &self.path, &self.name)?;
        if let Some(part) = &self.part {
            let renamed = renameat(&self.folder, part, &self.folder, &self.name);
            renamed.map_err(|e| self.failed("put in its place", e.into()))?;
            self.part = None;
        }
        self.sync_folder()
    }

    /// Gives a file without a name its own, or, where that is taken, one for now; says whether it is its own. Only a rename replaces.
    fn link(&mut self) -> Result<bool, KeptError> {
        let from = own_path(&self.file);
        let link = |name: &OsStr| linkat(CWD, &from, &self.folder, name, AtFlags::SYMLINK_FOLLOW);
        match link(&self.name) {
            Ok(()) => return Ok(true),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(self.failed("put in its place", error.into())),
        }
        let (part, ()) =
            by_chance(&self.name, link).map_err(|e| self.failed("put in its place", e.into()))?;
        self.part = Some(part);
        Ok(false)
    }

    fn sync_folder(&self) -> Result<(), KeptError> {
        let synced = self.folder.sync_all();
        synced
            .map_err(|e| self.failed("write to the disk the folder (the file is there, and complete) of", e))
    }
}

impl Drop for KeptFile {
    fn drop(&mut self) {
        if let Some(part) = self.part.take() {
            // Its name says what it is to whoever finds it all the same.
            let _ = unlinkat(&self.folder, part, AtFlags::empty());
        }
    }
}

/// The folder in which a file is to be, and its name there. A link leads to where the file itself is to be.
fn open_folder(path: &Path) -> Result<(File, OsString), KeptError> {
    let refuse = |why| KeptError::Refused { path: path.display().to_string(), why };
    let is_link = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_symlink());
    let target = match std::fs::canonicalize(path) {
        Ok(target) if is_link => target,
        Err(_) if is_link => return Err(refuse("a symbolic link is there that leads nowhere")),
        _ => path.to_owned(),
    };
    let name = match target.file_name() {
        Some(name) if target.as_os_str().as_bytes().ends_with(name.as_bytes()) => name.to_owned(),
        _ => return Err(refuse("it names a folder; give the name of a file")),
    };
    if name.len() > NAME_MAX {
        return Err(refuse("its name is longer than 255 bytes"));
    }
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let folder = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(parent);
    let folder = folder.map_err(|e| KeptError::io("open the folder of", path, e))?;
    Ok((folder, name))
}

/// Nothing but a regular file is ever replaced.
fn check_target(folder: &File, path: &Path, name: &OsStr) -> Result<(), KeptError> {
    let found = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => found,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(KeptError::io("look at", path, error.into())),
    };
    let why = match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "a folder is there; give the name of a file in it",
        FileType::Fifo => "a pipe is there; give fd:N, or exec:COMMAND",
        FileType::Socket => "a socket is there; give another path",
        FileType::CharacterDevice | FileType::BlockDevice => {
            "a device is there, which is never complete; give fd:N, or exec:COMMAND"
        }
        // It has come there since.
        FileType::Symlink => "a symbolic link is there; give another path",
        FileType::Unknown => "what is there is no regular file; give another path",
    };
    Err(KeptError::Refused { path: path.display().to_string(), why })
}

/// A file without a name.
fn unnamed(folder: &File) -> Result<File, Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(openat(folder, ".", flags, MODE)?);
    // It is given its name by way of this.
    rustix::fs::stat(own_path(&file)).map_err(|_| Errno::OPNOTSUPP)?;
    Ok(file)
}

/// A file with a name that says that it is not complete.
fn named(folder: &File, name: &OsStr) -> Result<(File, OsString), Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let (part, file) = by_chance(name, |part| openat(folder, part, flags, MODE))?;
    Ok((file.into(), part))
}

/// Makes something under a name that is free.
fn by_chance<T>(name: &OsStr, make: impl Fn(&OsStr) -> Result<T, Errno>) -> Result<(OsString, T), Errno> {
    for _ in 0..NAMES_TRIED {
        let part = part_name(name)?;
        match make(&part) {
            Ok(made) => return Ok((part, made)),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EXIST)
}

/// `.NAME.XXXXXX.part`, of which NAME is cut short where it would be too long.
fn part_name(name: &OsStr) -> Result<OsString, Errno> {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut chance = [0; CHANCE];
    getrandom::fill(&mut chance).map_err(|_| Errno::IO)?;
    let chance = chance.map(|byte| LETTERS[usize::from(byte) % LETTERS.len()]);
    let room = NAME_MAX - CHANCE - "...part".len();
    let name = &name.as_bytes()[..name.len().min(room)];
    Ok(OsString::from_vec([b".", name, b".", &chance, b".part"].concat()))
}

/// A path to whatever a descriptor is open on.
fn own_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests;
