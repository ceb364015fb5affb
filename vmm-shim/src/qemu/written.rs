//! Which pages of a QEMU's memory were written, by the page table of its process.

use std::ops::Range;
use std::sync::Arc;

use pagecopy::backend::BackendError;
use pagecopy::layout::{Layout, Region};

use super::QemuGuest;
use super::blocks::Inode;
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
