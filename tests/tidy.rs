//! Checks of the repository itself: layout of files, unsafe code, dependencies and their licences, links.
//!
//! Each rule is a function from text to complaints; a test applies it to every file, and another one shows that it complains.

#[path = "tidy/code.rs"]
mod code;
#[path = "tidy/lengths.rs"]
mod lengths;
#[path = "tidy/library.rs"]
mod library;
#[path = "tidy/modules.rs"]
mod modules;
#[path = "tidy/packages.rs"]
mod packages;

use std::fs;
use std::path::Path;

use code::{code_of, words};

/// Columns of a line. rustfmt keeps code to fewer; this is for what it leaves alone.
const COLUMNS_MAX: usize = 140;
/// Lines above an unsafe block in which its SAFETY comment must be.
const SAFETY_LINES: usize = 6;

/// Files that may have this many lines that are too wide.
const WIDE_LINES: &[(&str, usize)] = &[];
/// Names of the files in which unsafe code lives, besides those of a folder `sys`: system calls, mappings of guest memory, and
/// instructions chosen at run time.
const UNSAFE_NAMES: &[&str] = &["sys.rs", "guest_memory.rs", "simd.rs"];
/// Other files with unsafe code, each with its reason.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("vmm-shim/tests/common/mod.rs", "maps the memory of the guests under test"),
    ("vmm-shim/tests/foreign_kvm.rs", "gives a VM that is not ours its memory"),
    ("examples/embed.rs", "gives the example's VM its memory"),
];
/// Files that write to standard output and standard error, each with its reason.
const PRINTING_FILES: &[(&str, &str)] = &[("src/cli/print.rs", "the one place that prints")];
/// Files that look at the wall clock, which may be set back at any time, each with its reason. Nothing is decided by it.
const WALL_CLOCK_FILES: &[(&str, &str)] = &[
    ("src/cli/log.rs", "the time of a line"),
    ("transport/src/engine/source/save.rs", "when an archive was made, for people"),
    ("vmm-shim/src/vmm/clock.rs", "the guest's own clock goes on by it"),
    ("src/cli/keys/made.rs", "when certificates begin and end to be good"),
    ("src/cli/keys/shown.rs", "whether they are"),
    (
        "transport/src/socket/tls/files.rs",
        "tells a file from the one before it, by when each was changed: compared for equality alone",
    ),
];
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Paths of the repository's files from its root. Build products and fuzz corpora are left out.
fn paths() -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                if !["target", ".git", "corpus", "artifacts"].contains(&name.as_str()) {
                    folders.push(path);
                }
            } else {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no files found: the walk is broken");
    found
}

/// The wanted files, as `(path from the root, text)`.
fn files(wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let read = |path: &String| fs::read_to_string(root().join(path)).unwrap();
    paths().into_iter().filter(|path| wanted(path)).map(|path| (path.clone(), read(&path))).collect()
}

fn is_rust(path: &str) -> bool {
    path.ends_with(".rs")
}

fn is_text(path: &str) -> bool {
    let ends = [".rs", ".s", ".md", ".toml", ".sh", ".py", ".yml"];
    ends.iter().any(|end| path.ends_with(end)) || ["tests/run", ".ci/run", ".gitignore"].contains(&path)
}

