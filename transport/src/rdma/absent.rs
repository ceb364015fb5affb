//! What is known of RDMA in a build without the feature `rdma`: that it is not there.
//!
//! The same names as in the module proper, as far as the rest of this crate uses them; most are of types that have no value.

mod options;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::GuestRam;
use pagecopy::bitmap::PageBitmap;
use pagecopy::digest::PageHasher;

pub use options::RdmaOptions;

use crate::carrier::{DestinationEnd, Landing, SourceEnd};
use crate::wire::Preamble;
use crate::wire::control::ErrorCode;

/// A connection over RDMA that failed.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    /// As all of them do.
    #[error("the rdma transport is not built in; build with `--features rdma`")]
    NotBuilt,
}

impl RdmaError {
    pub(crate) fn is_cancelled(&self) -> bool {
        match self {
            Self::NotBuilt => false,
        }
    }
}

/// Somebody who wants to open a stream.
#[derive(Clone, Copy, Debug)]
pub enum ConnectRequest {}

impl ConnectRequest {
    pub(crate) fn refuse(self, _: ErrorCode, _: &str) {
        match self {}
    }
}

/// What the streams of a session at the source share.
pub(crate) struct SourceContext;

impl SourceContext {
    pub(crate) fn new(_: &Arc<dyn GuestRam>, _: &PageHasher, _: RdmaOptions, _: &PageBitmap) -> Self {
        Self
    }
}

/// What the streams of a session at the destination share.
pub(crate) struct DestinationContext;

impl DestinationContext {
    pub(crate) fn new(_: Arc<dyn Landing>, _: Duration, _: u64) -> Self {
        Self
    }
}

/// Has the libraries find devices and load drivers, of which there are none.
pub(crate) fn warm_up() {}

/// Opens a stream of a session.
pub(crate) fn connect(
    _: &SourceContext,
    _: (&str, u16),
    _: Preamble,
    _: Duration,
    _: &dyn Fn() -> bool,
) -> Result<SourceEnd, RdmaError> {
    Err(RdmaError::NotBuilt)
}

/// Accepts a stream.
pub(crate) fn accept(request: ConnectRequest, _: &DestinationContext) -> io::Result<Option<DestinationEnd>> {
    match request {}
}
