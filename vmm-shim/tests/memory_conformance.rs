//! The conformance suite over userfaultfd tracking of every kind of memory.

use std::io::{Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pagecopy::backend::{DirtyLog, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};
use vm_memory::ReadVolatile;
use vmm_shim::conformance::{Page, Subject, run};
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::uffd_log::UffdLog;

/// Two regions, neither a multiple of a chunk, of which the first can hold huge pages.
fn layout() -> Layout {
    let (chunk, page) = (CHUNK_SIZE as u64, PAGE_SIZE as u64);
    Layout::new(vec![
        Region::new("low", 0, 17 * chunk + 9 * page),
        Region::new("high", 1 << 32, 2 * chunk + page),
    ])
    .unwrap()
}

/// Memory that the test's own threads write.
struct Written<L> {
    memory: Arc<GuestMemory>,
    log: L,
    counter: AtomicU64,
    exact: bool,
}

impl<L: DirtyLog> Subject for Written<L> {
    fn ram(&self) -> &dyn GuestRam {
        &*self.memory
    }
    fn log(&self) -> &dyn DirtyLog {
        &self.log
    }
    fn write(&self, pages: &[Page]) {
        for &(chunk, bit) in pages {
            let value = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
            // Somewhere else in the page each time.
            let offset = bit as usize * PAGE_SIZE + value as usize % (PAGE_SIZE / 8) * 8;
            self.memory.chunk(chunk).subslice(offset, 8).unwrap().copy_from(&[value]);
        }
    }
    fn exact(&self) -> bool {
        self.exact
    }
}

/// One region of four huge pages.
fn huge_layout() -> Layout {
    Layout::flat(8 << 20).unwrap()
}

/// Memory tracked by userfaultfd, or `None`, with the reason printed, where the host cannot.
fn tracked(backing: &Backing, exact: bool) -> Option<Written<UffdLog>> {
    let memory = Arc::new(GuestMemory::create(layout(), backing).unwrap());
    match UffdLog::new(memory.clone()) {
        Ok(log) => Some(Written { memory, log, counter: AtomicU64::new(0), exact }),
        Err(e) => {
            println!("skipped: {e}: {}", e.source);
            None
        }
    }
}

fn conforms(backing: &Backing, exact: bool, populated: bool) {
    let Some(subject) = tracked(backing, exact) else { return };
    if populated {
        subject.memory.populate(0, layout().chunks()).unwrap();
    }
    run(&subject).unwrap();
}

#[test]
fn untouched_anonymous_memory_conforms() {
    conforms(&Backing::Anonymous { huge: false }, true, false);
}

#[test]
fn populated_anonymous_memory_conforms() {
    conforms(&Backing::Anonymous { huge: false }, true, true);
}

#[test]
fn untouched_huge_pages_conform() {
    conforms(&Backing::Anonymous { huge: true }, false, false);
}

#[test]
fn populated_huge_pages_conform_exactly() {
    conforms(&Backing::Anonymous { huge: true }, true, true);
}

#[test]
fn memfds_conform() {
    conforms(&Backing::Memfd, true, false);
    conforms(&Backing::Memfd, true, true);
}

#[test]
fn files_conform() {
    for dir in [PathBuf::from("/dev/shm"), std::env::temp_dir()] {
        let file = tempfile::NamedTempFile::new_in(dir).unwrap();
        conforms(&Backing::File { path: file.path().into(), create: true }, true, false);
    }
}

#[test]
fn memfds_of_huge_pages_conform() {
    let memory = match GuestMemory::create(huge_layout(), &Backing::MemfdHuge) {
        Ok(memory) => Arc::new(memory),
        Err(e) => return println!("skipped: {e}: {}", e.source),
    };
    match UffdLog::new(memory.clone()) {
        Ok(log) => run(&Written { memory, log, counter: AtomicU64::new(0), exact: false }).unwrap(),
        Err(e) => println!("skipped: {e}: {}", e.source),
    }
}

#[test]
fn writes_by_the_kernel_are_reported() {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(PAGE_SIZE as u64).unwrap();
    for backing in [Backing::Anonymous { huge: false }, Backing::Memfd] {
        let Some(subject) = tracked(&backing, true) else { return };
        subject.memory.populate(0, layout().chunks()).unwrap();
        subject.log.start().unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut page = subject.memory.chunk(2).subslice(7 * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert_eq!(file.read_volatile(&mut page).unwrap(), PAGE_SIZE);
        let dirty = PageBitmap::new(layout().chunks());
        assert_eq!(subject.log.sync(&dirty).unwrap(), 1, "{backing:?}");
        assert_eq!(dirty.iter().collect::<Vec<_>>(), vec![(2, 1 << 7)], "{backing:?}");
    }
}

#[test]
fn tracking_does_not_populate() {
    for backing in [Backing::Anonymous { huge: false }, Backing::Memfd] {
        let Some(subject) = tracked(&backing, true) else { return };
        let populated = || {
            let mut words = vec![0; layout().chunks() as usize];
            subject.memory.populated(0, &mut words).unwrap();
            words
        };
        subject.write(&[(1, 5), (19, 0)]);
        let before = populated();
        assert_eq!(before.iter().map(|w| w.count_ones()).sum::<u32>(), 2);
        subject.log.start().unwrap();
        assert_eq!(populated(), before, "{backing:?}: started");
        let dirty = PageBitmap::new(layout().chunks());
        subject.log.sync(&dirty).unwrap();
        assert!(dirty.is_empty());
        assert_eq!(populated(), before, "{backing:?}: synced");
        subject.write(&[(2, 0)]);
        subject.log.sync(&dirty).unwrap();
        assert_eq!(populated()[2], 1, "{backing:?}: written");
        subject.log.stop().unwrap();
        assert_eq!(populated().iter().map(|w| w.count_ones()).sum::<u32>(), 3, "{backing:?}: stopped");
    }
}

#[test]
fn reading_shared_memory_that_another_process_filled_is_not_reported() {
    let Some(subject) = tracked(&Backing::Memfd, true) else { return };
    let (fd, _) = subject.memory.fd_of(0).unwrap();
    let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, &[3; 4 * PAGE_SIZE], 0).unwrap();
    subject.log.start().unwrap();
    let mut page = [0u8; PAGE_SIZE];
    subject.memory.chunk(0).subslice(0, PAGE_SIZE).unwrap().copy_to(&mut page[..]);
    assert_eq!(page, [3; PAGE_SIZE]);
    subject.write(&[(0, 1)]);
    let dirty = PageBitmap::new(layout().chunks());
    subject.log.sync(&dirty).unwrap();
    assert_eq!(dirty.iter().collect::<Vec<_>>(), vec![(0, 0b10)]);
}

#[test]
fn misuse_is_an_error() {
    let Some(subject) = tracked(&Backing::Memfd, true) else { return };
    let text = subject.log.sync(&PageBitmap::new(layout().chunks())).unwrap_err().to_string();
    assert!(text.contains("not started"), "{text}");
    subject.log.start().unwrap();
    let text = subject.log.sync(&PageBitmap::new(3)).unwrap_err().to_string();
    assert!(text.contains("3 chunks"), "{text}");
    subject.log.stop().unwrap();
    assert!(subject.log.sync(&PageBitmap::new(layout().chunks())).is_err());

    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let memory = GuestMemory::open_ram_file(file.path(), false).unwrap();
    let text = UffdLog::new(Arc::new(memory)).unwrap_err().to_string();
    assert!(text.contains("static log"), "{text}");
}
