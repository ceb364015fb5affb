//! What memory has that a userfaultfd watches, whatever for: its descriptor, its regions' addresses, and the words of what is refused.

mod sys;

use std::io;
use std::ops::Range;

use pagecopy::backend::BackendError;

use crate::sys::Userfaultfd;
pub(crate) use sys::Watched;

/// A userfaultfd that stops vCPUs, too; the errors say what to do. `what` it is for goes behind "a userfaultfd for", and `lacks` says
/// what a kernel is short of that has not all features.
pub(crate) fn open(what: &str, features: u64, lacks: &str) -> Result<Userfaultfd, BackendError> {
    let fd = Userfaultfd::open_for_kernel().map_err(|e| {
        let hint = match e.raw_os_error() {
            Some(libc::ENOSYS) => "this kernel has none; it takes CONFIG_USERFAULTFD",
            Some(libc::EPERM | libc::EACCES) => {
                "this process may not see faults of vCPUs; run it with CAP_SYS_PTRACE, set the sysctl \
                 vm.unprivileged_userfaultfd to 1, or give it access to /dev/userfaultfd"
            }
            _ => "see userfaultfd(2)",
        };
        BackendError::new(format!("open a userfaultfd for {what}: {hint}"), e)
    })?;
    fd.api(features)
        .map_err(|e| BackendError::new(format!("userfaultfd of this kernel cannot tell {lacks}"), e))?;
    Ok(fd)
}

/// The error of registering a region, which only one userfaultfd at a time may have.
pub(crate) fn not_registered(region: &str, what: &str, error: io::Error) -> BackendError {
    let hint = match error.raw_os_error() {
        Some(libc::EBUSY) => {
            ": another userfaultfd has it, such as a dirty log by userfaultfd, missing pages that still come, or a guard; end \
             that first"
        }
        Some(libc::EINVAL) => ": this kernel does not do that with memory of this kind",
        _ => "",
    };
    BackendError::new(format!("register region {region:?} for {what}{hint}"), error)
}

/// Runs of addresses, ascending, brought together where little lies between them.
#[derive(Debug, Default)]
pub(crate) struct Spans(pub(crate) Vec<Range<u64>>);

impl Spans {
    /// Runs that are no further apart become one: a system call costs more than passing over this much.
    const GAP_MAX: u64 = 2 << 20;

    /// Adds a run that does not start before the one added last; it may have been added before.
    pub(crate) fn add(&mut self, from: u64, to: u64) {
        match self.0.last_mut() {
            Some(last) if from <= last.end.saturating_add(Self::GAP_MAX) => last.end = last.end.max(to),
            _ => self.0.push(from..to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_together_where_they_are_near() {
        let gap = Spans::GAP_MAX;
        let mut spans = Spans::default();
        for (from, to) in [(10, 20), (15, 18), (20 + gap, 30 + gap), (31 + 2 * gap, 40 + 2 * gap)] {
            spans.add(from, to);
        }
        assert_eq!(spans.0, [10..30 + gap, 31 + 2 * gap..40 + 2 * gap]);
    }
}
