//! The memory that an archive stands for: its newest frames, and what its bases have of the rest. Any chunk of it can be had at any time.

use std::path::Path;

use pagecopy::backend::StateBlob;
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::digest::{PageHasher, receipt};
use pagecopy::layout::{CHUNK_PAGES, Layout, PAGE_SIZE};
use pagecopy::xbzrle::Page;

use super::error::{ArchiveError, Damage, Place};
use super::format::Header;
use super::frames::Opener;
use super::reader::Archive;

/// Most archives that stand one on the other.
pub const CHAIN_MAX: usize = 64;

/// See the module.
pub struct Image {
    archive: Archive,
    /// Frames by chunk, of each chunk the oldest first. What an archive says of its guest's size costs no memory: its frames do.
    order: Vec<u32>,
    base: Option<Box<Self>>,
}

/// What is needed to read chunks; one for each thread.
pub struct ChunkReader {
    /// For the image, and then for its bases.
    openers: Vec<Opener>,
    content: Content,
}

/// What was read of a chunk.
pub struct Content {
    /// Pages with content, in `pages`.
    pub filled: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages that are not what was saved; they are in none of the others.
    pub damaged: u64,
    /// The content, by page of the chunk.
    pub pages: Box<[Page]>,
    /// Frames that cannot be read are pages that are damaged.
    forgiving: bool,
}

impl Content {
    /// Of these pages, those that are damaged, or are not what their seals say. A page that is in nothing here is zero.
    pub fn unlike(&self, pages: u64, hasher: &PageHasher, seal: impl Fn(u32) -> Option<u64>) -> u64 {
        let differs = |&bit: &u32| {
            let filled = self.filled >> bit & 1 != 0;
            let digest = if filled { hasher.page(&self.pages[bit as usize]) } else { hasher.zero() };
            seal(bit) != Some(receipt(digest))
        };
        let differ = bits(pages & !self.damaged).filter(differs);
        pages & self.damaged | differ.fold(0, |pages, bit| pages | 1 << bit)
    }
}

impl ChunkReader {
    /// The same, for what can still be had: a frame that cannot be read is no error then, but damages its pages.
    #[must_use]
    pub fn forgiving(mut self) -> Self {
        self.content.forgiving = true;
        self
    }
}

impl Image {
    /// Opens an archive and those that it stands on: `base`, or where it says itself.
    ///
    /// # Errors
    /// When one of them is none, is damaged, or is of another guest.
    pub fn open(path: &Path, base: Option<&Path>) -> Result<Self, ArchiveError> {
        Self::open_within(path, base, CHAIN_MAX)
    }

    fn open_within(path: &Path, base: Option<&Path>, chain_max: usize) -> Result<Self, ArchiveError> {
        let archive = Archive::open(path)?;
        let Some(said) = archive.header().base.clone() else { return Ok(Self::of(archive, None)) };
        let fail = |why: String| ArchiveError::Base { name: said.name.clone(), why };
        if chain_max == 0 {
            return Err(fail(format!("more than {CHAIN_MAX} archives stand one on the other")));
        }
        let named = path.parent().unwrap_or(Path::new("")).join(&said.name);
        let opened = Self::open_within(base.unwrap_or(&named), None, chain_max - 1);
        let opened = opened.map_err(|source| ArchiveError::BaseUnread {
            name: said.name.clone(),
            source: Box::new(source),
        })?;
        if opened.header().id != said.id {
            return Err(fail(format!("{} is another archive", opened.archive.path().display())));
        }
        if opened.layout() != archive.layout() {
            return Err(fail("it is of a guest with other memory".into()));
        }
        Ok(Self::of(archive, Some(Box::new(opened))))
    }

    fn of(archive: Archive, base: Option<Box<Self>>) -> Self {
        let entries = archive.entries();
        let frames = (0..).zip(entries).filter(|(_, entry)| entry.pages != 0);
        let mut order: Vec<u32> = frames.map(|(at, _)| at).collect();
        order.sort_by_key(|&at| entries[at as usize].chunk);
        Self { archive, order, base }
    }

    /// The archive.
    pub fn archive(&self) -> &Archive {
        &self.archive
    }

    /// What it stands on.
    pub fn base(&self) -> Option<&Self> {
        self.base.as_deref()
    }

    /// The archive's header.
    pub fn header(&self) -> &Header {
        self.archive.header()
    }

    /// The guest's memory.
    pub fn layout(&self) -> &Layout {
        self.archive.layout()
    }

