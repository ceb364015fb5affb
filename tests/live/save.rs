//! Guests that are saved and loaded: whole, on demand, as of one instant, through commands; and saves that fail.

use std::path::Path;
use std::time::{Duration, Instant};

use pageferry::transport::archive::Archive;
use pageferry::vmm_shim::guests::counter::Side;
use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::common::folder;
use crate::vm::{Spec, Vm, World, pageferry, prove};

/// Whatever a command does is noticed sooner than this: without anything that notices it a save would wait for ever.
const SOON: Duration = Duration::from_secs(10);

fn file(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// A VM that loads `uri`, once its guest runs.
fn load(world: &World, name: &str, spec: &Spec, uri: &str) -> Vm {
    let vm = Vm::start(world, name, spec, Some(uri));
    vm.wait_state("running");
    vm
}

/// Saves the guest to `uri`; returns the report.
#[track_caller]
fn save(vm: &Vm, uri: &str, more: &[&str]) -> Value {
    let mut args = vec!["migrate", uri, "--json"];
    args.extend(more);
    let ended = vm.ctl(&args);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!((&report["status"], &report["verified"]), (&json!("completed"), &json!(true)), "{report}");
    report
}

#[test]
fn a_guest_is_saved_while_it_runs_and_goes_on_where_it_is_loaded() {
    let world = World::new();
    let spec = Spec { cpus: 2, ..Spec::counter() };
    let source = world.source("a", &spec);
    let path = world.path("vm.pferry");
    let report = save(&source, &file(&path), &[]);
    assert_eq!(source.state(), "paused");
    assert_eq!(report["wire_bytes"], path.metadata().unwrap().len());
    assert!(report["rounds"].as_u64().is_some_and(|rounds| rounds >= 2), "{report}");
    let loaded = load(&world, "b", &spec, &file(&path));
    prove(&spec, &[&source, &loaded]);
    drop(loaded);
    // It can be loaded as often as one likes, and runs before its pages are there.
    let vm = Spec { more: vec!["--on-demand".into()], ..spec.clone() };
    let again = load(&world, "c", &vm, &file(&path));
    prove(&spec, &[&source, &again]);
    let report = again.wait_migration(PATIENCE);
    assert_eq!((&report["status"], &report["postcopy"]["pages_left"]), (&json!("completed"), &json!(0)));
    // Whoever saved it has it still, and may let it go on.
    drop(again);
    assert_eq!(source.ctl(&["resume"]).code, Some(0));
    prove(&spec, &[&source]);
}

#[test]
fn a_guest_that_was_paused_is_loaded_paused_and_one_that_is_to_run_on_does() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let report = save(&source, &file(&world.path("1")), &["--resume"]);
    assert_eq!(source.state(), "running");
    assert!(report["downtime_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{report}");
    prove(&spec, &[&source]);
    assert_eq!(source.ctl(&["pause"]).code, Some(0));
    let report = save(&source, &file(&world.path("2")), &["--resume"]);
    assert_eq!((source.state().as_str(), &report["pages"]["unchanged"]), ("paused", &json!(0)), "{report}");
    let loaded = Vm::start(&world, "b", &spec, Some(&file(&world.path("2"))));
    loaded.wait_state("paused");
    assert_eq!(loaded.ctl(&["resume"]).code, Some(0));
    prove(&spec, &[&source, &loaded]);
}

/// What the loaded guest prints goes on from a point of what the source printed, which runs on itself.
#[track_caller]
fn assert_of_one_instant(spec: &Spec, source: &Vm, loaded: &Vm) {
    let enough = |vm: &Vm| Some(vm.serial()).filter(|serial| serial.len() > 400);
    let restored = wait_for("the loaded guest prints", PATIENCE, || enough(loaded));
    let begins = &restored[..200];
    let (at, original) = wait_for("the source has printed the same", PATIENCE, || {
        let original = source.serial();
        let at = original.windows(begins.len()).position(|part| part == begins)?;
        Some((at, original))
    });
    let mut checker = spec.checker();
    checker.feed(Side::Source, &original[..at]).unwrap();
    checker.feed(Side::Destination, &restored).unwrap();
    assert!(checker.passes().iter().all(|(_, passes)| *passes >= 2), "{:?}", checker.passes());
}

#[test]
fn a_snapshot_holds_one_instant_of_a_guest_that_runs_on() {
    let world = World::new();
    // Its memory is written all over, again and again, while it is saved.
    let spec = Spec { mem_mib: 256, working_set: 96 << 20, rate: 0, ..Spec::counter() };
    if !spec.kvm {
        return println!("skipped: a snapshot of threads that write has nobody to stop them");
    }
    let source = world.source("a", &spec);
    wait_for("a pass", PATIENCE, || (source.serial().len() > 60).then_some(()));
    let path = world.path("vm.pferry");
    let report = save(&source, &file(&path), &["--snapshot"]);
    assert_eq!(source.state(), "running");
    assert_eq!((&report["rounds"], &report["pages"]["unchanged"]), (&json!(1), &json!(0)), "{report}");
    let loaded = load(&world, "b", &spec, &file(&path));
    assert_of_one_instant(&spec, &source, &loaded);
    // No page is in it twice.
    let archive = Archive::open(&path).unwrap();
    assert!(archive.newest().iter().zip(archive.entries()).all(|(newest, entry)| *newest == entry.pages));
    // The same beside an older one, from which most of it has changed.
    let second = world.path("vm2.pferry");
    let base = path.to_str().unwrap();
    let report = save(&source, &file(&second), &["--snapshot", "--base", base]);
    assert!(report["pages"]["unchanged"].as_u64().is_some_and(|pages| pages > 0), "{report}");
    drop(loaded);
    let loaded = load(&world, "c", &spec, &file(&second));
    assert_of_one_instant(&spec, &source, &loaded);
}

#[test]
fn an_archive_stands_on_an_older_one() {
    let world = World::new();
    let spec = Spec { mem_mib: 128, ..Spec::counter() };
    let source = world.source("a", &spec);
    let (first, second) = (world.path("1"), world.path("2"));
    save(&source, &file(&first), &["--resume"]);
    prove(&spec, &[&source]);
    let report = save(&source, &file(&second), &["--base", first.to_str().unwrap()]);
    assert!(report["pages"]["unchanged"].as_u64().is_some_and(|pages| pages > 100), "{report}");
    let loaded = load(&world, "b", &spec, &file(&second));
    prove(&spec, &[&source, &loaded]);
    drop(loaded);
    std::fs::rename(&first, world.path("moved")).unwrap();
    let base = world.path("moved");
    let moved = spec.clone().with(&["--on-demand", "--base", base.to_str().unwrap()]);
    let loaded = load(&world, "c", &moved, &file(&second));
    prove(&spec, &[&source, &loaded]);
}

#[test]
fn commands_take_a_guest_and_give_it_back() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let path = world.path("vm.gz");
    save(&source, &format!("exec:gzip -1 > {}", path.display()), &[]);
    let loaded = load(&world, "b", &spec, &format!("exec: gzip -c -d {}", path.display()));
    prove(&spec, &[&source, &loaded]);
}

