//! What guest memory is made of, on the command line.

use std::path::PathBuf;

use pageferry::vmm_shim::guest_memory::Backing;

/// Reads `anon`, `anon4k`, `memfd`, `hugetlb` or `file:PATH`.
pub(super) fn parse(memory: &str) -> Result<Backing, String> {
    Ok(match memory {
        "anon" => Backing::Anonymous { huge: true },
        "anon4k" => Backing::Anonymous { huge: false },
        "memfd" => Backing::Memfd,
        "hugetlb" => Backing::MemfdHuge,
        other => match file(other) {
            Some(path) => Backing::File { path, create: true },
            None => {
                return Err(format!("--memory {other}: use anon, anon4k, memfd, hugetlb or file:PATH"));
            }
        },
    })
}

/// The file's path of `file:PATH`.
fn file(memory: &str) -> Option<PathBuf> {
    memory.strip_prefix("file:").filter(|path| !path.is_empty()).map(PathBuf::from)
}
