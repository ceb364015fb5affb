//! What failed in a backend.

use std::error::Error;
use std::io;

use crate::layout::LayoutError;

/// An operation of a backend that failed, with what was tried.
///
/// ```
/// use std::error::Error;
/// use pagecopy::backend::BackendError;
///
/// // Any error of a VMM's own stays what it is.
/// let own: std::num::ParseIntError = "x".parse::<u32>().unwrap_err();
/// let error = BackendError::new("read the number of vCPUs", own);
/// assert_eq!(error.to_string(), "read the number of vCPUs");
/// assert!(error.source().unwrap().is::<std::num::ParseIntError>());
/// ```
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct BackendError {
    /// What was tried, where, and, where something can be done about it, what.
    pub what: String,
    /// Why it failed: an error of the system's or of the backend's own.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

impl BackendError {
    /// An error with its cause, or with a text that says it.
    pub fn new(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), source: source.into() }
    }

    /// An error with the last OS error as its source.
    pub fn last_os(what: impl Into<String>) -> Self {
        Self::new(what, io::Error::last_os_error())
    }

    /// That a dirty log of this name was asked for what only a started one has.
    pub fn not_started(log: &str) -> Self {
        let kind = io::Error::from(io::ErrorKind::InvalidInput);
        Self::new(format!("the dirty log {log} is not started"), kind)
    }

    /// An error that stems from bad data rather than from the system.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::new(what, io::Error::from(io::ErrorKind::InvalidData))
    }

    /// The system's error among the causes, if there is one: its code says what is short (room, memory, descriptors).
    pub fn io(&self) -> Option<&io::Error> {
        let mut cause: Option<&(dyn Error + 'static)> = Some(&*self.source);
        while let Some(error) = cause {
            if let Some(io) = error.downcast_ref() {
                return Some(io);
            }
            cause = error.source();
        }
        None
    }
}

impl From<LayoutError> for BackendError {
    fn from(error: LayoutError) -> Self {
        Self::invalid(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("a device's own")]
    struct Own(#[source] io::Error);

    #[test]
    fn the_systems_word_is_found_below_others() {
        let error = BackendError::new("write", Own(io::Error::from_raw_os_error(28)));
        assert_eq!(error.io().and_then(io::Error::raw_os_error), Some(28));
        assert_eq!(error.source.to_string(), "a device's own");
        assert!(BackendError::new("write", "no reason").io().is_none());
        assert_eq!(BackendError::invalid("x").io().map(io::Error::kind), Some(io::ErrorKind::InvalidData));
    }
}