/// Applies a rule to all wanted files.
fn check(wanted: fn(&str) -> bool, rule: fn(&str, &str) -> Vec<String>) {
    let complaints: Vec<_> = files(wanted).iter().flat_map(|(path, text)| rule(path, text)).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

fn shape(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if !text.starts_with("//!") {
        complaints.push(format!("{path}:1: the first line must say what the file is (//!)"));
    }
    // A string that is too long for its line is an error text or a literal, which is worse off when broken.
    let wide = |(line, code): &(&str, String)| line.chars().count() > COLUMNS_MAX && !code.contains('"');
    let code = code_of(text);
    let wide: Vec<_> = text.lines().zip(code).enumerate().filter(|(_, pair)| wide(pair)).collect();
    let allowed = WIDE_LINES.iter().find(|(file, _)| *file == path).map_or(0, |(_, count)| *count);
    if wide.len() > allowed {
        let lines: Vec<_> = wide.iter().map(|(at, _)| (at + 1).to_string()).collect();
        complaints.push(format!("{path}:{}: wider than {COLUMNS_MAX} columns", lines.join(",")));
    }
    complaints
}

#[test]
fn source_files_are_headed_and_of_bearable_width() {
    check(is_rust, shape);
}

fn leftovers(path: &str, text: &str) -> Vec<String> {
    let forbidden = ["todo!", "unimplemented!", "dbg!", "#[ignore"];
    let found = |code: &str| forbidden.into_iter().find(|&word| code.contains(word));
    let lines = code_of(text).into_iter().enumerate();
    lines
        .filter_map(|(at, code)| found(&code).map(|word| format!("{path}:{}: {word} must not stay", at + 1)))
        .collect()
}

#[test]
fn nothing_is_left_to_do() {
    check(is_rust, leftovers);
}

/// What panics, or waits, where nobody reads. Tests and examples may print; so may criterion's benches, which print themselves.
fn printing(path: &str, text: &str) -> Vec<String> {
    let is_test = path.split('/').any(|part| ["tests", "tests.rs", "examples"].contains(&part))
        || path.starts_with("benches/benches/");
    if is_test || PRINTING_FILES.iter().any(|(file, _)| *file == path) {
        return vec![];
    }
    let macros = ["println", "eprintln", "print", "eprint", "dbg"];
    let handles = ["io::stdout", "io::stderr", "stdout().lock", "stderr().lock"];
    let code = code_of(text);
    // Unit tests come last in a file.
    let code = code.iter().enumerate().take_while(|(_, code)| code.trim() != "#[cfg(test)]");
    let prints = |code: &str| {
        let found = words(code).find(|(word, after)| macros.contains(word) && after.starts_with('!'));
        let found = found.map(|(word, _)| word.to_owned() + "!");
        found.or_else(|| handles.into_iter().find(|&handle| code.contains(handle)).map(str::to_owned))
    };
    code.filter_map(|(at, code)| {
        prints(code)
            .map(|what| format!("{path}:{}: {what}: what is printed goes through src/cli/print.rs", at + 1))
    })
    .collect()
}

/// Looks at the wall clock, in code that is not a test's.
fn wall_clock(path: &str, text: &str) -> Vec<String> {
    let allowed = WALL_CLOCK_FILES.iter().any(|(file, _)| *file == path);
    let tests = path.split('/').any(|part| part == "tests") || path.ends_with("/tests.rs");
    if allowed || tests || !path.contains("src/") {
        return Vec::new();
    }
    let looks = |line: &str| line.contains("SystemTime") || line.contains("ClockId::Realtime");
    let lines = code_of(text);
    let at = lines.iter().position(|line| looks(line));
    at.map(|at| format!("{path}:{}: the wall clock, which may be set back: use Instant", at + 1))
        .into_iter()
        .collect()
}

#[test]
fn nothing_is_decided_by_a_clock_that_may_be_set_back() {
    check(is_rust, wall_clock);
    assert_eq!(wall_clock("src/a.rs", "let at = SystemTime::now();").len(), 1);
    assert!(wall_clock("src/a.rs", "// not by SystemTime").is_empty());
}

#[test]
fn one_place_prints() {
    check(is_rust, printing);
}

#[test]
fn printing_elsewhere_is_found() {
    for bad in [
        "println!(\"x\");",
        "Err(e) => eprintln!(\"{e}\"),",
        "print!()",
        "let x = dbg!(y);",
        "use std::io::stdout;",
        "std::io::stderr().write_all(b)",
    ] {
        assert_eq!(printing("src/a.rs", bad).len(), 1, "{bad}");
        for free in
            ["src/cli/print.rs", "tests/a.rs", "transport/tests/a.rs", "transport/src/simulation/tests.rs"]
        {
            assert_eq!(printing(free, bad), Vec::<String>::new(), "{free}: {bad}");
        }
        assert_eq!(
            printing("src/a.rs", &format!("fn a() {{}}\n#[cfg(test)]\nmod tests {{ {bad} }}")).len(),
            0
        );
    }
    for good in
        ["// println!(\"x\")", "\"println!\"", "writeln!(f)", "command.stdout(file)", "print::line(1)"]
    {
        assert_eq!(printing("src/a.rs", good), Vec::<String>::new(), "{good}");
    }
}

fn unsafe_code(path: &str, text: &str) -> Vec<String> {
    let name = path.rsplit('/').next().unwrap_or(path);
    let may = path.contains("/sys/")
        || UNSAFE_NAMES.contains(&name)
        || UNSAFE_FILES.iter().any(|(file, _)| *file == path);
    let lines: Vec<_> = text.lines().collect();
    let mut complaints = Vec::new();
    for (at, code) in code_of(text).iter().enumerate() {
        for (_, after) in words(code).filter(|(word, _)| *word == "unsafe") {
            if !may {
                complaints
                    .push(format!("{path}:{}: unsafe code belongs into a file of UNSAFE_FILES", at + 1));
            }
            let after = after.trim_start();
            let excused = |line: &&str| line.contains("SAFETY:");
            let block = after.starts_with('{') || after.starts_with("impl");
            if block && !lines[at.saturating_sub(SAFETY_LINES)..=at].iter().any(excused) {
                complaints
                    .push(format!("{path}:{}: no SAFETY comment in the {SAFETY_LINES} lines above", at + 1));
            }
        }
    }
    complaints
}

#[test]
fn unsafe_code_is_where_it_belongs_and_says_why_it_is_sound() {
    check(is_rust, unsafe_code);
}

#[test]
fn files_with_leave_exist() {
    let unsafe_files = UNSAFE_FILES.iter().map(|(file, _)| file);
    let others = WIDE_LINES.iter().map(|(file, _)| file).chain(PRINTING_FILES.iter().map(|(file, _)| file));
    for file in unsafe_files.chain(others) {
        assert!(
            root().join(file).is_file(),
            "{file} has leave for something, but is gone: take it off the list"
        );
    }
}

fn trailing_whitespace(path: &str, text: &str) -> Vec<String> {
    let mut complaints: Vec<_> = (text.lines().enumerate())
        .filter(|(_, line)| line.ends_with([' ', '\t', '\r']))
        .map(|(at, _)| format!("{path}:{}: white space at the end", at + 1))
        .collect();
    if !text.ends_with('\n') {
        complaints.push(format!("{path}: the last line has no end"));
    }
    complaints
}

#[test]
fn lines_end_where_their_text_ends() {
    check(is_text, trailing_whitespace);
}

/// Archives that are read for ever.
fn is_archive(path: &str) -> bool {
    path.starts_with("tests/archives/") && path.ends_with(".pferry")
}

#[test]
fn nothing_but_text_is_kept() {
    let mut binary = Vec::new();
    for path in paths().into_iter().filter(|path| !path.ends_with(".img") && !is_archive(path)) {
        if String::from_utf8(fs::read(root().join(&path)).unwrap()).is_err() {
            binary.push(path);
        }
    }
    assert!(binary.is_empty(), "not text, so it does not belong here: {binary:?}");
}

/// Links of a Markdown file to files that are not there.
fn dead_links(path: &str, text: &str, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let mut complaints = Vec::new();
    let mut fenced = false;
    for (at, line) in text.lines().enumerate() {
        fenced ^= line.trim_start().starts_with("```");
        if fenced {
            continue;
        }
        for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split(['#', ' ']).next().unwrap_or(link);
            let elsewhere = file.contains("://") || file.starts_with("mailto:");
            if !file.is_empty() && !elsewhere && !exists(&folder.join(file)) {
                complaints.push(format!("{path}:{}: {file} does not exist", at + 1));
            }
        }
    }
    complaints
}

