//! Modules that know each other in a circle.

use std::collections::{BTreeMap, BTreeSet};

use super::code::{code_of, words};
use super::{files, is_rust};

/// Folders of crates: each has the modules of one crate, whose root is its `lib.rs` or `main.rs`.
const CRATES: &[&str] = &[
    "src",
    "pagecopy/src",
    "transport/src",
    "vmm-shim/src",
    "benches/src/bin/peers",
    "benches/src",
    "tests/kit/src",
];

/// Circles that are still there: the folder, and the modules of it that know each other. One that is gone must leave this list.
const CIRCLES: &[(&str, &[&str])] = &[];

/// A module's path from its crate's root; the root has none.
type Name = Vec<String>;

/// A path that code mentions, and under which name it is imported.
type Use = (Name, String);

/// A file of a crate, which is a module.
struct Module {
    uses: Vec<Use>,
    /// Paths outside of `use`.
    mentions: Vec<Name>,
}

/// Code without what is only built for tests and fuzzers: items that have such a `#[cfg]`.
fn built(code: &str) -> String {
    let mut out = String::new();
    let mut rest = code;
    while let Some(at) =
        ["#[cfg(test)]", "#[cfg(any(test, fuzzing))]"].iter().filter_map(|c| rest.find(c)).min()
    {
        out.push_str(&rest[..at]);
        rest = &rest[at + rest[at..].find(']').map_or(0, |end| end + 1)..];
        rest = after_item(rest);
    }
    out + rest
}

/// What follows an item, or whatever else begins here.
fn after_item(code: &str) -> &str {
    let mut depth = 0;
    for (at, c) in code.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => depth -= 1,
            _ => {}
        }
        if depth < 0 {
            return &code[at..];
        }
        if depth == 0 && (c == ';' || c == '}') {
            return &code[at + 1..];
        }
    }
    ""
}

/// The paths of a `use`, without that word.
fn imports(tree: &str, prefix: &[String], found: &mut Vec<Use>) {
    let tree = tree.trim();
    if tree.is_empty() {
        return;
    }
    let parts = |path: &str| -> Vec<String> {
        let path = path.split("::").map(|part| part.trim().to_owned());
        prefix.iter().cloned().chain(path.filter(|part| !part.is_empty())).collect()
    };
    if let Some((before, inside)) = tree.split_once('{') {
        let prefix = parts(before);
        let inside = inside.rsplit_once('}').map_or(inside, |(inside, _)| inside);
        let (mut depth, mut start) = (0, 0);
        for (at, c) in inside.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    imports(&inside[start..at], &prefix, found);
                    start = at + 1;
                }
                _ => {}
            }
        }
        return imports(&inside[start..], &prefix, found);
    }
    let (path, alias) = tree.split_once(" as ").map_or((tree, None), |(path, alias)| (path, Some(alias)));
    let mut path = parts(path);
    if path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    let Some(last) = path.last() else { return };
    let alias = alias.map_or(last.clone(), |alias| alias.trim().to_owned());
    found.push((path, alias));
}

impl Module {
    fn of(built: &str) -> Self {
        let mut module = Self { uses: Vec::new(), mentions: Vec::new() };
        let mut others = built.to_owned();
        for (word, after) in words(built).filter(|(word, after)| *word == "use" && after.starts_with(' ')) {
            let tree = after.split(';').next().unwrap_or(after);
            imports(tree, &[], &mut module.uses);
            others = others.replace(&format!("{word}{tree};"), ";");
        }
        for (word, mut after) in words(&others).filter(|(word, _)| ["crate", "super", "self"].contains(word))
        {
            let mut path = vec![word.to_owned()];
            while let Some(inside) = after.strip_prefix("::") {
                let Some((part, rest)) = words(inside).next().filter(|(part, _)| inside.starts_with(part))
                else {
                    break;
                };
                path.push(part.to_owned());
                after = rest;
            }
            if path.len() > 1 {
                module.mentions.push(path);
            }
        }
        module
    }
}

