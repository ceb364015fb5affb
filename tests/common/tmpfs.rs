//! A file system of a size of its own, whose room can be taken and given back.

#![allow(dead_code, reason = "every test binary uses its own part")]

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// A tmpfs of its own size, gone in the end.
pub(crate) struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// `None` where nobody may mount one; prints so.
    pub(crate) fn new(mib: usize) -> Option<Self> {
        let mounted = Self::mount(mib);
        if mounted.is_none() {
            println!("skipped: no tmpfs can be mounted here (it takes root)");
        }
        mounted
    }

    /// `None` where nobody may mount one.
    pub(crate) fn mount(mib: usize) -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("pageferry-test-").tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}M"), "pageferry-test"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(folder))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Takes all the room but for so many bytes; dropping the file that it lies in gives it back.
    pub(crate) fn fill(&self, left: u64) -> io::Result<File> {
        let ballast = tempfile::tempfile_in(self.0.path())?;
        let mut len = 0;
        loop {
            let fs = rustix::fs::statvfs(self.0.path())?;
            let more = (fs.f_bfree * fs.f_frsize).saturating_sub(left);
            if more == 0 {
                return Ok(ballast);
            }
            match rustix::fs::fallocate(&ballast, FallocateFlags::empty(), len, more) {
                Ok(()) => len += more,
                // Somebody took some of it meanwhile.
                Err(Errno::NOSPC | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
