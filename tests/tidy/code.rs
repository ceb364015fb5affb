//! Rust code without what is none: comments, and what stands in strings.

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
pub(crate) fn code_of(text: &str) -> Vec<String> {
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
pub(crate) fn words(code: &str) -> impl Iterator<Item = (&str, &str)> {
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
}
