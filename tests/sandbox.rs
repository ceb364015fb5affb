//! The sandbox from outside: what the kernel says of commands that listen, and what becomes of requests that it refuses.

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code, reason = "shared with tests/live.rs, of which this is a part")]
#[path = "live/vm.rs"]
mod vm;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use testkit::PATIENCE;

use common::{Ferry, Image, Job, MIB, Recv, send};
use vm::{Spec, Vm, World, prove};

/// What an unprivileged process may have left: it stops vCPUs (CAP_SYS_PTRACE, bit 19) where there is no device for that, and pins
/// memory (CAP_IPC_LOCK, bit 14) for RDMA.
const KEPT_MAX: u64 = 1 << 19 | 1 << 14;

/// The lines of a `/proc/PID/task/TID/status`, of every thread of a process.
fn threads(pid: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status")).ok();
    let fields = |text: String| {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    };
    tasks.filter_map(status).map(fields).collect()
}

fn caps(thread: &BTreeMap<String, String>, set: &str) -> u64 {
    u64::from_str_radix(&thread[set], 16).unwrap()
}

/// Every thread of the process has given up what it can.
#[track_caller]
fn assert_confined(pid: u32) {
    assert_confined_but_for_bounds(pid);
    if nix::unistd::geteuid().is_root() {
        for thread in threads(pid) {
            assert_eq!(caps(&thread, "CapBnd") & !KEPT_MAX, 0, "CapBnd of {thread:?}");
        }
    }
}

/// The same of a user who may not take capabilities out of the bounding set, and does not need to: nothing gives it any.
#[track_caller]
fn assert_confined_but_for_bounds(pid: u32) {
    let threads = threads(pid);
    assert!(threads.len() >= 2, "{threads:?}");
    for thread in &threads {
        assert_eq!(thread["NoNewPrivs"], "1", "{thread:?}");
        assert_eq!(thread["Seccomp"], "2", "{thread:?}");
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(caps(thread, set) & !KEPT_MAX, 0, "{set} of {thread:?}");
        }
    }
}

/// Not one thread but those that write lines has given up anything.
#[track_caller]
fn assert_free(pid: u32) {
    let own = threads(std::process::id()).remove(0);
    for thread in threads(pid).iter().filter(|thread| !thread["Name"].starts_with("print-")) {
        for same in ["NoNewPrivs", "Seccomp", "CapEff", "CapBnd"] {
            assert_eq!(thread[same], own[same], "{same} of {thread:?}");
        }
    }
}

#[test]
fn a_receiver_is_confined_and_takes_memory_in() {
    let job = Job::new(Image::Mixed, 8 * MIB);
    let recv = Recv::start("tcp:127.0.0.1:0", [Path::new("--ram-file"), &job.to]);
    assert_confined(recv.ferry.id());
    send(&recv.uri, &job.from, &[]).wait().code(0);
    recv.ferry.wait().code(0);
    job.assert_arrived();
    let recv = Recv::start("tcp:127.0.0.1:0", ["--anon", "--no-sandbox"]);
    assert_free(recv.ferry.id());
}

#[test]
fn a_vm_is_confined_before_and_after_its_guest_comes_and_sends_it_on() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (there, uri) = world.destination("b", &spec);
    for vm in [&source, &there] {
        assert_confined(vm.pid().cast_unsigned());
        assert_eq!(vm.status()["sandbox"], json!({"mode": "on"}));
    }
    assert_eq!(source.ctl(&["migrate", &uri]).code, Some(0));
    assert_confined(there.pid().cast_unsigned());
    let (back, uri) = world.destination("c", &spec);
    assert_eq!(there.ctl(&["migrate", &uri]).code, Some(0));
    prove(&spec, &[&source, &there, &back]);
    let free = world.source("d", &Spec { more: vec!["--no-sandbox".into()], ..Spec::counter() });
    assert_free(free.pid().cast_unsigned());
    assert_eq!(free.status()["sandbox"], json!({"mode": "off"}));
}

#[test]
fn a_bench_that_listens_is_confined_with_all_that_it_runs() {
    let mut bench = Ferry::start(["bench", "--listen", "tcp:127.0.0.1:0", "--memory", "memfd"]);
    let seen = bench.wait_stderr("listening on ");
    assert_confined(bench.id());
    let uri = seen.lines().find_map(|line| line.split_once("listening on ")).unwrap().1;
    Ferry::run(["bench", uri, "--ram", "4M", "--runs", "1", "--streams", "1", "--json"]).code(0);
}

fn vm_with(world: &World, name: &str, more: &[&str]) -> Vm {
    let more = more.iter().map(|&arg| arg.to_owned()).collect();
    world.source(name, &Spec { more, ..Spec::counter() })
}

fn error(report: &Value) -> &str {
    report["error"].as_str().unwrap_or_default()
}

#[test]
fn a_vm_saves_where_it_may_and_says_how_it_could_elsewhere() {
    let world = World::new();
    let vm = vm_with(&world, "a", &[]);
    let archive = world.path("archive");
    vm.begin_migration(&format!("file:{}", archive.display()), &json!({"resume_after_save": true}));
    assert_eq!(vm.wait_migration(PATIENCE)["status"], "completed");
    // The command of an archive is run, confined like its VM.
    let (said, copy) = (world.path("said"), world.path("copy"));
    let command = format!(
        "exec:grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status > {}; cat > {}",
        said.display(),
        copy.display()
    );
    vm.begin_migration(&command, &json!({"resume_after_save": true}));
    assert_eq!(vm.wait_migration(PATIENCE)["status"], "completed");
    assert_eq!(
        std::fs::read_to_string(&said).unwrap(),
        "CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n"
    );
    // A folder of the system is not for archives.
    for system in ["/usr/pageferry-test.pferry", "/etc/pageferry-test.pferry"] {
        vm.begin_migration(&format!("file:{system}"), &json!({}));
        let report = vm.wait_migration(PATIENCE);
        assert_eq!(report["status"], "failed", "{report}");
        assert!(error(&report).contains("--allow-path"), "{report}");
        assert!(!Path::new(system).exists());
    }
    assert_eq!(vm.state(), "running");
}

