//! What this process used: CPU time and memory.

use std::io;

use nix::libc;
use nix::sys::resource::{RLIM_INFINITY, Resource, UsageWho, getrlimit, getrusage};
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
    let limit = |resource| match getrlimit(resource) {
        Ok((soft, _)) if soft != RLIM_INFINITY => soft.to_string(),
        _ => "unlimited".into(),
    };
    format!(
        "RLIMIT_NPROC is {} and RLIMIT_AS is {}; raise what is short (`ulimit -u`, `ulimit -v`), or pids.max of its cgroup",
        limit(Resource::RLIMIT_NPROC),
        limit(Resource::RLIMIT_AS)
    )
}

/// What to do about an error of the system that a limit of this process brings about.
pub(crate) fn limit_of(error: &io::Error) -> Option<String> {
    match error.raw_os_error()? {
        libc::EMFILE => {
            let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
            Some(format!("RLIMIT_NOFILE is {soft}: raise it with `ulimit -n`"))
        }
        libc::ENOMEM => {
            let (soft, _) = getrlimit(Resource::RLIMIT_AS).ok()?;
            let bounded = soft != RLIM_INFINITY;
            bounded
                .then(|| format!("its limit is RLIMIT_AS, {soft} bytes of memory: raise it with `ulimit -v`"))
        }
        libc::ENFILE => Some("this host is out of descriptors: raise the sysctl fs.file-max".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named() {
        let text = limit_of(&io::Error::from_raw_os_error(libc::EMFILE)).unwrap();
        assert!(text.contains("RLIMIT_NOFILE is ") && text.contains("ulimit -n"), "{text}");
        assert_eq!(limit_of(&io::Error::from_raw_os_error(libc::EPIPE)), None);
        assert!(thread_limits().contains("RLIMIT_NPROC is "), "{}", thread_limits());
    }
}
