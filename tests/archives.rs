//! Archives of every version that was ever written are read for ever: `tests/archives/` has some of each, and nobody writes them anew.

#[path = "live/vm.rs"]
#[allow(dead_code, reason = "for tests/live.rs, which shares this file")]
mod vm;

use std::path::{Path, PathBuf};

use pageferry::vmm_shim::uffd_missing::check;
use testkit::PATIENCE;
use vm::{Spec, Vm, World, pageferry};

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/archives").join(name)
}

/// Name of an archive of memory, and what `xxhsum -H128` says of the RAM file.
const MEMORY: &[(&str, &str)] = &[
    ("v1-memory.pferry", "dd42960af3a858a2ce5cfc0b6dc5d01e"),
    // Written past the page cache, in blocks with pads.
    ("v1-padded.pferry", "dd42960af3a858a2ce5cfc0b6dc5d01e"),
    // Of another state of the memory: it stands on the first.
    ("v1-difference.pferry", "5a825367774147a090d93f3462d73eec"),
];

#[test]
fn memory_that_was_saved_by_older_releases_is_loaded() {
    for (name, digest) in MEMORY {
        let path = kept(name);
        let mut uris = vec![format!("file:{}", path.display())];
        if !name.contains("difference") {
            uris.push(format!("exec:cat {}", path.display()));
        }
        for uri in uris {
            let ended = pageferry(&["recv", &uri, "--anon", "--digest", "--json"], PATIENCE);
            assert_eq!(ended.code, Some(0), "{uri}: {ended:?}");
            assert_eq!(ended.json()["digest"], *digest, "{uri}");
        }
    }
}

#[test]
fn guests_that_were_saved_by_older_releases_go_on() {
    let spec = Spec { mem_mib: 16, working_set: 256 << 10, rate: 2000, kvm: false, ..Spec::counter() };
    let serial = std::fs::read(kept("v1-guest.serial")).unwrap();
    for more in [&[][..], &["--on-demand"]] {
        if !more.is_empty() && check().is_err() {
            println!(
                "skipped on demand: this process may not have a userfaultfd that sees faults of the kernel"
            );
            continue;
        }
        let world = World::new();
        let uri = format!("file:{}", kept("v1-guest.pferry").display());
        let loaded = Vm::start(&world, "a", &spec.clone().with(more), Some(&uri));
        loaded.wait_state("running");
        vm::prove_after(&spec, &[&serial], &loaded);
    }
}
