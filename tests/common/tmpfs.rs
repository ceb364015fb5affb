//! A file system of a size of its own, which can be filled.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::{MIB, PAGE, folder};

/// A tmpfs of its own size, gone in the end.
pub(crate) struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// `None` where nobody may mount one; prints so.
    pub(crate) fn new(mib: usize) -> Option<Self> {
        let folder = folder();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}M"), "pageferry-test"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            println!("skipped: no tmpfs can be mounted here (it takes root)");
            return None;
        }
        Some(Self(folder))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Takes all the room that is left.
    pub(crate) fn fill(&self) {
        let file = File::create(self.path("filler")).unwrap();
        let zeros = vec![0; MIB];
        for at in 0.. {
            match file.write_at(&zeros, at * MIB as u64) {
                Ok(written) if written == MIB => {}
                _ => break,
            }
        }
        // The last pages.
        let mut at = file.metadata().unwrap().len();
        while file.write_at(&zeros[..PAGE], at).is_ok_and(|written| written == PAGE) {
            at += PAGE as u64;
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
