//! Guest RAM as mappings of this process: private anonymous memory, a memfd, huge pages, or a file.
//!
//! This module owns every mapping of guest memory, and its `sys` all `unsafe` code about it. What leaves it is a
//! [`VolatileSlice`], which is bounds-checked and never a reference to bytes that a guest may write.
//!
//! Three things the kernel does that no return value can show, so that whoever picks a backing knows:
//! * A file that another process truncates while it is mapped here ends this process with SIGBUS at the next access. A
//!   memfd made here is sealed against that.
//! * So does a first write to a page of a file whose file system has no room left. Whoever fills memory has pages brought in
//!   first ([`GuestRam::bring_in`], placers), which fails instead; what a guest itself touches is in
//!   [`crate::lost_room`]'s hands.
//! * A private mapping of a file opened for reading keeps writes to itself; see [`GuestMemory::open_ram_file`].

mod files;
mod placer;
mod sys;

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pagecopy::backend::{BackendError, Claim, GuardedPages, GuestRam, MissingPages, Placer, Room, Unclaimed};
use pagecopy::bitmap::{PageBitmap, bits, runs};
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};
use pagecopy::zero::is_zero;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::Advice;
use vm_memory::volatile_memory::VolatileSlice;

use files::{Behind, kind_of_all};
use placer::UffdPlacer;
use sys::{HUGE_SIZE, Mapping};

use crate::lost_room::Watched;
use crate::mapped::{Mapped, memory_room, place_of};
use crate::pagemap::Pagemap;
use crate::ram_file::{Kind, check_huge_regions, create_file, memfd, open_file, require_regular};
use crate::room::{self, Wanted};
use crate::uffd_guard::{self, Grain, UffdGuard};
use crate::uffd_missing::{self, MissingRam, UffdMissing};

/// What guest memory is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous {
        /// Whether transparent huge pages are asked for; otherwise they are refused.
        huge: bool,
    },
    /// A new memfd of 4 KiB pages. It can be passed to other processes; see [`GuestMemory::fd_of`].
    Memfd,
    /// A new memfd of 2 MiB pages from the host's reserve (`/proc/sys/vm/nr_hugepages`).
    MemfdHuge,
    /// A file on any file system, hugetlbfs included.
    File {
        /// Its path.
        path: PathBuf,
        /// Whether the file is made, or emptied if it exists, and then set to the layout's size, so that it is all
        /// holes. Otherwise it must exist and have exactly the layout's size.
        create: bool,
    },
}

/// Guest RAM: one mapping a region. See the [module](self) for what it is made of.
///
/// ```
/// use pagecopy::backend::GuestRam;
/// use pagecopy::layout::{Layout, Region};
/// use vmm_shim::guest_memory::{Backing, GuestMemory};
///
/// let layout = Layout::new(vec![Region::new("ram", 0, 1 << 20), Region::unplaced("vram", 1 << 16)])?;
/// let memory = GuestMemory::create(layout, &Backing::Memfd)?;
/// memory.region(1).copy_from(&[7u8]);
/// // One word for each chunk of 64 pages: four of the first region, one of the second.
/// let mut pages = [0; 5];
/// memory.populated(0, &mut pages)?;
/// assert_eq!(pages, [0, 0, 0, 0, 1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Regions lie one after another in a file, in the order of the layout. Mappings lie at addresses that are equal to
/// the guest-physical ones modulo 2 MiB, so that KVM can map huge pages as such. They are not inherited by child
/// processes, which would make the kernel copy the guest's pages.
#[derive(Debug)]
pub struct GuestMemory {
    layout: Layout,
    kind: Kind,
    regions: Vec<Mapping>,
    /// The files behind the mappings; none where they are anonymous.
    files: Vec<Behind>,
    /// Whether they were made here, so that their directory entries must be made durable with them.
    created: bool,
    /// Whether a guest of another process has the files mapped: whatever stops who touches a page here does not stop it.
    others: bool,
    /// Whether files are mapped privately, so that writes stay in this process.
    private_file: bool,
    /// Where `/proc` is mounted, and only for memory that has private pages.
    pagemap: Option<Pagemap>,
    /// Who touches a page that cannot be had ends the process with a word.
    _watched: Vec<Watched>,
    /// Whether dense memory may be made of large pages that its file system would not grant by itself.
    enlarges: bool,
}

