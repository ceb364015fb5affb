//! Checks of the repository itself: layout of files, unsafe code, dependencies and their licences, links.
//!
//! Each rule is a function from text to complaints; a test applies it to every file, and another one shows that it complains.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Lines of a source file; past that it should be two.
const LINES_MAX: usize = 900;
/// Columns of a line. rustfmt keeps code to fewer; this is for what it leaves alone.
const COLUMNS_MAX: usize = 140;
/// Lines above an unsafe block in which its SAFETY comment must be.
const SAFETY_LINES: usize = 6;

/// Files that may be longer, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];
/// Files that may have this many lines that are too wide.
const WIDE_LINES: &[(&str, usize)] = &[];
/// Names of the files in which unsafe code lives: system calls, mappings of guest memory, and instructions chosen at run time.
const UNSAFE_NAMES: &[&str] = &["sys.rs", "guest_memory.rs", "simd.rs"];
/// Other files with unsafe code, each with its reason.
const UNSAFE_FILES: &[(&str, &str)] =
    &[("vmm-shim/tests/common/mod.rs", "maps the memory of the guests under test")];
/// Files that write to standard output and standard error, each with its reason.
const PRINTING_FILES: &[(&str, &str)] = &[("src/print.rs", "the one place that prints")];
/// Which crate (by folder) must not depend on which packages: arrows point from the root to pagecopy only.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("pagecopy", &["transport", "pageferry-transport", "vmm-shim", "pageferry-vmm-shim", "pageferry"]),
    ("transport", &["vmm-shim", "pageferry-vmm-shim", "pageferry"]),
    ("vmm-shim", &["transport", "pageferry-transport", "pageferry"]),
];
/// Licences of packages that say theirs in a file instead of their manifest: read there.
const LICENCES_IN_FILES: &[(&str, &str)] = &[("rdma-sys", "MIT")];
/// Packages of which Cargo.lock may have several versions, each with its reason. All but the newest cost only time to build.
const DUPLICATES: &[(&str, &str)] = &[
    ("bitflags", "vmm-sys-util (kvm-ioctls) and rdma-sys's bindgen have 1"),
    ("clap", "rdma-sys's bindgen, a build script of the feature rdma, has 2"),
    ("linux-raw-sys", "of the two rustix"),
    ("rustix", "rdma-sys's bindgen, through which, has 0.38"),
    ("shlex", "rdma-sys's bindgen has 1"),
    ("strsim", "of the two clap"),
    ("syn", "a derive macro of proptest's random numbers has 2"),
    ("unicode-width", "of the two clap"),
    ("windows-sys", "of the two rustix; never built on Linux"),
];
/// The only place that packages come from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

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

/// What the scanner of [`code_of`] is in.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Code,
    Block,
    Text,
    /// A raw string with this many `#`.
    Raw(usize),
}

/// The lines of Rust code with comments and the content of strings and character literals blanked out.
fn code_of(text: &str) -> Vec<String> {
    let mut place = Place::Code;
    text.lines().map(|line| code_of_line(line, &mut place)).collect()
}

fn code_of_line(line: &str, place: &mut Place) -> String {
    let mut code = String::new();
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        let mut taken = c.len_utf8();
        let word_before = code.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        match *place {
            Place::Code if rest.starts_with("//") => break,
            Place::Code if rest.starts_with("/*") => (*place, taken) = (Place::Block, 2),
            Place::Code if raw_start(rest).is_some() && !word_before => {
                let hashes = raw_start(rest).unwrap_or(0);
                (*place, taken) = (Place::Raw(hashes), rest.find('"').unwrap_or(0) + 1);
                code.push('"');
            }
            Place::Code if c == '"' => {
                *place = Place::Text;
                code.push('"');
            }
            Place::Code if char_literal(rest).is_some() => taken = char_literal(rest).unwrap_or(1),
            Place::Code => code.push(c),
            Place::Block if rest.starts_with("*/") => (*place, taken) = (Place::Code, 2),
            Place::Text if c == '\\' => taken += rest[1..].chars().next().map_or(0, char::len_utf8),
            Place::Text if c == '"' => {
                *place = Place::Code;
                code.push('"');
            }
            Place::Raw(hashes) if rest.starts_with(&format!("\"{}", "#".repeat(hashes))) => {
                (*place, taken) = (Place::Code, 1 + hashes);
                code.push('"');
            }
            Place::Block | Place::Text | Place::Raw(_) => {}
        }
        rest = &rest[taken..];
    }
    code
}

