//! Written pages of another process, by the soft-dirty bits of its page table. Where the kernel keeps none, the lab's does: the
//! repository's `tests/foreign.rs` runs all of this there.

#[path = "foreign/other.rs"]
mod other;
#[path = "foreign/who.rs"]
mod who;

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use other::{Gate, Other, gate, guest_layout, huge_layout, layout};
use pagecopy::backend::{BackendError, DirtyLog, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE};
use testkit::{PATIENCE, wait_until};
use vmm_shim::conformance::{Page, Rule, Subject, run};
use vmm_shim::foreign::{MappingKind, Process, SoftDirtyLog, Standstill, check};
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::vmm::writer::FIRST_FREE;

type Log = SoftDirtyLog<Arc<Gate>>;

/// Returns from the test with a printed reason where the kernel keeps no soft-dirty bits.
macro_rules! soft_dirty_or_skip {
    () => {
        if let Err(error) = check() {
            return println!("skipped: {error}");
        }
    };
}

#[test]
fn the_other_process() {
    other::live();
}

fn log_of(other: &Other, layout: Layout, gate: &Arc<Gate>) -> Result<Log, BackendError> {
    SoftDirtyLog::new(Process::open(other.pid())?, layout, &other.addresses, gate.clone())
}

/// One look.
fn sync<S: Standstill>(log: &SoftDirtyLog<S>, layout: &Layout) -> Result<BTreeSet<Page>, BackendError> {
    let dirty = PageBitmap::new(layout.chunks());
    let count = log.sync(&dirty)?;
    assert_eq!(count, dirty.count());
    Ok(dirty.iter().flat_map(|(chunk, word)| bits(word).map(move |bit| (chunk, bit))).collect())
}

/// Both processes' memory, and a log of the other's.
struct Shared {
    memory: GuestMemory,
    other: Other,
    gate: Arc<Gate>,
    log: Log,
    number: AtomicU64,
    /// Whether the other process writes nothing while the log looks.
    stands: bool,
}

impl Shared {
    fn new(backing: &Backing) -> Self {
        Self::of(GuestMemory::create(layout(), backing).unwrap()).unwrap()
    }

    /// Over memory of any layout, or why there is no other process that can have it.
    fn of(memory: GuestMemory) -> Result<Self, String> {
        let (other, gate) = (Other::sharing(&memory)?, gate());
        let log = log_of(&other, memory.layout().clone(), &gate).unwrap();
        Ok(Self { memory, other, gate, log, number: AtomicU64::new(1), stands: true })
    }

    /// Whether it is a vCPU that writes.
    fn is_guest(&self) -> bool {
        *self.memory.layout() == guest_layout()
    }

    fn sync(&self) -> BTreeSet<Page> {
        sync(&self.log, self.memory.layout()).unwrap()
    }
}

impl Subject for Shared {
    fn ram(&self) -> &dyn GuestRam {
        &self.memory
    }
    fn log(&self) -> &dyn DirtyLog {
        &self.log
    }
    fn write(&self, pages: &[Page]) {
        let number = self.number.fetch_add(pages.len() as u64, Ordering::Relaxed);
        if !self.stands {
            return self.other.write(number, pages);
        }
        self.gate.enter();
        self.other.write(number, pages);
        self.gate.leave();
    }
    fn writable(&self) -> Vec<Page> {
        let layout = self.memory.layout();
        // The guest needs some for itself.
        let first = if self.is_guest() { layout.page_at(FIRST_FREE).unwrap() } else { (0, 0) };
        let pages = |chunk| bits(layout.valid(chunk)).map(move |bit| (chunk, bit));
        (0..layout.chunks()).flat_map(pages).filter(|&page| page >= first).collect()
    }
    fn exact(&self) -> bool {
        true
    }
    fn extra_pages(&self) -> usize {
        // Of a guest: what it is told, its code, its stack, the task state segment, and the page tables with their accessed bits.
        if self.is_guest() { 32 } else { 0 }
    }
}

fn conforms(what: &str, backing: &Backing) {
    soft_dirty_or_skip!();
    keeps_all_rules(what, &Shared::new(backing));
}

fn keeps_all_rules(what: &str, subject: &Shared) {
    run(subject).unwrap();
    let (paused, doubted) = (subject.log.paused(), subject.log.doubted());
    assert!(paused.count > 20 && paused.longest <= paused.total, "{paused:?}");
    println!("conforms: {what}: {} looks, longest {:?}, {doubted} in doubt", paused.count, paused.longest);
}

