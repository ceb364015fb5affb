//! In what two archives differ.

use std::sync::Mutex;

use pagecopy::backend::StateBlob;
use pagecopy::bitmap::bits;
use pagecopy::digest::receipt;
use pagecopy::layout::{CHUNK_PAGES, PAGE_SIZE};

use super::error::ArchiveError;
use super::image::{ChunkReader, Content, Image};
use super::walk::Walk;
use crate::local::lock;

/// Pages of a region, by what two archives have for them. A page of zeros is equal to a hole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PagesCompared {
    /// Of both the same content, and no hole in both.
    pub equal: u64,
    /// Of both, other content.
    pub changed: u64,
    /// Data in the first, and a hole in the second.
    pub only_first: u64,
    /// A hole in the first, and data in the second.
    pub only_second: u64,
    /// Holes in both.
    pub hole: u64,
}

impl PagesCompared {
    /// Whether the content is the same.
    pub fn is_equal(&self) -> bool {
        self.changed + self.only_first + self.only_second == 0
    }

    fn add(&mut self, other: Self) {
        self.equal += other.equal;
        self.changed += other.changed;
        self.only_first += other.only_first;
        self.only_second += other.only_second;
        self.hole += other.hole;
    }

    /// Counts the pages of a chunk, by those that each archive holds, and those that differ.
    fn count(valid: u64, first: u64, second: u64, differ: u64) -> Self {
        let pages = |mask: u64| u64::from((mask & valid).count_ones());
        Self {
            equal: pages((first | second) & !differ),
            changed: pages(first & second & differ),
            only_first: pages(first & !second & differ),
            only_second: pages(second & !first & differ),
            hole: pages(!(first | second)),
        }
    }
}

/// What comparing the memory of two archives came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compared {
    /// They have one seed, so seals were compared, and no pages read.
    pub by_seals: bool,
    /// By region, in the order of the layout.
    pub regions: Vec<PagesCompared>,
}

/// Why two archives cannot be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// Their regions are not the same.
    #[error("the archives are of guests with other memory")]
    Layouts,
    /// The first cannot be read.
    #[error("the first archive cannot be read")]
    First(#[source] ArchiveError),
    /// The second cannot be read.
    #[error("the second archive cannot be read")]
    Second(#[source] ArchiveError),
    /// Somebody asked, or a thread panicked.
    #[error(transparent)]
    Walk(#[from] ArchiveError),
}

/// Compares the memory of two archives of the same layout.
///
/// # Errors
/// When the layouts are not the same, something that is needed is damaged, or it is cancelled.
pub fn compare(first: &Image, second: &Image, walk: &Walk) -> Result<Compared, CompareError> {
    let layout = first.layout();
    if layout != second.layout() {
        return Err(CompareError::Layouts);
    }
    let by_seals = first.header().seed == second.header().seed;
    let regions = vec![PagesCompared::default(); layout.regions().len()];
    let all = Mutex::new(regions.clone());
    walk.begin(layout.bytes());
    let make = || -> Result<_, CompareError> {
        let reader = |image: &Image| image.reader().map_err(CompareError::Walk);
        let readers = if by_seals { None } else { Some((reader(first)?, reader(second)?)) };
        Ok((readers, regions.clone()))
    };
    let look = |(readers, counts): &mut (Option<(ChunkReader, ChunkReader)>, Vec<PagesCompared>),
                chunk: usize| {
        let chunk = chunk as u32;
        let Some(place) = layout.locate(chunk) else { return Ok(()) };
        let counted = match readers {
            None => count_by_seals(first, second, chunk)?,
            Some(readers) => count_by_content((first, second), readers, chunk)?,
        };
        counts[place.region].add(counted);
        walk.step(place.bytes() as u64);
        Ok(())
    };
    let end = |(_, counts): (_, Vec<PagesCompared>)| {
        lock(&all).iter_mut().zip(counts).for_each(|(all, own)| all.add(own));
        Ok(())
    };
    walk.each(layout.chunks() as usize, make, look, end)?;
    let regions = std::mem::take(&mut *lock(&all));
    Ok(Compared { by_seals, regions })
}

fn count_by_seals(first: &Image, second: &Image, chunk: u32) -> Result<PagesCompared, CompareError> {
    let (held_first, seals) = seals_of(first, chunk).map_err(CompareError::First)?;
    let (held_second, others) = seals_of(second, chunk).map_err(CompareError::Second)?;
    let held = bits(held_first | held_second);
    let differ = held.filter(|&bit| seals[bit as usize] != others[bit as usize]);
    let differ = differ.fold(0, |pages, bit| pages | 1u64 << bit);
    Ok(PagesCompared::count(first.layout().valid(chunk), held_first, held_second, differ))
}

fn count_by_content(
    (first, second): (&Image, &Image),
    (first_reader, second_reader): &mut (ChunkReader, ChunkReader),
    chunk: u32,
) -> Result<PagesCompared, CompareError> {
    let valid = first.layout().valid(chunk);
    let mine = read(first, chunk, first_reader).map_err(CompareError::First)?;
    let other = read(second, chunk, second_reader).map_err(CompareError::Second)?;
    let both = bits(mine.filled & other.filled);
    let differ = both.filter(|&bit| mine.pages[bit as usize] != other.pages[bit as usize]);
    let differ = differ.fold(0, |pages, bit| pages | 1u64 << bit);
    // What is filled may be zeros all the same.
    let zeros = |filled: u64, pages: &[[u8; PAGE_SIZE]]| {
        let zeros = bits(filled).filter(|&bit| pages[bit as usize] == [0; PAGE_SIZE]);
        zeros.fold(0, |pages, bit| pages | 1u64 << bit)
    };
    let (mine_alone, other_alone) = (mine.filled & !other.filled, other.filled & !mine.filled);
    let alone =
        (mine_alone | other_alone) & !zeros(mine_alone, &mine.pages) & !zeros(other_alone, &other.pages);
    Ok(PagesCompared::count(valid, mine.filled | mine.zero, other.filled | other.zero, differ | alone))
}

/// A chunk's content, all of which is whole.
fn read<'a>(image: &Image, chunk: u32, reader: &'a mut ChunkReader) -> Result<&'a Content, ArchiveError> {
    let content = image.read(chunk, image.layout().valid(chunk), reader)?;
    match content.damaged {
        0 => Ok(content),
        damaged => Err(image.damaged(chunk, damaged)),
    }
}

