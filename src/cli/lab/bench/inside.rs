//! The bench itself, as it runs in the guest: contenders take turns, so that what disturbs one disturbs all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use pageferry::cli::measure::ferry::Ferry;
use pageferry::cli::measure::qemu::{self, Mode};
use pageferry::cli::measure::{Job, Place, Target, same_content};
use pageferry::cli::print;

use super::super::error::LabError;
use super::super::{own_program, script};
use super::image::{self, Kind};
use super::table::{Rates, Row, Table};
use super::{InsideArgs, WhatArgs, folder, perftest};

/// The first port; every run has its own, so that none waits for an earlier one's connections to time out.
const FIRST_PORT: u16 = 20_000;
/// Runs of ib_write_bw with each message size, to choose the best.
const SWEEPS: usize = 3;

/// What moves an image.
#[derive(Clone, Debug)]
enum Contender {
    /// Ours: scheme, streams or queue pairs, codec.
    Ferry(&'static str, u16, &'static str),
    /// The same from beside two QEMUs.
    Beside(&'static str, u16, &'static str),
    /// QEMU's.
    Qemu(Mode),
}

impl Contender {
    fn name(&self) -> String {
        match self {
            Self::Beside(scheme, streams, codec) => {
                format!("{}, beside QEMU", Self::Ferry(scheme, *streams, codec).name())
            }
            Self::Ferry(scheme, streams, codec) => {
                let unit = if *scheme == "rdma" { "queue pair" } else { "stream" };
                let plural = if *streams == 1 { "" } else { "s" };
                format!("pageferry {scheme}, {streams} {unit}{plural}, {codec}")
            }
            Self::Qemu(Mode::RdmaPinAll) => "QEMU rdma, pin-all".into(),
            Self::Qemu(Mode::Multifd(channels)) => format!("QEMU tcp multifd, {channels} channels"),
            Self::Qemu(mode) => format!("QEMU {mode}"),
        }
    }
}

/// Everyone, in the order of the table.
fn contenders() -> Vec<Contender> {
    let mut all = Vec::new();
    for codec in ["auto", "raw"] {
        all.extend([1, 2, 3, 4].map(|pairs| Contender::Ferry("rdma", pairs, codec)));
    }
    all.extend([1, 2].map(|pairs| Contender::Beside("rdma", pairs, "auto")));
    all.extend([Mode::Rdma, Mode::RdmaPinAll].map(Contender::Qemu));
    all.extend(["auto", "raw"].map(|codec| Contender::Ferry("tcp", 4, codec)));
    all.push(Contender::Qemu(Mode::Multifd(4)));
    all
}

/// Measures and prints the table as JSON; progress goes to standard error.
pub(in super::super) fn run(args: &InsideArgs) -> Result<ExitCode, LabError> {
    let mut bench = Bench { what: &args.what, port: FIRST_PORT, folder: folder() };
    if args.what.huge_pages {
        remount_for_huge_pages()?;
    }
    fs::create_dir_all(&bench.folder).map_err(LabError::file("make the folder", &bench.folder))?;
    let mut rows = Vec::new();
    if args.what.wants("ib_write_bw") {
        rows.push(bench.limit());
    }
    for kind in &args.what.images {
        rows.extend(bench.image(*kind)?);
    }
    let table = Table {
        image_bytes: args.what.mem,
        huge_pages: args.what.huge_pages,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        qemu: qemu::version(),
        rows,
    };
    print::line(serde_json::to_string(&table).unwrap_or_default());
    Ok(ExitCode::SUCCESS)
}

/// Has the tmpfs that all files lie in grant huge pages to whoever asks for them.
fn remount_for_huge_pages() -> Result<(), LabError> {
    let done = Command::new("mount").args(["-o", "remount,huge=advise", "/dev/shm"]).status();
    match done {
        Ok(status) if status.success() => Ok(()),
        _ => Err(LabError::Inside(
            "/dev/shm cannot be remounted with huge=advise: is the kernel built without huge pages?".into(),
        )),
    }
}

impl WhatArgs {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only))
    }
}

struct Bench<'a> {
    what: &'a WhatArgs,
    port: u16,
    folder: PathBuf,
}

