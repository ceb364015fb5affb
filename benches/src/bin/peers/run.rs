//! Comparisons: contenders take turns with one image, so that what disturbs one disturbs all.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::measure::{Job, Place, Target, Took, same_content};
use pageferry_benches::images::{self, Holes, Kind};
use serde::{Deserialize, Serialize};

use crate::contender::Contender;
use crate::link::{Link, Rate};
use crate::signals;
use crate::warm::Reservoir;

/// Images of all runs are alike.
pub(crate) const SEED: u64 = 7;
/// Warm memory for a run, beyond what its image takes.
const WARM_MORE: u64 = 1 << 30;
/// The first port; every run has its own, so that none waits for an earlier one's connections to time out.
const FIRST_PORT: u16 = 21_000;

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    /// It is made: its content, and its bytes.
    Made(Kind, u64),
    /// It is there; a copy of it is used.
    File(PathBuf),
}

/// What is compared.
#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    pub(crate) name: String,
    pub(crate) image: Image,
    /// The destination's memory: anonymous, else a fresh tmpfs file.
    pub(crate) anonymous: bool,
    pub(crate) link: Option<Rate>,
    pub(crate) contenders: Vec<Contender>,
    pub(crate) watch_memory: bool,
}

/// A contender's runs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Runs {
    pub(crate) contender: String,
    pub(crate) runs: Vec<Took>,
    /// Why there are no more.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) failed: Option<String>,
}

impl Runs {
    /// The median of a figure; `None` without runs.
    pub(crate) fn median(&self, figure: impl Fn(&Took) -> f64) -> Option<f64> {
        median(self.runs.iter().map(figure).collect())
    }

    pub(crate) fn total_ms(&self) -> Option<f64> {
        self.median(|took| took.total_ms)
    }

    pub(crate) fn cpu_s(&self) -> Option<f64> {
        self.median(Took::cpu_s)
    }

    pub(crate) fn wire_bytes(&self) -> Option<f64> {
        self.median(|took| took.wire_bytes as f64)
    }
}

/// The middle, or between the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[half]),
        _ => Some(f64::midpoint(values[half - 1], values[half])),
    }
}

/// What came out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) image_bytes: u64,
    pub(crate) data_bytes: u64,
    /// Of the destination.
    pub(crate) memory: String,
    pub(crate) link: String,
    pub(crate) contenders: Vec<Runs>,
}

/// How all of them run.
#[derive(Debug)]
pub(crate) struct Runner {
    pub(crate) pageferry: PathBuf,
    pub(crate) folder: PathBuf,
    pub(crate) runs: u32,
    warm: Reservoir,
    port: u16,
}

