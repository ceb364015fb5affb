//! The figures that pageferry is held to: each a comparison, what is read off it, and the target.

use std::path::Path;

use pageferry_benches::images::Kind;
use serde::Serialize;

use crate::contender::Contender;
use crate::delta;
use crate::link::Rate;
use crate::run::{Comparison, Image, Outcome, Runs};
use crate::warm::available_bytes;

const GIB: u64 = 1 << 30;
/// Levels of zstd that QEMU is given by hand, besides its default, which is 1.
const LEVELS: [u8; 3] = [2, 3, 6];

/// A figure's target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn met(self, measured: f64) -> bool {
        match self {
            Self::AtLeast(least) => measured >= least,
            Self::AtMost(most) => measured <= most,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, ">= {least}"),
            Self::AtMost(most) => write!(f, "<= {most}"),
        }
    }
}

/// How a figure is had.
#[derive(Clone, Copy)]
enum Figure {
    /// From comparisons, in this order; and what it was read off.
    Compared(&'static [&'static str], fn(&[&Outcome]) -> Option<(f64, String)>),
    /// By itself.
    Alone(fn() -> (f64, String)),
}

/// One figure.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    what: &'static str,
    target: Target,
    figure: Figure,
}

/// What became of a row.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) row: &'static str,
    pub(crate) what: &'static str,
    pub(crate) target: String,
    pub(crate) measured: Option<f64>,
    pub(crate) met: Option<bool>,
    pub(crate) detail: String,
}

