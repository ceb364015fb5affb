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
//! | [`writer`] | writes the pages it is told to, for tests of dirty trackers |
//! | boot sector | real mode: the same walk over low memory; what a `FILE` image looks like |

pub mod counter;
mod sys;
pub mod writer;

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
    /// Stacks, one page for each of 8 vCPUs.
    pub const STACKS: u64 = 0x4000;
    /// The task state segment with its I/O bitmap: three pages.
    pub const TSS: u64 = 0xc000;
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