/// The number of `#` of the raw string that starts here.
fn raw_start(rest: &str) -> Option<usize> {
    let inside = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let after = inside.trim_start_matches('#');
    after.starts_with('"').then(|| inside.len() - after.len())
}

/// The length of the character literal that starts here; a lifetime is none.
fn char_literal(rest: &str) -> Option<usize> {
    let inside = rest.strip_prefix('\'')?;
    let first = inside.chars().next()?;
    if first == '\\' {
        // The character after the backslash may be a quote.
        return inside.get(2..)?.find('\'').map(|end| end + 4);
    }
    inside[first.len_utf8()..].starts_with('\'').then(|| first.len_utf8() + 2)
}

/// The words of a line of code, each with what follows it.
fn words(code: &str) -> impl Iterator<Item = (&str, &str)> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = code;
    std::iter::from_fn(move || {
        rest = &rest[rest.find(is_word)?..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        Some((word, after))
    })
}

fn shape(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if !text.starts_with("//!") {
        complaints.push(format!("{path}:1: the first line must say what the file is (//!)"));
    }
    let lines = text.lines().count();
    if lines > LINES_MAX && !LONG_FILES.iter().any(|(file, _)| *file == path) {
        complaints.push(format!("{path}: {lines} lines; more than {LINES_MAX} take a reason in LONG_FILES"));
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
fn source_files_are_headed_and_of_bearable_size() {
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

/// What panics, or waits, where nobody reads. Tests may print; so may criterion's benches, which print themselves.
fn printing(path: &str, text: &str) -> Vec<String> {
    let is_test = path.split('/').any(|part| ["tests", "tests.rs"].contains(&part))
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
            .map(|what| format!("{path}:{}: {what}: what is printed goes through src/print.rs", at + 1))
    })
    .collect()
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
            ["src/print.rs", "tests/a.rs", "transport/tests/a.rs", "transport/src/simulation/tests.rs"]
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
    let may = UNSAFE_NAMES.contains(&name) || UNSAFE_FILES.iter().any(|(file, _)| *file == path);
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
    let others = LONG_FILES.iter().map(|(file, _)| file).chain(WIDE_LINES.iter().map(|(file, _)| file));
    let others = others.chain(PRINTING_FILES.iter().map(|(file, _)| file));
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

#[test]
fn nothing_but_text_is_kept() {
    let mut binary = Vec::new();
    for path in paths().into_iter().filter(|path| !path.ends_with(".img")) {
        if String::from_utf8(fs::read(root().join(&path)).unwrap()).is_err() {
            binary.push(path);
        }
    }
    assert!(binary.is_empty(), "not text, so it does not belong here: {binary:?}");
}

/// The names in the dependency tables of a Cargo.toml whose header satisfies `wanted`.
fn dependencies(manifest: &str, wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut within = false;
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            within = wanted(header);
            // [dependencies.NAME] is a table of its own.
            if let Some((table, name)) = header.rsplit_once('.')
                && wanted(table)
            {
                found.push((name.to_owned(), String::new()));
            }
        } else if within && let Some((key, value)) = line.split_once('=') {
            let name = key.trim().split('.').next().unwrap_or(key).trim_matches('"');
            found.push((name.to_owned(), value.to_owned()));
        }
    }
    found
}

fn arrows(folder: &str, manifest: &str) -> Vec<String> {
    let Some((_, forbidden)) = FORBIDDEN.iter().find(|(name, _)| *name == folder) else { return vec![] };
    let names = dependencies(manifest, |header| header.ends_with("dependencies"));
    let wrong = names
        .iter()
        .filter(|(name, value)| forbidden.iter().any(|f| name == f || value.contains(&format!("\"{f}\""))));
    wrong.map(|(name, _)| format!("{folder}/Cargo.toml: {folder} must not depend on {name}")).collect()
}