/// Why memory that others have mapped cannot miss pages, nor be guarded.
const OTHERS: &str = "the guest runs in another process, whose touches of this memory are not seen here";

impl GuestMemory {
    /// Makes or opens guest memory and maps it.
    ///
    /// # Errors
    /// When the system refuses, when a file is not what the layout needs, or when a huge page backing cannot hold the
    /// layout's regions; the text names the region or path, the sizes in bytes, and what to do.
    pub fn create(layout: Layout, backing: &Backing) -> Result<Self, BackendError> {
        let (file, path, created) = match backing {
            Backing::Anonymous { huge } => return Self::anonymous(layout, *huge),
            Backing::Memfd => (memfd(&layout, MemfdFlags::empty())?, None, false),
            Backing::MemfdHuge => {
                check_huge_regions(&layout, HUGE_SIZE)?;
                (memfd(&layout, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?, None, false)
            }
            Backing::File { path, create: true } => (create_file(path, &layout)?, Some(path.as_path()), true),
            Backing::File { path, create: false } => {
                let (file, len) = open_file(path, true)?;
                if len != layout.bytes() {
                    return Err(BackendError::invalid(format!(
                        "{}: the file has {len} bytes, but the layout {}; give the file that belongs to this guest",
                        path.display(),
                        layout.bytes()
                    )));
                }
                (file, Some(path.as_path()), false)
            }
        };
        Self::over_file(layout, file, path, created, false)
    }

    /// Opens a file as a guest of one region, `ram`, as long as the file.
    ///
    /// With `writable` false, the file is opened for reading only and mapped privately: what is written to the memory
    /// then stays in this process and never reaches the file, and [`discard`](GuestRam::discard) is refused.
    ///
    /// # Errors
    /// When the path is not a regular file, is empty, or its length is not a multiple of 4096 bytes.
    pub fn open_ram_file(path: &Path, writable: bool) -> Result<Self, BackendError> {
        let (file, len) = open_file(path, writable)?;
        let layout = Layout::flat(len).map_err(|e| {
            BackendError::new(format!("{}: no RAM file", path.display()), io::Error::other(e))
        })?;
        Self::over_file(layout, file, Some(path), false, !writable)
    }

    /// Opens a file as [`Self::open_ram_file`] does, to be read by a network adapter from where its pages lie.
    ///
    /// Registering a private mapping copies the file on some kernels, which take every registration for one to be written.
    /// So a file in memory is mapped shared where it may be opened for writing; nothing here writes it, but registering it
    /// moves its time of change. Files on a disk are mapped privately: there such a registration would write pages back.
    pub fn open_ram_file_to_register(path: &Path) -> Result<Self, BackendError> {
        match Self::open_ram_file(path, true) {
            Ok(shared) if shared.kind != Kind::Disk => Ok(shared),
            _ => Self::open_ram_file(path, false),
        }
    }

    /// Fails where [`Self::create`] could make no file: the folder does not exist or takes none, or something that is no
    /// regular file is in the way. Leaves everything as it was.
    pub fn check_ram_file_can_be_made(path: &Path) -> Result<(), BackendError> {
        let existed = path.symlink_metadata().is_ok();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| {
            let what = "cannot make the RAM file; choose a path in a folder that exists and may be written";
            BackendError::new(format!("{}: {what}", path.display()), e)
        })?;
        let regular = require_regular(path, &file);
        if !existed {
            // Where this fails the file stays, empty, as it would in the end.
            let _ = std::fs::remove_file(path);
        }
        regular.map(drop)
    }