/// All figures. Ratios of times are theirs over ours where more is better, and ours over theirs where less is.
pub(crate) const ROWS: &[Row] = &[
    Row {
        name: "random-file",
        what: "random, loopback, into a fresh tmpfs file: time of QEMU's best / ours",
        target: Target::AtLeast(1.6),
        figure: Figure::Compared(&["random-file"], faster_than_plain),
    },
    Row {
        name: "random-anon",
        what: "random, loopback, into anonymous memory: time of QEMU's best / ours",
        target: Target::AtLeast(1.4),
        figure: Figure::Compared(&["random-anon"], faster_than_plain),
    },
    Row {
        name: "limit-file",
        what: "random, into a fresh tmpfs file: our rate / the machine's limit",
        target: Target::AtLeast(0.9),
        figure: Figure::Compared(&["random-file"], of_the_limit),
    },
    Row {
        name: "limit-anon",
        what: "random, into anonymous memory: our rate / the machine's limit",
        target: Target::AtLeast(0.9),
        figure: Figure::Compared(&["random-anon"], of_the_limit),
    },
    Row {
        name: "tls-file",
        what: "random, TLS, loopback, into a fresh tmpfs file: time of QEMU's best / ours",
        target: Target::AtLeast(2.0),
        figure: Figure::Compared(&["tls-file"], faster_under_tls),
    },
    Row {
        name: "tls-anon",
        what: "random, TLS, loopback, into anonymous memory: time of QEMU's best / ours",
        target: Target::AtLeast(2.0),
        figure: Figure::Compared(&["tls-anon"], faster_under_tls),
    },
    Row {
        name: "tls-file-cost",
        what: "random, into a fresh tmpfs file: our time under TLS / without",
        target: Target::AtMost(1.7),
        figure: Figure::Compared(&["tls-file"], what_tls_costs),
    },
    Row {
        name: "tls-anon-cost",
        what: "random, into anonymous memory: our time under TLS / without",
        target: Target::AtMost(1.7),
        figure: Figure::Compared(&["tls-anon"], what_tls_costs),
    },
    Row {
        name: "attached",
        what: "random, a paused guest of QEMU, into a fresh tmpfs file: time of QEMU's best / ours beside it",
        target: Target::AtLeast(2.0),
        figure: Figure::Compared(&["attached"], faster_attached),
    },
    Row {
        name: "attached-cost",
        what: "the same: our time beside QEMU / by send and recv",
        target: Target::AtMost(1.05),
        figure: Figure::Compared(&["attached"], what_attaching_costs),
    },
    Row {
        name: "sparse",
        what: "sparse: time of QEMU's best / ours",
        target: Target::AtLeast(4.0),
        figure: Figure::Compared(&["sparse"], faster_than_plain),
    },
    Row {
        name: "zero",
        what: "zeros, allocated: time of QEMU's best / ours",
        target: Target::AtLeast(2.5),
        figure: Figure::Compared(&["zero"], faster_than_plain),
    },
    Row {
        name: "mixed",
        what: "mixed, auto codec: time of QEMU's best, uncompressed / ours",
        target: Target::AtLeast(2.0),
        figure: Figure::Compared(&["mixed"], faster_than_plain),
    },
    Row {
        name: "guest-1g",
        what: "guest's RAM, 1 Gbit/s, auto: our time / QEMU's zstd, default level",
        target: Target::AtMost(0.9),
        figure: Figure::Compared(&["guest-1g"], |all| {
            time_ratio(ours(all)?, named(all, "qemu:multifd-zstd:4")?)
        }),
    },
    Row {
        name: "guest-1g-best",
        what: "guest's RAM, 1 Gbit/s, auto: our time / QEMU's zstd, best level",
        target: Target::AtMost(1.0),
        figure: Figure::Compared(&["guest-1g"], |all| {
            time_ratio(ours(all)?, best(all, Contender::is_zstd_qemu)?)
        }),
    },
    Row {
        name: "guest-1g-plain",
        what: "guest's RAM, 1 Gbit/s, auto: our time / QEMU's uncompressed",
        target: Target::AtMost(0.35),
        figure: Figure::Compared(&["guest-1g"], |all| {
            time_ratio(ours(all)?, best(all, Contender::is_plain_qemu)?)
        }),
    },
    Row {
        name: "guest-10g",
        what: "guest's RAM, 10 Gbit/s, auto: our time / the best of QEMU's",
        target: Target::AtMost(1.0),
        figure: Figure::Compared(&["guest-10g"], slower_than_any),
    },
    Row {
        name: "guest-loopback",
        what: "guest's RAM, loopback, auto: our time / the best of QEMU's",
        target: Target::AtMost(1.0),
        figure: Figure::Compared(&["guest-loopback"], slower_than_any),
    },
    Row {
        name: "mixed-zstd",
        what: "mixed, zstd level 1: time of QEMU's best / ours",
        target: Target::AtLeast(2.0),
        figure: Figure::Compared(&["mixed-zstd"], |all| {
            time_ratio(best(all, Contender::is_zstd_qemu)?, ours(all)?)
        }),
    },
    Row {
        name: "mixed-zstd-wire",
        what: "mixed, zstd level 1: our wire bytes / QEMU's",
        target: Target::AtMost(1.0),
        figure: Figure::Compared(&["mixed-zstd"], |all| {
            let (ours, theirs) = (ours(all)?, best(all, Contender::is_zstd_qemu)?);
            let (left, right) = (ours.wire_bytes()?, theirs.wire_bytes()?);
            Some((left / right, format!("{:.0} / {:.0} MiB", left / 1048576.0, right / 1048576.0)))
        }),
    },
    Row {
        name: "delta-encode",
        what: "delta, QEMU's xbzrle workloads: encoding / the scalar loop, least",
        target: Target::AtLeast(3.0),
        figure: Figure::Alone(delta::encode),
    },
    Row {
        name: "delta-decode",
        what: "delta, QEMU's xbzrle workloads: decoding / the scalar loop, least",
        target: Target::AtLeast(3.0),
        figure: Figure::Alone(delta::decode),
    },
    Row {
        name: "cpu",
        what: "random, tmpfs file: our CPU time / QEMU's, each at its fastest",
        target: Target::AtMost(0.7),
        figure: Figure::Compared(&["random-file"], cpu),
    },
    Row {
        name: "cpu-anon",
        what: "random, anonymous memory: our CPU time / QEMU's, each at its fastest",
        target: Target::AtMost(0.7),
        figure: Figure::Compared(&["random-anon"], cpu),
    },
    Row {
        name: "memory",
        what: "16 GiB sparse: most memory of either side beyond the guest's, MiB",
        target: Target::AtMost(64.0),
        figure: Figure::Compared(&["memory"], memory),
    },
    Row {
        name: "scale-sparse",
        what: "sparse, 1 to 16 GiB: time per GiB of the largest / of the smallest",
        target: Target::AtMost(1.0),
        figure: Figure::Compared(&["sparse-1g", "sparse-4g", "sparse-16g"], scaling),
    },
    Row {
        name: "scale-mixed",
        what: "mixed, 1 to 8 GiB: time per GiB of the largest / of the smallest",
        target: Target::AtMost(1.0),
        figure: Figure::Compared(&["mixed-1g", "mixed-4g", "mixed-8g"], scaling),
    },
];

