//! zstd of a chunk's pages, with contexts that are reused, and a cheap guess whether it is worth trying.

#[allow(unsafe_code)]
mod sys;

use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

use self::sys::Behind;
use crate::layout::PAGE_SIZE;

/// Bytes looked at in each of [`SAMPLES`] places of a page.
const SAMPLE_BYTES: usize = 32;
/// Places of a page that are sampled.
const SAMPLES: usize = 4;
/// A page is taken for compressible when its samples hold at most this many different bytes. Of 128 random bytes,
/// 101 differ on average, and fewer than 90 in one page of several hundred.
const DISTINCT_MAX: u32 = 89;

/// What every dictionary begins with, so that zstd takes it for content as it is: one that begins with zstd's magic number would be
/// read as tables.
pub const RAW_CONTENT: [u8; 8] = [0; 8];
/// The lowest level that can be asked for.
pub const LEVEL_MIN: i32 = -100;
/// The highest level that can be asked for: more only costs, as a chunk is small.
pub const LEVEL_MAX: i32 = 19;

/// Why bytes are no compressed form of the announced pages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecompressError {
    /// The bytes are not one zstd frame with nothing after it.
    #[error("{bytes} bytes of compressed pages are not exactly one zstd frame")]
    NotOneFrame {
        /// How many there were.
        bytes: usize,
    },
    /// The frame says that it holds another number of bytes, or does not say how many.
    #[error("the zstd frame announces {announced:?} bytes of content where the pages have {expected}")]
    WrongSize {
        /// What it says.
        announced: Option<u64>,
        /// What the announced pages take.
        expected: usize,
    },
    /// The frame's content is damaged.
    #[error("the zstd frame of {bytes} bytes does not decompress: {reason}")]
    Damaged {
        /// Length of the frame.
        bytes: usize,
        /// The decoder's word on it.
        reason: String,
    },
}

/// A compressor with its contexts; one a worker.
pub struct Compress {
    context: CCtx<'static>,
    level: Option<i32>,
    behind: Behind,
}

impl std::fmt::Debug for Compress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compress").field("level", &self.level).finish_non_exhaustive()
    }
}

impl Default for Compress {
    fn default() -> Self {
        Self::new()
    }
}

impl Compress {
    /// A compressor; its contexts grow with their first use.
    pub fn new() -> Self {
        Self { context: CCtx::create(), level: None, behind: Behind::new() }
    }

    /// Compresses `source` into one frame at the start of `frame`; returns its length, or `None` where it does not fit
    /// (or where the library refuses, which it does only when it finds no memory). `level` is brought into
    /// [`LEVEL_MIN`]`..=`[`LEVEL_MAX`].
    /// The frame says the size of its content and carries no checksum: the section that it travels in has one.
    pub fn compress(&mut self, level: i32, source: &[u8], frame: &mut [u8]) -> Option<usize> {
        let level = level.clamp(LEVEL_MIN, LEVEL_MAX);
        if self.level != Some(level) {
            self.context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
            self.level = Some(level);
        }
        self.context.compress2(frame, source).ok()
    }

    /// The same of what follows the first `dictionary` bytes of `content`. What is in these need not be in the frame; they begin with
    /// [`RAW_CONTENT`]. Lying one behind the other, both are searched as one, which is a quarter faster.
    ///
    /// # Panics
    /// When `content` is shorter than its dictionary.
    pub fn compress_behind(
        &mut self,
        level: i32,
        content: &[u8],
        dictionary: usize,
        frame: &mut [u8],
    ) -> Option<usize> {
        self.behind.compress(level.clamp(LEVEL_MIN, LEVEL_MAX), content, dictionary, frame)
    }
}

/// A decompressor with its context; one a worker.
pub struct Decompress {
    context: DCtx<'static>,
}

impl std::fmt::Debug for Decompress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompress").finish_non_exhaustive()
    }
}

