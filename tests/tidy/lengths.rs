//! How long files and functions are.

use super::code::{code_of, words};
use super::{files, is_rust};

/// Lines of a source file; past that it should be two.
const FILE_LINES_MAX: usize = 700;
/// Lines of a function, from `fn` to its last brace.
const FUNCTION_LINES_MAX: usize = 80;

/// What is longer: a file, or a function of one, and its lines. None of them may grow, and one that no longer needs this must leave.
const ALLOWED: &[(&str, usize)] = &[("transport/src/engine/report.rs::summary", 122)];

/// The functions of a file, each with its number of lines.
fn functions(text: &str) -> Vec<(String, usize)> {
    let code = code_of(text);
    let mut found = Vec::new();
    for (first, line) in code.iter().enumerate() {
        for (_, after) in words(line).filter(|(word, after)| *word == "fn" && after.starts_with(' ')) {
            let Some((name, after)) = words(after).next() else { continue };
            let rest = std::iter::once(after).chain(code[first + 1..].iter().map(String::as_str));
            if let Some(lines) = lines_of(rest) {
                found.push((name.to_owned(), lines));
            }
        }
    }
    found
}

/// How many lines a body has that begins somewhere in the first of these; nothing where there is none.
fn lines_of<'a>(lines: impl Iterator<Item = &'a str>) -> Option<usize> {
    let (mut braces, mut brackets) = (0, 0);
    for (at, line) in lines.enumerate() {
        for c in line.chars() {
            match c {
                '{' => braces += 1,
                '}' => braces -= 1,
                '(' | '[' => brackets += 1,
                ')' | ']' => brackets -= 1,
                ';' if braces == 0 && brackets == 0 => return None,
                _ => {}
            }
            if c == '}' && braces == 0 {
                return Some(at + 1);
            }
        }
    }
    None
}

/// What is too long without leave, or longer than it says, and leave that nobody needs.
fn too_long(texts: &[(String, String)], allowed: &[(&str, usize)]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut long = Vec::new();
    for (path, text) in texts {
        let functions = functions(text).into_iter().map(|(name, lines)| (format!("{path}::{name}"), lines));
        long.extend(functions.filter(|&(_, lines)| lines > FUNCTION_LINES_MAX));
        let lines = text.lines().count();
        long.extend((lines > FILE_LINES_MAX).then(|| (path.clone(), lines)));
    }
    for (what, lines) in &long {
        match allowed.iter().find(|(known, _)| known == what) {
            Some((_, most)) if lines <= most => {}
            Some((_, most)) => {
                complaints.push(format!("{what}: {lines} lines, {most} before: it must not grow"));
            }
            None => complaints.push(format!(
                "{what}: {lines} lines; a file has at most {FILE_LINES_MAX}, a function {FUNCTION_LINES_MAX}"
            )),
        }
    }
    let needless = allowed.iter().filter(|(known, _)| !long.iter().any(|(what, _)| what == known));
    complaints.extend(needless.map(|(known, _)| format!("{known} is short enough: take it off ALLOWED")));
    complaints
}

#[test]
fn files_and_functions_are_of_bearable_length() {
    let complaints = too_long(&files(is_rust), ALLOWED);
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

mod rules {
    use super::*;

    #[test]
    fn functions_end_with_their_last_brace() {
        let text = "fn a() {\n    if x {\n    }\n}\n\ntrait T {\n    fn b(x: [u8; 3]);\n    fn c<F: Fn(u8)>(\n        f: F,\n    ) -> u8 {\n        '}'; \"}\"; 1 }\n}\ntype F = fn(u8);\n";
        let found = functions(text);
        assert_eq!(found, [("a".to_owned(), 4), ("c".to_owned(), 4)]);
    }

    #[test]
    fn what_is_long_needs_leave_and_must_not_grow() {
        let body = |lines: usize| format!("fn f() {{\n{}}}\n", "    x();\n".repeat(lines - 2));
        let texts = |text: String| vec![("a.rs".to_owned(), text)];
        let long = FUNCTION_LINES_MAX + 1;
        assert_eq!(too_long(&texts(body(FUNCTION_LINES_MAX)), &[]), Vec::<String>::new());
        assert_eq!(too_long(&texts(body(long)), &[]).len(), 1);
        assert_eq!(too_long(&texts(body(long)), &[("a.rs::f", long)]), Vec::<String>::new());
        assert_eq!(too_long(&texts(body(long + 1)), &[("a.rs::f", long)]).len(), 1);
        assert_eq!(too_long(&texts(body(3)), &[("a.rs::f", long)]).len(), 1);
        let file = |lines: usize| texts("// x\n".repeat(lines));
        assert_eq!(too_long(&file(FILE_LINES_MAX), &[]), Vec::<String>::new());
        assert_eq!(too_long(&file(FILE_LINES_MAX + 1), &[]).len(), 1);
        assert_eq!(
            too_long(&file(FILE_LINES_MAX + 1), &[("a.rs", FILE_LINES_MAX + 1)]),
            Vec::<String>::new()
        );
    }
}
