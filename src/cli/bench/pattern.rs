//! Which pages writers dirty, and when.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use pageferry::pagecopy::bitmap::PageBitmap;
use pageferry::pagecopy::layout::{CHUNK_PAGES, Layout};

use crate::cli::random::SplitMix;
use crate::cli::trace::Trace;

/// Of so many writes, all but one go to the hot set.
const HOT_ALL_BUT_ONE_IN: u64 = 10;

/// How writes are spread over memory.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Pattern {
    /// Evenly.
    Uniform,
    /// Nine of ten into this percentage of memory, evenly; the tenth anywhere.
    Hot(f64),
    /// One page after the other, round and round.
    Sequential,
    /// As a trace has them, over and over.
    Trace,
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = text.strip_prefix("hot:").map(str::parse::<f64>);
        match (text, percent) {
            ("uniform", _) => Ok(Self::Uniform),
            ("sequential", _) => Ok(Self::Sequential),
            ("trace", _) => Ok(Self::Trace),
            (_, Some(Ok(percent))) if percent > 0.0 && percent <= 100.0 => Ok(Self::Hot(percent)),
            (_, Some(_)) => {
                Err("hot:PERCENT takes the share of memory in percent, above 0 and up to 100".into())
            }
            _ => Err("use uniform, hot:PERCENT, sequential or trace".into()),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Hot(percent) => write!(f, "hot:{percent}"),
            Self::Sequential => f.write_str("sequential"),
            Self::Trace => f.write_str("trace"),
        }
    }
}

/// The pages that writers dirty.
pub(super) enum Targets {
    /// At a rate, where a pattern says.
    Rate(Rate),
    /// As a trace has them.
    Trace(Arc<Replay>),
}

/// Pages at a rate.
#[derive(Clone)]
pub(super) struct Rate {
    /// Pages that are no holes, by chunk; only of chunks that have some.
    chunks: Arc<[(u32, u64)]>,
    pattern: Pattern,
    pages_per_s: u64,
    /// The next page of a sequential walk, counted over all chunks.
    at: u64,
}

/// A trace with where its intervals lie.
pub(super) struct Replay {
    trace: Trace,
    /// For each interval when it begins, and how many pages were written before it.
    begins: Vec<(Duration, u64)>,
    took: Duration,
    pages: u64,
}

impl Targets {
    /// Pages among `populated`, so many a second by all writers together.
    pub(super) fn new(pattern: &Pattern, pages_per_s: u64, populated: &PageBitmap) -> Result<Self, String> {
        let chunks: Arc<[_]> = populated.iter().collect();
        if chunks.is_empty() {
            return Err("memory is all holes: there is nothing to dirty; choose another --mix".into());
        }
        Ok(Self::Rate(Rate { chunks, pattern: pattern.clone(), pages_per_s, at: 0 }))
    }

    /// The pages of a trace, for memory of this layout.
    pub(super) fn replay(trace: Trace, layout: &Layout) -> Result<Self, String> {
        let beyond =
            |&(chunk, pages): &(u32, u64)| chunk >= layout.chunks() || pages & !layout.valid(chunk) != 0;
        if trace.intervals.iter().flat_map(|interval| &interval.written).any(beyond) {
            return Err(format!(
                "the trace is of a guest of {} MiB and writes beyond the {} MiB here; use --ram {}",
                trace.guest_bytes >> 20,
                layout.bytes() >> 20,
                trace.guest_bytes
            ));
        }
        let mut before = (Duration::ZERO, 0);
        let begins = trace.intervals.iter().map(|interval| {
            let begins = before;
            before = (before.0 + interval.took, before.1 + interval.pages());
            begins
        });
        let begins = begins.collect();
        let (took, pages) = (trace.took(), trace.pages());
        Ok(Self::Trace(Arc::new(Replay { trace, begins, took, pages })))
    }