impl Default for Decompress {
    fn default() -> Self {
        Self::new()
    }
}

impl Decompress {
    /// A decompressor.
    pub fn new() -> Self {
        Self { context: DCtx::create() }
    }

    /// Decompresses one frame that must fill `content` exactly and was made with this dictionary. Nothing is allocated by what the
    /// frame says; after an error `content` is undefined.
    pub fn decompress(
        &mut self,
        dictionary: &[u8],
        frame: &[u8],
        content: &mut [u8],
    ) -> Result<(), DecompressError> {
        let not_one = || DecompressError::NotOneFrame { bytes: frame.len() };
        if zstd_safe::find_frame_compressed_size(frame).map_err(|_| not_one())? != frame.len() {
            return Err(not_one());
        }
        let expected = content.len();
        let announced = zstd_safe::get_frame_content_size(frame).map_err(|_| not_one())?;
        if announced != Some(expected as u64) {
            return Err(DecompressError::WrongSize { announced, expected });
        }
        match self.context.decompress_using_dict(content, frame, dictionary) {
            Ok(length) if length == expected => Ok(()),
            Ok(length) => Err(DecompressError::WrongSize { announced: Some(length as u64), expected }),
            Err(code) => {
                let reason = zstd_safe::get_error_name(code).into();
                Err(DecompressError::Damaged { bytes: frame.len(), reason })
            }
        }
    }
}

/// Whether a page looks as if zstd could shrink it: few different bytes in a few samples of it.
///
/// It errs on repetitions of random bytes, which zstd would find and this does not; they are rare in memory, and being
/// wrong costs only bytes.
pub fn looks_compressible(page: &[u8; PAGE_SIZE]) -> bool {
    let mut seen = [0u8; 256];
    for sample in 0..SAMPLES {
        // Uneven places, so that records of a power of two are not met at the same field each time.
        let start = sample * (PAGE_SIZE / SAMPLES) + sample * 72 + 200;
        for &byte in &page[start..start + SAMPLE_BYTES] {
            seen[usize::from(byte)] = 1;
        }
    }
    seen.iter().map(|&s| u32::from(s)).sum::<u32>() <= DISTINCT_MAX
}

#[cfg(test)]
mod tests {
    use testkit::Rng;

    use super::*;

    fn random_bytes(seed: u64) -> impl Iterator<Item = u8> {
        let mut rng = Rng::new(seed);
        std::iter::repeat_with(move || rng.next() as u8)
    }

    fn page(bytes: impl Iterator<Item = u8>) -> [u8; PAGE_SIZE] {
        let bytes: Vec<u8> = bytes.take(PAGE_SIZE).collect();
        bytes.try_into().expect("the source does not end before a page")
    }

    #[test]
    fn guesses_right() {
        let compressible = (0..1000).filter(|&seed| looks_compressible(&page(random_bytes(seed)))).count();
        assert!(compressible <= 15, "{compressible} of 1000 random pages");
        let text = include_bytes!("compress.rs");
        let text_pages = text.as_chunks::<PAGE_SIZE>().0;
        assert!(!text_pages.is_empty() && text_pages.iter().all(looks_compressible));
        let mut random = random_bytes(5);
        // Like a heap: pointers of one arena, small integers and zeros.
        let heap: Vec<u8> = (0..512u64)
            .flat_map(|i| {
                let noise =
                    u64::from(random.next().unwrap_or(0)) << 8 | u64::from(random.next().unwrap_or(0));
                match i % 4 {
                    0 => 0x7f31_aa00_0000 + noise * 16,
                    1 => noise % 100,
                    2 => 0,
                    _ => 0x5555_0000_1000 + noise,
                }
                .to_le_bytes()
            })
            .collect();
        assert!(looks_compressible(&page(heap.into_iter())));
        let sparse = page((0..PAGE_SIZE).map(|i| if i % 97 == 0 { i as u8 } else { 0 }));
        assert!(looks_compressible(&sparse));
    }

