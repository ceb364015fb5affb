//! Every command with every sink: none ends by it, and none otherwise than it would, but for a result that is lost.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pageferry::transport::wire::Role;
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::proxy::{Proxy, Seen, Verdict};
use crate::sinks::{Sink, Stream, run};
use crate::vm::{Spec, Vm, World, pageferry, prove};

/// Exit code of a command whose result could not be printed.
const NOT_PRINTED: i32 = 6;

/// Runs `args` with every sink that takes nothing. Its exit code is `code`, unless its result is lost to a full disk.
#[track_caller]
fn each_sink(args: &[&str], code: i32, has_result: bool) {
    for sink in [Sink::Closed, Sink::Full] {
        let ended = run(args, Stream::Out, sink);
        let lost = sink == Sink::Full && has_result;
        let expected = if lost && code == 0 { NOT_PRINTED } else { code };
        assert_eq!(ended.code, Some(expected), "{args:?} with {sink:?}: {ended:?}");
        assert_eq!(ended.err.contains("cannot be written to standard output: No space"), lost, "{ended:?}");
    }
    for sink in Sink::ALL {
        let ended = run(args, Stream::Errors, sink);
        assert_eq!(ended.code, Some(code), "{args:?} with {sink:?}: {ended:?}");
        assert_eq!(!ended.out.is_empty(), has_result, "{args:?} with {sink:?}: {ended:?}");
    }
}

#[test]
fn help_and_wrong_arguments() {
    each_sink(&["--help"], 0, true);
    each_sink(&["ctl", "--help"], 0, true);
    each_sink(&["--version"], 0, true);
    each_sink(&["send"], 2, false);
    each_sink(&["send", "--json"], 2, true);
    each_sink(&["vm", "--api", "unix:/nowhere/at/all", "--no-kvm"], 3, false);
}

#[test]
fn every_request() {
    let world = World::new();
    let spec = Spec::counter();
    let vm = world.source("a", &spec);
    let (api, trace) = (vm.api(), world.path("trace"));
    let trace = trace.to_str().unwrap();
    let ctl = |verb: &[&str], code, has_result| {
        let words = [&["ctl", &api], verb].concat();
        each_sink(&words, code, has_result);
        each_sink(&[&words, &["--json"][..]].concat(), code, true);
    };
    ctl(&["status"], 0, true);
    ctl(&["pause"], 0, false);
    ctl(&["resume"], 0, false);
    ctl(&["plan", "--link", "1Gbit", "--seconds", "1"], 0, true);
    ctl(&["record-trace", trace, "--seconds", "1"], 0, true);
    ctl(&["cancel"], 1, false);
    ctl(&["set", "--bandwidth", "1Gbit"], 1, false);
    ctl(&["switchover"], 1, false);
    ctl(&["continue"], 1, false);
    ctl(&["postcopy"], 1, false);
    ctl(&["recover", "unix:/nowhere"], 1, false);
    ctl(&["migrate", "unix:/nowhere"], 3, false);
    prove(&spec, &[&vm]);
    assert_eq!(run(&["ctl", &api, "quit"], Stream::Out, Sink::Closed).code, Some(0));
    assert_eq!(vm.wait_exit(PATIENCE).code(), Some(0));
    ctl(&["status"], 3, false);
}

#[test]
fn memory_that_moves() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (from, to, uri) = (path("from"), path("to"), format!("unix:{}", path("socket")));
    std::fs::write(&from, vec![7; 1 << 20]).unwrap();
    let all =
        [Stream::Out, Stream::Errors].into_iter().flat_map(|stream| Sink::ALL.map(|sink| (stream, sink)));
    // A result that nobody reads is waited for, as every program does; there is nothing else that this could be about.
    for (stream, sink) in all.filter(|&pair| pair != (Stream::Out, Sink::Stalled)) {
        let receiving = {
            let (uri, to) = (uri.clone(), to.clone());
            std::thread::spawn(move || run(&["recv", &uri, "--ram-file", &to, "--json"], stream, sink))
        };
        wait_for("it listens", PATIENCE, || std::path::Path::new(&path("socket")).exists().then_some(()));
        let sent = run(&["send", &uri, "--ram-file", &from, "--json"], stream, sink);
        let received = receiving.join().unwrap();
        let code = if (stream, sink) == (Stream::Out, Sink::Full) { NOT_PRINTED } else { 0 };
        assert_eq!(
            (sent.code, received.code),
            (Some(code), Some(code)),
            "{stream:?} {sink:?}: {sent:?} {received:?}"
        );
        assert!(std::fs::read(&to).unwrap() == std::fs::read(&from).unwrap(), "{stream:?} {sink:?}");
    }
}

