//! Calls the body of a fuzz target without a fuzzer: on its corpus, and on changed copies of that. Part of each crate's unit tests, so
//! that bodies compile and pass wherever tests do.

use std::fs;
use std::path::{Path, PathBuf};

use crate::rng::Rng;

/// Runs `body` over `tests/fuzz/corpus/TARGET` and `changed` changed inputs, the same ones each time.
pub fn replay(target: &str, changed: u32, body: fn(&[u8])) {
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "tests/fuzz/corpus/{target} is empty");
    for input in &corpus {
        run(body, input);
    }
    let mut random = Rng::new(0x9e37_79b9 ^ u64::from(changed));
    for _ in 0..changed {
        run(body, &change(&corpus, &mut random));
    }
}

/// The corpus of a target, by name of file.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    assert!(folder.is_dir(), "there is no tests/fuzz/corpus/{target}");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Shows the input that made a body panic.
struct Shown<'a>(&'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input was {:02x?}", self.0);
        }
    }
}

fn run(body: fn(&[u8]), input: &[u8]) {
    let _shown = Shown(input);
    body(input);
}

/// One of the corpus with some bytes changed, put in, left out, or followed by another's.
fn change(corpus: &[Vec<u8>], random: &mut Rng) -> Vec<u8> {
    let mut input = corpus[random.index(corpus.len())].clone();
    for _ in 0..1 + random.index(6) {
        let at = random.index(input.len() + 1);
        let until = (at + 1 + random.index(16)).min(input.len());
        match random.index(6) {
            0 => drop(input.splice(at..at, (0..1 + random.index(16)).map(|_| random.next() as u8))),
            1 => drop(input.drain(at..until)),
            2 => input.truncate(at),
            3 => {
                let other = &corpus[random.index(corpus.len())];
                let from = random.index(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            4 => input[at..until].fill([0, 1, 0x7f, 0x80, 0xff][random.index(5)]),
            _ => input[at..until].iter_mut().for_each(|byte| *byte ^= 1 << random.index(8)),
        }
    }
    input
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn all_of_a_corpus_is_run_and_changed_copies_of_it() {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        replay("uri", 7, |_| {
            RUNS.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(RUNS.load(Ordering::Relaxed), corpus("uri").len() + 7);
    }
}