/// A command that fails in whatever way leaves a guest that runs on, and the reason.
#[test]
fn a_command_that_fails_leaves_the_guest_running() {
    let world = World::new();
    // More than a pipe holds.
    let spec = Spec { mem_mib: 128, working_set: 64 << 20, rate: 0, ..Spec::counter() };
    let source = world.source("a", &spec);
    wait_for("a pass", PATIENCE, || (source.serial().len() > 30).then_some(()));
    for (command, words) in [
        ("cat > /dev/null; echo no more tape >&2; exit 3", &["exited with 3", "no more tape"][..]),
        ("head -c 100000 > /dev/null", &["exited with 0", "before it had read everything"]),
        ("sleep 0", &["before it had read everything"]),
        ("/nowhere/gzip", &["exited with 127", "installed"]),
        ("kill -9 $$", &["SIGKILL"]),
        // Its input is closed, and it runs on.
        ("exec 0<&-; sleep 1000", &["closed its input"]),
    ] {
        let begun = Instant::now();
        let ended = source.ctl(&["migrate", &format!("exec:{command}"), "--codec", "raw"]);
        assert_eq!(ended.code, Some(1), "{command}: {ended:?}");
        assert!(words.iter().all(|word| ended.err.contains(word)), "{command}: {}", ended.err);
        assert_eq!(source.state(), "running", "{command}");
        assert!(begun.elapsed() < SOON, "{command}: {:?}", begun.elapsed());
    }
    // One that never reads is cancelled.
    source.begin_migration("exec:sleep 1000", &json!({}));
    wait_for("pages move", PATIENCE, || (source.status()["migration"]["status"] == "active").then_some(()));
    let asked = Instant::now();
    assert_eq!(source.ctl(&["cancel"]).code, Some(0));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "cancelled", "{report}");
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
    assert_eq!(source.state(), "running");
    prove(&spec, &[&source]);
    // Nothing of all that is left.
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", source.pid()));
    assert_eq!(children.unwrap_or_default().trim(), "");
}

