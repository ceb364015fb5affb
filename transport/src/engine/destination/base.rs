//! An older copy of the guest that is to come: an archive, or a RAM file. What is the same need not come again.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{CHUNK_PAGES, Layout, PAGE_SIZE};
use pagecopy::xbzrle::Page;

use super::IncomingError;
use crate::archive::ArchiveError;
use crate::archive::format::MAGIC;
use crate::archive::image::{ChunkReader, Image};
use crate::destination::{BaseCopy, BaseReader};
use crate::engine::explain;
use crate::local::{random, zeroed};

/// A file with an older copy of some guest.
pub(super) enum BaseFile {
    /// Of a guest that was saved.
    Archive(Arc<Image>),
    /// Its memory, region after region.
    Ram { file: Arc<File>, len: u64 },
}

impl BaseFile {
    /// Opens it.
    pub(super) fn open(path: &Path) -> Result<Self, IncomingError> {
        let fail = |why: String| IncomingError::Base { path: path.into(), why };
        let broken = |error: io::Error| fail(error.to_string());
        // Of a pipe this would wait for its other end, before it is known to be one.
        let mut file =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(broken)?;
        let data = file.metadata().map_err(broken)?;
        if !data.is_file() {
            return Err(fail("it is no regular file".into()));
        }
        let mut first = [0; MAGIC.len()];
        if file.read_exact(&mut first).is_ok() && first == MAGIC {
            let image = Image::open(path, None).map_err(|error| fail(explain(&error)))?;
            return Ok(Self::Archive(Arc::new(image)));
        }
        match data.len() {
            len if len != 0 && len.is_multiple_of(PAGE_SIZE as u64) => {
                Ok(Self::Ram { file: Arc::new(file), len })
            }
            len => Err(fail(format!("it is no archive, and with {len} bytes no RAM file"))),
        }
    }

    /// As a copy of a guest whose memory is laid out like this; or why it can be none.
    pub(super) fn fit(&self, layout: &Layout) -> Result<Arc<dyn BaseCopy>, String> {
        match self {
            Self::Archive(image) if image.layout() == layout => Ok(Arc::new(ArchiveCopy(image.clone()))),
            Self::Archive(_) => Err("it is of a guest with other memory".into()),
            Self::Ram { len, .. } if *len != layout.bytes() => {
                Err(format!("it has {len} bytes, and the guest {}", layout.bytes()))
            }
            Self::Ram { file, .. } => {
                Ok(Arc::new(RamCopy::new(file.clone(), layout).map_err(|e| e.to_string())?))
            }
        }
    }
}

/// An archive: its seals are those of the pages.
struct ArchiveCopy(Arc<Image>);

impl BaseCopy for ArchiveCopy {
    fn seed(&self) -> u64 {
        self.0.header().seed
    }

    fn seals(&self, chunk: u32) -> Result<(u64, [u64; CHUNK_PAGES]), String> {
        let (seals, known) = self.0.seals(chunk, u64::MAX).map_err(|error| explain(&error))?;
        let zero = receipt(self.0.archive().hasher().zero());
        let filled = bits(known).filter(|&bit| seals[bit as usize] != zero);
        Ok((filled.fold(0, |pages, bit| pages | 1 << bit), seals))
    }

    fn reader(self: Arc<Self>) -> io::Result<Box<dyn BaseReader>> {
        let reader = self.0.reader().map_err(|error| match error {
            ArchiveError::Read { source, .. } => source,
            other => io::Error::other(other),
        })?;
        Ok(Box::new(ArchiveReader { image: self.0.clone(), reader: reader.forgiving() }))
    }
}

struct ArchiveReader {
    image: Arc<Image>,
    reader: ChunkReader,
}

impl BaseReader for ArchiveReader {
    fn read(&mut self, chunk: u32, pages: u64) -> (u64, &[Page]) {
        // Whatever is not what its seal says is told of as damaged.
        match self.image.read(chunk, pages, &mut self.reader) {
            Ok(content) => (content.filled & pages, &content.pages),
            Err(_) => (0, &[]),
        }
    }
}

/// A RAM file. Its seals are made when they are asked for, and what is read later is held to them.
struct RamCopy {
    file: Arc<File>,
    layout: Layout,
    hasher: PageHasher,
    seed: u64,
    /// By chunk and page.
    seals: Box<[AtomicU64]>,
    sealed: PageBitmap,
}

impl RamCopy {
    fn new(file: Arc<File>, layout: &Layout) -> io::Result<Self> {
        let seed = u64::from_le_bytes(random()?);
        let seals = zeroed::<u64>(layout.chunks() as usize * CHUNK_PAGES)?;
        Ok(Self {
            file,
            layout: layout.clone(),
            hasher: PageHasher::new(seed),
            seed,
            seals: seals.into_iter().map(AtomicU64::new).collect(),
            sealed: PageBitmap::new(layout.chunks()),
        })
    }

    /// Reads all pages that a chunk has, from where they lie in the file.
    fn read(&self, chunk: u32, pages: &mut [Page]) -> io::Result<()> {
        let place = self.layout.locate(chunk).expect("chunks are those of the layout");
        let before: u64 = self.layout.regions()[..place.region].iter().map(|region| region.len).sum();
        let count = self.layout.valid(chunk).count_ones() as usize;
        self.file.read_exact_at(pages[..count].as_flattened_mut(), before + place.offset)
    }

    fn seal(&self, chunk: u32, bit: u32) -> &AtomicU64 {
        &self.seals[chunk as usize * CHUNK_PAGES + bit as usize]
    }
}

impl BaseCopy for RamCopy {
    fn seed(&self) -> u64 {
        self.seed
    }

    fn seals(&self, chunk: u32) -> Result<(u64, [u64; CHUNK_PAGES]), String> {
        let mut pages = vec![[0; PAGE_SIZE]; CHUNK_PAGES];
        self.read(chunk, &mut pages).map_err(|error| error.to_string())?;
        let (mut seals, mut filled) = ([0; CHUNK_PAGES], 0);
        for bit in bits(self.layout.valid(chunk)) {
            let digest = self.hasher.page(&pages[bit as usize]);
            if digest != self.hasher.zero() {
                seals[bit as usize] = receipt(digest);
                self.seal(chunk, bit).store(receipt(digest), Ordering::Relaxed);
                filled |= 1 << bit;
            }
        }
        self.sealed.insert(chunk, filled);
        Ok((filled, seals))
    }

    fn reader(self: Arc<Self>) -> io::Result<Box<dyn BaseReader>> {
        let pages = zeroed::<u8>(CHUNK_PAGES * PAGE_SIZE)?;
        Ok(Box::new(RamReader { copy: self, pages: pages.as_chunks().0.into() }))
    }
}

struct RamReader {
    copy: Arc<RamCopy>,
    pages: Box<[Page]>,
}

impl BaseReader for RamReader {
    fn read(&mut self, chunk: u32, pages: u64) -> (u64, &[Page]) {
        // A file that was cut short since has none.
        if self.copy.read(chunk, &mut self.pages).is_err() {
            return (0, &[]);
        }
        let is_as_sealed = |&bit: &u32| {
            let digest = self.copy.hasher.page(&self.pages[bit as usize]);
            receipt(digest) == self.copy.seal(chunk, bit).load(Ordering::Relaxed)
        };
        let asked = bits(pages & self.copy.sealed.get(chunk));
        (asked.filter(is_as_sealed).fold(0, |has, bit| has | 1 << bit), &self.pages)
    }
}
