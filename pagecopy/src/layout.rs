//! Guest-physical layout: regions, pages and chunks, and how they are numbered.
//!
//! Regions are numbered in the order of their guest-physical address; those without one follow, in the order of their names. Every
//! region is cut into *chunks* of
//! [`CHUNK_PAGES`] pages, counted from the region's start, and chunks are numbered through all regions. A page is named
//! by its chunk and its bit (0..64) in that chunk: so the dirty set of a chunk is one `u64`, and a whole guest's
//! dirty bitmap is a slice of words that matches KVM's per-slot bitmaps word for word.

use std::ops::Range;

/// Bytes in a page, the unit of dirtiness.
pub const PAGE_SIZE: usize = 4096;
/// Pages in a chunk, the unit of scheduling; one bitmap word.
pub const CHUNK_PAGES: usize = 64;
/// Bytes in a whole chunk (256 KiB).
pub const CHUNK_SIZE: usize = PAGE_SIZE * CHUNK_PAGES;
/// Most regions a layout may have.
pub const REGIONS_MAX: usize = 512;
/// Longest region name, in bytes of UTF-8.
pub const REGION_NAME_MAX: usize = 255;
/// Largest guest, in bytes (64 TiB): bounds every bitmap and table that is sized by a layout.
pub const GUEST_BYTES_MAX: u64 = 64 << 40;

/// A contiguous part of a guest's memory (QEMU: RAMBlock; KVM: memslot): known by its name, and by its address where it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Name, unique in a layout.
    pub name: String,
    /// Guest-physical address of the first byte, a multiple of [`PAGE_SIZE`]; `None` for memory that the guest does not see at any
    /// fixed address, such as a device's own or that of a program without a VM.
    pub gpa: Option<u64>,
    /// Length in bytes, a multiple of [`PAGE_SIZE`], not 0.
    pub len: u64,
}

impl Region {
    /// A region at a guest-physical address.
    pub fn new(name: impl Into<String>, gpa: u64, len: u64) -> Self {
        Self { name: name.into(), gpa: Some(gpa), len }
    }

    /// A region that is known by its name alone.
    pub fn unplaced(name: impl Into<String>, len: u64) -> Self {
        Self { name: name.into(), gpa: None, len }
    }

    /// The guest-physical addresses, where it has some.
    pub fn addresses(&self) -> Option<Range<u64>> {
        // Of a layout's regions none ends beyond 2^64.
        self.gpa.map(|gpa| gpa..gpa.saturating_add(self.len))
    }
}

/// Why a list of regions is not a layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region at all.
    #[error("the layout has no region")]
    Empty,
    /// More than [`REGIONS_MAX`].
    #[error("the layout has {count} regions; at most {REGIONS_MAX} are supported")]
    TooManyRegions {
        /// How many there were.
        count: usize,
    },
    /// An address or a length that is no multiple of the page size, or a length of 0.
    #[error(
        "region {name:?}: address {gpa:#x} and length {len:#x} must be multiples of {PAGE_SIZE}, and the length not 0"
    )]
    Misaligned {
        /// The region.
        name: String,
        /// Its address.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The region ends beyond 2^64, or the guest is larger than [`GUEST_BYTES_MAX`].
    #[error("region {name:?}: address {gpa:#x} plus length {len:#x} exceeds the supported guest size")]
    TooLarge {
        /// The region.
        name: String,
        /// Its address.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Two regions share addresses.
    #[error("regions {first:?} and {second:?} overlap")]
    Overlap {
        /// The lower one.
        first: String,
        /// The higher one.
        second: String,
    },
    /// Chunks that there are not.
    #[error("chunks {first}..{end} were asked for, but the layout has {chunks}")]
    NoChunks {
        /// The first one asked for.
        first: u32,
        /// One past the last one.
        end: u64,
        /// How many there are.
        chunks: u32,
    },
    /// A name that is empty, too long, or used twice.
    #[error("region name {name:?} is empty, longer than {REGION_NAME_MAX} bytes, or used twice")]
    BadName {
        /// The name.
        name: String,
    },
}

/// Where a chunk lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Index of the region in [`Layout::regions`].
    pub region: usize,
    /// Offset of the chunk's first byte in the region.
    pub offset: u64,
    /// Pages in the chunk: [`CHUNK_PAGES`], or fewer in the last chunk of a region.
    pub pages: usize,
}

impl ChunkPlace {
    /// The bits of this chunk that name a page.
    pub fn valid(&self) -> u64 {
        if self.pages == CHUNK_PAGES { u64::MAX } else { (1 << self.pages) - 1 }
    }
    /// Bytes in the chunk.
    pub fn bytes(&self) -> usize {
        self.pages * PAGE_SIZE
    }
}

