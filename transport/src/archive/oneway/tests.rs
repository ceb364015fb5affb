//! Streams that nobody answers, with real commands and descriptors.

mod descriptors;
mod reading;
mod writing;

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

/// How long something may take that is to happen at all.
const LONG: Duration = Duration::from_secs(60);

fn go() -> bool {
    true
}

/// Says no from the `n`th time on.
fn until(n: u32) -> impl Fn() -> bool {
    let asked = Cell::new(0);
    move || {
        asked.set(asked.get() + 1);
        asked.get() < n
    }
}

fn exec(command: &str) -> Uri {
    Uri::Exec(command.into())
}

fn writer(command: &str) -> OneWayWriter {
    OneWayWriter::open(&exec(command)).unwrap()
}

fn reader(command: &str) -> OneWayReader {
    OneWayReader::open(&exec(command)).unwrap()
}

/// Bytes that do not repeat soon.
fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

/// The trouble that a command made, and what it said.
fn trouble(error: OneWayError) -> (Trouble, String) {
    match error {
        OneWayError::Command { trouble, words, .. } => (trouble, words.0),
        other => panic!("{other:?}"),
    }
}

/// Fields of `/proc/PID/stat` from the state on.
fn stat(pid: &str) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// Whether it is a child of this process, running or to be reaped.
fn is_child(pid: i32) -> bool {
    stat(&pid.to_string()).is_some_and(|stat| stat[1] == std::process::id().to_string())
}

/// Processes of a group that run.
fn group(pgid: i32) -> Vec<String> {
    let names =
        std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let runs = |stat: Vec<String>| stat[0] != "Z" && stat[0] != "X" && stat[2] == pgid.to_string();
    names.filter(|name| name.as_bytes()[0].is_ascii_digit() && stat(name).is_some_and(runs)).collect()
}

fn await_that(what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < LONG, "it does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Nothing is left of a command, not even an entry in a table.
fn assert_gone(pid: i32) {
    assert!(!is_child(pid), "not reaped: {:?}", stat(&pid.to_string()));
    // Those that init reaps.
    await_that(|| group(pid).is_empty());
}

#[test]
fn others_are_no_streams_that_nobody_answers() {
    for uri in ["file:/tmp/x", "tcp:h:1", "unix:/s"] {
        let uri: Uri = uri.parse().unwrap();
        for error in [OneWayWriter::open(&uri).err().unwrap(), OneWayReader::open(&uri).err().unwrap()] {
            assert!(error.to_string().contains("give exec:COMMAND or fd:N"), "{error}");
        }
    }
}
