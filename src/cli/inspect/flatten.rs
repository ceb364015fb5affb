//! An archive written anew, so that it stands alone.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use pageferry::archive::{Walk, flatten};
use pageferry::{CodecMode, Status};
use serde::Serialize;

use super::describe::hex;
use super::{InspectArgs, Lines, check_spared, failed, open, show, watched};
use crate::cli::{CliError, Exit};

/// What was written.
#[derive(Debug, Serialize)]
struct Written {
    status: Status,
    file: String,
    id: String,
    file_bytes: u64,
    pages: u64,
    /// Bytes of the archive that it was made of, and of those that that stands on.
    source_bytes: u64,
    seconds: f64,
}

pub(super) fn run(args: &InspectArgs, new: &Path, walk: &Walk) -> Result<ExitCode, CliError> {
    if args.codec == CodecMode::Delta {
        let text =
            "--codec delta: every frame of an archive stands for itself; use raw, or zstd:LEVEL".into();
        return Err(CliError { exit: Exit::Usage, text });
    }
    let image = open(args)?;
    check_spared(new, image.archive(), image.base())?;
    let began = Instant::now();
    let flat = watched("writing", args, walk, || flatten(&image, new, args.codec, walk));
    let flat = flat.map_err(|error| failed(&args.file, &error))?;
    let all = std::iter::successors(Some(&image), |image| image.base());
    let written = Written {
        status: Status::Completed,
        file: new.display().to_string(),
        id: hex(&flat.id),
        file_bytes: flat.bytes,
        pages: flat.pages,
        source_bytes: all.map(|image| image.archive().footer().bytes).sum(),
        seconds: (began.elapsed().as_secs_f64() * 1e6).round() / 1e6,
    };
    show(args, &written, Written::text);
    Ok(ExitCode::SUCCESS)
}

impl Written {
    fn text(&self) -> String {
        let mut lines = Lines::default();
        let Self { file, id, file_bytes, pages, source_bytes, seconds, .. } = self;
        lines.add("written:", format!("{file}, id {id}"));
        lines.add("file:", format!("{file_bytes} bytes, {pages} pages; it was {source_bytes} bytes"));
        lines.add("time:", format!("{seconds:.3} s"));
        lines.0
    }
}