#[test]
fn a_memfd_of_another_process_conforms() {
    conforms("memfd", &Backing::Memfd);
}

#[test]
fn a_tmpfs_file_of_another_process_conforms() {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    conforms("tmpfs", &Backing::File { path: file.path().into(), create: true });
}

#[test]
fn what_a_vcpu_of_another_process_writes_conforms() {
    soft_dirty_or_skip!();
    match Shared::of(GuestMemory::create(guest_layout(), &Backing::Memfd).unwrap()) {
        Ok(subject) => keeps_all_rules("vCPU", &subject),
        Err(reason) => println!("skipped: {reason}"),
    }
}

/// What is written between the scan and the clearing is lost, and the suite does see that.
#[test]
fn without_a_standstill_pages_are_lost() {
    soft_dirty_or_skip!();
    for _ in 0..20 {
        let subject = Shared { stands: false, ..Shared::new(&Backing::Memfd) };
        if let Err(violation) = run(&subject) {
            return assert_eq!(violation.rule, Rule::Converges, "{violation}");
        }
    }
    panic!("no page was lost in 20 runs");
}

#[test]
fn private_memory_is_reported_as_it_is_written() {
    soft_dirty_or_skip!();
    let (other, gate) = (Other::private(), gate());
    let log = log_of(&other, layout(), &gate).unwrap();
    other.write(1, &[(0, 0), (0, 1), (9, 8)]);
    log.start().unwrap();
    assert_eq!(sync(&log, &layout()).unwrap(), BTreeSet::new());
    let written = [(0, 1), (0, 63), (9, 8), (10, 0), (12, 0)];
    other.write(9, &written);
    other.ask("read 0 0");
    other.ask("read 4 4");
    assert_eq!(sync(&log, &layout()).unwrap(), written.into());
    assert_eq!(sync(&log, &layout()).unwrap(), BTreeSet::new());
    // Its page goes, and so does what was in it.
    other.ask("discard 0 1");
    assert_eq!(sync(&log, &layout()).unwrap(), [(0, 1)].into());
    assert_eq!(sync(&log, &layout()).unwrap(), BTreeSet::new());
    assert_eq!((log.paused().count, log.doubted()), (6, 0));
}

#[test]
fn a_huge_page_is_reported_whole_or_in_part_but_never_not() {
    soft_dirty_or_skip!();
    let (other, gate) = (Other::huge(), gate());
    let log = log_of(&other, huge_layout(), &gate).unwrap();
    other.write(1, &[(0, 0), (8, 0)]);
    log.start().unwrap();
    assert_eq!(sync(&log, &huge_layout()).unwrap(), BTreeSet::new());
    other.write(2, &[(8, 5)]);
    let found = sync(&log, &huge_layout()).unwrap();
    assert!(found.contains(&(8, 5)) && found.iter().all(|(chunk, _)| *chunk >= 8), "{found:?}");
    println!("{} pages for one of a huge page", found.len());
}

#[test]
fn pages_that_are_taken_away_are_reported_whoever_takes_them() {
    soft_dirty_or_skip!();
    let shared = Shared::new(&Backing::Memfd);
    shared.write(&[(0, 1), (0, 2), (9, 8), (10, 0)]);
    shared.log.start().unwrap();
    shared.other.ask("discard 0 1");
    shared.other.ask("discard 5 5");
    assert_eq!(shared.sync(), [(0, 1)].into(), "and not the one that never was there");
    shared.memory.discard(9, 1 << 8).unwrap();
    shared.write(&[(0, 2)]);
    assert_eq!(shared.sync(), [(0, 2), (9, 8)].into());
    assert_eq!(shared.sync(), BTreeSet::new());
    // Written and taken away between two looks.
    shared.write(&[(0, 2)]);
    shared.other.ask("discard 0 2");
    assert_eq!(shared.sync(), [(0, 2)].into());
    assert_eq!(shared.log.doubted(), 0);
}

