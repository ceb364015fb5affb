//! Calls the body of a fuzz target without a fuzzer: on its corpus, and on changed copies of that. Part of each crate's unit tests, so
//! that bodies compile and pass wherever tests do.

use std::fs;
use std::path::{Path, PathBuf};

/// Runs `body` over `tests/fuzz/corpus/TARGET` and `changed` changed inputs, the same ones each time.
pub(crate) fn replay(target: &str, changed: u32, body: fn(&[u8])) {
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "tests/fuzz/corpus/{target} is empty");
    for input in &corpus {
        run(body, input);
    }
    let mut random = Random(0x9e37_79b9 ^ u64::from(changed));
    for _ in 0..changed {
        run(body, &change(&corpus, &mut random));
    }
}

/// The corpus of a target, by name of file.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The root package, or one beside it.
    let mut homes = [manifest, manifest.parent().unwrap_or(manifest)].into_iter();
    let folder = homes.find_map(|home| {
        let folder = home.join("tests/fuzz/corpus").join(target);
        folder.is_dir().then_some(folder)
    });
    let folder = folder.unwrap_or_else(|| panic!("there is no tests/fuzz/corpus/{target}"));
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
fn change(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = corpus[random.below(corpus.len())].clone();
    for _ in 0..1 + random.below(6) {
        let at = random.below(input.len() + 1);
        let until = (at + 1 + random.below(16)).min(input.len());
        match random.below(6) {
            0 => drop(input.splice(at..at, (0..1 + random.below(16)).map(|_| random.next() as u8))),
            1 => drop(input.drain(at..until)),
            2 => input.truncate(at),
            3 => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            4 => input[at..until].fill([0, 1, 0x7f, 0x80, 0xff][random.below(5)]),
            _ => input[at..until].iter_mut().for_each(|byte| *byte ^= 1 << random.below(8)),
        }
    }
    input
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}
