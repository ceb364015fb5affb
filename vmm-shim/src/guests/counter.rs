//! The counter guest: proof that a migrated guest neither went back, nor skipped, nor lost a write.
//!
//! The working set is cut into one slice of equal size for each vCPU. At *step* `k` = 0, 1, 2 ... a vCPU
//! writes page `k mod pages` of its slice; `pages` steps are a *pass*. A page then holds, in 64-bit
//! little-endian words: [`MAGIC`], `k`, `chain(k)`, [`CounterParams::page_words`] times the pattern `chain(k)
//! xor (k + 1)`, what was there before, and in the last word `k` again.
//!
//! `chain(0) = SEED xor (vcpu + 1) * ODD` and `chain(k + 1) = rotate_left((chain(k) xor k) * ODD, 29)`, all
//! modulo 2^64: see [`first_chain`] and [`mix`]. From the second pass on, before a page is written,
//! everything above is verified for step `k - pages`; a difference is printed as `E c<vcpu> p<page> want <x>
//! got <x>`. At a pass' end `c<vcpu> p<pass> s<chain>` is printed, with the pass from 0 and the chain value
//! *after* its last step. Numbers are hexadecimal without leading zeros. A lock in guest memory keeps lines
//! whole.
//!
//! Each vCPU also keeps, at [`map::GAPS`](super::map::GAPS), the longest time in TSC ticks between two of its looks at the clock, which
//! it looks at after every page and while it waits: so how long it stood still, ever or since somebody put zeros there.
//!
//! The pace is kept by the TSC against an absolute schedule; of the time that the guest stood still, at most
//! [`CATCH_UP_MS`] are caught up.

use pagecopy::layout::PAGE_SIZE;

/// First word of every page written.
pub const MAGIC: u64 = 0x5046_434f_554e_5452;
/// Most pattern words in a page: all but the three of the header and the last.
pub const PAGE_WORDS_MAX: u32 = 508;
/// Most milliseconds of its schedule that the guest catches up after it stood still.
pub const CATCH_UP_MS: u64 = 5;

const SEED: u64 = 0x7061_6765_6665_72ff;
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the counter guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterParams {
    /// Bytes written again and again, by all vCPUs together; rounded down to whole pages for each vCPU.
    pub working_set: u64,
    /// Pages that each vCPU writes in a second; 0 for as fast as it can.
    pub pages_per_s: u64,
    /// 64-bit words of pattern in each page, besides the header and the last word; at most
    /// [`PAGE_WORDS_MAX`].
    pub page_words: u32,
}

impl CounterParams {
    /// Pages in the slice of each of `cpus` vCPUs: what [`expected_chain`] and [`Checker::new`] want.
    pub fn pages(&self, cpus: u8) -> u64 {
        self.working_set / PAGE_SIZE as u64 / u64::from(cpus.max(1))
    }
}

/// The chain value of a vCPU's step 0.
pub fn first_chain(cpu: u8) -> u64 {
    SEED ^ (u64::from(cpu) + 1).wrapping_mul(ODD)
}

/// The chain value of step `k + 1` from that of step `k`.
pub fn mix(chain: u64, k: u64) -> u64 {
    (chain ^ k).wrapping_mul(ODD).rotate_left(29)
}

/// What vCPU `cpu` prints at the end of pass `pass` (from 0) over a slice of `pages` pages.
///
/// It takes `pages` steps for each pass; [`Checker`] goes on from where it was.
pub fn expected_chain(cpu: u8, pass: u64, pages: u64) -> u64 {
    (0..(pass + 1) * pages).fold(first_chain(cpu), mix)
}

/// Which side of the migration printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The guest before the handover.
    Source,
    /// The guest after it.
    Destination,
}

/// How a counter guest's output is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The guest itself found memory that is not what it had written.
    #[error("{side:?}: the guest found its memory changed: {line}")]
    Memory {
        /// Who printed it.
        side: Side,
        /// The line.
        line: String,
    },
    /// Something that the guest does not print.
    #[error("{side:?}: not a line of the counter guest: {line:?}")]
    Line {
        /// Who printed it.
        side: Side,
        /// The line, or its start.
        line: String,
    },
    /// A pass was printed twice, or left out.
    #[error("{side:?}: vCPU {cpu} finished pass {got}, but pass {want} was due")]
    Pass {
        /// Who printed it.
        side: Side,
        /// The vCPU.
        cpu: u8,
        /// The pass that was due.
        want: u64,
        /// The pass that was printed.
        got: u64,
    },
    /// The chain value of a pass is wrong.
    #[error("{side:?}: vCPU {cpu}, pass {pass}: chain {got:#x}, expected {want:#x}")]
    Chain {
        /// Who printed it.
        side: Side,
        /// The vCPU.
        cpu: u8,
        /// The pass.
        pass: u64,
        /// What it must be.
        want: u64,
        /// What was printed.
        got: u64,
    },
    /// The source printed after the destination had.
    #[error("the source printed {bytes} bytes after the destination had printed: both ran")]
    BothRan {
        /// How many bytes.
        bytes: usize,
    },
}

/// Longest line the guest prints, with room to spare.
const LINE_MAX: usize = 128;