#[test]
fn links_lead_somewhere() {
    let exists = |file: &Path| root().join(file).exists();
    let complaints: Vec<_> = (files(|path| path.ends_with(".md")).iter())
        .flat_map(|(path, text)| dead_links(path, text, exists))
        .collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// Comparisons of an `Option` with `Some(...)`: what is missing is less than anything, and passes for it.
fn missing_passes(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for (at, code) in code_of(text).iter().enumerate() {
        let compares = ["< Some(", "<= Some(", "> Some(", ">= Some("].iter().any(|sign| {
            code.match_indices(sign).any(|(found, _)| !code[..found].ends_with(['=', '-', '<', '>']))
        });
        if compares || code.contains(").lt(&Some(") {
            complaints.push(format!("{path}:{}: None is less than Some(x): use is_some_and", at + 1));
        }
    }
    complaints
}

#[test]
fn what_is_missing_is_not_compared() {
    check(is_rust, missing_passes);
}

/// Fuzz targets without a program, a corpus, a body, or a unit test that replays it.
fn unproven(manifest: &str, exists: impl Fn(&str) -> bool, sources: &str) -> Vec<String> {
    let names =
        manifest.split("[[bin]]").skip(1).filter_map(|bin| bin.split("name = \"").nth(1)?.split('"').next());
    let mut complaints = Vec::new();
    for name in names {
        for file in [format!("tests/fuzz/fuzz_targets/{name}.rs"), format!("tests/fuzz/corpus/{name}")] {
            if !exists(&file) {
                complaints.push(format!("tests/fuzz/Cargo.toml: {name} has no {file}"));
            }
        }
        if !sources.contains(&format!("pub fn {name}(bytes: &[u8])"))
            || !sources.contains(&format!("replay(\"{name}\", "))
        {
            complaints.push(format!("tests/fuzz/Cargo.toml: {name} has no body that a unit test replays"));
        }
    }
    complaints
}

#[test]
fn every_fuzz_target_has_a_unit_test() {
    let manifest = fs::read_to_string(root().join("tests/fuzz/Cargo.toml")).unwrap();
    let sources: String = files(|path| path.ends_with("src/fuzz.rs") || path.ends_with("cli/fuzz.rs"))
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    let programs = paths().iter().filter(|path| path.starts_with("tests/fuzz/fuzz_targets/")).count();
    assert_eq!(manifest.matches("[[bin]]").count(), programs, "tests/fuzz/Cargo.toml lacks a target");
    let exists = |file: &str| root().join(file).exists();
    assert_eq!(unproven(&manifest, exists, &sources), Vec::<String>::new());
}

/// The rules complain about what they are there for, and about nothing else.
mod rules {
    use super::*;

    #[test]
    fn shapes() {
        assert_eq!(shape("a.rs", "//! A.\n"), Vec::<String>::new());
        assert_eq!(shape("a.rs", "use b;\n").len(), 1);
        let wide = "x".repeat(COLUMNS_MAX + 1);
        assert_eq!(shape("a.rs", &format!("//! A.\n// {wide}\n")).len(), 1);
        assert_eq!(shape("a.rs", &format!("//! A.\nf(\"{wide}\");\n")).len(), 0);
    }

    #[test]
    fn leftover_marks() {
        for bad in ["todo!()", "dbg!(x)", "unimplemented!(\"y\")", "#[ignore]", "#[ignore = \"slow\"]"] {
            assert_eq!(leftovers("a.rs", bad).len(), 1, "{bad}");
        }
        assert_eq!(leftovers("a.rs", "// todo!()\nlet s = \"dbg!\";"), Vec::<String>::new());
    }

    #[test]
    fn unsafe_marks() {
        let good = "// SAFETY: it is.\nunsafe { f() }\n";
        assert_eq!(unsafe_code("x/sys.rs", good), Vec::<String>::new());
        assert_eq!(unsafe_code("x/sys/part.rs", good), Vec::<String>::new());
        assert_eq!(unsafe_code("x/other.rs", good).len(), 1);
        assert_eq!(unsafe_code("x/sys.rs", "unsafe { f() }\n").len(), 1);
        assert_eq!(unsafe_code("x/sys.rs", "unsafe impl Send for X {}\n").len(), 1);
        let far = format!("// SAFETY: too far.\n{}unsafe {{ f() }}\n", "\n".repeat(SAFETY_LINES));
        assert_eq!(unsafe_code("x/sys.rs", &far).len(), 1);
        assert_eq!(unsafe_code("x/lib.rs", "#![deny(unsafe_code)]\n// unsafe {\n"), Vec::<String>::new());
    }

    #[test]
    fn white_space() {
        assert_eq!(trailing_whitespace("a", "b\nc\n"), Vec::<String>::new());
        assert_eq!(trailing_whitespace("a", "b \nc\t\nd").len(), 3);
    }

    #[test]
    fn links() {
        let exists = |file: &Path| file == Path::new("docs/there.md");
        let text = "[a](there.md#x) [b](https://x.org) [c](#here)\n```\n[d](code)\n```\n";
        assert_eq!(dead_links("docs/a.md", text, exists), Vec::<String>::new());
        assert_eq!(dead_links("docs/a.md", "[a](gone.md), [b](there.md)\n", exists).len(), 1);
    }

    #[test]
    fn comparisons_with_what_is_missing() {
        for bad in ["x < Some(1)", "x.y() <= Some(1)", "assert!(x > Some(1))", "x >= Some(y)"] {
            assert_eq!(missing_passes("a.rs", bad).len(), 1, "{bad}");
        }
        for good in [
            "x => Some(1)",
            "x == Some(1)",
            "f::<u8>() -> Some(x)",
            "x.is_some_and(|n| n < 1)",
            "// < Some(1)",
        ] {
            assert_eq!(missing_passes("a.rs", good), Vec::<String>::new(), "{good}");
        }
    }

    #[test]
    fn fuzz_targets() {
        let manifest = "[[bin]]\nname = \"a\"\n";
        let sources = "pub fn a(bytes: &[u8]) {}\nreplay(\"a\", 1, a);";
        assert_eq!(unproven(manifest, |_| true, sources), Vec::<String>::new());
        assert_eq!(unproven(manifest, |_| false, sources).len(), 2);
        assert_eq!(unproven(manifest, |_| true, "replay(\"a\", 1, a)").len(), 1);
        assert_eq!(unproven(manifest, |_| true, "pub fn a(bytes: &[u8]) {}").len(), 1);
    }
}
