//! The last resort where guest memory in a file cannot be had: the process ends with a line that names the file, and not silently.
//!
//! A page of a mapped file that its file system has no room for, or that was cut off, raises SIGBUS in whoever touches it. Nothing of
//! pageferry touches such a page before it was brought in, but a guest's own threads may (`--no-kvm`), and KVM on their behalf
//! returns an error instead. The handler is for a command that owns its process; a library's user installs it, or does without.

mod sys;

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

/// The exit code of a process that ended because its guest's memory could not be had.
pub const EXIT_CODE: i32 = 5;

/// Mappings that are told apart; further ones end the process as they would without this.
const RANGES_MAX: usize = 64;

/// A mapping: its addresses, and what is said of it. `end` is 0 where there is none.
struct Entry {
    taken: AtomicBool,
    start: AtomicU64,
    end: AtomicU64,
    text: AtomicPtr<String>,
}

static ENTRIES: [Entry; RANGES_MAX] = [const {
    Entry {
        taken: AtomicBool::new(false),
        start: AtomicU64::new(0),
        end: AtomicU64::new(0),
        text: AtomicPtr::new(std::ptr::null_mut()),
    }
}; RANGES_MAX];
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// From now on a process whose guest memory is lost says so and ends with [`EXIT_CODE`]. Before the memory is made.
pub fn report() {
    if sys::install() {
        INSTALLED.store(true, Ordering::Release);
    }
}

/// A mapping of a file, until it is dropped.
#[derive(Debug)]
pub(crate) struct Watched(usize);

impl Watched {
    /// `None` where nobody asked for reports, or there are too many mappings.
    pub(crate) fn new(range: Range<u64>, path: &Path) -> Option<Self> {
        if !INSTALLED.load(Ordering::Acquire) {
            return None;
        }
        let at = ENTRIES.iter().position(|entry| !entry.taken.swap(true, Ordering::AcqRel))?;
        let text = format!(
            "pageferry: a page of the memory file {} could not be had: its file system is full, or the file was cut off; \
             the process ends, and the guest whose memory it is with it\n",
            path.display()
        );
        // Never freed: the handler may be reading it. A process makes few of these.
        ENTRIES[at].text.store(Box::leak(Box::new(text)), Ordering::Release);
        ENTRIES[at].start.store(range.start, Ordering::Release);
        ENTRIES[at].end.store(range.end, Ordering::Release);
        Some(Self(at))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        ENTRIES[self.0].end.store(0, Ordering::Release);
        ENTRIES[self.0].taken.store(false, Ordering::Release);
    }
}

/// What is said of the mapping at an address; may be called by a signal handler.
fn text_at(address: u64) -> Option<*const String> {
    let holds = |entry: &&Entry| {
        (entry.start.load(Ordering::Acquire)..entry.end.load(Ordering::Acquire)).contains(&address)
    };
    ENTRIES.iter().find(holds).map(|entry| entry.text.load(Ordering::Acquire).cast_const())
}
