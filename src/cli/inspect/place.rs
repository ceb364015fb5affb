//! Where pages are, for people and for programs.

use std::fmt;

use pageferry::bitmap::runs;
use pageferry::layout::{Layout, PAGE_SIZE};
use serde::Serialize;

/// Pages of a region that lie together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Place {
    region: String,
    /// Of the first page in the region.
    offset_bytes: u64,
    /// Of the first page for the guest, where the region has an address.
    gpa: Option<u64>,
    pages: u32,
}

impl Place {
    /// Where these pages of a chunk are.
    pub(super) fn of(layout: &Layout, chunk: u32, pages: u64) -> Vec<Self> {
        let Some(place) = layout.locate(chunk) else { return Vec::new() };
        let region = &layout.regions()[place.region];
        let runs = runs(pages).map(|(first, count)| {
            let offset = place.offset + u64::from(first) * PAGE_SIZE as u64;
            let gpa = region.gpa.map(|gpa| gpa + offset);
            Self { region: region.name.clone(), offset_bytes: offset, gpa, pages: count }
        });
        runs.collect()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { region, offset_bytes, gpa, pages } = self;
        let noun = if *pages == 1 { "page" } else { "pages" };
        match gpa {
            Some(gpa) => write!(f, "{pages} {noun} of region {region:?} at {gpa:#x}"),
            None => write!(f, "{pages} {noun} of region {region:?} at its byte {offset_bytes:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use pageferry::layout::Region;

    use super::*;

    #[test]
    fn pages_are_told_by_their_runs() {
        let regions = vec![Region::new("ram", 1 << 32, 1 << 20), Region::unplaced("rom", 8192)];
        let layout = Layout::new(regions).unwrap();
        let said =
            |chunk, pages| Place::of(&layout, chunk, pages).iter().map(Place::to_string).collect::<Vec<_>>();
        assert_eq!(
            said(1, 0b1101),
            ["1 page of region \"ram\" at 0x100040000", "2 pages of region \"ram\" at 0x100042000"]
        );
        assert_eq!(said(4, 0b10), ["1 page of region \"rom\" at its byte 0x1000"]);
        assert_eq!(said(5, 1), Vec::<String>::new());
    }
}
