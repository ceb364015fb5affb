//! The delta coder against a scalar loop, on QEMU's XBZRLE workloads, on one core and out of L2.

use std::hint::black_box;
use std::time::{Duration, Instant};

use pagecopy::layout::PAGE_SIZE;
use pagecopy::xbzrle::{Encoded, Page, decode as decode_page, encode as encode_page, encode_reference};
use pageferry_benches::{Workload, decode_scalar};

use crate::run::median;

/// Pages of a pass: both versions stay in L2, and decoding writes to fewer pages than the first level of a TLB holds (64 or more).
const PAIRS: usize = 48;
/// How long one measurement takes.
const WHILE: Duration = Duration::from_millis(20);
/// Measurements of each, in turns.
const TIMES: usize = 9;

/// Encoding: the least ratio, and all of them with the rates.
pub(crate) fn encode() -> (f64, String) {
    of_all(|workload| {
        let pairs = workload.pairs(PAIRS);
        let (mut out, mut reference) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        in_turns(
            || {
                for (old, new) in &pairs {
                    black_box(encode_page(old, new, &mut out));
                }
            },
            || {
                for (old, new) in &pairs {
                    black_box(encode_reference(old, new, &mut reference));
                }
            },
        )
    })
}

/// Decoding: the same.
pub(crate) fn decode() -> (f64, String) {
    of_all(|workload| {
        let deltas = deltas(workload);
        // Deltas hold new bytes, not differences, so that they can be applied over and over with the same effort.
        let (mut pages, mut reference): (Vec<Page>, Vec<Page>) = workload.pairs(PAIRS).into_iter().unzip();
        in_turns(
            || {
                for (delta, page) in deltas.iter().zip(&mut pages) {
                    // As the loop's: what a result with an error takes to be written down is not decoding.
                    black_box(decode_page(delta, page).ok());
                }
            },
            || {
                for (delta, page) in deltas.iter().zip(&mut reference) {
                    black_box(decode_scalar(delta, page));
                }
            },
        )
    })
}

fn deltas(workload: Workload) -> Vec<Vec<u8>> {
    let mut out = [0; PAGE_SIZE];
    let encoded = |(old, new): (Page, Page)| match encode_page(&old, &new, &mut out) {
        Encoded::Len(length) => out[..length].to_vec(),
        Encoded::Unchanged | Encoded::Overflow => Vec::new(),
    };
    workload.pairs(PAIRS).into_iter().map(encoded).collect()
}

/// The least of the ratios; and for each workload our rate in 10^9 bytes of page a second, and the ratio.
fn of_all(measure: impl Fn(Workload) -> (f64, f64)) -> (f64, String) {
    let mut least = f64::INFINITY;
    let mut words = Vec::new();
    for workload in Workload::ALL {
        let (ours, scalar) = measure(workload);
        let ratio = scalar / ours;
        least = least.min(ratio);
        let rate = (PAIRS * PAGE_SIZE) as f64 / ours / 1e9;
        words.push(format!("{} {rate:.1} GB/s ({ratio:.1}x)", workload.name()));
    }
    (least, words.join(", "))
}

/// Seconds that a pass takes, of either, by turns; medians.
fn in_turns(mut ours: impl FnMut(), mut scalar: impl FnMut()) -> (f64, f64) {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for _ in 0..TIMES {
        first.push(seconds(&mut ours));
        second.push(seconds(&mut scalar));
    }
    (median(first).unwrap_or(f64::NAN), median(second).unwrap_or(f64::NAN))
}

fn seconds(pass: &mut impl FnMut()) -> f64 {
    /// Passes between looks at the clock, which takes as long as a few pages of a single changed byte.
    const AT_ONCE: u32 = 16;
    let begin = Instant::now();
    let mut passes = 0;
    while begin.elapsed() < WHILE {
        (0..AT_ONCE).for_each(|_| pass());
        passes += AT_ONCE;
    }
    begin.elapsed().as_secs_f64() / f64::from(passes)
}
