//! What commands and requests answer that cannot be done.

use std::io::{BufRead, BufReader};
use std::process::Command;

use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::vm::{Ended, PAGEFERRY, Spec, Vm, World, pageferry};

/// A command ended with `code`, and its one JSON object says why in these words.
#[track_caller]
fn fails(ended: &Ended, code: i32, status: &str, words: &str) {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    let object = ended.json();
    assert_eq!(object["status"], status, "{ended:?}");
    assert!(object["error"].as_str().unwrap().contains(words), "{ended:?}");
    assert!(ended.err.contains(words), "people are told, too: {ended:?}");
}

#[test]
fn with_json_everything_that_fails_is_one_object() {
    let world = World::new();
    let vm = world.source("a", &Spec::counter());
    fails(&vm.ctl(&["cancel", "--json"]), 1, "failed", "no migration is under way");
    let nobody = vm.ctl(&["migrate", "tcp:127.0.0.1:1", "--json"]);
    fails(&nobody, 3, "failed", "no destination listens there");
    assert_eq!(vm.ctl(&["migrate", "tcp:127.0.0.1:1"]).code, Some(3), "as `send` has it");
    let run = |args: &[&str]| pageferry(args, PATIENCE);
    fails(&run(&["ctl", "unix:/nowhere", "status", "--json"]), 3, "failed", "no VM answers");
    fails(&run(&["ctl", "unix:/nowhere", "--json", "dance"]), 2, "failed", "unrecognized subcommand");
    fails(&run(&["send", "--json", "unix:/nowhere"]), 2, "failed", "--ram-file");
    fails(
        &run(&["recv", "--json", "unix:/nowhere/at/all", "--anon"]),
        3,
        "failed",
        "its folder does not exist",
    );
    fails(&run(&["bench", "--json", "--image", "/nowhere"]), 3, "failed", "/nowhere");
    fails(&run(&["demo", "--json", "--mem", "1K"]), 2, "failed", "at least 16M");
}

#[test]
fn a_destination_that_is_ended_before_a_source_came_was_cancelled() {
    let world = World::new();
    let uri = format!("unix:{}", world.path("socket").display());
    let mut child = Command::new(PAGEFERRY)
        .args(["recv", &uri, "--anon", "--json"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("listening on unix:"), "{line}");
    crate::vm::send_signal(child.id().try_into().unwrap(), libc::SIGINT);
    let code = wait_for("it ends", PATIENCE, || child.try_wait().unwrap());
    assert_eq!(code.code(), Some(130));
    let mut out = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut out).unwrap();
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["status"], "cancelled", "{report}");
    assert_eq!(report["error"], "cancelled", "{report}");
}

#[test]
fn memory_that_cannot_be_is_a_wrong_argument() {
    for bad in ["0", "1K", "4097", "16777217"] {
        for command in [&["vm", "--api", "unix:/nowhere/x", "--mem", bad][..], &["demo", "--mem", bad]] {
            let ended = pageferry(command, PATIENCE);
            assert_eq!(ended.code, Some(2), "{ended:?}");
            assert!(ended.err.contains("a multiple of 4096 and at least 16M"), "{ended:?}");
        }
    }
}

#[test]
fn requests_with_fields_that_they_lack_are_refused_by_name() {
    let world = World::new();
    let vm = world.source("a", &Spec::counter());
    for (request, field) in [
        (json!({"execute": "migrate", "uri": "unix:/nowhere", "bandwith": 1}), "bandwith"),
        (json!({"execute": "set", "downtime_limit": 1}), "downtime_limit"),
        (json!({"execute": "status", "verbose": true}), "verbose"),
        (json!({"execute": "quit", "forced": true}), "forced"),
    ] {
        let error = vm.ask(&request).unwrap_err();
        assert!(error.contains(&format!("unknown field `{field}`")), "{request}: {error}");
    }
    assert_eq!(vm.state(), "running");
}

#[test]
fn a_pipe_is_refused_where_a_file_is_wanted_and_nobody_waits_for_its_other_end() {
    let world = World::new();
    let fifo = world.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let (fifo, api) = (fifo.to_str().unwrap(), format!("unix:{}", world.path("api").display()));
    let memory = format!("file:{fifo}");
    for args in [
        &["send", "unix:/nowhere", "--ram-file", fifo][..],
        &["recv", &api, "--ram-file", fifo],
        &["vm", "--no-kvm", "--api", &api, "--memory", &memory],
        &["vm", "--no-kvm", "--api", &api, "--serial", fifo],
        &["vm", "--no-kvm", "--api", &api, "--log-file", fifo],
        &["bench", "--image", fifo],
        &["bench", "--trace", fifo],
    ] {
        let ended = pageferry(args, PATIENCE);
        assert_eq!(ended.code, Some(3), "{args:?}: {ended:?}");
        assert!(
            ended.err.contains(fifo) && (ended.err.contains("pipe") || ended.err.contains("regular file")),
            "{args:?}: {ended:?}"
        );
    }
}

#[test]
fn a_guest_that_is_gone_is_not_forced_by_what_cannot() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (_destination, uri) = world.destination("b", &spec);
    assert_eq!(source.ctl(&["migrate", &uri]).code, Some(0));
    let trace = world.path("trace");
    for request in [&["plan", "--link", "1Gbit"][..], &["record-trace", trace.to_str().unwrap()], &["pause"]]
    {
        let ended = source.ctl(request);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.err.contains("was migrated away") && !ended.err.contains("--force"), "{ended:?}");
    }
    let ended = source.ctl(&["resume"]);
    assert!(ended.err.contains("--force overrides"), "{ended:?}");
}

#[test]
fn a_demo_whose_destination_knows_the_reason_tells_it() {
    if !nix::unistd::geteuid().is_root() || !Vm::can_be_nobody() {
        return println!("skipped: becoming another user takes root and setpriv");
    }
    let demo = ["demo", "--no-kvm", "--mem", "32M", "--working-set", "1M", "--postcopy", "--json"];
    let ended = Vm::as_nobody(&demo);
    if ended.code == Some(0) {
        return println!("skipped: this host lets every user have postcopy");
    }
    fails(&ended, 1, "failed", "the destination said: no postcopy here");
    assert!(ended.err.contains("vm.unprivileged_userfaultfd"), "{ended:?}");
}
