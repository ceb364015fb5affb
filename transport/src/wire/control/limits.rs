//! Limits that messages keep within: asked by who sends before it does, and by who receives after it has read.

use crate::wire::WireError;

/// Whether something of a length, or so many of something, keep within their limit.
pub(super) fn at_most(len: usize, max: usize, field: &'static str) -> Result<(), WireError> {
    if len > max { Err(WireError::TooLong { field, len: len as u64, max: max as u64 }) } else { Ok(()) }
}
