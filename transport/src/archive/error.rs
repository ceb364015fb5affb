//! Why an archive cannot be written or read.

use std::io;
use std::path::PathBuf;

use pagecopy::backend::BackendError;
use pagecopy::chunk::DecodeError;
use pagecopy::layout::Layout;

use super::format::VERSION;
use super::kept::KeptError;
use super::oneway::OneWayError;
use crate::wire::WireError;

/// Why an archive cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The file.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// The command or descriptor.
    #[error(transparent)]
    OneWay(#[from] OneWayError),
    /// No such file, for instance.
    #[error("cannot open the archive {}", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Bytes that could not be read.
    #[error("cannot read the archive at offset {offset:#x}")]
    Read {
        /// Where.
        offset: u64,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Bytes that could not be written.
    #[error("cannot write the archive")]
    Write {
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error("this is no archive of pageferry's: it begins with \"{found}\"")]
    Foreign {
        /// With what it begins.
        found: String,
    },
    /// Of a newer release.
    #[error("the archive is of version {version}, and this release reads up to {VERSION}: use a newer one")]
    Version {
        /// Its version.
        version: u16,
    },
    /// Of a newer release.
    #[error("the archive needs what this release does not know (features {features:#x}): use a newer one")]
    Features {
        /// What it needs.
        features: u64,
    },
    /// It ends too early.
    #[error(
        "the archive ends at offset {offset:#x}, in the middle of {what}: it was cut off, or its writer did not come to an end"
    )]
    Truncated {
        /// Where.
        offset: u64,
        /// In what.
        what: &'static str,
    },
    /// Something follows its end.
    #[error("something follows the archive's end at offset {offset:#x}")]
    Trailing {
        /// Where it ends.
        offset: u64,
    },
    /// It is not what was written.
    #[error("the archive is damaged at offset {offset:#x}{place}")]
    Damaged {
        /// Where.
        offset: u64,
        /// Of what memory, where that is known.
        place: Place,
        /// In what way.
        #[source]
        source: Damage,
    },
    /// It is of a guest that cannot be.
    #[error("the archive's guest cannot be: {why}")]
    Guest {
        /// Why.
        why: String,
    },
    /// Its base.
    #[error("the base {name:?} of the archive: {why}")]
    Base {
        /// As the archive names it.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Its base cannot be read.
    #[error("the base {name:?} of the archive cannot be used")]
    BaseUnread {
        /// As the archive names it.
        name: String,
        /// Why.
        #[source]
        source: Box<Self>,
    },
    /// Its pages cannot be taken in.
    #[error(transparent)]
    Memory(#[from] BackendError),
    /// A thread panicked.
    #[error("a thread panicked, which is a fault of pageferry's: please report it: {what}")]
    Panicked {
        /// What it said.
        what: String,
    },
    /// Somebody asked.
    #[error("cancelled")]
    Cancelled,
}

/// In what way an archive is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// A structure that is none.
    #[error(transparent)]
    Structure(#[from] WireError),
    /// An encoded section that does not decode.
    #[error(transparent)]
    Section(#[from] DecodeError),
    /// Pages other than those that were saved.
    #[error("{} of its pages are not what was saved (by their seals)", pages.count_ones())]
    Pages {
        /// Which of the chunk's.
        pages: u64,
    },
    /// Pages that the base has no longer as they were.
    #[error("{} of its pages are not in the base as they were", pages.count_ones())]
    Base {
        /// Which of the chunk's.
        pages: u64,
    },
    /// The index and the frames do not fit each other.
    #[error("the index does not say what is there: {what}")]
    Index {
        /// In what.
        what: &'static str,
    },
}

/// A place in guest memory, for people: ` (region "ram", from 0x1000)`, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place(Option<(String, u64)>);

impl Place {
    /// The first of some pages of a chunk.
    pub fn of(layout: &Layout, chunk: u32, pages: u64) -> Self {
        let Some(place) = layout.locate(chunk) else { return Self(None) };
        let page = if pages == 0 { 0 } else { pages.trailing_zeros() };
        let name = layout.regions()[place.region].name.clone();
        Self(Some((name, place.offset + u64::from(page) * pagecopy::layout::PAGE_SIZE as u64)))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some((region, offset)) => write!(f, " (region {region:?}, from {offset:#x})"),
            None => Ok(()),
        }
    }
}

impl ArchiveError {
    /// Damage at an offset of which no more is known.
    pub(super) fn damaged(offset: u64, source: impl Into<Damage>) -> Self {
        Self::Damaged { offset, place: Place::default(), source: source.into() }
    }

    /// Whether somebody asked for it to end.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled | Self::OneWay(OneWayError::Cancelled))
    }

    /// Whether it is about bytes of a file that are not what was written or cannot be read, and others may be.
    pub fn is_of_bytes(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Read { .. } | Self::Truncated { .. })
    }

    /// What the system said, or an error that stands for it.
    pub(super) fn system(&self) -> io::Error {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                return io::Error::from_raw_os_error(code);
            }
            cause = error.source();
        }
        io::Error::other(self.to_string())
    }
}