/// A huge page of shared memory comes apart where a part of it is taken away. The rest comes back as if nobody had written it.
#[test]
fn where_bits_are_lost_with_a_huge_page_all_of_it_was_written() {
    soft_dirty_or_skip!();
    if std::env::var_os("PAGEFERRY_LAB_HOST").is_none() {
        return println!("skipped: it mounts a tmpfs of huge pages, which the lab's guest may");
    }
    let folder = tempfile::tempdir().unwrap();
    let mut mount = std::process::Command::new("mount");
    let mounted =
        mount.args(["-t", "tmpfs", "-o", "huge=always,size=16m", "huge"]).arg(folder.path()).status();
    assert!(mounted.unwrap().success());
    let backing = Backing::File { path: folder.path().join("ram"), create: true };
    let shared = Shared::of(GuestMemory::create(huge_layout(), &backing).unwrap()).unwrap();
    shared.write(&[(0, 0), (8, 0)]);
    shared.log.start().unwrap();
    assert_eq!(shared.sync(), BTreeSet::new());
    shared.write(&[(0, 5)]);
    shared.other.ask("discard 0 9");
    shared.other.ask("read 0 5");
    let found = shared.sync();
    assert!(found.contains(&(0, 5)), "the page that was written is none of {}", found.len());
    println!(
        "{} of 1024 pages after a huge page came apart, {} looks in doubt",
        found.len(),
        shared.log.doubted()
    );
    assert_eq!((found.len(), shared.log.doubted()), (1024, 1));
    drop(shared);
    assert!(std::process::Command::new("umount").arg("-l").arg(folder.path()).status().unwrap().success());
}

/// What the module's documentation says is not seen.
#[test]
fn what_the_log_does_not_see() {
    soft_dirty_or_skip!();
    let shared = Shared::new(&Backing::Memfd);
    shared.write(&[(0, 1), (0, 2)]);
    shared.log.start().unwrap();
    shared.other.ask("discard 0 1");
    shared.other.ask("read 0 1");
    shared.memory.chunk(0).subslice(2 * PAGE_SIZE, 1).unwrap().copy_from(&[7u8]);
    assert_eq!(shared.sync(), BTreeSet::new());
}

#[test]
fn a_kernel_without_the_bits_is_refused_before_anything_is_touched() {
    let Err(known) = check() else { return println!("skipped: this kernel keeps soft-dirty bits") };
    let shared = Shared::new(&Backing::Memfd);
    let error = shared.log.start().unwrap_err();
    assert_eq!(error.what, known.what);
    assert!(error.what.contains("compare contents instead"), "{error}");
    assert_eq!(shared.log.paused().count, 0);
    assert!(sync(&shared.log, &layout()).unwrap_err().to_string().contains("not started"));
}

#[test]
fn a_process_that_ends_is_an_error_and_not_a_guest_that_writes_nothing() {
    soft_dirty_or_skip!();
    // Its parent has not asked yet how it ended, so its number is still its own; or has, and it may be another's.
    for asked in [false, true] {
        let mut shared = Shared::new(&Backing::Memfd);
        shared.log.start().unwrap();
        shared.write(&[(0, 1)]);
        shared.other.child.kill().unwrap();
        if asked {
            shared.other.child.wait().unwrap();
        }
        wait_until("the end of the process", PATIENCE, || shared.log.process().require_alive().is_err());
        let looked = sync(&shared.log, &layout()).unwrap_err();
        let started = shared.log.start().unwrap_err();
        assert!(!shared.gate.is_taken(), "the guest still stands");
        for text in [looked.to_string(), started.to_string()] {
            let named = text.contains(&format!("process {} (", shared.other.pid()));
            assert!(named && text.contains("has ended"), "{asked}: {text}");
        }
    }
}

#[test]
fn a_process_that_becomes_another_program_is_an_error() {
    soft_dirty_or_skip!();
    let shared = Shared::new(&Backing::Memfd);
    shared.log.start().unwrap();
    shared.other.tell("become");
    let comm = format!("/proc/{}/comm", shared.other.pid());
    wait_until("the other program", PATIENCE, || std::fs::read_to_string(&comm).unwrap() == "cat\n");
    let error = sync(&shared.log, &layout()).unwrap_err().to_string();
    assert!(error.contains("another program"), "{error}");
    assert!(shared.log.process().require_alive().is_ok());
}

