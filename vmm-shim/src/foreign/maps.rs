//! What is mapped in a process, from the texts of its `maps`, `smaps` and `mountinfo` in `/proc`.

use std::collections::HashMap;
use std::io::{self, BufRead};
use std::ops::Range;

use pagecopy::layout::PAGE_SIZE;

/// What the kernel keeps the pages of a mapping in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MappingKind {
    /// No file at all.
    Anonymous,
    /// A file in memory: of a tmpfs, a memfd, or shared memory without a name.
    Memory,
    /// Huge pages of hugetlbfs, of this many bytes each.
    Hugetlb(u64),
    /// A file of any other file system.
    Other,
}

/// A range of addresses of a process that is mapped in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The addresses, in that process.
    pub addresses: Range<u64>,
    /// Where in the file the first of them is, in bytes.
    pub offset: u64,
    /// The device of the file, as `st_dev` has it; of file systems that give each file system tree a number of its own (btrfs, overlayfs)
    /// it can be another one. 0 where there is no file.
    pub device: u64,
    /// The file's inode; 0 where there is no file.
    pub inode: u64,
    /// Whether all who map the file see what is written.
    pub shared: bool,
    /// What the pages are kept in.
    pub kind: MappingKind,
    /// Whether there are, or may come to be, transparent huge pages.
    pub transparent_huge: bool,
}

impl Mapping {
    /// Whether the other mapping begins where this one ends, in memory and in the file, and is of the same kind.
    fn is_followed_by(&self, other: &Self) -> bool {
        let goes_on =
            self.inode == 0 || self.offset + (self.addresses.end - self.addresses.start) == other.offset;
        goes_on
            && self.addresses.end == other.addresses.start
            && (self.device, self.inode, self.shared, self.kind)
                == (other.device, other.inode, other.shared, other.kind)
    }

    /// The part of it that lies in a range.
    fn part(&self, range: &Range<u64>) -> Option<Self> {
        let addresses = self.addresses.start.max(range.start)..self.addresses.end.min(range.end);
        // Where there is no file, `maps` has no offset.
        let skipped = if self.inode == 0 { 0 } else { addresses.start.saturating_sub(self.addresses.start) };
        (addresses.start < addresses.end).then(|| Self {
            addresses,
            offset: self.offset + skipped,
            ..self.clone()
        })
    }
}

/// The mappings in some ranges, those that only differ in where the kernel has split them as one. Ranges and mappings in rising order.
pub(super) fn within(mappings: &[Mapping], range: &Range<u64>) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for part in mappings.iter().filter_map(|mapping| mapping.part(range)) {
        match found.last_mut() {
            Some(last) if last.is_followed_by(&part) => last.addresses.end = part.addresses.end,
            _ => found.push(part),
        }
    }
    found
}

/// The file systems of a process, by the number of their devices.
pub(super) struct FileSystems(HashMap<u64, String>);

impl FileSystems {
    /// From the text of `mountinfo`, and the device of memfds, which is mounted nowhere.
    pub(super) fn of(mountinfo: &str, memfds: u64) -> Self {
        let mounted = mountinfo.lines().filter_map(|line| {
            let (mount, rest) = line.split_once(" - ")?;
            Some((device(mount.split(' ').nth(2)?, 10)?, rest.split(' ').next()?.to_owned()))
        });
        Self(mounted.chain([(memfds, "tmpfs".to_owned())]).collect())
    }

    fn kind(&self, device: u64, inode: u64) -> MappingKind {
        match self.0.get(&device).map(String::as_str) {
            _ if inode == 0 => MappingKind::Anonymous,
            Some("tmpfs" | "ramfs") => MappingKind::Memory,
            _ => MappingKind::Other,
        }
    }
}

/// A device's number from `MAJOR:MINOR`.
fn device(text: &str, radix: u32) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let number = |text| u32::from_str_radix(text, radix).ok();
    Some(rustix::fs::makedev(number(major)?, number(minor)?))
}

/// A line of `maps` (proc_pid_maps(5)), or the first one that `smaps` has of a mapping.
fn mapping(line: &str, systems: &FileSystems) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let addresses = hex(from)?..hex(to)?;
    let permissions = words.next()?;
    let offset = hex(words.next()?)?;
    let device = device(words.next()?, 16)?;
    let inode = words.next()?.parse().ok()?;
    let shared = permissions.len() == 4 && permissions.ends_with('s');
    Some(Mapping {
        addresses,
        offset,
        device,
        inode,
        shared,
        kind: systems.kind(device, inode),
        transparent_huge: false,
    })
}

/// All mappings that the text of `maps` names. Nothing is known of huge pages yet: [`find_huge`].
pub(super) fn parse(maps: &str, systems: &FileSystems) -> Vec<Mapping> {
    maps.lines().filter_map(|line| mapping(line, systems)).collect()
}

