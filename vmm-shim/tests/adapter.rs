//! vm-memory's guest memory as the engine takes it, of every kind of mapping.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::{DirtyLog, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use vmm_shim::adapter::VmMemory;
use vmm_shim::conformance::{Written, run};
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::uffd_log::UffdLog;
use vmm_shim::vm_memory::mmap::MmapRegionBuilder;
use vmm_shim::vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

const CHUNK: u64 = CHUNK_SIZE as u64;
const PAGE: u64 = PAGE_SIZE as u64;
/// Length of each region: a chunk, and a chunk of three pages.
const LEN: u64 = CHUNK + 3 * PAGE;
/// Bytes in the file before the region's.
const SKIPPED: u64 = 5 * PAGE;

/// What a region is mapped from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Anonymous,
    Shared,
    Private,
}

const KINDS: [Kind; 3] = [Kind::Anonymous, Kind::Shared, Kind::Private];

/// A memfd of `len` bytes.
fn memfd(len: u64) -> File {
    let memory = GuestMemory::create(pagecopy::layout::Layout::flat(len).unwrap(), &Backing::Memfd).unwrap();
    let (fd, _) = memory.fd_of(0).unwrap();
    File::from(fd.try_clone_to_owned().unwrap())
}

/// Memory of two regions: one of the kind, and one of anonymous memory.
fn memory(kind: Kind, file: &File) -> GuestMemoryMmap<()> {
    let flags = match kind {
        Kind::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        Kind::Shared => libc::MAP_SHARED | libc::MAP_NORESERVE,
        Kind::Private => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    };
    let mut builder = MmapRegionBuilder::new(LEN as usize)
        .with_mmap_flags(flags)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    if kind != Kind::Anonymous {
        builder = builder.with_file_offset(FileOffset::new(file.try_clone().unwrap(), SKIPPED));
    }
    let low = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
    let high = GuestRegionMmap::from_range(GuestAddress(1 << 32), PAGE_SIZE, None).unwrap();
    GuestMemoryMmap::from_regions(vec![low, high]).unwrap()
}

fn populated(ram: &dyn GuestRam) -> Vec<u64> {
    let mut words = vec![0; ram.layout().chunks() as usize];
    ram.populated(0, &mut words).unwrap();
    words
}

#[test]
fn what_was_written_is_no_hole_and_what_is_discarded_reads_as_zero() {
    for kind in KINDS {
        let file = memfd(SKIPPED + LEN);
        // Data of the file's before the mapping is nobody's here.
        file.write_all_at(&[1], 0).unwrap();
        if kind == Kind::Private {
            file.write_all_at(&[2; PAGE_SIZE], SKIPPED + 9 * PAGE).unwrap();
        }
        let memory = memory(kind, &file);
        let ram = VmMemory::new(memory.clone()).unwrap();
        let names: Vec<&str> = ram.layout().regions().iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["ram@0x0", "ram@0x100000000"]);
        let from_file = if kind == Kind::Private { 1 << 9 } else { 0 };
        assert_eq!(populated(&ram), [from_file, 0, 0], "{kind:?}: untouched");
        memory.write_obj(7u64, GuestAddress(4 * PAGE)).unwrap();
        memory.write_obj(7u64, GuestAddress(CHUNK + 2 * PAGE)).unwrap();
        memory.write_obj(7u64, GuestAddress(1 << 32)).unwrap();
        assert_eq!(populated(&ram), [from_file | 1 << 4, 0b100, 1], "{kind:?}: written");
        let mut two = [0; 1];
        ram.populated(1, &mut two).unwrap();
        assert_eq!(two, [0b100], "{kind:?}: of one chunk");

        ram.discard(0, 1 << 4 | 1 << 9).unwrap();
        for page in [4, 9] {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(page * PAGE)).unwrap(), 0, "{kind:?}");
        }
        let mut kept = [0; 1];
        file.read_exact_at(&mut kept, SKIPPED + 9 * PAGE).unwrap();
        assert_eq!(
            kept,
            [if kind == Kind::Private { 2 } else { 0 }],
            "{kind:?}: a private mapping's file stays"
        );
        ram.populate(0, 1).unwrap();
        ram.bring_in(1, 0b1).unwrap();
        let brought_in = if kind == Kind::Anonymous { 0b100 } else { 0b101 };
        assert_eq!(populated(&ram)[..2], [u64::MAX, brought_in], "{kind:?}: brought in");
        assert!(ram.discard(1, 1 << 3).is_err(), "no such page");
        assert!(ram.populated(2, &mut [0; 2]).is_err(), "no such chunk");
    }
}

/// A first write through a private mapping makes a page of a file in memory, too, so this takes a file on a disk.
#[test]
fn what_a_private_mapping_holds_by_itself_is_no_hole() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(SKIPPED + LEN).unwrap();
    let memory = memory(Kind::Private, &file);
    let ram = VmMemory::new(memory.clone()).unwrap();
    memory.write_obj(7u64, GuestAddress(4 * PAGE)).unwrap();
    assert_eq!(populated(&ram)[0] & 1 << 4, 1 << 4);
    let mut of_file = [0; 2];
    vmm_shim::holes::of_file(&file, SKIPPED..SKIPPED + LEN, &mut of_file).unwrap();
    if of_file[0] & 1 << 4 != 0 {
        println!("this file system has no holes, or made one page of it");
    }
}