/// The same of commands that an archive comes from.
#[test]
fn a_command_that_gives_no_archive_is_noticed_soon() {
    let folder = folder();
    let (ram, archive) = (folder.path().join("ram"), folder.path().join("vm.pferry"));
    std::fs::write(&ram, (0..8u32 << 20).map(|at| (at / 4099) as u8).collect::<Vec<_>>()).unwrap();
    let (ram, archive) = (ram.to_str().unwrap(), archive.to_str().unwrap());
    let saved = pageferry(&["send", &format!("file:{archive}"), "--ram-file", ram], PATIENCE);
    assert_eq!(saved.code, Some(0), "{saved:?}");
    for (command, words) in [
        ("exit 4".to_owned(), &["exited with 4"][..]),
        (format!("head -c 50000 {archive}"), &["ended after"]),
        (format!("head -c 50000 {archive}; exec 1>&-; sleep 1000"), &["ended"]),
        (format!("cat {archive}; echo broken >&2; exit 3"), &["exited with 3", "broken"]),
        (format!("head -c 50000 {archive}; kill -9 $$"), &["SIGKILL"]),
        (format!("cat {archive} {archive}"), &["more"]),
    ] {
        let begun = Instant::now();
        let ended = pageferry(&["recv", &format!("exec:{command}"), "--anon"], PATIENCE);
        assert_eq!(ended.code, Some(1), "{command}: {ended:?}");
        assert!(words.iter().all(|word| ended.err.contains(word)), "{command}: {}", ended.err);
        assert!(begun.elapsed() < SOON, "{command}: {:?}", begun.elapsed());
    }
    // One that never gives anything, or never ends after it gave all, is cancelled.
    for command in ["sleep 1000".to_owned(), format!("cat {archive}; exec 1>&-; sleep 1000")] {
        let begun = folder.path().join("begun");
        let uri = format!("exec:touch {}; {command}", begun.display());
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_pageferry"));
        let mut child =
            child.args(["recv", &uri, "--anon"]).stderr(std::process::Stdio::null()).spawn().unwrap();
        wait_for("the command runs", PATIENCE, || begun.exists().then_some(()));
        std::fs::remove_file(&begun).unwrap();
        crate::vm::send_signal(child.id() as i32, 2);
        let asked = Instant::now();
        let status = wait_for("it ends", PATIENCE, || child.try_wait().unwrap());
        assert!(!status.success() && asked.elapsed() < SOON, "{command}: {status}, {:?}", asked.elapsed());
    }
}

/// The file is as it was, whatever became of who loads it.
#[test]
fn a_load_on_demand_that_is_killed_can_be_begun_again() {
    let world = World::new();
    // A pass over its working set takes some seconds.
    let spec = Spec { mem_mib: 512, working_set: 256 << 20, ..Spec::counter() };
    let source = world.source("a", &spec);
    wait_for("all of it was written", PATIENCE, || (source.serial().len() > 20).then_some(()));
    let path = world.path("vm.pferry");
    save(&source, &file(&path), &["--codec", "raw"]);
    let on_demand = spec.clone().with(&["--on-demand"]);
    let mut unfinished = 0;
    for run in 0..4 {
        let vm = load(&world, &format!("b{run}"), &on_demand, &file(&path));
        let left = vm.status()["migration"]["postcopy"]["pages_left"].as_u64();
        vm.kill();
        unfinished += u64::from(left.is_some_and(|left| left > 0));
    }
    assert!(unfinished != 0, "no load was killed before all pages were there");
    for (name, spec) in [("c", &spec), ("d", &on_demand)] {
        let loaded = load(&world, name, spec, &file(&path));
        prove(spec, &[&source, &loaded]);
    }
}

