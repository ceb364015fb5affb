//! What of a guest's memory is as in an older archive, and need not be saved again.
//!
//! The new archive takes the older one's seed, so that seals can be compared with digests of memory. A page that is as it was is said to
//! be, with its seal; it is never inferred from what is missing. Memory may be written meanwhile: the dirty log runs already, and what
//! was written is saved in a later frame.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pagecopy::bitmap::bits;
use pagecopy::digest::receipt;
use pagecopy::layout::PAGE_SIZE;

use super::Cause;
use crate::archive::format::Base;
use crate::archive::image::Image;
use crate::archive::writer::{ArchiveWriter, Sender};
use crate::archive::{ArchiveError, Walk, frames};
use crate::source::PageSource;

/// Frames are written once there are so many bytes of them.
const GATHER_BYTES: usize = 64 << 10;

/// What the archive at `path`, which stands on `base`, says of that.
pub(super) fn named(base: &Path, image: &Image, path: &Path) -> Result<Base, Cause> {
    let absolute = |path: &Path| std::path::absolute(path).map_err(Cause::System);
    let (of, to) = (absolute(base)?, absolute(path)?);
    let name = match (of.file_name(), of.parent() == to.parent()) {
        (Some(name), true) => PathBuf::from(name),
        _ => of,
    };
    let name = name.to_str().ok_or_else(|| ArchiveError::Base {
        name: name.display().to_string(),
        why: "its name is no UTF-8, and could not be written down".into(),
    })?;
    Ok(Base { id: image.header().id, name: name.into() })
}

/// Writes which pages are as in the base, and takes them from those that are to be saved; `kept` is told of them. `go_on` fails where it
/// is to end.
pub(super) fn keep_same(
    source: &PageSource,
    archive: &Arc<ArchiveWriter>,
    image: &Image,
    kept: &(dyn Fn(u32, u64) -> Result<(), ArchiveError> + Sync),
    go_on: &(dyn Fn() -> Result<(), Cause> + Sync),
) -> Result<(), Cause> {
    let make = || Ok((archive.sender(), Vec::with_capacity(GATHER_BYTES + frames::FRAME_MAX)));
    let compare = |(sender, out): &mut (Sender, Vec<u8>), chunk: usize| {
        go_on()?;
        keep_same_of(source, image, chunk as u32, (sender, out), kept)?;
        if out.len() >= GATHER_BYTES {
            sender.write_frames(out)?;
        }
        Ok(())
    };
    let end = |(mut sender, mut out): (Sender, Vec<u8>)| {
        sender.write_frames(&mut out)?;
        Ok(sender.write_rest()?)
    };
    Walk::default().each::<_, Cause>(image.layout().chunks() as usize, make, compare, end)
}

/// The same of a chunk. Its pages are taken before they are looked at: whoever saves them meanwhile lets the guest write them, and what
/// they are then is not what is saved.
fn keep_same_of(
    source: &PageSource,
    image: &Image,
    chunk: u32,
    (sender, out): (&mut Sender, &mut Vec<u8>),
    kept: &(dyn Fn(u32, u64) -> Result<(), ArchiveError> + Sync),
) -> Result<(), ArchiveError> {
    if image.frames_of(chunk).is_empty() {
        return Ok(());
    }
    let pages = source.take(chunk);
    let (seals, known) = image.seals(chunk, pages)?;
    let (memory, hasher) = (source.ram().chunk(chunk), source.hasher());
    let mut same = 0;
    for bit in bits(known) {
        let page = memory.subslice(bit as usize * PAGE_SIZE, PAGE_SIZE);
        let digest = hasher.memory(&page.expect("pages of a chunk lie in its mapping"));
        same |= u64::from(receipt(digest) == seals[bit as usize]) << bit;
    }
    source.give_back_taken(chunk, pages & !same);
    if same != 0 {
        source.keep(chunk, same);
        sender.seal_same(chunk, same, bits(same).map(|bit| seals[bit as usize]), out);
        kept(chunk, same)?;
    }
    Ok(())
}