impl Row {
    pub(crate) fn what(&self) -> &'static str {
        self.what
    }

    /// Names of the comparisons it is read off.
    pub(crate) fn comparisons(&self) -> &'static [&'static str] {
        match self.figure {
            Figure::Compared(names, _) => names,
            Figure::Alone(_) => &[],
        }
    }

    /// What came out; measures it now where that takes no comparison.
    pub(crate) fn judge(&self, outcomes: &[Outcome]) -> Verdict {
        let figure = match self.figure {
            Figure::Compared(names, read) => {
                let find = |name: &&str| outcomes.iter().find(|outcome| outcome.name == *name);
                let found: Option<Vec<_>> = names.iter().map(find).collect();
                found.and_then(|found| read(&found))
            }
            Figure::Alone(measure) => Some(measure()),
        };
        let (measured, detail) = figure.map_or((None, "not measured".into()), |(n, text)| (Some(n), text));
        Verdict {
            row: self.name,
            what: self.what,
            target: self.target.to_string(),
            measured,
            met: measured.map(|measured| self.target.met(measured)),
            detail,
        }
    }
}

/// A comparison by its name. `size` is that of the images that have no size of their own; `guest` a real guest's RAM.
pub(crate) fn comparison(name: &str, size: u64, guest: &Path) -> Option<Comparison> {
    let multifd = ["qemu:multifd:2", "qemu:multifd:4", "qemu:multifd:8"];
    let auto = ["pageferry:2:auto", "pageferry:4:auto"];
    let loopback = [&auto[..], &multifd].concat();
    let limited = [&loopback[..], &["limit:write:2", "limit:splice:2"]].concat();
    let levels: Vec<_> = LEVELS.iter().map(|level| format!("qemu:multifd-zstd:4:{level}")).collect();
    let levels: Vec<&str> = levels.iter().map(String::as_str).collect();
    let guest_ram = ["pageferry:4:auto", "qemu:multifd:4", "qemu:multifd-zstd:4"];
    let made = |kind, length| Image::Made(kind, length);
    let (image, contenders): (Image, Vec<&str>) = match name {
        "random-file" | "random-anon" => (made(Kind::Random, size), limited),
        "tls-file" | "tls-anon" => {
            let under = ["tls:pageferry:1:auto", "tls:pageferry:2:auto", "tls:pageferry:4:auto"];
            let theirs = ["tls:qemu:multifd:2", "tls:qemu:multifd:4", "tls:qemu:multifd:8", "qemu:multifd:4"];
            (made(Kind::Random, size), [&auto[..], &under, &theirs].concat())
        }
        "attached" => {
            let beside = ["attached:2:auto", "attached:4:auto"];
            (made(Kind::Random, size), [&loopback[..], &beside].concat())
        }
        "sparse" => (made(Kind::Sparse, size), loopback),
        "zero" => (made(Kind::Zero, size), loopback),
        "mixed" => (made(Kind::Mixed, size), loopback),
        "mixed-zstd" => {
            let zstd = [
                "pageferry:2:zstd:1",
                "pageferry:4:zstd:1",
                "qemu:multifd-zstd:2:1",
                "qemu:multifd-zstd:4:1",
            ];
            (made(Kind::Mixed, size), zstd.into())
        }
        "guest-1g" => (Image::File(guest.into()), [&guest_ram[..], &levels].concat()),
        "guest-10g" | "guest-loopback" => {
            (Image::File(guest.into()), [&guest_ram[..], &["qemu:multifd:2", "qemu:multifd-zstd:2"]].concat())
        }
        "memory" => (made(Kind::Sparse, 16 * GIB), vec!["pageferry:4:auto"]),
        _ => {
            let (kind, gib) = name.strip_suffix('g')?.split_once('-')?;
            (made(kind.parse().ok()?, gib.parse::<u64>().ok()? * GIB), vec!["pageferry:4:auto"])
        }
    };
    let link = match name {
        "guest-1g" => Some(Rate { gbit: 1 }),
        "guest-10g" => Some(Rate { gbit: 10 }),
        _ => None,
    };
    Some(Comparison {
        name: name.into(),
        image,
        anonymous: matches!(name, "random-anon" | "tls-anon"),
        link,
        contenders: contenders.iter().filter_map(|text| text.parse().ok()).collect(),
        watch_memory: name == "memory",
    })
}

/// What comparisons that take turns lack to be run here.
pub(crate) fn lack(comparisons: &[Comparison]) -> Option<String> {
    for comparison in comparisons {
        if let Image::File(path) = &comparison.image
            && !path.is_file()
        {
            return Some(format!("there is no {}: make it with `peers make-guest-ram`", path.display()));
        }
    }
    let (needed, there) = (needed_bytes(comparisons), available_bytes());
    let gib = |bytes: u64| bytes as f64 / GIB as f64;
    let text = || format!("it takes {:.1} GiB of memory, and {:.1} are available", gib(needed), gib(there));
    (needed > there).then(text)
}

