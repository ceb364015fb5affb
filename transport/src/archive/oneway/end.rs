//! Our end of a stream that nobody answers: a descriptor that is written or read without waiting, whoever else has it open.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::pipe::{PIPE_BUF, fcntl_getpipe_size, fcntl_setpipe_size};
use socket2::{SockRef, Type};

use super::error::OneWayError;
use crate::sys::{ReceiveList, duplicate, write_quietly};
use crate::uri::Uri;

/// What a pipe is to hold: the less often two processes wait for each other.
const PIPE_BYTES: usize = 1 << 20;
/// Bytes of a file that are moved before anybody is asked again whether to go on.
const PIECE_BYTES: usize = 1 << 20;

/// What is done with an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Write,
    Read,
}

/// How an end is kept from waiting. That a descriptor does not wait is a property of the open file description, which others may share,
/// and who would be surprised by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The description is ours alone, and does not wait.
    Own,
    /// Every call says that it does not wait.
    Socket,
    /// A file or a disk, which nobody has to be waited for.
    File,
    /// Asked before, and then written no more at a time than there is room for.
    Asked,
}

/// A descriptor that is written or read in order.
pub(super) struct End {
    fd: OwnedFd,
    way: Way,
}

impl End {
    /// One end of a pipe that we made, and whose other end has a description of its own.
    pub(super) fn of_pipe(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        enlarge(&fd);
        Ok(Self { fd, way: Way::Own })
    }

    /// A descriptor that this process was given by number.
    pub(super) fn of_number(number: i32, how: Use) -> Result<Self, OneWayError> {
        let bad = |why: &str| OneWayError::BadFd { number, why: why.into() };
        let failed = |e: io::Error| OneWayError::io("use", &Uri::Fd(number), e);
        let fd = duplicate(number).map_err(|e| match e.raw_os_error() {
            Some(libc::EBADF) => bad("is not open in this process"),
            _ => failed(e),
        })?;
        check_mode(&fd, how).map_err(|e| failed(e.into()))?.map_or(Ok(()), |why| Err(bad(why)))?;
        let status = fstat(&fd).map_err(|e| failed(e.into()))?;
        let way = match FileType::from_raw_mode(status.st_mode) {
            FileType::Fifo => {
                enlarge(&fd);
                return match reopen(&fd, how) {
                    Ok(own) => Ok(Self { fd: own, way: Way::Own }),
                    // A pipe that nobody reads cannot be opened without waiting.
                    Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {
                        Err(failed(io::ErrorKind::BrokenPipe.into()))
                    }
                    // Another user's, or there is no /proc.
                    Err(_) => Ok(Self { fd, way: Way::Asked }),
                };
            }
            FileType::Socket => match SockRef::from(&fd).r#type().map_err(failed)? {
                Type::STREAM => Way::Socket,
                _ => return Err(bad("is a socket that keeps no order; give one of a stream")),
            },
            FileType::RegularFile | FileType::BlockDevice => Way::File,
            FileType::CharacterDevice if fd.is_terminal() => {
                return Err(bad("is a terminal; send it to a file or a pipe"));
            }
            FileType::CharacterDevice => Way::Asked,
            FileType::Directory => return Err(bad("is a folder; give a file or a pipe")),
            _ => return Err(bad("is no pipe, socket, file or device")),
        };
        Ok(Self { fd, way })
    }

    /// Writes as much as there is room for; fails with `WouldBlock` where there is none.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.way {
            Way::Own => write_quietly(self.fd.as_fd(), bytes),
            Way::File => write_quietly(self.fd.as_fd(), &bytes[..bytes.len().min(PIECE_BYTES)]),
            Way::Socket => {
                SockRef::from(&self.fd).send_with_flags(bytes, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
            }
            Way::Asked if self.wait(Use::Write, Duration::ZERO)? => {
                write_quietly(self.fd.as_fd(), &bytes[..bytes.len().min(PIPE_BUF)])
            }
            Way::Asked => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Reads what is there; fails with `WouldBlock` where nothing is. 0 is the end.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.way {
            Way::Own => Ok(rustix::io::read(&self.fd, buffer)?),
            Way::File => {
                let len = buffer.len().min(PIECE_BYTES);
                Ok(rustix::io::read(&self.fd, &mut buffer[..len])?)
            }
            Way::Socket => {
                let mut list = ReceiveList::new();
                list.push(buffer);
                list.receive(self.fd.as_fd(), false)
            }
            Way::Asked if self.wait(Use::Read, Duration::ZERO)? => Ok(rustix::io::read(&self.fd, buffer)?),
            Way::Asked => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Waits until something can be written or read, or is known to be impossible; says whether that is so.
    pub(super) fn wait(&self, how: Use, limit: Duration) -> io::Result<bool> {
        let events = match how {
            Use::Write => PollFlags::OUT,
            Use::Read => PollFlags::IN,
        };
        Ok(!self.poll(events, limit)?.is_empty())
    }

    /// Waits until nobody reads any more; says whether that is so.
    pub(super) fn wait_unread(&self, limit: Duration) -> io::Result<bool> {
        Ok(self.poll(PollFlags::empty(), limit)?.contains(PollFlags::ERR))
    }

    fn poll(&self, events: PollFlags, limit: Duration) -> io::Result<PollFlags> {
        let mut ends = [PollFd::new(&self.fd, events)];
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        match poll(&mut ends, Some(&limit)) {
            Ok(_) => Ok(ends[0].revents()),
            Err(rustix::io::Errno::INTR) => Ok(PollFlags::empty()),
            Err(error) => Err(error.into()),
        }
    }

    /// Bytes in a pipe that nobody has read yet.
    pub(super) fn unread(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(&self.fd)?)
    }

    /// Tells whoever is at the other end of a socket that nothing more comes. Others may have the socket open, so that closing it does not.
    pub(super) fn finish(self) -> io::Result<()> {
        if self.way == Way::Socket { SockRef::from(&self.fd).shutdown(Shutdown::Write) } else { Ok(()) }
    }

    /// Leaves whoever is at the other end of a socket, for whom the stream ends before it is whole.
    pub(super) fn cut(self) {
        if self.way == Way::Socket {
            // Fails where the other end has done so before.
            let _ = SockRef::from(&self.fd).shutdown(Shutdown::Both);
        }
    }
}

