//! Errors of this host that trying again does not mend: they end a session at once, and are never taken for a connection that broke.

use std::io;
use std::pin::{Pin, pin};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use pagecopy::layout::Layout;

use crate::panic_text;
use crate::wire::control::STATE_LEN_MAX;

/// What a lock guards, whatever became of those who had it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Errors of the system that say that this host lacks something: memory, room in a file system, descriptors, memory that may be
/// locked. A bad address is memory of the guest that could not be had.
const LACKING: [i32; 8] = [
    libc::ENOMEM,
    libc::ENOSPC,
    libc::EDQUOT,
    libc::EMFILE,
    libc::ENFILE,
    libc::EFAULT,
    libc::EFBIG,
    libc::EROFS,
];

/// Whether an error is this host's own, and lasts.
pub fn is_local(error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(code) => LACKING.contains(&code),
        None => matches!(
            error.kind(),
            io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ),
    }
}

/// Whether an error says that there is no room for memory, in a file system or on the host.
pub fn is_no_room(error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(code) => {
            matches!(code, libc::ENOMEM | libc::ENOSPC | libc::EDQUOT | libc::EFAULT | libc::EFBIG)
        }
        None => is_local(error),
    }
}

/// Zeroed memory of this many elements; an error where there is none, where `vec!` would end the process and the guest with it.
pub(crate) fn zeroed<T: Clone + Default>(count: usize) -> io::Result<Box<[T]>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(count).map_err(|_| no_memory(count.saturating_mul(size_of::<T>())))?;
    memory.resize(count, T::default());
    Ok(memory.into())
}

/// What a side of a session takes whatever its guest is like: the runtime, its threads, messages, and two copies of device state.
const SESSION_BYTES: u64 = (32 << 20) + 2 * STATE_LEN_MAX as u64;

/// The most that a source takes besides the guest's memory, in bytes of address space.
pub fn source_bytes(layout: &Layout, streams: u16, cache_bytes: u64) -> u64 {
    /// Digests of 64 pages, and bitmaps.
    const CHUNK_BYTES: u64 = 1024;
    /// Two threads with stacks of 2 MiB, some MiB of buffers and of a compressor's state.
    const STREAM_BYTES: u64 = 12 << 20;
    let tables = u64::from(layout.chunks()) * CHUNK_BYTES;
    SESSION_BYTES + tables + u64::from(streams) * STREAM_BYTES + cache_bytes
}

/// The most that a destination takes besides the guest's memory, in bytes of address space.
pub fn destination_bytes(layout: &Layout, streams: u16) -> u64 {
    /// Bitmaps.
    const CHUNK_BYTES: u64 = 64;
    /// A thread with a stack of 2 MiB, its buffers and a decompressor's state.
    const STREAM_BYTES: u64 = 6 << 20;
    SESSION_BYTES + u64::from(layout.chunks()) * CHUNK_BYTES + u64::from(streams) * STREAM_BYTES
}

/// Fails where this process cannot have so many more bytes: asked before a session touches anything, for an allocation that fails
/// later ends the process, and the guest with it. The memory is asked for, not touched, and given back at once.
pub fn check_headroom(bytes: u64) -> io::Result<()> {
    let count = usize::try_from(bytes).map_err(|_| no_memory(usize::MAX))?;
    let mut memory = Vec::<u8>::new();
    let reserved = memory.try_reserve_exact(count);
    // Used, so that the call is not taken for one that can be left out.
    std::hint::black_box(&mut memory);
    reserved.map_err(|_| no_memory(count))
}

/// The error of an allocation of this many bytes.
pub(crate) fn no_memory(bytes: usize) -> io::Error {
    let text =
        format!("this process cannot have {bytes} bytes of memory (its limit is RLIMIT_AS, or the host's)");
    io::Error::new(io::ErrorKind::OutOfMemory, text)
}

/// Bytes by chance that nobody can guess.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// Runs `work`; a panic in it becomes a text. What `work` shares with others must bear being left half done.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|panic| panic_text(&*panic))
}

/// The same for work that waits.
pub(crate) async fn guarded_while<T>(work: impl Future<Output = T>) -> Result<T, String> {
    Guarded(pin!(work)).await
}

struct Guarded<'a, F>(Pin<&'a mut F>);

impl<F: Future> Future for Guarded<'_, F> {
    type Output = Result<F::Output, String>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match guarded(|| self.0.as_mut().poll(context)) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Err(what) => Poll::Ready(Err(what)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_lacks_is_told_from_what_a_connection_does() {
        for code in [libc::ENOMEM, libc::ENOSPC, libc::EDQUOT, libc::EMFILE, libc::ENFILE, libc::EFAULT] {
            assert!(is_local(&io::Error::from_raw_os_error(code)), "{code}");
        }
        for code in [libc::EPIPE, libc::ECONNRESET, libc::ETIMEDOUT, libc::EAGAIN, libc::EINTR, libc::ENOBUFS]
        {
            assert!(!is_local(&io::Error::from_raw_os_error(code)), "{code}");
        }
        assert!(is_local(&no_memory(5)) && is_no_room(&no_memory(5)));
        assert!(
            !is_local(&io::Error::other("anything"))
                && !is_no_room(&io::Error::from_raw_os_error(libc::EMFILE))
        );
    }

    #[test]
    fn an_allocation_that_cannot_be_is_an_error_and_not_the_end() {
        let error = zeroed::<u64>(usize::MAX / 16).unwrap_err();
        assert!(is_local(&error) && error.to_string().contains("RLIMIT_AS"), "{error}");
        assert_eq!(*zeroed::<u8>(3).unwrap(), [0; 3]);
        let layout = Layout::flat(1 << 30).unwrap();
        check_headroom(source_bytes(&layout, 4, 64 << 20)).unwrap();
        check_headroom(destination_bytes(&layout, 4)).unwrap();
        let error = check_headroom(1 << 60).unwrap_err();
        assert!(is_local(&error) && error.to_string().contains("1152921504606846976 bytes"), "{error}");
    }

    #[test]
    fn a_panic_becomes_what_it_said() {
        assert_eq!(guarded(|| 3), Ok(3));
        assert_eq!(guarded(|| panic!("at {}", 5)), Err::<(), _>("at 5".into()));
        assert_eq!(guarded(|| std::panic::panic_any(7)), Err::<(), _>("it did not say why".into()));
    }
}