#[test]
fn crates_depend_one_way() {
    for (folder, _) in FORBIDDEN {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[dependencies]"));
        assert_eq!(arrows(folder, &manifest), Vec::<String>::new());
    }
}

/// Workspace dependencies that the design's table does not name.
fn unexplained(manifest: &str, design: &str) -> Vec<String> {
    let Some((_, section)) = design.split_once("\n## Dependencies\n") else { return vec![] };
    let section = section.split("\n## ").next().unwrap_or(section);
    // The first cell of a row names one crate or several.
    let cells = section.lines().filter_map(|line| line.strip_prefix('|')?.split('|').next());
    let named: Vec<&str> =
        cells.flat_map(|cell| cell.split(',').map(|name| name.trim().trim_matches('`'))).collect();
    let all = dependencies(manifest, |header| header == "workspace.dependencies");
    let foreign = all.into_iter().filter(|(_, value)| !value.contains("path ="));
    let missing = foreign.filter(|(name, _)| !named.contains(&name.as_str()));
    missing.map(|(name, _)| format!("docs/design.md: the table of dependencies lacks `{name}`")).collect()
}

#[test]
fn every_dependency_is_explained() {
    let Ok(design) = fs::read_to_string(root().join("docs/design.md")) else {
        return println!("skipped: there is no docs/design.md");
    };
    if !design.contains("\n## Dependencies\n") {
        return println!("skipped: docs/design.md has no section about dependencies");
    }
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert_eq!(unexplained(&manifest, &design), Vec::<String>::new());
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

/// Whether an SPDX expression can be satisfied with `allowed` licences. `/` is an old way to write OR.
fn licence_allowed(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = tokens.as_slice();
    any_of(&mut rest, allowed) && rest.is_empty()
}

fn any_of(rest: &mut &[&str], allowed: &[String]) -> bool {
    let mut result = all_of(rest, allowed);
    while rest.first() == Some(&"OR") {
        *rest = &rest[1..];
        result |= all_of(rest, allowed);
    }
    result
}

fn all_of(rest: &mut &[&str], allowed: &[String]) -> bool {
    let mut result = one(rest, allowed);
    while rest.first() == Some(&"AND") {
        *rest = &rest[1..];
        result &= one(rest, allowed);
    }
    result
}

fn one(rest: &mut &[&str], allowed: &[String]) -> bool {
    let Some((first, after)) = rest.split_first() else { return false };
    *rest = after;
    if *first == "(" {
        let result = any_of(rest, allowed);
        let closed = rest.first() == Some(&")");
        *rest = rest.get(1..).unwrap_or_default();
        return result && closed;
    }
    let mut licence = (*first).to_owned();
    if let ["WITH", exception, after @ ..] = *rest {
        licence = format!("{licence} WITH {exception}");
        *rest = after;
    }
    allowed.contains(&licence)
}

/// The strings of the array `name` of a TOML file.
fn array(toml: &str, name: &str) -> Vec<String> {
    let start = format!("\n{name} = [");
    let Some((_, rest)) = toml.split_once(&start) else { return vec![] };
    let inside = rest.split(']').next().unwrap_or(rest);
    inside.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// What is wrong with a package of `cargo metadata`.
fn package(package: &serde_json::Value, allowed: &[String]) -> Option<String> {
    let name = &package["name"];
    if let Some(source) = package["source"].as_str().filter(|source| *source != REGISTRY) {
        return Some(format!("{name} comes from {source}; crates.io is the only source allowed"));
    }
    let in_file = LICENCES_IN_FILES.iter().find(|(known, _)| *name == *known).map(|(_, licence)| *licence);
    let licence = package["license"].as_str().or(in_file).unwrap_or("(none)");
    let wrong = !licence_allowed(licence, allowed);
    wrong.then(|| format!("{name} has licence {licence}, which deny.toml does not allow"))
}

#[test]
fn dependencies_have_allowed_licences_and_sources() {
    let allowed = array(&fs::read_to_string(root().join("deny.toml")).unwrap(), "allow");
    assert!(allowed.contains(&"Apache-2.0".to_owned()), "deny.toml is not read rightly: {allowed:?}");
    let cargo = env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from);
    let platform = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    // Only this platform's packages are sure to be at hand without a network.
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform", &platform])
        .current_dir(root())
        .output()
        .unwrap();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return println!(
            "skipped: the packages are not all at hand: {}",
            why.lines().next().unwrap_or_default()
        );
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 20, "only {} packages", packages.len());
    let wrong: Vec<_> = packages.iter().filter_map(|p| package(p, &allowed)).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// The values of a field of a Cargo.lock's packages, one a package; empty where a package has none.
fn locked<'a>(lock: &'a str, field: &str) -> Vec<&'a str> {
    let start = format!("{field} = \"");
    let of = |package: &'a str| {
        let line = package.lines().find_map(|line| line.strip_prefix(start.as_str()));
        line.map_or("", |value| value.trim_end_matches('"'))
    };
    lock.split("[[package]]").skip(1).map(of).collect()
}

