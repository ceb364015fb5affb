//! Guests: small programs that run in the mini VMM, and how they tell whether a migration kept them whole.
//!
//! They are assembled with the crate from the `.s` files here into read-only data, and loaded by copying. All
//! but the boot sector are 64-bit user-mode code (CPL 3) that runs on page tables which the loader made: that
//! is native speed on every KVM, also one that interprets supervisor code. They may use all I/O ports.
//!
//! | guest | what it does |
//! |---|---|
//! | [`counter`] | writes its working set page by page, verifies what it wrote the pass before, prints a chain of values |
//! | mem-test | walks an array for ever, adding one to a byte in each KiB; prints a dot a pass |
//! | [`writer`](crate::vmm::writer) | writes the pages it is told to, for tests of dirty trackers |
//! | boot sector | real mode: the same walk over low memory; what a `FILE` image looks like |

pub mod counter;
pub mod firmware;
mod sys;

use std::io;

use pagecopy::backend::GuestRam;
use vm_memory::Bytes;

pub use sys::{boot_sector, counter_code, mem_test_code, writer_code};

/// Addresses that the loader and the guests share; all in the first 4 MiB, above the page tables' end is free
/// RAM.
pub mod map {
    /// The parameter block.
    pub const PARAMS: u64 = 0x1000;
    /// The print lock, in a page of its own.
    pub const LOCK: u64 = 0x2000;
    /// The longest gap of each of 8 vCPUs of the counter guest, in ticks: 64-bit words behind the print lock.
    pub const GAPS: u64 = LOCK + 64;
    /// For other VMMs: the global descriptor table, and code that leads to the guest's. See [`firmware`](super::firmware).
    pub const FIRMWARE: u64 = 0x3000;
    /// The code behind that table.
    pub const FIRMWARE_CODE: u64 = 0x3100;
    /// Stacks, one page for each of 8 vCPUs.
    pub const STACKS: u64 = 0x4000;
    /// The task state segment with its I/O bitmap: three pages.
    pub const TSS: u64 = 0xc000;
    /// Offset of its last byte: 104 bytes, a bit for each of 65536 ports, and a byte of ones behind that.
    pub const TSS_LIMIT: u32 = 104 + 8192;
    /// The code of a 64-bit guest.
    pub const CODE: u64 = 0x1_0000;
    /// End of the room for code.
    pub const CODE_END: u64 = 0x2_0000;
    /// Page tables: PML4, PDPT, then one page directory for each GiB.
    pub const TABLES: u64 = 0x2_0000;
    /// First address that a 64-bit guest may use as it likes.
    pub const FREE: u64 = 0x40_0000;
    /// Where a real-mode image is loaded.
    pub const BOOT_SECTOR: u64 = 0x7c00;
}

/// Fills the memory that guests use as they like with `bytes`, over and over, before one is loaded.
///
/// # Errors
/// If there are no bytes, or memory cannot be written.
pub fn fill(ram: &dyn GuestRam, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "there is nothing to fill memory with"));
    }
    for (index, region) in ram.layout().regions().iter().enumerate() {
        let first = map::FREE.saturating_sub(region.gpa.unwrap_or(map::FREE)).min(region.len);
        for at in (first..region.len).step_by(bytes.len()) {
            let part = bytes.len().min((region.len - at) as usize);
            ram.region(index).write_slice(&bytes[..part], at as usize).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pagecopy::layout::Layout;

    use super::*;
    use crate::guest_memory::{Backing, GuestMemory};

    #[test]
    fn memory_is_filled_to_its_last_byte() {
        let layout = Layout::flat(map::FREE + 8192).unwrap();
        let ram = GuestMemory::create(layout, &Backing::Anonymous { huge: false }).unwrap();
        assert!(fill(&ram, b"").is_err());
        fill(&ram, b"abc").unwrap();
        let mut found = vec![0; 8193];
        ram.region(0).read_slice(&mut found, map::FREE as usize - 1).unwrap();
        let wanted: Vec<u8> = [0].into_iter().chain((0..8192).map(|i| b"abc"[i % 3])).collect();
        assert_eq!(found, wanted);
    }
}
