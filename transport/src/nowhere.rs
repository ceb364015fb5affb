//! Guest memory for tests of what only counts pages.

use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::layout::Layout;
use vm_memory::volatile_memory::VolatileSlice;

/// Memory that nobody looks at.
pub(crate) struct Nowhere(pub(crate) Layout);

impl GuestRam for Nowhere {
    fn layout(&self) -> &Layout {
        &self.0
    }
    fn region(&self, _region: usize) -> VolatileSlice<'_> {
        unreachable!("what only counts pages needs no memory")
    }
    fn populated(&self, _first: u32, _pages: &mut [u64]) -> Result<(), BackendError> {
        Ok(())
    }
    fn discard(&self, _chunk: u32, _pages: u64) -> Result<(), BackendError> {
        Ok(())
    }
}
