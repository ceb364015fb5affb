//! The guests of this crate in another VMM: what QEMU needs to run the counter guest, for figures side by side.
//!
//! A VMM with firmware starts its one vCPU at the reset vector, in real mode. The image made here leads from there to what
//! [`load`](crate::vmm) has put into RAM, which that VMM must have for its own (a RAM file): the same page tables, the same code at
//! CPL 3, the same parameters. So the guest does under both what it does under either.

use pagecopy::backend::GuestRam;
use vm_memory::Bytes;

use super::map;
use super::sys::{firmware_code, long_mode_code};

/// Limit and address of the global descriptor table, at [`map::FIRMWARE`]; the table follows.
const TABLE: u64 = map::FIRMWARE + 0x20;

/// Puts the way into a 64-bit guest of one vCPU into RAM, beside what the loader wrote, and returns the firmware (64 KiB, to end at
/// 4 GiB) that goes it.
///
/// # Errors
/// If the RAM has no region at 0 that holds the first 16 KiB.
pub fn write(ram: &dyn GuestRam) -> Result<&'static [u8], vm_memory::VolatileMemoryError> {
    let tss_limit = u64::from(map::TSS_LIMIT);
    // Flat segments (Intel SDM 3A, 3.4.5), at the selectors that firmware.s and boot.rs use.
    let table: [u64; 8] = [
        0,
        0x00cf_9a00_0000_ffff, // 0x08: 32-bit code
        0x00cf_9200_0000_ffff, // 0x10: data
        0x00af_fa00_0000_ffff, // 0x18: 64-bit code, CPL 3
        0x00cf_f200_0000_ffff, // 0x20: data, CPL 3
        tss_limit | (map::TSS << 16) | (0x89 << 40),
        0,
        0x00af_9a00_0000_ffff, // 0x38: 64-bit code
    ];
    let region = ram.region(0);
    for (entry, at) in table.iter().zip((TABLE as usize..).step_by(8)) {
        region.write_slice(&entry.to_le_bytes(), at)?;
    }
    let limit = (size_of_val(&table) - 1) as u16;
    region.write_slice(&limit.to_le_bytes(), map::FIRMWARE as usize)?;
    region.write_slice(&(TABLE as u32).to_le_bytes(), map::FIRMWARE as usize + 2)?;
    region.write_slice(long_mode_code(), map::FIRMWARE_CODE as usize)?;
    Ok(firmware_code())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The image is as long as it must be, and its addresses are those of the map.
    #[test]
    fn the_code_has_the_addresses_of_the_map() {
        let firmware = firmware_code();
        assert_eq!(firmware.len(), 1 << 16);
        let holds = |code: &[u8], bytes: &[u8]| code.windows(bytes.len()).any(|window| window == bytes);
        let address = |of: u64| (of as u32).to_le_bytes();
        // The reset vector is a near jump to where the code begins.
        let jump = i16::from_le_bytes([firmware[0xfff1], firmware[0xfff2]]);
        assert_eq!((firmware[0xfff0], 0xfff3 + i32::from(jump)), (0xe9, 0xff00));
        assert!(holds(firmware, &(map::FIRMWARE as u16).to_le_bytes()));
        assert!(holds(firmware, &address(map::FIRMWARE_CODE)));
        let long_mode = long_mode_code();
        assert!(map::FIRMWARE_CODE + (long_mode.len() as u64) < map::STACKS);
        for of in [map::PARAMS, map::TABLES, map::CODE] {
            assert!(holds(long_mode, &address(of)), "{of:#x}");
        }
    }
}