/// Packages of a Cargo.lock that are there in several versions without leave, come from elsewhere, or may be replaced by others.
fn lock(path: &str, text: &str, leave: &[(&str, &str)]) -> Vec<String> {
    let (names, sources) = (locked(text, "name"), locked(text, "source"));
    let (versions, checksums) = (locked(text, "version"), locked(text, "checksum"));
    let mut complaints = Vec::new();
    for (at, name) in names.iter().enumerate() {
        // Those of this workspace come by their path, and have neither.
        if !sources[at].is_empty() && (sources[at] != REGISTRY || checksums[at].is_empty()) {
            complaints.push(format!("{path}: {name} comes from {}, or has no checksum", sources[at]));
        }
        let first = names.iter().position(|other| other == name) == Some(at);
        let all: Vec<_> =
            (names.iter().zip(&versions)).filter(|(n, _)| *n == name).map(|(_, v)| *v).collect();
        if first && all.len() > 1 && !leave.iter().any(|(known, _)| known == name) {
            complaints
                .push(format!("{path}: {name} is there as {}; DUPLICATES lacks a reason", all.join(" and ")));
        }
    }
    for (name, _) in leave.iter().filter(|(known, _)| names.iter().filter(|name| name == &known).count() < 2)
    {
        complaints.push(format!("{path}: {name} is there once: take it off DUPLICATES"));
    }
    complaints
}

