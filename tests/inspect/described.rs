//! What an archive is, in text and as JSON; and what is none.

use std::path::Path;

use pageferry::archive::format::VERSION;
use pageferry::layout::{PAGE_SIZE, Region};
use serde_json::{Value, json};

use super::hand::{Hand, ZERO, noise, piece, ran, text};
use super::inspect;
use crate::common::{Ended, Image, Job, MIB, PAGE, folder, send, turn};
use crate::vm::{Spec, World, prove};

/// Not a multiple of a chunk.
const LEN: usize = 12 * MIB + 5 * PAGE;

/// The numbers of a save's report are those of its archive.
#[track_caller]
fn assert_numbers(report: &Value, found: &Value) {
    for kind in ["total", "zero", "compressed", "raw"] {
        assert_eq!(found["pages"][kind], report["pages"][kind], "{kind}: {found} {report}");
    }
    assert_eq!(found["file_bytes"], report["wire_bytes"], "{found} {report}");
    let number = |name: &str| found[name].as_u64().unwrap();
    let frames =
        number("header_bytes") + number("seal_bytes") + number("encoded_bytes") + number("raw_bytes");
    assert_eq!(number("frame_bytes"), frames, "{found}");
    assert_eq!(number("raw_bytes"), found["pages"]["raw"].as_u64().unwrap() * PAGE as u64, "{found}");
    assert_eq!(found["damaged_frames"], 0, "{found}");
}

