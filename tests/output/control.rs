//! The control socket of a `vm`: who may use it, and what becomes of lines that are too long, never end, or are never read.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use testkit::{PATIENCE, wait_for};

use crate::vm::{Ended, PAGEFERRY, Spec, Vm, World, pageferry};

const LINE_MAX: usize = 1 << 20;

#[test]
fn the_control_socket_is_this_users_from_its_first_moment() {
    let world = World::new();
    for umask in ["0", "0777", "0027"] {
        let api = world.path("a.sock");
        let args = |api: &Path| {
            let api = format!("unix:{}", api.display());
            ["vm", "--no-kvm", "--api", &api].map(str::to_owned)
        };
        let script = format!("umask {umask}; exec \"$0\" \"$@\"");
        let mut child = Command::new("strace")
            .args(["-f", "-e", "trace=chmod,fchmod,fchmodat,bind,listen", "-o"])
            .arg(world.path("trace"))
            .args(["sh", "-c", &script, PAGEFERRY])
            .args(args(&api))
            .spawn();
        if child.is_err() {
            // Without strace the order of calls is not seen, but the mode is.
            child = Command::new("sh").args(["-c", &script, PAGEFERRY]).args(args(&api)).spawn();
        }
        let mut child = child.unwrap();
        let mode = wait_for("it listens", PATIENCE, || {
            UnixStream::connect(&api).ok()?;
            Some(api.metadata().unwrap().mode() & 0o777)
        });
        let ended = pageferry(&["ctl", &format!("unix:{}", api.display()), "quit"], PATIENCE);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        child.wait().unwrap();
        assert_eq!(mode, 0o600, "with umask {umask}");
        if let Ok(trace) = std::fs::read_to_string(world.path("trace")) {
            let at = |call: &str| {
                trace
                    .lines()
                    .position(|line| line.contains(call))
                    .unwrap_or_else(|| panic!("{call}: {trace}"))
            };
            assert!(at("chmod") < at("listen("), "{trace}");
        }
    }
}

/// Whether this test can be several users.
fn can_be_others() -> bool {
    let can = nix::unistd::geteuid().is_root() && Vm::can_be_nobody();
    if !can {
        println!("skipped: becoming another user takes root and setpriv");
    }
    can
}

/// Runs the command as this user.
fn as_user(user: u32, args: &[&str]) -> Ended {
    let user = user.to_string();
    let command = ["--reuid", &user, "--regid", &user, "--clear-groups", PAGEFERRY];
    let output = Command::new("setpriv").args(command).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
}

