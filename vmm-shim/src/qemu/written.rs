//! Which pages of a QEMU's memory were written: by the page table of its process, or by their content.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pagecopy::backend::{BackendError, ContentLog, DirtyLog};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{Layout, Region};

use super::blocks::Inode;
use super::qmp::StoodStill;
use super::{QemuGuest, Qmp};
use crate::foreign::{Process, SoftDirtyLog, Standstill};

impl QemuGuest {
    /// A log of the pages that this QEMU's process writes: its vCPUs, its devices, and the kernel on its behalf. The guest stands still for
    /// each look. `layout` is that of [`memory`](Self::memory).
    ///
    /// # Errors
    /// Where the kernel does not note written pages, or this process may not look into QEMU's. The text says what helps.
    pub fn soft_dirty_log(
        self: &Arc<Self>,
        layout: &Layout,
    ) -> Result<SoftDirtyLog<Arc<Self>>, BackendError> {
        crate::foreign::check()?;
        let process = Process::open(self.qmp().pid())?;
        let regions = layout.regions().iter().zip(self.inodes());
        let addresses: Vec<_> = regions
            .map(|(region, inode)| addresses_of(&process, region, *inode))
            .collect::<Result<_, _>>()?;
        SoftDirtyLog::new(process, layout.clone(), &addresses, self.clone())
    }
}

/// The dirty log of a QEMU's guest whose writes nobody notes: memory is compared with what was sent of it, as by [`ContentLog`], but for a
/// guest that has stood still since the last look. QEMU's own `stop` waits for its devices' requests, so nothing writes then.
#[derive(Debug)]
pub struct QemuScanLog {
    guest: Arc<QemuGuest>,
    writes: Writes,
}

impl QemuScanLog {
    /// Of this guest.
    pub fn new(guest: Arc<QemuGuest>) -> Self {
        Self { guest, writes: Writes::default() }
    }
}

impl DirtyLog for QemuScanLog {
    fn name(&self) -> &str {
        ContentLog.name()
    }
    fn start(&self) -> Result<(), BackendError> {
        self.writes.look(self.guest.qmp())
    }
    fn sync(&self, _dirty: &PageBitmap) -> Result<u64, BackendError> {
        self.writes.look(self.guest.qmp()).map(|()| 0)
    }
    fn compares(&self) -> bool {
        self.writes.possible()
    }
    fn stop(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// Whether a guest can have written between two looks.
#[derive(Debug, Default)]
pub(super) struct Writes {
    last: Mutex<Option<StoodStill>>,
    possible: AtomicBool,
}

impl Writes {
    pub(super) fn look(&self, qmp: &Qmp) -> Result<(), BackendError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // What fails leaves nothing known.
        let before = last.take();
        *last = qmp.look()?;
        self.possible.store(last.is_none() || *last != before, Ordering::Release);
        Ok(())
    }

    pub(super) fn possible(&self) -> bool {
        self.possible.load(Ordering::Acquire)
    }
}

/// Where QEMU has mapped a region.
fn addresses_of(process: &Process, region: &Region, inode: Inode) -> Result<Vec<Range<u64>>, BackendError> {
    let mut mapped = process.mappings_of(inode.device, inode.number)?;
    mapped.retain(|mapping| mapping.shared);
    mapped.sort_by_key(|mapping| mapping.offset);
    let (mut at, mut addresses) = (0, Vec::new());
    for mapping in mapped {
        if mapping.offset == at && at < region.len {
            let len = (mapping.addresses.end - mapping.addresses.start).min(region.len - at);
            addresses.push(mapping.addresses.start..mapping.addresses.start + len);
            at += len;
        }
    }
    if at < region.len {
        let (pid, name) = (process.pid(), &region.name);
        return Err(BackendError::invalid(format!(
            "QEMU's process {pid} has mapped {at:#x} bytes of its memory {name:?}, not all of it"
        )));
    }
    Ok(addresses)
}

/// Stands still for looks at its page table; a guest that does so already is left as it is.
impl Standstill for QemuGuest {
    fn stop(&self) -> Result<(), BackendError> {
        self.control().stop_to_look()
    }
    fn go_on(&self) -> Result<(), BackendError> {
        self.control().go_on()
    }
}
