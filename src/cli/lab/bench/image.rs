//! RAM images to move: of pages that nothing can shrink, of few such pages, of zeros.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The unit in which images are made.
const BLOCK_BYTES: usize = 1 << 20;
/// Of a sparse image, one block in so many has content.
const SPARSE_ONE_IN: u64 = 8;
/// Images of all runs are alike.
const SEED: u64 = 0x7061_6765_6665_7272;

/// What an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// Random bytes: every page has to be sent whole
    Random,
    /// One MiB in eight random, the rest holes
    Sparse,
    /// Zeros, all of them written
    Zero,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Sparse => "sparse",
            Self::Zero => "zero",
        })
    }
}

/// Makes an image of `length` bytes, a multiple of 1 MiB.
pub(super) fn make(path: &Path, kind: Kind, length: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.set_len(length)?;
    let mut block = vec![0; BLOCK_BYTES];
    let mut state = SEED;
    for at in 0..length / BLOCK_BYTES as u64 {
        if kind == Kind::Sparse && at % SPARSE_ONE_IN != 0 {
            continue;
        }
        if kind != Kind::Zero {
            fill(&mut block, &mut state);
        }
        file.seek(SeekFrom::Start(at * BLOCK_BYTES as u64))?;
        file.write_all(&block)?;
    }
    Ok(())
}

/// Fills a block with the output of splitmix64 (Steele, Lea, Flood 2014), which no codec shrinks.
fn fill(block: &mut [u8], state: &mut u64) {
    for word in block.chunks_exact_mut(8) {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn images_hold_what_they_are_named_for() {
        let folder = tempfile::tempdir().unwrap();
        let length = 9 << 20;
        let image = |kind: Kind| {
            let path = folder.path().join(kind.to_string());
            make(&path, kind, length).unwrap();
            (std::fs::read(&path).unwrap(), path.metadata().unwrap().blocks() * 512)
        };
        let zeros = |bytes: &[u8]| bytes.chunks(4096).filter(|page| page.iter().all(|b| *b == 0)).count();
        let (random, _) = image(Kind::Random);
        assert_eq!((random.len() as u64, zeros(&random)), (length, 0));
        let (sparse, allocated) = image(Kind::Sparse);
        assert_eq!(zeros(&sparse), 7 * 256);
        assert!(allocated < 3 << 20, "{allocated}");
        let (zero, allocated) = image(Kind::Zero);
        assert_eq!(zeros(&zero), 9 * 256);
        assert!(allocated >= length, "{allocated}");
    }

    #[test]
    fn the_generator_is_splitmix64() {
        let mut block = [0; 16];
        fill(&mut block, &mut 1_234_567);
        // The first outputs for this seed, as its authors' program gives them.
        assert_eq!(u64::from_le_bytes(block[..8].try_into().unwrap()), 6_457_827_717_110_365_317);
        assert_eq!(u64::from_le_bytes(block[8..].try_into().unwrap()), 3_203_168_211_198_807_973);
    }
}
