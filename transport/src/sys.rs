//! Vectored socket I/O straight from and into memory, descriptors by number, writes that raise no signal, and how soon a thread runs:
//! besides RDMA's, the only unsafe code of this crate.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use vm_memory::volatile_memory::VolatileSlice;

/// `struct sched_attr`, as long as it was at first. Source: sched_setattr(2).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const _: () = assert!(size_of::<SchedAttr>() == 48);

/// How soon a thread is to run that has something to do, by the length of its slices.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Soon {
    /// Before all others: somebody waits for what it does.
    Urgent,
    /// Before threads that compute, as the guest's are.
    Bulk,
}

impl Soon {
    /// In nanoseconds: the shortest slice that the scheduler takes; and one that is short beside what others have by default (about 3 ms)
    /// and long beside the former, which so comes first.
    fn slice_ns(self) -> u64 {
        match self {
            Self::Urgent => 100_000,
            Self::Bulk => 500_000,
        }
    }
}

/// Asks the scheduler to let this thread run as soon as it has something to do: it works in short bursts, and others wait for what
/// it does. It gets no more time than others, only in shorter slices, which Linux 6.12 and later give at once; elsewhere this does
/// nothing.
pub(crate) fn run_soon(how: Soon) {
    // SAFETY: takes numbers only; 0 is the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice,
        priority: 0,
        runtime: how.slice_ns(),
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads the struct, whose size it is told; 0 is the calling thread. A refusal only costs time.
    let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
}

