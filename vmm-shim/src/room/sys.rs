//! Locks of an open file description (fcntl_locking(2)): they are gone with the last descriptor of it, however its process ends.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Takes the bytes of a file for this description alone; false where another one has some of them. Never waits.
pub(super) fn try_lock(file: &File, bytes: Range<u64>) -> io::Result<bool> {
    match ask(file, libc::F_OFD_SETLK, libc::F_WRLCK, bytes) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives bytes back.
pub(super) fn unlock(file: &File, bytes: Range<u64>) -> io::Result<()> {
    ask(file, libc::F_OFD_SETLK, libc::F_UNLCK, bytes).map(drop)
}

/// Whether another description has some of the bytes.
pub(super) fn is_locked(file: &File, bytes: Range<u64>) -> io::Result<bool> {
    Ok(ask(file, libc::F_OFD_GETLK, libc::F_WRLCK, bytes)?.l_type != libc::F_UNLCK as libc::c_short)
}

fn ask(file: &File, command: libc::c_int, kind: libc::c_int, bytes: Range<u64>) -> io::Result<libc::flock> {
    let beyond = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start.try_into().map_err(beyond)?,
        l_len: (bytes.end - bytes.start).try_into().map_err(beyond)?,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for as long as `file` lives, and these commands take a `struct flock`, which they read and write
    // before they return.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(lock) }
}
