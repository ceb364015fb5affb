//! In what two archives differ.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use pageferry::Status;
use pageferry::archive::{CompareError, Image, PagesCompared, StateDifference, Walk, compare, compare_state};
use pageferry::layout::{Layout, Region};
use serde::Serialize;

use super::describe::hex;
use super::{InspectArgs, Lines, failed, show, size, watched};
use crate::cli::{CliError, Exit};

/// What the exit code says of archives that differ.
const DIFFERENT: u8 = 1;

/// What comparing two archives came to.
#[derive(Debug, Serialize)]
struct Diff {
    status: Status,
    equal: bool,
    first: Side,
    second: Side,
    /// Regions that only one of them has, or that are other ones; then no pages were compared.
    layout: Vec<RegionDiff>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compared: Option<ComparedBy>,
    regions: Vec<Pages>,
    state: Vec<Piece>,
    seconds: f64,
}

/// By what pages were compared.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum ComparedBy {
    Seals,
    Content,
}

#[derive(Debug, Serialize)]
struct Side {
    file: String,
    id: String,
    /// It says nothing of what is equal: a guest may have been saved on two hosts.
    machine: String,
}

#[derive(Debug, Serialize)]
struct RegionDiff {
    region: String,
    first: Option<Extent>,
    second: Option<Extent>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Extent {
    gpa: Option<u64>,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Pages {
    region: String,
    equal_pages: u64,
    changed_pages: u64,
    only_first_pages: u64,
    only_second_pages: u64,
    hole_pages: u64,
}

/// A piece of state that differs.
#[derive(Debug, Serialize)]
struct Piece {
    name: String,
    #[serde(flatten)]
    differs: Differs,
}

#[derive(Debug, Serialize)]
#[serde(tag = "differs", rename_all = "kebab-case")]
enum Differs {
    OnlyFirst,
    OnlySecond,
    Version { first: u32, second: u32 },
    Bytes { offset: usize, first_bytes: usize, second_bytes: usize },
}

pub(super) fn run(args: &InspectArgs, other: &Path, walk: &Walk) -> Result<ExitCode, CliError> {
    let began = Instant::now();
    let diff = Diff::of(args, other, walk, began).map_err(|error| match error.exit {
        // It would say that they differ.
        Exit::Failed => CliError { exit: Exit::CannotStart, ..error },
        _ => error,
    })?;
    show(args, &diff, Diff::text);
    Ok(if diff.equal { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
}

impl Diff {
    fn of(args: &InspectArgs, other: &Path, walk: &Walk, began: Instant) -> Result<Self, CliError> {
        let open = |path: &Path, base: Option<&Path>| -> Result<_, CliError> {
            let opened = Image::open(path, base).and_then(|image| Ok((image.state()?, image)));
            opened.map_err(|error| failed(path, &error))
        };
        let (first_state, first) = open(&args.file, args.base.as_deref())?;
        let (second_state, second) = open(other, None)?;
        let layout = layout_differences(first.layout(), second.layout());
        let (mut compared, mut regions) = (None, Vec::new());
        if layout.is_empty() {
            let pages = watched("comparing", args, walk, || compare(&first, &second, walk));
            let pages = pages.map_err(|error| match &error {
                CompareError::First(error) | CompareError::Walk(error) => failed(&args.file, error),
                CompareError::Second(error) => failed(other, error),
                error => CliError::cannot_start(error),
            })?;
            compared = Some(if pages.by_seals { ComparedBy::Seals } else { ComparedBy::Content });
            let names = first.layout().regions().iter().map(|region| region.name.clone());
            regions = names.zip(pages.regions).map(|(name, pages)| Pages::of(name, pages)).collect();
        }
        let state = compare_state(&first_state, &second_state);
        let state: Vec<_> = state.into_iter().map(|(name, by)| Piece { name, differs: by.into() }).collect();
        Ok(Self {
            status: Status::Completed,
            equal: layout.is_empty() && state.is_empty() && regions.iter().all(Pages::is_equal),
            first: Side::of(&first),
            second: Side::of(&second),
            layout,
            compared,
            regions,
            state,
            seconds: (began.elapsed().as_secs_f64() * 1e6).round() / 1e6,
        })
    }

    fn text(&self) -> String {
        let mut lines = Lines::default();
        for (name, Side { file, id, .. }) in [("first:", &self.first), ("second:", &self.second)] {
            lines.add(name, format!("{file}, id {id}"));
        }
        let (first, second) = (&self.first.machine, &self.second.machine);
        if first != second {
            lines.add("machine:", format!("{first:?}, {second:?}"));
        }
        for RegionDiff { region, first, second } in &self.layout {
            let said = |extent: &Option<Extent>| extent.as_ref().map_or("not there".into(), Extent::text);
            lines.add("region:", format!("{region:?}: {}; in the second {}", said(first), said(second)));
        }
        for pages in &self.regions {
            lines.add("region:", pages.text());
        }
        if let Some(by) = &self.compared {
            let by = match by {
                ComparedBy::Seals => "their seals: both have the same seed",
                ComparedBy::Content => "their content",
            };
            lines.add("compared by:", by);
        }
        self.state.iter().for_each(|piece| lines.add("state:", piece.text()));
        lines.add("time:", format!("{:.3} s", self.seconds));
        let equal = match (self.equal, self.layout.is_empty()) {
            (true, _) => "yes: memory and state",
            (false, true) => "no",
            (false, false) => "no: they are of guests with other memory, and no pages were compared",
        };
        lines.add("equal:", equal);
        lines.0
    }
}

/// Regions that are not in both layouts alike.
fn layout_differences(first: &Layout, second: &Layout) -> Vec<RegionDiff> {
    let find = |layout: &Layout, name: &str| {
        let region = layout.regions().iter().find(|region| region.name == name);
        region.map(|Region { gpa, len, .. }| Extent { gpa: *gpa, bytes: *len })
    };
    let only_second = second.regions().iter().filter(|region| find(first, &region.name).is_none());
    let names = first.regions().iter().chain(only_second).map(|region| region.name.clone());
    let regions = names.map(|region| {
        let (first, second) = (find(first, &region), find(second, &region));
        RegionDiff { region, first, second }
    });
    regions.filter(|diff| diff.first != diff.second).collect()
}

impl Side {
    fn of(image: &Image) -> Self {
        let header = image.header();
        let file = image.archive().path().display().to_string();
        Self { file, id: hex(&header.id), machine: header.machine.clone() }
    }
}

impl Extent {
    fn text(&self) -> String {
        let at = self.gpa.map_or("without an address".into(), |gpa| format!("at {gpa:#x}"));
        format!("{} {at}", size(self.bytes))
    }
}

impl Pages {
    fn of(region: String, pages: PagesCompared) -> Self {
        Self {
            region,
            equal_pages: pages.equal,
            changed_pages: pages.changed,
            only_first_pages: pages.only_first,
            only_second_pages: pages.only_second,
            hole_pages: pages.hole,
        }
    }

    fn is_equal(&self) -> bool {
        self.changed_pages + self.only_first_pages + self.only_second_pages == 0
    }

    fn text(&self) -> String {
        let Self { region, equal_pages, changed_pages, only_first_pages, only_second_pages, hole_pages } =
            self;
        format!(
            "{region:?}: {equal_pages} pages equal, {changed_pages} changed, {only_first_pages} only in the first, \
             {only_second_pages} only in the second, {hole_pages} holes in both"
        )
    }
}

impl From<StateDifference> for Differs {
    fn from(difference: StateDifference) -> Self {
        match difference {
            StateDifference::OnlyFirst => Self::OnlyFirst,
            StateDifference::OnlySecond => Self::OnlySecond,
            StateDifference::Version { first, second } => Self::Version { first, second },
            StateDifference::Bytes { offset, first, second } => {
                Self::Bytes { offset, first_bytes: first, second_bytes: second }
            }
        }
    }
}

impl Piece {
    fn text(&self) -> String {
        let what = match &self.differs {
            Differs::OnlyFirst => "only in the first".into(),
            Differs::OnlySecond => "only in the second".into(),
            Differs::Version { first, second } => format!("of version {first}, and of version {second}"),
            Differs::Bytes { offset, first_bytes, second_bytes } if first_bytes == second_bytes => {
                format!("differs from byte {offset:#x} on, of {first_bytes} bytes")
            }
            Differs::Bytes { offset, first_bytes, second_bytes } => {
                format!("differs from byte {offset:#x} on, of {first_bytes} bytes and of {second_bytes}")
            }
        };
        format!("{:?}: {what}", self.name)
    }
}