#[test]
fn a_bench() {
    for json in [&[][..], &["--json"]] {
        let args =
            ["bench", "--ram", "1M", "--mix", "random", "--runs", "1", "--no-warm-up", "--streams", "1"];
        each_sink(&[&args, json].concat(), 0, true);
    }
}

#[test]
fn a_demo() {
    let (mem, kvm) = (
        ["demo", "--mem", "32M", "--working-set", "1M"],
        if crate::vm::have_kvm() { None } else { Some("--no-kvm") },
    );
    let args: Vec<&str> = mem.into_iter().chain(kvm).collect();
    let _world = World::new();
    for (stream, sink, code) in [
        (Stream::Out, Sink::Closed, 0),
        (Stream::Out, Sink::Full, NOT_PRINTED),
        (Stream::Errors, Sink::Closed, 0),
        (Stream::Errors, Sink::Full, 0),
        (Stream::Errors, Sink::Stalled, 0),
    ] {
        let ended = run(&args, stream, sink);
        assert_eq!(ended.code, Some(code), "{stream:?} {sink:?}: {ended:?}");
    }
}

/// A stranger comes in, and is shown out.
fn stranger(uri: &str) {
    let address = uri.strip_prefix("tcp:").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(&[b'x'; 64]);
    // It may be reset, too.
    let _ = stream.read_to_end(&mut Vec::new());
}

/// A VM whose standard error takes nothing, and that has much to say.
fn vm_with(world: &World, name: &str, spec: &Spec, incoming: Option<&str>, sink: Sink) -> (Vm, impl Sized) {
    let (stdio, reader) = sink.open();
    let vm = Vm::start_with(world, name, spec, incoming, stdio);
    (vm, reader)
}

#[test]
fn a_destination_takes_its_guest_in_whatever_becomes_of_what_it_says() {
    for sink in Sink::ALL {
        let world = World::new();
        let spec = Spec::counter().with(&["--log", "trace"]);
        let (source, _first) = vm_with(&world, "a", &spec, None, sink);
        let (destination, _second) = vm_with(&world, "b", &spec, Some("tcp:127.0.0.1:0"), sink);
        let uri = destination.wait_listening();
        (0..3).for_each(|_| stranger(&uri));
        assert_eq!(destination.state(), "incoming", "{sink:?}");
        let ended = source.ctl(&["migrate", &uri, "--json"]);
        assert_eq!(ended.code, Some(0), "{sink:?}: {ended:?}");
        prove(&spec, &[&source, &destination]);
        for vm in [&source, &destination] {
            vm.signal(libc::SIGTERM);
            assert_eq!(vm.wait_exit(PATIENCE).code(), Some(0), "{sink:?}");
        }
    }
}

