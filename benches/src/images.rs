//! RAM images to move, the same on every run: of one kind of content, or of what a guest's memory is made of.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

use rustix::fs::{FallocateFlags, SeekFrom};

use crate::Random;

/// The unit in which images are made, in bytes; their sizes are multiples of it.
pub const BLOCK_BYTES: usize = 1 << 20;
/// Of a sparse image one block in so many has content.
const SPARSE_ONE_IN: u64 = 8;
/// Words of a text.
const WORDS: usize = 4000;

/// What an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes that do not compress, in every page.
    Random,
    /// Zeros, in every page, and all of them allocated.
    Zero,
    /// One block in eight random, the rest holes.
    Sparse,
    /// Words, which zstd shrinks to about a third; no two blocks are alike.
    Text,
    /// Records of a pointer, whose high bytes are the same everywhere, two random bytes and zeros.
    Heap,
    /// Of ten blocks three holes, one zero, two heap, two text, two random.
    Mixed,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Random, Self::Zero, Self::Sparse, Self::Text, Self::Heap, Self::Mixed];

    fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Zero => "zero",
            Self::Sparse => "sparse",
            Self::Text => "text",
            Self::Heap => "heap",
            Self::Mixed => "mixed",
        }
    }

    /// What the block at `index` is made of; `None` is a hole.
    fn content(self, index: u64) -> Option<Self> {
        match self {
            Self::Sparse => index.is_multiple_of(SPARSE_ONE_IN).then_some(Self::Random),
            Self::Mixed => match index % 10 {
                0..=2 => None,
                3 => Some(Self::Zero),
                4 | 5 => Some(Self::Heap),
                6 | 7 => Some(Self::Text),
                _ => Some(Self::Random),
            },
            plain => Some(plain),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.map(Self::name).into();
            format!("{text:?} is none of {}", names.join(", "))
        })
    }
}

/// Makes an image of `length` bytes, replacing what is there. The same seed makes the same image.
///
/// # Errors
/// The system's, or that `length` is not a multiple of [`BLOCK_BYTES`].
pub fn make(path: &Path, kind: Kind, length: u64, seed: u64) -> io::Result<()> {
    if length == 0 || !length.is_multiple_of(BLOCK_BYTES as u64) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an image has a multiple of 1 MiB"));
    }
    let file = File::create(path)?;
    file.set_len(length)?;
    let words = words(seed);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|first| {
                let (file, words) = (&file, &words);
                scope.spawn(move || -> io::Result<()> {
                    let mut block = vec![0; BLOCK_BYTES];
                    for index in (first..length / BLOCK_BYTES as u64).step_by(threads as usize) {
                        if let Some(content) = kind.content(index) {
                            fill(&mut block, content, words, seed ^ (index << 20));
                            file.write_all_at(&block, index * BLOCK_BYTES as u64)?;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err(io::Error::other("a thread that makes the image panicked")))
        })
    })
}

fn words(seed: u64) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed ^ 0x776f_7264);
    let mut letter = |_| b'a' + random.below(26) as u8;
    (0..WORDS).map(|index| (0..2 + index % 9).map(&mut letter).collect()).collect()
}

/// Fills a block. `Sparse` and `Mixed` are made of the others and do not occur.
fn fill(block: &mut [u8], content: Kind, words: &[Vec<u8>], seed: u64) {
    let mut random = Random::new(seed);
    match content {
        Kind::Text => {
            let mut rest = block;
            while !rest.is_empty() {
                let word = &words[random.below(words.len())];
                let length = word.len().min(rest.len());
                rest[..length].copy_from_slice(&word[..length]);
                rest = &mut rest[length..];
                if let Some(space) = rest.first_mut() {
                    *space = b' ';
                    rest = &mut rest[1..];
                }
            }
        }
        Kind::Heap => {
            let base = 0x7f00_0000_0000 + (random.next_u64() >> 36);
            for record in block.chunks_exact_mut(16) {
                let noise = random.next_u64();
                record[..8].copy_from_slice(&(base + (noise >> 40)).to_le_bytes());
                record[8..].copy_from_slice(&(noise & 0xffff).to_le_bytes());
            }
        }
        Kind::Zero => block.fill(0),
        Kind::Random | Kind::Sparse | Kind::Mixed => {
            for word in block.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next_u64().to_le_bytes());
            }
        }
    }
}

/// Copies an image; holes stay holes.
///
/// # Errors
/// The system's.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let holes = Holes::of(from)?;
    let (source, file) = (File::open(from)?, File::create(to)?);
    file.set_len(holes.length)?;
    let mut block = vec![0; BLOCK_BYTES];
    for (start, end) in holes.data() {
        for at in (start..end).step_by(BLOCK_BYTES) {
            let piece = &mut block[..BLOCK_BYTES.min((end - at) as usize)];
            source.read_exact_at(piece, at)?;
            file.write_all_at(piece, at)?;
        }
    }
    Ok(())
}

/// Where an image has holes, so that they can be made again: a process that reads one through a shared mapping fills it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holes {
    /// Offset and length of each, in bytes.
    ranges: Vec<(u64, u64)>,
    length: u64,
}