#[test]
fn the_same_bytes_are_at_the_same_addresses() {
    let memory = memory(Kind::Anonymous, &memfd(PAGE));
    let ram = VmMemory::named(memory.clone(), |index, _| format!("bank{index}")).unwrap();
    assert_eq!(ram.layout().regions()[1].name, "bank1");
    memory.write_obj(0x0102_0304u32, GuestAddress(CHUNK + PAGE)).unwrap();
    assert_eq!(ram.chunk(1).read_obj::<u32>(PAGE_SIZE).unwrap(), 0x0102_0304);
    ram.region(1).write_obj(5u8, 9).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 32) + 9)).unwrap(), 5);
    let host = memory.find_region_address();
    assert_eq!(ram.region(0).ptr_guard_mut().as_ptr() as u64, host);
}

/// The address of the first region.
trait FirstAddress {
    fn find_region_address(&self) -> u64;
}

impl FirstAddress for GuestMemoryMmap<()> {
    fn find_region_address(&self) -> u64 {
        use vmm_shim::vm_memory::GuestMemoryBackend;
        self.iter().next().unwrap().get_host_address(MemoryRegionAddress(0)).unwrap() as u64
    }
}

#[test]
fn what_is_no_layout_is_refused() {
    let odd = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGE_SIZE + 1)]).unwrap();
    let text = VmMemory::new(odd).unwrap_err().source.to_string();
    assert!(text.contains("multiples of 4096"), "{text}");
    let same = VmMemory::named(memory(Kind::Anonymous, &memfd(PAGE)), |_, _| "ram".into());
    assert!(same.unwrap_err().source.to_string().contains("used twice"));
}

#[test]
fn pages_of_a_guest_that_runs_may_be_missing() {
    for kind in [Kind::Anonymous, Kind::Shared] {
        let memory = memory(kind, &memfd(SKIPPED + LEN));
        let ram = Arc::new(VmMemory::new(memory.clone()).unwrap());
        match ram.missing_unit() {
            Ok(unit) => assert_eq!(unit, 0),
            Err(e) => return println!("skipped: {e}"),
        }
        memory.write_obj(0xeeu8, GuestAddress(2 * PAGE)).unwrap();
        let pages = PageBitmap::new(ram.layout().chunks());
        pages.insert(0, 1 << 2);
        let missing = ram.miss(&pages).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| memory.read_obj::<u8>(GuestAddress(2 * PAGE)).unwrap());
            let mut faults = Vec::new();
            while faults.is_empty() {
                missing.wait(&mut faults, Duration::from_secs(5)).unwrap();
            }
            assert_eq!((faults[0].chunk, faults[0].page), (0, 2), "{kind:?}");
            missing.place(0, 2, &[9; PAGE_SIZE]).unwrap();
            assert_eq!(reader.join().unwrap(), 9, "{kind:?}");
        });
        missing.end().unwrap();
    }
    let private = VmMemory::new(memory(Kind::Private, &memfd(SKIPPED + LEN))).unwrap();
    let text = private.missing_unit().unwrap_err().to_string();
    assert!(text.contains("private mapping") || text.contains("userfaultfd"), "{text}");
}

#[test]
fn userfaultfd_tracks_any_memory_of_this_process() {
    for kind in [Kind::Anonymous, Kind::Shared] {
        let memory = memory(kind, &memfd(SKIPPED + LEN));
        let ram = Arc::new(VmMemory::new(memory.clone()).unwrap());
        let log = match UffdLog::over(ram.clone()) {
            Ok(log) => log,
            Err(e) => return println!("skipped: {e}"),
        };
        let layout = ram.layout().clone();
        let write = |(chunk, bit), number: u64| {
            memory.write_obj(number, GuestAddress(layout.address(chunk, bit).unwrap())).unwrap();
        };
        run(&Written::new(ram, log, write)).unwrap_or_else(|violation| panic!("{kind:?}: {violation}"));
    }
}

/// Private and shared memory are told apart: pages that were never touched stay so, and pages that another process filled are not
/// reported when they are read.
#[test]
fn userfaultfd_tracks_each_kind_of_memory_in_its_way() {
    for kind in [Kind::Anonymous, Kind::Shared] {
        let file = memfd(SKIPPED + LEN);
        let memory = memory(kind, &file);
        let ram = Arc::new(VmMemory::new(memory.clone()).unwrap());
        let log = match UffdLog::over(ram.clone()) {
            Ok(log) => log,
            Err(e) => return println!("skipped: {e}"),
        };
        file.write_all_at(&[3; PAGE_SIZE], SKIPPED).unwrap();
        let before = populated(&*ram);
        log.start().unwrap();
        let dirty = PageBitmap::new(ram.layout().chunks());
        log.sync(&dirty).unwrap();
        assert_eq!(populated(&*ram), before, "{kind:?}: tracked");
        if kind == Kind::Shared {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 3);
        }
        memory.write_obj(1u8, GuestAddress(2 * PAGE)).unwrap();
        log.sync(&dirty).unwrap();
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [(0, 1 << 2)], "{kind:?}");
        log.stop().unwrap();
    }
}