#[test]
fn a_strict_vm_saves_where_it_is_told_and_runs_nothing() {
    let (world, allowed) = (World::new(), tempfile::tempdir().unwrap());
    let folder = allowed.path().to_str().unwrap();
    let vm = vm_with(&world, "a", &["--sandbox", "strict", "--allow-path", folder]);
    assert_confined(vm.pid().cast_unsigned());
    assert_eq!(vm.status()["sandbox"]["mode"], "strict");
    let refused = vm.ask(&json!({"execute": "migrate", "uri": "exec:cat > /dev/null"})).unwrap_err();
    assert!(refused.contains("--sandbox strict") && refused.contains("--sandbox on"), "{refused}");
    vm.begin_migration(&format!("file:{}", world.path("elsewhere").display()), &json!({}));
    let report = vm.wait_migration(PATIENCE);
    assert_eq!(report["status"], "failed", "{report}");
    assert!(error(&report).contains("--sandbox strict may be the reason"), "{report}");
    let archive = format!("file:{folder}/archive");
    vm.begin_migration(&archive, &json!({}));
    assert_eq!(vm.wait_migration(PATIENCE)["status"], "completed");
    let spec = Spec { more: vec!["--sandbox".into(), "strict".into()], ..Spec::counter() };
    let loaded = Vm::start(&world, "b", &spec, Some(&archive));
    loaded.wait_state("running");
    prove(&spec, &[&vm, &loaded]);
}

/// As the user nobody, without root's power.
fn as_nobody(args: &[&str]) -> Ferry {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", vm::PAGEFERRY]).args(args);
    Ferry::of(command)
}

#[test]
fn an_ordinary_user_moves_memory_and_guests_and_is_told_what_the_rest_takes() {
    if !nix::unistd::geteuid().is_root() || !Vm::can_be_nobody() {
        return println!("skipped: becoming another user takes root and setpriv");
    }
    let job = Job::new(Image::Mixed, 4 * MIB);
    let folder = job.folder.path();
    std::os::unix::fs::chown(folder, Some(65534), Some(65534)).unwrap();
    std::fs::set_permissions(&job.from, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let [from, to] = [&job.from, &job.to].map(|path| path.to_str().unwrap());
    let recv = Recv::of(as_nobody(&["recv", "tcp:127.0.0.1:0", "--ram-file", to]));
    assert_confined_but_for_bounds(recv.ferry.id());
    as_nobody(&["send", &recv.uri, "--ram-file", from]).wait().code(0);
    recv.ferry.wait().code(0);
    job.assert_arrived();
    as_nobody(&["demo", "--no-kvm", "--mem", "32M", "--working-set", "1M"]).wait().code(0);

    let api = format!("unix:{}/api", folder.display());
    let unprivileged = |path: &str, least: u64| {
        std::fs::read_to_string(path).is_ok_and(|value| value.trim().parse::<u64>().is_ok_and(|n| n >= least))
    };
    if unprivileged("/proc/sys/net/ipv4/ip_unprivileged_port_start", 443) {
        let ended = as_nobody(&["recv", "tcp:127.0.0.1:442", "--anon"]).wait();
        ended.code(3).says(&["net.ipv4.ip_unprivileged_port_start"]);
        assert!(!ended.stderr.contains("sandbox"), "{ended:?}");
    }
    if Path::new("/dev/kvm").exists()
        && as_nobody(&["vm", "--api", "unix:/nowhere/x"]).wait().stderr.contains("/dev/kvm")
    {
        as_nobody(&["vm", "--api", &api]).wait().code(3).says(&["usermod -aG kvm"]);
    }
    as_nobody(&["vm", "--no-kvm", "--api", &api, "--memory", "hugetlb"])
        .wait()
        .code(3)
        .says(&["nr_hugepages"]);
}

#[test]
fn root_keeps_its_power_over_others_files_only_where_a_named_path_takes_it() {
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: only root has it");
    }
    const DAC_OVERRIDE: u64 = 1 << 1;
    let job = Job::new(Image::Mixed, MIB);
    std::os::unix::fs::chown(job.folder.path(), Some(65534), Some(65534)).unwrap();
    std::fs::set_permissions(job.folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let recv = Recv::to_file(&job.to, 10);
    let kept = threads(recv.ferry.id()).iter().map(|thread| caps(thread, "CapEff")).fold(0, |a, b| a | b);
    // A container's root may have had none.
    if caps(&threads(std::process::id())[0], "CapEff") & DAC_OVERRIDE != 0 {
        assert_eq!(kept, DAC_OVERRIDE);
    }
    send(&recv.uri, &job.from, &[]).wait().code(0);
    recv.ferry.wait().code(0);
    job.assert_arrived();
}

#[test]
fn what_a_sandbox_does_not_go_with_is_said_before_anything_is_begun() {
    let run = |args: &[&str]| Ferry::run(args);
    run(&["recv", "exec:cat", "--anon", "--sandbox", "strict"]).code(2).says(&["--sandbox on"]);
    run(&["recv", "tcp:127.0.0.1:0", "--anon", "--allow-path", "/nowhere"])
        .code(3)
        .says(&["--allow-path /nowhere"]);
    run(&["recv", "tcp:127.0.0.1:0", "--anon", "--no-sandbox", "--sandbox", "on"]).code(2);
}