#[test]
fn memory_has_the_numbers_of_its_save() {
    for (image, codec) in [
        (Image::Mixed, "auto"),
        (Image::Mixed, "zstd:3"),
        (Image::Mixed, "raw"),
        (Image::Zero, "auto"),
        (Image::Sparse, "zstd"),
    ] {
        let job = Job::new(image, LEN);
        let archive = job.folder.path().join("ram.pferry");
        let _turn = turn();
        let sent = send(&format!("file:{}", archive.display()), &job.from, &["--codec", codec]).wait();
        let report = sent.code(0).json();
        let found = inspect(&[&archive, Path::new("--json")]).code(0).json();
        assert_numbers(&report, &found);
        assert_eq!(found["pages"]["hole"], report["pages"]["hole"], "{image:?}");
        assert_eq!(found["file_bytes"], std::fs::metadata(&archive).unwrap().len());
        assert_eq!(
            (&found["status"], &found["guest"], &found["base"]),
            (&json!("completed"), &json!(false), &Value::Null)
        );
        assert_eq!(found["regions"], json!([{ "name": "ram", "gpa": 0, "bytes": LEN }]));
        assert_eq!((&found["pages"]["saved_again"], &found["state"]), (&json!(0), &json!([])));
        let since = found["created_s"].as_u64().unwrap().abs_diff(now());
        assert!(since < 3600, "made {since} s ago: {found}");
    }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[test]
fn a_guest_has_the_numbers_of_its_save_and_its_state() {
    let world = World::new();
    let spec = Spec::counter();
    let vm = world.source("a", &spec);
    prove(&spec, &[&vm]);
    let archive = world.path("guest.pferry");
    let uri = format!("file:{}", archive.display());
    let saved = vm.ctl(&["migrate", &uri, "--json", "--resume"]);
    assert_eq!(saved.code, Some(0), "{saved:?}");
    let found = inspect(&[&archive, Path::new("--verify"), Path::new("--json")]).code(0).json();
    assert_numbers(&saved.json(), &found);
    assert_eq!((&found["guest"], &found["runs_once_loaded"]), (&json!(true), &json!(true)), "{found}");
    assert!(found["machine"].as_str().is_some_and(|machine| !machine.is_empty()), "{found}");
    assert!(
        found["state_bytes"].as_u64() > found["state"].as_array().unwrap()[0]["bytes"].as_u64(),
        "{found}"
    );
    assert_eq!((&found["verify"]["whole"], &found["verify"]["bytes"]), (&json!(true), &found["file_bytes"]));
    // Paused, it stays so.
    assert_eq!(vm.ctl(&["pause"]).code, Some(0));
    let saved = vm.ctl(&["migrate", &uri, "--json"]);
    let found = inspect(&[&archive, Path::new("--json")]).code(0).json();
    assert_numbers(&saved.json(), &found);
    assert_eq!(found["runs_once_loaded"], false, "{found}");
}

/// A guest of two regions with whatever a frame can have.
fn guest() -> Hand {
    let regions = [Region::new("ram", 1 << 32, 66 * PAGE_SIZE as u64), Region::unplaced("rom\u{1b}", 4096)];
    let mut hand = Hand::new(5, true, &regions).on(9, "nowhere.pferry");
    hand.frame(0, &[(0, noise(1)), (1, ZERO), (2, text(1)), (3, text(2))]).pad();
    hand.frame(1, &[(0, noise(2))]).frame(0, &[(0, text(3)), (1, text(4))]).frame(0, &[(0, ZERO)]);
    hand.same(2, &[(0, text(9))]);
    hand
}

#[test]
fn everything_is_told_in_both_forms() {
    let folder = folder();
    let state = [piece("vcpu/0", 3, b"12345"), ran(0), piece("clock", 1, b"")];
    let archive = guest().write(folder.path(), "hand", &state);
    let found = inspect(&[&archive, Path::new("--json")]).code(0).json();
    let pages = json!({
        "total": 67, "hole": 61, "zero": 2, "compressed": 4, "raw": 2, "same": 1, "saved_again": 2, "superseded": 3,
    });
    assert_eq!(found["pages"], pages);
    assert_eq!(
        (&found["frames"], &found["pads"], &found["features"]),
        (&json!(5), &json!(1), &json!(["zstd", "base"]))
    );
    assert_eq!((&found["id"], &found["created"]), (&json!("05".repeat(16)), &json!("2023-11-14T22:13:20Z")));
    let pieces = [("vcpu/0", 3, 5), (pageferry::archive::format::RUN_STATE, 1, 1), ("clock", 1, 0)];
    let pieces =
        pieces.map(|(name, version, bytes)| json!({ "name": name, "version": version, "bytes": bytes }));
    assert_eq!((&found["state"], &found["runs_once_loaded"]), (&json!(pieces), &json!(false)));
    assert_eq!(found["regions"][1]["gpa"], Value::Null);
    let base = &found["base"];
    assert_eq!(
        (&base["id"], &base["name"], &base["file"]),
        (&json!("09".repeat(16)), &json!("nowhere.pferry"), &Value::Null)
    );
    assert!(base["error"].as_str().is_some_and(|error| error.contains("No such file")), "{base}");
    let sum = ["frame_bytes", "padding_bytes", "state_bytes", "index_bytes"]
        .map(|name| found[name].as_u64().unwrap());
    let head = found["file_bytes"].as_u64().unwrap() - sum.iter().sum::<u64>();
    assert!((100..400).contains(&head), "magic and header: {head} in {found}");

    let said = inspect(&[&archive]).code(0).stdout.clone();
    for words in [
        "version 1 (zstd, base)",
        "0505050505050505",
        "2023-11-14T22:13:20Z",
        "a guest, which stays paused once it is loaded",
        "\"a machine\"",
        "\"ram\", 264 KiB, at 0x100000000",
        "\"rom\\u{1b}\", 4 KiB, without an address",
        "\"nowhere.pferry\", id 0909",
        "not found: ",
        "67, of which 61 are holes",
        "2 zero, 4 compressed, 2 raw, 1 as in the base",
        "2 pages; 3 that were saved before",
        "\"vcpu/0\", version 3, 5 bytes",
    ] {
        assert!(said.contains(words), "{words:?} is missing: {said}");
    }
    assert!(!said.contains('\u{1b}'), "a name is no command to a terminal: {said:?}");
}

#[test]
fn the_base_is_found_beside_the_archive_or_where_one_says() {
    let folder = folder();
    let region = [Region::new("ram", 0, 1 << 20)];
    let base = Hand::new(1, false, &region).frame(0, &[(0, text(1))]).write(folder.path(), "base", &[]);
    let archive =
        Hand::new(2, false, &region).on(1, "base").same(0, &[(0, text(1))]).write(folder.path(), "top", &[]);
    let found = inspect(&[&archive, Path::new("--json")]).code(0).json();
    assert_eq!((&found["base"]["file"], &found["base"]["error"]), (&json!(base), &Value::Null));
    let moved = folder.path().join("moved");
    std::fs::rename(&base, &moved).unwrap();
    let found = inspect(&[&archive, Path::new("--json")]).code(0).json();
    assert_eq!(found["base"]["file"], Value::Null, "{found}");
    let args = [&archive, Path::new("--json"), Path::new("--verify"), Path::new("--base"), &moved];
    let found = inspect(&args).code(0).json();
    assert_eq!(
        (&found["base"]["file"], &found["verify"]["base_pages"]),
        (&json!(moved), &json!(1)),
        "{found}"
    );
    // Another archive is not it.
    let other = Hand::new(3, false, &region).write(folder.path(), "other", &[]);
    let found = inspect(&[&archive, Path::new("--json"), Path::new("--base"), &other]).code(0).json();
    assert!(found["base"]["error"].as_str().unwrap().contains("another archive"), "{found}");
}

/// It ends with this code and these words, in both forms.
#[track_caller]
fn refused(path: &Path, code: i32, words: &str) {
    let ended = inspect(&[path]);
    ended.code(code).says(&[words]);
    assert_eq!(ended.stdout, "", "{ended:?}");
    let ended: Ended = inspect(&[path, Path::new("--json"), Path::new("--verify")]);
    let found = ended.code(code).json();
    assert_eq!((&found["status"], &found["exit_code"]), (&json!("failed"), &json!(code)), "{ended:?}");
    assert!(found["error"].as_str().unwrap().contains(words), "{words:?} is missing: {found}");
}

#[test]
fn what_is_none_is_said_to_be_none() {
    let folder = folder();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    refused(&folder.path().join("missing"), 3, "No such file");
    refused(folder.path(), 3, "no regular file");
    refused(Path::new("/dev/null"), 3, "no regular file");
    let fifo = folder.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(&fifo, 3, "no regular file");
    refused(
        &file("text", b"#!/bin/sh\nexit 0\n"),
        3,
        "no archive of pageferry's: it begins with \"#!/bin/s\"",
    );
    refused(&file("empty", b""), 1, "ends at offset 0x0");
    let newer = |change: fn(&mut Hand)| {
        let mut hand = guest();
        let mut empty = Hand::new(5, true, &hand.header.regions);
        std::mem::swap(&mut hand, &mut empty);
        change(&mut hand);
        hand.finish(&[ran(1)])
    };
    let version = newer(|hand| hand.header.version = VERSION + 1);
    refused(
        &file("version", &version),
        3,
        &format!("of version {}, and this release reads up to {VERSION}", VERSION + 1),
    );
    let features = newer(|hand| hand.header.features |= 1 << 40);
    refused(&file("features", &features), 3, "does not know (features 0x10000000001): use a newer one");
    let whole = guest().finish(&[ran(1)]);
    for len in [5, 30, 100, 300, 5000, whole.len() - 100, whole.len() - 1] {
        refused(&file("cut", &whole[..len]), 1, "");
        let ended = inspect(&[folder.path().join("cut")]);
        ended.says(&["the archive ends at offset", "the archive is damaged at offset"]);
    }
    refused(&file("cut", &whole[..whole.len() - 3000]), 1, "cut off, or its writer did not come to an end");
    // As a tape or a block device pads it, or somebody appended to it.
    for more in [1, 500, 5000] {
        let long = [&whole[..], &vec![0; more]].concat();
        refused(
            &file("long", &long),
            1,
            &format!("something follows the archive's end at offset {:#x}", whole.len()),
        );
    }
}

#[test]
fn what_is_damaged_is_told_without_reading_pages() {
    let folder = folder();
    let mut hand = guest();
    let mut bytes = hand.finish(&[ran(1)]);
    let (at, _) = hand.place(2);
    bytes[at + 8] ^= 1;
    let path = folder.path().join("damaged");
    std::fs::write(&path, &bytes).unwrap();
    let ended = inspect(&[&path, Path::new("--json")]);
    let found = ended.code(1).says(&["1 of 5 frames are damaged", "--verify"]).json();
    assert_eq!(
        (&found["damaged_frames"], &found["status"], &found["pages"]["raw"]),
        (&json!(1), &json!("failed"), &json!(1))
    );
    let mut bytes = guest().finish(&[piece("vcpu/0", 1, b"0123456789abcdef"), ran(1)]);
    let at = bytes.windows(16).position(|bytes| bytes == b"0123456789abcdef").unwrap();
    bytes[at] = b'x';
    std::fs::write(&path, &bytes).unwrap();
    let ended = inspect(&[&path, Path::new("--json")]);
    let found = ended.code(1).says(&["checksum of record's payload"]).json();
    assert_eq!((&found["state"], &found["runs_once_loaded"]), (&json!([]), &Value::Null));
}

#[test]
fn arguments_that_make_no_sense_exit_with_2() {
    for (args, word) in [
        (&["inspect"][..], "FILE"),
        (&["inspect", "x", "--verify", "--diff", "y"], "cannot be used with"),
        (&["inspect", "x", "--extract", "ram=y", "--diff", "z"], "cannot be used with"),
        (&["inspect", "x", "--flatten", "y", "--extract", "ram=y"], "cannot be used with"),
        (&["inspect", "x", "--force-damaged"], "--extract"),
        (&["inspect", "x", "--codec", "raw"], "--flatten"),
        (&["inspect", "x", "--flatten", "y", "--codec", "rar"], "codec"),
        (&["inspect", "x", "--flatten", "y", "--codec", "delta"], "stands for itself"),
    ] {
        crate::common::Ferry::run(args).code(2).says(&[word]);
    }
    let help = crate::common::Ferry::run(["inspect", "--help"]);
    for word in ["Examples:", "--extract REGION=FILE", "with --diff: they differ"] {
        assert!(
            help.code(0).stdout.replace("<REGION=FILE>", "REGION=FILE").contains(word),
            "{word}: {}",
            help.stdout
        );
    }
}
