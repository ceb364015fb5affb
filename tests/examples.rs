//! The examples are run, as whoever reads them runs them.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use pageferry::pagecopy::layout::Layout;
use pageferry::vmm_shim;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::uffd_log::UffdLog;
use testkit::wait_until;

/// Builds an example, unless it is there, and says where.
fn built(name: &str) -> PathBuf {
    // This test is TARGET/PROFILE/deps/examples-HASH.
    let own = std::env::current_exe().unwrap();
    let profile = own.parent().and_then(|deps| deps.parent()).unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--package", "pageferry", "--example", name]);
    cargo.arg("--target-dir").arg(profile.parent().unwrap());
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    if cfg!(feature = "rdma") {
        cargo.args(["--features", "rdma"]);
    }
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(cargo.status().unwrap().success(), "the example {name} does not build");
    profile.join("examples").join(name)
}

/// Runs an example to its end.
fn run(name: &str, args: &[&str]) -> Output {
    let mut child =
        Command::new(built(name)).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&format!("the end of {name}"), Duration::from_secs(120), || {
        child.try_wait().unwrap().is_some()
    });
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Whether KVM is there; prints why not.
fn kvm() -> bool {
    let opened = vmm_shim::kvm::open();
    if let Err(error) = &opened {
        println!("skipped: {error}");
    }
    opened.is_ok()
}

#[test]
fn a_vmm_that_embeds_the_library_loses_nothing() {
    if !kvm() {
        return;
    }
    let output = run("embed", &[]);
    assert!(output.status.success() && said(&output).contains("\nlost 0 pages"), "{}", said(&output));
}

#[test]
fn without_the_log_of_its_devices_it_loses_pages() {
    if !kvm() {
        return;
    }
    let output = run("embed", &["--kvm-log-alone"]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let lost = said(&output)
        .lines()
        .find_map(|line| line.strip_prefix("lost ")?.strip_suffix(" pages")?.parse::<u64>().ok());
    assert!(lost.is_some_and(|pages| pages > 0), "{}", said(&output));
}

#[test]
fn migration_takes_a_vmm_no_more_than_60_lines() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/embed.rs")).unwrap();
    let (_, rest) = text.split_once("// ---- live migration from here ----\n").unwrap();
    let (lines, _) = rest.split_once("// ---- to here ----\n").unwrap();
    let own = |line: &&str| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with("//")
    };
    let count = lines.lines().filter(own).count();
    assert!(count <= 60, "{count} lines");
}

#[test]
fn a_program_without_a_vm_moves_its_shared_memory() {
    let memory = GuestMemory::create(Layout::flat(1 << 20).unwrap(), &Backing::Memfd).unwrap();
    if let Err(error) = UffdLog::new(memory.into()) {
        return println!("skipped: {error}");
    }
    let output = run("shared_memory", &[]);
    let text = said(&output);
    assert!(output.status.success() && text.contains("the other process: right after"), "{text}");
    let steps = text.split("computed ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    assert!(steps.is_some_and(|steps| steps > 0), "it stood still all the time: {text}");
}

/// The guest goes on wherever it is, whatever was cancelled before. What both processes have left in the end is told by longer runs, and by
/// the program's exit code: how much of what is free the allocator keeps differs from one short run to the next.
#[test]
fn a_guest_that_goes_to_and_fro_is_never_lost() {
    let memory = GuestMemory::create(Layout::flat(1 << 20).unwrap(), &Backing::Memfd).unwrap();
    if let Err(error) = UffdLog::new(memory.into()) {
        return println!("skipped: {error}");
    }
    let output = run("endurance", &["--migrations", "12", "--cancelled", "3"]);
    let text = said(&output);
    assert!(text.contains("3 cancelled ones") && text.contains("none of them twice"), "{text}");
    println!("{text}");
}
