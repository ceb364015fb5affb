//! Comparisons: contenders take turns with one image, so that what disturbs one disturbs all.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::measure::{Job, Place, Target, Took, same_content};
use pageferry::print;
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

impl Outcome {
    /// Whether no contender failed.
    pub(crate) fn is_complete(&self) -> bool {
        self.contenders.iter().all(|runs| runs.failed.is_none())
    }
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

    /// Every contender of every comparison, in turns: what the comparisons are held against each other for is then of the same
    /// minutes. The first round warms up and checks the copies; it does not count.
    pub(crate) fn compare(&mut self, comparisons: &[Comparison]) -> Result<Vec<Outcome>, String> {
        let prepare = |(at, what)| Prepared::new(what, self.folder.join(format!("image-{at}")));
        let mut all = (0..).zip(comparisons).map(prepare).collect::<Result<Vec<_>, _>>()?;
        for round in 0..=self.runs {
            for prepared in &mut all {
                self.turn(prepared, round)?;
            }
        }
        all.into_iter().map(Prepared::outcome).collect()
    }

    /// Every contender once.
    fn turn(&mut self, prepared: &mut Prepared<'_>, round: u32) -> Result<(), String> {
        let what = prepared.what;
        for (contender, runs) in what.contenders.iter().zip(&mut prepared.contenders) {
            if runs.failed.is_some() {
                continue;
            }
            self.warm.fill(prepared.warm_bytes);
            let took = self.run(contender, what, &prepared.image, prepared.link.as_ref(), round == 0);
            if signals::cancelled() {
                return Err("cancelled".into());
            }
            // A source that read holes through its mapping has filled them, and its successor would find none.
            prepared.holes.restore(&prepared.image).map_err(|e| complain(&prepared.image, &e))?;
            self.warm.fill(prepared.warm_bytes);
            say(&what.name, &runs.contender, round, took.as_ref());
            match took {
                Ok(took) if round > 0 => runs.runs.push(took),
                Ok(_) => {}
                Err(reason) => runs.failed = Some(reason),
            }
        }
        Ok(())
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
            tls: None,
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

/// A comparison whose image is there.
struct Prepared<'a> {
    what: &'a Comparison,
    image: PathBuf,
    kind: String,
    length: u64,
    holes: Holes,
    link: Option<Link>,
    /// Memory that a run is to find warm.
    warm_bytes: u64,
    contenders: Vec<Runs>,
}

impl<'a> Prepared<'a> {
    fn new(what: &'a Comparison, image: PathBuf) -> Result<Self, String> {
        let kind = match &what.image {
            Image::File(file) => {
                images::copy(file, &image).map_err(|e| complain(file, &e))?;
                file.file_name().unwrap_or_default().to_string_lossy().into_owned()
            }
            Image::Made(kind, length) => {
                print::note(format_args!("{}: making the image", what.name));
                images::make(&image, *kind, *length, SEED).map_err(|e| complain(&image, &e))?;
                kind.to_string()
            }
        };
        let length = image.metadata().map_err(|e| complain(&image, &e))?.len();
        let holes = Holes::of(&image).map_err(|e| complain(&image, &e))?;
        // QEMU fills the holes of the image; otherwise memory is needed for its data alone.
        let qemu = what.contenders.iter().any(|one| matches!(one, Contender::Qemu(_)));
        let warm_bytes = WARM_MORE + if qemu { length } else { holes.data_bytes() };
        let contenders = what
            .contenders
            .iter()
            .map(|one| Runs { contender: one.to_string(), ..Runs::default() })
            .collect();
        let link = what.link.map(Link::new).transpose()?;
        Ok(Self { what, image, kind, length, holes, link, warm_bytes, contenders })
    }

    /// What came out. The image goes.
    fn outcome(self) -> Result<Outcome, String> {
        fs::remove_file(&self.image).map_err(|e| complain(&self.image, &e))?;
        Ok(Outcome {
            name: self.what.name.clone(),
            image: self.kind,
            image_bytes: self.length,
            data_bytes: self.holes.data_bytes(),
            memory: if self.what.anonymous { "anonymous" } else { "tmpfs file" }.into(),
            link: self.what.link.map_or("loopback".into(), |rate| rate.to_string()),
            contenders: self.contenders,
        })
    }
}

fn complain(path: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}", path.display())
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
            print::note(format_args!(
                "{name}: {contender}: {round}: {:.0} ms, {:.2} CPU s",
                took.total_ms,
                took.cpu_s()
            ));
        }
        Err(reason) => print::note(format_args!("{name}: {contender}: {round}: failed: {reason}")),
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
        let of_mib = |mib: u64| Comparison {
            name: format!("test-{mib}"),
            image: Image::Made(Kind::Mixed, mib << 20),
            anonymous: false,
            link: None,
            contenders: vec!["pageferry:2:auto".parse().unwrap()],
            watch_memory: false,
        };
        let outcomes = runner.compare(&[of_mib(10), of_mib(20)]).unwrap();
        for (outcome, mib) in outcomes.iter().zip([10, 20]) {
            assert_eq!(outcome.name, format!("test-{mib}"));
            assert!(outcome.contenders[0].failed.as_ref().unwrap().contains("/nowhere/pageferry"));
            assert!(outcome.contenders[0].runs.is_empty());
            assert_eq!((outcome.image_bytes, outcome.data_bytes), (mib << 20, (mib / 10 * 7) << 20));
        }
        assert_eq!(outcomes.len(), 2);
        drop(runner);
        assert_eq!(fs::read_dir(within.path()).unwrap().count(), 0);
    }
}
