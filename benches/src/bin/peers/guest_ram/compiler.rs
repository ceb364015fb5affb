//! A compiler at work: gcc in the midst of several files, with sources and objects in the page cache and in tmpfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry::measure::process::{private_bytes, program};
use pageferry::print;

use super::cache::{self, Files};
use super::{guest, host};

/// Where the objects come to lie.
const BUILD: &str = "/dev/shm/build";
/// Memory of the compilers together, in percent of the guest's, at which they are stopped.
const WORK_PERCENT: u64 = 15;
/// Sources of zstd that are compiled, by one worker each: in turn, the largest last. A worker is not to end before it is stopped.
const WORK: [&[&str]; 5] = [
    &["common/entropy_common", "compress/zstd_lazy"],
    &["common/error_private", "compress/zstd_compress"],
    &["common/debug", "compress/zstd_opt"],
    &["compress/hist", "decompress/huf_decompress", "legacy/zstd_v07"],
    &["common/zstd_common", "compress/zstd_double_fast", "legacy/zstd_v05"],
];

/// Where cargo keeps the sources of what is built here.
fn registry() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo");
    std::env::var_os("CARGO_HOME").map_or_else(home, PathBuf::from).join("registry/src")
}

/// zstd's sources, which this program was built from.
fn zstd(registry: &Path) -> Result<PathBuf, String> {
    let folders = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<_> = folders(registry)
        .flat_map(|index| folders(&index).collect::<Vec<_>>())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("zstd-sys-")))
        .map(|path| path.join("zstd/lib"))
        .filter(|path| path.join("compress/zstd_lazy.c").is_file())
        .collect();
    found.sort();
    let missing =
        "there are no sources of zstd-sys to compile: get them with `cargo fetch`, or set CARGO_HOME";
    found.pop().ok_or_else(|| format!("{}: {missing}", registry.display()))
}

/// Whether what the guest needs is here.
pub(super) fn check() -> Result<(), String> {
    host::tool("gcc", "gcc libc6-dev")?;
    zstd(&registry()).map(drop)
}

/// Fills the guest: compilers that are stopped in mid-work, and what a build has read and written.
pub(super) fn fill(total: u64) -> Result<(), String> {
    let (gcc, sources) = (host::tool("gcc", "gcc")?, zstd(&registry())?);
    let shell = program("sh").ok_or("the guest has no sh")?;
    fs::create_dir_all(BUILD).map_err(host::at(Path::new(BUILD)))?;
    for (at, names) in WORK.iter().enumerate() {
        guest::start(
            Command::new(&shell).args(["-c", &worker(&gcc, &sources, Path::new(BUILD), at, names)]),
        )?;
    }
    let goal = total * WORK_PERCENT / 100;
    guest::wait_until("its compilers", || {
        guest::check_failures()?;
        Ok(held(&compilers()) >= goal)
    })?;
    // They stay as they are while the rest is read, which they would slow down.
    let stopped = compilers();
    stop(&stopped)?;
    print::note(format_args!(
        "{} compilers were stopped; they hold {} MiB",
        stopped.len(),
        held(&stopped) >> 20
    ));
    // The other files of the build: sources, headers, and what was made of them. This program lies beside that.
    let free = total * cache::FREE_PERCENT / 100;
    let own = std::env::current_exe().map_err(|e| format!("this program's own place: {e}"))?;
    let built = own.parent().unwrap_or(Path::new("/"));
    for (folder, percent) in [(registry().as_path(), 8), (Path::new("/usr/include"), 5), (built, 100)] {
        cache::read_all(folder, Files::All, free, &mut (total * percent / 100))?;
    }
    Ok(())
}

/// The memory of these processes together, in bytes.
fn held(processes: &[u32]) -> u64 {
    processes.iter().copied().filter_map(private_bytes).sum()
}

/// Stops processes, for good. One that has just ended is none of them.
fn stop(processes: &[u32]) -> Result<(), String> {
    for process in processes {
        let number = i32::try_from(*process).map_err(|e| format!("process {process}: {e}"))?;
        match kill(Pid::from_raw(number), Signal::SIGSTOP) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(format!("process {process} cannot be stopped: {error}")),
        }
    }
    Ok(())
}

/// A shell's commands that compile these files, one after the other, and keep what is made on the way.
fn worker(gcc: &Path, sources: &Path, build: &Path, number: usize, names: &[&str]) -> String {
    let (gcc, sources, build) = (gcc.display(), sources.display(), build.display());
    let compile = |name: &&str| {
        let object = name.replace('/', "-");
        format!(
            "'{gcc}' -O2 -g -save-temps=obj -I '{sources}' -c '{sources}/{name}.c' -o '{build}/{object}.o'"
        )
    };
    let all: Vec<_> = names.iter().map(compile).collect();
    let (log, failed) = (format!("{build}/{number}.log"), guest::failure_file());
    format!("{{ {}; }} 2> '{log}' || cp '{log}' '{failed}'", all.join(" && "))
}

/// The compilers that are at work: gcc is but their driver.
fn compilers() -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|process| {
            fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|name| name.trim() == "cc1")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_newest_sources_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let error = zstd(folder.path()).unwrap_err();
        assert!(error.contains("cargo fetch"), "{error}");
        for name in ["index/zstd-sys-1.0", "index/zstd-sys-2.0", "index/zstd-sys-3.0", "index/other-4.0"] {
            let sources = folder.path().join(name).join("zstd/lib/compress");
            fs::create_dir_all(&sources).unwrap();
            if !name.contains("-3") {
                fs::write(sources.join("zstd_lazy.c"), "").unwrap();
            }
        }
        assert_eq!(zstd(folder.path()), Ok(folder.path().join("index/zstd-sys-2.0/zstd/lib")));
    }

    #[test]
    fn every_source_is_there() {
        let sources = match zstd(&registry()) {
            Ok(sources) => sources,
            Err(lack) => return println!("skipped: {lack}"),
        };
        for name in WORK.iter().copied().flatten() {
            assert!(sources.join(name).with_extension("c").is_file(), "{name}");
        }
    }

    #[test]
    fn processes_are_stopped_as_they_are() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = child.id();
        assert!(held(&[id]) > 0);
        stop(&[id]).unwrap();
        let is_stopped = || {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        };
        let stopped = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            is_stopped()
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(stopped);
        assert_eq!((stop(&[id]), held(&[id])), (Ok(()), 0), "it is gone");
        assert!(stop(&[u32::MAX]).is_err());
    }

    #[test]
    fn a_worker_compiles() {
        let gcc = match host::tool("gcc", "gcc") {
            Ok(gcc) => gcc,
            Err(lack) => return println!("skipped: {lack}"),
        };
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("one.c"), "int one(void) { return 1; }\n").unwrap();
        fs::write(folder.path().join("two.c"), "int one(void); int two(void) { return 2 * one(); }\n")
            .unwrap();
        let line = worker(&gcc, folder.path(), folder.path(), 0, &["one", "two"]);
        host::run(Command::new("sh").args(["-c", &line]), None).unwrap();
        for made in ["one.o", "two.o", "two.i", "two.s"] {
            assert!(folder.path().join(made).metadata().unwrap().len() > 0, "{made}");
        }
    }
}
