//! What is made of archives: maps, RAM files, and archives that stand alone.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry::layout::{PAGE_SIZE, Region};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::hand::{Hand, Page, ZERO, noise, piece, ran, text};
use super::inspect;
use crate::common::{Ferry, Image, Job, MIB, PAGE, assert_same, blocks, folder, send, turn};
use crate::vm::{Spec, Vm, World, prove};

const RAM_PAGES: usize = 130;

fn regions() -> [Region; 2] {
    [Region::new("ram", 1 << 20, (RAM_PAGES * PAGE_SIZE) as u64), Region::unplaced("rom", 8192)]
}

/// An archive with everything, on a base; and the memory of its regions.
struct Made {
    folder: TempDir,
    base: (Hand, PathBuf),
    top: (Hand, PathBuf),
    ram: Vec<u8>,
    rom: Vec<u8>,
}

fn made() -> Made {
    let folder = folder();
    let mut base = Hand::new(1, true, &regions());
    base.frame(0, &[(0, noise(1)), (1, noise(2)), (2, text(3))]).frame(2, &[(1, noise(4))]);
    let mut top = Hand::new(2, true, &regions()).on(1, "base");
    top.frame(0, &[(1, text(9)), (7, noise(7)), (8, ZERO)]).same(0, &[(0, noise(1)), (2, text(3))]).pad();
    top.frame(1, &[(63, text(5)), (62, text(6))]).same(2, &[(1, noise(4))]).frame(3, &[(1, noise(8))]);
    top.frame(0, &[(1, text(4))]);
    let (base_path, state) = (base.write(folder.path(), "base", &[ran(1)]), [piece("cpu", 1, b"x"), ran(1)]);
    let top_path = top.write(folder.path(), "top", &state);
    let mut ram = vec![0; RAM_PAGES * PAGE_SIZE];
    let pages = [
        (0, noise(1)),
        (1, text(4)),
        (2, text(3)),
        (7, noise(7)),
        (127, text(5)),
        (126, text(6)),
        (129, noise(4)),
    ];
    for (at, page) in pages {
        put(&mut ram, at, page);
    }
    let mut rom = vec![0; 8192];
    put(&mut rom, 1, noise(8));
    Made { folder, base: (base, base_path), top: (top, top_path), ram, rom }
}

