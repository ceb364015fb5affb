//! Archives: a guest, or memory alone, in a file or in whatever takes bytes in order. `docs/archive.md` describes every byte.
//!
//! Nobody answers here, so nothing is acknowledged: every frame stands for itself, and says of each page what memory must hold after it.
//! [`mod@format`] and [`frames`] are pure; [`reader`] and [`image`] read files by their index and anything else from its beginning. What
//! takes long, of all of an archive, is watched and ended by a [`Walk`].

mod compare;
pub mod error;
pub(crate) mod fill;
mod flatten;
pub mod format;
pub mod frames;
pub mod image;
pub(crate) mod kept;
pub(crate) mod oneway;
pub mod reader;
mod survey;
mod verify;
mod walk;
pub(crate) mod writer;

pub use compare::{CompareError, Compared, PagesCompared, StateDifference, compare, compare_state};
pub use error::{ArchiveError, Damage, Place};
pub use flatten::{Flattened, flatten};
pub use image::Image;
pub use kept::KeptError;
pub use oneway::{Ended, LastWords, OneWayError, Trouble};
pub use reader::Archive;
pub use survey::Survey;
pub use verify::{Checked, Fault, verify};
pub use walk::Walk;
