//! `--diff`: in what two archives differ.

use std::path::Path;

use pageferry::layout::{PAGE_SIZE, Region};
use serde_json::{Value, json};

use super::hand::{Hand, ZERO, noise, piece, ran, text};
use super::inspect;
use crate::common::folder;

fn regions() -> [Region; 2] {
    [Region::new("ram", 0, 130 * PAGE_SIZE as u64), Region::unplaced("rom", 8192)]
}

#[track_caller]
fn diff(first: &Path, second: &Path, code: i32) -> Value {
    inspect(&[first, Path::new("--diff"), second, Path::new("--json")]).code(code).json()
}

fn counted(region: &str, [equal, changed, only_first, only_second, hole]: [u64; 5]) -> Value {
    json!({
        "region": region, "equal_pages": equal, "changed_pages": changed, "only_first_pages": only_first,
        "only_second_pages": only_second, "hole_pages": hole,
    })
}

/// Memory in two ways; in the second some of it is not the same.
fn two(first: &mut Hand, second: &mut Hand) {
    first.frame(
        0,
        &[(0, noise(1)), (1, text(1)), (2, ZERO), (3, noise(3)), (4, text(4)), (5, ZERO), (6, text(6))],
    );
    first.frame(1, &[(0, noise(9))]).frame(0, &[(1, text(2))]);
    // Page 0 and 1 are equal, 2 is a hole, 3 and 6 differ, 4 is not there, 5 has data, 7 is new, 8 is zeros and was none.
    second.frame(
        0,
        &[(0, noise(1)), (1, text(2)), (3, noise(4)), (5, text(5)), (6, ZERO), (7, noise(7)), (8, ZERO)],
    );
    second.frame(1, &[(0, noise(9))]).frame(3, &[(0, ZERO)]);
}

#[test]
fn pages_are_compared_by_content_and_by_seals_alike() {
    let folder = folder();
    let state = |byte: u8| [piece("a", 1, &[1, 2, byte]), piece("b", 1, b"x"), ran(1)];
    for same_seed in [false, true] {
        let (mut first, mut second) = (Hand::new(1, true, &regions()), Hand::new(2, true, &regions()));
        if same_seed {
            second.header.seed = first.header.seed;
        }
        two(&mut first, &mut second);
        let first = first.write(folder.path(), "first", &state(3));
        let second = second.write(folder.path(), "second", &state(4));
        let found = diff(&first, &second, 1);
        let by = if same_seed { "seals" } else { "content" };
        assert_eq!(
            (&found["compared"], &found["equal"], &found["status"]),
            (&json!(by), &json!(false), &json!("completed"))
        );
        // 0 and 1, 2 and 8 (zeros), and the one of chunk 1; 3, 5 and 6; 4; 7.
        assert_eq!(found["regions"][0], counted("ram", [5, 3, 1, 1, 130 - 10]), "by {by}");
        assert_eq!(found["regions"][1], counted("rom", [1, 0, 0, 0, 1]), "by {by}");
        let differs =
            json!([{ "name": "a", "differs": "bytes", "offset": 2, "first_bytes": 3, "second_bytes": 3 }]);
        assert_eq!(found["state"], differs);
        let ended = inspect(&[&first, Path::new("--diff"), &second]);
        for words in [
            "\"ram\": 5 pages equal, 3 changed, 1 only in the first, 1 only in the second, 120 holes in both",
            "\"a\": differs from byte 0x2 on, of 3 bytes",
            "equal:            no",
        ] {
            assert!(ended.code(1).stdout.contains(words), "{words:?} is missing: {}", ended.stdout);
        }
        assert_eq!(ended.stderr, "", "that they differ is no error");
        // Each is equal to itself.
        let found = diff(&second, &second, 0);
        assert_eq!((&found["equal"], &found["state"]), (&json!(true), &json!([])), "{found}");
    }
}

