//! The runs.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::fault::Fault;
use super::weather::ROWS;
use super::{Outcome, run};

/// Runs in the tests, and seeds within which every broken variant is caught.
const SEEDS: u64 = 10_000;

/// What must be seen, at least once in so many runs.
const EXPECTED: &[(&str, u64)] = &[
    ("moved", 3),
    ("stayed", 10),
    ("gone", 100),
    ("moved although streams died", 20),
    ("frames taken back", 6),
    ("deltas", 2),
    ("compressed pages", 1),
    ("pages referred to", 10),
    ("unchanged pages", 1),
    ("pages of zeros", 1),
    ("torn pages", 200),
    ("pages as in the base", 10),
    ("pages that the base did not have", 10),
    ("taken from the base, and moved", 20),
    ("GO said again", 500),
    ("asked, and heard that it runs", 500),
    ("abandoned, and heard of it", 500),
    ("both died", 5000),
    ("moved before its pages", 5),
    ("resumed, and moved before its pages", 100),
    ("postcopy connections lost", 40),
    ("postcopy frames damaged", 50),
    ("waits for a page", 3),
    ("lost before its pages were there", 1000),
    ("no room for what is missing", 1000),
    ("pages taken away, and the handover taken back", 500),
    ("cancelled while it asked", 200),
    ("streams connected again", 20),
    ("resumed", 40),
    ("resumed, and moved", 50),
];

/// Runs seeds from 0 on, with all cores, until one is in violation; returns it, and what was seen how often.
fn search(seeds: u64, broken: Option<Fault>) -> (Option<(u64, String)>, BTreeMap<&'static str, u64>) {
    let next = AtomicU64::new(0);
    let found = Mutex::new((None::<(u64, String)>, BTreeMap::new()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let Outcome { violation, seen, .. } = run(seed, broken, false);
                    let mut found = found.lock().unwrap();
                    for (what, times) in seen {
                        *found.1.entry(what).or_default() += times;
                    }
                    if let Some(what) = violation {
                        // No seed after this one is begun; the first of all is the one to look at.
                        next.store(seeds, Ordering::Relaxed);
                        if found.0.as_ref().is_none_or(|(first, _)| seed < *first) {
                            found.0 = Some((seed, what));
                        }
                    }
                }
            });
        }
    });
    found.into_inner().unwrap()
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

#[test]
fn no_seed_breaks_the_rules() {
    if let Some(seed) = number("PAGEFERRY_SEED") {
        let outcome = run(seed, None, true);
        outcome.trace.iter().for_each(|line| println!("{line}"));
        println!("seed {seed}: {:?}", outcome.seen);
        assert_eq!(outcome.violation, None);
        return;
    }
    let seeds = number("PAGEFERRY_SEEDS").unwrap_or(SEEDS);
    let (violation, seen) = search(seeds, None);
    println!("{seeds} seeds: {seen:#?}");
    if let Some((seed, what)) = violation {
        panic!(
            "seed {seed}: {what}\nto see it step by step: \
             PAGEFERRY_SEED={seed} cargo test -p pageferry-transport simulation::tests::no_seed -- --nocapture"
        );
    }
    // Runs in which nothing happens prove nothing.
    let rows = ROWS.as_flattened().iter().flat_map(|rows| rows.iter().copied().zip([200, 2000, 5000]));
    for (what, in_runs) in EXPECTED.iter().copied().chain(rows) {
        let times = seen.get(what).copied().unwrap_or(0);
        assert!(times >= seeds / in_runs, "{what}: only {times} times in {seeds} runs");
    }
}

fn caught(fault: Fault, by: &[&str]) {
    let (violation, _) = search(SEEDS, Some(fault));
    let Some((seed, what)) = violation else { panic!("{fault:?} was not caught within {SEEDS} seeds") };
    println!("{fault:?} is caught by seed {seed}: {what}");
    assert!(by.iter().any(|by| what.contains(by)), "{what}");
}

#[test]
fn a_chunk_on_two_streams_is_caught() {
    caught(Fault::NoChunkAffinity, &["stale", "other than they were sent", "ReferenceUnknown"]);
}

#[test]
fn a_reference_that_is_not_held_is_caught() {
    caught(Fault::ReferenceNotHeld, &["stale", "other than they were sent", "did not stop"]);
}

#[test]
fn go_before_ready_is_caught() {
    caught(
        Fault::GoBeforeReady,
        &["stale", "nobody runs the guest", "while this side was in state", "READY follows FINISH"],
    );
}

#[test]
fn a_delta_base_that_was_not_voided_is_caught() {
    caught(Fault::BaseNotVoided, &["stale", "other than they were sent", "account of the transfer differs"]);
}

#[test]
fn pages_sent_again_before_the_worker_stopped_are_caught() {
    caught(Fault::NoStopBeforeResend, &["stale", "other than they were sent"]);
}

#[test]
fn a_forgotten_stop_is_caught() {
    caught(Fault::EarlyStopForgotten, &["did not stop stream"]);
}

#[test]
fn asking_that_ends_the_page_service_is_caught() {
    caught(Fault::AskingEndsService, &["serves no pages any more"]);
}

#[test]
fn missing_pages_that_count_as_carried_are_caught() {
    caught(Fault::MissingCarried, &["number of pages carried"]);
}

#[test]
fn a_base_that_is_believed_is_caught() {
    caught(Fault::BaseBelieved, &["stale", "other than they were sent"]);
}

#[test]
fn a_source_that_is_not_answered_is_caught() {
    caught(Fault::AbandonedUnheard, &["nobody runs the guest"]);
}

#[test]
fn a_seed_decides_everything() {
    for seed in 0..20 {
        let (first, second) = (run(seed, None, true), run(seed, None, true));
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!(first.digest, second.digest, "seed {seed}");
    }
}