/// Memory for all images that are made, and for one copy, which is what warms it up before.
fn needed_bytes(comparisons: &[Comparison]) -> u64 {
    let data = |comparison: &Comparison| match comparison.image {
        Image::File(_) => 0,
        Image::Made(Kind::Mixed, length) => length / 10 * 7,
        Image::Made(Kind::Sparse, length) => length / 8,
        Image::Made(_, length) => length,
    };
    let (images, copy) = (comparisons.iter().map(data).sum::<u64>(), comparisons.iter().map(data).max());
    images + copy.unwrap_or(0)
}

fn contenders<'a>(all: &[&'a Outcome]) -> impl Iterator<Item = (Contender, &'a Runs)> {
    let contenders = all.first().map_or(&[][..], |outcome| &outcome.contenders[..]);
    contenders.iter().filter_map(|runs| Some((runs.contender.parse().ok()?, runs)))
}

/// The fastest of some contenders.
fn best<'a>(all: &[&'a Outcome], which: impl Fn(&Contender) -> bool) -> Option<&'a Runs> {
    let timed =
        contenders(all).filter(|(one, _)| which(one)).filter_map(|(_, runs)| Some((runs, runs.total_ms()?)));
    timed.min_by(|left, right| left.1.total_cmp(&right.1)).map(|(runs, _)| runs)
}

fn ours<'a>(all: &[&'a Outcome]) -> Option<&'a Runs> {
    best(all, Contender::is_ours)
}

fn faster_under_tls(all: &[&Outcome]) -> Option<(f64, String)> {
    time_ratio(best(all, Contender::is_qemu_under_tls)?, best(all, Contender::is_ours_under_tls)?)
}

fn faster_attached(all: &[&Outcome]) -> Option<(f64, String)> {
    time_ratio(best(all, Contender::is_plain_qemu)?, best(all, Contender::is_attached)?)
}

fn what_attaching_costs(all: &[&Outcome]) -> Option<(f64, String)> {
    time_ratio(best(all, Contender::is_attached)?, ours(all)?)
}

fn what_tls_costs(all: &[&Outcome]) -> Option<(f64, String)> {
    time_ratio(best(all, Contender::is_ours_under_tls)?, ours(all)?)
}

fn named<'a>(all: &[&'a Outcome], name: &str) -> Option<&'a Runs> {
    contenders(all).map(|(_, runs)| runs).find(|runs| runs.contender == name)
}

/// How many times as long the first took as the second.
fn time_ratio(first: &Runs, second: &Runs) -> Option<(f64, String)> {
    let (left, right) = (first.total_ms()?, second.total_ms()?);
    let detail = format!("{left:.0} ms ({}) / {right:.0} ms ({})", first.contender, second.contender);
    Some((left / right, detail))
}

fn faster_than_plain(all: &[&Outcome]) -> Option<(f64, String)> {
    time_ratio(best(all, Contender::is_plain_qemu)?, ours(all)?)
}

fn slower_than_any(all: &[&Outcome]) -> Option<(f64, String)> {
    time_ratio(ours(all)?, best(all, |one| matches!(one, Contender::Qemu(_)))?)
}

fn of_the_limit(all: &[&Outcome]) -> Option<(f64, String)> {
    time_ratio(best(all, |one| matches!(one, Contender::Limit(..)))?, ours(all)?)
}

fn cpu(all: &[&Outcome]) -> Option<(f64, String)> {
    let (ours, theirs) = (ours(all)?, best(all, Contender::is_plain_qemu)?);
    let gib = all.first()?.image_bytes as f64 / GIB as f64;
    let (left, right) = (ours.cpu_s()? / gib, theirs.cpu_s()? / gib);
    let detail = format!("{left:.2} s/GiB ({}) / {right:.2} s/GiB ({})", ours.contender, theirs.contender);
    Some((left / right, detail))
}

fn memory(all: &[&Outcome]) -> Option<(f64, String)> {
    let runs = ours(all)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let source = runs.runs.iter().map(|took| took.source_private_bytes).max()?;
    let destination = runs.runs.iter().map(|took| took.destination_private_bytes).max()?;
    let detail = format!("source {:.1} MiB, destination {:.1} MiB", mib(source), mib(destination));
    Some((mib(source.max(destination)), detail))
}

