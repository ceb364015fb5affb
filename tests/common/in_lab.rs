//! This very test program, run in the lab's guest.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

/// One boot for all tests; emulation is slow.
const TIMEOUT_S: &str = "400";

/// Runs a shell script in the lab's guest, in which `$0` is this program, and returns the lines of its output; fails where that does, or
/// where no test ran. Says why, and returns nothing, where there is no lab.
pub(crate) fn run(options: &[&str], script: &str) -> Option<Vec<String>> {
    let lab = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
        command.arg("lab").stdin(Stdio::null());
        command
    };
    let prepared = lab().arg("prepare").output().unwrap();
    let errors = String::from_utf8_lossy(&prepared.stderr);
    match prepared.status.code() {
        Some(0) => {}
        Some(3) => {
            println!("skipped: {}", errors.lines().last().unwrap_or_default());
            return None;
        }
        _ => panic!("lab prepare: {prepared:?}"),
    }
    let mut child = lab()
        .args(["run", "--timeout", TIMEOUT_S])
        .args(options)
        .args(["--", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let errors = child.stderr.take().unwrap();
    let errors = std::thread::spawn(move || pass_on(errors));
    let lines = pass_on(child.stdout.take().unwrap());
    let (status, errors) = (child.wait().unwrap(), errors.join().unwrap());
    let mut test = "";
    for line in &lines {
        if let Some(rest) = line.strip_prefix("---- ") {
            test = rest.split(' ').next().unwrap_or_default();
        } else if let Some(reason) = line.strip_prefix("skipped: ") {
            println!("skipped: in the lab, {test}: {reason}");
        }
    }
    let failed = format!("{status}\n{}\n{}", lines.join("\n"), errors.join("\n"));
    assert!(status.success(), "in the lab: {failed}");
    assert!(lines.iter().any(|line| line.starts_with("test result: ok. ")), "no tests ran: {failed}");
    Some(lines)
}

/// Shows lines as they come, past the harness, which holds back what is printed; and returns them.
fn pass_on(from: impl Read) -> Vec<String> {
    let lines = BufReader::new(from).split(b'\n').map_while(Result::ok);
    lines
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .inspect(|line| drop(writeln!(std::io::stderr(), "lab| {line}")))
        .collect()
}
