//! Which guarded pages are still to be copied, and which protection ends when they are.
//!
//! Nothing here calls the kernel: what is returned are addresses whose protection is to end.

use std::collections::HashMap;
use std::ops::Range;

use pagecopy::backend::Fault;
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE};

use crate::watched::Spans;

/// The size of a transparent huge page.
const LARGE: u64 = 2 << 20;

/// What the protection of a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Small pages, of which the kernel may map 2 MiB as one huge page.
    Small,
    /// Huge pages of so many bytes, which cannot come apart.
    Huge(u64),
}

impl Grain {
    /// The size of a huge page.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::Small => LARGE,
            Self::Huge(bytes) => bytes,
        }
    }
}

/// A huge page, or the room of one.
#[derive(Clone, Debug)]
struct Piece {
    addresses: Range<u64>,
    chunks: Range<u32>,
}

/// What is left to be copied.
///
/// A huge page comes apart when a part of its protection ends, and then stays in small pages. So the chunks of one that nobody writes are
/// released together, with the last of them. The first write to it ends that: whoever waits there goes on with his chunk.
#[derive(Debug)]
pub(super) struct Pieces {
    layout: Layout,
    /// The addresses of each region, and what they are made of.
    regions: Vec<(Range<u64>, Grain)>,
    /// Guarded pages that were not released, by chunk.
    left: Vec<u64>,
    /// Pieces of small grain of which something was released or written, by address: whether they are released together.
    together: HashMap<u64, bool>,
}

impl Pieces {
    /// `regions` and `pages` are the layout's.
    pub(super) fn new(layout: Layout, regions: Vec<(Range<u64>, Grain)>, pages: &PageBitmap) -> Self {
        let left = (0..layout.chunks()).map(|chunk| pages.get(chunk) & layout.valid(chunk)).collect();
        Self { layout, regions, left, together: HashMap::new() }
    }

    /// The addresses of all that is left, in runs of at most `most` bytes. What lies between goes with them where that is little, and so
    /// does the rest of a huge page.
    pub(super) fn to_protect(&self, most: u64) -> Vec<Range<u64>> {
        let spans = self.regions.iter().enumerate().flat_map(|(region, (range, grain))| {
            let size = grain.bytes();
            let mut spans = Spans::default();
            for chunk in self.layout.region_chunks(region) {
                for run in self.addresses(chunk, self.left[chunk as usize]) {
                    let from = (run.start - run.start % size).max(range.start);
                    spans.add(from, run.end.next_multiple_of(size).min(range.end));
                }
            }
            spans.0.into_iter().flat_map(move |span| cut(span, most.max(size)))
        });
        spans.collect()
    }

    /// What a region is made of.
    pub(super) fn grain(&self, region: usize) -> Grain {
        self.regions[region].1
    }

    /// Pages of a chunk were copied. `is_huge` says whether addresses are mapped as one huge page.
    pub(super) fn release(
        &mut self,
        chunk: u32,
        pages: u64,
        is_huge: impl FnOnce(&Range<u64>) -> bool,
    ) -> Vec<Range<u64>> {
        let left = &mut self.left[chunk as usize];
        let released = *left & pages;
        *left &= !released;
        if released == 0 {
            return vec![];
        }
        let place = self.layout.locate(chunk).expect("chunk number was validated");
        if let Some(piece) = self.piece(place.region, place.offset) {
            let is_done = self.is_done(&piece);
            if self.goes_together(place.region, &piece, is_huge) {
                return if is_done { vec![piece.addresses] } else { vec![] };
            }
        }
        let all = self.left[chunk as usize] == 0;
        self.addresses(chunk, if all { place.valid() } else { released }).collect()
    }

