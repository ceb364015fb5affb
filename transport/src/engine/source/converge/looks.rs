//! Comparisons of all memory, for guests whose writes nobody notes: how long they take, and what the next one would find.
//!
//! One takes long while the guest runs: it takes cores away from it, and it from them. Once the guest stands still all cores are there,
//! and what is found is sent meanwhile. So a round that ends with one ends with news of a guest that has written on for as long as it took.
//! What the next would find is told from how much the last ones found, and where that fits, the guest is stood still in its place.

use std::time::Duration;

use pagecopy::backend::BackendError;
use pagecopy::layout::PAGE_SIZE;

use crate::clock;
use crate::source::PageSource;

/// The comparisons of one migration.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// Whether there is one in the end, whatever the log asks for; and how long that takes by itself, once it was tried.
    pub(super) in_the_end: bool,
    tried: Option<Duration>,
    last: Option<Look>,
}

/// One that was part of a sync.
#[derive(Clone, Copy, Debug)]
struct Look {
    begun: Duration,
    ended: Duration,
    /// Page bytes that it found, by the time since the one before.
    found_per_s: f64,
}

/// What a sync's comparison came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looked {
    /// Pages that it found.
    pub(super) pages: u64,
    /// How long it took, with nothing given out.
    pub(super) took: Duration,
    /// How long one takes while the guest stands still.
    pub(super) alone: Duration,
}

impl Looks {
    /// Compares where the log asks for that. `began` is when the migration did.
    pub(super) fn after_sync(
        &mut self,
        source: &PageSource,
        began: Duration,
    ) -> Result<Looked, BackendError> {
        if !source.compared() {
            self.last = None;
            let alone = if self.in_the_end { self.try_once(source)? } else { Duration::ZERO };
            return Ok(Looked { alone, ..Looked::default() });
        }
        let begun = clock::now();
        let found = source.compare()?;
        let ended = clock::now();
        let since = self.last.map_or(began, |last| last.ended);
        let found_per_s = (found.pages * PAGE_SIZE as u64) as f64 / (ended - since).as_secs_f64().max(1e-3);
        self.last = Some(Look { begun, ended, found_per_s });
        Ok(Looked { pages: found.pages, took: ended - begun, alone: found.alone })
    }

    fn try_once(&mut self, source: &PageSource) -> Result<Duration, BackendError> {
        if let Some(time) = self.tried {
            return Ok(time);
        }
        // A part of what it finds was noted, and is sent anyway.
        Ok(*self.tried.insert(source.compare()?.alone))
    }

    /// What a comparison would find now: what the guest has written since the last one looked there, as fast as it wrote before. `None`
    /// where there was none.
    pub(super) fn unseen_bytes(&self, now: Duration) -> Option<u64> {
        self.last.map(|look| {
            let middle = look.begun + (look.ended - look.begun) / 2;
            (look.found_per_s * (now - middle).as_secs_f64()) as u64
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_behind_a_look_is_reckoned_with() {
        let s = Duration::from_secs;
        let look = |found_per_s| Some(Look { begun: s(10), ended: s(14), found_per_s });
        let looks = |last| Looks { last, ..Looks::default() };
        assert_eq!(looks(None).unseen_bytes(s(20)), None);
        // Right after it half of its time counts.
        assert_eq!(looks(look(1e6)).unseen_bytes(s(14)), Some(2_000_000));
        assert_eq!(looks(look(1e6)).unseen_bytes(s(20)), Some(8_000_000));
        assert_eq!(looks(look(0.0)).unseen_bytes(s(20)), Some(0));
    }
}