fn scaling(all: &[&Outcome]) -> Option<(f64, String)> {
    let mut costs = Vec::new();
    for outcome in all {
        let total = ours(&[outcome])?.total_ms()?;
        costs.push((outcome.image_bytes / GIB, total / (outcome.image_bytes as f64 / GIB as f64)));
    }
    let detail: Vec<_> = costs.iter().map(|(gib, cost)| format!("{gib} GiB: {cost:.1} ms/GiB")).collect();
    Some((costs.last()?.1 / costs.first()?.1, detail.join(", ")))
}

#[cfg(test)]
mod tests {
    use pageferry::measure::Took;

    use super::*;

    fn outcome(name: &str, gib: u64, runs: &[(&str, f64, f64)]) -> Outcome {
        let contender = |(name, total_ms, cpu): &(&str, f64, f64)| Runs {
            contender: (*name).into(),
            runs: vec![Took {
                total_ms: *total_ms,
                source_cpu_s: *cpu,
                wire_bytes: 1 << 20,
                ..Took::default()
            }],
            failed: None,
        };
        Outcome {
            name: name.into(),
            image: "random".into(),
            image_bytes: gib * GIB,
            data_bytes: gib * GIB,
            memory: String::new(),
            link: String::new(),
            contenders: runs.iter().map(contender).collect(),
        }
    }

    fn judged(name: &str, outcomes: &[Outcome]) -> Verdict {
        ROWS.iter().find(|row| row.name == name).unwrap().judge(outcomes)
    }

    #[test]
    fn the_best_of_each_side_is_compared() {
        let runs = [
            ("pageferry:2:auto", 1000.0, 2.0),
            ("pageferry:4:auto", 1200.0, 1.0),
            ("qemu:multifd:2", 2500.0, 4.0),
            ("qemu:multifd:4", 2000.0, 5.0),
            ("qemu:multifd-zstd:4", 500.0, 5.0),
            ("limit:write:2", 950.0, 0.0),
        ];
        let outcomes = [outcome("random-file", 4, &runs)];
        let of = |name| judged(name, &outcomes).measured.unwrap();
        assert_eq!((of("random-file"), of("cpu"), of("limit-file")), (2.0, 0.4, 0.95));
        assert_eq!(judged("random-file", &outcomes).met, Some(true));
        assert_eq!(judged("random-anon", &outcomes).met, None);
    }

    #[test]
    fn costs_per_gib_are_compared() {
        let mixed = |gib, ms| outcome(&format!("mixed-{gib}g"), gib, &[("pageferry:4:auto", ms, 1.0)]);
        let verdict = judged("scale-mixed", &[mixed(1, 100.0), mixed(4, 420.0), mixed(8, 880.0)]);
        assert!((verdict.measured.unwrap() - 1.1).abs() < 1e-9);
        assert_eq!(verdict.met, Some(false));
    }

    #[test]
    fn images_that_take_turns_are_there_together() {
        let named = |names: &[&str]| -> Vec<_> {
            names.iter().filter_map(|name| comparison(name, 4 * GIB, Path::new("/guest"))).collect()
        };
        assert_eq!(needed_bytes(&named(&["zero"])), 8 * GIB);
        assert_eq!(
            needed_bytes(&named(&["sparse-1g", "sparse-16g", "sparse-4g"])),
            (1 + 2 * 16 + 4) * GIB / 8
        );
        assert_eq!(needed_bytes(&named(&["mixed"])), 2 * (4 * GIB / 10 * 7));
        assert_eq!(needed_bytes(&[]), 0);
        assert!(lack(&named(&["guest-1g"])).unwrap().contains("/guest"));
        assert!(lack(&named(&["random-99999999g"])).unwrap().contains("of memory"));
    }

    #[test]
    fn every_row_has_its_comparisons_and_every_contender_is_known() {
        for row in ROWS {
            for name in row.comparisons() {
                let found =
                    comparison(name, 4 * GIB, Path::new("/guest")).unwrap_or_else(|| panic!("{name}"));
                assert_eq!(&found.name, name);
                assert!(found.contenders.iter().any(Contender::is_ours), "{name}");
            }
        }
        // As many as are written there: none was dropped as not understood.
        let guest = comparison("guest-1g", GIB, Path::new("/guest")).unwrap();
        assert_eq!(guest.contenders.len(), 3 + LEVELS.len());
        assert_eq!(comparison("random-anon", GIB, Path::new("/")).unwrap().contenders.len(), 7);
        assert_eq!(comparison("mixed-zstd", GIB, Path::new("/")).unwrap().contenders.len(), 4);
        assert_eq!(comparison("tls-anon", GIB, Path::new("/")).unwrap().contenders.len(), 9);
        assert!(comparison("nothing", GIB, Path::new("/")).is_none());
    }
}
