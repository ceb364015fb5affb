//! RAM files made of an archive.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use pageferry::Status;
use pageferry::archive::{ArchiveError, Image, Walk};
use pageferry::bitmap::runs;
use pageferry::layout::{Layout, PAGE_SIZE};
use serde::Serialize;

use super::place::Place;
use super::{InspectArgs, Lines, cannot_write, check_spared, failed, open, show, watched};
use crate::cli::file::NewFile;
use crate::cli::{CliError, Exit};

/// What is written where.
struct Target {
    /// A region's name, or `all`.
    name: String,
    regions: Range<usize>,
    path: PathBuf,
    file: NewFile,
}

/// Why it cannot be.
#[derive(Debug, thiserror::Error)]
enum ExtractError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("it cannot be written")]
    Write(#[from] std::io::Error),
    #[error("{0} is damaged")]
    Damaged(Place),
}

/// What was extracted.
#[derive(Debug, Serialize)]
struct Extracted {
    status: Status,
    seconds: f64,
    extracted: Vec<RamFile>,
    /// Pages that are zeros now, because what was saved of them is damaged.
    damaged: Vec<Place>,
}

#[derive(Debug, Default, Serialize)]
struct RamFile {
    region: String,
    file: String,
    bytes: u64,
    data_pages: u64,
    /// Of zeros, or holes, which are holes of the file.
    hole_pages: u64,
    damaged_pages: u64,
}

pub(super) fn run(args: &InspectArgs, walk: &Walk) -> Result<ExitCode, CliError> {
    let image = open(args)?;
    let usage = |text| CliError { exit: Exit::Usage, text };
    let mut targets: Vec<Target> = Vec::new();
    for wanted in &args.extract {
        let (name, regions, path) = choose(wanted, image.layout()).map_err(usage)?;
        check_spared(&path, image.archive(), image.base())?;
        let file = NewFile::create(&path).map_err(|error| cannot_write(&path, &error))?;
        if targets.iter().any(|target| target.path == path) {
            return Err(usage(format!("{}: it cannot take two regions", path.display())));
        }
        targets.push(Target { name, regions, path, file });
    }
    let began = Instant::now();
    let mut extracted =
        Extracted { status: Status::Completed, seconds: 0.0, extracted: Vec::new(), damaged: Vec::new() };
    let write =
        || targets.iter().map(|target| target.write(&image, args, walk)).collect::<Result<Vec<_>, _>>();
    for (file, damaged) in watched("extracting", args, walk, write)? {
        extracted.extracted.push(file);
        extracted.damaged.extend(damaged);
    }
    // Only now that all are whole.
    for Target { path, file, .. } in targets {
        file.commit().map_err(|error| cannot_write(&path, &error))?;
    }
    extracted.seconds = (began.elapsed().as_secs_f64() * 1e6).round() / 1e6;
    show(args, &extracted, Extracted::text);
    Ok(ExitCode::SUCCESS)
}

/// What `REGION=FILE` means. Names of regions may have a `=`, too.
fn choose(wanted: &OsStr, layout: &Layout) -> Result<(String, Range<usize>, PathBuf), String> {
    let bytes = wanted.as_bytes();
    let regions = layout.regions();
    let splits = || bytes.iter().enumerate().filter(|(_, byte)| **byte == b'=').map(|(at, _)| at);
    let path = |at: usize| PathBuf::from(OsString::from(OsStr::from_bytes(&bytes[at + 1..])));
    for at in splits() {
        if let Some(found) = regions.iter().position(|region| region.name.as_bytes() == &bytes[..at]) {
            return Ok((regions[found].name.clone(), found..found + 1, path(at)));
        }
    }
    let said = wanted.to_string_lossy();
    let Some(at) = splits().next() else {
        return Err(format!("--extract {said}: expected REGION=FILE, such as {}=ram.img", regions[0].name));
    };
    if &bytes[..at] == b"all" {
        return Ok(("all".into(), 0..regions.len(), path(at)));
    }
    let names: Vec<String> = regions.iter().map(|region| format!("{:?}", region.name)).collect();
    let name = String::from_utf8_lossy(&bytes[..at]);
    Err(format!(
        "--extract: the archive has no region {name:?}; it has {}, or take all=FILE",
        names.join(", ")
    ))
}

