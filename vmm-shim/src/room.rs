//! How much room there is for guest memory: in a file system, on this host, and in the cgroups of this process.
//!
//! What is said is of this moment: others take room meanwhile. So it serves to refuse what cannot fit, and bringing memory in must
//! be able to fail all the same. Guests that are on their way to this host at the same time know of each other (`GuestRam::claim`), where
//! they are one user's. Quotas of users are not looked at; they show when memory is brought in.

mod claim;
mod ledger;
mod sys;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use pagecopy::backend::{BackendError, GuestRam, Room};
use rustix::io::Errno;

pub(crate) use claim::{Wanted, claim};
use ledger::{Ledger, Pool};

/// Opens the account of guests that are on their way, for whoever gives up the right to: where it is, or why there is none. It is a file
/// that is read and written, and there from now on.
///
/// # Errors
/// When it cannot be made, or what is in its place is no account; the text names it. Guests then do not know of each other.
pub fn open_account() -> io::Result<PathBuf> {
    Ok(Ledger::of_user()?.path().to_owned())
}

/// Bytes that this process may take of the host's memory without swapping; as good as endless where the kernel does not say.
pub fn spare_memory_bytes() -> u64 {
    host(Path::new("/")).without_swap
}

/// Bytes that this process may take of the host's memory and swap together; as good as endless where the kernel does not say.
pub fn memory_bytes() -> u64 {
    host(Path::new("/")).with_swap
}

/// Bytes that a file's file system has left for this process; `None` where it has no limit of its own.
pub(crate) fn of_file(file: &File) -> io::Result<Option<u64>> {
    let fs = rustix::fs::fstatvfs(file)?;
    // Without a number of blocks: a memfd, or a tmpfs without a limit.
    if fs.f_blocks == 0 {
        return Ok(None);
    }
    let blocks = if rustix::process::geteuid().is_root() { fs.f_bfree } else { fs.f_bavail };
    Ok(Some(blocks.saturating_mul(fs.f_frsize)))
}

/// Whether an error of the system says that there is no room. A page of a file that cannot be had is a bad address to the kernel.
pub(crate) fn is_for_want_of_room(error: &io::Error) -> bool {
    const NO_ROOM: [Errno; 5] = [Errno::NOSPC, Errno::NOMEM, Errno::DQUOT, Errno::FAULT, Errno::FBIG];
    error.raw_os_error().is_some_and(|code| NO_ROOM.iter().any(|errno| errno.raw_os_error() == code))
}

/// The error of bringing memory in: says where there is no room, if that is why. `in_file`: the memory is in a file with a path.
pub(crate) fn no_room(ram: &dyn GuestRam, in_file: bool, what: String, error: io::Error) -> BackendError {
    let room = if is_for_want_of_room(&error) { ram.room() } else { None };
    let Some(Room { bytes, of, hint }) = room else { return BackendError::new(what, error) };
    // To the kernel a page that cannot be had is a bad address, and a full tmpfs lacks memory.
    let source = io::Error::from(if in_file { Errno::NOSPC } else { Errno::NOMEM });
    BackendError::new(format!("{what}: {of} has {bytes} bytes left; {hint}"), source)
}

/// What can be had of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Left {
    without_swap: u64,
    with_swap: u64,
}

/// The least of what the host and each cgroup have left; `root` is where their files are looked for.
fn host(root: &Path) -> Left {
    let endless = Left { without_swap: u64::MAX, with_swap: u64::MAX };
    pools(root).into_iter().fold(endless, |least, (_, left)| Left {
        without_swap: least.without_swap.min(left.without_swap),
        with_swap: least.with_swap.min(left.with_swap),
    })
}

/// What the host and each cgroup that has a limit have left; none where the kernel does not say.
fn pools(root: &Path) -> Vec<(Pool, Left)> {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let Some(available) = kib_of(&text, "MemAvailable:") else { return Vec::new() };
    let swap = kib_of(&text, "SwapFree:").unwrap_or(0);
    let host = Left { without_swap: available, with_swap: available.saturating_add(swap) };
    let cgroups = cgroups(root).into_iter().filter_map(|folder| {
        let left = cgroup(&folder, swap)?;
        Some((Pool::cgroup(&folder).ok()?, left))
    });
    std::iter::once((Pool::HOST, host)).chain(cgroups).collect()
}

/// The folders of this process's memory cgroup and all above it, of the unified hierarchy (cgroups(7)) or else of version 1.
fn cgroups(root: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut folders = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let top = match controllers {
            "" => root.join("sys/fs/cgroup"),
            _ if controllers.split(',').any(|name| name == "memory") => root.join("sys/fs/cgroup/memory"),
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        folders.extend(path.ancestors().map(|path| top.join(path)));
    }
    folders
}

/// What one cgroup has left; `None` where it has no limit.
fn cgroup(folder: &Path, host_swap: u64) -> Option<Left> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let stat = read("memory.stat").unwrap_or_default();
    // Clean pages of files are given back when memory is short.
    let field = |name: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    if let Some(used) = number("memory.current") {
        let limit = number("memory.max")?;
        let left = limit.saturating_sub(used).saturating_add(field("inactive_file") + field("active_file"));
        let swapped = number("memory.swap.current").unwrap_or(0);
        let swap = number("memory.swap.max").map_or(host_swap, |max| max.saturating_sub(swapped));
        return Some(Left { without_swap: left, with_swap: left.saturating_add(swap.min(host_swap)) });
    }
    let (limit, used) = (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?);
    let files = field("total_inactive_file") + field("total_active_file");
    let left = limit.saturating_sub(used).saturating_add(files);
    Some(Left { without_swap: left, with_swap: left.saturating_add(host_swap) })
}

/// The bytes of a line of meminfo (proc_meminfo(5)).
fn kib_of(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with these files.
    fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 24558080 kB\nMemAvailable:   20480 kB\nSwapFree: 1024 kB\n");

    #[test]
    fn the_host_is_the_limit_where_no_cgroup_has_one() {
        let root = files(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.current", "5\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
        ]);
        assert_eq!(host(root.path()), Left { without_swap: 20480 << 10, with_swap: 21504 << 10 });
        let silent = files(&[("proc/meminfo", "MemTotal: 1 kB\n")]);
        assert_eq!(host(silent.path()).without_swap, u64::MAX);
    }

    #[test]
    fn a_cgroup_above_is_a_limit_and_pages_of_files_count_as_free() {
        let root = files(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.current", "600000\n"),
            ("sys/fs/cgroup/a/memory.max", "1000000\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "anon 1\ninactive_file 10000\nactive_file 20000\nactive_file_x 7\n",
            ),
            ("sys/fs/cgroup/a/memory.swap.max", "0\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1\n"),
            ("sys/fs/cgroup/a/b/memory.max", "9000000\n"),
        ]);
        assert_eq!(host(root.path()), Left { without_swap: 430_000, with_swap: 430_000 });
    }

    #[test]
    fn version_1_counts_too() {
        let root = files(&[
            MEMINFO,
            ("proc/self/cgroup", "5:cpu,memory:/x\n0::/\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "5000\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "6000\n"),
            ("sys/fs/cgroup/memory/x/memory.stat", "total_inactive_file 70\n"),
        ]);
        assert_eq!(host(root.path()), Left { without_swap: 70, with_swap: 70 + (1 << 20) });
    }

    #[test]
    fn this_host_says_something() {
        assert!(spare_memory_bytes() > 1 << 20 && memory_bytes() >= spare_memory_bytes());
        let file = tempfile::tempfile().unwrap();
        assert!(of_file(&file).unwrap().is_none_or(|bytes| bytes > 0));
    }
}
