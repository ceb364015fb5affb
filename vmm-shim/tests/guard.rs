//! Guarded memory of every kind: what is copied slowly is of one moment, although all of it is written meanwhile, and no write is lost.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use common::AnonRam;
use pagecopy::backend::{BackendError, DirtyLog, Fault, GuardedPages, GuestRam};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{CHUNK_PAGES, CHUNK_SIZE, Layout, PAGE_SIZE, Region};
use testkit::{Rng, wait_until};
use vm_memory::{Bytes, ReadVolatile};
use vmm_shim::adapter::VmMemory;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::uffd_guard::{UffdGuard, check};
use vmm_shim::uffd_log::UffdLog;
use vmm_shim::vm_memory::{GuestAddress, GuestMemoryMmap};

const PATIENCE: Duration = Duration::from_secs(60);
const WRITERS: usize = 4;
const CHUNK: u64 = CHUNK_SIZE as u64;
const PAGE: u64 = PAGE_SIZE as u64;
/// Where a page has its stamp.
const PLACES: [usize; 3] = [0, 2048, PAGE_SIZE - 8];

/// Two regions, neither a multiple of a chunk, of which the first has room for two huge pages.
fn layout() -> Layout {
    Layout::new(vec![
        Region::new("low", 0, 17 * CHUNK + 9 * PAGE),
        Region::new("high", 1 << 32, 2 * CHUNK + PAGE),
    ])
    .unwrap()
}

fn memory(layout: Layout, backing: &Backing) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::create(layout, backing).unwrap())
}

/// A file in tmpfs; it is gone when this is.
fn file() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new_in("/dev/shm").unwrap()
}

/// Memory that a VMM has mapped itself.
struct Own(Arc<AnonRam>);

impl GuestRam for Own {
    fn layout(&self) -> &Layout {
        self.0.layout()
    }
    fn region(&self, region: usize) -> vm_memory::volatile_memory::VolatileSlice<'_> {
        self.0.region(region)
    }
    /// All that was ever touched, and so present.
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        self.0.populated(first, pages)
    }
    fn guard_check(&self) -> Result<(), BackendError> {
        check()
    }
    fn guard(self: Arc<Self>, pages: &PageBitmap) -> Result<Box<dyn GuardedPages>, BackendError> {
        Ok(Box::new(UffdGuard::over(self, pages)?))
    }
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        self.0.discard(chunk, pages)
    }
}

/// Whether this host guards memory at all; prints why not.
fn can(ram: &dyn GuestRam) -> bool {
    match ram.guard_check() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: {error}: {}", error.source);
            false
        }
    }
}

/// The pages that hold something.
fn populated(ram: &dyn GuestRam) -> PageBitmap {
    let mut words = vec![0; ram.layout().chunks() as usize];
    ram.populated(0, &mut words).unwrap();
    let pages = PageBitmap::new(ram.layout().chunks());
    (0..).zip(words).for_each(|(chunk, word)| {
        pages.insert(chunk, word);
    });
    pages
}

/// Ends a loop, also when a test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Memory, and who writes it.
struct World {
    ram: Arc<dyn GuestRam>,
    /// How often each page was written: its owner's alone.
    model: Vec<AtomicU64>,
    /// How many pages each writer has written.
    writes: [AtomicUsize; WRITERS],
    /// Held for writing, nobody writes: the guest is paused.
    gate: RwLock<()>,
    over: AtomicBool,
}

impl World {
    /// Three pages of four hold something, but for two chunks, of which nothing does.
    fn new(ram: Arc<dyn GuestRam>) -> Arc<Self> {
        let model = (0..ram.layout().chunks() as usize * CHUNK_PAGES).map(|_| AtomicU64::new(0)).collect();
        let world =
            Self { ram, model, writes: Default::default(), gate: RwLock::default(), over: false.into() };
        let holds = |id: &usize| id % 4 != 3 && ![5, 6].contains(&(id / CHUNK_PAGES));
        world.pages().into_iter().filter(holds).for_each(|id| world.write(id));
        Arc::new(world)
    }