    /// Lets dense memory of tmpfs files and memfds become large pages ([`GuestRam::enlarge`]), whatever the file system's policy
    /// on them is, where the kernel can (Linux 6.1). Whoever tracks writes to this memory by userfaultfd then sees 2 MiB where one
    /// page was written, so this is for memory that is only filled.
    #[must_use]
    pub fn enlarging(mut self) -> Self {
        self.enlarges = self.kind == Kind::Shmem && !self.private_file && collapse_works();
        self
    }

    /// The file behind a region (an index into `layout().regions()`) and the offset in bytes of the region in it, to
    /// pass to another process; `None` for anonymous memory and where there is no such region.
    pub fn fd_of(&self, region: usize) -> Option<(BorrowedFd<'_>, u64)> {
        let behind = self.files.iter().find(|behind| behind.regions.contains(&region))?;
        let before = &self.layout.regions()[behind.regions.start..region];
        Some((behind.file.as_fd(), before.iter().map(|r| r.len).sum()))
    }

    /// Whether pages are private to this process, so that its page table knows all of them.
    pub(crate) fn is_anonymous(&self) -> bool {
        self.kind == Kind::Anonymous
    }

    /// Whether the memory is a file that was opened for reading only.
    pub(crate) fn is_read_only_file(&self) -> bool {
        self.private_file
    }

    /// The addresses of a region's mapping in this process.
    pub(crate) fn host_range(&self, region: usize) -> Range<u64> {
        self.regions[region].range()
    }

    fn anonymous(layout: Layout, huge: bool) -> Result<Self, BackendError> {
        check_page_size()?;
        let mut regions = Vec::with_capacity(layout.regions().len());
        for region in layout.regions() {
            let mapping =
                Mapping::new(None, region.len, HUGE_SIZE, region.gpa.unwrap_or(0) % HUGE_SIZE, false)
                    .map_err(|e| mapping_error(&region.name, region.len, Kind::Anonymous, e))?;
            mapping.advise_size(huge);
            regions.push(mapping);
        }
        let pagemap = Pagemap::open().ok();
        Ok(Self {
            layout,
            kind: Kind::Anonymous,
            regions,
            files: Vec::new(),
            created: false,
            others: false,
            private_file: false,
            pagemap,
            _watched: Vec::new(),
            enlarges: false,
        })
    }

    /// Takes memory that is in files, each region in one of its own, from its beginning: memory that others have mapped, too, such as a
    /// VMM in another process.
    ///
    /// # Errors
    /// When a file is shorter than its region, is of another kind than the others (tmpfs or memfd, hugetlbfs, disk), or cannot be
    /// mapped; the text names it.
    pub fn of_files(regions: Vec<(Region, File, PathBuf)>) -> Result<Self, BackendError> {
        let mut files = Vec::new();
        let mut own = Vec::new();
        for (at, (region, file, path)) in regions.into_iter().enumerate() {
            let len = file.metadata().map(|meta| meta.len());
            let len =
                len.map_err(|e| BackendError::new(format!("{}: ask for its length", path.display()), e))?;
            if len < region.len {
                let (path, name) = (path.display(), &region.name);
                let what = format!(
                    "{path}: the file has {len} bytes, but the memory {name:?} that it is to hold {}",
                    region.len
                );
                return Err(BackendError::invalid(what));
            }
            own.push(region);
            files.push(Behind { file, path: Some(path), regions: at..at + 1 });
        }
        let memory = Self::over_files(Layout::new(own)?, files, false, false)?;
        Ok(Self { others: true, ..memory })
    }

    /// Makes holes of all of it, so that it reads as zeros, as new.
    ///
    /// # Errors
    /// Where the file system refuses, and of a file that is open for reading only.
    pub fn clear(&self) -> Result<(), BackendError> {
        if self.private_file {
            return Err(BackendError::invalid("clear memory: its file is open for reading only"));
        }
        for (index, region) in self.layout.regions().iter().enumerate() {
            let name = &region.name;
            self.mapped(index)
                .discard(0, region.len)
                .map_err(|e| BackendError::new(format!("make a hole of region {name:?}"), e))?;
        }
        Ok(())
    }

