//! Torn pages: which pages may arrive other than they were hashed, and what a receipt that differs says then.
//!
//! A page that leaves from where it lies may be written between the look that hashes it and the one that sends it, and arrive newer than
//! its digest. That is found by its receipt, as damage is, and has an excuse once: it counts as torn, is pending again, and goes from a
//! private copy the next time. A copy has no excuse, so that damage is found one send later at most. A guest
//! that stands still writes nothing, and what leaves then is beyond doubt wherever it lies. All of this rule is here.

use std::sync::atomic::{AtomicBool, Ordering};

use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::choose::Plan;

use super::flight::Unreceipted;

/// How the pages of a frame leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaves {
    /// Hashed where they lie, and sent from there if they are raw.
    InPlace,
    /// Hashed in a copy. A carrier that places has taken these raw pages from where they lie all the same.
    Placed(u64),
    /// Hashed in a copy, and sent from there.
    Copied,
}

/// What receipts have told of a session's pages.
pub(super) struct Doubts {
    /// Memory may be written while it is sent.
    written: bool,
    /// It is not for now: the guest stands still.
    still: AtomicBool,
    /// Pages to be sent from a copy the next time.
    by_copy: PageBitmap,
}

/// Pages of a frame that the destination does not hold as they were hashed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// For which there is no excuse.
    pub(super) damaged: u64,
    /// That were, or may have been, written meanwhile.
    pub(super) torn: u64,
    /// Of which nobody knows: in doubt, and not read back. If one was written meanwhile the dirty log has it, and it is sent again.
    pub(super) unread: u64,
}

impl Verdict {
    /// Of a frame that was kept and not read back.
    pub(super) fn unread(sent: &Unreceipted) -> Self {
        Self { unread: sent.doubtful, ..Self::default() }
    }

    /// All that are known to differ.
    pub(super) fn wrong(self) -> u64 {
        self.damaged | self.torn
    }

    /// All that nothing may be built on.
    pub(super) fn no_base(self) -> u64 {
        self.wrong() | self.unread
    }
}

impl Doubts {
    pub(super) fn new(chunks: u32, written: bool) -> Self {
        Self { written, still: AtomicBool::new(false), by_copy: PageBitmap::new(chunks) }
    }

    /// Whether nobody writes memory from now on, though it is such that is written. Before the first write, where somebody does again.
    pub(super) fn set_still(&self, still: bool) {
        self.still.store(still, Ordering::Relaxed);
    }

    /// Whether a chunk's pages are hashed where they lie, by the plan for it. A page that was torn so has been sent before.
    pub(super) fn in_place(plan: Plan, first_pass: bool) -> bool {
        plan.in_place(first_pass)
    }

    /// Whether what leaves from where it lies may be written on its way.
    pub(super) fn may_tear(&self) -> bool {
        self.written && !self.still.load(Ordering::Relaxed)
    }

    /// Whether a carrier may take these raw pages of a chunk from where they lie.
    pub(super) fn may_place(&self, chunk: u32, raw: u64) -> bool {
        self.by_copy.get(chunk) & raw == 0
    }

    /// Pages of a frame whose receipt may differ without damage.
    pub(super) fn of_frame(&self, leaves: Leaves, raw: u64, delta: u64) -> u64 {
        let moves = if self.may_tear() { u64::MAX } else { 0 };
        match leaves {
            _ if !self.written => 0,
            Leaves::InPlace => raw & moves,
            // A delta's base may have been a page that was placed, however still memory is now.
            Leaves::Placed(placed) => placed & moves | delta,
            Leaves::Copied => 0,
        }
    }

    /// Judges a frame by the digests of its receipt, and remembers which pages have no excuse any more. A receipt of another number of
    /// pages is of none of them.
    pub(super) fn judge(&self, sent: &Unreceipted, digests: &[u8]) -> Verdict {
        let digests = digests.as_chunks::<8>().0;
        let mut wrong = if digests.len() == sent.pages.count_ones() as usize { 0 } else { sent.pages };
        for ((theirs, ours), bit) in digests.iter().zip(sent.digests).zip(bits(sent.pages)) {
            if u64::from_le_bytes(*theirs) != ours {
                wrong |= 1 << bit;
            }
        }
        if wrong != 0 {
            self.by_copy.insert(sent.chunk, wrong);
        }
        let redeemed = self.by_copy.get(sent.chunk) & sent.pages & !wrong & !sent.doubtful;
        if redeemed != 0 {
            self.by_copy.remove(sent.chunk, redeemed);
        }
        Verdict { damaged: wrong & !sent.doubtful, torn: wrong & sent.doubtful, unread: 0 }
    }
}

/// Of a stream: whether anything under way on it may arrive other than it was hashed.
#[derive(Debug, Default)]
pub(super) struct LastDoubt {
    /// Frames from this number on are beyond doubt.
    end: u64,
}

impl LastDoubt {
    /// Takes note of a frame's [doubtful pages](Doubts::of_frame).
    pub(super) fn note(&mut self, seq: u64, doubtful: u64) {
        if doubtful != 0 {
            self.end = seq + 1;
        }
    }