#[test]
fn archives_with_bases_are_compared_by_what_they_stand_for() {
    let folder = folder();
    let base = |id: u8, name: &str| {
        Hand::new(id, false, &regions()).frame(0, &[(0, noise(1)), (1, text(1))]).write(
            folder.path(),
            name,
            &[],
        )
    };
    let (alone, _) = (base(1, "alone"), base(2, "base"));
    let mut top = Hand::new(3, false, &regions()).on(2, "base");
    let top = top.same(0, &[(0, noise(1))]).frame(0, &[(1, text(1))]).write(folder.path(), "top", &[]);
    let found = diff(&alone, &top, 0);
    assert_eq!(found["regions"][0], counted("ram", [2, 0, 0, 0, 128]), "{found}");
    // By seals no page of the base is read.
    let mut second = Hand::new(4, false, &regions()).on(2, "base");
    second.header.seed = Hand::new(3, false, &regions()).header.seed;
    let second = second.same(0, &[(0, noise(1)), (1, text(1))]).frame(0, &[(1, text(2))]).write(
        folder.path(),
        "second",
        &[],
    );
    let found = diff(&top, &second, 1);
    assert_eq!(
        (&found["compared"], &found["regions"][0]),
        (&json!("seals"), &counted("ram", [1, 1, 0, 0, 128]))
    );
}

#[test]
fn other_memory_is_told_and_not_compared() {
    let folder = folder();
    let archive =
        |name: &str, regions: &[Region]| Hand::new(1, false, regions).write(folder.path(), name, &[]);
    let first = archive("first", &regions());
    let second = archive("second", &[Region::new("ram", 4096, 4096), Region::unplaced("vram", 4096)]);
    let found = diff(&first, &second, 1);
    let layout = json!([
        { "region": "ram", "first": { "gpa": 0, "bytes": 130 * 4096 }, "second": { "gpa": 4096, "bytes": 4096 } },
        { "region": "rom", "first": { "gpa": null, "bytes": 8192 }, "second": null },
        { "region": "vram", "first": null, "second": { "gpa": null, "bytes": 4096 } },
    ]);
    assert_eq!((&found["layout"], &found["regions"], &found["equal"]), (&layout, &json!([]), &json!(false)));
    let ended = inspect(&[&first, Path::new("--diff"), &second]);
    let words = "\"ram\": 520 KiB at 0x0; in the second 4 KiB at 0x1000";
    assert!(ended.code(1).stdout.contains(words), "{}", ended.stdout);
    // A guest is not its memory alone.
    let guest = Hand::new(2, true, &regions()).write(folder.path(), "guest", &[ran(1)]);
    let found = diff(&first, &guest, 1);
    assert_eq!(found["state"], json!([{ "name": "pageferry/run-state", "differs": "only-second" }]));
}

#[test]
fn what_cannot_be_compared_is_neither_equal_nor_different() {
    let folder = folder();
    let mut hand = Hand::new(1, true, &regions());
    hand.frame(0, &[(0, noise(1))]);
    let bytes = hand.finish(&[ran(1)]);
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("whole"), &bytes).unwrap();
    let mut other = Hand::new(2, true, &regions());
    let other_whole = other.frame(0, &[(0, noise(1))]).write(folder.path(), "other", &[ran(1)]);
    let mut damaged = std::fs::read(&other_whole).unwrap();
    let (at, len) = other.place(0);
    damaged[at + len - 1] ^= 1;
    std::fs::write(path("damaged"), &damaged).unwrap();
    std::fs::write(path("cut"), &bytes[..bytes.len() - 7]).unwrap();
    for (first, second, words) in [
        ("whole", "damaged", "damaged: the archive is damaged at offset"),
        ("damaged", "whole", "damaged: the archive is damaged at offset"),
        ("whole", "cut", "cut: the archive"),
        ("cut", "whole", "cut: the archive"),
        ("whole", "missing", "missing: No such file"),
        ("missing", "whole", "missing: No such file"),
    ] {
        let ended = inspect(&[&path(first), Path::new("--diff"), &path(second), Path::new("--json")]);
        let found = ended.code(3).says(&[words]).json();
        assert_eq!((&found["status"], &found["exit_code"]), (&json!("failed"), &json!(3)));
    }
    assert_eq!(diff(&path("whole"), &other_whole, 0)["equal"], true);
}
