//! Child processes that do not outlive their owner, what they use, and where programs are.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Place;

/// How often it is looked whether a child has ended.
const TICK: Duration = Duration::from_millis(10);
/// How often a watched child's memory is looked at.
const WATCH_TICK: Duration = Duration::from_millis(5);
/// Folders of programs that the path of an ordinary user often lacks.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The path in which programs are looked for: the caller's, then the system's folders.
pub fn path() -> OsString {
    let mut folders: Vec<PathBuf> =
        env::split_paths(&env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into())).collect();
    folders.extend(SYSTEM_FOLDERS.iter().map(PathBuf::from));
    env::join_paths(folders).unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into())
}

/// Where a program is.
pub fn program(name: &str) -> Option<PathBuf> {
    let runs =
        |path: &PathBuf| path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    env::split_paths(&path()).map(|folder| folder.join(name)).find(runs)
}

impl Place {
    /// A command that runs `program` there.
    pub(super) fn command(&self, program: &Path) -> Command {
        let Some(name) = &self.namespace else { return Command::new(program) };
        // It becomes the program, so that the child is the program itself.
        let mut command = Command::new(self::program("ip").unwrap_or_else(|| "ip".into()));
        command.args(["netns", "exec", name]).arg(program);
        command
    }
}

/// A running process; killed when dropped.
#[derive(Debug)]
pub struct Running(Option<Child>);

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// The system's, if the program cannot be started.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(|child| Self(Some(child)))
    }

    /// Its process id; 0 once it was waited for or killed.
    pub fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.0.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// Its standard error, if that is a pipe that nobody took before.
    pub fn stderr(&mut self) -> Option<ChildStderr> {
        self.0.as_mut()?.stderr.take()
    }

    /// Its standard output, if that is a pipe that nobody took before.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.0.as_mut()?.stdout.take()
    }

    /// Waits for its end; returns what it wrote into pipes that nobody took, which must fit into them.
    ///
    /// # Errors
    /// If it has not ended in time, or cannot be waited for. It is killed then.
    pub fn wait(mut self, patience: Duration) -> Result<Output, String> {
        let deadline = Instant::now() + patience;
        while !self.has_ended() {
            if Instant::now() > deadline {
                return Err(format!("it had not ended after {} s", patience.as_secs()));
            }
            std::thread::sleep(TICK);
        }
        let output = self.0.take().map(Child::wait_with_output);
        output.and_then(Result::ok).ok_or_else(|| "it cannot be waited for".into())
    }

    /// Ends it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// CPU time that a process has used so far, in seconds, by the kernel's clock of 100 Hz; `None` if it is gone.
pub fn cpu_s(process: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    ticks(&stat).map(|ticks| ticks as f64 / 100.0)
}

/// User and system time in a line of `/proc/PID/stat`. The name before them, in parentheses, may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    Some(user + fields.next()?.parse::<u64>().ok()?)
}

/// Memory that a process has for itself, in bytes: anonymous pages and page tables, without what it maps of files, be they
/// programs or RAM images. `None` if it is gone.
pub fn private_bytes(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    private_in(&status)
}

fn private_in(status: &str) -> Option<u64> {
    let kib = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
    };
    Some((kib("RssAnon:")? + kib("VmPTE:")?) << 10)
}

/// Looks at a process's memory until it ends, and keeps the most.
#[derive(Debug)]
pub struct MemoryWatch(Arc<AtomicU64>);

impl MemoryWatch {
    /// Begins to look.
    pub fn start(process: u32) -> Self {
        let most = Arc::new(AtomicU64::new(0));
        let seen = most.clone();
        std::thread::spawn(move || {
            // A process that has ended, though nobody waited for it, has no memory to tell of.
            while let Some(bytes) = private_bytes(process) {
                seen.fetch_max(bytes, Ordering::Relaxed);
                if Arc::strong_count(&seen) == 1 {
                    break;
                }
                std::thread::sleep(WATCH_TICK);
            }
        });
        Self(most)
    }

    /// The most so far, in bytes.
    pub fn most(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    fn shell(line: &str) -> Running {
        Running::start(Command::new("sh").args(["-c", line]).stdout(Stdio::piped())).unwrap()
    }

    #[test]
    fn output_and_status_are_returned() {
        let output = shell("echo x; exit 4").wait(Duration::from_secs(60)).unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(4), &b"x\n"[..]));
    }

    #[test]
    fn a_slow_child_is_killed() {
        let mut slow = shell("exec sleep 100");
        assert!(!slow.has_ended());
        slow.kill();
        assert!(slow.has_ended());
        assert!(shell("exec sleep 100").wait(Duration::ZERO).unwrap_err().contains("had not ended"));
    }

    #[test]
    fn cpu_time_is_read_after_the_name() {
        let line = "7 (a) b) 1 ) S 1 7 7 0 -1 4194304 100 0 0 0 250 31 0 0 20 0 1 0 5 1000 10";
        assert_eq!(ticks(line), Some(281));
        assert_eq!(ticks("7 (sh) S 1"), None);
        assert!(cpu_s(std::process::id()).is_some_and(|s| s >= 0.0));
    }

    #[test]
    fn memory_is_what_is_not_of_files() {
        let status = "VmRSS:\t  900 kB\nRssAnon:\t  100 kB\nRssFile:\t 800 kB\nVmPTE:\t   28 kB\n";
        assert_eq!(private_in(status), Some(128 << 10));
        assert_eq!(private_in("Name:\tsh\n"), None);
        // Hidden from the optimizer, which would do without it.
        let held = std::hint::black_box(vec![1u8; 32 << 20]);
        let watch = MemoryWatch::start(std::process::id());
        let deadline = Instant::now() + Duration::from_secs(60);
        while watch.most() < held.len() as u64 && Instant::now() < deadline {
            std::thread::sleep(WATCH_TICK);
        }
        assert!(watch.most() >= std::hint::black_box(held).len() as u64);
    }

    #[test]
    fn a_place_decides_what_runs_the_program() {
        let here = Place::default().command(Path::new("/bin/true"));
        assert_eq!(here.get_program(), "/bin/true");
        let there = Place::namespace("left").command(Path::new("/bin/true"));
        let words: Vec<_> = there.get_args().collect();
        assert_eq!(words, ["netns", "exec", "left", "/bin/true"]);
    }
}
