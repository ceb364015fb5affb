//! `pageferry ctl` and the control socket: what it does, and what it refuses.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::kill::slow;
use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{Ended, Spec, Vm, World, pageferry, prove};

/// Asserts that a command was refused, in words that hold all of these.
fn refused(ended: &Ended, words: &[&str]) {
    ends(ended, 1, words);
}

/// The same of one that found nobody to migrate to.
fn not_started(ended: &Ended, words: &[&str]) {
    ends(ended, 3, words);
}

fn ends(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    for word in words {
        assert!(ended.err.contains(word), "{word:?} is missing: {ended:?}");
    }
}

#[test]
fn pause_resume_status_quit() {
    let world = World::new();
    let spec = Spec::counter();
    let vm = world.source("a", &spec);
    prove(&spec, &[&vm]);
    assert_eq!(vm.ctl(&["pause"]).code, Some(0));
    assert_eq!(vm.ctl(&["pause"]).code, Some(0), "pausing twice is no error");
    assert_eq!(vm.ctl(&["status", "--json"]).json()["state"], "paused");
    let printed = vm.serial();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(vm.serial(), printed, "a paused guest prints nothing");
    assert_eq!(vm.ctl(&["resume", "--json"]).json()["status"], "ok");
    assert_eq!(vm.ctl(&["resume"]).code, Some(0));
    prove(&spec, &[&vm]);
    let status = vm.ctl(&["status"]);
    assert!(status.out.contains("running") && status.out.contains("counter, 1 vCPUs, 64 MiB"), "{status:?}");
    refused(&vm.ctl(&["cancel"]), &["no migration is under way"]);
    assert_eq!(vm.ctl(&["quit"]).code, Some(0));
    assert_eq!(vm.wait_exit(PATIENCE).code(), Some(0));
    assert_eq!(vm.errors(), "");
    assert_eq!(vm.ctl(&["status"]).code, Some(3));
    assert!(!vm.api_path().exists(), "the control socket stays behind");
}

#[test]
fn migrating_to_nobody_fails_and_the_guest_runs_on() {
    let world = World::new();
    let spec = Spec::counter();
    let vm = world.source("a", &spec);
    let nowhere = format!("unix:{}", world.path("nobody").display());
    for uri in ["tcp:127.0.0.1:1", &nowhere] {
        let ended = vm.ctl(&["migrate", uri]);
        not_started(&ended, &["runs on at the source", "no destination listens there"]);
        assert_eq!(vm.state(), "running");
    }
    prove(&spec, &[&vm]);
    assert_eq!(vm.ctl(&["migrate", "tcp:127.0.0.1"]).code, Some(2), "not a URI");
}

