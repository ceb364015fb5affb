//! The lab guest's first file system: busybox, our `/init` and the modules, kept in the cache under the digest of its content.

use std::fs;
use std::path::{Path, PathBuf};

use super::cpio::Archive;
use super::error::LabError;
use super::kernel::Kernel;
use super::needs;

/// The guest's first process.
const INIT: &[u8] = include_bytes!("init.sh");

/// The file for this kernel, made if the cache lacks it.
pub(super) fn get(cache: &Path, kernel: &Kernel) -> Result<PathBuf, LabError> {
    needs::check(&[needs::Need::StaticBusybox])?;
    let busybox = needs::static_busybox().unwrap_or_default();
    let mut files = vec![("init".to_owned(), INIT.to_vec()), ("bin/busybox".into(), read(&busybox)?)];
    for path in &kernel.modules {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        files.push((format!("modules/{name}"), read(path)?));
    }
    let content = archive(&files).map_err(LabError::file("put together", Path::new("the initramfs")))?;
    let digest = xxhash_rust::xxh3::xxh3_128(&content);
    let path = cache.join(format!("initramfs-{digest:032x}.cpio"));
    if !path.is_file() {
        let new = cache.join(format!(".new-{}.cpio", std::process::id()));
        fs::write(&new, &content).map_err(LabError::file("write", &new))?;
        fs::rename(&new, &path).map_err(LabError::file("write", &path))?;
    }
    Ok(path)
}

fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(LabError::file("read", path))
}

/// An archive of executable files, each in a folder of the root or in the root itself.
fn archive(files: &[(String, Vec<u8>)]) -> std::io::Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    let mut folders: Vec<&str> = Vec::new();
    for (name, content) in files {
        if let Some((folder, _)) = name.split_once('/')
            && !folders.contains(&folder)
        {
            archive.folder(folder)?;
            folders.push(folder);
        }
        archive.file(name, true, content)?;
    }
    // Where a kernel looks that got no `rdinit=`, and where users of a shell in there do.
    archive.link("linuxrc", "init")?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_once_and_before_their_files() {
        let files = ["init", "m/1", "m/2"].map(|name| (name.to_owned(), b"x".to_vec()));
        let bytes = archive(&files).unwrap();
        let text = String::from_utf8_lossy(&bytes).replace('\0', ".");
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("init.") < at("m.0707") && at("m.0707") < at("m/1.") && at("m/1.") < at("m/2."));
        assert_eq!(archive(&files).unwrap(), bytes, "the same content gives the same bytes");
    }

    #[test]
    fn init_is_a_script_of_busybox() {
        assert!(INIT.starts_with(b"#!/bin/busybox sh\n"));
    }
}
