//! A picture of guest memory: a cell for each block of it, coloured by what is saved of most of its pages.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::archive::format::{FrameHeader, FrameKind};
use pageferry::layout::{CHUNK_PAGES, Layout, PAGE_SIZE};
use plotters::prelude::*;
use serde::Serialize;

use super::{Lines, Opened, cannot_write, check_spared, size};
use crate::cli::file::NewFile;
use crate::cli::{CliError, Exit};

/// Cells side by side.
const COLUMNS: u64 = 128;
/// Rows of cells, besides one for each region.
const ROWS_MAX: u64 = 128;
/// Pixels of a cell's side.
const CELL: i32 = 6;
/// Pixels around everything, and those of a line of text.
const MARGIN: i32 = 16;
const LINE: i32 = 22;

/// What is saved of a page.
const KINDS: [(&str, RGBColor); 8] = [
    ("hole", RGBColor(0xf0, 0xf2, 0xf4)),
    ("zero", RGBColor(0xc4, 0xcb, 0xd2)),
    ("as in the base", RGBColor(0x82, 0x50, 0xdf)),
    ("compressed to 10 % or less", RGBColor(0xa8, 0xdd, 0xb5)),
    ("compressed to 25 %", RGBColor(0x5d, 0xb9, 0x73)),
    ("compressed to 50 %", RGBColor(0x1a, 0x7f, 0x37)),
    ("compressed to more", RGBColor(0x2a, 0x78, 0xd6)),
    ("raw", RGBColor(0xc2, 0x57, 0x0c)),
];
const ZERO: usize = 1;
const SAME: usize = 2;
const RAW: usize = 7;

/// Pages of each kind.
type Cell = [AtomicU64; KINDS.len()];

/// A picture that is being made.
pub(super) struct Map {
    path: PathBuf,
    file: NewFile,
    title: String,
    cells: Cells,
}

/// The cells of all regions.
struct Cells {
    layout: Layout,
    /// A power of two.
    cell_pages: u64,
    regions: Vec<Vec<Cell>>,
}

/// What was drawn.
#[derive(Debug, Serialize)]
pub(super) struct Drawn {
    file: String,
    cell_bytes: u64,
    cells: usize,
}

impl Map {
    /// Begins one, of an archive's memory.
    pub(super) fn begin(opened: &Opened, path: &Path) -> Result<Self, CliError> {
        check_spared(path, opened.archive(), opened.base())?;
        let archive = opened.archive();
        let file = NewFile::create(path).map_err(|error| cannot_write(path, &error))?;
        // XML has no control characters.
        let title = archive.path().display().to_string().replace(char::is_control, "?");
        Ok(Self { path: path.into(), file, title, cells: Cells::of(archive.layout().clone()) })
    }

    /// Enters these pages of a frame.
    pub(super) fn enter(&self, header: &FrameHeader, newest: u64) {
        self.cells.enter(header, newest);
    }

    /// Draws what was entered.
    pub(super) fn finish(self) -> Result<Drawn, CliError> {
        let svg = self.cells.svg(&self.title).map_err(|error| CliError {
            exit: Exit::Failed,
            text: format!(
                "the map cannot be drawn, which is a fault of pageferry's: please report it: {error}"
            ),
        })?;
        let written = self.file.file().write_all(svg.as_bytes()).and_then(|()| self.file.commit());
        written.map_err(|error| cannot_write(&self.path, &error))?;
        let cells = self.cells.regions.iter().map(Vec::len).sum();
        Ok(Drawn {
            file: self.path.display().to_string(),
            cell_bytes: self.cells.cell_pages * PAGE_SIZE as u64,
            cells,
        })
    }
}

impl Drawn {
    pub(super) fn text(&self) -> String {
        let mut lines = Lines::default();
        lines.add("map:", format!("{}, {} cells of {}", self.file, self.cells, size(self.cell_bytes)));
        lines.0
    }
}

impl Cells {
    fn of(layout: Layout) -> Self {
        let pages: Vec<u64> = layout.regions().iter().map(|region| region.len / PAGE_SIZE as u64).collect();
        let rows = |cell_pages: u64| -> u64 {
            pages.iter().map(|pages| pages.div_ceil(cell_pages).div_ceil(COLUMNS)).sum()
        };
        let mut cell_pages = 1;
        while rows(cell_pages) > ROWS_MAX + pages.len() as u64 {
            cell_pages *= 2;
        }
        let cells = |pages: &u64| (0..pages.div_ceil(cell_pages)).map(|_| Cell::default()).collect();
        Self { cell_pages, regions: pages.iter().map(cells).collect(), layout }
    }