impl Target {
    /// Writes the file's content.
    fn write(
        &self,
        image: &Image,
        args: &InspectArgs,
        walk: &Walk,
    ) -> Result<(RamFile, Vec<Place>), CliError> {
        let layout = image.layout();
        let region_bytes = layout.regions()[self.regions.clone()].iter().map(|region| region.len);
        let bytes = region_bytes.sum();
        let all = Mutex::new((RamFile::default(), Vec::new()));
        let first = layout.region_chunks(self.regions.start).start;
        let end = layout.region_chunks(self.regions.end - 1).end;
        let written = self.file.file().set_len(bytes).map_err(ExtractError::from).and_then(|()| {
            walk.begin(bytes);
            let make = || Ok((image.reader()?.forgiving(), RamFile::default(), Vec::new()));
            walk.each(
                (end - first) as usize,
                make,
                |(reader, counts, damaged), chunk| -> Result<(), ExtractError> {
                    let chunk = first + chunk as u32;
                    let content = image.read(chunk, layout.valid(chunk), reader)?;
                    damaged.extend(Place::of(layout, chunk, content.damaged));
                    if let (Some(first), false) = (damaged.first(), args.force_damaged) {
                        return Err(ExtractError::Damaged(first.clone()));
                    }
                    let (at, len) = self.place(layout, chunk);
                    for (first, count) in runs(content.filled) {
                        let pages = content.pages[first as usize..(first + count) as usize].as_flattened();
                        self.file.file().write_all_at(pages, at + u64::from(first) * PAGE_SIZE as u64)?;
                    }
                    counts.data_pages += u64::from(content.filled.count_ones());
                    counts.damaged_pages += u64::from(content.damaged.count_ones());
                    walk.step(len);
                    Ok(())
                },
                |(_, counts, damaged)| {
                    let mut all = all.lock().unwrap_or_else(|e| e.into_inner());
                    all.0.data_pages += counts.data_pages;
                    all.0.damaged_pages += counts.damaged_pages;
                    all.1.extend(damaged);
                    Ok(())
                },
            )
        });
        written.map_err(|error| self.failed(args, &error))?;
        let (mut file, mut damaged) = all.into_inner().unwrap_or_else(|e| e.into_inner());
        damaged.sort_unstable();
        (file.region, file.file, file.bytes) = (self.name.clone(), self.path.display().to_string(), bytes);
        file.hole_pages = bytes / PAGE_SIZE as u64 - file.data_pages - file.damaged_pages;
        Ok((file, damaged))
    }

    /// Where a chunk lies in the file, and how many bytes it has.
    fn place(&self, layout: &Layout, chunk: u32) -> (u64, u64) {
        let Some(place) = layout.locate(chunk) else { return (0, 0) };
        let before = &layout.regions()[self.regions.start..place.region];
        (before.iter().map(|region| region.len).sum::<u64>() + place.offset, place.bytes() as u64)
    }

    fn failed(&self, args: &InspectArgs, error: &ExtractError) -> CliError {
        match error {
            ExtractError::Archive(error) => failed(&args.file, error),
            ExtractError::Write(error) => cannot_write(&self.path, error),
            ExtractError::Damaged(_) => {
                let file = args.file.display();
                let help = "--verify tells of all that is damaged, and --force-damaged extracts it as zeros";
                CliError { exit: Exit::Failed, text: format!("{file}: {error}; {help}") }
            }
        }
    }
}

impl Extracted {
    fn text(&self) -> String {
        let mut lines = Lines::default();
        for RamFile { region, file, bytes, data_pages, hole_pages, .. } in &self.extracted {
            lines.add(
                "extracted:",
                format!(
                    "{region:?} to {file}: {bytes} bytes, {data_pages} pages of data, {hole_pages} of holes"
                ),
            );
        }
        self.damaged.iter().for_each(|place| lines.add("damaged:", format!("{place}: zeros now")));
        lines.add("time:", format!("{:.3} s", self.seconds));
        lines.0
    }
}

#[cfg(test)]
mod tests {
    use pageferry::layout::Region;

    use super::*;

    #[test]
    fn regions_are_chosen_by_name_whatever_is_in_it() {
        let regions =
            vec![Region::new("ram", 0, 4096), Region::unplaced("a=b", 4096), Region::unplaced("z", 4096)];
        let layout = Layout::new(regions).unwrap();
        let chosen = |text: &str| choose(OsStr::new(text), &layout);
        let ok = |name: &str, regions, path: &str| Ok((name.to_owned(), regions, PathBuf::from(path)));
        assert_eq!(chosen("ram=x=y"), ok("ram", 0..1, "x=y"));
        assert_eq!(chosen("a=b=x"), ok("a=b", 1..2, "x"));
        assert_eq!(chosen("all=x"), ok("all", 0..3, "x"));
        for (bad, word) in
            [("ram", "REGION=FILE"), ("rom=x", "\"ram\", \"a=b\", \"z\""), ("=x", "no region \"\"")]
        {
            assert!(chosen(bad).unwrap_err().contains(word), "{bad}");
        }
    }
}
