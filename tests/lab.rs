//! The lab guest: what a command that runs in it sees, what comes back, and how a guest that goes wrong is reported.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Emulation is slow, and the host may be busy.
const TIMEOUT_S: &str = "400";

fn ferry(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    command.arg("lab").args(args);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Guests one after the other; none where the host cannot have one, and then it says why.
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let missing = MISSING.get_or_init(|| {
        let output = ferry(&["prepare"]).output().unwrap();
        match output.status.code() {
            Some(0) => None,
            Some(3) => Some(text(&output.stderr)),
            _ => panic!("lab prepare: {output:?}"),
        }
    });
    match missing {
        Some(reason) => {
            println!("skipped: {}", reason.lines().last().unwrap_or_default());
            None
        }
        None => Some(turn),
    }
}

/// Runs a shell script in the lab.
fn run(options: &[&str], script: &str) -> Output {
    let args = [&["run", "--timeout", TIMEOUT_S], options, &["--", "sh", "-c", script]].concat();
    ferry(&args).output().unwrap()
}

#[test]
fn a_command_runs_with_the_hosts_files_and_rdma_and_kvm() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (own, shared) = (folder.path().join("own"), folder.path().join("it's shared"));
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(&own, "the host's").unwrap();
    let script = format!(
        "printf 'a\\0\\r\\n\\377'; echo to errors >&2; cat '{own}' >&2; echo changed > '{own}'; cat '{own}' >&2
         pwd >&2; echo $LAB_TEST $PAGEFERRY_LAB_HOST >&2
         test -c /dev/kvm && echo has KVM >&2
         cat /sys/class/infiniband/rxe0/ports/1/state >&2
         if command -v ibv_devinfo >/dev/null; then ibv_devinfo -d rxe0 -v >&2; fi
         cd {shared}; echo result > file; cat file >&2
         exit 42",
        own = own.display(),
        shared = "\"$SHARED\"",
    );
    let share = shared.to_str().unwrap();
    let output = ferry(&["run", "--timeout", TIMEOUT_S, "--share", share, "--", "sh", "-c", &script])
        .env("LAB_TEST", "a 'b' $c")
        .env("SHARED", &shared)
        .current_dir("/usr/bin")
        .output()
        .unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(42), "{errors}");
    assert_eq!(output.stdout, b"a\0\r\n\xff", "stdout arrives as it was written: {errors}");
    for expected in [
        "to errors\n",
        "the host'schanged\n/usr/bin\n",
        "a 'b' $c 0\n",
        "has KVM\n",
        "4: ACTIVE\n",
        "result\n",
    ] {
        assert!(errors.contains(expected), "{expected:?} in {errors}");
    }
    if errors.contains("hca_id") {
        assert!(errors.contains("PORT_ACTIVE"), "{errors}");
        assert!(errors.lines().any(|line| line.contains("active_mtu") && line.contains("4096")), "{errors}");
    }
    assert_eq!(std::fs::read(&own).unwrap(), b"the host's", "the guest's writes stay there");
    assert_eq!(std::fs::read(shared.join("file")).unwrap(), b"result\n", "but not in a shared folder");
}

#[test]
fn a_panic_is_reported_with_the_console() {
    let Some(_turn) = turn() else { return };
    let output = run(&[], "echo before; sleep 1; echo c > /proc/sysrq-trigger; sleep 60");
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{errors}");
    assert_eq!(text(&output.stdout), "before\n");
    assert!(errors.contains("stopped before its command had ended"), "{errors}");
    assert!(errors.contains("Kernel panic"), "{errors}");
}

#[test]
fn the_demos_guest_moves_between_two_hosts() {
    let Some(_turn) = turn() else { return };
    let args =
        ["demo", "--hosts", "2", "--timeout", TIMEOUT_S, "--uri", "tcp:10.9.0.2:4444", "--", "--mem", "64M"];
    let output = ferry(&args).output().unwrap();
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{out}{errors}");
    assert!(out.contains("host0| Migration status: completed\n"), "{out}{errors}");
    assert!(
        out.lines().any(|line| line.starts_with("host1| vCPU 0: ") && line.ends_with("none twice")),
        "{out}"
    );
}

#[test]
fn the_bench_measures_and_shows_failures() {
    let Some(_turn) = turn() else { return };
    let args =
        ["bench", "--timeout", TIMEOUT_S, "--runs", "1", "--mem", "8M", "--images", "sparse", "--json"];
    let output = ferry(&[&args[..], &["--only", "tcp"]].concat()).output().unwrap();
    let errors = text(&output.stderr);
    if output.status.code() == Some(3) && errors.contains("perftest") {
        return println!("skipped: {errors}");
    }
    assert_eq!(output.status.code(), Some(0), "{errors}");
    let table: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = table["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3, "{table}");
    for row in rows {
        assert!(row["failed"].is_null() && row["median_mb_s"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["runs_mb_s"].as_array().unwrap().len(), 1, "{row}");
    }
}

#[test]
fn a_guest_ends_when_nobody_reads_its_output() {
    let Some(_turn) = turn() else { return };
    let script =
        format!("{} lab run --timeout {TIMEOUT_S} -- yes; echo $? >&2", env!("CARGO_BIN_EXE_pageferry"));
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0; 4];
    std::io::Read::read_exact(&mut stdout, &mut first).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!(&first, b"y\ny\n");
    assert_eq!(text(&output.stderr), "141\n");
}

#[test]
fn a_guest_that_hangs_is_killed() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let console = folder.path().join("console");
    let args = ["run", "--timeout", "3", "--console", console.to_str().unwrap(), "--", "sleep", "1000"];
    let output = ferry(&args).output().unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(124), "{errors}");
    assert!(errors.contains("after 3 s") && errors.contains("its console"), "{errors}");
    assert!(console.exists());
}

