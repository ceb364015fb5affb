//! A laboratory for the choice of the codec: what every chunk of an image costs and becomes is recorded once; then any choice is played
//! against any link and hosts, in virtual time, and held against the best fixed one and against what no choice can beat.

mod chooses;
mod record;
mod trace;
mod world;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use pageferry::print;
use serde::Serialize;
use serde_json::json;

use self::chooses::{Auto, Fixed};
use self::trace::Trace;
use self::world::{Played, World, bound, play};
use crate::run::median;

/// Records what codecs make of an image, and plays the choice between them on modelled links and hosts
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  peers choose record guest.img guest.trace\n  \
peers choose play guest.trace mixed.trace --gbit 1,10 --streams 4 --cores 2\n\n\
The regret is the time by `auto` beyond that of the best fixed choice of the same world, in percent.")]
pub(crate) struct ChooseArgs {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Records what each chunk of an image costs and becomes in every way; an otherwise idle machine is needed
    Record {
        /// The image
        image: PathBuf,
        /// The trace
        trace: PathBuf,
    },
    Play(PlayArgs),
}

/// Plays `auto` and every fixed choice against all worlds
#[derive(Debug, Args)]
struct PlayArgs {
    /// As `record` wrote them
    #[arg(required = true)]
    traces: Vec<PathBuf>,
    /// Rates of the link
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.5,1,2.5,5,10,25")]
    gbit: Vec<f64>,
    /// Numbers of streams
    #[arg(long, value_delimiter = ',', default_value = "1,4,8")]
    streams: Vec<usize>,
    /// Cores of each host
    #[arg(long, value_delimiter = ',', default_value = "2,8,32")]
    cores: Vec<f64>,
    /// Round trips, in milliseconds
    #[arg(long, value_delimiter = ',', default_value = "1,50")]
    round_trip: Vec<f64>,
    /// Both sides share the cores of one host
    #[arg(long)]
    same_host: bool,
    /// Threads of others that always run on either host
    #[arg(long, default_value_t = 0)]
    others: u32,
    /// From this time on, in milliseconds, the link carries so many Gbit/s; may be repeated
    #[arg(long, value_name = "MS:GBIT", value_parser = change)]
    change: Vec<(f64, f64)>,
    /// A line for each world, not only for each image
    #[arg(long)]
    each: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn change(text: &str) -> Result<(f64, f64), String> {
    let parsed = text.split_once(':').and_then(|(at, rate)| Some((at.parse().ok()?, rate.parse().ok()?)));
    let sane = parsed.filter(|&(at, rate): &(f64, f64)| at > 0.0 && rate > 0.0);
    sane.ok_or_else(|| format!("{text:?} is not MS:GBIT, such as 500:10"))
}

/// `auto` in one world.
#[derive(Clone, Debug, Serialize)]
struct Verdict {
    image: String,
    gbit: f64,
    streams: usize,
    cores: f64,
    round_trip_ms: f64,
    auto_ms: f64,
    auto_mib: f64,
    best: &'static str,
    best_ms: f64,
    best_mib: f64,
    bound_ms: f64,
}

impl Verdict {
    fn regret(&self) -> f64 {
        100.0 * (self.auto_ms / self.best_ms - 1.0)
    }