/// The modules of a crate, by their names; those that are built for tests alone are left out.
fn modules(texts: &[(String, String)], folder: &str) -> BTreeMap<Name, Module> {
    let mut all = BTreeMap::new();
    for (path, text) in texts {
        let nested =
            CRATES.iter().any(|other| other.len() > folder.len() && path.starts_with(&format!("{other}/")));
        let Some(inside) = path.strip_prefix(folder).and_then(|path| path.strip_prefix('/')) else {
            continue;
        };
        if nested {
            continue;
        }
        let mut name: Name = inside.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
        if ["mod", "lib", "main"].contains(&name.last().map_or("", String::as_str)) {
            name.pop();
        }
        let code = code_of(text).join("\n");
        // The root may be two files: a library's, and a program's.
        let before: String = all.remove(&name).unwrap_or_default();
        all.insert(name, before + &code);
    }
    let cleaned: BTreeMap<Name, String> =
        all.iter().map(|(name, code)| (name.clone(), built(code))).collect();
    let for_tests = |name: &Name| {
        (1..=name.len()).any(|len| {
            let declaration = format!("mod {};", name[len - 1]);
            let has = |codes: &BTreeMap<Name, String>| {
                codes.get(&name[..len - 1]).is_some_and(|parent| parent.contains(&declaration))
            };
            has(&all) && !has(&cleaned)
        })
    };
    let built = cleaned.iter().filter(|(name, _)| !for_tests(name));
    built.map(|(name, code)| (name.clone(), Module::of(code))).collect()
}

/// The module in which a path ends that is mentioned in the module `at`. What a module only passes on leads to where it comes from.
fn target(all: &BTreeMap<Name, Module>, at: &[String], path: &[String], depth: usize) -> Option<Name> {
    let mut rest = path;
    let mut current = match path.first()?.as_str() {
        "crate" => Name::new(),
        "self" | "super" => at.to_vec(),
        child => {
            let known = all.contains_key(&[at, &[child.to_owned()]].concat());
            known.then(|| at.to_vec())?
        }
    };
    if ["crate", "self"].contains(&path[0].as_str()) {
        rest = &rest[1..];
    }
    while rest.first().is_some_and(|part| part == "super") {
        current.pop()?;
        rest = &rest[1..];
    }
    while let Some(part) = rest.first() {
        let child = [&current[..], std::slice::from_ref(part)].concat();
        if all.contains_key(&child) {
            (current, rest) = (child, &rest[1..]);
            continue;
        }
        let mut imported =
            all.get(&current)?.uses.iter().filter(|(path, alias)| alias == part && path.len() > 1);
        // A chain of imports longer than this is a circle itself.
        let from =
            imported.find_map(|(path, _)| (depth < 8).then(|| target(all, &current, path, depth + 1))?);
        return Some(from.unwrap_or(current));
    }
    Some(current)
}

/// Who knows whom within a folder, each with a witness.
type Edges = BTreeMap<(String, String), String>;

/// For every folder of a crate, who of it knows whom.
fn edges(all: &BTreeMap<Name, Module>) -> BTreeMap<Name, Edges> {
    let mut found: BTreeMap<Name, Edges> = BTreeMap::new();
    for (name, module) in all {
        let paths = module.uses.iter().map(|(path, _)| path).chain(&module.mentions);
        for (path, to) in paths.filter_map(|path| Some((path, target(all, name, path, 0)?))) {
            let common = name.iter().zip(&to).take_while(|(a, b)| a == b).count();
            // A module and those inside it are one thing.
            if let (Some(from), Some(to)) = (name.get(common), to.get(common)) {
                let witness = format!("{} uses {}", name.join("/"), path.join("::"));
                let folder = found.entry(name[..common].to_vec()).or_default();
                folder.entry((from.clone(), to.clone())).or_insert(witness);
            }
        }
    }
    found
}

/// All that can be reached from a module.
fn reach<'a>(edges: &'a Edges, from: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from];
    while let Some(from) = open.pop() {
        for (_, to) in edges.keys().filter(|(a, _)| a == from) {
            if reached.insert(to.as_str()) {
                open.push(to);
            }
        }
    }
    reached
}

/// The circles of a folder: sets of modules each of which leads to all others.
fn circles_of(edges: &Edges) -> BTreeSet<Vec<&str>> {
    let names: BTreeSet<&str> = edges.keys().map(|(from, _)| from.as_str()).collect();
    let circle = |&name: &&str| -> Vec<&str> {
        let there = reach(edges, name).into_iter();
        there.filter(|&other| reach(edges, other).contains(name)).collect()
    };
    names.iter().map(circle).filter(|circle| circle.len() > 1).collect()
}

