//! Guest memory of a VMM that is built on rust-vmm's vm-memory.

mod sys;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use pagecopy::backend::{BackendError, Claim, GuardedPages, GuestRam, MissingPages, Room, Unclaimed};
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};
use rustix::mm::Advice;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::holes::Pagemap;
use crate::mapped::{Mapped, is_private, memory_room, place_of};
use crate::ram_file::{Kind, kind_of_fd};
use crate::room::{self, Wanted};
use crate::uffd_guard::{self, Grain, UffdGuard};
use crate::uffd_missing::{self, MissingRam, UffdMissing};

/// What is behind a region.
#[derive(Debug)]
struct Backed {
    kind: Kind,
    /// The file, and the region's offset in it.
    file: Option<(File, u64)>,
    private: bool,
}

/// Guest memory of vm-memory (0.18, [`vm_memory`]) as the engine takes it: anonymous memory, memfds and files, mapped shared or
/// privately, in any mixture.
///
/// A region's name is `ram@` and its guest-physical address, in hexadecimal, unless it was given another. Both sides of a migration have
/// the same names and addresses.
///
/// The engine writes to memory without marking its bitmaps.
///
/// ```
/// use pagecopy::backend::GuestRam;
/// use vmm_shim::adapter::VmMemory;
/// use vmm_shim::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)])?;
/// memory.write_obj(7u64, GuestAddress(3 << 12))?;
/// let ram = VmMemory::new(memory)?;
/// assert_eq!(ram.layout().regions()[1].name, "ram@0x100000000");
/// let mut pages = [0; 8];
/// ram.populated(0, &mut pages)?;
/// assert_eq!(pages[0] & 0b1000, 0b1000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct VmMemory<M> {
    memory: M,
    layout: Layout,
    /// By region.
    backed: Vec<Backed>,
    pagemap: Option<Pagemap>,
}

impl<M: GuestMemoryBackend> VmMemory<M> {
    /// Takes guest memory as it is mapped. A [`GuestMemoryMmap`](vm_memory::GuestMemoryMmap) is a handle: give a clone.
    ///
    /// # Errors
    /// Regions that are no layout, such as one that is no whole number of pages of 4 KiB; memory that is not mapped in this process; and
    /// huge pages without a file.
    pub fn new(memory: M) -> Result<Self, BackendError> {
        Self::named(memory, |_, gpa| format!("ram@{gpa:#x}"))
    }

    /// The same, with the names of regions told by number, in the order of addresses, and guest-physical address.
    ///
    /// # Errors
    /// As of [`Self::new`], and names that are empty, too long, or given twice.
    pub fn named(memory: M, name: impl Fn(usize, u64) -> String) -> Result<Self, BackendError> {
        let region = |(index, r): (usize, &M::R)| {
            let gpa = r.start_addr().raw_value();
            Region::new(name(index, gpa), gpa, r.len())
        };
        let layout = Layout::new(memory.iter().enumerate().map(region).collect())
            .map_err(|e| BackendError::new("take vm-memory's regions", io::Error::other(e)))?;
        let backed = memory.iter().map(backed).collect::<Result<Vec<_>, _>>()?;
        let ascending =
            memory.iter().zip(layout.regions()).all(|(m, r)| Some(m.start_addr().raw_value()) == r.gpa);
        if !ascending {
            return Err(BackendError::invalid(
                "take vm-memory's regions: they are not in the order of their addresses",
            ));
        }
        Ok(Self { memory, layout, backed, pagemap: Pagemap::open().ok() })
    }