    /// Whether it is under way, where `oldest` is the first frame that is.
    pub(super) fn is_under_way(&self, oldest: Option<u64>) -> bool {
        oldest.is_some_and(|oldest| oldest < self.end)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const CHUNK: u32 = 1;

    fn sent(pages: u64, doubtful: u64) -> Unreceipted {
        let mut digests = [0; 64];
        for (digest, bit) in digests.iter_mut().zip(bits(pages)) {
            *digest = 100 + u64::from(bit);
        }
        Unreceipted {
            chunk: CHUNK,
            pages,
            seq: 0,
            wire_bytes: 0,
            sent_at: Duration::ZERO,
            digests,
            doubtful,
            same: 0,
            references: Box::default(),
            _placement: None,
        }
    }

    fn verdict(damaged: u64, torn: u64) -> Verdict {
        Verdict { damaged, torn, unread: 0 }
    }

    /// The receipt of a frame in which these pages differ.
    fn receipt(pages: u64, wrong: u64) -> Vec<u8> {
        let digest = |bit: u32| if wrong >> bit & 1 != 0 { 7 } else { 100 + u64::from(bit) };
        bits(pages).flat_map(|bit| digest(bit).to_le_bytes()).collect()
    }

    #[test]
    fn what_leaves_from_where_it_lies_is_doubtful_where_memory_is_written() {
        let (raw, delta) = (0b0011, 0b0100);
        for (written, leaves, doubtful) in [
            (true, Leaves::InPlace, raw),
            (true, Leaves::Placed(raw), raw | delta),
            // A carrier that places, and did not place these: their base may still be a page that was placed.
            (true, Leaves::Placed(0), delta),
            (true, Leaves::Copied, 0),
            (false, Leaves::InPlace, 0),
            (false, Leaves::Placed(raw), 0),
            (false, Leaves::Copied, 0),
        ] {
            let doubts = Doubts::new(2, written);
            assert_eq!(doubts.of_frame(leaves, raw, delta), doubtful, "{written} {leaves:?}");
            // While the guest stands still only what was placed before can be torn.
            doubts.set_still(true);
            assert_eq!(doubts.of_frame(leaves, raw, delta), doubtful & delta, "{written} {leaves:?}");
            doubts.set_still(false);
            assert_eq!(doubts.of_frame(leaves, raw, delta), doubtful, "{written} {leaves:?}");
        }
    }

    /// A frame: its pages, those in doubt, those that differ; what they are judged to be, and which pages may not be placed after it.
    type Frame = (u64, u64, u64, Verdict, u64);

    #[test]
    fn a_page_is_excused_once() {
        // Frames of one chunk, one after the other.
        let rows: &[&[Frame]] = &[
            // As it was sent.
            &[(0b11, 0b11, 0, verdict(0, 0), 0)],
            // Damaged at once, where there is no excuse; once it arrives from a copy all is well.
            &[(0b11, 0b00, 0b10, verdict(0b10, 0), 0b10), (0b10, 0b00, 0b00, verdict(0, 0), 0)],
            // Torn, then whole.
            &[(0b11, 0b11, 0b01, verdict(0, 0b01), 0b01), (0b01, 0b00, 0b00, verdict(0, 0), 0)],
            // Torn, it seemed, and from a copy again other than it was sent.
            &[(0b01, 0b01, 0b01, verdict(0, 0b01), 0b01), (0b01, 0b00, 0b01, verdict(0b01, 0), 0b01)],
            // One page of each kind; and what is not of the frame stays as it was.
            &[
                (0b0111, 0b0001, 0b0011, verdict(0b0010, 0b0001), 0b0011),
                (0b1010, 0b1000, 0b0000, verdict(0, 0), 0b0001),
            ],
            // Whole by luck: in doubt, it redeems nothing.
            &[(0b01, 0b01, 0b01, verdict(0, 0b01), 0b01), (0b01, 0b01, 0b00, verdict(0, 0), 0b01)],
        ];
        for row in rows {
            let doubts = Doubts::new(2, true);
            for &(pages, doubtful, wrong, verdict, by_copy) in *row {
                let found = doubts.judge(&sent(pages, doubtful), &receipt(pages, wrong));
                assert_eq!((found, found.wrong()), (verdict, wrong), "{row:?}");
                for bit in 0..64 {
                    let may = by_copy >> bit & 1 == 0;
                    assert_eq!(doubts.may_place(CHUNK, 1 << bit), may, "{row:?} page {bit}");
                }
                assert!(doubts.may_place(0, u64::MAX), "another chunk");
            }
        }
    }

    #[test]
    fn a_receipt_of_another_number_of_pages_is_of_none() {
        for theirs in [0b001, 0b1111] {
            let found = Doubts::new(2, true).judge(&sent(0b111, 0b100), &receipt(theirs, 0));
            assert_eq!(found, verdict(0b011, 0b100));
        }
    }

    #[test]
    fn doubt_is_under_way_until_its_last_frame_is_receipted() {
        let mut last = LastDoubt::default();
        assert!(!last.is_under_way(None) && !last.is_under_way(Some(0)));
        for (seq, doubtful) in [(0, 0), (1, 1), (2, 0)] {
            last.note(seq, doubtful);
        }
        for (oldest, under_way) in [(Some(0), true), (Some(1), true), (Some(2), false), (None, false)] {
            assert_eq!(last.is_under_way(oldest), under_way, "{oldest:?}");
        }
    }
}