    /// Somebody is about to write at this offset of a region, and waits. Tells of him where it has to be copied first.
    pub(super) fn touched(
        &mut self,
        region: usize,
        offset: u64,
        thread: u32,
        faults: &mut Vec<Fault>,
    ) -> Vec<Range<u64>> {
        let chunk = self.layout.region_chunks(region).start + (offset / CHUNK_SIZE as u64) as u32;
        let page = (offset % CHUNK_SIZE as u64) as u32 / PAGE_SIZE as u32;
        let piece = self.piece(region, offset);
        match &piece {
            Some(piece) if self.is_done(piece) => return vec![piece.addresses.clone()],
            Some(piece) if self.regions[region].1 != Grain::Small => {
                let left = piece.chunks.clone().map(|chunk| (chunk, self.left[chunk as usize]));
                let fault =
                    |(chunk, pages): (u32, u64)| Fault { chunk, page: pages.trailing_zeros(), thread };
                faults.extend(left.filter(|(_, pages)| *pages != 0).map(fault));
                return vec![];
            }
            _ => {}
        }
        let is_left = self.left[chunk as usize] >> page & 1 != 0;
        if is_left {
            faults.push(Fault { chunk, page, thread });
        }
        let chunks = match piece {
            // What was released and waited for the rest.
            Some(piece) if self.together.insert(piece.addresses.start, false) == Some(true) => piece.chunks,
            _ if is_left => return vec![],
            // A hole, or the writer came before the release.
            _ => chunk..chunk + 1,
        };
        chunks
            .flat_map(|chunk| self.addresses(chunk, self.layout.valid(chunk) & !self.left[chunk as usize]))
            .collect()
    }

    /// The piece that an offset of a region lies in, where all of it is in the region.
    fn piece(&self, region: usize, offset: u64) -> Option<Piece> {
        let (range, grain) = &self.regions[region];
        let size = grain.bytes();
        let at = range.start + offset;
        let start = at - at % size;
        let before = start.checked_sub(range.start).filter(|before| before % CHUNK_SIZE as u64 == 0)?;
        let first = self.layout.region_chunks(region).start + (before / CHUNK_SIZE as u64) as u32;
        let chunks = first..first + (size / CHUNK_SIZE as u64) as u32;
        (start + size <= range.end).then_some(Piece { addresses: start..start + size, chunks })
    }

    /// Whether nothing of a piece is left.
    fn is_done(&self, piece: &Piece) -> bool {
        self.left[piece.chunks.start as usize..piece.chunks.end as usize].iter().all(|&pages| pages == 0)
    }

    /// Whether the chunks of a piece, of which one was just released, are released together.
    fn goes_together(
        &mut self,
        region: usize,
        piece: &Piece,
        is_huge: impl FnOnce(&Range<u64>) -> bool,
    ) -> bool {
        if self.regions[region].1 != Grain::Small {
            return true;
        }
        let is_done = self.is_done(piece);
        let start = piece.addresses.start;
        let together = *self.together.entry(start).or_insert_with(|| is_huge(&piece.addresses));
        if is_done {
            self.together.remove(&start);
        }
        together
    }

    /// The addresses of pages of a chunk.
    fn addresses(&self, chunk: u32, pages: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let place = self.layout.locate(chunk).expect("chunk number was validated");
        let start = self.regions[place.region].0.start + place.offset;
        runs(pages).map(move |(first, count)| {
            let from = start + u64::from(first) * PAGE_SIZE as u64;
            from..from + u64::from(count) * PAGE_SIZE as u64
        })
    }
}

/// A run in pieces of at most so many bytes.
pub(super) fn cut(range: Range<u64>, most: u64) -> impl Iterator<Item = Range<u64>> {
    let Range { start, end } = range;
    (start..end).step_by(most as usize).map(move |from| from..(from + most).min(end))
}

#[cfg(test)]
mod tests {
    use std::slice;

    use pagecopy::layout::Region;

    use super::*;

    const CHUNK: u64 = CHUNK_SIZE as u64;
    const PAGE: u64 = PAGE_SIZE as u64;
    /// Where the first region starts: a chunk before a huge page may.
    const START: u64 = (1 << 30) - CHUNK;