    fn over_file(
        layout: Layout,
        file: File,
        path: Option<&Path>,
        created: bool,
        private_file: bool,
    ) -> Result<Self, BackendError> {
        let regions = 0..layout.regions().len();
        let behind = Behind { file, path: path.map(Path::to_owned), regions };
        Self::over_files(layout, vec![behind], created, private_file)
    }

    fn over_files(
        layout: Layout,
        files: Vec<Behind>,
        created: bool,
        private_file: bool,
    ) -> Result<Self, BackendError> {
        check_page_size()?;
        let kind = kind_of_all(&files)?;
        let (align, skew_of): (u64, fn(u64) -> u64) = match kind {
            Kind::Hugetlb(size) => {
                check_huge_regions(&layout, size)?;
                (size, |_| 0)
            }
            _ => (HUGE_SIZE, |gpa| gpa % HUGE_SIZE),
        };
        let mut regions = Vec::with_capacity(layout.regions().len());
        let mut watched = Vec::new();
        for Behind { file, path, regions: own } in &files {
            let mut offset = 0;
            for region in &layout.regions()[own.clone()] {
                let skew = skew_of(region.gpa.unwrap_or(0));
                let mapping = Mapping::new(Some((file, offset)), region.len, align, skew, private_file)
                    .map_err(|e| mapping_error(&region.name, region.len, kind, e))?;
                if kind == Kind::Shmem {
                    // Dirtiness is tracked by pages of 4 KiB, which huge shmem pages would blur to 2 MiB. A tmpfs mounted
                    // with huge=always keeps huge pages all the same.
                    mapping.advise_size(false);
                }
                watched.extend(path.as_ref().and_then(|path| Watched::new(mapping.range(), path)));
                regions.push(mapping);
                offset += region.len;
            }
        }
        let pagemap = if private_file { Pagemap::open().ok() } else { None };
        Ok(Self {
            layout,
            kind,
            regions,
            files,
            created,
            others: false,
            private_file,
            pagemap,
            _watched: watched,
            enlarges: false,
        })
    }