    /// Device state.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn state(&self) -> Result<Vec<StateBlob>, ArchiveError> {
        self.archive.state()
    }

    /// Pages that are no holes.
    pub fn held(&self) -> PageBitmap {
        let held = PageBitmap::new(self.layout().chunks());
        for entry in self.archive.entries() {
            held.insert(entry.chunk, entry.pages);
        }
        held
    }

    /// Numbers of a chunk's frames, oldest first.
    pub fn frames_of(&self, chunk: u32) -> &[u32] {
        let of = |at: &u32| self.archive.entries()[*at as usize].chunk;
        let first = self.order.partition_point(|at| of(at) < chunk);
        let frames = &self.order[first..];
        &frames[..frames.partition_point(|at| of(at) == chunk)]
    }

    /// Seals of pages of a chunk, by page, and which of them are known.
    ///
    /// # Errors
    /// When the archive cannot be read, or a frame's header is damaged.
    pub fn seals(&self, chunk: u32, mut wanted: u64) -> Result<([u64; CHUNK_PAGES], u64), ArchiveError> {
        let (mut seals, mut known) = ([0; CHUNK_PAGES], 0);
        for &at in self.frames_of(chunk).iter().rev() {
            let entry = &self.archive.entries()[at as usize];
            if entry.pages & wanted == 0 {
                continue;
            }
            let (header, of_frame) = self.archive.head(entry)?;
            for (seal, bit) in of_frame.into_iter().zip(bits(header.pages())) {
                if wanted >> bit & 1 != 0 {
                    seals[bit as usize] = seal;
                }
            }
            known |= wanted & entry.pages;
            wanted &= !entry.pages;
        }
        Ok((seals, known))
    }

    /// What reads chunks of it.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn reader(&self) -> Result<ChunkReader, ArchiveError> {
        let depth = std::iter::successors(Some(self), |image| image.base()).count();
        let openers = (0..depth).map(|_| Opener::new()).collect::<Result<_, _>>();
        let openers = openers.map_err(|source| ArchiveError::Read { offset: 0, source })?;
        let pages = vec![[0; PAGE_SIZE]; CHUNK_PAGES].into_boxed_slice();
        Ok(ChunkReader {
            openers,
            content: Content { filled: 0, zero: 0, damaged: 0, pages, forgiving: false },
        })
    }

    /// Reads pages of a chunk. Those that it does not hold are in nothing of what is returned.
    ///
    /// # Errors
    /// When the archive cannot be read, or a frame's header is damaged; pages that are damaged are told of.
    pub fn read<'a>(
        &self,
        chunk: u32,
        pages: u64,
        reader: &'a mut ChunkReader,
    ) -> Result<&'a Content, ArchiveError> {
        let ChunkReader { openers, content } = reader;
        (content.filled, content.zero, content.damaged) = (0, 0, 0);
        self.read_into(chunk, pages, openers, content)?;
        Ok(content)
    }

    fn read_into(
        &self,
        chunk: u32,
        mut wanted: u64,
        openers: &mut [Opener],
        content: &mut Content,
    ) -> Result<(), ArchiveError> {
        let (opener, others) = openers.split_first_mut().expect("there is one for each archive of the chain");
        for &at in self.frames_of(chunk).iter().rev() {
            let entry = &self.archive.entries()[at as usize];
            let pages = entry.pages & wanted;
            if pages == 0 {
                continue;
            }
            wanted &= !pages;
            let opened = match self.archive.read(entry, opener) {
                Err(error) if content.forgiving && error.is_of_bytes() => {
                    content.damaged |= pages;
                    continue;
                }
                opened => opened?,
            };
            let whole = pages & !opened.damaged;
            content.damaged |= pages & opened.damaged;
            content.zero |= whole & opened.header.zero;
            for bit in bits(whole & opened.filled()) {
                let page = opened.page(bit).expect("a page that is whole is there");
                content.pages[bit as usize].copy_from_slice(page);
                content.filled |= 1 << bit;
            }
            let same = whole & opened.same();
            if same != 0 {
                let seals = std::array::from_fn(|bit| opened.seal(bit as u32));
                self.read_base(chunk, same, &seals, others, content)?;
            }
        }
        Ok(())
    }

    /// Reads pages that are as in the base, and compares them with what they were.
    fn read_base(
        &self,
        chunk: u32,
        same: u64,
        seals: &[Option<u64>; CHUNK_PAGES],
        openers: &mut [Opener],
        content: &mut Content,
    ) -> Result<(), ArchiveError> {
        let Some(base) = &self.base else {
            let why = "it is not there".into();
            return Err(ArchiveError::Base { name: String::new(), why });
        };
        base.read_into(chunk, same, openers, content)?;
        let unlike = content.unlike(same, self.archive.hasher(), |bit| seals[bit as usize]);
        content.damaged |= unlike;
        content.filled &= !unlike;
        content.zero &= !unlike;
        content.zero |= same & !content.filled & !content.damaged;
        Ok(())
    }

    /// The error of pages of a chunk that are damaged.
    pub fn damaged(&self, chunk: u32, pages: u64) -> ArchiveError {
        let entry = self.frames_of(chunk).iter().rev().map(|&at| &self.archive.entries()[at as usize]);
        let offset = entry.filter(|entry| entry.pages & pages != 0).map(|entry| entry.offset).next();
        ArchiveError::Damaged {
            offset: offset.unwrap_or_default(),
            place: Place::of(self.layout(), chunk, pages),
            source: Damage::Pages { pages },
        }
    }
}