    /// The part of writer number `writer` of `count`.
    pub(super) fn walk(&self, writer: u8, count: u8) -> Walk {
        let (writer, count) = (u64::from(writer), u64::from(count.max(1)));
        match self {
            Self::Trace(replay) => {
                let mut walk =
                    TraceWalk { replay: replay.clone(), writer, count, interval: 0, entry: 0, pages: 0 };
                // The others have the pages before.
                for _ in 0..writer {
                    walk.step();
                }
                Walk::Trace(walk)
            }
            Self::Rate(rate) => {
                let share = rate.pages_per_s / count + u64::from(writer < rate.pages_per_s % count);
                // Sequential writers start evenly spread.
                let all = rate.chunks.len() as u64 * CHUNK_PAGES as u64;
                Walk::Rate(Rate { pages_per_s: share, at: all / count * writer, ..rate.clone() })
            }
        }
    }
}

/// The writes of one writer.
pub(super) enum Walk {
    /// At a rate.
    Rate(Rate),
    /// Of a trace.
    Trace(TraceWalk),
}

impl Walk {
    /// Pages to be written in the first `ran` of the writer's time.
    pub(super) fn due(&self, ran: Duration) -> u64 {
        match self {
            Self::Rate(rate) => (ran.as_nanos() * u128::from(rate.pages_per_s) / 1_000_000_000) as u64,
            Self::Trace(walk) => walk.due(ran),
        }
    }

    /// The next page to be written: its chunk, and its number in that.
    pub(super) fn next(&mut self, random: &mut SplitMix) -> (u32, u32) {
        match self {
            Self::Rate(rate) => rate.next(random),
            Self::Trace(walk) => walk.next(),
        }
    }
}

/// One writer's part of a trace: of its pages, in order and over and over, every `count`th.
pub(super) struct TraceWalk {
    replay: Arc<Replay>,
    writer: u64,
    count: u64,
    /// Where the next page is: in which interval, in which of its entries, and which pages of that are done.
    interval: usize,
    entry: usize,
    pages: u64,
}

impl TraceWalk {
    fn due(&self, ran: Duration) -> u64 {
        let Replay { trace, begins, took, pages } = &*self.replay;
        let times = ran.as_nanos() / took.as_nanos();
        let into = ran - Duration::from_nanos((times * took.as_nanos()) as u64);
        let interval = begins.partition_point(|(begins, _)| *begins <= into) - 1;
        let (begins, before) = begins[interval];
        let of_interval = &trace.intervals[interval];
        let share = (into - begins).as_secs_f64() / of_interval.took.as_secs_f64();
        let all = times as u64 * pages + before + (of_interval.pages() as f64 * share) as u64;
        (all + self.count - 1 - self.writer) / self.count
    }

    /// This writer's next page.
    fn next(&mut self) -> (u32, u32) {
        let page = self.step();
        for _ in 1..self.count {
            self.step();
        }
        page
    }

    /// The trace's next page.
    fn step(&mut self) -> (u32, u32) {
        loop {
            let written = &self.replay.trace.intervals[self.interval].written;
            match written.get(self.entry) {
                Some(&(chunk, pages)) if pages & !self.pages != 0 => {
                    let page = (pages & !self.pages).trailing_zeros();
                    self.pages |= 1 << page;
                    return (chunk, page);
                }
                Some(_) => (self.entry, self.pages) = (self.entry + 1, 0),
                // A trace has a page somewhere.
                None => {
                    self.interval = (self.interval + 1) % self.replay.trace.intervals.len();
                    (self.entry, self.pages) = (0, 0);
                }
            }
        }
    }
}