#[test]
fn a_guest_in_postcopy_gets_its_pages_whatever_becomes_of_what_is_said() {
    for sink in Sink::ALL {
        let world = World::new();
        let spec = Spec { mem_mib: 128, working_set: 64 << 20, ..Spec::counter() };
        let spec = spec.with(&["--memory", "memfd", "--log", "debug"]);
        let (source, _first) = vm_with(&world, "a", &spec, None, sink);
        let (destination, _second) = vm_with(&world, "b", &spec, Some("tcp:127.0.0.1:0"), sink);
        let uri = destination.wait_listening();
        let fast = Arc::new(AtomicBool::new(false));
        let going = fast.clone();
        let proxy = Proxy::new(&uri, move |seen| {
            if matches!(seen, Seen::Data { role: Role::Postcopy, stream: 1.., .. })
                && !going.load(Ordering::Relaxed)
            {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            Verdict::Pass
        });
        source.begin_migration(&proxy.uri(), &json!({"postcopy_after_rounds": 0, "codec": "raw"}));
        destination.wait_state("running");
        (0..3).for_each(|_| stranger(&uri));
        let status = destination.status();
        assert_eq!(
            status["migration"]["status"], "postcopy-active",
            "{sink:?}: pages must be missing yet: {status}"
        );
        fast.store(true, Ordering::Relaxed);
        assert_eq!(source.wait_migration(PATIENCE)["status"], "completed", "{sink:?}");
        prove(&spec, &[&source, &destination]);
    }
}

#[test]
fn a_console_that_nobody_reads_holds_up_no_migration() {
    let world = World::new();
    let spec = Spec { rate: 0, working_set: 1 << 20, ..Spec::counter() };
    let (stdio, _reader) = Sink::Stalled.open();
    let source = Vm::start_on_console(&world, "a", &spec, stdio);
    source.wait_state("running");
    let (destination, uri) = world.destination("b", &spec);
    let ended = source.ctl(&["migrate", &uri, "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    wait_for("the guest goes on", PATIENCE, || (destination.serial().len() > 100).then_some(()));
}

#[test]
fn a_log_goes_to_its_file_as_lines_or_objects_and_a_full_disk_ends_nothing() {
    let world = World::new();
    let (text, json_lines) = (world.path("log"), world.path("log.json"));
    let (text, json_lines) = (text.to_str().unwrap(), json_lines.to_str().unwrap());
    let spec = Spec::counter();
    let source = world.source("a", &spec.clone().with(&["--log", "trace", "--log-file", "/dev/full"]));
    let more = ["--log", "info", "--log-file", json_lines, "--log-format", "json"];
    let (destination, uri) = world.destination("b", &spec.clone().with(&more));
    stranger(&uri);
    assert_eq!(source.ctl(&["migrate", &uri]).code, Some(0));
    prove(&spec, &[&source, &destination]);
    // Users see what they saw before.
    assert!(destination.errors().contains("pageferry: listening on tcp:"), "{}", destination.errors());
    assert!(
        destination.errors().contains("pageferry: refused a connection from"),
        "{}",
        destination.errors()
    );
    assert!(!destination.errors().contains("migration: "), "{}", destination.errors());
    destination.signal(libc::SIGTERM);
    assert_eq!(destination.wait_exit(PATIENCE).code(), Some(0));
    let log = std::fs::read_to_string(json_lines).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said = |part: &str, words: &str| {
        lines.iter().any(|l| {
            l["target"] == part && l["level"] == "info" && l["message"].as_str().unwrap().contains(words)
        })
    };
    assert!(said("vm", "listening on"), "{log}");
    assert!(said("vm", "refused a connection"), "{log}");
    assert!(said("engine::progress", "migration: Completed"), "{log}");
    // A part alone, as text; nothing of others.
    let ended = pageferry(&["recv", "tcp:127.0.0.1:99999", "--anon"], PATIENCE);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let file = world.path("ram");
    std::fs::write(&file, vec![1; 4096]).unwrap();
    let send = ["send", "unix:/nowhere", "--ram-file", file.to_str().unwrap()];
    let ended = pageferry(&[&send[..], &["--log", "engine=info", "--log-file", text]].concat(), PATIENCE);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    let log = std::fs::read_to_string(text).unwrap();
    assert!(log.lines().any(|line| line.contains("Z INFO engine::progress: migration: Failed")), "{log}");
    let ended = pageferry(&[&send[..], &["--log", "loud=x"]].concat(), PATIENCE);
    assert!(ended.code == Some(2) && ended.err.contains("use off, error, warn"), "{ended:?}");
}
