//! How memory is registered for RDMA.

/// How a side registers its guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct RdmaOptions {
    /// At the source: register all that is no hole before the first page is sent.
    pub pin_all: bool,
    /// Bytes of guest memory that are registered at most at a time.
    pub pinned_max: u64,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self { pin_all: false, pinned_max: u64::MAX }
    }
}