impl Holes {
    /// Those of a file.
    ///
    /// # Errors
    /// The system's.
    pub fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < length {
            let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
                Ok(data) => data,
                // There is none any more.
                Err(rustix::io::Errno::NXIO) => length,
                Err(error) => return Err(error.into()),
            };
            if data > at {
                ranges.push((at, data - at));
            }
            at = if data < length { rustix::fs::seek(&file, SeekFrom::Hole(data))? } else { length };
        }
        Ok(Self { ranges, length })
    }

    /// Bytes of the file that are not in holes.
    pub fn data_bytes(&self) -> u64 {
        self.length - self.ranges.iter().map(|range| range.1).sum::<u64>()
    }

    /// Whether some of these bytes lie in no hole.
    pub fn has_data(&self, at: u64, length: u64) -> bool {
        let end = self.length.min(at.saturating_add(length));
        let holes =
            self.ranges.iter().map(|&(from, bytes)| (from + bytes).min(end).saturating_sub(from.max(at)));
        at < end && holes.sum::<u64>() < end - at
    }

    /// Start and end of what lies between them.
    fn data(&self) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let mut at = 0;
        for (offset, length) in self.ranges.iter().copied().chain([(self.length, 0)]) {
            if offset > at {
                found.push((at, offset));
            }
            at = offset + length;
        }
        found
    }

    /// Makes them again.
    ///
    /// # Errors
    /// The system's.
    pub fn restore(&self, path: &Path) -> io::Result<()> {
        let file = File::options().write(true).open(path)?;
        for (offset, length) in &self.ranges {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, punch, *offset, *length)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = BLOCK_BYTES as u64;

    fn image(kind: Kind, seed: u64) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        make(&path, kind, 20 * MIB, seed).unwrap();
        (folder, path)
    }

    #[test]
    fn images_hold_what_they_are_named_for() {
        for (kind, data, zero_pages) in [
            (Kind::Random, 20, 0),
            (Kind::Zero, 20, 20 * 256),
            (Kind::Sparse, 3, 17 * 256),
            (Kind::Text, 20, 0),
            (Kind::Heap, 20, 0),
            (Kind::Mixed, 14, 8 * 256),
        ] {
            let (_folder, path) = image(kind, 1);
            assert_eq!(Holes::of(&path).unwrap().data_bytes(), data * MIB, "{kind}");
            let bytes = std::fs::read(&path).unwrap();
            let zeros = bytes.chunks(4096).filter(|page| page.iter().all(|b| *b == 0)).count();
            assert_eq!((bytes.len() as u64, zeros), (20 * MIB, zero_pages), "{kind}");
        }
    }

    #[test]
    fn a_seed_decides_the_content() {
        for kind in [Kind::Random, Kind::Text, Kind::Mixed] {
            let (one, again) = (image(kind, 1), image(kind, 1));
            assert_eq!(std::fs::read(one.1).unwrap(), std::fs::read(again.1).unwrap());
        }
        let (one, two) = (image(Kind::Text, 1), image(Kind::Text, 2));
        assert_ne!(std::fs::read(one.1).unwrap(), std::fs::read(two.1).unwrap());
    }

    #[test]
    fn text_and_heap_compress_as_they_should() {
        let mut compress = pagecopy::compress::Compress::new();
        let mut out = vec![0; BLOCK_BYTES];
        let words = words(3);
        let mut shrinks = |kind| {
            let mut block = vec![0; BLOCK_BYTES];
            fill(&mut block, kind, &words, 5);
            let chunks = block.chunks(256 << 10);
            let sizes = chunks.map(|chunk| compress.compress(1, chunk, &mut out).unwrap_or(chunk.len()));
            BLOCK_BYTES as f64 / sizes.sum::<usize>() as f64
        };
        let (text, heap) = (shrinks(Kind::Text), shrinks(Kind::Heap));
        assert!((2.0..4.0).contains(&text), "{text}");
        assert!((2.0..5.0).contains(&heap), "{heap}");
        assert!(shrinks(Kind::Random) < 1.01);
    }

    #[test]
    fn holes_that_were_filled_can_be_made_again() {
        let (_folder, path) = image(Kind::Mixed, 1);
        let holes = Holes::of(&path).unwrap();
        let before = std::fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&vec![0; 2 * BLOCK_BYTES], MIB / 2).unwrap();
        assert_ne!(Holes::of(&path).unwrap(), holes);
        file.write_all_at(&before[2 * BLOCK_BYTES..4 * BLOCK_BYTES], 2 * MIB).unwrap();
        holes.restore(&path).unwrap();
        assert_eq!(Holes::of(&path).unwrap(), holes);
        assert_eq!(std::fs::read(&path).unwrap(), before);
        let again = path.with_extension("copy");
        copy(&path, &again).unwrap();
        assert_eq!(Holes::of(&again).unwrap(), holes);
        assert_eq!(std::fs::read(&again).unwrap(), before);
    }

    #[test]
    fn odd_sizes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(make(&folder.path().join("image"), Kind::Zero, MIB + 1, 1).is_err());
        assert!("sparse".parse::<Kind>() == Ok(Kind::Sparse) && "none".parse::<Kind>().is_err());
    }
}
