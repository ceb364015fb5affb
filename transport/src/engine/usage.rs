//! What this process used: CPU time and memory.

use std::io;

use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// CPU seconds of the process so far, user and system.
pub(crate) fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Largest resident set of the process so far, in bytes; 0 where the system does not say.
pub(crate) fn max_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(0, |kib: u64| kib * 1024)
}

/// Fails once an allocation had to take what was set aside for that: what is left is for ending in order.
pub(crate) fn short_of_memory() -> io::Result<()> {
    if !crate::reserve::is_short() {
        return Ok(());
    }
    let text = "this process has no memory left: raise RLIMIT_AS (`ulimit -v`), or free memory on this host";
    Err(io::Error::new(io::ErrorKind::OutOfMemory, text))
}

/// What bounds the threads of a process.
pub(crate) fn thread_limits() -> String {
    let limit = |resource| getrlimit(resource).current.map_or("unlimited".into(), |soft| soft.to_string());
    format!(
        "RLIMIT_NPROC is {} and RLIMIT_AS is {}; raise what is short (`ulimit -u`, `ulimit -v`), or pids.max of its cgroup",
        limit(Resource::Nproc),
        limit(Resource::As)
    )
}

/// What is short where a thread could not be started for want of something; nothing where the error is another.
pub(crate) fn short_of_threads(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => format!(", another thread ({})", thread_limits()),
        _ => String::new(),
    }
}

/// What to do about an error of the system that a limit of this process brings about.
pub(crate) fn limit_of(error: &io::Error) -> Option<String> {
    match error.raw_os_error()? {
        libc::EMFILE => {
            let soft = getrlimit(Resource::Nofile).current?;
            Some(format!("RLIMIT_NOFILE is {soft}: raise it with `ulimit -n`"))
        }
        libc::ENOMEM => {
            let soft = getrlimit(Resource::As).current?;
            Some(format!("its limit is RLIMIT_AS, {soft} bytes of memory: raise it with `ulimit -v`"))
        }
        libc::ENFILE => Some("this host is out of descriptors: raise the sysctl fs.file-max".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_process_used_is_known() {
        let (before, page) = (cpu_seconds(), 4096);
        let memory = vec![1u8; 64 << 20];
        let sum: u64 = memory.iter().step_by(page).map(|&byte| u64::from(byte)).sum();
        assert_eq!(sum, (64 << 20) / page as u64);
        assert!(cpu_seconds() > before && before > 0.0);
        assert!(max_rss_bytes() >= 64 << 20, "{}", max_rss_bytes());
    }

    #[test]
    fn limits_are_named() {
        let text = limit_of(&io::Error::from_raw_os_error(libc::EMFILE)).unwrap();
        assert!(text.contains("RLIMIT_NOFILE is ") && text.contains("ulimit -n"), "{text}");
        assert_eq!(limit_of(&io::Error::from_raw_os_error(libc::EPIPE)), None);
        assert!(thread_limits().contains("RLIMIT_NPROC is "), "{}", thread_limits());
        let text = short_of_threads(&io::Error::from_raw_os_error(libc::EAGAIN));
        assert!(text.contains("another thread (RLIMIT_NPROC is "), "{text}");
        assert_eq!(short_of_threads(&io::Error::from_raw_os_error(libc::EPIPE)), "");
    }
}
