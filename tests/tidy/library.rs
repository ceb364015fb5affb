//! The command line uses the library as any VMM does: by what the root crate makes public.

use super::code::{code_of, words};
use super::{check, files};

/// The crates below the root's, which publishes what others may use of them.
const BELOW: &[&str] = &["transport", "pagecopy", "vmm_shim"];

fn is_command(path: &str) -> bool {
    path.ends_with(".rs") && (path.starts_with("src/cli/") || path == "src/main.rs")
}

/// Paths that do not lead through what the root crate makes public.
fn ways_around(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for (at, code) in code_of(text).iter().enumerate() {
        let mut before = "";
        for (word, after) in words(code) {
            let leads = after.starts_with("::");
            let around = leads && BELOW.contains(&word) && before != "pageferry";
            // From the crate's root there is another way to all that it knows.
            let inside = leads && word == "crate" && !after.starts_with("::cli");
            if around || inside {
                complaints
                    .push(format!("{path}:{}: {word}{after}: the command line uses pageferry::...", at + 1));
            }
            before = word;
        }
    }
    complaints
}

#[test]
fn the_command_line_uses_the_public_library() {
    assert!(files(is_command).len() > 20, "the command line is not found");
    check(is_command, ways_around);
}

/// Items of the root crate that are not for everybody: the command line is in it, and would see them.
fn hidden_items(path: &str, text: &str) -> Vec<String> {
    let code = code_of(text);
    let items = code.iter().enumerate().filter(|(_, code)| !code.starts_with(char::is_whitespace));
    let starts = ["pub use ", "pub mod ", "pub struct ", "extern crate self", "#[", "#![", "}", "{"];
    items
        .filter(|(_, code)| !code.trim().is_empty() && !starts.iter().any(|start| code.starts_with(start)))
        .map(|(at, code)| format!("{path}:{}: {}: the root crate has only public items", at + 1, code.trim()))
        .collect()
}

#[test]
fn the_root_crate_hides_nothing() {
    check(|path| path == "src/lib.rs", hidden_items);
}

#[test]
fn ways_around_are_found() {
    for (code, count) in [
        ("use pageferry::transport::uri::Uri;", 0),
        ("use transport::uri::Uri;", 1),
        ("let x = pagecopy::layout::PAGE_SIZE;", 1),
        ("use crate::cli::print;", 0),
        ("use crate::engine::explain;", 1),
        ("// transport::uri", 0),
        ("let transport = 5; use super::size;", 0),
    ] {
        assert_eq!(ways_around("src/cli/x.rs", code).len(), count, "{code}");
    }
    for (code, count) in [
        ("pub use a::b;\n#[cfg(x)]\npub mod cli;\n", 0),
        ("mod a;\n", 1),
        ("pub use a::{\n    b,\n};\n", 0),
        ("pub(crate) fn f() {\n}\n", 1),
        ("use a::b;\n", 1),
    ] {
        assert_eq!(hidden_items("src/lib.rs", code).len(), count, "{code}");
    }
}
