//! Verbs and the RDMA connection manager as owned, typed values: the only unsafe code of the RDMA transport.
//!
//! Everything here keeps alive what the system or the adapter may still use, whatever order the caller drops things in: an
//! [`Id`] its [`EventChannel`], a [`Domain`] and a [`CompletionQueue`](queue::CompletionQueue) the [`Id`] that holds their device open, a
//! [`Region`] its domain and the memory below it, and a [`QueuePair`] every region and buffer of the work requests that
//! were posted on it and have not completed. A queue pair is destroyed before any of these.

mod cm;
mod memory;
mod queue;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

pub(super) use cm::{Event, EventChannel, EventKind, Id};
pub(super) use memory::{Access, Domain, Region, Slot};
pub(super) use queue::{Depth, QueuePair, Write};

/// Turns a return value of librdmacm (0, or -1 with `errno`) into a result.
fn cm(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Turns a return value of libibverbs (0, or a number of `errno`) into a result.
fn verbs(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result.abs())) }
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl on a descriptor takes and returns integers; a wrong descriptor is an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits until one of the descriptors is readable; says which.
pub(super) fn wait_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: Duration,
) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
    // SAFETY: the array holds N entries and lives through the call.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, millis) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(polled.map(|p| p.revents != 0))
}

/// How many bytes this process may pin, unless without limit.
pub(super) fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills in the structure it is given.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    (got == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}