    /// A region, with what is behind it.
    fn mapped(&self, region: usize) -> Mapped<'_> {
        Mapped {
            memory: self.regions[region].slice(),
            file: self.fd_of(region),
            kind: self.kind,
            private: self.private_file,
        }
    }

    /// Fails where the file system of a RAM file has not room for all of the guest, which would be stopped when it needs what
    /// there is not. Nothing is set aside: others may take the room later.
    pub fn require_room(&self) -> Result<(), BackendError> {
        let Some(room) = self.is_in_files().then(|| self.room()).flatten() else { return Ok(()) };
        let needed = self.layout.bytes();
        if room.bytes >= needed {
            return Ok(());
        }
        let Room { bytes, of, hint } = room;
        let what = format!("the guest's memory takes {needed} bytes, but {of} has {bytes} left: {hint}");
        Err(BackendError::new(what, io::Error::from(Errno::NOSPC)))
    }

    /// Fails where a page holds something other than zeros: memory that is to be filled is fresh. Pages that are holes are not touched.
    pub(crate) fn require_zeros(&self) -> Result<(), BackendError> {
        let mut populated = vec![0; self.layout.chunks() as usize];
        self.populated(0, &mut populated)?;
        let mut page = [0u8; PAGE_SIZE];
        for (chunk, pages) in (0..).zip(populated) {
            for bit in bits(pages) {
                let memory = self
                    .chunk(chunk)
                    .subslice(bit as usize * PAGE_SIZE, PAGE_SIZE)
                    .expect("a page that the chunk has");
                memory.copy_to(&mut page[..]);
                if !is_zero(&page) {
                    let region = self.layout.locate(chunk).map_or(0, |place| place.region);
                    let name = &self.layout.regions()[region].name;
                    return Err(BackendError::invalid(format!(
                        "memory {name:?} is not fresh, it holds something already: is it another guest's? start QEMU with a file of its own, \
                         made anew"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Brings a run of pages in.
    fn bring_run_in(&self, region: usize, offset: u64, len: u64, advice: Advice) -> Result<(), BackendError> {
        self.mapped(region).bring_in(offset, len, advice).map_err(|e| {
            let name = &self.layout.regions()[region].name;
            self.no_room(format!("bring {len} bytes in at {offset:#x} of region {name:?}"), e)
        })
    }

    /// The error of bringing memory in: says where there is no room, if that is why.
    pub(crate) fn no_room(&self, what: String, error: io::Error) -> BackendError {
        room::no_room(self, self.is_in_files(), what, error)
    }

    /// Whether the memory is in files that have paths.
    fn is_in_files(&self) -> bool {
        self.files.iter().any(|behind| behind.path.is_some())
    }

    /// What the fullest of the file systems of these files has left.
    fn room_of_files(&self) -> Option<Room> {
        let room = |behind: &Behind| {
            let bytes = room::of_file(&behind.file).ok()??;
            Some(Room { bytes, ..behind.file_system()? })
        };
        self.files.iter().filter_map(room).min_by_key(|room| room.bytes)
    }

    /// The bytes of a huge page where memory comes in no smaller pieces, else 0; or why the kernel cannot tell who touches a
    /// missing page of it.
    pub(crate) fn missing_bytes(&self) -> Result<u64, BackendError> {
        match self.kind {
            _ if self.others => Err(BackendError::invalid(OTHERS)),
            _ if self.private_file => Err(BackendError::invalid(
                "a RAM file that is open for reading only cannot be brought in while its guest runs",
            )),
            Kind::Anonymous | Kind::Shmem => Ok(0),
            Kind::Hugetlb(size) => Ok(size),
            Kind::Disk => Err(BackendError::invalid(
                "a RAM file on a disk cannot be brought in while its guest runs: keep it on a tmpfs or in a memfd",
            )),
        }
    }

    /// How it is guarded, or why the kernel cannot.
    fn guard_grain(&self) -> Result<Grain, BackendError> {
        if self.others {
            return Err(BackendError::invalid(OTHERS));
        }
        uffd_guard::grain(self.kind, self.private_file, self.pagemap.is_some())
    }
}

impl MissingRam for GuestMemory {
    fn discard_run(&self, region: usize, offset: u64, len: u64) -> io::Result<()> {
        self.mapped(region).discard(offset, len)
    }
    fn no_room(&self, what: String, error: io::Error) -> BackendError {
        self.no_room(what, error)
    }
}

impl GuestRam for GuestMemory {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.regions[region].slice()
    }

    /// Files and memfds: from the file system, so pages that other processes wrote count too; file systems other than
    /// tmpfs may tell data from holes by blocks larger than a page. Anonymous memory: from this process's page table.
    /// Memory of huge pages from hugetlbfs: all of it, unless nothing was ever touched.
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        pages.fill(0);
        for span in self.layout.spans(first, pages.len())? {
            let words = &mut pages[span.words.clone()];
            let (offset, len) = (span.bytes.start, span.bytes.end - span.bytes.start);
            let found = self.mapped(span.region).populated(self.pagemap.as_ref(), offset, len, words);
            found.map_err(|e| {
                let name = &self.layout.regions()[span.region].name;
                BackendError::new(
                    format!("look for populated pages in {:#x?} of region {name:?}", span.bytes),
                    e,
                )
            })?;
        }
        Ok(())
    }

    fn populates_ahead(&self) -> bool {
        // Small pages of a file cost more to bring in ahead of the data than along with it, and what is a hole at the
        // source would no longer be one here.
        !matches!(self.kind, Kind::Shmem | Kind::Disk)
    }

    fn populate(&self, first: u32, count: u32) -> Result<(), BackendError> {
        // Privately mapped huge pages would be copied whole by write faults.
        let advice = if self.private_file { Advice::LinuxPopulateRead } else { Advice::LinuxPopulateWrite };
        for span in self.layout.spans(first, count as usize)? {
            let (offset, len) = (span.bytes.start, span.bytes.end - span.bytes.start);
            self.bring_run_in(span.region, offset, len, advice)?;
        }
        Ok(())
    }

    /// Pages of files come in by a call that says when there is no room, where touching them would raise SIGBUS.
    fn bring_in(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        if self.kind == Kind::Anonymous || self.private_file {
            return Ok(());
        }
        let place = self.layout.locate(chunk).expect("chunk number was validated");
        for (first, count) in runs(pages & place.valid()) {
            let offset = place.offset + u64::from(first) * PAGE_SIZE as u64;
            let len = u64::from(count) * PAGE_SIZE as u64;
            self.bring_run_in(place.region, offset, len, Advice::LinuxPopulateWrite)?;
        }
        Ok(())
    }

    fn room(&self) -> Option<Room> {
        match self.kind {
            _ if self.private_file => None,
            Kind::Anonymous => Some(memory_room()),
            // Mapping it took its huge pages out of the reserve.
            Kind::Hugetlb(_) => None,
            Kind::Disk => self.room_of_files(),
            Kind::Shmem => {
                let memory = memory_room();
                Some(self.room_of_files().filter(|of_files| of_files.bytes <= memory.bytes).unwrap_or(memory))
            }
        }
    }

    fn claim(&self, bytes: u64) -> Result<Option<Box<dyn Claim>>, Unclaimed> {
        if self.private_file || matches!(self.kind, Kind::Hugetlb(_)) {
            return Ok(None);
        }
        let grown = self.files.iter().map(|behind| &behind.file).collect();
        let of_files =
            self.files.iter().filter_map(|behind| Some((&behind.file, behind.file_system()?))).collect();
        let of_memory = (self.kind != Kind::Disk).then(memory_room);
        room::claim(&Wanted { bytes, of_memory, grown, of_files })
    }

    /// Shared memory that is about to be filled may use huge pages, where its file system grants them to those who ask
    /// (`huge=advise`): it comes in, and is pinned, for a fraction of the cost.
    fn expect_filled(&self, first: u32, count: u32) {
        if self.kind != Kind::Shmem || self.private_file {
            return;
        }
        let Ok(spans) = self.layout.spans(first, count as usize) else { return };
        for span in spans {
            let (offset, len) = (span.bytes.start, span.bytes.end - span.bytes.start);
            // A hint that is not taken costs nothing but time.
            let _ = self.regions[span.region].advise(offset, len, Advice::LinuxHugepage);
        }
    }

    fn spare_bytes(&self) -> u64 {
        room::spare_memory_bytes()
    }

    fn enlarges(&self) -> bool {
        self.enlarges
    }

    fn enlarge(&self, first: u32, count: u32) -> bool {
        let Ok(mut spans) = self.layout.spans(first, count as usize) else { return false };
        self.enlarges
            && spans.all(|span| {
                let (mapping, len) = (&self.regions[span.region], span.bytes.end - span.bytes.start);
                mapping.collapse(span.bytes.start, len).is_ok()
            })
    }

    /// Only shared memory of 4 KiB pages has one: huge pages come in whole, and anonymous memory is populated ahead. Memory
    /// cannot be enlarged any more once it has a placer.
    fn placer(self: Arc<Self>) -> Option<Box<dyn Placer>> {
        if self.kind != Kind::Shmem || self.private_file {
            return None;
        }
        UffdPlacer::new(self).map(|placer| Box::new(placer) as Box<dyn Placer>)
    }

    fn missing_unit(&self) -> Result<u32, BackendError> {
        uffd_missing::check()?;
        Ok((self.missing_bytes()? / CHUNK_SIZE as u64) as u32)
    }

    fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        let unit = self.missing_bytes()?;
        Ok(Box::new(UffdMissing::of(self, unit, missing)?))
    }

    fn guard_check(&self) -> Result<(), BackendError> {
        uffd_guard::check()?;
        self.guard_grain().map(drop)
    }

    fn guard(self: Arc<Self>, pages: &PageBitmap) -> Result<Box<dyn GuardedPages>, BackendError> {
        let grain = self.guard_grain()?;
        Ok(Box::new(UffdGuard::of(self, |_| grain, pages)?))
    }

    /// Pages become holes, except parts of huge pages in hugetlbfs, and in file systems that cannot punch holes: there zeros
    /// are written.
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let place = place_of(&self.layout, chunk, pages)?;
        if self.private_file {
            return Err(BackendError::invalid(format!(
                "discard pages {pages:#x} of chunk {chunk}: the RAM file is open for reading only"
            )));
        }
        for (first, length) in runs(pages) {
            let offset = place.offset + u64::from(first) * PAGE_SIZE as u64;
            let len = u64::from(length) * PAGE_SIZE as u64;
            self.mapped(place.region).discard(offset, len).map_err(|e| {
                let name = &self.layout.regions()[place.region].name;
                BackendError::new(format!("discard {len} bytes at {offset:#x} of region {name:?}"), e)
            })?;
        }
        Ok(())
    }

    /// A file on a disk is synced, and so is the directory of one that was made here. Other memory has nothing
    /// durable.
    fn persist(&self) -> Result<(), BackendError> {
        if self.kind != Kind::Disk || self.private_file {
            return Ok(());
        }
        for Behind { file, path, .. } in &self.files {
            // Pages dirtied through the shared mapping are dirty in the page cache, so fdatasync writes them too.
            file.sync_data().map_err(|e| BackendError::new("sync the RAM file to its disk", e))?;
            let Some(path) = path.as_ref().filter(|_| self.created) else { continue };
            let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(dir)
                .and_then(|d| d.sync_all())
                .map_err(|e| BackendError::new(format!("sync the directory {}", dir.display()), e))?;
        }
        Ok(())
    }
}

/// Refuses hosts whose pages are not 4 KiB: there the unit of dirtiness is not the unit of mapping.
fn check_page_size() -> Result<(), BackendError> {
    let size = rustix::param::page_size();
    if size == PAGE_SIZE {
        return Ok(());
    }
    Err(BackendError::new(
        format!("this host has pages of {size} bytes; only hosts with pages of {PAGE_SIZE} are supported"),
        io::Error::from(io::ErrorKind::Unsupported),
    ))
}

/// The error of a mapping that was refused.
fn mapping_error(region: &str, len: u64, kind: Kind, e: io::Error) -> BackendError {
    let hint = match kind {
        Kind::Hugetlb(size) => format!(
            ": it takes {} free huge pages of {size} bytes; reserve them with /proc/sys/vm/nr_hugepages (or, for other \
             sizes than the default, in /sys/kernel/mm/hugepages), or use a backing of small pages",
            len.div_ceil(size)
        ),
        _ => String::new(),
    };
    BackendError::new(format!("map region {region:?}, {len} bytes{hint}"), e)
}

/// Whether this kernel makes large pages of shared memory on request.
fn collapse_works() -> bool {
    static WORKS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *WORKS.get_or_init(|| {
        let trial = || -> Result<bool, BackendError> {
            let layout = Layout::flat(HUGE_SIZE).map_err(|e| BackendError::invalid(e.to_string()))?;
            let memory = GuestMemory::create(layout, &Backing::Memfd)?;
            Ok(memory.regions[0].collapse(0, HUGE_SIZE).is_ok())
        };
        trial().unwrap_or(false)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_congruent_to_guest_addresses() {
        let layout =
            Layout::new(vec![Region::new("low", 0x10_0000, 0x30_0000), Region::new("high", 1 << 32, 0x1000)])
                .unwrap();
        for backing in [Backing::Anonymous { huge: true }, Backing::Memfd] {
            let memory = GuestMemory::create(layout.clone(), &backing).unwrap();
            assert_eq!(memory.host_range(0).start % HUGE_SIZE, 0x10_0000, "{backing:?}");
            assert_eq!(memory.host_range(1).start % HUGE_SIZE, 0, "{backing:?}");
        }
    }
}