#[test]
fn mappings_of_a_file_are_found_with_their_offsets() {
    let memory = GuestMemory::create(layout(), &Backing::Memfd).unwrap();
    let other = Other::sharing(&memory).unwrap();
    let process = Process::open(other.pid()).unwrap();
    let stat = rustix::fs::fstat(memory.fd_of(0).unwrap().0).unwrap();
    let mut found = process.mappings_of(stat.st_dev, stat.st_ino).unwrap();
    found.sort_by_key(|mapping| mapping.offset);
    let low = layout().regions()[0].len;
    let places: Vec<_> = found.iter().map(|m| (vec![m.addresses.clone()], m.offset)).collect();
    assert_eq!(places, [(other.addresses[0].clone(), 0), (other.addresses[1].clone(), low)]);
    assert!(found.iter().all(|m| m.shared && m.kind == MappingKind::Memory && m.inode == stat.st_ino));
    assert_eq!(process.mappings_of(stat.st_dev, stat.st_ino + (1 << 40)).unwrap(), []);
    let private = Other::private();
    let process = Process::open(private.pid()).unwrap();
    let found = process.mappings_in(&private.addresses[0][0]).unwrap();
    assert!(found.iter().all(|m| !m.shared && m.kind == MappingKind::Anonymous), "{found:?}");
}

#[test]
fn a_region_may_lie_in_pieces() {
    soft_dirty_or_skip!();
    let (other, gate) = (Other::private(), gate());
    let mut addresses = other.addresses.clone();
    let whole = addresses[0][0].clone();
    let middle = whole.start + 70 * PAGE_SIZE as u64;
    // As if it began with what follows its first 70 pages.
    addresses[0] = vec![middle..whole.end, whole.start..middle];
    let log = SoftDirtyLog::new(Process::open(other.pid()).unwrap(), layout(), &addresses, gate).unwrap();
    log.start().unwrap();
    other.write(1, &[(0, 0), (1, 6), (9, 8)]);
    // Pages 0, 70 and 584 of 585.
    assert_eq!(sync(&log, &layout()).unwrap(), [(0, 0), (8, 2), (8, 3)].into());
}

#[test]
fn what_cannot_be_tracked_is_refused_by_name() {
    let other = Other::private();
    let refused = |addresses: &[Vec<Range<u64>>]| {
        let process = Process::open(other.pid()).unwrap();
        SoftDirtyLog::new(process, layout(), addresses, gate()).unwrap_err().to_string()
    };
    let good = &other.addresses;
    assert!(refused(&good[..1]).contains("2 regions"));
    let (start, end) = (good[0][0].start, good[0][0].end);
    let one = |range: Range<u64>| vec![range];
    for bad in [vec![], one(start..end - 4096), one(start + 1..end + 1), vec![start..end, start..end]] {
        let text = refused(&[bad, good[1].clone()]);
        assert!(text.contains("\"low\"") && text.contains("whole pages"), "{text}");
    }
    let text = refused(&[one(4096..4096 + end - start), good[1].clone()]);
    assert!(text.contains("not all of it is mapped"), "{text}");
}

#[test]
fn files_on_a_disk_are_refused_by_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let tmpfs = rustix::fs::fstatfs(file.as_file().as_fd()).unwrap().f_type as u64 == 0x0102_1994;
    if tmpfs || std::env::var_os("PAGEFERRY_LAB_HOST").is_some() {
        return println!("skipped: temporary files are in memory here");
    }
    let backing = Backing::File { path: file.path().into(), create: true };
    let memory = GuestMemory::create(layout(), &backing).unwrap();
    let text = log_of(&Other::sharing(&memory).unwrap(), layout(), &gate()).unwrap_err().to_string();
    assert!(text.contains("not in memory") && text.contains("compare contents"), "{text}");
}

#[test]
fn huge_pages_of_hugetlbfs_are_refused_by_name() {
    let reserve = Path::new("/proc/sys/vm/nr_hugepages");
    if std::env::var_os("PAGEFERRY_LAB_HOST").is_some() {
        std::fs::write(reserve, "4").unwrap();
    }
    let other = match Other::hugetlb() {
        Ok(other) => other,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let text = log_of(&other, huge_layout(), &gate()).unwrap_err().to_string();
    assert!(text.contains("hugetlbfs") && text.contains("compare contents"), "{text}");
    println!("refused: {text}");
}

#[test]
fn a_bitmap_of_another_layout_is_refused() {
    soft_dirty_or_skip!();
    let shared = Shared::new(&Backing::Memfd);
    shared.log.start().unwrap();
    let text = shared.log.sync(&PageBitmap::new(3)).unwrap_err().to_string();
    assert!(text.contains("3 chunks"), "{text}");
    assert_eq!(shared.sync(), BTreeSet::new(), "and nothing is forgotten for it");
    shared.log.stop().unwrap();
    assert!(sync(&shared.log, &layout()).is_err());
}