fn put(memory: &mut [u8], at: usize, page: Page) {
    memory[at * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(&page);
}

impl Made {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The argument that extracts a region to a file of the folder, and the file.
    fn wanted(&self, region: &str, name: &str) -> (PathBuf, PathBuf) {
        let path = self.path(name);
        (PathBuf::from(format!("{region}={}", path.display())), path)
    }

    /// Files of the folder that are none of the archives.
    fn others(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.retain(|name| name != "base" && name != "top");
        names.sort();
        names
    }
}

const EXTRACT: &str = "--extract";

#[test]
fn regions_become_sparse_files() {
    let made = made();
    let (ram_arg, ram) = made.wanted("ram", "ram.img");
    let (rom_arg, rom) = made.wanted("rom", "rom.img");
    let (all_arg, all) = made.wanted("all", "all.img");
    std::fs::write(&ram, "in the way").unwrap();
    let extract = Path::new(EXTRACT);
    let args = [&made.top.1, extract, &ram_arg, extract, &rom_arg, extract, &all_arg, Path::new("--json")];
    let found = inspect(&args).code(0).json();
    assert_same(&ram, &made.ram);
    assert_same(&rom, &made.rom);
    assert_same(&all, &[&made.ram[..], &made.rom].concat());
    assert_eq!(blocks(&ram), 7 * PAGE as u64, "zeros and holes take no room");
    let expected = json!({
        "region": "ram", "file": ram, "bytes": made.ram.len(), "data_pages": 7, "hole_pages": RAM_PAGES - 7, "damaged_pages": 0,
    });
    assert_eq!(
        (&found["extracted"][0], &found["damaged"], &found["status"]),
        (&expected, &json!([]), &json!("completed"))
    );
    assert_eq!(made.others(), ["all.img", "ram.img", "rom.img"]);
    let ended = inspect(&[&made.top.1, extract, &rom_arg]);
    assert!(ended.code(0).stdout.contains("\"rom\" to "), "{}", ended.stdout);
}

#[test]
fn what_was_saved_is_what_is_extracted() {
    let job = Job::new(Image::Mixed, 12 * MIB + 5 * PAGE);
    let archive = job.folder.path().join("archive");
    let _turn = turn();
    send(&format!("file:{}", archive.display()), &job.from, &["--codec", "zstd"]).wait().code(0);
    let wanted = PathBuf::from(format!("ram={}", job.to.display()));
    inspect(&[&archive, Path::new(EXTRACT), &wanted]).code(0);
    job.assert_arrived();
    assert!(blocks(&job.to) <= blocks(&job.from));
}

#[test]
fn what_cannot_be_extracted_leaves_no_file() {
    let made = made();
    let before = std::fs::read(&made.top.1).unwrap();
    let (_, file) = made.wanted("", "file");
    let itself = PathBuf::from(format!("ram={}", made.top.1.display()));
    let base = PathBuf::from(format!("ram={}", made.base.1.display()));
    let folder = PathBuf::from(format!("ram={}", made.folder.path().display()));
    let nowhere = PathBuf::from(format!("ram={}", made.path("none/file").display()));
    let (good, _) = made.wanted("ram", "file");
    let (bad, _) = made.wanted("vram", "file");
    for (args, code, words) in [
        (&[&bad][..], 2, "no region \"vram\"; it has \"ram\", \"rom\""),
        (&[&file], 2, "expected REGION=FILE"),
        (&[&good, &bad], 2, "no region"),
        (&[&good, &good], 2, "cannot take two regions"),
        (&[&itself], 2, "this is the archive, or one that it stands on"),
        (&[&base], 2, "this is the archive, or one that it stands on"),
        (&[&folder], 3, "cannot write"),
        (&[&good, &nowhere], 3, "No such file"),
    ] {
        let extract = args.iter().flat_map(|wanted| [Path::new(EXTRACT), wanted]);
        let args: Vec<&Path> =
            [made.top.1.as_path(), Path::new("--json")].into_iter().chain(extract).collect();
        let found = inspect(&args).code(code).says(&[words]).json();
        assert_eq!(found["exit_code"], code, "{words}");
        assert_eq!(made.others(), Vec::<String>::new(), "{words}");
    }
    assert_eq!(std::fs::read(&made.top.1).unwrap(), before);
    std::fs::remove_file(&made.base.1).unwrap();
    inspect(&[&made.top.1, Path::new(EXTRACT), &good]).code(3).says(&["the base \"base\" of the archive"]);
    assert_eq!(made.others(), Vec::<String>::new());
}

#[test]
fn damaged_pages_are_no_memory_unless_one_wants_them_as_zeros() {
    let mut made = made();
    let flip = |path: &Path, at: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    // A page of the base, a compressed section, and the header of the frame that has page 1 for the last time.
    let (at, len) = made.base.0.place(1);
    flip(&made.base.1, at + len - 1);
    let (at, len) = made.top.0.place(3);
    flip(&made.top.1, at + len - 10);
    flip(&made.top.1, made.top.0.place(6).0 + 4);
    let (wanted, file) = made.wanted("ram", "ram.img");
    std::fs::write(&file, "as it was").unwrap();
    let args = [&made.top.1, Path::new(EXTRACT), &wanted];
    let ended = inspect(&args);
    ended.code(1).says(&["is damaged; --verify tells of all that is damaged, and --force-damaged"]);
    assert_eq!(
        (std::fs::read(&file).unwrap(), made.others()),
        (b"as it was".to_vec(), vec!["ram.img".to_owned()])
    );

    let forced = [&args[..], &[Path::new("--force-damaged")]].concat();
    let found = inspect(&[&forced[..], &[Path::new("--json")]].concat()).code(0).json();
    for at in [1, 126, 127, 129] {
        put(&mut made.ram, at, ZERO);
    }
    assert_same(&file, &made.ram);
    let place = |page: u64, pages: u64| json!({ "region": "ram", "offset_bytes": page * 4096, "gpa": (1 << 20) + page * 4096, "pages": pages });
    assert_eq!(found["damaged"], json!([place(1, 1), place(126, 2), place(129, 1)]));
    assert_eq!(
        (&found["extracted"][0]["damaged_pages"], &found["extracted"][0]["data_pages"]),
        (&json!(4), &json!(3))
    );
    let said = inspect(&forced).code(0).stdout.clone();
    assert!(said.contains("damaged:          2 pages of region \"ram\" at 0x17e000: zeros now"), "{said}");
    // Nothing of the other region is damaged.
    let (rom_wanted, rom) = made.wanted("rom", "rom.img");
    inspect(&[&made.top.1, Path::new(EXTRACT), &rom_wanted]).code(0);
    assert_same(&rom, &made.rom);
}

#[test]
fn a_map_shows_what_is_saved() {
    let made = made();
    let map = made.path("map.svg");
    std::fs::write(&map, "in the way").unwrap();
    let found = inspect(&[&made.top.1, Path::new("--map"), &map, Path::new("--json")]).code(0).json();
    assert_eq!(found["map"], json!({ "file": map, "cell_bytes": 4096, "cells": RAM_PAGES + 2 }));
    let svg = std::fs::read_to_string(&map).unwrap();
    for words in [
        "<svg ",
        "</svg>",
        "a cell is 4 KiB",
        "hole: 123 pages",
        "zero: 1 pages",
        "as in the base: 3 pages",
        "raw: 2 pages",
        "520 KiB at 0x100000",
        "rom",
    ] {
        assert!(svg.contains(words), "{words:?} is missing: {svg}");
    }
    assert_eq!(made.others(), ["map.svg"], "nothing is left beside it");
    let ended = inspect(&[&made.top.1, Path::new("--map"), &map, Path::new("--verify")]);
    assert!(
        ended.code(0).stdout.contains("map:") && ended.stdout.contains("whole:            yes"),
        "{}",
        ended.stdout
    );
    inspect(&[&made.top.1, Path::new("--map"), &made.base.1]).code(2).says(&["this is the archive, or one"]);
    inspect(&[&made.top.1, Path::new("--map"), Path::new("/none/map.svg")]).code(3).says(&["No such file"]);
}

/// The same memory and state, whatever else.
#[track_caller]
fn assert_equal(first: &Path, second: &Path) {
    inspect(&[first, Path::new("--diff"), second]).code(0);
}

#[test]
fn a_flat_archive_stands_alone_with_every_page_once() {
    let made = made();
    let flat = made.path("flat");
    for (codec, compressed) in [("zstd:3", 4), ("raw", 0), ("zstd", 4)] {
        let args = [
            &made.top.1,
            Path::new("--flatten"),
            &flat,
            Path::new("--codec"),
            Path::new(codec),
            Path::new("--json"),
        ];
        let written = inspect(&args).code(0).json();
        assert_equal(&made.top.1, &flat);
        let found = inspect(&[&flat, Path::new("--verify"), Path::new("--json")]).code(0).json();
        let pages = |kind: &str| found["pages"][kind].as_u64().unwrap();
        assert_eq!(
            (pages("zero"), pages("compressed"), pages("raw")),
            (1, compressed, 8 - compressed),
            "{codec}: {found}"
        );
        assert_eq!(
            (pages("hole"), pages("same"), pages("superseded")),
            (RAM_PAGES as u64 + 2 - 9, 0, 0),
            "{codec}: {found}"
        );
        assert_eq!((&found["base"], &found["features"]), (&Value::Null, &json!(["zstd"])));
        let top = inspect(&[&made.top.1, Path::new("--json")]).code(0).json();
        for same in ["created_s", "machine", "guest", "runs_once_loaded", "regions", "state"] {
            assert_eq!(found[same], top[same], "{same}");
        }
        assert_ne!(found["id"], top["id"]);
        assert_eq!(
            (&written["id"], &written["file_bytes"], &written["pages"]),
            (&found["id"], &found["file_bytes"], &json!(9))
        );
        assert_eq!(written["file_bytes"], std::fs::metadata(&flat).unwrap().size());
    }
    // Without those that it came from.
    let alone = folder();
    let moved = alone.path().join("flat");
    std::fs::copy(&flat, &moved).unwrap();
    let wanted = PathBuf::from(format!("ram={}", alone.path().join("ram").display()));
    inspect(&[&moved, Path::new(EXTRACT), &wanted]).code(0);
    assert_same(&alone.path().join("ram"), &made.ram);
}

#[test]
fn a_large_flat_archive_is_loaded_as_any_other() {
    let job = Job::new(Image::Mixed, 24 * MIB + 5 * PAGE);
    let (archive, flat) = (job.folder.path().join("archive"), job.folder.path().join("flat"));
    let _turn = turn();
    send(&format!("file:{}", archive.display()), &job.from, &["--codec", "raw"]).wait().code(0);
    inspect(&[&archive, Path::new("--flatten"), &flat, Path::new("--codec"), Path::new("zstd:1")]).code(0);
    assert!(flat.metadata().unwrap().len() < archive.metadata().unwrap().len());
    let uri = format!("file:{}", flat.display());
    Ferry::run(["recv", &uri, "--ram-file", job.to.to_str().unwrap()]).code(0);
    job.assert_arrived();
}

#[test]
fn a_guest_goes_on_from_a_flat_archive() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    prove(&spec, &[&source]);
    let (archive, flat) = (world.path("archive"), world.path("flat"));
    let saved = source.ctl(&["migrate", &format!("file:{}", archive.display())]);
    assert_eq!(saved.code, Some(0), "{saved:?}");
    inspect(&[&archive, Path::new("--flatten"), &flat]).code(0);
    assert_equal(&archive, &flat);
    let uri = format!("file:{}", flat.display());
    let loaded = Vm::start(&world, "b", &spec, Some(&uri));
    loaded.wait_state("running");
    prove(&spec, &[&source, &loaded]);
}

#[test]
fn damage_is_not_made_part_of_a_new_archive() {
    let made = made();
    let flat = made.path("flat");
    for (code, words, path) in
        [(2, "this is the archive, or one", &made.top.1), (2, "this is the archive", &made.base.1)]
    {
        inspect(&[&made.top.1, Path::new("--flatten"), path]).code(code).says(&[words]);
    }
    let (at, len) = made.top.0.place(5);
    let mut bytes = std::fs::read(&made.top.1).unwrap();
    bytes[at + len - 1] ^= 1;
    std::fs::write(&made.top.1, bytes).unwrap();
    let args = [&made.top.1, Path::new("--flatten"), &flat, Path::new("--json")];
    let found = inspect(&args).code(1).says(&["damaged at offset", "region \"rom\", from 0x1000"]).json();
    assert_eq!(found["status"], "failed");
    assert!(!flat.exists());
}
