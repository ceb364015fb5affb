//! Huge pages of the host's reserve, for as long as a test takes.

/// Huge pages that the host keeps for a test.
pub(crate) struct HugePages {
    before: u64,
}

const RESERVE: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Reserves so many more; `None`, with the reason printed, where the host does not allow it.
    pub(crate) fn reserve(count: u64) -> Option<Self> {
        let read = || std::fs::read_to_string(RESERVE).ok()?.trim().parse::<u64>().ok();
        let Some(before) = read() else {
            println!("skipped: no huge pages on this host");
            return None;
        };
        let reserve = Self { before };
        if let Err(error) = std::fs::write(RESERVE, (before + count).to_string()) {
            println!("skipped: no right to reserve huge pages ({error})");
            return None;
        }
        if read().is_none_or(|now| now < before + count) {
            println!("skipped: {count} huge pages cannot be had");
            return None;
        }
        Some(reserve)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Whoever may not write it did not change it.
        let _ = std::fs::write(RESERVE, self.before.to_string());
    }
}