    /// 18 chunks, of which the first is in no whole huge page, and the last has one page; and a region that no huge page fits.
    fn pieces(grain: Grain, pages: impl Fn(u32) -> u64) -> Pieces {
        let lens = [17 * CHUNK + PAGE, 2 * CHUNK];
        let layout = Layout::new(vec![Region::new("low", 0, lens[0]), Region::new("high", 1 << 32, lens[1])]);
        let set = PageBitmap::new(20);
        (0..20).for_each(|chunk| {
            set.insert(chunk, pages(chunk));
        });
        let high = 2 << 30;
        let regions = vec![(START..START + lens[0], grain), (high..high + lens[1], Grain::Small)];
        Pieces::new(layout.unwrap(), regions, &set)
    }

    fn chunk(chunk: u64) -> Range<u64> {
        START + chunk * CHUNK..START + (chunk + 1) * CHUNK
    }

    fn touched(pieces: &mut Pieces, offset: u64) -> (Vec<(u32, u32)>, Vec<Range<u64>>) {
        let mut faults = Vec::new();
        let runs = pieces.touched(0, offset, 1, &mut faults);
        (faults.into_iter().map(|fault| (fault.chunk, fault.page)).collect(), runs)
    }

    #[test]
    fn small_pages_are_released_as_they_are_copied() {
        let mut pieces = pieces(Grain::Small, |_| u64::MAX);
        let page = |page: u64| START + page * PAGE..START + (page + 1) * PAGE;
        assert_eq!(pieces.release(0, 0b101, |_| false), [page(0), page(2)]);
        assert_eq!(pieces.release(0, 0b111, |_| false), [page(1)]);
        assert_eq!(pieces.release(0, 0b111, |_| false), []);
        // The last ones take all of the chunk with them: holes that were protected between.
        assert_eq!(pieces.release(0, u64::MAX, |_| false), [chunk(0)]);
        assert_eq!(pieces.release(1, u64::MAX, |_| false), [chunk(1)]);
        let last = START + 17 * CHUNK..START + 17 * CHUNK + PAGE;
        assert_eq!(pieces.release(17, u64::MAX, |_| false), [last]);
    }

    #[test]
    fn who_writes_a_guarded_page_is_told_and_who_does_not_is_let_go() {
        let mut pieces = pieces(Grain::Small, |chunk| if chunk == 1 { !0b10 } else { u64::MAX });
        assert_eq!(touched(&mut pieces, CHUNK + 5 * PAGE + 8), (vec![(1, 5)], vec![]));
        let hole = chunk(1).start + PAGE..chunk(1).start + 2 * PAGE;
        assert_eq!(touched(&mut pieces, CHUNK + PAGE), (vec![], vec![hole]));
        pieces.release(0, u64::MAX, |_| false);
        assert_eq!(touched(&mut pieces, 0), (vec![], vec![chunk(0)]));
    }

    #[test]
    fn a_huge_page_is_released_with_its_last_chunk() {
        let mut pieces = pieces(Grain::Small, |_| u64::MAX);
        for chunk in [8, 1, 2, 3, 4, 5, 7] {
            assert_eq!(pieces.release(chunk, u64::MAX, |_| chunk == 8), [], "{chunk}: it is asked once");
        }
        assert_eq!(pieces.release(6, 1, |_| false), []);
        let addresses = chunk(1).start..chunk(8).end;
        let whole = [addresses];
        assert_eq!(pieces.release(6, u64::MAX, |_| false), whole);
        // Who had been stopped before does not take it apart.
        assert_eq!(touched(&mut pieces, 3 * CHUNK), (vec![], whole.into()));
        // Not where it does not fit.
        assert_eq!(pieces.release(0, u64::MAX, |_| true), [chunk(0)]);
        assert_eq!(pieces.release(18, u64::MAX, |_| true).len(), 1);
        assert!(pieces.together.is_empty());
    }