/// Tells which of these mappings, in rising order, are of huge pages or may have some, by the text of `smaps`. It is read no further
/// than the last of them: the kernel walks the page table of everything that it describes.
pub(super) fn find_huge(smaps: impl BufRead, mappings: &mut [Mapping]) -> io::Result<()> {
    let Some(end) = mappings.last().map(|last| last.addresses.end) else { return Ok(()) };
    let mut at = 0..0;
    for line in smaps.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let hex = |text| u64::from_str_radix(text, 16).unwrap_or(0);
            at = hex(from)..hex(to);
            if at.start >= end {
                break;
            }
            continue;
        }
        let number = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        for mapping in mappings.iter_mut().filter(|mapping| at.contains(&mapping.addresses.start)) {
            match first {
                "KernelPageSize:" if number << 10 > PAGE_SIZE as u64 => {
                    mapping.kind = MappingKind::Hugetlb(number << 10);
                }
                "THPeligible:" | "AnonHugePages:" | "ShmemPmdMapped:" => {
                    mapping.transparent_huge |= number > 0;
                }
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55e0c5a00000-55e0c5a21000 r--p 00001000 fe:01 1573 /usr/bin/a program
7f0000000000-7f0000200000 rw-s 00000000 00:01 2049 /memfd:pc.ram (deleted)
7f0000200000-7f0000300000 rw-s 00200000 00:01 2049 /memfd:pc.ram (deleted)
7f0000300000-7f0000400000 rw-s 00000000 00:01 2049 /memfd:pc.ram (deleted)
7f0000400000-7f0000600000 rw-s 00000000 00:10 77 /anon_hugepage (deleted)
7f0000600000-7f0000601000 rw-s 00003000 00:1b 12 /dev/shm/it's a - name
7f0000700000-7f0000900000 rw-p 00000000 00:00 0
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0 [vdso]
";
    const MOUNTS: &str = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:27 / /dev/shm rw,nosuid shared:4 master:2 - tmpfs tmpfs rw
31 22 0:16 / /dev/hugepages rw - hugetlbfs none rw
";

    fn mappings() -> Vec<Mapping> {
        parse(MAPS, &FileSystems::of(MOUNTS, rustix::fs::makedev(0, 1)))
    }

    #[test]
    fn mappings_have_files_offsets_and_kinds() {
        let all = mappings();
        assert_eq!(all.len(), 8);
        let kinds: Vec<_> = all.iter().map(|m| m.kind).collect();
        use MappingKind::{Anonymous, Memory, Other};
        assert_eq!(kinds, [Other, Memory, Memory, Memory, Other, Memory, Anonymous, Anonymous]);
        assert_eq!(all[0].offset, 0x1000);
        assert_eq!((all[0].device, all[0].inode, all[0].shared), (rustix::fs::makedev(0xfe, 1), 1573, false));
        assert_eq!((all[5].device, all[5].inode, all[5].shared), (rustix::fs::makedev(0, 27), 12, true));
        assert_eq!(parse("nonsense\n\n1-2 rw-s\n", &FileSystems::of("", 0)), []);
    }

    #[test]
    fn huge_pages_are_known_by_their_size() {
        let smaps = "\
7f0000000000-7f0000200000 rw-s 00000000 00:01 2049 /memfd:pc.ram (deleted)
Size:               2048 kB
KernelPageSize:        4 kB
ShmemPmdMapped:        0 kB
THPeligible:    1
VmFlags: rd wr sh mr mw me ms
7f0000400000-7f0000600000 rw-s 00000000 00:10 77 /anon_hugepage (deleted)
KernelPageSize:     2048 kB
7f0000600000-7f0000601000 rw-s 00003000 00:1b 12 /dev/shm/it's a - name
KernelPageSize:     2048 kB
";
        let mut all = mappings();
        find_huge(smaps.as_bytes(), &mut all[..5]).unwrap();
        assert_eq!((all[1].kind, all[1].transparent_huge), (MappingKind::Memory, true));
        assert!(!all[4].transparent_huge);
        assert_eq!(all[4].kind, MappingKind::Hugetlb(2 << 20));
        assert_eq!(all[5].kind, MappingKind::Memory, "behind the last one that was asked for");
    }

    #[test]
    fn what_the_kernel_has_split_is_one_again() {
        let all = mappings();
        let ram = within(&all, &(0x7f0000001000..0x7f0000400000));
        assert_eq!(ram.len(), 2, "the third begins anew in the file: {ram:?}");
        assert_eq!((ram[0].addresses.clone(), ram[0].offset), (0x7f0000001000..0x7f0000300000, 0x1000));
        assert_eq!((ram[1].addresses.clone(), ram[1].offset), (0x7f0000300000..0x7f0000400000, 0));
        let private = within(&all, &(0x7f0000701000..0x7f0000702000));
        assert_eq!((private[0].offset, private.len()), (0, 1));
        assert_eq!(within(&all, &(0x1000..0x2000)), []);
    }
}