#[test]
fn a_guest_that_does_not_fit_is_refused_and_the_right_one_taken() {
    let world = World::new();
    let spec = Spec::counter();
    let (destination, uri) = world.destination("b", &spec);
    let bigger = Spec { mem_mib: 96, ..spec.clone() };
    let wider = Spec { cpus: 2, ..spec.clone() };
    for (i, (spec, option)) in [(bigger, "--mem"), (wider, "--cpus")].into_iter().enumerate() {
        let wrong = world.source(&format!("wrong{i}"), &spec);
        refused(
            &wrong.ctl(&["migrate", &uri]),
            &["runs on at the source", "start it with the source's", option],
        );
        assert_eq!(wrong.state(), "running");
        prove(&spec, &[&wrong]);
        assert!(destination.errors().contains(option), "{}", destination.errors());
        assert_eq!(destination.state(), "incoming");
    }
    // Neither memory alone nor a stranger is what it waits for.
    let file = world.path("ram");
    std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
    let sent = pageferry(&["send", &uri, "--ram-file", file.to_str().unwrap()], PATIENCE);
    assert_ne!(sent.code, Some(0), "{sent:?}");
    let right = world.source("a", &spec);
    let ended = right.ctl(&["migrate", &uri]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    prove(&spec, &[&right, &destination]);
}

#[test]
fn a_destination_that_is_busy_refuses_a_second_source() {
    let world = World::new();
    let spec = Spec::counter();
    let (first, second) = (world.source("a", &spec), world.source("z", &spec));
    let (destination, uri) = world.destination("b", &spec);
    let proxy = slow(&uri, 1_000_000);
    first.begin_migration(&proxy.uri(), &json!({}));
    wait_for("pages move", PATIENCE, || (first.status()["migration"]["status"] == "active").then_some(()));
    refused(&second.ctl(&["migrate", &uri]), &["already serves a session", "runs on at the source"]);
    prove(&spec, &[&second]);
    assert_eq!(first.wait_migration(PATIENCE)["status"], "completed");
    prove(&spec, &[&first, &destination]);
}

#[test]
fn cancel_is_answered_at_once_and_the_guest_runs_on() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    // Before anything moves, among pages, and with a stream that is stuck.
    for (i, bytes_per_s) in [1_000_000, 100_000, 1000].into_iter().enumerate() {
        let (destination, uri) = world.destination(&format!("b{i}"), &spec);
        let proxy = slow(&uri, bytes_per_s);
        // Nothing but the cancel ends it within the test's patience.
        source.begin_migration(&proxy.uri(), &json!({"link_timeout_s": 300}));
        wait_for("pages move", PATIENCE, || {
            (source.status()["migration"]["status"] == "active").then_some(())
        });
        std::thread::sleep(Duration::from_millis(200));
        refused(&source.ctl(&["pause"]), &["a migration is under way"]);
        refused(&source.ctl(&["migrate", &uri]), &["a migration is under way already"]);
        assert_eq!(source.ask(&json!({"execute": "cancel"})), Ok(Value::Null));
        let report = source.wait_migration(PATIENCE);
        assert_eq!(report["status"], "cancelled", "{report}");
        assert_eq!(source.state(), "running");
        prove(&spec, &[&source]);
        assert_eq!(destination.wait_exit(PATIENCE).code(), Some(1));
        assert!(destination.errors().contains("cancelled"), "{}", destination.errors());
        assert!(destination.serial().is_empty());
    }
    let (destination, uri) = world.destination("b", &spec);
    assert_eq!(source.ctl(&["migrate", &uri]).code, Some(0));
    prove(&spec, &[&source, &destination]);
}

#[test]
fn ctl_migrate_tells_of_a_cancel_by_its_exit_code() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = slow(&uri, 100_000);
    let (source, to) = (std::sync::Arc::new(source), proxy.uri());
    let asking = source.clone();
    let waiting = std::thread::spawn(move || asking.ctl(&["migrate", &to]));
    wait_for("pages move", PATIENCE, || (source.status()["migration"]["status"] == "active").then_some(()));
    assert_eq!(source.ctl(&["cancel"]).code, Some(0));
    let ended = waiting.join().unwrap();
    assert_eq!(ended.code, Some(130), "{ended:?}");
    // A destination is not waited for either: it can be cancelled by itself.
    destination.wait_exit(PATIENCE);
    let (waits, _) = world.destination("c", &spec);
    refused(&waits.ctl(&["resume"]), &["no guest has come in yet"]);
    refused(&waits.ctl(&["migrate", &uri]), &["no guest has come in yet"]);
    assert_eq!(waits.ctl(&["cancel"]).code, Some(0));
    assert_eq!(waits.wait_exit(PATIENCE).code(), Some(1));
}

