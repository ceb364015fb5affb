//! Streams over RDMA: reliable-connected queue pairs, opened by the connection manager.
//!
//! The control connection stays TCP. A stream's bytes (frames one way, receipts the other) travel in messages as they would over a
//! socket; raw pages do not: the source writes them straight from its guest's memory into the destination's, in the
//! order in which frames name them, so that what a header announces is there when the header is. `sys.rs` has all the unsafe
//! code and keeps alive what the adapter uses; everything above it is ordinary code.

mod connect;
mod destination;
mod options;
mod registry;
mod source;
mod sys;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

pub use connect::{ConnectRequest, Listener, RdmaError};
pub(crate) use destination::{DestinationContext, accept};
pub use options::RdmaOptions;
pub(crate) use source::{SourceContext, connect};

use crate::carrier::Breaker;
use sys::{EventKind, Id};

/// How often a thread that waits looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);
/// How often a completion queue is polled before an event is asked for.
const POLLS: u32 = 64;

/// Ends a connection from outside.
#[derive(Debug)]
struct Cut {
    /// Not held: whoever ends a stream must not keep its device open.
    id: Weak<Id>,
    done: AtomicBool,
}

impl Cut {
    fn new(id: &Arc<Id>) -> Arc<Self> {
        Arc::new(Self { id: Arc::downgrade(id), done: AtomicBool::new(false) })
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

impl Breaker for Cut {
    fn shutdown(&self) {
        if !self.done.swap(true, Ordering::AcqRel)
            && let Some(id) = self.id.upgrade()
        {
            id.disconnect();
        }
    }
}

/// Has the libraries find devices and load drivers, which they do once in a process.
pub(crate) fn warm_up() {
    drop(sys::EventChannel::new());
}

fn aborted() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the stream was ended")
}

/// Whether the peer, or the adapter, has ended the connection since this was last asked.
fn is_over(id: &Id) -> io::Result<bool> {
    let mut over = false;
    while let Some(event) = id.channel().next()? {
        over |= matches!(event.kind, EventKind::Disconnected | EventKind::DeviceRemoved | EventKind::Failed);
    }
    Ok(over)
}

/// Why guest memory was not registered.
#[derive(Debug)]
enum NotRegistered {
    /// Memory of this kind, or so much of it, is nothing for this adapter; its pages can travel in messages.
    Unfit,
    /// The user has to do something about it.
    Fatal(io::Error),
}

impl NotRegistered {
    /// What it means that registering `bytes` failed.
    fn of(error: &io::Error, bytes: u64) -> Self {
        if error.raw_os_error() != Some(libc::ENOMEM) {
            return Self::Unfit;
        }
        Self::Fatal(out_of_memory(bytes))
    }
}

/// Why so many bytes cannot be pinned, and what to do.
fn out_of_memory(bytes: u64) -> io::Error {
    let text = match sys::memlock_limit() {
        Some(limit) => format!(
            "cannot pin {bytes} bytes of memory for RDMA: RLIMIT_MEMLOCK is {limit} bytes; run `ulimit -l unlimited` in the \
                 shell that starts pageferry (as root, or with `* - memlock unlimited` in /etc/security/limits.conf), \
                 or bound what is pinned"
        ),
        None => format!(
            "cannot pin {bytes} bytes of memory for RDMA: this host has not enough free memory; bound what is pinned"
        ),
    };
    io::Error::new(io::ErrorKind::OutOfMemory, text)
}

/// The same for message buffers, whose registration failed with `error`.
fn buffers_failed(error: io::Error, bytes: usize) -> io::Error {
    if error.raw_os_error() == Some(libc::ENOMEM) { out_of_memory(bytes as u64) } else { error }
}
