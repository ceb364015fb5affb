//! The files behind guest memory.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use pagecopy::backend::{BackendError, Room};

use crate::ram_file::{Kind, kind_of};

/// A file behind guest memory.
#[derive(Debug)]
pub(super) struct Behind {
    pub(super) file: File,
    /// Its path, where it has one.
    pub(super) path: Option<PathBuf>,
    /// The regions that it has, one after another from its beginning.
    pub(super) regions: Range<usize>,
}

impl Behind {
    /// The file system of a file with a path, without what it has left.
    pub(super) fn file_system(&self) -> Option<Room> {
        let of = format!("the file system of {}", self.path.as_ref()?.display());
        let hint = "free some of it, mount it larger, or keep the memory elsewhere";
        Some(Room { bytes: 0, of, hint })
    }
}

/// What all of these files are on.
pub(super) fn kind_of_all(files: &[Behind]) -> Result<Kind, BackendError> {
    let mut kinds = files.iter().map(|behind| Ok((kind_of(&behind.file)?, behind)));
    let (kind, first) = kinds.next().unwrap_or_else(|| Err(BackendError::invalid("there is no memory")))?;
    for other in kinds {
        let (other, behind) = other?;
        if other != kind {
            let path =
                |behind: &Behind| behind.path.as_deref().unwrap_or(Path::new("?")).display().to_string();
            let (one, two) = (path(first), path(behind));
            return Err(BackendError::invalid(format!(
                "{one} and {two} are on file systems of different kinds ({kind:?}, {other:?}): keep all memory of a guest in files of one \
                 kind"
            )));
        }
    }
    Ok(kind)
}
