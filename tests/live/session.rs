//! A whole session as an operator has it, line by line: a guest that tests its memory moves, is saved through gzip and through gpg,
//! and is piped back in.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::vm::{PAGEFERRY, Spec, Vm, World, have_kvm, pageferry};

/// The guest prints a dot for each pass over its memory.
fn runs(vm: &Vm) {
    let dots = |vm: &Vm| vm.serial().iter().filter(|&&byte| byte == b'.').count();
    let before = dots(vm);
    wait_for("dots", PATIENCE, || (dots(vm) >= before + 3).then_some(()));
}

fn stands_still(vm: &Vm) {
    let before = vm.serial();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(vm.serial(), before, "it runs on");
}

/// Whether a command is installed; prints where it is not.
fn have(command: &str) -> bool {
    let found = Command::new(command).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped with {command}: it is not installed");
    }
    found
}

#[test]
fn a_session_line_by_line() {
    if !have_kvm() {
        return;
    }
    let world = World::new();
    let spec = Spec { guest: "mem-test".into(), mem_mib: 128, working_set: 32 << 20, ..Spec::counter() };
    let source = world.source("a", &spec);
    runs(&source);
    let (destination, uri) = world.destination("b", &spec);
    // info migrate, before there was one.
    let status = source.ctl(&["status"]);
    assert!(status.out.contains("VM status:        running"), "{status:?}");
    // migrate -d, info migrate
    assert_eq!(source.ctl(&["migrate", &uri, "--detach"]).code, Some(0));
    source.wait_migration(PATIENCE);
    let status = source.ctl(&["status"]).out;
    for field in [
        "Migration status: completed",
        "total time:",
        "downtime:",
        "setup:",
        "transferred ram:",
        "throughput:",
        "remaining ram:    0 kbytes",
        "total ram:        131072 kbytes",
        "duplicate:",
        "unchanged:",
        "normal:",
        "dirty sync count:",
        "page size:        4 kbytes",
    ] {
        assert!(status.contains(field), "no {field} in {status}");
    }
    assert_eq!((source.state().as_str(), destination.state().as_str()), ("migrated", "running"));
    stands_still(&source);
    runs(&destination);
    // stop, migrate_set_speed 4095m, migrate "exec:gzip -c > STATEFILE.gz"
    let file = world.path("STATEFILE.gz");
    let to = format!("exec:gzip -c > {}", file.display());
    assert_eq!(destination.ctl(&["pause"]).code, Some(0));
    let saved = destination.ctl(&["migrate", &to, "--bandwidth", "4095MB/s", "--json"]);
    assert_eq!((saved.code, saved.json()["status"].clone()), (Some(0), json!("completed")), "{saved:?}");
    assert_eq!(destination.state(), "paused");
    // gzip -c -d STATEFILE.gz | … -incoming "exec: cat"; … -incoming "exec: gzip -c -d STATEFILE.gz"; and from a descriptor.
    let unpack = format!("gzip -c -d {}", file.display());
    piped_in(&world, &spec, &unpack, "exec: cat");
    piped_in(&world, &spec, &unpack, "fd:0");
    let loaded = Vm::start(&world, "c", &spec, Some(&format!("exec: {unpack}")));
    loaded.wait_state("paused");
    assert_eq!(loaded.ctl(&["resume"]).code, Some(0));
    runs(&loaded);
    if have("gpg") {
        through_gpg(&world, &spec, &loaded);
    }
    // Into a file, to look at it.
    let path = world.path("mig");
    assert_eq!(loaded.ctl(&["migrate", &format!("exec:cat > {}", path.display())]).code, Some(0));
    looked_at(&path, &spec);
}

/// Loads a guest that a shell pipes in.
fn piped_in(world: &World, spec: &Spec, unpack: &str, uri: &str) {
    let api = world.path("piped.sock");
    let vm = format!(
        "{PAGEFERRY} vm --api unix:{} --guest mem-test --mem {}M --working-set {} --incoming '{uri}'",
        api.display(),
        spec.mem_mib,
        spec.working_set,
    );
    let mut shell = Command::new("sh").args(["-c", &format!("{unpack} | {vm}")]).spawn().unwrap();
    let ctl = |words: &[&str]| {
        let api = format!("unix:{}", api.display());
        let mut args = vec!["ctl", api.as_str()];
        args.extend(words);
        pageferry(&args, PATIENCE)
    };
    wait_for("the guest is there", PATIENCE, || {
        ctl(&["status"]).out.contains("VM status:        paused").then_some(())
    });
    assert_eq!(ctl(&["resume"]).code, Some(0), "{uri}");
    assert_eq!(ctl(&["quit"]).code, Some(0), "{uri}");
    assert!(shell.wait().unwrap().success(), "{uri}");
}

/// Encrypts and decrypts with a key pair of its own.
fn through_gpg(world: &World, spec: &Spec, vm: &Vm) {
    let home = world.path("gnupg");
    std::fs::create_dir(&home).unwrap();
    let gpg = format!("gpg --homedir {} --batch --yes -q --trust-model always", home.display());
    let shell =
        |command: &str| Command::new("sh").args(["-c", command]).stderr(Stdio::null()).status().unwrap();
    if !shell(&format!("{gpg} --passphrase '' --quick-generate-key ferry default default never")).success() {
        return println!("skipped with gpg: it makes no key here");
    }
    assert_eq!(vm.ctl(&["pause"]).code, Some(0));
    let file = world.path("STATEFILE.gpg");
    let saved = vm.ctl(&["migrate", &format!("exec:{gpg} -e -r ferry -o {}", file.display())]);
    assert_eq!(saved.code, Some(0), "{saved:?}");
    let loaded = Vm::start(world, "d", spec, Some(&format!("exec:{gpg} -d {}", file.display())));
    loaded.wait_state("paused");
    assert_eq!(loaded.ctl(&["resume"]).code, Some(0));
    runs(&loaded);
    // Nobody reads the guest's memory out of it.
    let (plain, sealed) = (world.path("plain"), std::fs::read(&file).unwrap());
    assert_eq!(vm.ctl(&["migrate", &format!("file:{}", plain.display())]).code, Some(0));
    assert!(std::fs::read(&plain).unwrap().starts_with(b"PGFARCH1") && !sealed.starts_with(b"PGFARCH1"));
    // It keeps an agent, which ends with its folder.
    shell(&format!("gpgconf --homedir {} --kill all", home.display()));
}

/// What the analyser says of it.
fn looked_at(path: &Path, spec: &Spec) {
    let ended = pageferry(&["inspect", path.to_str().unwrap(), "--json"], PATIENCE);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let text = ended.out;
    assert!(text.contains(&format!("{}", spec.mem_mib << 20)), "{text}");
}