    fn line(&self) -> String {
        format!(
            "{:<14}{:>5} Gbit/s {:>2} streams {:>3} cores {:>3} ms: auto {:>8.0} ms {:>6.0} MiB, {:<8}{:>8.0} ms {:>6.0} MiB, bound {:>8.0}, regret {:>6.1} %",
            self.image,
            self.gbit,
            self.streams,
            self.cores,
            self.round_trip_ms,
            self.auto_ms,
            self.auto_mib,
            self.best,
            self.best_ms,
            self.best_mib,
            self.bound_ms,
            self.regret(),
        )
    }
}

/// Records, or plays.
pub(crate) fn run(args: &ChooseArgs) -> Result<(), String> {
    match &args.command {
        What::Record { image, trace } => {
            let told = std::cell::Cell::new(0);
            let progress = |done: usize, all: usize| {
                let percent = done * 100 / all.max(1);
                if percent >= told.get() + 10 {
                    told.set(percent);
                    print::note(format_args!("{}: {percent} %", image.display()));
                }
            };
            let recorded = record::record(image, progress)?;
            recorded.write(trace).map_err(|e| format!("{}: {e}", trace.display()))
        }
        What::Play(args) => play_all(args),
    }
}

fn play_all(args: &PlayArgs) -> Result<(), String> {
    let mut verdicts = Vec::new();
    for path in &args.traces {
        let trace = Trace::read(path)?;
        let from = verdicts.len();
        for &gbit in &args.gbit {
            for &streams in &args.streams {
                for &cores in &args.cores {
                    for &round_trip in &args.round_trip {
                        let verdict = judge(&world(args, gbit, streams, cores, round_trip), &trace);
                        if args.each && !args.json {
                            print::line(verdict.line());
                        }
                        verdicts.push(verdict);
                    }
                }
            }
        }
        if !args.json {
            summary(&trace.image, &verdicts[from..]);
        }
    }
    if args.json {
        print::line(json!({ "worlds": verdicts }));
    } else {
        summary("all", &verdicts);
    }
    Ok(())
}

fn world(args: &PlayArgs, gbit: f64, streams: usize, cores: f64, round_trip: f64) -> World {
    let mut world = World::new(gbit, streams.max(1), cores, round_trip);
    world.link.extend(args.change.iter().map(|&(at, gbit)| (at * 1e6, gbit / 8.0)));
    World { same_host: args.same_host, others: [f64::from(args.others); 2], ..world }
}

/// Plays all choices in one world.
fn judge(world: &World, trace: &Trace) -> Verdict {
    let auto = play(world, trace, &mut Auto::new(world.streams, world.delay));
    let fixed = Fixed::all().map(|(name, mut one)| (name, play(world, trace, &mut one)));
    let (best, fastest) =
        fixed.min_by(|a, b| a.1.nanos.total_cmp(&b.1.nanos)).unwrap_or(("", Played::default()));
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    Verdict {
        image: trace.image.clone(),
        gbit: world.link[0].1 * 8.0,
        streams: world.streams,
        cores: world.cores[0],
        round_trip_ms: world.delay / 5e5,
        auto_ms: auto.nanos / 1e6,
        auto_mib: mib(auto.wire),
        best,
        best_ms: fastest.nanos / 1e6,
        best_mib: mib(fastest.wire),
        bound_ms: bound(world, trace) / 1e6,
    }
}

fn summary(name: &str, verdicts: &[Verdict]) {
    let regrets: Vec<f64> = verdicts.iter().map(Verdict::regret).collect();
    let worst = verdicts.iter().max_by(|a, b| a.regret().total_cmp(&b.regret()));
    let over = |most: f64| regrets.iter().filter(|regret| **regret > most).count();
    print::line(format_args!(
        "{name}: {} worlds, regret: median {:.1} %, worst {:.1} %, {} over 8 %, {} over 5 %",
        regrets.len(),
        median(regrets.clone()).unwrap_or(0.0),
        worst.map_or(0.0, Verdict::regret),
        over(8.0),
        over(5.0),
    ));
    if let Some(worst) = worst {
        print::line(format_args!("  worst: {}", worst.line()));
    }
}

/// Chunks that all cost and become alike: what a heavier level makes of them is smaller, and takes longer.
#[cfg(test)]
fn synthetic(chunks: u32, out: f64) -> Trace {
    use self::trace::{ChunkCosts, Cost, WAYS};
    let bytes = 262_144.0;
    let cost = |(at, way): (usize, &trace::Way)| {
        let heavier = at as f64 / WAYS.len() as f64;
        Cost {
            encode: (bytes * (1.2 + 0.6 * at as f64 + f64::from(u8::from(way.references)) * 0.3)) as u32,
            bytes: (bytes * out * (1.15 - 0.4 * heavier)) as u32,
            pages: 64,
            decode: (bytes * 0.5) as u32,
        }
    };
    let chunk = |chunk| ChunkCosts {
        chunk,
        pages: 64,
        zeros: 0,
        scan: 20_000,
        costs: WAYS.iter().enumerate().map(cost).collect(),
    };
    Trace { image: "synthetic".into(), chunks: (0..chunks).map(chunk).collect() }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        play: PlayArgs,
    }

    /// The laboratory in small: memory that shrinks well, and memory that shrinks less.
    #[test]
    fn auto_is_about_as_fast_as_the_best_fixed_choice() {
        for out in [0.3, 0.6] {
            let trace = synthetic(8000, out);
            let mut worst = f64::MIN;
            for (gbit, streams, cores, same_host) in [
                (0.1, 2, 8.0, false),
                (1.0, 4, 2.0, false),
                (1.0, 4, 2.0, true),
                (5.0, 4, 8.0, false),
                (10.0, 2, 2.0, true),
                (25.0, 1, 8.0, false),
                (100.0, 4, 32.0, false),
            ] {
                let world = World { same_host, ..World::new(gbit, streams, cores, 1.0) };
                let verdict = judge(&world, &trace);
                assert!(verdict.auto_ms > 0.99 * verdict.bound_ms, "{}", verdict.line());
                // What is lost before anything is known is no part of it.
                let regret = 100.0 * ((verdict.auto_ms - 50.0) / verdict.best_ms - 1.0);
                assert!(regret < 12.0, "{}", verdict.line());
                worst = worst.max(regret);
            }
            assert!(worst < 12.0, "{worst}");
        }
    }

    /// A link that slows down in the middle, and one that recovers.
    #[test]
    fn a_link_that_changes_is_followed() {
        let trace = synthetic(6000, 0.4);
        for link in [vec![(0.0, 1.25), (300e6, 0.0625)], vec![(0.0, 0.0625), (3000e6, 1.25)]] {
            let world = World { link, ..World::new(10.0, 4, 8.0, 1.0) };
            let auto = play(&world, &trace, &mut Auto::new(world.streams, world.delay)).nanos;
            let best = Fixed::all()
                .map(|(_, mut one)| play(&world, &trace, &mut one).nanos)
                .fold(f64::MAX, f64::min);
            assert!(auto < 1.1 * best, "{auto} against {best}: {:?}", world.link);
        }
    }

    #[test]
    fn worlds_are_named_and_shown() {
        let args =
            Line::try_parse_from(["x", "a.trace", "--gbit", "2.5", "--change", "500:10", "--others", "2"]);
        let play = args.map_or_else(|e| panic!("{e}"), |line| line.play);
        let world = world(&play, 2.5, 0, 4.0, 50.0);
        assert_eq!((world.streams, world.delay, world.others), (1, 25e6, [2.0; 2]));
        assert_eq!(world.link, [(0.0, 0.3125), (500e6, 1.25)]);
        assert!(["", "5", "x:1", "0:1", "1:-1"].iter().all(|bad| change(bad).is_err()));
        let line = judge(&world, &synthetic(50, 0.5)).line();
        assert!(line.contains("2.5 Gbit/s") && line.contains("regret"), "{line}");
    }
}