#[test]
fn other_users_are_refused_and_those_who_are_allowed_are_not() {
    if !can_be_others() {
        return;
    }
    let world = World::new();
    let open = |path: &Path| std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    open(world.path("x").parent().unwrap());
    let spec = |more: &[&str]| Spec {
        more: more.iter().map(|&arg| arg.to_owned()).collect(),
        kvm: false,
        ..Spec::counter()
    };
    let closed = world.source("closed", &spec(&[]));
    let ended = as_user(65534, &["ctl", &closed.api(), "status", "--json"]);
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(ended.err.contains("may not connect") && ended.err.contains("--api-allow"), "{ended:?}");

    let shared = world.source("shared", &spec(&["--api-allow", "1234", "--api-allow", "1235"]));
    assert_eq!(shared.api_path().metadata().unwrap().mode() & 0o777, 0o666);
    for user in [1234, 1235] {
        let ended = as_user(user, &["ctl", &shared.api(), "status", "--json"]);
        assert_eq!((ended.code, &ended.json()["state"]), (Some(0), &json!("running")), "{ended:?}");
    }
    for _ in 0..3 {
        let ended = as_user(65534, &["ctl", &shared.api(), "pause", "--json"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let error = ended.json()["error"].as_str().unwrap().to_owned();
        assert!(error.contains("user 65534 may not command this VM, which user 0 runs"), "{error}");
        assert!(error.contains("--api-allow 65534"), "{error}");
    }
    assert_eq!(shared.state(), "running");
    let log = shared.errors();
    let lines = log.lines().filter(|line| line.contains("refused a caller on the control socket")).count();
    assert!((1..=2).contains(&lines), "one a second: {log}");
}

/// A VM's socket, for a client that is not `pageferry ctl`.
fn connect(vm: &Vm) -> UnixStream {
    let stream = UnixStream::connect(vm.api_path()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn answer(stream: &UnixStream) -> Value {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
}

/// A request in a line of so many bytes.
fn long_request(bytes: usize) -> Vec<u8> {
    let mut line = br#"{"execute":"status"}"#.to_vec();
    line.resize(bytes - 1, b' ');
    line.push(b'\n');
    line
}

#[test]
fn a_line_that_is_too_long_or_never_ends_is_refused_and_costs_a_line_of_memory() {
    let world = World::new();
    let vm = world.source("a", &Spec { kvm: false, ..Spec::counter() });
    let stream = connect(&vm);
    for _ in 0..2 {
        (&stream).write_all(&long_request(LINE_MAX)).unwrap();
        assert_eq!(answer(&stream)["return"]["state"], "running");
    }
    (&stream).write_all(&long_request(LINE_MAX + 1)).unwrap();
    assert_eq!(
        answer(&stream)["error"],
        "a request is longer than 1048576 bytes, the end of its line included"
    );
    assert_eq!((&stream).read(&mut [0]).unwrap(), 0, "what follows is no request");

    let endless = connect(&vm);
    let mut sent = 0;
    while (&endless).write_all(&[b'x'; 4096]).is_ok() {
        sent += 4096;
        assert!(sent < 16 * LINE_MAX, "nobody ends it");
    }
    assert!(answer(&endless)["error"].as_str().unwrap().contains("longer than"));
    assert_eq!(vm.state(), "running");
}

#[test]
fn clients_who_never_read_or_never_speak_are_bounded_in_number() {
    let world = World::new();
    let vm = world.source("a", &Spec { kvm: false, ..Spec::counter() });
    let begun = resident(&vm);
    let mut held = Vec::new();
    for count in [64, 40] {
        held.extend((0..count).map(|_| {
            let stream = connect(&vm);
            stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            // Until answers fill what the socket holds, and requests do then.
            while (&stream).write_all(b"{\"execute\":\"status\"}\n").is_ok() {}
            stream
        }));
        assert_eq!(vm.state(), "running", "others are answered meanwhile");
        held.extend((0..100).map(|_| connect(&vm)));
        assert_eq!(vm.state(), "running", "others are answered meanwhile");
    }
    let grown = resident(&vm).saturating_sub(begun);
    assert!(grown < 64 * LINE_MAX, "{grown} bytes");
    let open = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count();
    assert!(open < 64 + 40, "{open} descriptors for {} connections", held.len());
}

fn resident(vm: &Vm) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[test]
fn the_schema_is_printed_without_a_vm_and_other_commands_want_one() {
    let ended = pageferry(&["ctl", "schema"], PATIENCE);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["oneOf"][0]["$ref"], "#/$defs/Request");
    let kept = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/api.schema.json"));
    assert!(
        kept.unwrap_or_default() == ended.out,
        "docs/api.schema.json is not that of the types; make it anew: `pageferry ctl schema > docs/api.schema.json`"
    );
    for args in [&["ctl", "status"][..], &["ctl"]] {
        let ended = pageferry(args, PATIENCE);
        assert_eq!(ended.code, Some(2), "{ended:?}");
    }
    let help = pageferry(&["ctl", "schema", "--help"], PATIENCE);
    assert!(help.out.contains("Example:"), "{help:?}");
}

/// Ends in any case.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_vm_whose_answer_never_ends_is_not_believed() {
    let world = World::new();
    let path = world.path("liar.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let api = format!("unix:{}", path.display());
    let mut ctl = Killed(
        Command::new(PAGEFERRY)
            .args(["ctl", &api, "status"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let (mut stream, _) = listener.accept().unwrap();
    while stream.write_all(&[b'x'; 65536]).is_ok() {}
    let mut said = String::new();
    ctl.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(ctl.0.wait().unwrap().code(), Some(1));
    assert!(said.contains("the VM's answer is longer than 1048576 bytes"), "{said}");
}