/// A part of a region that a run of chunks covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of the region in [`Layout::regions`].
    pub region: usize,
    /// Offsets in the region, in bytes.
    pub bytes: Range<u64>,
    /// Which of the chunks that were asked for these are, counted from the first.
    pub words: Range<usize>,
}

/// A validated list of regions, with the numbering of chunks through them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
    /// First chunk of each region, and one past the last chunk at the end.
    first_chunk: Vec<u32>,
}

impl Layout {
    /// Validates `regions` (any order) and numbers their chunks.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > REGIONS_MAX {
            return Err(LayoutError::TooManyRegions { count: regions.len() });
        }
        regions.sort_by(|a, b| match (a.gpa, b.gpa) {
            (Some(a), Some(b)) => a.cmp(&b),
            (None, None) => a.name.cmp(&b.name),
            (a, b) => a.is_none().cmp(&b.is_none()),
        });
        let mut first_chunk = Vec::with_capacity(regions.len() + 1);
        let (mut chunk, mut total) = (0u32, 0u64);
        let page = PAGE_SIZE as u64;
        for (i, r) in regions.iter().enumerate() {
            let gpa = r.gpa.unwrap_or(0);
            if r.name.is_empty()
                || r.name.len() > REGION_NAME_MAX
                || regions[..i].iter().any(|o| o.name == r.name)
            {
                return Err(LayoutError::BadName { name: r.name.chars().take(REGION_NAME_MAX).collect() });
            }
            if r.len == 0 || r.len % page != 0 || gpa % page != 0 {
                return Err(LayoutError::Misaligned { name: r.name.clone(), gpa, len: r.len });
            }
            total = total.saturating_add(r.len);
            if gpa.checked_add(r.len).is_none() || total > GUEST_BYTES_MAX {
                return Err(LayoutError::TooLarge { name: r.name.clone(), gpa, len: r.len });
            }
            if let Some(before) = i.checked_sub(1).map(|b| &regions[b])
                && let (Some(of_before), Some(_)) = (before.addresses(), r.gpa)
                && of_before.end > gpa
            {
                return Err(LayoutError::Overlap { first: before.name.clone(), second: r.name.clone() });
            }
            first_chunk.push(chunk);
            // At most GUEST_BYTES_MAX / CHUNK_SIZE + REGIONS_MAX chunks: far below u32::MAX.
            chunk += r.len.div_ceil(CHUNK_SIZE as u64) as u32;
        }
        first_chunk.push(chunk);
        Ok(Self { regions, first_chunk })
    }

    /// A guest of one region, `ram`, that starts at address 0.
    pub fn flat(len: u64) -> Result<Self, LayoutError> {
        Self::new(vec![Region::new("ram", 0, len)])
    }

    /// The regions, by ascending address, and then those without one, by name.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Number of chunks in all regions; chunks are numbered from 0.
    pub fn chunks(&self) -> u32 {
        *self.first_chunk.last().unwrap_or(&0)
    }

    /// The chunks of one region.
    pub fn region_chunks(&self, region: usize) -> Range<u32> {
        self.first_chunk[region]..self.first_chunk[region + 1]
    }

    /// Bytes in all regions.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.len).sum()
    }

    /// Pages in all regions.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE as u64
    }

    /// Where a chunk lies, or `None` where there is no such chunk.
    pub fn locate(&self, chunk: u32) -> Option<ChunkPlace> {
        if chunk >= self.chunks() {
            return None;
        }
        let region = self.first_chunk.partition_point(|&first| first <= chunk) - 1;
        let offset = u64::from(chunk - self.first_chunk[region]) * CHUNK_SIZE as u64;
        let left = self.regions[region].len - offset;
        let pages = (left / PAGE_SIZE as u64).min(CHUNK_PAGES as u64) as usize;
        Some(ChunkPlace { region, offset, pages })
    }

    /// The parts of regions that `count` chunks from `first` make up.
    ///
    /// # Errors
    /// [`LayoutError::NoChunks`], where the layout has not so many.
    pub fn spans(&self, first: u32, count: usize) -> Result<impl Iterator<Item = Span> + '_, LayoutError> {
        let chunks = self.chunks();
        let end = u64::from(first) + count as u64;
        if end > u64::from(chunks) {
            return Err(LayoutError::NoChunks { first, end, chunks });
        }
        let end = end as u32;
        Ok(self.regions.iter().enumerate().filter_map(move |(region, r)| {
            let of_region = self.region_chunks(region);
            let (low, high) = (of_region.start.max(first), of_region.end.min(end));
            let byte = |chunk: u32| u64::from(chunk - of_region.start) * CHUNK_SIZE as u64;
            (low < high).then(|| Span {
                region,
                bytes: byte(low)..byte(high).min(r.len),
                words: (low - first) as usize..(high - first) as usize,
            })
        }))
    }

    /// The bits of `chunk` that name a page; 0 where there is no such chunk.
    pub fn valid(&self, chunk: u32) -> u64 {
        self.locate(chunk).map_or(0, |place| place.valid())
    }

    /// The region that has these bytes, at least one, and their offset in it; `None` where they do not lie in one region.
    pub fn find(&self, gpa: u64, len: u64) -> Option<(usize, u64)> {
        // Regions without an address are the last ones.
        let region =
            self.regions.partition_point(|r| r.gpa.is_some_and(|start| start <= gpa)).checked_sub(1)?;
        let of = self.regions[region].addresses()?;
        let end = gpa.checked_add(len)?;
        (of.contains(&gpa) && end <= of.end).then(|| (region, gpa - of.start))
    }

    /// The guest-physical address of a page; `None` where there is no such page, or its region has no address.
    pub fn address(&self, chunk: u32, bit: u32) -> Option<u64> {
        let place = self.locate(chunk).filter(|place| (bit as usize) < place.pages)?;
        Some(self.regions[place.region].gpa? + place.offset + u64::from(bit) * PAGE_SIZE as u64)
    }

    /// The chunk and bit of the page at a guest-physical address, if it lies in a region.
    pub fn page_at(&self, gpa: u64) -> Option<(u32, u32)> {
        let (region, offset) = self.find(gpa, 1)?;
        let page = offset / PAGE_SIZE as u64;
        Some((
            self.first_chunk[region] + (page / CHUNK_PAGES as u64) as u32,
            (page % CHUNK_PAGES as u64) as u32,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: &str, gpa: u64, len: u64) -> Region {
        Region::new(name, gpa, len)
    }

    #[test]
    fn numbers_chunks_through_regions() {
        let layout = Layout::new(vec![
            region("high", 1 << 32, 3 * CHUNK_SIZE as u64),
            region("low", 0, CHUNK_SIZE as u64 + 2 * PAGE_SIZE as u64),
        ])
        .unwrap();
        assert_eq!(layout.chunks(), 5);
        assert_eq!(layout.locate(0), Some(ChunkPlace { region: 0, offset: 0, pages: 64 }));
        assert_eq!(layout.locate(1), Some(ChunkPlace { region: 0, offset: CHUNK_SIZE as u64, pages: 2 }));
        assert_eq!(layout.valid(1), 0b11);
        assert_eq!(layout.locate(2), Some(ChunkPlace { region: 1, offset: 0, pages: 64 }));
        assert_eq!(layout.locate(5), None);
        assert_eq!(layout.page_at((1 << 32) + 65 * PAGE_SIZE as u64), Some((3, 1)));
        assert_eq!(layout.page_at(CHUNK_SIZE as u64 + 2 * PAGE_SIZE as u64), None);
        assert_eq!(layout.region_chunks(1), 2..5);
    }

    #[test]
    fn regions_without_an_address_are_the_last_ones() {
        let layout = Layout::new(vec![
            Region::unplaced("vram", 4096),
            region("ram", 1 << 32, 8192),
            Region::unplaced("rom", 4096),
        ])
        .unwrap();
        let names: Vec<&str> = layout.regions().iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["ram", "rom", "vram"]);
        assert_eq!(
            (layout.address(0, 1), layout.address(1, 0), layout.address(0, 2)),
            (Some((1 << 32) + 4096), None, None)
        );
        assert_eq!((layout.page_at(0), layout.page_at((1 << 32) + 4096)), (None, Some((0, 1))));
        assert_eq!(layout.find(1 << 32, 8192), Some((0, 0)));
        assert_eq!((layout.find(1 << 32, 8193), layout.find(u64::MAX, 2)), (None, None));
    }

    #[test]
    fn refuses_what_is_no_layout() {
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Empty));
        assert!(matches!(Layout::flat(4097), Err(LayoutError::Misaligned { .. })));
        assert!(matches!(Layout::flat(1 << 63), Err(LayoutError::TooLarge { .. })));
        assert!(matches!(
            Layout::new(vec![region("a", 0, 8192), region("b", 4096, 4096)]),
            Err(LayoutError::Overlap { .. })
        ));
        assert!(matches!(
            Layout::new(vec![region("a", 0, 4096), region("a", 4096, 4096)]),
            Err(LayoutError::BadName { .. })
        ));
        assert!(matches!(
            Layout::new(vec![region("a", u64::MAX - 4095, 8192)]),
            Err(LayoutError::TooLarge { .. })
        ));
    }
}
