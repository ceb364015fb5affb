//! What may have taken pages of shared memory out of page tables, together with their soft-dirty bits.
//!
//! Private memory leaves a page table as a swap entry, which keeps the bit. Shared memory leaves no trace: the page is in its file, and
//! comes back by the next access as one that nobody has written. The kernel does so where it reclaims memory, and where it takes a huge
//! page apart or makes one. It counts both, for the whole host: when the counts have stood still, nothing is lost.

use std::fs;
use std::io;

use pagecopy::backend::BackendError;

/// Pages of anonymous and shared memory that reclaim has looked at, before it unmaps any. It looks at none where there is no swap.
const SCANNED: &str = "pgscan_anon";
/// Huge pages whose entries in page tables were taken apart.
const SPLIT: &str = "thp_split_pmd";
/// Huge pages that were made of small ones.
const COLLAPSED: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_collapsed";

/// Counts what may lose bits, and remembers the last two counts: what was about to be unmapped when it was counted is unmapped a little
/// later.
#[derive(Clone, Copy, Debug)]
pub(super) struct Losses {
    /// Whether there are huge pages, which lose bits when they come and go.
    huge: bool,
    counts: [u64; 2],
}

impl Losses {
    /// Begins to count.
    ///
    /// # Errors
    /// The kernel does not say.
    pub(super) fn begin(huge: bool) -> Result<Self, BackendError> {
        let now = count(huge)?;
        Ok(Self { huge, counts: [now; 2] })
    }

    /// Whether bits may have been lost since the last look.
    pub(super) fn may_have_been(&mut self) -> Result<bool, BackendError> {
        Ok(self.step(count(self.huge)?))
    }

    fn step(&mut self, now: u64) -> bool {
        let before = self.counts[0];
        self.counts = [self.counts[1], now];
        now != before
    }
}

fn count(huge: bool) -> Result<u64, BackendError> {
    let what = "find out whether the host has swapped, which loses soft-dirty bits of shared memory";
    let vmstat = fs::read_to_string("/proc/vmstat")
        .map_err(|e| BackendError::new(format!("{what}: read /proc/vmstat"), e))?;
    let swapped = field(&vmstat, SCANNED).ok_or_else(|| {
        BackendError::new(
            format!("{what}: /proc/vmstat has no {SCANNED}, which takes Linux 5.8; compare contents instead"),
            io::Error::from(io::ErrorKind::Unsupported),
        )
    })?;
    // A kernel without huge pages has neither.
    let collapsed = || fs::read_to_string(COLLAPSED).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let huge =
        if huge { field(&vmstat, SPLIT).unwrap_or(0).wrapping_add(collapsed().unwrap_or(0)) } else { 0 };
    Ok(swapped.wrapping_add(huge))
}

/// A number of `/proc/vmstat`.
fn field(vmstat: &str, name: &str) -> Option<u64> {
    vmstat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_in_doubt_for_two_looks() {
        let mut losses = Losses { huge: false, counts: [5, 5] };
        let looks = [5, 5, 6, 6, 6, 9, 10, 10, 10].map(|now| losses.step(now));
        assert_eq!(looks, [false, false, true, true, false, true, true, true, false]);
    }

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let text = "pgscan_anon_other 1\npgscan_anon 23\nthp_split_pmd 4\n";
        assert_eq!((field(text, SCANNED), field(text, SPLIT)), (Some(23), Some(4)));
        assert_eq!(field(text, "pgscan"), None);
        Losses::begin(true).unwrap().may_have_been().unwrap();
    }
}
