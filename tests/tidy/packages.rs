//! What the crates depend on, and what of: arrows, reasons, licences, sources.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use super::root;

/// Which crate (by folder) must not depend on which packages: arrows point from the root to pagecopy only.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("pagecopy", &["transport", "pageferry-transport", "vmm-shim", "pageferry-vmm-shim", "pageferry"]),
    ("transport", &["vmm-shim", "pageferry-vmm-shim", "pageferry"]),
    ("vmm-shim", &["transport", "pageferry-transport", "pageferry"]),
    (
        "tests/kit",
        &[
            "pagecopy",
            "pageferry-pagecopy",
            "transport",
            "pageferry-transport",
            "vmm-shim",
            "pageferry-vmm-shim",
            "pageferry",
        ],
    ),
];
/// What only tests may depend on, by either name.
const FOR_TESTS: &[&str] = &["testkit", "pageferry-testkit"];
/// Folders of packages that are tested, besides the root.
const TESTED: &[&str] = &["", "pagecopy", "transport", "vmm-shim", "benches"];
/// Licences of packages that say theirs in a file instead of their manifest: read there.
const LICENCES_IN_FILES: &[(&str, &str)] = &[("rdma-sys", "MIT")];
/// Packages of which Cargo.lock may have several versions, each with its reason. All but the newest cost only time to build.
const DUPLICATES: &[(&str, &str)] = &[
    ("bit-vec", "yasna, of rcgen, has 0.9"),
    ("bitflags", "vmm-sys-util (kvm-ioctls) and rdma-sys's bindgen have 1"),
    ("clap", "rdma-sys's bindgen, a build script of the feature rdma, has 2"),
    ("getrandom", "ring has 0.2"),
    ("linux-raw-sys", "of the two rustix"),
    ("rustix", "rdma-sys's bindgen, through which, has 0.38"),
    ("shlex", "rdma-sys's bindgen has 1"),
    ("strsim", "of the two clap"),
    ("syn", "derive macros of landlock's flags and of proptest's random numbers have 2"),
    ("unicode-width", "of the two clap"),
    ("windows-sys", "of the two rustix; never built on Linux"),
];
/// The only place that packages come from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

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

/// Dependencies outside of tests on what is for them alone.
fn beyond_tests(path: &str, manifest: &str) -> Vec<String> {
    let is_built = |header: &str| {
        header.ends_with("dependencies")
            && !["dev-dependencies", "workspace.dependencies"].iter().any(|tests| header.ends_with(tests))
    };
    let names = dependencies(manifest, is_built).into_iter();
    let wrong = names
        .filter(|(name, value)| FOR_TESTS.iter().any(|f| name == f || value.contains(&format!("\"{f}\""))));
    wrong.map(|(name, _)| format!("{path}: only tests may depend on {name}")).collect()
}

#[test]
fn only_tests_have_their_tools() {
    for folder in TESTED {
        let path = Path::new(folder).join("Cargo.toml");
        let manifest = fs::read_to_string(root().join(&path)).unwrap();
        assert!(manifest.contains("[dependencies]"));
        assert_eq!(beyond_tests(&path.display().to_string(), &manifest), Vec::<String>::new());
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

mod rules {
    use super::*;

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
        for (table, count) in [
            ("dev-dependencies", 0),
            ("workspace.dependencies", 0),
            ("target.'cfg(loom)'.dev-dependencies", 0),
            ("dependencies", 1),
            ("build-dependencies", 1),
            ("target.'cfg(unix)'.dependencies", 1),
        ] {
            let manifest = format!("[{table}]\ntestkit.workspace = true\n");
            assert_eq!(beyond_tests("Cargo.toml", &manifest).len(), count, "{table}");
        }
        let renamed = "[dependencies]\nkit = { package = \"pageferry-testkit\", path = \"tests/kit\" }\n";
        assert_eq!(beyond_tests("Cargo.toml", renamed).len(), 1);
        let manifest =
            "[workspace.dependencies]\na = \"1\"\nb = { path = \"b\" }\nc = \"2\"\n[profile.dev]\nd = 1\n";
        let design = "# D\n\n## Dependencies\n\n| `a`, a2 | why, c |\n\n## Other\n`c`\n";
        assert_eq!(unexplained(manifest, design).len(), 1);
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
}
