//! What a source announces as missing.

use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::Layout;

use crate::wire::WireError;
use crate::wire::control::ChunkRun;

/// The pages of all MISSING messages of a session. Every run must begin behind the one before it, also that of another message: so
/// each chunk is looked at once, however many runs and messages a source sends.
#[derive(Debug)]
pub struct MissingRuns {
    pages: PageBitmap,
    /// The first chunk that no run has reached.
    next: u32,
}

impl MissingRuns {
    /// Nothing yet, of a layout.
    pub fn new(layout: &Layout) -> Self {
        Self { pages: PageBitmap::new(layout.chunks()), next: 0 }
    }

    /// Adds the runs of a message. The first that is not of the layout, or not behind the one before it, is refused.
    pub fn add(&mut self, runs: &[ChunkRun], layout: &Layout) -> Result<(), WireError> {
        for run in runs {
            let wrong = |field| Err(WireError::BadValue { field, value: run.first.into() });
            if run.first < self.next {
                return wrong("run of missing pages (not behind the one before it)");
            }
            let end = run.first.checked_add(run.count).filter(|&end| end <= layout.chunks());
            let Some(end) = end else { return wrong("run of missing pages (beyond the last chunk)") };
            for chunk in run.first..end {
                let beyond = run.pages & !layout.valid(chunk);
                if beyond != 0 {
                    let field = "missing pages (beyond the region)";
                    return Err(WireError::BadValue { field, value: beyond });
                }
                self.pages.insert(chunk, run.pages);
            }
            self.next = end;
        }
        Ok(())
    }

    /// The pages so far.
    pub fn pages(&self) -> &PageBitmap {
        &self.pages
    }

    /// The pages.
    pub fn into_pages(self) -> PageBitmap {
        self.pages
    }
}

/// A set of pages as runs: ascending, and each chunk in one at most.
pub(super) fn runs_of(pages: &PageBitmap) -> Vec<ChunkRun> {
    let mut runs: Vec<ChunkRun> = Vec::new();
    for (chunk, pages) in pages.iter() {
        match runs.last_mut() {
            Some(run) if run.pages == pages && run.first + run.count == chunk => run.count += 1,
            _ => runs.push(ChunkRun { first: chunk, count: 1, pages }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::control::MISSING_RUNS_MAX;

    fn run(first: u32, count: u32, pages: u64) -> ChunkRun {
        ChunkRun { first, count, pages }
    }

    #[test]
    fn runs_are_as_few_as_can_be() {
        let pages = PageBitmap::new(6);
        for (chunk, word) in [(0, 1), (1, 1), (2, 3), (4, 3), (5, 3)] {
            pages.insert(chunk, word);
        }
        assert_eq!(runs_of(&pages), [run(0, 2, 1), run(2, 1, 3), run(4, 2, 3)]);
    }

    proptest! {
        #[test]
        fn what_a_source_says_is_what_a_destination_hears(
            words in proptest::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 1..40),
            in_message in 1usize..5,
        ) {
            let layout = Layout::flat(words.len() as u64 * 64 * 4096).unwrap();
            let pages = PageBitmap::new(layout.chunks());
            for (chunk, &word) in (0..).zip(&words) {
                pages.insert(chunk, word);
            }
            let mut heard = MissingRuns::new(&layout);
            for runs in runs_of(&pages).chunks(in_message) {
                heard.add(runs, &layout).unwrap();
            }
            let heard = heard.into_pages();
            for (chunk, &word) in (0..).zip(&words) {
                prop_assert_eq!(heard.get(chunk), word);
            }
        }
    }

    #[test]
    fn runs_that_overlap_or_descend_are_refused_across_messages_too() {
        let layout = Layout::flat(16 * 64 * 4096).unwrap();
        let field = "run of missing pages (not behind the one before it)";
        for runs in [
            [run(4, 2, 1), run(5, 1, 1)],
            [run(4, 2, 1), run(5, 1, 2)],
            [run(4, 2, 1), run(4, 2, 1)],
            [run(4, 2, 1), run(3, 1, 1)],
            [run(15, 1, 1), run(0, 16, 1)],
        ] {
            let refused = Err(WireError::BadValue { field, value: runs[1].first.into() });
            assert_eq!(MissingRuns::new(&layout).add(&runs, &layout), refused, "{runs:?}");
            let mut heard = MissingRuns::new(&layout);
            heard.add(&runs[..1], &layout).unwrap();
            assert_eq!(heard.add(&runs[1..], &layout), refused, "{runs:?}");
        }
        for beyond in [run(16, 1, 1), run(0, 17, 1), run(1, u32::MAX, 1)] {
            let field = "run of missing pages (beyond the last chunk)";
            let refused = Err(WireError::BadValue { field, value: beyond.first.into() });
            assert_eq!(MissingRuns::new(&layout).add(&[beyond], &layout), refused);
        }
        let tail = Layout::flat(65 * 4096).unwrap();
        let refused = Err(WireError::BadValue { field: "missing pages (beyond the region)", value: 2 });
        assert_eq!(MissingRuns::new(&tail).add(&[run(0, 2, 3)], &tail), refused);
    }

    /// As many runs as a message takes, over a guest of 64 GiB: each chunk is looked at once, or what would have it looked at again is
    /// refused before that.
    #[test]
    fn a_message_costs_no_more_than_the_chunks_it_names() {
        let layout = Layout::flat(64 << 30).unwrap();
        let (chunks, most) = (layout.chunks(), MISSING_RUNS_MAX as u32);
        let each = chunks / most;
        let mut heard = MissingRuns::new(&layout);
        let all: Vec<_> = (0..most).map(|i| run(i * each, each, u64::MAX)).collect();
        heard.add(&all, &layout).unwrap();
        assert_eq!(heard.into_pages().count(), layout.pages());
        // 1.7e10 steps, if it were not refused at the second.
        let everything = vec![run(0, chunks, 1); MISSING_RUNS_MAX];
        let mut heard = MissingRuns::new(&layout);
        assert!(heard.add(&everything, &layout).is_err());
        assert_eq!(heard.into_pages().count(), u64::from(chunks));
    }
}
