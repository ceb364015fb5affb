//! RAM of a given composition, the same in every run.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::pagecopy::backend::{BackendError, GuestRam};
use pageferry::pagecopy::bitmap::runs;
use pageferry::pagecopy::layout::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::cli::random::SplitMix;

/// Content changes at multiples of this many bytes.
pub(super) const BLOCK_BYTES: usize = 1 << 20;
/// Distinct pages that `dup` consists of.
const DUPLICATES: u64 = 64;
/// Distinct words that `text` consists of.
const WORDS: usize = 4000;

/// What a block of memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Content {
    /// Never touched.
    Hole,
    /// Written with zeros.
    Zero,
    /// The same few pages over and over.
    Dup,
    /// As a process' heap: pointers that share their high bytes, small numbers, zeros.
    Heap,
    /// Words.
    Text,
    /// What no codec shrinks.
    Random,
}

impl Content {
    const ALL: [Self; 6] = [Self::Hole, Self::Zero, Self::Dup, Self::Heap, Self::Text, Self::Random];

    fn name(self) -> &'static str {
        match self {
            Self::Hole => "hole",
            Self::Zero => "zero",
            Self::Dup => "dup",
            Self::Heap => "heap",
            Self::Text => "text",
            Self::Random => "random",
        }
    }
}

/// How much of memory has which content, in percent; they add up to 100.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Mix {
    shares: [f64; Content::ALL.len()],
}

/// Names for frequent compositions.
const PRESETS: [(&str, &str); 4] = [
    ("random", "random=100"),
    ("sparse", "hole=87.5,random=12.5"),
    ("zero", "zero=100"),
    ("mixed", "hole=30,zero=10,heap=20,text=20,random=20"),
];

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let preset = PRESETS.iter().find(|(name, _)| *name == text);
        let mut shares = [0.0; Content::ALL.len()];
        for part in preset.map_or(text, |(_, meaning)| meaning).split(',') {
            let unknown = || {
                format!(
                    "{part:?} is none of hole, zero, dup, heap, text, random with =PERCENT; \
                     or use random, sparse, zero or mixed alone"
                )
            };
            let (name, share) = part.split_once('=').ok_or_else(unknown)?;
            let index = Content::ALL.iter().position(|c| c.name() == name.trim()).ok_or_else(unknown)?;
            let share: f64 = share.trim().parse().map_err(|_| unknown())?;
            if !(0.0..=100.0).contains(&share) {
                return Err(format!("{part:?}: a share is 0 to 100 percent"));
            }
            shares[index] += share;
        }
        let sum: f64 = shares.iter().sum();
        if (sum - 100.0).abs() > 1e-6 {
            return Err(format!("the shares add up to {sum} percent, not to 100"));
        }
        Ok(Self { shares })
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let present = Content::ALL.iter().zip(self.shares).filter(|(_, share)| *share > 0.0);
        let parts: Vec<_> = present.map(|(content, share)| format!("{}={share}", content.name())).collect();
        f.write_str(&parts.join(","))
    }
}

impl Mix {
    /// The content of each of so many blocks: every kind is spread evenly.
    fn blocks(&self, count: u64) -> Vec<Content> {
        let mut given = [0.0; Content::ALL.len()];
        (1..=count)
            .map(|upto| {
                let lack = |kind: usize| self.shares[kind] / 100.0 * upto as f64 - given[kind];
                let most = (0..given.len()).max_by(|&a, &b| lack(a).total_cmp(&lack(b))).unwrap_or(0);
                given[most] += 1.0;
                Content::ALL[most]
            })
            .collect()
    }

    /// The share of memory that is no hole, 0 to 1.
    pub(super) fn present(&self) -> f64 {
        1.0 - self.shares[Content::Hole as usize] / 100.0
    }

    /// Fills untouched memory of one region, with all cores.
    pub(super) fn fill(&self, ram: &dyn GuestRam) {
        let len = ram.region(0).len();
        let blocks = self.blocks(len.div_ceil(BLOCK_BYTES) as u64);
        let words = words();
        in_parallel(blocks.len() as u64, |index, buffer: &mut Vec<u8>| {
            let content = blocks[index as usize];
            if content == Content::Hole {
                return;
            }
            write_block(content, index, &words, buffer);
            let at = index as usize * BLOCK_BYTES;
            let piece = ram.region(0).subslice(at, BLOCK_BYTES.min(len - at));
            let piece = piece.expect("a block starts within its region");
            piece.copy_from(&buffer[..piece.len()]);
        });
    }
}