    fn enter(&self, header: &FrameHeader, newest: u64) {
        let raw = if header.kind == FrameKind::Same { SAME } else { RAW };
        self.add(header.chunk, raw, header.raw & newest);
        self.add(header.chunk, ZERO, header.zero & newest);
        let percent = u64::from(header.encoded_len) * 100;
        let percent = percent.div_ceil((u64::from(header.zstd.count_ones()) * PAGE_SIZE as u64).max(1));
        let zstd = match percent {
            0..=10 => 3,
            11..=25 => 4,
            26..=50 => 5,
            _ => 6,
        };
        self.add(header.chunk, zstd, header.zstd & newest);
    }

    /// Adds pages of a chunk, of a kind.
    fn add(&self, chunk: u32, kind: usize, pages: u64) {
        let Some(place) = self.layout.locate(chunk).filter(|_| pages != 0) else { return };
        let first = place.offset / PAGE_SIZE as u64;
        let width = self.cell_pages.min(CHUNK_PAGES as u64);
        for at in (0..CHUNK_PAGES as u64).step_by(width as usize) {
            let mask = (u64::MAX >> (CHUNK_PAGES as u64 - width)) << at;
            let cell = (first + at) / self.cell_pages;
            if let (pages @ 1.., Some(cell)) =
                ((pages & mask).count_ones(), self.regions[place.region].get(cell as usize))
            {
                cell[kind].fetch_add(pages.into(), Ordering::Relaxed);
            }
        }
    }

    /// Pages of each kind in a cell, holes included.
    fn counts(&self, region: usize, cell: usize) -> [u64; KINDS.len()] {
        let pages = self.layout.regions()[region].len / PAGE_SIZE as u64;
        let pages = (pages - cell as u64 * self.cell_pages).min(self.cell_pages);
        let mut counts = self.regions[region][cell].each_ref().map(|count| count.load(Ordering::Relaxed));
        counts[0] = pages.saturating_sub(counts.iter().sum());
        counts
    }

    /// The kind of most pages of a cell; of several, the one with the most in it.
    fn kind(&self, region: usize, cell: usize) -> usize {
        let counts = self.counts(region, cell);
        (0..KINDS.len()).max_by_key(|&kind| counts[kind]).unwrap_or(0)
    }

    fn rows(&self, region: usize) -> i32 {
        (self.regions[region].len() as u64).div_ceil(COLUMNS) as i32
    }

    /// The picture.
    fn svg(&self, title: &str) -> Result<String, Box<dyn std::error::Error>> {
        let regions = self.regions.len();
        let rows: i32 = (0..regions).map(|region| self.rows(region)).sum();
        let head = LINE * (2 + KINDS.len() as i32);
        let height = 2 * MARGIN + head + rows * CELL + regions as i32 * (LINE + CELL);
        let width = 2 * MARGIN + COLUMNS as i32 * CELL;
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
            root.fill(&WHITE)?;
            let font = ("sans-serif", 17).into_font().color(&RGBColor(0x24, 0x29, 0x2f));
            let text = |text: String, x: i32, y: i32| root.draw(&Text::new(text, (x, y), font.clone()));
            let cell = size(self.cell_pages * PAGE_SIZE as u64);
            text(format!("{title}: a cell is {cell}, and coloured by most of it"), MARGIN, MARGIN)?;
            let totals = self.totals();
            let all: u64 = totals.iter().sum();
            for (at, ((name, colour), pages)) in KINDS.iter().zip(totals).enumerate() {
                let y = MARGIN + LINE * (at as i32 + 1);
                root.draw(&Rectangle::new([(MARGIN, y), (MARGIN + 14, y + 14)], colour.filled()))?;
                root.draw(&Rectangle::new([(MARGIN, y), (MARGIN + 14, y + 14)], AXIS.stroke_width(1)))?;
                let percent = pages as f64 * 100.0 / all.max(1) as f64;
                text(format!("{name}: {pages} pages, {percent:.1} %"), MARGIN + 24, y)?;
            }
            let mut y = MARGIN + head;
            for (number, region) in self.layout.regions().iter().enumerate() {
                let at = region.gpa.map_or(String::new(), |gpa| format!(" at {gpa:#x}"));
                text(format!("{:?}: {}{at}", region.name, size(region.len)), MARGIN, y)?;
                y += LINE;
                for (row, first, end, kind) in self.runs(number) {
                    let (top, left) = (y + row * CELL, MARGIN + first * CELL);
                    let corners = [(left, top), (MARGIN + end * CELL, top + CELL)];
                    root.draw(&Rectangle::new(corners, KINDS[kind].1.filled()))?;
                }
                y += self.rows(number) * CELL + CELL;
            }
            root.present()?;
        }
        Ok(svg)
    }

    fn totals(&self) -> [u64; KINDS.len()] {
        let mut totals = [0; KINDS.len()];
        for region in 0..self.regions.len() {
            for cell in 0..self.regions[region].len() {
                totals.iter_mut().zip(self.counts(region, cell)).for_each(|(total, count)| *total += count);
            }
        }
        totals
    }

    /// Cells of a region that lie side by side and are of one kind: row, first column, column behind the last, kind.
    fn runs(&self, region: usize) -> Vec<(i32, i32, i32, usize)> {
        let mut runs: Vec<(i32, i32, i32, usize)> = Vec::new();
        for cell in 0..self.regions[region].len() {
            let (row, column) = ((cell as u64 / COLUMNS) as i32, (cell as u64 % COLUMNS) as i32);
            let kind = self.kind(region, cell);
            match runs.last_mut().filter(|run| (run.0, run.2, run.3) == (row, column, kind)) {
                Some(run) => run.2 += 1,
                None => runs.push((row, column, column + 1, kind)),
            }
        }
        runs
    }
}