    #[test]
    fn the_first_write_takes_a_huge_page_apart() {
        let mut pieces = pieces(Grain::Small, |_| u64::MAX);
        assert_eq!(pieces.release(2, u64::MAX, |_| true), []);
        assert_eq!(pieces.release(4, 1, |_| true), []);
        let released = vec![chunk(2), chunk(4).start..chunk(4).start + PAGE];
        assert_eq!(touched(&mut pieces, 3 * CHUNK), (vec![(3, 0)], released));
        assert_eq!(touched(&mut pieces, 3 * CHUNK + PAGE), (vec![(3, 1)], vec![]));
        assert_eq!(pieces.release(3, u64::MAX, |_| true), [chunk(3)]);
        assert_eq!(pieces.release(5, u64::MAX, |_| true), [chunk(5)]);
        for chunk in [1, 4, 6, 7, 8] {
            assert_eq!(pieces.release(chunk, u64::MAX, |_| true).len(), 1, "{chunk}");
        }
        assert!(pieces.together.is_empty(), "nothing is kept of what is done");
    }

    #[test]
    fn who_comes_to_a_released_part_of_a_huge_page_is_let_go() {
        let mut pieces = pieces(Grain::Small, |_| u64::MAX);
        assert_eq!(pieces.release(2, u64::MAX, |_| true), []);
        assert_eq!(touched(&mut pieces, 2 * CHUNK), (vec![], vec![chunk(2)]));
        assert_eq!(pieces.release(3, u64::MAX, |_| true), [chunk(3)]);
    }

    #[test]
    fn huge_pages_that_cannot_come_apart_wait_for_all_of_their_chunks() {
        let layout = Layout::flat(16 * CHUNK).unwrap();
        let regions = vec![(1 << 30..(1 << 30) + 16 * CHUNK, Grain::Huge(LARGE))];
        let mut pieces = Pieces::new(layout.clone(), regions, &PageBitmap::full(&layout));
        (8..14).for_each(|chunk| assert_eq!(pieces.release(chunk, u64::MAX, |_| false), []));
        pieces.release(14, 0b11, |_| false);
        assert_eq!(touched(&mut pieces, 9 * CHUNK), (vec![(14, 2), (15, 0)], vec![]));
        assert_eq!(pieces.release(14, u64::MAX, |_| false), []);
        let whole = (1 << 30) + 8 * CHUNK..(1 << 30) + 16 * CHUNK;
        let whole = vec![whole];
        assert_eq!(pieces.release(15, u64::MAX, |_| false), whole);
        assert_eq!(touched(&mut pieces, 9 * CHUNK), (vec![], whole));
    }

    #[test]
    fn what_is_protected_cuts_no_huge_page_and_leaves_out_what_is_far() {
        let one = |wanted: u32, pages: u64| move |chunk| if chunk == wanted { pages } else { 0 };
        let huge = chunk(1).start..chunk(8).end;
        assert_eq!(pieces(Grain::Small, one(3, 0b100)).to_protect(PAGE), [huge]);
        assert_eq!(pieces(Grain::Small, one(0, 1)).to_protect(CHUNK), [chunk(0)], "not before the region");
        let last = START + 17 * CHUNK..START + 17 * CHUNK + PAGE;
        assert_eq!(
            *pieces(Grain::Small, one(17, 1)).to_protect(CHUNK),
            *slice::from_ref(&last),
            "nor behind it"
        );
        let all = pieces(Grain::Small, |_| u64::MAX).to_protect(8 * CHUNK);
        let high = (2 << 30)..(2 << 30) + 2 * CHUNK;
        let cut = [START..chunk(7).end, chunk(8).start..chunk(15).end, chunk(16).start..last.end, high];
        assert_eq!(all, cut);
        assert_eq!(pieces(Grain::Small, |_| 0).to_protect(CHUNK), []);
    }
}
