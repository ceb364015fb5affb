//! Migrations as processes, for measuring side by side: `pageferry send` and `recv`, and QEMU's own migration.
//!
//! Both move the same RAM image into memory of the same kind, and are timed alike: from the request until *both* sides have
//! everything. What either says of itself is kept besides.

pub mod ferry;
pub mod live;
pub mod process;
pub mod qemu;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long a transfer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// What the destination's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// A file at this place, made new for the run.
    File(&'a Path),
    /// Anonymous memory, of huge pages where the kernel grants them.
    Anonymous,
}

impl Target<'_> {
    /// Makes its file, of holes, where it is one.
    fn make(self, length: u64) -> Result<(), String> {
        let Self::File(path) = self else { return Ok(()) };
        let made = File::create(path).and_then(|file| file.set_len(length));
        made.map_err(|e| format!("{}: {e}", path.display()))
    }
}

/// Where a side runs: here, or in a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    namespace: Option<String>,
}

impl Place {
    /// In the network namespace of this name (see `ip netns`).
    pub fn namespace(name: impl Into<String>) -> Self {
        Self { namespace: Some(name.into()) }
    }
}

/// One transfer of an image.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The RAM file that is moved.
    pub image: &'a Path,
    /// Where to.
    pub target: Target<'a>,
    /// Where the source runs.
    pub source: &'a Place,
    /// Where the destination runs.
    pub destination: &'a Place,
    /// The destination's address, without a port.
    pub host: &'a str,
    /// A port that is free there.
    pub port: u16,
    /// A folder for sockets and logs.
    pub folder: &'a Path,
    /// Whether to look at the memory of both sides again and again, which takes a little of their time.
    pub watch_memory: bool,
    /// Under TLS, with the certificates and keys of this folder.
    pub tls: Option<&'a Path>,
}

/// What a transfer took. Times are in milliseconds unless they say otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Took {
    /// From the request until source and destination both say that it is done.
    pub total_ms: f64,
    /// The total time that the source reports.
    pub reported_ms: f64,
    /// Of that, before the first page could be sent.
    pub setup_ms: f64,
    /// CPU time of the source process, in seconds.
    pub source_cpu_s: f64,
    /// CPU time of the destination process, in seconds.
    pub destination_cpu_s: f64,
    /// Bytes that the source sent for the pages.
    pub wire_bytes: u64,
    /// Most memory of the source's own, in bytes: see [`process::private_bytes`]. 0 where nobody looked.
    pub source_private_bytes: u64,
    /// The same of the destination; its guest's RAM is part of it where that is anonymous.
    pub destination_private_bytes: u64,
}

impl Took {
    /// CPU time of both sides, in seconds.
    pub fn cpu_s(&self) -> f64 {
        self.source_cpu_s + self.destination_cpu_s
    }
}

/// Whether two files have the same content.
///
/// # Errors
/// The system's, if one cannot be read.
pub fn same_content(left: &Path, right: &Path) -> io::Result<bool> {
    let mut files = (File::open(left)?, File::open(right)?);
    let length = files.0.metadata()?.len();
    if length != files.1.metadata()?.len() {
        return Ok(false);
    }
    let mut buffers = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut left = length;
    while left > 0 {
        let part = left.min(1 << 20) as usize;
        files.0.read_exact(&mut buffers.0[..part])?;
        files.1.read_exact(&mut buffers.1[..part])?;
        if buffers.0[..part] != buffers.1[..part] {
            return Ok(false);
        }
        left -= part as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_compared_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let mut bytes = vec![1; (2 << 20) + 5];
        let one = file("one", &bytes);
        assert!(same_content(&one, &file("two", &bytes)).unwrap());
        *bytes.last_mut().unwrap() = 2;
        assert!(!same_content(&one, &file("three", &bytes)).unwrap());
        assert!(!same_content(&one, &file("four", &bytes[1..])).unwrap());
    }
}