#[test]
fn a_boot_that_hangs_is_tried_once_more() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (own, mark) = (folder.path().join("qemu-system-x86_64"), folder.path().join("mark"));
    // The first machine has ports and never runs.
    let script = "#!/bin/sh
        PATH=$REST
        if mkdir $MARK 2>/dev/null; then exec qemu-system-x86_64 -S \"$@\"; fi
        exec qemu-system-x86_64 \"$@\"\n";
    std::fs::write(&own, script).unwrap();
    std::fs::set_permissions(&own, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let rest = std::env::var("PATH").unwrap();
    let output = ferry(&["run", "--boot-patience", "2", "--timeout", TIMEOUT_S, "--", "echo", "here"])
        .env("PATH", format!("{}:{rest}", folder.path().display()))
        .envs([("REST", rest.as_str()), ("MARK", mark.to_str().unwrap())])
        .output()
        .unwrap();
    let errors = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "here\n"), "{errors}");
    assert!(errors.contains("lab guest 0 hangs in its boot; booting it once more"), "{errors}");
}

#[test]
fn two_hosts_reach_each_other() {
    let Some(_turn) = turn() else { return };
    let script = "busybox ping -c 2 $PAGEFERRY_LAB_PEER; code=$?
        cat /sys/class/infiniband/rxe0/ports/1/state; echo over $PAGEFERRY_LAB_HOST >&2
        test $PAGEFERRY_LAB_HOST = 0 || code=$((code + 5)); exit $code";
    let output = run(&["--hosts", "2"], script);
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(5), "the second one's, since the first one's is 0: {out}{errors}");
    for host in [0, 1] {
        let peer = 2 - host;
        assert!(out.contains(&format!("host{host}| 64 bytes from 10.9.0.{peer}: seq=1")), "{out}{errors}");
        assert!(out.contains(&format!("host{host}| 4: ACTIVE\n")), "{out}");
        assert!(errors.contains(&format!("host{host}| over {host}\n")), "{errors}");
    }
    assert!(out.lines().all(|line| line.starts_with("host0| ") || line.starts_with("host1| ")), "{out}");
}

#[test]
fn the_hosts_own_rdma_device_is_made_and_removed() {
    let Some(_turn) = turn() else { return };
    let program = env!("CARGO_BIN_EXE_pageferry");
    let script = format!(
        "look() {{ echo $1 $? $(ls /sys/class/infiniband /sys/class/net); }}
         {program} lab run --host -- sh -c 'cat /sys/class/infiniband/rxe0/ports/1/state; exit 9'; look ended
         {program} lab run --host --timeout 1 -- sleep 100; look late
         {program} lab run --host -- /no/such/program; look absent
         {program} lab run --host -- sleep 100 & sleep 2; kill -INT $!; wait $!; look cancelled"
    );
    let output = run(&["--no-rdma"], &script);
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    let nothing = "/sys/class/infiniband: /sys/class/net: lo";
    for (what, code) in [("ended", 9), ("late", 124), ("absent", 3), ("cancelled", 130)] {
        assert!(out.contains(&format!("{what} {code} {nothing}\n")), "{what}: {out}{errors}");
    }
    assert!(out.starts_with("4: ACTIVE\n"), "{out}{errors}");
}

#[test]
fn without_rdma_the_host_cannot_be_the_lab() {
    if Path::new("/sys/class/infiniband").exists() || Path::new("/sys/module/rdma_rxe").exists() {
        return println!("skipped: this host has RDMA");
    }
    let output = ferry(&["run", "--host", "--", "true"]).output().unwrap();
    let errors = text(&output.stderr);
    if output.status.success() {
        // The kernel had the module, and the user was root.
        return println!("skipped: this host has soft-RoCE");
    }
    assert_eq!(output.status.code(), Some(3), "{errors}");
    assert!(errors.contains("there is no RDMA device") && errors.contains("--host"), "{errors}");
}

#[test]
fn what_is_missing_is_named_with_its_packages() {
    let nothing = tempfile::tempdir().unwrap();
    let output = ferry(&["run", "--", "true"]).env("PATH", nothing.path()).output().unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{errors}");
    assert!(errors.contains("qemu-system-x86_64") && errors.contains("apt-get install"), "{errors}");
    assert!(errors.contains("qemu-system-x86 ") || errors.contains("qemu-system-x86\n"), "{errors}");
}

#[test]
fn every_command_has_help_with_an_example_and_exit_codes() {
    for command in ["run", "demo", "bench", "prepare"] {
        let output = ferry(&[command, "--help"]).output().unwrap();
        let help = text(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{command}");
        for part in ["Example", "Exit codes:", &format!("pageferry lab {command}")] {
            assert!(help.contains(part), "{command}: {part} in {help}");
        }
    }
    assert!(!text(&ferry(&["--help"]).output().unwrap().stdout).contains("bench-inside"));
    for wrong in [
        &["run"][..],
        &["run", "--hosts", "3", "--", "x"],
        &["bench", "--mem", "1"],
        &["bench", "--images", "x"],
    ] {
        assert_eq!(ferry(wrong).output().unwrap().status.code(), Some(2), "{wrong:?}");
    }
}
