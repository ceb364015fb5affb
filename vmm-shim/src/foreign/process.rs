//! Another process, held so that no other one can take its place.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use pagecopy::backend::BackendError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::maps::{self, FileSystems, Mapping};
use crate::pagemap::Pagemap;

/// What lets somebody look into another process.
const HELP: &str = "run as the process's own user, if it may be dumped, or as root, or with CAP_SYS_PTRACE and CAP_DAC_OVERRIDE";

/// Another process, by its number. Files of its `/proc` folder are opened once, and stay those of this process and of the program that
/// it runs: when it ends, or becomes another program, there are errors, also where its number is given to another one.
///
/// ```
/// use std::os::unix::fs::MetadataExt;
/// use vmm_shim::foreign::Process;
///
/// let process = Process::open(std::process::id())?;
/// let program = std::fs::metadata("/proc/self/exe")?;
/// let mapped = process.mappings_of(program.dev(), program.ino())?;
/// # let overlay = mapped.is_empty();
/// assert!(overlay || mapped.iter().any(|mapping| mapping.offset == 0 && !mapping.shared));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Process {
    pid: u32,
    /// What it is called, for errors.
    name: String,
    pidfd: OwnedFd,
    /// Read from the start by one at a time.
    maps: Mutex<File>,
    smaps: Mutex<File>,
    pagemap: Pagemap,
    clear_refs: File,
    systems: FileSystems,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("pid", &self.pid).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Process {
    /// Takes hold of a process.
    ///
    /// # Errors
    /// There is none, or this one may not look into it. It takes the user of the process, where it may be dumped (prctl(2)), or root, or
    /// both CAP_SYS_PTRACE and CAP_DAC_OVERRIDE.
    pub fn open(pid: u32) -> Result<Self, BackendError> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| BackendError::invalid(format!("{pid} is no process's number")))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|e| {
            let hint = match e {
                Errno::SRCH => "there is none of this number",
                Errno::INVAL => "it is a thread of another process; name that one",
                Errno::NOSYS => "it takes Linux 5.3",
                _ => "see pidfd_open(2)",
            };
            BackendError::new(format!("take hold of process {pid}: {hint}"), e)
        })?;
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let name = comm.trim_end().to_owned();
        let open = |file: &str, options: &OpenOptions| {
            options.open(format!("/proc/{pid}/{file}")).map_err(|e| refused(pid, &name, file, e))
        };
        let (read, write) = (OpenOptions::new().read(true).clone(), OpenOptions::new().write(true).clone());
        let maps = Mutex::new(open("maps", &read)?);
        let smaps = Mutex::new(open("smaps", &read)?);
        let pagemap = Pagemap::of(open("pagemap", &read)?);
        let clear_refs = open("clear_refs", &write)?;
        let mut mountinfo = String::new();
        let mounts = open("mountinfo", &read)?.read_to_string(&mut mountinfo);
        mounts.map_err(|e| refused(pid, &name, "mountinfo", e))?;
        let systems = FileSystems::of(&mountinfo, memfd_device()?);
        let process = Self { pid, name, pidfd, maps, smaps, pagemap, clear_refs, systems };
        // What was opened by number is this process's if it has not ended by now.
        process.require_alive()?;
        Ok(process)
    }

    /// Its number, as it was given.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The ranges of its addresses that map a file, by the file's `st_dev` and `st_ino`, in rising order.
    ///
    /// # Errors
    /// The process has ended, or runs another program.
    pub fn mappings_of(&self, device: u64, inode: u64) -> Result<Vec<Mapping>, BackendError> {
        let mut found = self.mapped()?;
        found.retain(|mapping| (mapping.device, mapping.inode) == (device, inode));
        self.find_huge(&mut found)?;
        Ok(found)
    }

    /// What is mapped in a range of its addresses: those mappings that only differ in where the kernel has split them as one.
    ///
    /// # Errors
    /// The process has ended, or runs another program.
    pub fn mappings_in(&self, addresses: &Range<u64>) -> Result<Vec<Mapping>, BackendError> {
        let mut found = self.mapped()?;
        found.retain(|m| m.addresses.start < addresses.end && addresses.start < m.addresses.end);
        self.find_huge(&mut found)?;
        Ok(maps::within(&found, addresses))
    }

    /// That it has not ended.
    ///
    /// # Errors
    /// It has.
    pub fn require_alive(&self) -> Result<(), BackendError> {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&at_once)) {
            Ok(0) | Err(Errno::INTR) => Ok(()),
            Ok(_) => Err(self.error("look into", io::Error::from(Errno::SRCH))),
            Err(e) => Err(self.error("look into", e.into())),
        }
    }

    /// Its page table.
    pub(super) fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// What clears the bits of its page table.
    pub(super) fn clear_refs(&self) -> &File {
        &self.clear_refs
    }

    /// An error of something that was done with it.
    pub(super) fn error(&self, what: &str, e: io::Error) -> BackendError {
        let gone = e.kind() == io::ErrorKind::UnexpectedEof || e.raw_os_error() == Some(libc::ESRCH);
        let hint = if gone { ": it has ended, or runs another program" } else { "" };
        BackendError::new(format!("{what} process {} ({}){hint}", self.pid, self.name), e)
    }

    /// All that is mapped in it. Huge pages are not told from others.
    pub(super) fn mapped(&self) -> Result<Vec<Mapping>, BackendError> {
        let mut text = String::new();
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let read = maps.rewind().and_then(|()| maps.read_to_string(&mut text));
        // The memory of a process that has ended is empty.
        match read {
            Ok(0) => Err(self.error("read what is mapped in", io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(maps::parse(&text, &self.systems)),
            Err(e) => Err(self.error("read what is mapped in", e)),
        }
    }

    fn find_huge(&self, found: &mut [Mapping]) -> Result<(), BackendError> {
        let mut smaps = self.smaps.lock().unwrap_or_else(PoisonError::into_inner);
        let result = smaps.rewind().and_then(|()| maps::find_huge(BufReader::new(&mut *smaps), found));
        result.map_err(|e| self.error("read which mappings have huge pages in", e))
    }
}

/// That a file of a process's `/proc` folder cannot be opened.
fn refused(pid: u32, name: &str, file: &str, e: io::Error) -> BackendError {
    let hint = match e.kind() {
        io::ErrorKind::PermissionDenied => HELP,
        io::ErrorKind::NotFound if fs::metadata("/proc/self").is_ok() => "it has ended",
        _ => "mount /proc",
    };
    BackendError::new(format!("open /proc/{pid}/{file} to look into process {pid} ({name}): {hint}"), e)
}

/// The device that all memfds and shared memory without a name are on.
fn memfd_device() -> Result<u64, BackendError> {
    let stat = rustix::fs::memfd_create("pageferry-device", MemfdFlags::CLOEXEC)
        .and_then(|memfd| rustix::fs::fstat(&memfd));
    stat.map(|stat| stat.st_dev).map_err(|e| {
        BackendError::new("make a memfd, to know which device memfds are on", io::Error::from(e))
    })
}