impl Rate {
    fn next(&mut self, random: &mut SplitMix) -> (u32, u32) {
        let all = self.chunks.len() as u64 * CHUNK_PAGES as u64;
        let slot = match &self.pattern {
            Pattern::Uniform | Pattern::Trace => random.below(all),
            Pattern::Hot(percent) => {
                let anywhere = random.below(HOT_ALL_BUT_ONE_IN) == 0;
                let hot = ((all as f64 * percent / 100.0) as u64).max(1);
                random.below(if anywhere { all } else { hot })
            }
            Pattern::Sequential => {
                let slot = self.at;
                self.at = (self.at + 1) % all;
                slot
            }
        };
        let (chunk, pages) = self.chunks[(slot / CHUNK_PAGES as u64) as usize];
        // Where that page is a hole, the next one of its chunk that is none; there is one.
        let from = (slot % CHUNK_PAGES as u64) as u32;
        (chunk, (from + pages.rotate_right(from).trailing_zeros()) % CHUNK_PAGES as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::trace::Interval;

    fn targets(pattern: &str, pages_per_s: u64) -> Targets {
        let populated = PageBitmap::new(100);
        (0..50).for_each(|chunk| assert_eq!(populated.insert(2 * chunk, u64::MAX), u64::MAX));
        Targets::new(&pattern.parse().unwrap(), pages_per_s, &populated).unwrap()
    }

    fn pages(walk: &mut Walk, count: usize) -> Vec<u32> {
        let mut random = SplitMix::new(1);
        (0..count).map(|_| walk.next(&mut random)).map(|(chunk, page)| chunk * 64 + page).collect()
    }

    #[test]
    fn patterns_are_read_and_shown() {
        for text in ["uniform", "hot:12.5", "sequential", "trace"] {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        for text in ["", "hot", "hot:0", "hot:101", "hot:x", "hot:NaN", "zipf"] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }

    #[test]
    fn writes_go_where_the_pattern_says() {
        let uniform = pages(&mut targets("uniform", 1).walk(0, 1), 100_000);
        let distinct: std::collections::BTreeSet<_> = uniform.iter().collect();
        assert!(distinct.len() > 3100 && uniform.iter().all(|page| page / 64 % 2 == 0), "{}", distinct.len());
        let hot = pages(&mut targets("hot:10", 1).walk(0, 1), 10_000);
        let inside = hot.iter().filter(|page| **page < 10 * 64).count();
        assert!((8_900..9_300).contains(&inside), "{inside}");
        let sequential = pages(&mut targets("sequential", 1).walk(1, 2), 1601);
        assert_eq!((sequential[0], sequential[1], sequential[64]), (50 * 64, 50 * 64 + 1, 52 * 64));
        assert_eq!(sequential[1600], 0);
    }

    #[test]
    fn holes_are_left_alone() {
        let populated = PageBitmap::new(3);
        populated.insert(1, 1 << 7 | 1 << 40);
        let targets = Targets::new(&Pattern::Uniform, 1, &populated).unwrap();
        let written = pages(&mut targets.walk(0, 1), 100);
        assert!(written.iter().all(|page| [64 + 7, 64 + 40].contains(page)), "{written:?}");
        assert!(written.contains(&(64 + 7)) && written.contains(&(64 + 40)));
        assert!(Targets::new(&Pattern::Uniform, 1, &PageBitmap::new(3)).is_err());
    }

    #[test]
    fn traces_are_replayed_in_order_and_time_over_and_over() {
        let interval = |millis, written: &[(u32, u64)]| Interval {
            took: Duration::from_millis(millis),
            written: written.to_vec(),
        };
        let intervals =
            vec![interval(10, &[(1, 0b1001), (3, 1)]), interval(10, &[]), interval(20, &[(0, 1)])];
        let trace = Trace { guest_bytes: 1 << 20, chunks: 4, intervals };
        let targets = Targets::replay(trace.clone(), &Layout::flat(1 << 20).unwrap()).unwrap();
        let mut random = SplitMix::new(1);
        let mut walk = targets.walk(0, 1);
        let written: Vec<_> = (0..5).map(|_| walk.next(&mut random)).collect();
        assert_eq!(written, [(1, 0), (1, 3), (3, 0), (0, 0), (1, 0)]);
        for (millis, due) in [(0, 0), (4, 1), (10, 3), (19, 3), (39, 3), (40, 4), (50, 7), (400, 40)] {
            assert_eq!(walk.due(Duration::from_millis(millis)), due, "{millis} ms");
        }
        let mut others = [targets.walk(0, 2), targets.walk(1, 2)];
        assert_eq!(others.each_ref().map(|w| w.due(Duration::from_millis(10))), [2, 1]);
        assert_eq!(others.each_mut().map(|w| w.next(&mut random)), [(1, 0), (1, 3)]);
        assert_eq!(others.each_mut().map(|w| w.next(&mut random)), [(3, 0), (0, 0)]);
        let small = Layout::flat(1 << 19).unwrap();
        assert!(Targets::replay(trace, &small).err().unwrap().contains("--ram 1048576"));
    }

    #[test]
    fn writers_share_the_rate() {
        let targets = targets("uniform", 1000);
        let due: Vec<u64> = (0..3).map(|w| targets.walk(w, 3).due(Duration::from_secs(2))).collect();
        assert_eq!(due, [668, 666, 666]);
    }
}
