//! The library as a VMM outside this workspace gets it: without the command line and what that depends on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Packages of the command line. Who embeds the library builds none of them.
const COMMAND_LINE: &[&str] = &["clap", "indicatif", "plotters", "nix", "tracing-subscriber"];

/// A crate of its own that depends on the library alone.
struct Embedder {
    folder: tempfile::TempDir,
}

impl Embedder {
    fn new(main: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let manifest = format!(
            "[package]\nname = \"embedder\"\nedition = \"2024\"\n\n[dependencies]\n\
             pageferry = {{ path = {root:?}, default-features = false }}\n\n[workspace]\n"
        );
        fs::write(folder.path().join("Cargo.toml"), manifest).unwrap();
        // The versions that are at hand.
        fs::copy(root.join("Cargo.lock"), folder.path().join("Cargo.lock")).unwrap();
        fs::create_dir(folder.path().join("src")).unwrap();
        fs::write(folder.path().join("src/main.rs"), main).unwrap();
        Self { folder }
    }

    /// Runs cargo there; what it printed, or what it complained of.
    fn cargo(&self, args: &[&str]) -> Result<String, String> {
        let cargo = env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from);
        let output = Command::new(cargo)
            .args(args)
            .arg("--offline")
            .current_dir(self.folder.path())
            // What is built stays for the next time.
            .env("CARGO_TARGET_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("embedder"))
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}

#[test]
fn the_library_comes_without_the_command_line() {
    let embedder = Embedder::new("fn main() {}\n");
    let tree = embedder.cargo(&["tree", "--prefix=none", "--edges=normal,build", "--format={p}"]);
    let tree = tree.unwrap_or_else(|complaint| panic!("{complaint}"));
    let names: Vec<_> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.contains(&"pageferry") && names.contains(&"pageferry-transport"), "{tree}");
    let found: Vec<_> = COMMAND_LINE.iter().filter(|name| names.contains(name)).collect();
    assert!(found.is_empty(), "{found:?} in\n{tree}");
}

/// README's library section, as whoever reads it would try it.
#[test]
fn the_readme_moves_a_guest_in_a_crate_outside_the_workspace() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let program = readme.split_once("```rust\n").and_then(|(_, rest)| rest.split_once("```"));
    let embedder = Embedder::new(program.expect("README.md has a program").0);
    let printed = embedder.cargo(&["run", "--quiet"]).unwrap_or_else(|complaint| panic!("{complaint}"));
    assert!(printed.contains("the guest ran nowhere for "), "{printed}");
}
