//! Reading all of an archive, and finding out everything that is wrong with it.

use std::sync::Mutex;

use super::error::{ArchiveError, Damage};
use super::format::IndexEntry;
use super::frames::Opener;
use super::image::{ChunkReader, Image};
use super::reader::Archive;
use super::walk::Walk;
use crate::local::lock;

/// Something that is wrong with an archive.
#[derive(Debug)]
#[non_exhaustive]
pub struct Fault {
    /// Where it is, from the archive's first byte.
    pub offset: u64,
    /// The pages that are not to be had because of it: their chunk, and which of it; none where it is not about pages.
    pub pages: Option<(u32, u64)>,
    /// In what way.
    pub error: ArchiveError,
}

/// What checking an archive came to.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Checked {
    /// Bytes that were read of the archive itself.
    pub bytes: u64,
    /// Pages of the base that were read, because the archive stands on them.
    pub base_pages: u64,
    /// What is wrong, in the order in which it lies.
    pub faults: Vec<Fault>,
}

impl Checked {
    /// Pages that are damaged, each as often as it was saved so.
    pub fn damaged_pages(&self) -> u64 {
        self.faults
            .iter()
            .filter_map(|fault| fault.pages)
            .map(|(_, pages)| u64::from(pages.count_ones()))
            .sum()
    }
}

/// What a thread needs, and what it has found.
struct Own {
    opener: Opener,
    base: Option<ChunkReader>,
    found: Checked,
}

/// Reads and checks every frame, pad, and the state of an archive whose header, index and footer were checked when it was opened; and
/// what it stands on of its base. Goes on where something is damaged.
///
/// # Errors
/// When it is cancelled, or there is no memory for it. What is wrong with the archive is no error: it is in [`Checked::faults`].
pub fn verify(archive: &Archive, base: Option<&Image>, walk: &Walk) -> Result<Checked, ArchiveError> {
    let (entries, newest) = (archive.entries(), archive.newest());
    let all = Mutex::new(Checked::default());
    walk.begin(archive.footer().bytes);
    let make = || -> Result<Own, ArchiveError> {
        let opener = Opener::new().map_err(|source| ArchiveError::Read { offset: 0, source })?;
        let base = base.map(|base| base.reader().map(ChunkReader::forgiving)).transpose()?;
        Ok(Own { opener, base, found: Checked::default() })
    };
    let check = |own: &mut Own, at: usize| {
        own.check(archive, base, &entries[at], newest[at]);
        walk.step(entries[at].len.into());
        Ok(())
    };
    let end = |own: Own| {
        let mut all = lock(&all);
        all.base_pages += own.found.base_pages;
        all.faults.extend(own.found.faults);
        Ok(())
    };
    walk.each(entries.len(), make, check, end)?;
    let mut checked = std::mem::take(&mut *lock(&all));
    checked.faults.sort_by_key(|fault| fault.offset);
    if let Err(error) = archive.state() {
        checked.faults.push(Fault { offset: archive.footer().state_at, pages: None, error });
    }
    checked.bytes = archive.footer().bytes;
    Ok(checked)
}

impl Own {
    fn check(&mut self, archive: &Archive, base: Option<&Image>, entry: &IndexEntry, newest: u64) {
        let faults = &mut self.found.faults;
        let mut fault = |pages, error| faults.push(Fault { offset: entry.offset, pages, error });
        if entry.pages == 0 {
            if let Err(error) = archive.check_pad(entry, &mut self.opener) {
                fault(None, error);
            }
            return;
        }
        let opened = match archive.read(entry, &mut self.opener) {
            Ok(opened) => opened,
            Err(error) => return fault(Some((entry.chunk, entry.pages)), error),
        };
        let error = |damage, pages| archive.damaged(entry, damage, pages);
        for (damage, pages) in opened.damages() {
            fault(Some((entry.chunk, pages)), error(damage, pages));
        }
        let same = opened.same() & newest;
        if let (true, Some(base), Some(reader)) = (same != 0, base, &mut self.base) {
            self.found.base_pages += u64::from(same.count_ones());
            let content = base.read(entry.chunk, same, reader);
            match content.map(|content| content.unlike(same, archive.hasher(), |bit| opened.seal(bit))) {
                Ok(0) => {}
                Ok(pages) => fault(Some((entry.chunk, pages)), error(Damage::Base { pages }, pages)),
                Err(error) => fault(Some((entry.chunk, same)), error),
            }
        }
    }
}
