//! What this process used: CPU time and memory.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// CPU seconds of the process so far, user and system.
pub(crate) fn cpu_seconds() -> f64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
        (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6
    })
}

/// Largest resident set of the process so far, in bytes.
pub(crate) fn max_rss_bytes() -> u64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.max_rss() as u64 * 1024)
}

/// Memory that this host can give without swapping, in bytes (`MemAvailable`, proc_meminfo(5)); as good as endless where
/// the kernel does not say.
pub fn available_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available(&text).unwrap_or(u64::MAX)
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_says() {
        let text = "MemTotal:       24558080 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(available(text), Some(20_480_000 << 10));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        assert!(available_memory_bytes() > 1 << 20);
    }
}
