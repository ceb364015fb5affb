//! `--verify`: everything that is damaged is told, and nothing else.

use std::path::{Path, PathBuf};

use pageferry::layout::{PAGE_SIZE, Region};
use serde_json::{Value, json};

use super::hand::{Hand, ZERO, noise, piece, ran, text};
use super::inspect;
use crate::common::folder;

const RAM: u64 = 130 * PAGE_SIZE as u64;

fn regions() -> [Region; 2] {
    [Region::new("ram", 1 << 20, RAM), Region::unplaced("rom", 8192)]
}

/// What verifying it says, which is not that it is whole.
#[track_caller]
fn damage(path: &Path, more: &[&Path]) -> Vec<Value> {
    let ended = inspect(&[&[path, Path::new("--verify"), Path::new("--json")], more].concat());
    let found = ended.code(1).says(&["the archive is damaged in "]).json();
    assert_eq!(
        (&found["status"], &found["exit_code"], &found["verify"]["whole"]),
        (&json!("failed"), &json!(1), &json!(false))
    );
    found["verify"]["damage"].as_array().unwrap().clone()
}

fn place(region: &str, gpa: Option<u64>, offset: u64, pages: u32) -> Value {
    json!({ "region": region, "gpa": gpa, "offset_bytes": offset, "pages": pages })
}

#[track_caller]
fn assert_damage(found: &Value, offset: usize, pages: &[Value], what: &str) {
    assert_eq!((&found["offset"], &found["pages"]), (&json!(offset), &json!(pages)), "{found}");
    assert!(found["what"].as_str().unwrap().contains(what), "{what:?} is missing: {found}");
}

#[test]
fn all_damage_is_told_and_reading_goes_on() {
    let folder = folder();
    let mut hand = Hand::new(1, true, &regions());
    let many: Vec<_> = (0..64).map(|bit| (bit, noise(100 + u64::from(bit)))).collect();
    hand.frame(0, &many).pad().frame(1, &[(1, text(1)), (2, text(2)), (9, noise(1))]);
    hand.frame(2, &[(0, ZERO), (1, noise(2))]).frame(3, &[(1, noise(3))]);
    let state = [piece("vcpu/0", 1, b"0123456789abcdef"), ran(1)];
    let whole = hand.finish(&state);
    let path = folder.path().join("archive");
    let write = |bytes: &[u8]| std::fs::write(&path, bytes).unwrap();
    write(&whole);
    let ended = inspect(&[&path, Path::new("--verify")]);
    let said = &ended.code(0).stdout;
    assert!(
        said.contains("whole:            yes")
            && said.contains(&format!("checked:          {} bytes in ", whole.len())),
        "{said}"
    );

    let mut bytes = whole.clone();
    let [many, pad, texts, two, rom] = [0, 1, 2, 3, 4].map(|at| hand.place(at));
    // The last two of 64 raw pages, a pad, an encoded section with the raw page behind it, a header, a raw page, and state.
    bytes[many.0 + many.1 - 1] ^= 1;
    bytes[many.0 + many.1 - PAGE_SIZE - 1] ^= 1;
    bytes[pad.0 + pad.1 - 1] ^= 1;
    bytes[texts.0 + 48 + 4 * 8 + 20] ^= 0x80;
    bytes[texts.0 + texts.1 - 1] ^= 1;
    bytes[two.0 + 20] ^= 1;
    bytes[rom.0 + rom.1 - 4] ^= 1;
    let state = bytes.windows(16).position(|bytes| bytes == b"0123456789abcdef").unwrap();
    bytes[state] ^= 1;
    write(&bytes);
    let found = damage(&path, &[]);
    let ram = |page: u64, pages| {
        place("ram", Some((1 << 20) + page * PAGE_SIZE as u64), page * PAGE_SIZE as u64, pages)
    };
    assert_eq!(found.len(), 7, "{found:?}");
    assert_damage(&found[0], many.0, &[ram(62, 2)], "2 of its pages are not what was saved");
    assert_damage(&found[1], pad.0, &[], "pad");
    assert_damage(&found[2], texts.0, &[ram(65, 2)], "checksum of encoded section");
    assert_damage(&found[3], texts.0, &[ram(73, 1)], "1 of its pages are not what was saved");
    assert_damage(&found[4], two.0, &[ram(128, 2)], "");
    assert_damage(&found[5], rom.0, &[place("rom", None, 4096, 1)], "1 of its pages");
    assert!(found[6]["what"].as_str().unwrap().contains("record's payload"), "{found:?}");

    let ended = inspect(&[&path, Path::new("--verify")]);
    for words in [
        format!(
            "at offset {:#x}: 2 of its pages are not what was saved (by their seals): 2 pages of region \"ram\" at 0x13e000",
            many.0
        ),
        "1 page of region \"rom\" at its byte 0x1000".into(),
        "whole:            no".into(),
    ] {
        assert!(ended.code(1).stdout.contains(&words), "{words:?} is missing: {}", ended.stdout);
    }
    ended.says(&["in 7 places, and 8 pages with it"]);
}

