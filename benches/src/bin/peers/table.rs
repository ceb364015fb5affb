//! Tables for people to read.

use std::fmt::Write;

use crate::acceptance::Verdict;
use crate::run::{Outcome, Runs};

/// A comparison's runs.
pub(crate) fn outcome(outcome: &Outcome) -> String {
    let mut out = String::new();
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}: {}, {:.2} GiB ({:.2} GiB of data), into {}, {}",
        outcome.name,
        outcome.image,
        gib(outcome.image_bytes),
        gib(outcome.data_bytes),
        outcome.memory,
        outcome.link,
    );
    let _ = writeln!(
        out,
        "  {:<26}{:>9}{:>16}{:>10}{:>8}{:>15}{:>11}",
        "", "total ms", "least..most", "own ms", "GB/s", "CPU s src+dst", "wire MiB"
    );
    for runs in &outcome.contenders {
        let _ = writeln!(out, "  {}", line(runs, outcome.image_bytes));
    }
    out
}

fn line(runs: &Runs, image_bytes: u64) -> String {
    let (Some(total), Some(wire)) = (runs.total_ms(), runs.wire_bytes()) else {
        return format!("{:<26}{}", runs.contender, runs.failed.as_deref().unwrap_or("no runs"));
    };
    let median = |figure: fn(&pageferry::measure::Took) -> f64| runs.median(figure).unwrap_or_default();
    let least = runs.runs.iter().map(|took| took.total_ms).fold(f64::INFINITY, f64::min);
    let most = runs.runs.iter().map(|took| took.total_ms).fold(0.0, f64::max);
    let cpu = format!("{:.2}+{:.2}", median(|took| took.source_cpu_s), median(|took| took.destination_cpu_s));
    let failed = runs.failed.as_ref().map_or(String::new(), |reason| format!("  then failed: {reason}"));
    format!(
        "{:<26}{total:>9.0}{:>16}{:>10.0}{:>8.2}{:>15}{:>11.1}{failed}",
        runs.contender,
        format!("{least:.0}..{most:.0}"),
        median(|took| took.reported_ms),
        image_bytes as f64 / total / 1e6,
        cpu,
        wire / f64::from(1 << 20),
    )
}

/// What was asked for, and what came out.
pub(crate) fn verdicts(verdicts: &[Verdict]) -> String {
    let mut out = format!("{:<18}{:<64}{:>10}{:>12}  met\n", "row", "what", "target", "measured");
    for verdict in verdicts {
        let measured = verdict.measured.map_or("-".into(), |value| format!("{value:.2}"));
        let met = match verdict.met {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        };
        let _ = writeln!(
            out,
            "{:<18}{:<64}{:>10}{measured:>12}  {met:<4}{}",
            verdict.row, verdict.what, verdict.target, verdict.detail
        );
    }
    out
}
