//! A private folder for sockets and output files of commands that start others.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

/// A folder that only this user may enter; removed with all that is in it when dropped.
pub(super) struct Folder {
    /// Where it is.
    pub(super) path: PathBuf,
}

impl Folder {
    /// Makes one among the system's temporary files, named after the command.
    pub(super) fn new(command: &str) -> std::io::Result<Self> {
        let mut random = [0u8; 8];
        getrandom::fill(&mut random).map_err(std::io::Error::other)?;
        let name = format!("pageferry-{command}-{:016x}", u64::from_le_bytes(random));
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
