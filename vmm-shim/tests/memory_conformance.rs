//! The conformance suite over userfaultfd tracking of every kind of memory, and over trackers that are broken on
//! purpose.

use std::io::{Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pagecopy::backend::{BackendError, DirtyLog, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};
use vm_memory::ReadVolatile;
use vmm_shim::conformance::{Page, Subject, check};
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::uffd_log::UffdLog;

/// Two regions, neither a multiple of a chunk, of which the first can hold huge pages.
fn layout() -> Layout {
    let (chunk, page) = (CHUNK_SIZE as u64, PAGE_SIZE as u64);
    Layout::new(vec![
        Region { name: "low".into(), gpa: 0, len: 17 * chunk + 9 * page },
        Region { name: "high".into(), gpa: 1 << 32, len: 2 * chunk + page },
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
    check(&subject);
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
        Ok(log) => check(&Written { memory, log, counter: AtomicU64::new(0), exact: false }),
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

/// How a tracker is broken.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Every hundredth page is not reported.
    Loses,
    /// Each report holds a page that was not written.
    Invents,
    /// The pages before `start` are reported.
    StartsFull,
    /// `sync` sets the bitmap instead of adding to it.
    Overwrites,
    /// What is written between `sync` and `clear` is forgotten with the whole chunk.
    ClearsTooMuch,
    /// What is written while `sync` runs is forgotten.
    RacesSync,
}

/// A tracker with a fault.
struct Broken {
    inner: UffdLog,
    fault: Fault,
    started: AtomicBool,
    seen: AtomicU64,
}

impl DirtyLog for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn start(&self) -> Result<(), BackendError> {
        self.started.store(true, Ordering::Relaxed);
        self.inner.start()
    }
    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        let found = PageBitmap::new(dirty.chunks());
        self.inner.sync(&found)?;
        if self.fault == Fault::RacesSync {
            for _ in 0..200 {
                self.inner.sync(&PageBitmap::new(dirty.chunks()))?;
            }
        }
        if self.fault == Fault::Invents {
            found.insert(3, 1 << 11);
        }
        if self.fault == Fault::StartsFull && self.started.swap(false, Ordering::Relaxed) {
            found.insert(0, u64::MAX);
        }
        if self.fault == Fault::Overwrites {
            for (chunk, word) in dirty.iter() {
                dirty.remove(chunk, word);
            }
        }
        for (chunk, word) in found.iter() {
            let number = self.seen.fetch_add(1, Ordering::Relaxed);
            if self.fault == Fault::Loses && number % 100 == 99 {
                continue;
            }
            dirty.insert(chunk, word);
        }
        Ok(found.count())
    }
    fn clear(&self, _first: u32, _pages: &[u64]) -> Result<(), BackendError> {
        if self.fault == Fault::ClearsTooMuch {
            // A sync whose result is thrown away.
            self.inner.sync(&PageBitmap::new(layout().chunks()))?;
        }
        Ok(())
    }
    fn stop(&self) -> Result<(), BackendError> {
        self.inner.stop()
    }
}

#[test]
fn the_suite_finds_broken_trackers() {
    for (fault, part) in [
        (Fault::Loses, "not reported"),
        (Fault::Invents, "nothing was written since start"),
        (Fault::StartsFull, "nothing was written since start"),
        (Fault::Overwrites, "must add to the bitmap"),
        (Fault::ClearsTooMuch, "not reported"),
        (Fault::RacesSync, "differ from memory"),
    ] {
        let Some(Written { memory, log, .. }) = tracked(&Backing::Memfd, true) else { return };
        let log = Broken { inner: log, fault, started: AtomicBool::new(false), seen: AtomicU64::new(0) };
        let subject = Written { memory, log, counter: AtomicU64::new(0), exact: true };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&subject)));
        let panic = result.expect_err("a broken tracker must not pass");
        let text = panic.downcast_ref::<String>().map_or("", String::as_str);
        assert!(text.contains(part), "found, but as: {text}");
    }
}