    /// All pages, by number: 64 a chunk.
    fn pages(&self) -> Vec<usize> {
        let layout = self.ram.layout();
        let of =
            |chunk| bits(layout.valid(chunk)).map(move |bit| chunk as usize * CHUNK_PAGES + bit as usize);
        (0..layout.chunks()).flat_map(of).collect()
    }

    fn write(&self, id: usize) {
        let count = self.model[id].load(Ordering::Relaxed) + 1;
        let (chunk, at) = ((id / CHUNK_PAGES) as u32, id % CHUNK_PAGES * PAGE_SIZE);
        for place in PLACES {
            self.ram.chunk(chunk).write_obj((id as u64) << 32 | count, at + place).unwrap();
        }
        self.model[id].store(count, Ordering::Relaxed);
    }

    /// Starts threads, each of which writes pages of its own.
    fn start(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let write = |writer: usize| {
            let world = self.clone();
            move || {
                let mut random = Rng::new(writer as u64);
                let own: Vec<usize> =
                    world.pages().into_iter().filter(|id| id / 3 % WRITERS == writer).collect();
                while !world.over.load(Ordering::SeqCst) {
                    let _runs = world.gate.read().unwrap();
                    world.write(own[random.index(own.len())]);
                    world.writes[writer].fetch_add(1, Ordering::SeqCst);
                }
            }
        };
        (0..WRITERS).map(|writer| std::thread::spawn(write(writer))).collect()
    }

    /// Waits until each writer has written this many pages more.
    fn wait_writes(&self, what: &str, more: usize) {
        let now = || self.writes.each_ref().map(|writes| writes.load(Ordering::SeqCst));
        let before = now();
        wait_until(what, PATIENCE, || now().iter().zip(before).all(|(&now, before)| now >= before + more));
    }

    /// Fails where a page is not as it was after so many writes.
    fn check(&self, id: usize, count: u64, when: &str) {
        let (chunk, at) = ((id / CHUNK_PAGES) as u32, id % CHUNK_PAGES * PAGE_SIZE);
        let want = if count == 0 { 0 } else { (id as u64) << 32 | count };
        for place in PLACES {
            let word: u64 = self.ram.chunk(chunk).read_obj(at + place).unwrap();
            assert_eq!(word, want, "{when}: page {id}, at {place}");
        }
    }
}

/// A copy that is under way.
struct Copy<'a> {
    world: &'a World,
    guard: &'a dyn GuardedPages,
    pages: PageBitmap,
    /// How often each page was written when the guard began.
    moment: Vec<u64>,
    /// Chunks that somebody copies, or has.
    claimed: PageBitmap,
    copied: PageBitmap,
    faults: AtomicUsize,
    /// All was released.
    released: AtomicBool,
    over: AtomicBool,
}

