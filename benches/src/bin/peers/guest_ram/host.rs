//! What a host prepares for its guest: the programs for that, and what it has to work on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pageferry::measure::process::program;

/// The host's folders whose files are real data of many kinds.
const FOLDERS: [&str; 3] = ["/usr/share", "/usr/include", "/usr/lib"];

/// Where a program is, or which Debian package has it.
pub(super) fn tool(name: &str, package: &str) -> Result<PathBuf, String> {
    let missing = || format!("there is no {name}: install it (Debian, as root: apt-get install {package})");
    program(name).ok_or_else(missing)
}

/// Runs a program to its end, with `input` as its standard input.
pub(super) fn run(command: &mut Command, input: Option<File>) -> Result<(), String> {
    let name = command.get_program().display().to_string();
    command.stdin(input.map_or_else(Stdio::null, Stdio::from)).stderr(Stdio::piped());
    let output = command.output().map_err(|e| format!("{name} cannot be started: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{name} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

/// Adds what went wrong with a file to its error.
pub(super) fn at(path: &Path) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// The host's files, folder by folder in the order of their names, until `each` has had enough of them and returns false.
pub(super) fn files(each: &mut dyn FnMut(&Path) -> Result<bool, String>) -> Result<(), String> {
    for folder in FOLDERS {
        if !walk(Path::new(folder), each)? {
            break;
        }
    }
    Ok(())
}

/// The same of one folder; false if `each` had enough.
pub(super) fn walk(
    folder: &Path,
    each: &mut dyn FnMut(&Path) -> Result<bool, String>,
) -> Result<bool, String> {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(kind) = entry.file_type() else { continue };
        let more = if kind.is_dir() {
            walk(&entry.path(), each)?
        } else if kind.is_file() {
            each(&entry.path())?
        } else {
            true
        };
        if !more {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_package() {
        let error = tool("no-such-program", "some-package").unwrap_err();
        assert!(
            error.starts_with("there is no no-such-program") && error.ends_with("install some-package)"),
            "{error}"
        );
        assert!(tool("sh", "dash").is_ok());
    }

    #[test]
    fn programs_that_fail_say_why() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"]), None).unwrap_err();
        assert!(error.contains("3") && error.ends_with("broken"), "{error}");
        assert_eq!(run(&mut Command::new("true"), None), Ok(()));
    }

    #[test]
    fn files_come_by_name_until_it_is_enough() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("b")).unwrap();
        for name in ["c", "a", "b/d"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        let seen = |enough: usize| {
            let mut names = Vec::new();
            let more = walk(folder.path(), &mut |path: &Path| {
                names.push(path.strip_prefix(folder.path()).unwrap().display().to_string());
                Ok(names.len() < enough)
            });
            (names.join(" "), more.unwrap())
        };
        assert_eq!(seen(9), ("a b/d c".into(), true));
        assert_eq!(seen(2), ("a b/d".into(), false));
    }
}