    #[test]
    fn round_trips_at_every_kind_of_level() {
        let source: Vec<u8> =
            include_bytes!("compress.rs").iter().copied().cycle().take(8 * PAGE_SIZE).collect();
        let (mut compress, mut decompress) = (Compress::new(), Decompress::new());
        for level in [LEVEL_MIN, -7, -1, 0, 1, 3, LEVEL_MAX, i32::MAX, i32::MIN] {
            let mut frame = vec![0; source.len()];
            let length = compress.compress(level, &source, &mut frame).unwrap();
            let mut content = vec![0; source.len()];
            decompress.decompress(&[], &frame[..length], &mut content).unwrap();
            assert!(content == source, "level {level}");
        }
        assert_eq!(compress.compress(1, &source, &mut [0; 100]), None);
    }

    #[test]
    fn what_is_in_the_dictionary_costs_next_to_nothing() {
        let source: Vec<u8> = random_bytes(3).take(4 * PAGE_SIZE).collect();
        // Magic number of zstd's own dictionaries, and what would be its tables.
        let content = [&[0x37, 0xa4, 0x30, 0xec][..], &source].concat();
        let dictionary = [&RAW_CONTENT[..], &content].concat();
        let (mut compress, mut decompress) = (Compress::new(), Decompress::new());
        let behind = [&dictionary[..], &source].concat();
        for level in [LEVEL_MIN, -1, 1, 2, 3, 6, LEVEL_MAX] {
            let mut frame = vec![0; 2 * source.len()];
            let at = dictionary.len();
            // What does not fit leaves nothing behind.
            let random =
                [&RAW_CONTENT[..], &random_bytes(4).take(2 * PAGE_SIZE).collect::<Vec<_>>()].concat();
            assert_eq!(compress.compress_behind(level, &random, RAW_CONTENT.len(), &mut [0; 99]), None);
            let length = compress.compress_behind(level, &behind, at, &mut frame).unwrap();
            assert!(level < 0 || length < 100, "level {level}: {length}");
            let mut back = vec![0; source.len()];
            decompress.decompress(&dictionary, &frame[..length], &mut back).unwrap();
            assert!(back == source, "level {level}");
            // The context has kept nothing of it, on either side.
            let length = compress.compress(level, &source, &mut frame).unwrap();
            assert!(length > source.len());
            decompress.decompress(&[], &frame[..length], &mut back).unwrap();
            assert!(back == source, "level {level}");
            let other = [&RAW_CONTENT[..], &source].concat();
            let length = compress.compress_behind(level, &other, RAW_CONTENT.len(), &mut frame).unwrap();
            assert!(length > source.len());
        }
    }

    #[test]
    fn refuses_what_is_not_one_frame_of_the_right_size() {
        let source = vec![7; 2 * PAGE_SIZE];
        let mut frame = vec![0; PAGE_SIZE];
        let length = Compress::new().compress(1, &source, &mut frame).unwrap();
        let frame = &frame[..length];
        let mut decompress = Decompress::new();
        let mut error =
            |frame: &[u8], size: usize| decompress.decompress(&[], frame, &mut vec![0; size]).unwrap_err();
        assert_eq!(error(&[], 4096), DecompressError::NotOneFrame { bytes: 0 });
        assert_eq!(
            error(&[frame, frame].concat(), 16384),
            DecompressError::NotOneFrame { bytes: 2 * length }
        );
        assert_eq!(error(&frame[..length - 1], 8192), DecompressError::NotOneFrame { bytes: length - 1 });
        for size in [4096, 8191, 8193, 1 << 20] {
            assert_eq!(
                error(frame, size),
                DecompressError::WrongSize { announced: Some(8192), expected: size }
            );
        }
        // A skippable frame is a frame by the book, but holds no content.
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
        assert!(matches!(error(&skippable, 4096), DecompressError::WrongSize { .. }));
    }
}
