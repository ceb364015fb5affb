//! `pageferry inspect`: what an archive is, whether it is whole, and what can be made of it without loading it.

mod describe;
mod diff;
mod extract;
mod flatten;
mod map;
mod place;
mod verify;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pageferry::archive::{Archive, ArchiveError, Image, Walk};
use pageferry::cli::print;
use pageferry::{CodecMode, Status};
use serde::Serialize;

use self::describe::Description;
use self::map::{Drawn, Map};
use self::verify::Verified;
use super::words::explain;
use super::{CliError, Exit, file, output, stop};

/// Says what an archive is and whether it is whole, and makes RAM files, pictures and other archives of it
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct InspectArgs {
    /// The archive
    file: PathBuf,
    /// The archive that it stands on, where that is not where it says
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Read all of it and of its base what it stands on, and tell of everything that is damaged
    #[arg(long)]
    verify: bool,
    /// Draw guest memory into this file, by what is saved of it
    #[arg(long, value_name = "FILE.svg")]
    map: Option<PathBuf>,
    /// Write the memory of a region, or of `all` of them one behind the other, into a RAM file, made new; holes stay holes. May be given
    /// several times
    #[arg(long, value_name = "REGION=FILE", conflicts_with_all = ["verify", "map"])]
    extract: Vec<OsString>,
    /// Extract also what is damaged: as zeros, and tell of it
    #[arg(long, requires = "extract")]
    force_damaged: bool,
    /// Compare it with this archive
    #[arg(long, value_name = "OTHER", conflicts_with_all = ["verify", "map", "extract"])]
    diff: Option<PathBuf>,
    /// Write the same memory and state into an archive, made new, that stands on no other and has every page once
    #[arg(long, value_name = "NEW", conflicts_with_all = ["verify", "map", "extract", "diff"])]
    flatten: Option<PathBuf>,
    /// How pages of the new archive are encoded: raw, zstd[:LEVEL]
    #[arg(long, requires = "flatten", default_value = "zstd:1")]
    codec: CodecMode,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(super) json: bool,
}

const HELP: &str = "Examples:\n  pageferry inspect ram.pferry\n  pageferry inspect /backup/vm1.pferry --verify --json\n  \
pageferry inspect vm1.pferry --map vm1.svg\n  pageferry inspect vm1.pferry --extract ram=/dev/shm/ram.img\n  \
pageferry inspect monday.pferry --diff tuesday.pferry\n  pageferry inspect tuesday.pferry --flatten whole.pferry --codec zstd:3\n\n\
Exit codes: 0 done, and with --diff: they are equal; 1 the archive is damaged, and with --diff: they differ; 2 wrong arguments; \
3 it cannot be opened or is none, something else cannot be written, and with --diff: one is damaged; 130 cancelled.";

/// An archive, with what it stands on, or why that is not to be had.
enum Opened {
    Whole(Image),
    Alone(Archive, String),
}

/// What is printed of an archive.
#[derive(Debug, Serialize)]
struct Printed {
    status: Status,
    #[serde(flatten)]
    description: Description,
    #[serde(skip_serializing_if = "Option::is_none")]
    verify: Option<Verified>,
    #[serde(skip_serializing_if = "Option::is_none")]
    map: Option<Drawn>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<u8>,
}

pub(super) fn run(args: &InspectArgs) -> Result<ExitCode, CliError> {
    let walk = Walk::default();
    let cancelled = walk.clone();
    stop::on_signals(move || cancelled.cancel());
    if let Some(other) = &args.diff {
        return diff::run(args, other, &walk);
    }
    if let Some(new) = &args.flatten {
        return flatten::run(args, new, &walk);
    }
    if !args.extract.is_empty() {
        return extract::run(args, &walk);
    }
    describe(args, &walk)
}