impl Copy<'_> {
    fn chunk(&self, chunk: u32) {
        let pages = self.pages.get(chunk);
        if pages == 0 || self.claimed.insert(chunk, 1) == 0 {
            return;
        }
        for bit in bits(pages) {
            let id = chunk as usize * CHUNK_PAGES + bit as usize;
            self.world.check(id, self.moment[id], "while it is guarded");
        }
        std::thread::sleep(Duration::from_micros(300));
        for bit in bits(pages) {
            let id = chunk as usize * CHUNK_PAGES + bit as usize;
            self.world.check(id, self.moment[id], "after a while");
        }
        assert_eq!(self.copied.insert(chunk, pages), pages, "copied twice");
        self.guard.release(chunk, pages).unwrap();
    }

    /// Copies what is waited for.
    fn serve(&self) {
        let mut faults = Vec::new();
        while !self.over.load(Ordering::SeqCst) {
            let released = self.released.load(Ordering::SeqCst);
            self.guard.wait(&mut faults, Duration::from_millis(10)).unwrap();
            assert!(!released || faults.is_empty(), "stopped after all was released: {faults:?}");
            for fault in faults.drain(..) {
                assert!(self.pages.get(fault.chunk) >> fault.page & 1 != 0, "{fault:?} of a hole");
                self.chunk(fault.chunk);
                self.faults.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Copies one chunk of two, when somebody waits already.
    fn go_through(&self, odd: u32) {
        wait_until("somebody who waits", PATIENCE, || {
            self.faults.load(Ordering::SeqCst) > 0 || self.over.load(Ordering::SeqCst)
        });
        (0..self.pages.chunks()).filter(|chunk| chunk % 2 == odd).for_each(|chunk| self.chunk(chunk));
    }
}

/// Guards memory that is written all the while, copies it, and looks whether all was right.
fn keeps_the_moment(ram: Arc<dyn GuestRam>) {
    if !can(&*ram) {
        return;
    }
    let world = World::new(ram);
    let writers = {
        let _over = Over(&world.over);
        let writers = world.start();
        world.wait_writes("writes before the guard", 100);
        let paused = world.gate.write().unwrap();
        let pages = populated(&*world.ram);
        let moment = world.model.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let guard = world.ram.clone().guard(&pages).unwrap();
        let chunks = pages.chunks();
        let copy = Copy {
            world: &world,
            guard: &*guard,
            pages,
            moment,
            claimed: PageBitmap::new(chunks),
            copied: PageBitmap::new(chunks),
            faults: AtomicUsize::new(0),
            released: AtomicBool::new(false),
            over: AtomicBool::new(false),
        };
        drop(paused);
        std::thread::scope(|scope| {
            let _over = Over(&copy.over);
            scope.spawn(|| {
                let _over = Over(&copy.over);
                copy.serve();
            });
            let copiers = [0, 1].map(|odd| {
                let copy = &copy;
                scope.spawn(move || copy.go_through(odd))
            });
            copiers.into_iter().for_each(|copier| copier.join().unwrap());
            wait_until("the chunks that are copied for who waits", PATIENCE, || {
                copy.copied.count() == copy.pages.count()
            });
            copy.released.store(true, Ordering::SeqCst);
            world.wait_writes("writes after all was released", 1000);
        });
        assert_eq!(copy.copied.count_outside(&copy.pages), 0);
        guard.end().unwrap();
        world.wait_writes("writes after the end", 1000);
        writers
    };
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    for id in world.pages() {
        world.check(id, world.model[id].load(Ordering::Relaxed), "in the end");
    }
}

#[test]
fn anonymous_memory_keeps_the_moment() {
    keeps_the_moment(memory(layout(), &Backing::Anonymous { huge: false }));
}

#[test]
fn transparent_huge_pages_keep_the_moment() {
    keeps_the_moment(memory(layout(), &Backing::Anonymous { huge: true }));
}

#[test]
fn memfds_keep_the_moment() {
    keeps_the_moment(memory(layout(), &Backing::Memfd));
}

#[test]
fn files_in_tmpfs_keep_the_moment() {
    let file = file();
    keeps_the_moment(memory(layout(), &Backing::File { path: file.path().into(), create: true }));
}

#[test]
fn private_mappings_of_files_in_tmpfs_keep_the_moment() {
    let file = file();
    file.as_file().set_len(layout().bytes()).unwrap();
    keeps_the_moment(Arc::new(GuestMemory::open_ram_file(file.path(), false).unwrap()));
}

#[test]
fn huge_pages_of_hugetlbfs_keep_the_moment() {
    match GuestMemory::create(Layout::flat(8 << 20).unwrap(), &Backing::MemfdHuge) {
        Ok(memory) => keeps_the_moment(Arc::new(memory)),
        Err(error) => println!("skipped: {error}: {}", error.source),
    }
}

#[test]
fn memory_of_vm_memory_keeps_the_moment() {
    let ranges = layout().regions().iter().map(|r| (GuestAddress(r.gpa.unwrap()), r.len as usize)).collect();
    let ranges: Vec<_> = ranges;
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    keeps_the_moment(Arc::new(VmMemory::new(memory).unwrap()));
}

#[test]
fn memory_of_a_vmms_own_keeps_the_moment() {
    let own = AnonRam::new(layout());
    for chunk in 0..own.layout().chunks() {
        own.chunk(chunk).copy_from(&vec![0u8; own.chunk(chunk).len()][..]);
    }
    keeps_the_moment(Arc::new(Own(own)));
}

/// A page that is written by a thread of its own.
struct Write(JoinHandle<()>);

impl Write {
    fn start(ram: &Arc<dyn GuestRam>, chunk: u32, page: usize, value: u64) -> Self {
        let ram = ram.clone();
        Self(std::thread::spawn(move || ram.chunk(chunk).write_obj(value, page * PAGE_SIZE).unwrap()))
    }

    /// Waits until it was done, without anybody's help.
    fn ends(self) {
        wait_until("a write that nothing stops", PATIENCE, || self.0.is_finished());
        self.0.join().unwrap();
    }
}

/// Waits for a fault; of a hole there is none.
fn fault(guard: &dyn GuardedPages) -> Fault {
    let mut faults = Vec::new();
    wait_until("a fault", PATIENCE, || {
        guard.wait(&mut faults, Duration::from_millis(10)).unwrap();
        !faults.is_empty()
    });
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults[0]
}

/// Memory of small pages, all of which hold something.
fn small() -> Vec<Arc<dyn GuestRam>> {
    let of = |backing| {
        let memory = memory(layout(), &backing);
        memory.populate(0, memory.layout().chunks()).unwrap();
        memory as Arc<dyn GuestRam>
    };
    [Backing::Anonymous { huge: false }, Backing::Memfd].into_iter().map(of).collect()
}

#[test]
fn what_was_released_stops_nobody_and_what_was_not_does() {
    for ram in small() {
        if !can(&*ram) {
            return;
        }
        let guard = ram.clone().guard(&PageBitmap::full(ram.layout())).unwrap();
        guard.release(0, 0b0110).unwrap();
        // Nobody looks meanwhile.
        Write::start(&ram, 0, 1, 7).ends();
        Write::start(&ram, 0, 2, 7).ends();
        let waits = Write::start(&ram, 0, 3, 7);
        let told = fault(&*guard);
        assert_eq!((told.chunk, told.page), (0, 3));
        assert_eq!(ram.chunk(0).read_obj::<u64>(3 * PAGE_SIZE).unwrap(), 0);
        // Of others, and of no pages that the chunk has.
        guard.release(1, u64::MAX).unwrap();
        guard.release(0, !0b1110).unwrap();
        guard.release(17, u64::MAX).unwrap();
        assert!(!waits.0.is_finished());
        guard.release(0, u64::MAX).unwrap();
        waits.ends();
        for page in 0..CHUNK_PAGES {
            Write::start(&ram, 0, page, 9).ends();
        }
        // The last page of all is guarded, and nothing behind it is.
        let waits = Write::start(&ram, 20, 0, 7);
        let told = fault(&*guard);
        assert_eq!((told.chunk, told.page), (20, 0));
        guard.release(20, 1).unwrap();
        waits.ends();
    }
}

#[test]
fn the_end_lets_all_go_on_and_so_does_dropping() {
    for ends in [true, false] {
        for ram in small() {
            if !can(&*ram) {
                return;
            }
            let guard = ram.clone().guard(&PageBitmap::full(ram.layout())).unwrap();
            let waiting: Vec<_> = [0, 9, 16, 18].map(|chunk| Write::start(&ram, chunk, 1, 7)).into();
            let mut faults = Vec::new();
            // Whether the last of them was told of makes no difference.
            wait_until("faults", PATIENCE, || {
                guard.wait(&mut faults, Duration::from_millis(10)).unwrap();
                faults.len() >= 3
            });
            assert!(waiting.iter().all(|write| !write.0.is_finished()));
            if ends {
                guard.end().unwrap();
                guard.end().unwrap();
            } else {
                drop(guard);
            }
            waiting.into_iter().for_each(Write::ends);
            Write::start(&ram, 3, 3, 7).ends();
        }
    }
}

/// The kernel does not look whose protection it takes away.
#[test]
fn what_comes_after_the_end_leaves_another_guard_alone() {
    for ram in small() {
        if !can(&*ram) {
            return;
        }
        let all = PageBitmap::full(ram.layout());
        let first = ram.clone().guard(&all).unwrap();
        first.end().unwrap();
        let second = ram.clone().guard(&all).unwrap();
        first.release(0, u64::MAX).unwrap();
        drop(first);
        let waits = Write::start(&ram, 0, 0, 7);
        assert_eq!(fault(&*second).chunk, 0);
        second.release(0, 1).unwrap();
        waits.ends();
    }
}

#[test]
fn what_the_kernel_writes_on_behalf_of_this_process_waits_too() {
    for ram in small() {
        if !can(&*ram) {
            return;
        }
        let guard = ram.clone().guard(&PageBitmap::full(ram.layout())).unwrap();
        let reading = {
            let ram = ram.clone();
            std::thread::spawn(move || {
                let mut zeros = std::fs::File::open("/dev/zero").unwrap();
                ram.chunk(2).write_obj(7u64, 0).unwrap();
                zeros.read_exact_volatile(&mut ram.chunk(1)).unwrap();
            })
        };
        let told = fault(&*guard);
        assert_eq!((told.chunk, told.page), (2, 0));
        guard.release(2, 1).unwrap();
        let told = fault(&*guard);
        assert_eq!((told.chunk, told.page), (1, 0));
        guard.release(1, u64::MAX).unwrap();
        reading.join().unwrap();
    }
}

/// Between guarded pages there may be protected ones that nobody copies: holes of a file, and pages of private memory that were only read.
#[test]
fn whoever_writes_a_hole_is_let_go() {
    for backing in [Backing::Anonymous { huge: false }, Backing::Memfd] {
        let ram: Arc<dyn GuestRam> = memory(layout(), &backing);
        if !can(&*ram) {
            return;
        }
        [0, 2, 63].into_iter().for_each(|page| ram.chunk(3).write_obj(7u64, page * PAGE_SIZE).unwrap());
        assert_eq!(ram.chunk(3).read_obj::<u64>(PAGE_SIZE).unwrap(), 0);
        let pages = populated(&*ram);
        pages.remove(3, 0b10);
        let guard = ram.clone().guard(&pages).unwrap();
        let mut faults = Vec::new();
        for (chunk, page) in [(3, 1), (3, 5), (2, 0)] {
            let write = Write::start(&ram, chunk, page, 9);
            wait_until("the write", PATIENCE, || {
                guard.wait(&mut faults, Duration::from_millis(10)).unwrap();
                write.0.is_finished()
            });
        }
        assert_eq!(faults, []);
        let waits = Write::start(&ram, 3, 2, 9);
        assert_eq!(fault(&*guard).page, 2);
        guard.release(3, u64::MAX).unwrap();
        waits.ends();
    }
}

/// Kilobytes of transparent huge pages in the mapping that an address lies in, by proc_pid_smaps(5).
fn huge_kib(address: usize) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut within = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let range = range.and_then(|(from, to)| {
            Some(usize::from_str_radix(from, 16).ok()?..usize::from_str_radix(to, 16).ok()?)
        });
        within = range.map_or(within, |range| range.contains(&address));
        if let Some(rest) = line.strip_prefix("AnonHugePages:").filter(|_| within) {
            kib += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    kib
}

#[test]
fn a_huge_page_that_nobody_writes_stays_whole() {
    let memory = memory(layout(), &Backing::Anonymous { huge: true });
    memory.populate(0, memory.layout().chunks()).unwrap();
    let address = memory.region(0).ptr_guard_mut().as_ptr() as usize;
    let ram: Arc<dyn GuestRam> = memory;
    if huge_kib(address) != 4096 {
        return println!("skipped: this host has no transparent huge pages, or not now");
    }
    if !can(&*ram) {
        return;
    }
    let guard = ram.clone().guard(&PageBitmap::full(ram.layout())).unwrap();
    assert_eq!(huge_kib(address), 4096, "guarded as they are");
    // The first one is released in any order, the second one is written.
    for chunk in [0, 2, 4, 6, 7, 5, 3] {
        guard.release(chunk, u64::MAX).unwrap();
    }
    for chunk in [8, 9] {
        guard.release(chunk, u64::MAX).unwrap();
    }
    let waits = Write::start(&ram, 10, 5, 7);
    let told = fault(&*guard);
    assert_eq!((told.chunk, told.page), (10, 5));
    guard.release(10, u64::MAX).unwrap();
    waits.ends();
    // What had been released of it waits for the rest no longer; what had not is guarded.
    Write::start(&ram, 9, 0, 7).ends();
    let waits = Write::start(&ram, 11, 0, 7);
    assert_eq!(fault(&*guard).chunk, 11);
    guard.release(11, u64::MAX).unwrap();
    waits.ends();
    guard.release(1, u64::MAX).unwrap();
    Write::start(&ram, 0, 0, 7).ends();
    Write::start(&ram, 7, 63, 7).ends();
    (12..ram.layout().chunks()).for_each(|chunk| guard.release(chunk, u64::MAX).unwrap());
    guard.end().unwrap();
    // The kernel may have made the other one whole again.
    assert!(huge_kib(address) >= 2048, "{} KiB in huge pages", huge_kib(address));
}

#[test]
fn whoever_comes_before_a_huge_page_is_all_released_is_let_go() {
    let memory = memory(layout(), &Backing::Anonymous { huge: true });
    memory.populate(0, memory.layout().chunks()).unwrap();
    let ram: Arc<dyn GuestRam> = memory;
    if !can(&*ram) {
        return;
    }
    let guard = ram.clone().guard(&PageBitmap::full(ram.layout())).unwrap();
    guard.release(3, u64::MAX).unwrap();
    let write = Write::start(&ram, 3, 9, 7);
    let mut faults = Vec::new();
    wait_until("the write", PATIENCE, || {
        guard.wait(&mut faults, Duration::from_millis(10)).unwrap();
        write.0.is_finished()
    });
    assert_eq!(faults, [], "nobody has to copy anything for him");
}

#[test]
fn one_userfaultfd_at_a_time() {
    for backing in [Backing::Anonymous { huge: false }, Backing::Memfd] {
        let memory = memory(layout(), &backing);
        if !can(&*memory) {
            return;
        }
        let log = match UffdLog::new(memory.clone()) {
            Ok(log) => log,
            Err(error) => return println!("skipped: {error}: {}", error.source),
        };
        let all = PageBitmap::full(memory.layout());
        log.start().unwrap();
        let refused = memory.clone().guard(&all).err().expect("a log has it").to_string();
        assert!(refused.contains("low") && refused.contains("another userfaultfd"), "{refused}");
        log.stop().unwrap();
        let guard = memory.clone().guard(&all).unwrap();
        let refused = log.start().unwrap_err().to_string();
        assert!(refused.contains("low") && refused.contains("a guard"), "{refused}");
        guard.end().unwrap();
        log.start().unwrap();
    }
}

#[test]
fn memory_that_cannot_be_guarded_says_why() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let backing = Backing::File { path: folder.path().join("ram"), create: true };
    let on_disk = memory(layout(), &backing);
    let all = PageBitmap::full(on_disk.layout());
    match on_disk.guard_check() {
        Ok(()) => println!("skipped: the repository is on a tmpfs"),
        Err(error) => {
            assert!(error.what.contains("tmpfs") || error.what.contains("userfaultfd"), "{error}");
            assert!(on_disk.guard(&all).is_err());
        }
    }
    let none = AnonRam::new(layout());
    assert!(none.guard_check().unwrap_err().what.contains("cannot be guarded"));
    let memory = memory(layout(), &Backing::Memfd);
    if can(&*memory) {
        let error = memory.guard(&PageBitmap::new(3)).err().unwrap();
        assert!(error.what.contains("3 chunks"), "{error}");
    }
}

#[test]
fn memory_of_a_kind_that_the_kernel_refuses_is_refused_in_words() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let backing = Backing::File { path: folder.path().join("ram"), create: true };
    let on_disk = memory(layout(), &backing);
    if let Err(error) = check() {
        return println!("skipped: {error}: {}", error.source);
    }
    if on_disk.guard_check().is_ok() {
        return println!("skipped: the repository is on a tmpfs");
    }
    // Nobody asked what is behind it.
    let error = UffdGuard::over(on_disk, &PageBitmap::full(&layout())).err().unwrap().to_string();
    assert!(error.contains("low") && error.contains("memory of this kind"), "{error}");
}