/// Verifies the console output of a counter guest: of the source, then of the destination, in pieces as they
/// come.
///
/// Each vCPU's passes must go up by exactly one with the right chain, across the handover. A line that the
/// source began and the destination finished is one line: the state that moved includes how far it was
/// printed.
#[derive(Clone, Debug)]
pub struct Checker {
    pages: u64,
    cpus: Vec<Progress>,
    side: Side,
    line: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    chain: u64,
    /// Passes printed by the source, and by the destination.
    passes: [u64; 2],
}

impl Checker {
    /// For a guest of `cpus` vCPUs with `pages` pages each ([`CounterParams::pages`]).
    pub fn new(cpus: u8, pages: u64) -> Self {
        let cpus = (0..cpus).map(|cpu| Progress { chain: first_chain(cpu), passes: [0, 0] }).collect();
        Self { pages, cpus, side: Side::Source, line: Vec::new() }
    }

    /// Takes more output of one side. After an error the checker is of no more use.
    pub fn feed(&mut self, side: Side, output: &[u8]) -> Result<(), CheckError> {
        if output.is_empty() {
            return Ok(());
        }
        if self.side == Side::Destination && side == Side::Source {
            return Err(CheckError::BothRan { bytes: output.len() });
        }
        self.side = side;
        for &byte in output {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > LINE_MAX {
                    return Err(self.bad_line());
                }
                continue;
            }
            self.check_line()?;
            self.line.clear();
        }
        Ok(())
    }

    /// Pages of each vCPU.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Passes of each vCPU that the source and the destination printed.
    pub fn passes(&self) -> Vec<(u64, u64)> {
        self.cpus.iter().map(|c| (c.passes[0], c.passes[1])).collect()
    }

    fn text(&self) -> String {
        self.line.iter().map(|&b| char::from(b)).collect()
    }

    fn bad_line(&self) -> CheckError {
        CheckError::Line { side: self.side, line: self.text() }
    }

    fn check_line(&mut self) -> Result<(), CheckError> {
        let (side, line) = (self.side, self.text());
        if line.starts_with("E ") {
            return Err(CheckError::Memory { side, line });
        }
        let Some((cpu, got_pass, got)) = parse(&line) else { return Err(self.bad_line()) };
        let pages = self.pages;
        let Some(progress) = self.cpus.get_mut(usize::from(cpu)) else { return Err(self.bad_line()) };
        let pass = progress.passes[0] + progress.passes[1];
        if got_pass != pass {
            return Err(CheckError::Pass { side, cpu, want: pass, got: got_pass });
        }
        let want = (pass * pages..(pass + 1) * pages).fold(progress.chain, mix);
        if got != want {
            return Err(CheckError::Chain { side, cpu, pass, want, got });
        }
        progress.chain = want;
        progress.passes[usize::from(side == Side::Destination)] += 1;
        Ok(())
    }
}

/// `c<vcpu> p<pass> s<chain>`
fn parse(line: &str) -> Option<(u8, u64, u64)> {
    let mut fields = line.split(' ');
    let mut hex = |prefix: char| u64::from_str_radix(fields.next()?.strip_prefix(prefix)?, 16).ok();
    let (cpu, pass, chain) = (hex('c')?, hex('p')?, hex('s')?);
    if fields.next().is_some() {
        return None;
    }
    Some((u8::try_from(cpu).ok()?, pass, chain))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(cpu: u8, pass: u64, pages: u64) -> String {
        format!("c{cpu:x} p{pass:x} s{:x}\n", expected_chain(cpu, pass, pages))
    }

    #[test]
    fn follows_a_handover_in_the_middle_of_a_line() {
        let mut checker = Checker::new(2, 10);
        let cut = line(0, 1, 10);
        checker.feed(Side::Source, (line(0, 0, 10) + &line(1, 0, 10) + &cut[..9]).as_bytes()).unwrap();
        checker.feed(Side::Destination, &cut.as_bytes()[9..]).unwrap();
        checker.feed(Side::Destination, line(1, 1, 10).as_bytes()).unwrap();
        assert_eq!(checker.passes(), vec![(1, 1), (1, 1)]);
        assert_eq!(checker.feed(Side::Source, b"x"), Err(CheckError::BothRan { bytes: 1 }));
    }

    #[test]
    fn finds_what_is_wrong() {
        let feed = |text: String| Checker::new(1, 7).feed(Side::Source, text.as_bytes()).unwrap_err();
        assert!(matches!(feed(line(0, 1, 7)), CheckError::Pass { want: 0, got: 1, .. }));
        assert!(matches!(feed(line(0, 0, 7) + &line(0, 0, 7)), CheckError::Pass { want: 1, got: 0, .. }));
        assert!(matches!(feed(line(0, 0, 6)), CheckError::Chain { pass: 0, .. }));
        assert!(matches!(feed(line(1, 0, 7)), CheckError::Line { .. }));
        assert!(matches!(feed("E c0 p3 want 1 got 0\n".into()), CheckError::Memory { .. }));
        assert!(matches!(feed("c0 p0\n".into()), CheckError::Line { .. }));
        assert!(matches!(feed("é".repeat(200)), CheckError::Line { .. }));
    }
}
