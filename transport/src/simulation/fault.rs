//! Deliberately broken variants of the protocol, which the simulation must catch. They exist under test only.

use std::cell::Cell;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A chunk may be claimed by a stream while another one has frames of it under way (against rule 1).
    NoChunkAffinity,
    /// The source gives its right up with FINISH, without waiting for READY, and the destination takes its word (against rule 5).
    GoBeforeReady,
    /// A frame refers to pages that another stream may send anew before it is decoded (against rule 1).
    ReferenceNotHeld,
    /// What a dead stream had under way still counts as base of deltas and as "unchanged" (against rule 3).
    BaseNotVoided,
    /// A dead stream's pages are sent again before the destination has stopped its worker (against rule 1).
    NoStopBeforeResend,
    /// Who cancels while a source in postcopy asks what came of GO ends the page service (against rule 5).
    AskingEndsService,
    /// Pages that are missing count as carried, whether their frames arrived or were lost with their stream (against rule 9).
    MissingCarried,
    /// A destination that gives a session up after READY does not answer its source any more (against rule 5).
    AbandonedUnheard,
    /// The source does not look at receipts of pages that the destination was to take from its older copy (against rule 4).
    BaseBelieved,
    /// What the destination says of a stream before the source knows that it was opened is forgotten.
    EarlyStopForgotten,
}

thread_local!(static BROKEN: Cell<Option<Fault>> = const { Cell::new(None) });

/// Breaks this thread's protocol, or mends it.
pub(super) fn set(fault: Option<Fault>) {
    BROKEN.set(fault);
}

/// Whether this is broken on this thread.
pub(crate) fn is(fault: Fault) -> bool {
    BROKEN.get() == Some(fault)
}