/// Copies what is no hole from one memory to another of the same size, untouched so far, with all cores.
pub(super) fn copy(from: &dyn GuestRam, to: &dyn GuestRam) -> Result<(), BackendError> {
    let chunks = from.layout().chunks();
    let mut populated = vec![0; chunks as usize];
    from.populated(0, &mut populated)?;
    in_parallel(chunks.into(), |chunk, buffer: &mut Vec<u8>| {
        let (source, target) = (from.chunk(chunk as u32), to.chunk(chunk as u32));
        for (first, count) in runs(populated[chunk as usize]) {
            let (at, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
            let (source, target) = (source.subslice(at, len), target.subslice(at, len));
            let (source, target) = (source.expect("pages of a chunk"), target.expect("pages of a chunk"));
            buffer.resize(len, 0);
            source.copy_to(&mut buffer[..]);
            target.copy_from(&buffer[..]);
        }
    });
    Ok(())
}

/// Does `work` for 0 to `count` - 1, with all cores; each thread has a buffer of its own.
pub(super) fn in_parallel(count: u64, work: impl Fn(u64, &mut Vec<u8>) + Sync) {
    let next = AtomicU64::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let mut buffer = Vec::new();
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        index if index < count => work(index, &mut buffer),
                        _ => return,
                    }
                }
            });
        }
    });
}

/// Makes the content of block `index`.
fn write_block(content: Content, index: u64, words: &[Vec<u8>], block: &mut Vec<u8>) {
    let mut random = SplitMix::new(index.wrapping_mul(0x9e37_79b9) ^ 0x7061_6765_6665_7272);
    block.clear();
    match content {
        Content::Hole | Content::Zero => block.resize(BLOCK_BYTES, 0),
        Content::Dup => {
            block.resize(BLOCK_BYTES, 0);
            for page in block.chunks_exact_mut(PAGE_SIZE) {
                SplitMix::new(random.below(DUPLICATES)).fill(page);
            }
        }
        Content::Heap => {
            let base = 0x7f00_0000_0000 + random.below(1 << 28);
            while block.len() < BLOCK_BYTES {
                let number = random.number();
                block.extend_from_slice(&(base + (number & 0xff_ffff)).to_le_bytes());
                block.extend_from_slice(&(number >> 24 & 0xffff).to_le_bytes());
            }
        }
        Content::Text => {
            while block.len() < BLOCK_BYTES {
                block.extend_from_slice(&words[random.below(WORDS as u64) as usize]);
            }
            block.truncate(BLOCK_BYTES);
        }
        Content::Random => {
            block.resize(BLOCK_BYTES, 0);
            random.fill(block);
        }
    }
}

/// Words of 2 to 10 letters, each with a space behind it.
fn words() -> Vec<Vec<u8>> {
    let mut random = SplitMix::new(7);
    let mut word = || {
        let letters = 2 + random.below(9);
        let mut word: Vec<u8> = (0..letters).map(|_| b'a' + random.below(26) as u8).collect();
        word.push(b' ');
        word
    };
    (0..WORDS).map(|_| word()).collect()
}

#[cfg(test)]
mod tests {
    use pageferry::pagecopy::layout::Layout;
    use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};

    use super::*;

    #[test]
    fn compositions_are_read_and_shown() {
        let mixed: Mix = "mixed".parse().unwrap();
        assert_eq!(mixed.to_string(), "hole=30,zero=10,heap=20,text=20,random=20");
        assert_eq!(mixed.to_string().parse(), Ok(mixed));
        for (bad, word) in [
            ("", "none of"),
            ("random", ""),
            ("random=50", "50 percent"),
            ("hole=60,zero=60", "120 percent"),
            ("cold=100", "none of"),
            ("random=-1,hole=101", "0 to 100"),
            ("random=NaN", "0 to 100"),
            ("random=x", "none of"),
        ] {
            match bad.parse::<Mix>() {
                Ok(_) => assert!(word.is_empty(), "{bad}"),
                Err(text) => assert!(!word.is_empty() && text.contains(word), "{bad}: {text}"),
            }
        }
    }

    #[test]
    fn every_kind_gets_its_share() {
        let blocks = "mixed".parse::<Mix>().unwrap().blocks(1000);
        for (content, count) in [(Content::Hole, 300), (Content::Zero, 100), (Content::Text, 200)] {
            assert_eq!(blocks.iter().filter(|c| **c == content).count(), count, "{content:?}");
        }
        // Also of the first few.
        assert_eq!(blocks[..10].iter().filter(|c| **c == Content::Hole).count(), 3);
    }

    #[test]
    fn memory_is_filled_and_copied() {
        let mix: Mix = "hole=25,zero=25,dup=25,random=25".parse().unwrap();
        // Ends within a block, and within a chunk.
        let len = 8 * BLOCK_BYTES as u64 + 3 * PAGE_SIZE as u64;
        let memory = || {
            GuestMemory::create(Layout::flat(len).unwrap(), &Backing::Memfd).expect("a memfd is to be had")
        };
        let (one, other) = (memory(), memory());
        mix.fill(&one);
        copy(&one, &other).unwrap();
        let pages = |ram: &GuestMemory| {
            let mut words = vec![0; ram.layout().chunks() as usize];
            ram.populated(0, &mut words).unwrap();
            words
        };
        assert_eq!(pages(&one), pages(&other));
        let holes =
            len / PAGE_SIZE as u64 - pages(&one).iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
        assert_eq!(holes, 2 * (BLOCK_BYTES / PAGE_SIZE) as u64);
        let digest = |ram: &GuestMemory| pageferry::engine::content_digest(ram).unwrap();
        assert_eq!(digest(&one), digest(&other));
    }
}
