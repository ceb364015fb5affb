//! RAM images to move: of pages that nothing can shrink, of few such pages, of zeros.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::cli::random::SplitMix;

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
    let mut random = SplitMix::new(SEED);
    for at in 0..length / BLOCK_BYTES as u64 {
        if kind == Kind::Sparse && at % SPARSE_ONE_IN != 0 {
            continue;
        }
        if kind != Kind::Zero {
            random.fill(&mut block);
        }
        file.seek(SeekFrom::Start(at * BLOCK_BYTES as u64))?;
        file.write_all(&block)?;
    }
    Ok(())
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
}
