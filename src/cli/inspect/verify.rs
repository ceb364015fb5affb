//! Whether an archive is whole.

use std::fmt::Write;
use std::time::Instant;

use pageferry::archive::{self, ArchiveError, Fault, Walk};
use pageferry::layout::Layout;
use serde::Serialize;

use super::place::Place;
use super::{Lines, Opened};
use crate::cli::words::explain;

/// What reading all of an archive came to.
#[derive(Debug, Serialize)]
pub(super) struct Verified {
    whole: bool,
    bytes: u64,
    seconds: f64,
    gb_s: f64,
    /// Pages of the base that were read.
    base_pages: u64,
    damaged_pages: u64,
    damage: Vec<Damaged>,
}

/// Something that is damaged.
#[derive(Debug, Serialize)]
struct Damaged {
    /// Where, from the archive's first byte.
    offset: u64,
    /// Pages that are not to be had because of it.
    pages: Vec<Place>,
    /// In what way.
    what: String,
}

impl Verified {
    /// Reads and checks all of it.
    pub(super) fn of(opened: &Opened, walk: &Walk) -> Result<Self, ArchiveError> {
        let (archive, began) = (opened.archive(), Instant::now());
        let checked = archive::verify(archive, opened.base(), walk)?;
        let seconds = began.elapsed().as_secs_f64();
        let damaged_pages = checked.damaged_pages();
        let mut damage: Vec<Damaged> =
            checked.faults.into_iter().map(|fault| Damaged::of(&fault, archive.layout())).collect();
        let no_base = opened.no_base().map(|why| Damaged { offset: 0, pages: Vec::new(), what: why.into() });
        damage.extend(no_base);
        let rounded = |value: f64| (value * 1e6).round() / 1e6;
        Ok(Self {
            whole: damage.is_empty(),
            bytes: checked.bytes,
            seconds: rounded(seconds),
            gb_s: rounded(checked.bytes as f64 / seconds.max(1e-9) / 1e9),
            base_pages: checked.base_pages,
            damaged_pages,
            damage,
        })
    }

    /// What is to be said of it where it is not whole.
    pub(super) fn damage(&self) -> Option<String> {
        let Self { damage, damaged_pages, .. } = self;
        let first = damage.first()?;
        let places = if damage.len() == 1 { "one place".into() } else { format!("{} places", damage.len()) };
        Some(format!(
            "the archive is damaged in {places}, and {damaged_pages} pages with it: {}",
            first.text()
        ))
    }

    /// The same in lines.
    pub(super) fn text(&self) -> String {
        let mut lines = Lines::default();
        let Self { bytes, seconds, gb_s, .. } = self;
        let base = match self.base_pages {
            0 => String::new(),
            pages => format!(", and {pages} pages of the base"),
        };
        lines.add("checked:", format!("{bytes} bytes{base} in {seconds:.3} s ({gb_s:.2} GB/s)"));
        self.damage.iter().for_each(|damaged| lines.add("damaged:", damaged.text()));
        lines.add(
            "whole:",
            if self.whole { "yes: every frame, pad and piece of state is what was saved" } else { "no" },
        );
        lines.0
    }
}

impl Damaged {
    fn of(fault: &Fault, layout: &Layout) -> Self {
        let pages = fault.pages.map(|(chunk, pages)| Place::of(layout, chunk, pages)).unwrap_or_default();
        let what = match &fault.error {
            // Where it is stands beside it.
            ArchiveError::Damaged { source, .. } => explain(source),
            error => explain(error),
        };
        Self { offset: fault.offset, pages, what }
    }

    fn text(&self) -> String {
        let mut text = format!("at offset {:#x}: {}", self.offset, self.what);
        for (at, place) in self.pages.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{place}", if at == 0 { ": " } else { ", " });
        }
        text
    }
}