/// An archive, its base, and the base of that.
struct Chain {
    folder: tempfile::TempDir,
    bottom: (Hand, PathBuf),
    middle: (Hand, PathBuf),
    top: (Hand, PathBuf),
}

fn chain() -> Chain {
    let folder = folder();
    let mut bottom = Hand::new(1, false, &regions());
    bottom.frame(0, &[(0, noise(1)), (1, noise(2)), (2, noise(3))]).frame(1, &[(0, noise(4))]);
    let mut middle = Hand::new(2, false, &regions()).on(1, "bottom");
    middle.frame(0, &[(1, text(1))]).same(0, &[(0, noise(1)), (2, noise(3))]).same(1, &[(0, noise(4))]);
    let mut top = Hand::new(3, false, &regions()).on(2, "middle");
    // Of page 5 none has anything, so it is zeros; page 2 is superseded.
    top.same(0, &[(0, noise(1)), (1, text(1)), (2, noise(3)), (5, ZERO)]).frame(0, &[(2, text(2))]);
    let write = |hand: &mut Hand, name: &str| hand.write(folder.path(), name, &[]);
    let paths = (write(&mut bottom, "bottom"), write(&mut middle, "middle"), write(&mut top, "top"));
    Chain { folder, bottom: (bottom, paths.0), middle: (middle, paths.1), top: (top, paths.2) }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_an_archive_stands_on_is_read_and_nothing_else_of_its_base() {
    let Chain { folder: _folder, bottom, middle, top } = chain();
    let found = inspect(&[&top.1, Path::new("--verify"), Path::new("--json")]).code(0).json();
    assert_eq!(found["verify"]["base_pages"], 3, "{found}");
    assert_eq!(found["pages"]["same"], 4);
    // Page 1 and chunk 1 of the bottom, and page 2, which the top has itself.
    let (first, len) = bottom.0.place(0);
    for at in [first + len - PAGE_SIZE - 1, bottom.0.place(1).0 + 100, first + len - 1] {
        flip(&bottom.1, at);
    }
    inspect(&[&top.1, Path::new("--verify")]).code(0);
    flip(&bottom.1, first + len - 2 * PAGE_SIZE - 1);
    let ram = |page: u64, pages| {
        place("ram", Some((1 << 20) + page * PAGE_SIZE as u64), page * PAGE_SIZE as u64, pages)
    };
    let found = damage(&top.1, &[]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_damage(
        &found[0],
        top.0.place(0).0,
        &[ram(0, 1)],
        "1 of its pages are not in the base as they were",
    );
    // Of the middle the first frame's header goes, with page 1.
    flip(&middle.1, middle.0.place(0).0 + 41);
    let found = damage(&top.1, &[]);
    assert_damage(
        &found[0],
        top.0.place(0).0,
        &[ram(0, 2)],
        "2 of its pages are not in the base as they were",
    );
}

#[test]
fn a_base_with_other_pages_is_no_base() {
    let Chain { folder, top, .. } = chain();
    // It says that it is the middle one, and is whole.
    let mut other = Hand::new(2, false, &regions());
    other.frame(0, &[(0, noise(1)), (1, text(8)), (5, text(9))]);
    let other = other.write(folder.path(), "other", &[]);
    let found = damage(&top.1, &[Path::new("--base"), &other]);
    let pages = [
        place("ram", Some((1 << 20) + 4096), 4096, 1),
        place("ram", Some((1 << 20) + 5 * 4096), 5 * 4096, 1),
    ];
    assert_damage(&found[0], top.0.place(0).0, &pages, "not in the base as they were");
    std::fs::remove_file(folder.path().join("bottom")).unwrap();
    let found = damage(&top.1, &[]);
    assert!(
        found[0]["what"]
            .as_str()
            .unwrap()
            .contains("the base \"middle\" of the archive cannot be used: the base \"bottom\""),
        "{found:?}"
    );
}

#[test]
fn pages_of_a_base_that_there_is_none_of_are_damage() {
    let folder = folder();
    let mut hand = Hand::new(3, false, &regions());
    hand.same(0, &[(0, ZERO)]);
    let path = hand.write(folder.path(), "archive", &[]);
    let found = damage(&path, &[]);
    assert_damage(&found[0], hand.place(0).0, &[place("ram", Some(1 << 20), 0, 1)], "without a base");
}
