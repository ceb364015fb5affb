//! The guests' machine code, out of the read-only data it is assembled into.

use core::arch::global_asm;

global_asm!(include_str!("counter.s"), options(raw));
global_asm!(include_str!("memtest.s"), options(raw));
global_asm!(include_str!("writer.s"), options(raw));
global_asm!(include_str!("bootsector.s"), options(raw));
global_asm!(include_str!("firmware.s"), options(raw));

macro_rules! code {
    ($(#[$doc:meta])* $visible:vis $name:ident, $start:ident, $end:ident) => {
        $(#[$doc])*
        $visible fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both labels stand in the same piece of assembly, start before end, in a read-only
            // section, so all bytes between are initialised, immutable and live for the whole program.
            unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }
    };
}

code! {
    /// The code of [`counter`](super::counter).
    pub counter_code, pageferry_counter_start, pageferry_counter_end
}
code! {
    /// The code of the mem-test guest.
    pub mem_test_code, pageferry_memtest_start, pageferry_memtest_end
}
code! {
    /// The code of [`writer`](crate::vmm::writer).
    pub writer_code, pageferry_writer_start, pageferry_writer_end
}
code! {
    /// A boot sector (512 bytes with its signature) that walks the memory from 64 KiB to 576 KiB, adding one
    /// to the first byte of each KiB, and prints a dot for every pass.
    pub boot_sector, pageferry_boot_start, pageferry_boot_end
}
code! {
    /// A firmware image of 64 KiB: see [`firmware`](super::firmware).
    pub(super) firmware_code, pageferry_firmware_start, pageferry_firmware_end
}
code! {
    /// What the firmware jumps to.
    pub(super) long_mode_code, pageferry_long_mode_start, pageferry_long_mode_end
}
