//! Two dirty logs as one: what either reports.

use std::time::Duration;

use pagecopy::backend::{BackendError, DirtyLog};
use pagecopy::bitmap::PageBitmap;

/// The union of two dirty logs over the same memory.
///
/// A VMM whose devices write guest memory needs one: KVM logs what vCPUs write and nothing else. The writes of devices that the VMM
/// emulates are marked where they are made, as vm-memory does; [`BitmapLog`](crate::bitmap_log::BitmapLog) reports those. Unions nest.
///
/// ```
/// use pagecopy::backend::{DirtyLog, StaticLog};
/// use vmm_shim::union_log::UnionLog;
///
/// // In a VMM: UnionLog::new(KvmBitmapLog::new(slots)?, BitmapLog::new(memory)?).
/// let log = UnionLog::new(StaticLog, StaticLog);
/// log.start()?;
/// assert_eq!(log.name(), "static+static");
/// # Ok::<(), pagecopy::backend::BackendError>(())
/// ```
#[derive(Clone, Debug)]
pub struct UnionLog<A, B> {
    first: A,
    second: B,
    name: String,
}

impl<A: DirtyLog, B: DirtyLog> UnionLog<A, B> {
    /// What `first` and `second` report.
    pub fn new(first: A, second: B) -> Self {
        let name = format!("{}+{}", first.name(), second.name());
        Self { first, second, name }
    }

    /// The first log.
    pub fn first(&self) -> &A {
        &self.first
    }

    /// The second log.
    pub fn second(&self) -> &B {
        &self.second
    }
}

impl<A: DirtyLog, B: DirtyLog> DirtyLog for UnionLog<A, B> {
    /// Both names, such as `kvm-bitmap+marks`.
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&self) -> Result<(), BackendError> {
        self.first.start()?;
        self.second.start().inspect_err(|_| {
            // That the second log cannot be had is what counts.
            let _ = self.first.stop();
        })
    }

    fn sync(&self, dirty: &PageBitmap) -> Result<u64, BackendError> {
        Ok(self.first.sync(dirty)? + self.second.sync(dirty)?)
    }

    /// Both are told of all pages. One that has not reported a page may forget what it knows of it: the page is read after this.
    fn clear(&self, first: u32, pages: &[u64]) -> Result<(), BackendError> {
        self.first.clear(first, pages)?;
        self.second.clear(first, pages)
    }

    /// Of the first log that knows.
    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        self.first.written_by_vcpu().or_else(|| self.second.written_by_vcpu())
    }

    fn expects_writes(&self) -> bool {
        self.first.expects_writes() || self.second.expects_writes()
    }

    /// They are looked at one after the other.
    fn paused(&self) -> Duration {
        self.first.paused() + self.second.paused()
    }

    fn compares(&self) -> bool {
        self.first.compares() || self.second.compares()
    }

    fn stop(&self) -> Result<(), BackendError> {
        let first = self.first.stop();
        self.second.stop()?;
        first
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pagecopy::backend::{BackendError, ContentLog, DirtyLog, StaticLog};
    use pagecopy::bitmap::PageBitmap;

    use super::UnionLog;

    /// A log for whose looks the guest stood still.
    struct Looks(Duration);

    impl DirtyLog for Looks {
        fn name(&self) -> &str {
            "looks"
        }
        fn start(&self) -> Result<(), BackendError> {
            Ok(())
        }
        fn sync(&self, _dirty: &PageBitmap) -> Result<u64, BackendError> {
            Ok(0)
        }
        fn paused(&self) -> Duration {
            self.0
        }
        fn stop(&self) -> Result<(), BackendError> {
            Ok(())
        }
    }

    #[test]
    fn what_one_of_them_takes_the_union_takes() {
        assert!(UnionLog::new(StaticLog, ContentLog).compares());
        assert!(UnionLog::new(ContentLog, StaticLog).compares());
        assert!(!UnionLog::new(StaticLog, StaticLog).compares());
        let [one, other] = [3, 4].map(|ms| Looks(Duration::from_millis(ms)));
        assert_eq!(UnionLog::new(one, other).paused(), Duration::from_millis(7));
    }
}