impl Runner {
    /// Images and copies go into a new folder in `within`, which is removed in the end.
    pub(crate) fn new(pageferry: PathBuf, within: &Path, runs: u32) -> Result<Self, String> {
        let folder = within.join(format!("pageferry-peers-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(Self { pageferry, folder, runs, warm: Reservoir::default(), port: FIRST_PORT })
    }

    /// Every contender, in turns. The first round warms up and checks the copies; it does not count.
    pub(crate) fn compare(&mut self, what: &Comparison) -> Result<Outcome, String> {
        let (image, kind) = match &what.image {
            Image::File(file) => {
                let path = self.folder.join("image");
                images::copy(file, &path).map_err(|e| format!("{}: {e}", file.display()))?;
                (path, file.file_name().unwrap_or_default().to_string_lossy().into_owned())
            }
            Image::Made(kind, length) => {
                let path = self.folder.join("image");
                eprintln!("{}: making the image", what.name);
                images::make(&path, *kind, *length, SEED).map_err(|e| format!("{}: {e}", path.display()))?;
                (path, kind.to_string())
            }
        };
        let complain = |e: std::io::Error| format!("{}: {e}", image.display());
        let length = image.metadata().map_err(complain)?.len();
        let holes = Holes::of(&image).map_err(complain)?;
        let link = what.link.map(Link::new).transpose()?;
        let mut contenders: Vec<_> = what
            .contenders
            .iter()
            .map(|one| Runs { contender: one.to_string(), ..Runs::default() })
            .collect();
        // QEMU fills the holes of the image; otherwise memory is needed for its data alone.
        let qemu = what.contenders.iter().any(|one| matches!(one, Contender::Qemu(_)));
        let warm_bytes = if qemu { length } else { holes.data_bytes() };
        for round in 0..=self.runs {
            for (contender, runs) in what.contenders.iter().zip(&mut contenders) {
                if runs.failed.is_some() {
                    continue;
                }
                self.warm.fill(warm_bytes + WARM_MORE);
                let took = self.run(contender, what, &image, link.as_ref(), round == 0);
                if signals::cancelled() {
                    return Err("cancelled".into());
                }
                // A source that read holes through its mapping has filled them, and its successor would find none.
                holes.restore(&image).map_err(complain)?;
                self.warm.fill(warm_bytes + WARM_MORE);
                say(&what.name, &runs.contender, round, took.as_ref());
                match took {
                    Ok(took) if round > 0 => runs.runs.push(took),
                    Ok(_) => {}
                    Err(reason) => runs.failed = Some(reason),
                }
            }
        }
        fs::remove_file(&image).map_err(complain)?;
        Ok(Outcome {
            name: what.name.clone(),
            image: kind,
            image_bytes: length,
            data_bytes: holes.data_bytes(),
            memory: if what.anonymous { "anonymous" } else { "tmpfs file" }.into(),
            link: what.link.map_or("loopback".into(), |rate| rate.to_string()),
            contenders,
        })
    }

    /// One run; with `check` the copy must be equal.
    fn run(
        &mut self,
        contender: &Contender,
        what: &Comparison,
        image: &Path,
        link: Option<&Link>,
        check: bool,
    ) -> Result<Took, String> {
        self.port += 1;
        let copy = self.folder.join("copy");
        let _ = fs::remove_file(&copy);
        let [source, destination] = link.map_or_else(<[Place; 2]>::default, Link::places);
        let job = Job {
            image,
            target: if what.anonymous { Target::Anonymous } else { Target::File(&copy) },
            source: &source,
            destination: &destination,
            host: link.map_or("127.0.0.1", Link::host),
            port: self.port,
            folder: &self.folder,
            watch_memory: what.watch_memory,
        };
        let flow = self.warm.flow();
        let took = contender.run(&self.pageferry, &job);
        self.warm.end(flow);
        let equal = !check
            || what.anonymous
            || took.is_err()
            || same_content(image, &copy).map_err(|e| e.to_string())?;
        let _ = fs::remove_file(&copy);
        if equal { took } else { Err("the copy differs from the image".into()) }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn say(name: &str, contender: &str, round: u32, took: Result<&Took, &String>) {
    let round = if round == 0 { "warm-up".into() } else { format!("run {round}") };
    match took {
        Ok(took) => {
            eprintln!("{name}: {contender}: {round}: {:.0} ms, {:.2} CPU s", took.total_ms, took.cpu_s());
        }
        Err(reason) => eprintln!("{name}: {contender}: {round}: failed: {reason}"),
    }
    // Whatever the run left to the kernel is done before the next one.
    std::thread::sleep(Duration::from_millis(100));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_failure_is_kept_and_ends_a_contender() {
        let within = tempfile::tempdir().unwrap();
        let mut runner = Runner::new("/nowhere/pageferry".into(), within.path(), 2).unwrap();
        let comparison = Comparison {
            name: "test".into(),
            image: Image::Made(Kind::Mixed, 10 << 20),
            anonymous: false,
            link: None,
            contenders: vec!["pageferry:2:auto".parse().unwrap()],
            watch_memory: false,
        };
        let outcome = runner.compare(&comparison).unwrap();
        assert!(outcome.contenders[0].failed.as_ref().unwrap().contains("/nowhere/pageferry"));
        assert!(outcome.contenders[0].runs.is_empty());
        assert_eq!((outcome.image_bytes, outcome.data_bytes), (10 << 20, 7 << 20));
        drop(runner);
        assert_eq!(fs::read_dir(within.path()).unwrap().count(), 0);
    }
}