    /// The memory that was taken.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// A region, with what is behind it.
    fn mapped(&self, region: usize) -> Mapped<'_> {
        let Backed { kind, file, private } = &self.backed[region];
        let file = file.as_ref().map(|(file, offset)| (file.as_fd(), *offset));
        Mapped { memory: sys::whole(&self.memory, region), file, kind: *kind, private: *private }
    }

    /// What an operation on a run of pages failed at.
    fn failed(&self, what: &str, region: usize, offset: u64, len: u64, error: io::Error) -> BackendError {
        let name = &self.layout.regions()[region].name;
        BackendError::new(format!("{what} {len} bytes at {offset:#x} of region {name:?}"), error)
    }
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> VmMemory<M> {
    fn bring_run_in(&self, region: usize, offset: u64, len: u64) -> Result<(), BackendError> {
        self.mapped(region).bring_in(offset, len, Advice::LinuxPopulateWrite).map_err(|e| {
            let name = &self.layout.regions()[region].name;
            MissingRam::no_room(self, format!("bring {len} bytes in at {offset:#x} of region {name:?}"), e)
        })
    }
}

/// The file system of a region's file, without what it has left.
fn file_system() -> Room {
    let hint = "free some of it, mount it larger, or keep the memory elsewhere";
    Room { bytes: 0, of: "the file system of the guest's memory".into(), hint }
}

/// What is behind a region of vm-memory.
fn backed<R: GuestMemoryRegion>(region: &R) -> Result<Backed, BackendError> {
    let gpa = region.start_addr().raw_value();
    let failed = |what: &str, e: io::Error| BackendError::new(format!("{what} the region at {gpa:#x}"), e);
    let slice = region.as_volatile_slice().map_err(|e| failed("find the mapping of", io::Error::other(e)))?;
    let Some(file) = region.file_offset() else {
        if region.is_hugetlbfs() == Some(true) {
            return Err(BackendError::invalid(format!(
                "the region at {gpa:#x} is of huge pages without a file, of which nobody tells the size: use a memfd"
            )));
        }
        return Ok(Backed { kind: Kind::Anonymous, file: None, private: true });
    };
    let kind = kind_of_fd(file.file().as_fd()).map_err(|e| failed("ask for the file system of", e))?;
    let own = file.file().try_clone().map_err(|e| failed("keep the file of", e))?;
    let address = slice.ptr_guard_mut().as_ptr() as u64;
    Ok(Backed { kind, file: Some((own, file.start())), private: is_private(address) })
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> GuestRam for VmMemory<M> {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn region(&self, region: usize) -> VolatileSlice<'_> {
        sys::whole(&self.memory, region)
    }

    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        pages.fill(0);
        for span in self.layout.spans(first, pages.len())? {
            let (offset, len) = (span.bytes.start, span.bytes.end - span.bytes.start);
            self.mapped(span.region)
                .populated(self.pagemap.as_ref(), offset, len, &mut pages[span.words])
                .map_err(|e| self.failed("look for populated pages in", span.region, offset, len, e))?;
        }
        Ok(())
    }

    fn populates_ahead(&self) -> bool {
        !self.backed.iter().all(|b| matches!(b.kind, Kind::Shmem | Kind::Disk))
    }

    fn populate(&self, first: u32, count: u32) -> Result<(), BackendError> {
        self.layout
            .spans(first, count as usize)?
            .try_for_each(|s| self.bring_run_in(s.region, s.bytes.start, s.bytes.end - s.bytes.start))
    }

    fn bring_in(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let place = self.layout.locate(chunk).expect("chunk number was validated");
        if self.backed[place.region].kind == Kind::Anonymous {
            return Ok(());
        }
        runs(pages & place.valid()).try_for_each(|(first, count)| {
            let offset = place.offset + u64::from(first) * PAGE_SIZE as u64;
            self.bring_run_in(place.region, offset, u64::from(count) * PAGE_SIZE as u64)
        })
    }

    /// Of this host's memory, where any region is taken from that; else of the file system that has least.
    fn room(&self) -> Option<Room> {
        let of_file = |backed: &Backed| {
            let bytes = room::of_file(&backed.file.as_ref()?.0).ok()??;
            Some(Room { bytes, ..file_system() })
        };
        let of = |backed: &Backed| match backed.kind {
            Kind::Hugetlb(_) => None,
            Kind::Disk if !backed.private => of_file(backed),
            Kind::Anonymous | Kind::Disk => Some(memory_room()),
            Kind::Shmem => {
                let memory = memory_room();
                Some(of_file(backed).filter(|file| file.bytes <= memory.bytes).unwrap_or(memory))
            }
        };
        self.backed.iter().filter_map(of).min_by_key(|room| room.bytes)
    }

    /// All of it of each: how it comes in different kinds of memory nobody knows before.
    fn claim(&self, bytes: u64) -> Result<Option<Box<dyn Claim>>, Unclaimed> {
        let all = || self.backed.iter().filter(|b| !matches!(b.kind, Kind::Hugetlb(_)));
        let shared = || all().filter(|b| !b.private).filter_map(|b| Some(&b.file.as_ref()?.0));
        let of_memory = all().any(|b| b.private || b.kind != Kind::Disk).then(memory_room);
        let (grown, of_files) = (shared().collect(), shared().map(|file| (file, file_system())).collect());
        room::claim(&Wanted { bytes, of_memory, grown, of_files })
    }

    fn spare_bytes(&self) -> u64 {
        room::spare_memory_bytes()
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
        self.guard_grains().map(drop)
    }

    fn guard(self: Arc<Self>, pages: &PageBitmap) -> Result<Box<dyn GuardedPages>, BackendError> {
        let grains = self.guard_grains()?;
        Ok(Box::new(UffdGuard::of(self, |region| grains[region], pages)?))
    }

    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        let place = place_of(&self.layout, chunk, pages)?;
        runs(pages).try_for_each(|(first, count)| {
            let (offset, len) =
                (place.offset + u64::from(first) * PAGE_SIZE as u64, u64::from(count) * PAGE_SIZE as u64);
            self.mapped(place.region)
                .discard(offset, len)
                .map_err(|e| self.failed("discard", place.region, offset, len, e))
        })
    }

    fn persist(&self) -> Result<(), BackendError> {
        let on_disk = self.backed.iter().filter(|b| b.kind == Kind::Disk && !b.private);
        on_disk.filter_map(|b| b.file.as_ref()).try_for_each(|(file, _)| {
            // Pages dirtied through the shared mapping are dirty in the page cache, so fdatasync writes them too.
            file.sync_data().map_err(|e| BackendError::new("sync the guest's memory to its disk", e))
        })
    }
}

