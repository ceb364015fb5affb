//! Filling fresh pages of shared memory with their content at once, by userfaultfd's `UFFDIO_COPY`.
//!
//! A page of a file in tmpfs that is touched for the first time costs a fault, an allocation, 4 KiB of zeros, and then its
//! content. Placed, it costs the allocation and its content, many pages a system call. The memory is registered for
//! write-protect, of which nothing is ever used: so no access to it is stopped, whoever makes it.

use std::sync::Arc;

use pagecopy::backend::{BackendError, GuestRam, Placer};
use pagecopy::layout::PAGE_SIZE;

use crate::guest_memory::GuestMemory;
use crate::sys::{self, Userfaultfd};

/// A placer over guest memory that is shared memory.
#[derive(Debug)]
pub(crate) struct UffdPlacer {
    memory: Arc<GuestMemory>,
    fd: Userfaultfd,
}

impl UffdPlacer {
    /// Registers all regions; `None` where the kernel or its policy does not allow this, which only costs speed.
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Option<Self> {
        let fd = Userfaultfd::open().ok()?;
        fd.api(sys::UFFD_FEATURE_WP_ASYNC | sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM).ok()?;
        for region in 0..memory.layout().regions().len() {
            fd.register_wp(memory.host_range(region)).ok()?;
        }
        Some(Self { memory, fd })
    }
}

impl Placer for UffdPlacer {
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        assert!(bytes.len().is_multiple_of(PAGE_SIZE), "whole pages are placed, not {} bytes", bytes.len());
        let target = self.memory.chunk(chunk);
        let target = target.subslice(first as usize * PAGE_SIZE, bytes.len()).expect("pages of the chunk");
        let mut at = 0;
        while at < bytes.len() {
            let rest = target.offset(at).expect("not beyond the target's end");
            match self.fd.copy(&rest, &bytes[at..], false) {
                Ok(placed) => at += placed,
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                    // Somebody touched it: it is written like any other.
                    let page = rest.subslice(0, PAGE_SIZE).expect("whole pages are left");
                    page.copy_from(&bytes[at..at + PAGE_SIZE]);
                    at += PAGE_SIZE;
                }
                Err(e) => {
                    let what = format!("place {} bytes in chunk {chunk}", bytes.len() - at);
                    return Err(self.memory.no_room(what, e));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pagecopy::layout::{CHUNK_SIZE, Layout};

    use super::*;
    use crate::guest_memory::Backing;

    fn content(memory: &GuestMemory, chunk: u32) -> Vec<u8> {
        let mut bytes = vec![0; memory.chunk(chunk).len()];
        memory.chunk(chunk).copy_to(&mut bytes[..]);
        bytes
    }

    #[test]
    fn fills_what_is_fresh_and_overwrites_what_is_not() {
        let layout = Layout::flat(3 * CHUNK_SIZE as u64).unwrap();
        let memory = Arc::new(GuestMemory::create(layout, &Backing::Memfd).unwrap());
        let Some(placer) = memory.clone().placer() else {
            return println!("skipped: this host does not allow userfaultfd");
        };
        // Page 5 of chunk 1 is there already.
        memory.chunk(1).subslice(5 * PAGE_SIZE, 1).unwrap().copy_from(&[9u8]);
        let bytes: Vec<u8> = (0..20 * PAGE_SIZE).map(|i| (i / 7) as u8).collect();
        placer.place(1, 3, &bytes).unwrap();
        let mut populated = [0; 3];
        memory.populated(0, &mut populated).unwrap();
        let found = content(&memory, 1);
        assert!(found[3 * PAGE_SIZE..23 * PAGE_SIZE] == bytes);
        assert_eq!(populated, [0, ((1 << 20) - 1) << 3, 0]);
        // Untouched pages beside them can be read and written as ever.
        assert_eq!(found[23 * PAGE_SIZE], 0);
        memory.chunk(2).subslice(0, 1).unwrap().copy_from(&[1u8]);
        drop(placer);
        assert!(content(&memory, 1)[3 * PAGE_SIZE..23 * PAGE_SIZE] == bytes);
    }

    #[test]
    fn only_shared_memory_has_one() {
        let layout = Layout::flat(CHUNK_SIZE as u64).unwrap();
        for huge in [false, true] {
            let memory = GuestMemory::create(layout.clone(), &Backing::Anonymous { huge }).unwrap();
            assert!(Arc::new(memory).placer().is_none());
        }
    }
}