/// A destination that has an archive of the guest takes what is the same from there.
#[test]
fn a_guest_comes_to_a_host_that_has_an_older_copy_of_it() {
    let world = World::new();
    // A pass over its working set takes seconds: little of it is another when it is moved.
    let spec = Spec { mem_mib: 128, working_set: 16 << 20, rate: 1000, ..Spec::counter() };
    let source = world.source("a", &spec);
    wait_for("all of it was written", PATIENCE, || (source.serial().len() > 30).then_some(()));
    let path = world.path("older");
    save(&source, &file(&path), &["--resume"]);
    let warm = spec.clone().with(&["--base", path.to_str().unwrap()]);
    let (destination, uri) = world.destination("b", &warm);
    let report = save(&source, &uri, &[]);
    let pages = &report["pages"];
    assert!(pages["unchanged"].as_u64().is_some_and(|pages| pages > 100), "{report}");
    destination.wait_state("running");
    prove(&spec, &[&source, &destination]);
}

/// Killed at any moment, a save leaves no file that loads, and nothing under the archive's name. `PAGEFERRY_SAVE_KILLS` is how often that
/// is tried.
#[test]
fn a_save_that_is_killed_leaves_nothing_that_loads() {
    let runs = std::env::var("PAGEFERRY_SAVE_KILLS").map_or(6, |runs| runs.parse().unwrap());
    let spec = Spec { mem_mib: 64, working_set: 32 << 20, rate: 0, ..Spec::counter() };
    let mut whole = 0;
    for run in 0..runs {
        let world = World::new();
        let source = world.source("a", &spec);
        let folder = folder();
        let path = folder.path().join("vm.pferry");
        source.begin_migration(&file(&path), &json!({"bandwidth": 20_000_000, "codec": "raw"}));
        // Some 2 s, at that rate.
        std::thread::sleep(Duration::from_millis(1800 * run / runs));
        source.kill();
        for left in std::fs::read_dir(folder.path()).unwrap() {
            let left = left.unwrap().path();
            // Under its name is nothing, or all of it: it may have been done already.
            let opened = Archive::open(&left);
            assert_eq!(opened.is_ok(), left == path, "run {run}: {}", left.display());
            whole += u64::from(left == path);
        }
    }
    assert!(whole < runs, "none was killed before it was done");
}

#[test]
fn what_cannot_be_is_said_before_the_guest_is_touched() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let path = world.path("vm.pferry");
    std::fs::write(world.path("text"), "no archive of anything").unwrap();
    let text = world.path("text");
    for (args, word) in [
        (vec!["migrate", "file:/nowhere/vm.pferry"], "/nowhere"),
        (vec!["migrate", "fd:77"], "fd:77 is not open"),
        (vec!["migrate", &file(&path), "--postcopy-after-rounds", "1"], "postcopy"),
        (vec!["migrate", &file(&path), "--codec", "delta"], "deltas"),
        (vec!["migrate", &file(&path), "--pause-before-switchover"], "nothing is handed over"),
        (vec!["migrate", &file(&path), "--base", text.to_str().unwrap()], "no archive"),
        (vec!["migrate", "exec:cat", "--base", text.to_str().unwrap()], "base"),
    ] {
        let ended = source.ctl(&args);
        assert!(ended.code != Some(0) && ended.err.contains(word), "{args:?}: {ended:?}");
        assert_eq!(source.state(), "running", "{args:?}");
    }
    assert!(!path.exists());
    save(&source, &file(&path), &[]);
    let api = format!("unix:{}", world.path("b.sock").display());
    for (mem, uri, more, word) in [
        ("32M", file(&path), &[][..], "memory"),
        ("64M", file(&text), &[], "no archive of pageferry's"),
        ("64M", file(&world.path("none")), &[], "cannot open"),
        ("64M", "exec:exit 4".into(), &[], "exited with 4"),
        ("64M", format!("exec:cat {}", path.display()), &["--on-demand"], "on demand"),
    ] {
        let mut args = vec!["vm", "--api", &api, "--mem", mem, "--working-set", "4M", "--incoming", &uri];
        args.extend(more);
        if !spec.kvm {
            args.push("--no-kvm");
        }
        let ended = pageferry(&args, PATIENCE);
        assert!(ended.code == Some(1) && ended.err.contains(word), "{uri}: {ended:?}");
    }
}