/// The pages of a chunk that an image holds, and for every page of it what the low half of its digest is, of holes as of zeros.
fn seals_of(image: &Image, chunk: u32) -> Result<(u64, [u64; CHUNK_PAGES]), ArchiveError> {
    let valid = image.layout().valid(chunk);
    let (mut seals, held) = image.seals(chunk, valid)?;
    let zero = receipt(image.archive().hasher().zero());
    bits(valid & !held).for_each(|bit| seals[bit as usize] = zero);
    Ok((held, seals))
}

/// In what a piece of state differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateDifference {
    /// The second has it not.
    OnlyFirst,
    /// The first has it not.
    OnlySecond,
    /// It is of another version.
    Version {
        /// In the first.
        first: u32,
        /// In the second.
        second: u32,
    },
    /// It has other bytes.
    Bytes {
        /// The first that differs, or that only one of the two has.
        offset: usize,
        /// How many the first has.
        first: usize,
        /// How many the second has.
        second: usize,
    },
}

/// The pieces of state that differ, by name. Of several with one name the first is compared with the first, and so on.
pub fn compare_state(first: &[StateBlob], second: &[StateBlob]) -> Vec<(String, StateDifference)> {
    let mut found = Vec::new();
    let mut left: Vec<&StateBlob> = second.iter().collect();
    for mine in first {
        let Some(at) = left.iter().position(|other| other.name == mine.name) else {
            found.push((mine.name.clone(), StateDifference::OnlyFirst));
            continue;
        };
        let other = left.remove(at);
        if mine.version != other.version {
            let (first, second) = (mine.version, other.version);
            found.push((mine.name.clone(), StateDifference::Version { first, second }));
        } else if mine.bytes != other.bytes {
            let same = mine.bytes.iter().zip(&other.bytes).take_while(|(a, b)| a == b);
            let (offset, first, second) = (same.count(), mine.bytes.len(), other.bytes.len());
            found.push((mine.name.clone(), StateDifference::Bytes { offset, first, second }));
        }
    }
    found.extend(left.into_iter().map(|other| (other.name.clone(), StateDifference::OnlySecond)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_compared_by_name() {
        let piece =
            |name: &str, version, bytes: &[u8]| StateBlob { name: name.into(), version, bytes: bytes.into() };
        let first = [
            piece("a", 1, b"123"),
            piece("b", 1, b""),
            piece("c", 1, b"12"),
            piece("d", 1, b"x"),
            piece("d", 1, b"y"),
        ];
        let second = [
            piece("d", 1, b"x"),
            piece("c", 1, b"123"),
            piece("a", 1, b"1x3"),
            piece("b", 2, b""),
            piece("e", 1, b""),
        ];
        let found = compare_state(&first, &second);
        let bytes = |offset, first, second| StateDifference::Bytes { offset, first, second };
        let expected = [
            ("a", bytes(1, 3, 3)),
            ("b", StateDifference::Version { first: 1, second: 2 }),
            ("c", bytes(2, 2, 3)),
            ("d", StateDifference::OnlyFirst),
            ("e", StateDifference::OnlySecond),
        ];
        assert_eq!(found, expected.map(|(name, difference)| (name.to_owned(), difference)));
        assert_eq!(compare_state(&first, &first), []);
    }

    #[test]
    fn every_page_is_counted_once() {
        let counted = PagesCompared::count(0b1_1111, 0b0_0111, 0b0_1011, 0b0_1110);
        let expected = PagesCompared { equal: 1, changed: 1, only_first: 1, only_second: 1, hole: 1 };
        assert_eq!((counted, counted.is_equal()), (expected, false));
        assert!(PagesCompared::count(0b111, 0b011, 0b101, 0).is_equal());
    }
}