/// Says what the archive is, and draws and verifies it where that is asked for.
fn describe(args: &InspectArgs, walk: &Walk) -> Result<ExitCode, CliError> {
    let opened = Opened::open(args)?;
    let map = args.map.as_ref().map(|path| Map::begin(&opened, path)).transpose()?;
    let fail = |error| failed(&args.file, &error);
    let description = watched("reading", args, walk, || Description::of(&opened, map.as_ref(), walk));
    let description = description.map_err(fail)?;
    let map = map.map(Map::finish).transpose()?;
    let verify = args.verify.then(|| watched("checking", args, walk, || Verified::of(&opened, walk)));
    let verify = verify.transpose().map_err(fail)?;
    let error = verify.as_ref().map_or_else(|| description.damage(), Verified::damage);
    let status = if error.is_some() { Status::Failed } else { Status::Completed };
    let exit_code = error.as_ref().map(|_| Exit::Failed as u8);
    let printed = Printed { status, description, verify, map, error, exit_code };
    show(args, &printed, Printed::text);
    match printed.error {
        Some(text) => Err(CliError { exit: Exit::Failed, text }),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Prints a result, as JSON or as text.
fn show<T: Serialize>(args: &InspectArgs, result: &T, text: impl FnOnce(&T) -> String) {
    if args.json {
        print::line(serde_json::to_string(result).unwrap_or_default());
    } else {
        print::text(text(result));
    }
}

/// Does some work on archives while a bar shows how far it is.
fn watched<T, E>(
    what: &'static str,
    args: &InspectArgs,
    walk: &Walk,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    let bar = output::Bar::walk(what, walk, args.json);
    let result = work();
    bar.finish();
    result
}

/// Opens an archive of which all is needed, with what it stands on.
fn open(args: &InspectArgs) -> Result<Image, CliError> {
    Image::open(&args.file, args.base.as_deref()).map_err(|error| failed(&args.file, &error))
}

/// Refuses to write to a file that is read.
fn check_spared(path: &Path, archive: &Archive, base: Option<&Image>) -> Result<(), CliError> {
    let bases = std::iter::successors(base, |image| image.base()).map(Image::archive);
    if std::iter::once(archive).chain(bases).any(|read| file::is_same(path, read.path())) {
        let text =
            format!("{}: this is the archive, or one that it stands on; choose another file", path.display());
        return Err(CliError { exit: Exit::Usage, text });
    }
    Ok(())
}

/// A file that cannot be written.
fn cannot_write(path: &Path, error: &std::io::Error) -> CliError {
    CliError { exit: Exit::CannotStart, text: format!("cannot write {}: {error}", path.display()) }
}

/// What an archive's error is to whoever runs the command.
fn failed(path: &Path, error: &ArchiveError) -> CliError {
    let exit = match error {
        error if error.is_cancelled() => Exit::Cancelled,
        ArchiveError::Damaged { .. } | ArchiveError::Truncated { .. } | ArchiveError::Trailing { .. } => {
            Exit::Failed
        }
        _ => Exit::CannotStart,
    };
    // The first has its name in it already.
    let text = match error {
        ArchiveError::Open { .. } => explain(error),
        _ => format!("{}: {}", path.display(), explain(error)),
    };
    CliError { exit, text }
}

impl Opened {
    fn open(args: &InspectArgs) -> Result<Self, CliError> {
        match Image::open(&args.file, args.base.as_deref()) {
            Ok(image) => Ok(Self::Whole(image)),
            Err(error @ (ArchiveError::Base { .. } | ArchiveError::BaseUnread { .. })) => {
                let archive = Archive::open(&args.file).map_err(|error| failed(&args.file, &error))?;
                Ok(Self::Alone(archive, explain(&error)))
            }
            Err(error) => Err(failed(&args.file, &error)),
        }
    }

    fn archive(&self) -> &Archive {
        match self {
            Self::Whole(image) => image.archive(),
            Self::Alone(archive, _) => archive,
        }
    }

    /// What it stands on.
    fn base(&self) -> Option<&Image> {
        match self {
            Self::Whole(image) => image.base(),
            Self::Alone(..) => None,
        }
    }

    /// Why what it stands on is not to be had.
    fn no_base(&self) -> Option<&str> {
        match self {
            Self::Whole(_) => None,
            Self::Alone(_, why) => Some(why),
        }
    }
}

impl Printed {
    fn text(&self) -> String {
        let verify = self.verify.as_ref().map(Verified::text).unwrap_or_default();
        let map = self.map.as_ref().map(Drawn::text).unwrap_or_default();
        self.description.text() + &map + &verify
    }
}

/// Lines of a name and a value, as all commands print them.
#[derive(Debug, Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: impl std::fmt::Display) {
        use std::fmt::Write;
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{name:<18}{value}");
    }
}

/// Bytes, as a number that is short where it can be.
fn size(bytes: u64) -> String {
    match [(30, "GiB"), (20, "MiB"), (10, "KiB")]
        .iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
    {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}