impl Bench<'_> {
    fn next_port(&mut self) -> u16 {
        self.port += 1;
        self.port
    }

    /// What the device carries with the message size that suits it best.
    fn limit(&mut self) -> Row {
        let host = script::address(0);
        let mut sizes = perftest::SIZES.map(|size| Row::new(format!("ib_write_bw, {size} B"), None));
        // Large messages lose packets now and then, so one run tells little.
        for _ in 0..SWEEPS {
            for (size, row) in perftest::SIZES.into_iter().zip(&mut sizes) {
                let run = perftest::run(size, &host, self.next_port());
                say(&row.what, run.as_ref().copied());
                row.add(run.map(Rates::plain));
                if row.failed.is_some() {
                    return row.clone();
                }
            }
        }
        let by_median = |a: &&(u64, Row), b: &&(u64, Row)| {
            a.1.median_mb_s.unwrap_or_default().total_cmp(&b.1.median_mb_s.unwrap_or_default())
        };
        let sizes: Vec<(u64, Row)> = perftest::SIZES.into_iter().zip(sizes).collect();
        let best = sizes.iter().max_by(by_median).map_or(perftest::SIZES[0], |(size, _)| *size);
        let mut row = Row::new(format!("ib_write_bw, {best} B"), None);
        for _ in 0..self.what.runs {
            let run = perftest::run(best, &host, self.next_port());
            say(&row.what, run.as_ref().copied());
            row.add(run.map(Rates::plain));
        }
        row
    }

    /// Every contender with one image.
    fn image(&mut self, kind: Kind) -> Result<Vec<Row>, LabError> {
        let image = self.folder.join("image");
        let all: Vec<_> = contenders().into_iter().filter(|one| self.what.wants(&one.name())).collect();
        let mut rows: Vec<_> = all.iter().map(|one| Row::new(one.name(), Some(kind))).collect();
        // The first run warms caches and memory up, and checks the copy; it does not count.
        for run in 0..=self.what.runs {
            for (contender, row) in all.iter().zip(&mut rows) {
                if row.failed.is_some() {
                    continue;
                }
                // Made anew for each: a source that reads holes through a mapping fills them, and its successor would find none.
                image::make(&image, kind, self.what.mem).map_err(LabError::file("make the image", &image))?;
                let rate = self.measure(contender, &image, run == 0);
                say(&format!("{kind}: {}", row.what), rate.as_ref().map(|rates| rates.total));
                if run > 0 || rate.is_err() {
                    row.add(rate);
                }
            }
        }
        fs::remove_file(&image).map_err(LabError::file("remove", &image))?;
        Ok(rows)
    }

    /// One run. With `check` the copy must be equal.
    fn measure(&mut self, contender: &Contender, image: &Path, check: bool) -> Result<Rates, String> {
        let (host, port) = (script::address(0), self.next_port());
        let copy = self.folder.join("copy");
        let _ = fs::remove_file(&copy);
        let here = Place::default();
        let job = Job {
            image,
            target: Target::File(&copy),
            source: &here,
            destination: &here,
            host: &host,
            port,
            folder: &self.folder,
            watch_memory: false,
            tls: None,
        };
        let took = match contender {
            Contender::Ferry(scheme, streams, codec) | Contender::Beside(scheme, streams, codec) => {
                let program = own_program().map_err(|e| e.to_string())?;
                let ferry = Ferry { program: &program, scheme, streams: *streams, codec };
                let took = match contender {
                    Contender::Beside(..) => ferry.attached(&job),
                    _ => ferry.transfer(&job),
                };
                // To start a program takes long on emulated CPUs, so this is the time that it reports itself.
                took.map(|took| (took.reported_ms, took.setup_ms))
            }
            Contender::Qemu(mode) => qemu::migrate(*mode, &job).map(|took| (took.total_ms, took.setup_ms)),
        };
        let equal = !check || took.is_err() || same_content(image, &copy).map_err(|e| e.to_string())?;
        let _ = fs::remove_file(&copy);
        let (total_ms, setup_ms) = took?;
        if !equal {
            return Err("the copy differs from the image".into());
        }
        if total_ms <= setup_ms {
            return Err("it took no time at all".into());
        }
        let rate = |ms: f64| self.what.mem as f64 / 1e3 / ms;
        Ok(Rates { total: rate(total_ms), moving: rate(total_ms - setup_ms) })
    }
}

fn say(what: &str, rate: Result<f64, &String>) {
    match rate {
        Ok(rate) => print::note(format_args!("{what}: {rate:.1} MB/s")),
        Err(reason) => print::note(format_args!("{what}: failed: {reason}")),
    }
    // Whatever the run left to the kernel is done before the next one.
    std::thread::sleep(Duration::from_millis(100));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_has_a_name_of_its_own() {
        let mut names: Vec<_> = contenders().iter().map(Contender::name).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        assert_eq!(all, 8 + 2 + 2 + 2 + 1);
    }
}
