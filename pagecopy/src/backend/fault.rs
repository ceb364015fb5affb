//! Who waits for a page.

/// Somebody touched a page that is not there, or is about to write one that is guarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Chunk of the page.
    pub chunk: u32,
    /// The page in its chunk; the first page of its unit where memory is brought in by more than pages.
    pub page: u32,
    /// The thread that waits for it, by the system's number.
    pub thread: u32,
}