impl<M> VmMemory<M> {
    /// The bytes of a huge page where memory comes in no smaller pieces, else 0; or why the kernel cannot tell who touches a missing
    /// page of it.
    fn missing_bytes(&self) -> Result<u64, BackendError> {
        let unit = |backed: &Backed| match backed.kind {
            Kind::Anonymous => Ok(0),
            _ if backed.private => {
                Err("memory that is a private mapping of a file cannot be brought in while its guest runs")
            }
            Kind::Shmem => Ok(0),
            Kind::Hugetlb(size) => Ok(size),
            Kind::Disk => Err(
                "memory in a file on a disk cannot be brought in while its guest runs: keep it on a tmpfs or in a memfd",
            ),
        };
        let units: Vec<u64> =
            self.backed.iter().map(unit).collect::<Result<_, _>>().map_err(BackendError::invalid)?;
        match units.iter().find(|&&unit| unit != units[0]) {
            None => Ok(units[0]),
            Some(_) => Err(BackendError::invalid(
                "memory with pages of several sizes cannot be brought in while its guest runs",
            )),
        }
    }
}

impl<M> VmMemory<M> {
    /// How each region is guarded, or why the kernel cannot.
    fn guard_grains(&self) -> Result<Vec<Grain>, BackendError> {
        let holes = self.pagemap.is_some();
        self.backed.iter().map(|backed| uffd_guard::grain(backed.kind, backed.private, holes)).collect()
    }
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> MissingRam for VmMemory<M> {
    fn discard_run(&self, region: usize, offset: u64, len: u64) -> io::Result<()> {
        self.mapped(region).discard(offset, len)
    }

    fn no_room(&self, what: String, error: io::Error) -> BackendError {
        let in_file = self.backed.iter().all(|b| b.file.is_some() && !b.private);
        room::no_room(self, in_file, what, error)
    }
}