/// Circles that nobody has leave for, and leave that nobody needs.
fn circles(texts: &[(String, String)], leave: &[(&str, &[&str])]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut needed = BTreeSet::new();
    for folder in CRATES {
        for (inside, edges) in edges(&modules(texts, folder)) {
            let place = [&[(*folder).to_owned()], &inside[..]].concat().join("/");
            for circle in circles_of(&edges) {
                if let Some(known) =
                    leave.iter().position(|(at, known)| *at == place && **known == circle[..])
                {
                    needed.insert(known);
                    continue;
                }
                let within =
                    |(a, b): &(String, String)| circle.contains(&a.as_str()) && circle.contains(&b.as_str());
                let why: Vec<_> =
                    edges.iter().filter(|(edge, _)| within(edge)).map(|(_, why)| why.as_str()).collect();
                complaints.push(format!("{place}: {circle:?} know each other: {}", why.join("; ")));
            }
        }
    }
    for (_, (place, circle)) in leave.iter().enumerate().filter(|(at, _)| !needed.contains(at)) {
        complaints.push(format!("{place}: {circle:?} is no circle any more: take it off CIRCLES"));
    }
    complaints
}

/// No modules of a folder know each other, by whatever way round.
///
/// What counts. A module is a file; a folder is one thing together with the file that heads it (`mod.rs`, or the file of its name),
/// so that a module and those inside it may know each other, and only modules side by side make a circle. A module knows another one
/// when it, or a module inside it, names a path that begins with `crate::`, `super::` or `self::`, or imports from a module inside it.
/// What a module passes on by `use` counts as named where it comes from. What is only built for tests does not count, nor does a
/// module that is written inside a file.
#[test]
fn modules_know_each_other_one_way() {
    let complaints = circles(&files(is_rust), CIRCLES);
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

mod rules {
    use super::*;

    fn complain(texts: &[(&str, &str)], leave: &[(&str, &[&str])]) -> usize {
        let texts: Vec<_> =
            texts.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        circles(&texts, leave).len()
    }

    #[test]
    fn circles_are_found_and_arrows_are_none() {
        let lib = ("src/lib.rs", "mod a;\nmod b;\nmod c;\npub fn f() {}");
        for (a, b, c, count) in [
            ("use crate::b::X;", "use crate::c;", "", 0),
            ("use crate::b::X;", "fn f() { crate::a::g() }", "", 1),
            ("use super::{f, b::{X, Y as Z}};", "use super::c;", "use super::a::{self};", 1),
            ("use crate::f;", "use crate::f;", "", 0),
            ("// crate::b", "use crate::a;", "const A: &str = \"crate::b\";", 0),
            ("use crate::b;", "#[cfg(test)]\nuse crate::a;\nuse crate::c;", "", 0),
            ("use crate::b;", "#[cfg(test)]\nmod tests {\n    use crate::a;\n}\n", "", 0),
            ("use crate::b;", "#[cfg(test)]\n#[derive(Debug)]\nstruct S(u8);\nuse crate::a;", "", 1),
        ] {
            let texts = [lib, ("src/a.rs", a), ("src/b.rs", b), ("src/c.rs", c)];
            assert_eq!(complain(&texts, &[]), count, "{a} | {b} | {c}");
        }
    }

    #[test]
    fn a_folder_is_one_thing() {
        let heads = [
            ("src/lib.rs", "mod a;\nmod b;"),
            ("src/a/mod.rs", "mod x;\nmod y;\npub use x::X;\npub struct Own;"),
        ];
        for (x, y, b, count) in [
            // Up, and down.
            ("use super::Own;", "use super::Own;", "use crate::a::X;", 0),
            // By what the head passes on.
            ("use super::y::Y;", "use super::X;", "", 1),
            // A module inside knows what leads back to the folder.
            ("use crate::b::B;", "", "use crate::a::Own;", 1),
        ] {
            let texts = [heads[0], heads[1], ("src/a/x.rs", x), ("src/a/y.rs", y), ("src/b.rs", b)];
            assert_eq!(complain(&texts, &[]), count, "{x} | {y} | {b}");
        }
    }

    #[test]
    fn what_is_only_for_tests_is_no_circle_and_leave_ends() {
        let a = ("src/a.rs", "use crate::b;");
        let b = ("src/b.rs", "use crate::a;");
        assert_eq!(complain(&[("src/lib.rs", "mod a;\n#[cfg(test)]\nmod b;"), a, b], &[]), 0);
        let texts = [("src/lib.rs", "mod a;\nmod b;"), a, b];
        assert_eq!(complain(&texts, &[]), 1);
        assert_eq!(complain(&texts, &[("src", &["a", "b"])]), 0);
        assert_eq!(complain(&texts, &[("src", &["a", "b"]), ("src", &["b", "c"])]), 1);
        assert_eq!(complain(&texts[..2], &[("src", &["a", "b"])]), 1);
    }
}