#[test]
fn a_paused_guest_arrives_paused() {
    let world = World::new();
    let spec = Spec { cpus: 2, ..Spec::counter() };
    let source = world.source("a", &spec);
    prove(&spec, &[&source]);
    assert_eq!(source.ctl(&["pause"]).code, Some(0));
    // A failure leaves it as it was.
    not_started(&source.ctl(&["migrate", "tcp:127.0.0.1:1"]), &["stays paused at the source"]);
    assert_eq!(source.state(), "paused");
    let (destination, uri) = world.destination("b", &spec);
    let ended = source.ctl(&["migrate", &uri]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!((source.state().as_str(), destination.state().as_str()), ("migrated", "paused"));
    std::thread::sleep(Duration::from_millis(200));
    assert!(destination.serial().is_empty());
    refused(&source.ctl(&["resume"]), &["runs at the destination"]);
    assert_eq!(destination.ctl(&["resume"]).code, Some(0));
    prove(&spec, &[&source, &destination]);
}

#[test]
fn from_vm_to_vm_to_vm() {
    let world = World::new();
    let spec = Spec { cpus: 2, ..Spec::counter() };
    let mut vms = vec![world.source("vm0", &spec)];
    for (i, codec) in ["raw", "auto", "delta", "zstd"].into_iter().enumerate() {
        let (next, uri) = world.destination(&format!("vm{}", i + 1), &spec);
        let ended = vms[i].ctl(&["migrate", &uri, "--codec", codec, "--json"]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!((vms[i].state().as_str(), next.state().as_str()), ("migrated", "running"));
        vms.push(next);
    }
    prove(&spec, &vms.iter().collect::<Vec<_>>());
    refused(&vms[0].ctl(&["migrate", "tcp:127.0.0.1:1"]), &["migrated away"]);
}

#[test]
fn a_guest_with_content_takes_it_along() {
    let world = World::new();
    let (text, empty) = (world.path("text"), world.path("empty"));
    let content: String = (0..200_000).map(|i| format!("line {i}\n")).collect();
    std::fs::write(&text, content).unwrap();
    std::fs::write(&empty, "").unwrap();
    let with = |path: &std::path::Path| Spec::counter().with(&["--content", path.to_str().unwrap()]);
    if !Spec::counter().kvm {
        // Threads that stand for a guest have no use for it.
        return;
    }
    let api = format!("unix:{}", world.path("none").display());
    let ended = pageferry(&["vm", "--api", &api, "--content", empty.to_str().unwrap()], PATIENCE);
    assert!(ended.code == Some(3) && ended.err.contains("nothing to fill memory with"), "{ended:?}");
    let spec = with(&text);
    let source = world.source("source", &spec);
    let (destination, uri) = world.destination("destination", &spec);
    let ended = source.ctl(&["migrate", &uri, "--codec", "zstd:1", "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    // All of memory has content, and it shrinks.
    let (logical, wire) = (ended.json()["logical_bytes"].clone(), ended.json()["wire_bytes"].clone());
    let (logical, wire) = (logical.as_u64().unwrap(), wire.as_u64().unwrap());
    assert!(logical > 59 << 20 && wire > 1 << 20 && wire < logical / 2, "{logical} {wire}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn detach_does_not_wait() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = slow(&uri, 1_000_000);
    let ended = source.ctl(&["migrate", &proxy.uri(), "--detach", "--json"]);
    assert_eq!((ended.code, ended.json()["status"].as_str()), (Some(0), Some("ok")));
    assert_eq!(source.state(), "running", "it has only begun");
    assert_eq!(source.wait_migration(PATIENCE)["status"], "completed");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn quitting_in_the_middle_cancels_first() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = slow(&uri, 100_000);
    source.begin_migration(&proxy.uri(), &json!({}));
    wait_for("pages move", PATIENCE, || (source.status()["migration"]["status"] == "active").then_some(()));
    source.signal(libc::SIGTERM);
    assert_eq!(source.wait_exit(PATIENCE).code(), Some(0), "{}", source.errors());
    assert_eq!(destination.wait_exit(PATIENCE).code(), Some(1));
    assert!(destination.errors().contains("the source reports: "), "{}", destination.errors());
    assert!(destination.serial().is_empty());
}

/// Sends bytes to the control socket and returns what it answers until it closes.
fn say(vm: &Vm, bytes: &[u8]) -> String {
    let stream = UnixStream::connect(vm.api_path()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let bytes = bytes.to_vec();
    let writing = std::thread::spawn(move || {
        // It may close before it has read all.
        let _ = writer.write_all(&bytes);
        let _ = writer.shutdown(std::net::Shutdown::Write);
    });
    let mut answer = Vec::new();
    let _ = (&stream).read_to_end(&mut answer);
    writing.join().unwrap();
    String::from_utf8(answer).unwrap()
}

#[test]
fn bad_requests_get_errors_and_harm_nothing() {
    let world = World::new();
    let spec = Spec::counter();
    let vm = world.source("a", &spec);
    let deep = "[".repeat(100_000) + "\n";
    for bad in [
        "\n",
        "hello\n",
        "{}\n",
        "{\"execute\":\"dance\"}\n",
        "{\"execute\":\"migrate\"}\n",
        "{\"execute\":\"migrate\",\"uri\":\"ftp:x\"}\n",
        "{\"execute\":\"migrate\",\"uri\":\"tcp:h:1\",\"streams\":0}\n",
        "{\"execute\":\"migrate\",\"uri\":\"tcp:h:1\",\"streams\":70000}\n",
        "{\"execute\":\"migrate\",\"uri\":\"tcp:h:1\",\"codec\":\"brotli\"}\n",
        "{\"execute\":\"migrate\",\"uri\":\"tcp:h:1\",\"link_timeout_s\":0}\n",
        "{\"execute\":\"resume\",\"force\":\"yes\"}\n",
        &deep,
    ] {
        let answer = say(&vm, bad.as_bytes());
        assert_eq!(answer.lines().count(), 1, "{:?}: {answer:?}", &bad[..bad.len().min(60)]);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["error"].as_str().is_some_and(|e| e.len() > 10), "{bad:?}: {answer}");
    }
    // Not text; and a line that never ends.
    for bad in [&b"\xff\xfe\x00\n"[..], &vec![b'x'; 5 << 20]] {
        let answer = say(&vm, bad);
        assert!(answer.starts_with("{\"error\":"), "{:?}", &answer[..answer.len().min(100)]);
        assert!(answer.len() < 10_000, "{} bytes of answers", answer.len());
    }
    // Several requests on one connection, and one without its line's end.
    let answer = say(&vm, b"{\"execute\":\"pause\"}\n?\n{\"execute\":\"resume\"}\n{\"execute\":\"status\"}");
    let answers: Vec<Value> = answer.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(answers.len(), 4, "{answer}");
    assert!(answers[1]["error"].is_string() && answers[3]["return"]["state"] == "running", "{answer}");
    // Clients that say nothing keep nobody out.
    let silent: Vec<_> = (0..200).map(|_| UnixStream::connect(vm.api_path()).unwrap()).collect();
    assert_eq!(vm.state(), "running");
    drop(silent);
    prove(&spec, &[&vm]);
}

/// The distinct pages of a trace, as docs/operations.md says how to read it; and its intervals.
fn read_trace(bytes: &[u8]) -> (usize, usize) {
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    assert_eq!((&bytes[..8], u32_at(8)), (&b"PFTRACE1"[..], 4096));
    let mut words = vec![0u64; u32_at(12)];
    let mut at = 32;
    for _ in 0..u32_at(24) {
        let entries = u32_at(at + 4);
        at += 8;
        for _ in 0..entries {
            words[u32_at(at)] |= u64::from_le_bytes(bytes[at + 4..at + 12].try_into().unwrap());
            at += 12;
        }
    }
    assert_eq!(at, bytes.len());
    (words.iter().map(|word| word.count_ones() as usize).sum(), u32_at(24))
}

#[test]
fn what_a_guest_writes_is_recorded_and_written_again_by_the_bench() {
    let world = World::new();
    let spec = Spec::counter();
    let vm = world.source("a", &spec);
    prove(&spec, &[&vm]);
    let (file, missing) = (world.path("guest.trace"), world.path("nowhere/guest.trace"));
    let record = ["--seconds", "2", "--interval", "100"];
    let ended = vm.ctl(&[&["record-trace", file.to_str().unwrap(), "--json"][..], &record].concat());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (pages, intervals) = read_trace(&std::fs::read(&file).unwrap());
    assert_eq!(ended.json()["intervals"], intervals, "{ended:?}");
    assert!((2..=21).contains(&intervals), "{intervals} intervals");
    // The working set, again and again, and little else.
    let working_set = (spec.working_set / 4096) as usize;
    assert!((working_set..working_set + 200).contains(&pages), "{pages} pages");
    assert!(ended.json()["pages"].as_u64().is_some_and(|all| all > pages as u64), "{ended:?}");

    // There is one dirty log, and a recording can be ended before its time.
    // It may be over before the guest has written anything.
    let short = world.path("short.trace");
    vm.ask(&json!({"execute": "record-trace", "file": short, "seconds": 600, "interval_ms": 60_000}))
        .unwrap();
    refused(&vm.ctl(&["migrate", "tcp:127.0.0.1:1"]), &["a trace is being recorded"]);
    assert_eq!(vm.ctl(&["cancel"]).code, Some(0));
    wait_for("the recording ends", PATIENCE, || (vm.status()["trace"]["state"] == "done").then_some(()));
    refused(&vm.ctl(&["record-trace", missing.to_str().unwrap()]), &["cannot write the trace"]);
    prove(&spec, &[&vm]);

    let bench = |ram: &str| {
        let trace = ["--trace", file.to_str().unwrap()];
        pageferry(&[&["bench", "--ram", ram, "--digest", "--json"][..], &trace].concat(), PATIENCE)
    };
    let ended = bench("64M");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let run = &ended.json()["rows"][0]["median"];
    assert!(run["writing"]["pages"].as_f64().is_some_and(|pages| pages > 0.0), "{run}");
    refused(
        &bench("2M"),
        &["the trace is of a guest of 64 MiB and writes beyond the 2 MiB here", "--ram 67108864"],
    );
}

#[test]
fn a_control_socket_belongs_to_one_vm() {
    let world = World::new();
    let spec = Spec::counter();
    let vm = world.source("a", &spec);
    let mut args = vec!["vm", "--mem", "16M", "--working-set", "1M"];
    let api = vm.api();
    args.extend(["--api", &api]);
    if !spec.kvm {
        args.push("--no-kvm");
    }
    let second = pageferry(&args, PATIENCE);
    assert_eq!(second.code, Some(3), "{second:?}");
    assert!(second.err.contains("--api"), "{second:?}");
    assert_eq!(vm.state(), "running");
    // One that was left behind by a VM that was killed is taken over.
    vm.kill();
    assert!(vm.api_path().exists());
    let again = Vm::start(&world, "a", &spec, None);
    again.wait_state("running");
    prove(&spec, &[&again]);
}

#[test]
fn a_stuck_receipt_path_is_given_up_in_time() {
    // Receipts vanish, pings do not; either at some time, or as soon as a stream is connected, which can be done again without end.
    for (bytes, reconnect, why) in
        [(1000, "0", "all data streams are lost"), (100, "3", "without anything arriving")]
    {
        let world = World::new();
        let spec = Spec::counter();
        let source = world.source("a", &spec);
        let (destination, uri) = world.destination("b", &spec);
        let proxy = Proxy::new(&uri, move |seen| match seen {
            Seen::Data { by: By::Destination, total, .. } if *total > bytes => Verdict::Lose,
            _ => Verdict::Pass,
        });
        let options = ["--link-timeout", "1", "--reconnect-timeout", reconnect];
        let ended = source.ctl(&[&["migrate", &proxy.uri()][..], &options].concat());
        refused(&ended, &["runs on at the source", why]);
        prove(&spec, &[&source]);
        assert_eq!(destination.wait_exit(PATIENCE).code(), Some(1));
        assert!(destination.serial().is_empty());
    }
}