/// What is wrong with how a descriptor was opened.
fn check_mode(fd: &OwnedFd, how: Use) -> rustix::io::Result<Option<&'static str>> {
    let flags = fcntl_getfl(fd)?;
    if flags.contains(OFlags::PATH) {
        return Ok(Some("names a file and is open neither for reading nor for writing"));
    }
    let mode = flags & OFlags::RWMODE;
    Ok(match how {
        Use::Write if mode == OFlags::RDONLY => Some("is open for reading only, and is to be written"),
        Use::Read if mode == OFlags::WRONLY => Some("is open for writing only, and is to be read"),
        _ => None,
    })
}

/// The same pipe, by a description of our own that does not wait.
fn reopen(fd: &OwnedFd, how: Use) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut options = OpenOptions::new();
    options.write(how == Use::Write).read(how == Use::Read).custom_flags(libc::O_NONBLOCK);
    options.open(path).map(File::into)
}

/// Has a pipe hold more. Where the system refuses it holds less, and takes longer.
fn enlarge(fd: &OwnedFd) {
    if fcntl_getpipe_size(fd).is_ok_and(|bytes| bytes < PIPE_BYTES) {
        let _ = fcntl_setpipe_size(fd, PIPE_BYTES);
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_that_cannot_be_opened_anew_is_asked_before() {
        let (theirs, ours) = io::pipe().unwrap();
        let (theirs, ours) =
            (End { fd: theirs.into(), way: Way::Asked }, End { fd: ours.into(), way: Way::Asked });
        let would_block = |result: io::Result<usize>| result.unwrap_err().kind() == io::ErrorKind::WouldBlock;
        let mut buffer = vec![0; 1 << 20];
        assert!(would_block(theirs.read(&mut buffer)));
        // A descriptor that waits, and a pipe that holds less than this: nothing of it hangs.
        let bytes: Vec<u8> = (0..1u32 << 20).map(|at| (at / 7) as u8).collect();
        let mut written = 0;
        let full = loop {
            match ours.write(&bytes[written..]) {
                Ok(count) => written += count,
                full => break full,
            }
        };
        assert!(would_block(full) && written >= PIPE_BUF && written < bytes.len(), "{written}");
        assert_eq!(ours.unread().unwrap(), written as u64);
        let mut got = 0;
        while got < written {
            got += theirs.read(&mut buffer[got..]).unwrap();
        }
        assert!(buffer[..got] == bytes[..written] && got == written);
        assert!(ours.wait(Use::Write, Duration::ZERO).unwrap() && !ours.wait_unread(Duration::ZERO).unwrap());
        drop(theirs);
        assert!(ours.wait_unread(Duration::ZERO).unwrap());
        assert_eq!(ours.write(&bytes).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_pipe_of_ours_holds_much_and_its_other_end_waits() {
        let (theirs, ours) = io::pipe().unwrap();
        let ours = End::of_pipe(ours.into()).unwrap();
        assert!(fcntl_getfl(&ours).unwrap().contains(OFlags::NONBLOCK));
        assert!(!fcntl_getfl(&theirs).unwrap().contains(OFlags::NONBLOCK));
        assert_eq!(fcntl_getpipe_size(&theirs).unwrap(), fcntl_getpipe_size(&ours).unwrap());
    }
}