#[test]
fn locked_packages_are_there_once_and_from_the_registry() {
    let text = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let ours = text("Cargo.lock");
    assert!(locked(&ours, "name").len() > 20, "Cargo.lock is not read rightly");
    assert_eq!(lock("Cargo.lock", &ours, DUPLICATES), Vec::<String>::new());
    // The fuzzers' is of the same packages, and its duplicates nobody ships.
    let fuzz = text("tests/fuzz/Cargo.lock");
    let wrong: Vec<_> = lock("tests/fuzz/Cargo.lock", &fuzz, &[]);
    assert_eq!(
        wrong.into_iter().filter(|w| !w.contains("DUPLICATES")).collect::<Vec<_>>(),
        Vec::<String>::new()
    );
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
    fn code_is_told_from_comments_and_strings() {
        let code = |text| code_of(text).join("\n");
        assert_eq!(code("a // b"), "a ");
        assert_eq!(code("a /* b\nc */ d"), "a \n d");
        assert_eq!(code(r#"f("x\"//y", 'z', '"', '\'') // "#), r#"f("", , , ) "#);
        assert_eq!(code("r#\"a \" b\"# c\nd"), "\"\" c\nd");
        assert_eq!(code("\"a\nb\" c"), "\"\n\" c");
        assert_eq!(code("fn f<'a>(x: &'a str)"), "fn f<'a>(x: &'a str)");
        assert_eq!(code("for\"x\""), "for\"\"");
    }

    #[test]
    fn shapes() {
        assert_eq!(shape("a.rs", "//! A.\n"), Vec::<String>::new());
        assert_eq!(shape("a.rs", "use b;\n").len(), 1);
        let long = format!("//! A.\n{}", "\n".repeat(LINES_MAX));
        assert_eq!(shape("a.rs", &long).len(), 1);
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
    fn dependency_tables() {
        assert_eq!(arrows("pagecopy", "[dependencies]\nthiserror = \"2\"\n"), Vec::<String>::new());
        for bad in [
            "[dependencies]\ntransport.workspace = true\n",
            "[dev-dependencies]\npageferry-vmm-shim = { path = \"../vmm-shim\" }\n",
            "[dependencies]\nt = { package = \"pageferry-transport\", path = \"../transport\" }\n",
            "[target.'cfg(unix)'.dependencies]\ntransport = { workspace = true }\n",
            "[dependencies.transport]\nworkspace = true\n",
        ] {
            assert_eq!(arrows("pagecopy", bad).len(), 1, "{bad}");
        }
        let manifest =
            "[workspace.dependencies]\na = \"1\"\nb = { path = \"b\" }\nc = \"2\"\n[profile.dev]\nd = 1\n";
        let design = "# D\n\n## Dependencies\n\n| `a`, a2 | why, c |\n\n## Other\n`c`\n";
        assert_eq!(unexplained(manifest, design).len(), 1);
    }

    #[test]
    fn links() {
        let exists = |file: &Path| file == Path::new("docs/there.md");
        let text = "[a](there.md#x) [b](https://x.org) [c](#here)\n```\n[d](code)\n```\n";
        assert_eq!(dead_links("docs/a.md", text, exists), Vec::<String>::new());
        assert_eq!(dead_links("docs/a.md", "[a](gone.md), [b](there.md)\n", exists).len(), 1);
    }

    #[test]
    fn licences() {
        let allowed =
            ["MIT", "Apache-2.0", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        for (expression, good) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("GPL-3.0 OR MIT", true),
            ("Unlicense/MIT", true),
            ("MIT AND GPL-3.0", false),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
            ("(MIT OR Apache-2.0) AND Zlib", false),
            ("Apache-2.0 WITH LLVM-exception OR X", true),
            ("Apache-2.0 WITH Other", false),
            ("", false),
            ("(MIT", false),
        ] {
            assert_eq!(licence_allowed(expression, &allowed), good, "{expression}");
        }
        assert_eq!(array("\nallow = [\n  \"A\",\n  \"B\",\n]\n", "allow"), ["A", "B"]);
        let json = |text: &str| serde_json::from_str(text).unwrap();
        assert_eq!(package(&json(r#"{"name": "a", "source": null, "license": "MIT"}"#), &allowed), None);
        assert!(
            package(&json(r#"{"name": "a", "source": "git+https://x", "license": "MIT"}"#), &allowed)
                .is_some()
        );
        assert!(package(&json(r#"{"name": "a", "source": null, "license": null}"#), &allowed).is_some());
    }

    #[test]
    fn locks() {
        let package = |name: &str, version: &str, source: &str| {
            format!(
                "[[package]]\nname = \"{name}\"\nversion = \"{version}\"\nsource = \"{source}\"\nchecksum = \"1\"\n\n"
            )
        };
        let one = package("a", "1", REGISTRY);
        let two = one.clone() + &package("b", "1", REGISTRY) + &package("a", "2", REGISTRY);
        assert_eq!(lock("l", &one, &[]), Vec::<String>::new());
        assert_eq!(lock("l", &two, &[]), ["l: a is there as 1 and 2; DUPLICATES lacks a reason"]);
        assert_eq!(lock("l", &two, &[("a", "why")]), Vec::<String>::new());
        assert_eq!(lock("l", &one, &[("a", "why")]), ["l: a is there once: take it off DUPLICATES"]);
        assert_eq!(lock("l", &package("a", "1", "git+https://x"), &[]).len(), 1);
        assert_eq!(lock("l", &one.replace("checksum", "other"), &[]).len(), 1);
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