/// Around the legend's colours, of which some are light.
const AXIS: RGBColor = RGBColor(0x8c, 0x95, 0x9f);

#[cfg(test)]
mod tests {
    use pageferry::layout::Region;

    use super::*;

    fn frame(kind: FrameKind, chunk: u32, raw: u64, zero: u64, zstd: u64, encoded_len: u32) -> FrameHeader {
        FrameHeader { kind, chunk, encoded_len, raw, zero, zstd }
    }

    #[test]
    fn a_cell_has_the_kind_of_most_of_its_pages() {
        let regions = vec![Region::new("<ram>", 0, 128 << 12), Region::unplaced("rom", 3 << 12)];
        let cells = Cells::of(Layout::new(regions).unwrap());
        assert_eq!((cells.cell_pages, cells.regions[0].len(), cells.regions[1].len()), (1, 128, 3));
        cells.enter(&frame(FrameKind::Pages, 0, 0b0001, 0b0010, 0b1100, 4096), u64::MAX);
        cells.enter(&frame(FrameKind::Same, 1, u64::MAX, 0, 0, 0), !1);
        cells.enter(&frame(FrameKind::Pages, 2, 0b111, 0, 0, 0), 0b010);
        let kinds = |region: usize, cells_wanted: std::ops::Range<usize>| -> Vec<usize> {
            cells_wanted.map(|cell| cells.kind(region, cell)).collect()
        };
        assert_eq!(kinds(0, 0..5), [RAW, ZERO, 5, 5, 0]);
        assert_eq!((kinds(0, 63..66), kinds(1, 0..3)), (vec![0, 0, SAME], vec![0, RAW, 0]));
        assert_eq!(
            cells.runs(0),
            [(0, 0, 1, RAW), (0, 1, 2, ZERO), (0, 2, 4, 5), (0, 4, 65, 0), (0, 65, 128, SAME)]
        );
        assert_eq!(cells.totals().iter().sum::<u64>(), 131);
        let svg = cells.svg("a & b").unwrap();
        for word in
            ["a &amp; b", "&lt;ram&gt;", "rom", "as in the base: 63 pages", "raw: 2 pages", "512 KiB at 0x0"]
        {
            assert!(svg.contains(word), "{word}: {svg}");
        }
    }

    #[test]
    fn large_memory_has_large_cells_and_no_region_is_lost() {
        let mut regions = vec![Region::new("ram", 0, 1 << 40)];
        regions.extend((0..500).map(|number| Region::unplaced(format!("r{number:03}"), 4096)));
        let cells = Cells::of(Layout::new(regions).unwrap());
        assert!(cells.cell_pages > 64 && cells.cell_pages.is_power_of_two());
        assert!(cells.rows(0) > 64 && cells.rows(0) <= ROWS_MAX as i32 + 1, "{}", cells.rows(0));
        cells.enter(&frame(FrameKind::Pages, 0, u64::MAX, 0, 0, 0), u64::MAX);
        let counts = cells.counts(0, 0);
        assert_eq!((counts[RAW], counts[0]), (64, cells.cell_pages - 64));
        // What comes last in memory is in the last cell.
        let last = cells.layout.region_chunks(0).end - 1;
        cells.enter(&frame(FrameKind::Pages, last, 1, 0, 0, 0), u64::MAX);
        assert_eq!(cells.counts(0, cells.regions[0].len() - 1)[RAW], 1);
    }
}