/// A duplicate of the descriptor with this number, closed where another program is started, and none of the three that every program
/// has. Whose that number is, nobody can tell; it stays as it is.
pub(crate) fn duplicate(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only, of which the first may be anybody's descriptor or none: that one is not changed.
    let duplicate = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if duplicate < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has made this descriptor, which nobody else knows of.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

/// Writes, as much as one call takes, without the signals that end a process by default when nobody reads a pipe, or a file is longer than
/// RLIMIT_FSIZE: a program that embeds this may not ignore them as Rust's do, and its guest would end with it. They are errors here.
pub(crate) fn write_quietly(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let quiet = Quiet::begin();
    // SAFETY: the kernel reads bytes that are borrowed through the call, as many as there are.
    let written = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    let result = usize::try_from(written).map_err(|_| io::Error::last_os_error());
    quiet.end(result.is_err());
    result
}

/// A thread to which no signal of a failed write comes.
struct Quiet {
    /// Those of [`Self::SIGNALS`] that were not pending before, whose coming would be this thread's doing.
    fresh: libc::sigset_t,
    before: libc::sigset_t,
}

impl Quiet {
    const SIGNALS: [libc::c_int; 2] = [libc::SIGPIPE, libc::SIGXFSZ];

    fn begin() -> Self {
        // SAFETY: sigset_t is a C struct of integers, for which all zeros is a valid value.
        let [mut fresh, mut all, mut before, mut pending]: [libc::sigset_t; 4] =
            unsafe { std::mem::zeroed() };
        // SAFETY: the sets live through the calls, which read and write nothing else; the signals are valid numbers. The mask is that of
        // this thread.
        unsafe {
            libc::sigemptyset(&raw mut fresh);
            libc::sigemptyset(&raw mut all);
            libc::sigpending(&raw mut pending);
            for signal in Self::SIGNALS {
                libc::sigaddset(&raw mut all, signal);
                if libc::sigismember(&raw const pending, signal) == 0 {
                    libc::sigaddset(&raw mut fresh, signal);
                }
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        }
        Self { fresh, before }
    }

    /// Takes what came, where the write failed, and lets others come again.
    fn end(self, failed: bool) {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the sets and the time live through the calls, which only read them; null is nowhere to tell of the signal.
        unsafe {
            while failed
                && libc::sigtimedwait(&raw const self.fresh, std::ptr::null_mut(), &raw const at_once) > 0
            {
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

/// Waits until a socket takes bytes, or has failed; says whether it does.
pub(crate) fn wait_writable(socket: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // Rounded up, or a wait for less than a millisecond would be none.
    let millis = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: the one entry lives through the call.
    let ready = unsafe { libc::poll(&raw mut polled, 1, millis) };
    match ready {
        0.. => Ok(ready != 0),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        },
    }
}

/// Pieces of memory and how far a transfer over them has come.
struct Parts {
    parts: Vec<libc::iovec>,
    /// First part that is not yet consumed.
    next: usize,
}

impl Parts {
    fn push(&mut self, base: *mut u8, len: usize) {
        if len != 0 {
            self.parts.push(libc::iovec { iov_base: base.cast(), iov_len: len });
        }
    }

    fn advance(&mut self, mut bytes: usize) {
        while let Some(part) = self.parts.get_mut(self.next) {
            if bytes < part.iov_len {
                // The rest of this part still lies in the memory it was made from.
                part.iov_base = part.iov_base.wrapping_byte_add(bytes);
                part.iov_len -= bytes;
                return;
            }
            bytes -= part.iov_len;
            self.next += 1;
        }
        debug_assert_eq!(bytes, 0, "the kernel moved no more than it was given");
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: msghdr is a C struct of integers and pointers, for which all zeros is a valid value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        let parts = &mut self.parts[self.next..];
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen = parts.len().min(libc::UIO_MAXIOV as usize);
        message
    }

    fn done(&mut self, result: isize) -> io::Result<usize> {
        let bytes = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.advance(bytes);
        Ok(bytes)
    }
}

/// Pieces of memory to send: buffers of our own and guest memory, of which no Rust reference is ever made.
pub(crate) struct SendList<'a> {
    parts: Parts,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> SendList<'a> {
    pub(crate) fn new() -> Self {
        Self { parts: Parts { parts: Vec::with_capacity(68), next: 0 }, memory: PhantomData }
    }

    /// Adds bytes.
    pub(crate) fn push(&mut self, bytes: &'a [u8]) {
        self.parts.push(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Adds guest memory. What is sent is what it holds when the system reads it.
    pub(crate) fn push_guest(&mut self, memory: &VolatileSlice<'a>) {
        self.parts.push(memory.ptr_guard().as_ptr().cast_mut(), memory.len());
    }

    /// Whether everything was sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.next == self.parts.parts.len()
    }

    /// Bytes that are left.
    pub(crate) fn len(&self) -> usize {
        self.parts.parts[self.parts.next..].iter().map(|part| part.iov_len).sum()
    }

    /// Copies what is left to the start of `out`, as much as has room.
    pub(crate) fn copy_to(&mut self, out: &mut [u8]) -> usize {
        let mut at = 0;
        for part in &self.parts.parts[self.parts.next..] {
            let len = part.iov_len.min(out.len() - at);
            // SAFETY: the part is `len` bytes or more that are borrowed for 'a (push) or of a live guest mapping (push_guest), which
            // vCPUs may write meanwhile: they are read as guest memory is, by a volatile copy.
            let memory: VolatileSlice<'_> = unsafe { VolatileSlice::new(part.iov_base.cast(), len) };
            memory.copy_to(&mut out[at..at + len]);
            at += len;
        }
        self.parts.advance(at);
        at
    }

    /// All that is left.
    #[cfg(test)]
    pub(crate) fn drain(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !self.is_empty() {
            let start = bytes.len();
            bytes.resize(start + (64 << 10), 0);
            let copied = self.copy_to(&mut bytes[start..]);
            bytes.truncate(start + copied);
        }
        bytes
    }

    /// Sends what is left, as much as one call takes.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.parts.message();
        // SAFETY: every iovec points at bytes borrowed for 'a (push) or at a live guest mapping (push_guest: a VolatileSlice's
        // contract), both of which outlive this call; the kernel only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        self.parts.done(sent)
    }

    /// Writes what is left to a file at an offset, as much as one call takes.
    pub(crate) fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let message = self.parts.message();
        let count = message.msg_iovlen.min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: every iovec points at bytes borrowed for 'a (push) or at a live guest mapping (push_guest: a VolatileSlice's
        // contract), both of which outlive this call; the kernel only reads them.
        let written = unsafe { libc::pwritev(file.as_raw_fd(), message.msg_iov, count, offset) };
        self.parts.done(written)
    }
}

/// Pieces of memory to receive into: buffers of our own and guest memory, of which no Rust reference is ever made.
pub(crate) struct ReceiveList<'a> {
    parts: Parts,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> ReceiveList<'a> {
    pub(crate) fn new() -> Self {
        Self { parts: Parts { parts: Vec::with_capacity(68), next: 0 }, memory: PhantomData }
    }

    /// Adds a buffer.
    pub(crate) fn push(&mut self, bytes: &'a mut [u8]) {
        self.parts.push(bytes.as_mut_ptr(), bytes.len());
    }

    /// Adds guest memory.
    pub(crate) fn push_guest(&mut self, memory: &VolatileSlice<'a>) {
        self.parts.push(memory.ptr_guard_mut().as_ptr(), memory.len());
    }

    /// Whether everything was received.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.next == self.parts.parts.len()
    }

    /// Copies bytes that came into what is left; returns how many had room.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        for part in &self.parts.parts[self.parts.next..] {
            let len = part.iov_len.min(bytes.len() - at);
            // SAFETY: the part is `len` bytes or more that are borrowed exclusively for 'a or of a live guest mapping (as in
            // `receive`), which others may access meanwhile: they are written as guest memory is, by a volatile copy.
            let memory: VolatileSlice<'_> = unsafe { VolatileSlice::new(part.iov_base.cast(), len) };
            memory.copy_from(&bytes[at..at + len]);
            at += len;
        }
        self.parts.advance(at);
        at
    }

    /// Receives into what is left, as much as one call brings. With `wait` false, fails with `WouldBlock` when nothing is there.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, wait: bool) -> io::Result<usize> {
        let mut message = self.parts.message();
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        // SAFETY: every iovec points at memory that is borrowed exclusively for 'a (push) or at a live guest mapping (push_guest:
        // a VolatileSlice's contract), both of which outlive this call; any bytes may be written there.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
        self.parts.done(received)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const ALONE: &str = "PAGEFERRY_TEST_ALONE";

    /// Dies of the signals unless they are kept away, which takes a process of its own.
    fn write_where_signals_end_the_process() {
        // SAFETY: no handler is installed; this process has no other thread that could rely on the signals being ignored.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
        }
        let (reader, writer) = io::pipe().unwrap();
        assert_eq!(write_quietly(writer.as_fd(), b"heard").unwrap(), 5);
        drop(reader);
        for _ in 0..3 {
            let error = write_quietly(writer.as_fd(), b"unheard").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
        let file = tempfile::tempfile().unwrap();
        let limit = rustix::process::Rlimit { current: Some(4), maximum: None };
        rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
        assert_eq!(write_quietly(file.as_fd(), b"12345").unwrap(), 4);
        assert_eq!(write_quietly(file.as_fd(), b"5").unwrap_err().raw_os_error(), Some(libc::EFBIG));
    }

    #[test]
    fn a_failed_write_ends_no_process() {
        if std::env::var_os(ALONE).is_some() {
            return write_where_signals_end_the_process();
        }
        let alone = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sys::tests::a_failed_write_ends_no_process", "--test-threads=1"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&alone.stdout);
        assert!(alone.status.success() && text.contains("1 passed"), "{:?}: {text}", alone.status);
    }

    #[test]
    fn a_duplicate_is_another_descriptor_and_is_not_inherited() {
        let (_reader, writer) = io::pipe().unwrap();
        let twin = duplicate(writer.as_raw_fd()).unwrap();
        assert_ne!(twin.as_raw_fd(), writer.as_raw_fd());
        let flags = rustix::io::fcntl_getfd(&twin).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert!(duplicate(1).unwrap().as_raw_fd() > 2);
        assert_eq!(duplicate(i32::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(duplicate(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
