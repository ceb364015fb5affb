//! Commands that are written to.

use std::process::{Command, Stdio};
use std::sync::Barrier;

use super::super::error::{Ended, OneWayError, Trouble};
use super::*;

/// More than any pipe holds here.
const MUCH: usize = 8 << 20;

/// Writes some bytes, then lets a command go on that waits for the file `go`.
fn write_then_release(command: &str, bytes: usize) -> (OneWayWriter, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("go");
    let waits = format!("while [ ! -e {} ]; do sleep 0.01; done; {command}", file.display());
    let mut writer = writer(&waits);
    writer.write_all(&content(bytes), &go).unwrap();
    std::fs::write(file, "").unwrap();
    (writer, folder)
}

fn pid_of(writer: &OneWayWriter) -> i32 {
    writer.command.as_ref().unwrap().pid()
}

#[test]
fn a_command_gets_all_of_it_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy");
    let mut writer = writer(&format!("cat > '{}'", path.display()));
    let pid = pid_of(&writer);
    let bytes = content(3 << 20);
    for piece in bytes.chunks(1_000_003) {
        writer.write_all(piece, &go).unwrap();
    }
    writer.write_all(&[], &go).unwrap();
    writer.finish(&go).unwrap();
    assert!(std::fs::read(path).unwrap() == bytes);
    assert_gone(pid);
}

#[test]
fn what_gzip_packs_gzip_unpacks() {
    if !Command::new("gzip").arg("--version").output().is_ok_and(|out| out.status.success()) {
        println!("skipped: there is no gzip here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packed");
    let bytes = content(3 << 20);
    let mut writer = writer(&format!("gzip -1 -c | cat > '{}'", path.display()));
    writer.write_all(&bytes, &go).unwrap();
    writer.finish(&go).unwrap();
    let mut reader = reader(&format!("gzip -c -d '{}'", path.display()));
    let mut back = vec![0; bytes.len()];
    reader.read_exact(&mut back, &go).unwrap();
    assert_eq!(reader.read(&mut [0; 9], &go).unwrap(), 0);
    reader.finish(&go).unwrap();
    assert!(back == bytes);
    // Half of it is an error of gzip's, and said to be.
    let mut reader = self::reader(&format!("head -c 100000 '{}' | gzip -c -d", path.display()));
    let (trouble, words) = trouble(reader.read_exact(&mut back, &go).unwrap_err());
    assert!(
        matches!(trouble, Trouble::Failed(Ended::Exited(1))) && words.contains("gzip"),
        "{trouble:?} {words}"
    );
}

#[test]
fn a_command_that_ignores_its_input_is_an_error() {
    for command in ["true", "sleep 0", "head -c 100 > /dev/null"] {
        let mut writer = writer(command);
        let pid = pid_of(&writer);
        let error = writer.write_all(&content(MUCH), &go).unwrap_err();
        assert!(error.to_string().contains(command), "{error}");
        assert_eq!(trouble(error).0, Trouble::Early(Ended::Exited(0)));
        drop(writer);
        assert_gone(pid);
    }
}

#[test]
fn what_fits_into_the_pipe_and_is_not_read_is_an_error() {
    let (writer, _folder) = write_then_release("exit 0", 100);
    let pid = pid_of(&writer);
    let error = writer.finish(&go).unwrap_err();
    assert!(error.to_string().contains("did not read 100 bytes"), "{error}");
    assert_eq!(trouble(error).0, Trouble::Unread(Some(Ended::Exited(0)), 100));
    assert_gone(pid);
    // What it has read is not lacking.
    let (writer, _folder) = write_then_release("head -c 60 > /dev/null; exit 0", 100);
    let error = writer.finish(&go).unwrap_err();
    assert!(matches!(trouble(error).0, Trouble::Unread(Some(Ended::Exited(0)), 40 | 100)));
    let (writer, _folder) = write_then_release("cat > /dev/null", 100);
    writer.finish(&go).unwrap();
    // It need not wait for the end of what it has read to the end.
    let (writer, _folder) = write_then_release("head -c 100 > /dev/null", 100);
    writer.finish(&go).unwrap();
}

#[test]
fn a_command_that_closes_its_input_and_runs_on_is_an_error() {
    let (writer, _folder) = write_then_release("exec 0<&-; sleep 1000", 100);
    let pid = pid_of(&writer);
    assert_eq!(trouble(writer.finish(&go).unwrap_err()).0, Trouble::Unread(None, 100));
    assert_gone(pid);
    let mut writer = self::writer("exec 0<&-; sleep 1000");
    let pid = pid_of(&writer);
    assert_eq!(trouble(writer.write_all(&content(MUCH), &go).unwrap_err()).0, Trouble::Deaf);
    drop(writer);
    assert_gone(pid);
}

#[test]
fn a_command_that_fails_late_fails() {
    for (command, ended, said) in [
        ("cat > /dev/null; echo no room >&2; exit 3", Ended::Exited(3), "no room"),
        ("cat > /dev/null; kill -KILL $$", Ended::Killed(9), ""),
        ("cat > /dev/null; no-such-command-anywhere", Ended::Exited(127), "no-such-command-anywhere"),
        ("cat | (cat > /dev/null; exit 4)", Ended::Exited(4), ""),
    ] {
        let mut writer = writer(command);
        let pid = pid_of(&writer);
        writer.write_all(&content(3 << 20), &go).unwrap();
        let (trouble, words) = trouble(writer.finish(&go).unwrap_err());
        assert_eq!(trouble, Trouble::Failed(ended), "{command}");
        assert!(words.contains(said), "{command}: {words}");
        assert_gone(pid);
    }
}

#[test]
fn a_command_that_is_not_there_says_so() {
    let mut writer = writer("/no/such/command");
    let error = writer.write_all(&content(MUCH), &go).unwrap_err();
    assert!(error.to_string().contains("is it installed?"), "{error}");
    assert!(
        matches!(trouble(error), (Trouble::Early(Ended::Exited(127)), words) if words.contains("/no/such"))
    );
}

#[test]
fn nobody_who_does_not_read_is_waited_for_once_cancelled() {
    for command in ["sleep 1000", "sleep 1000 | sleep 1000", "trap '' TERM; sleep 1000; sleep 1000"] {
        let mut writer = writer(command);
        let pid = pid_of(&writer);
        assert!(is_child(pid), "{command}");
        let error = writer.write_all(&content(MUCH), &until(5)).unwrap_err();
        assert!(matches!(error, OneWayError::Cancelled), "{error}");
        assert!(!group(pid).is_empty(), "{command}");
        drop(writer);
        assert_gone(pid);
    }
}

#[test]
fn a_command_that_never_ends_is_ended_once_cancelled() {
    for command in ["cat > /dev/null; sleep 1000", "sleep 1000"] {
        let mut writer = writer(command);
        let pid = pid_of(&writer);
        writer.write_all(&content(100), &go).unwrap();
        let error = writer.finish(&until(5)).unwrap_err();
        assert!(matches!(error, OneWayError::Cancelled), "{error}");
        assert_gone(pid);
    }
}

#[test]
fn a_command_does_not_take_what_came_for_all_of_it_when_it_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (got, whole) = (folder.path().join("got"), folder.path().join("whole"));
    let mut writer = writer(&format!("cat > '{}' && touch '{}'; sleep 1000", got.display(), whole.display()));
    let pid = pid_of(&writer);
    writer.write_all(b"some of it", &go).unwrap();
    await_that(|| std::fs::read(&got).is_ok_and(|bytes| bytes == b"some of it"));
    drop(writer);
    assert_gone(pid);
    assert!(!whole.exists());
}

#[test]
fn one_that_asks_at_the_terminal_is_told_apart() {
    let mut writer = writer("kill -TTIN $$; cat > /dev/null");
    let pid = pid_of(&writer);
    let error = writer.write_all(&content(MUCH), &go).unwrap_err();
    assert_eq!(trouble(error).0, Trouble::Asks(libc::SIGTTIN));
    drop(writer);
    assert_gone(pid);
    let writer = self::writer("kill -TTOU $$");
    assert_eq!(trouble(writer.finish(&go).unwrap_err()).0, Trouble::Asks(libc::SIGTTOU));
    // One that somebody has stopped on purpose is waited for.
    let writer = self::writer("kill -STOP $$");
    let pid = pid_of(&writer);
    await_that(|| stat(&pid.to_string()).is_some_and(|stat| stat[0] == "T"));
    assert!(matches!(writer.finish(&until(5)).unwrap_err(), OneWayError::Cancelled));
    assert_gone(pid);
}

#[test]
fn a_flood_of_errors_holds_nobody_up() {
    let mut writer = writer("yes something went wrong | head -c 100000000 >&2; cat > /dev/null; exit 7");
    let bytes = content(MUCH);
    writer.write_all(&bytes, &go).unwrap();
    let (trouble, words) = trouble(writer.finish(&go).unwrap_err());
    assert_eq!(trouble, Trouble::Failed(Ended::Exited(7)));
    assert!(words.len() < 6000 && words.contains("wrong | something went wrong | something"), "{words}");
}

#[test]
fn fifty_at_once_are_as_good_as_one() {
    const MANY: usize = 50;
    let folder = tempfile::tempdir().unwrap();
    let all_there = Barrier::new(MANY);
    let bytes = content(300_000);
    let one = |at: usize| {
        let path = folder.path().join(at.to_string());
        let mut writer = writer(&format!("cat > '{}'; exit {}", path.display(), at % 2));
        let pid = pid_of(&writer);
        all_there.wait();
        writer.write_all(&bytes[at..], &go).unwrap();
        let result = writer.finish(&go);
        assert_eq!(result.is_ok(), at.is_multiple_of(2), "{result:?}");
        assert!(std::fs::read(path).unwrap() == bytes[at..]);
        pid
    };
    let pids = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..MANY).map(|at| scope.spawn(move || one(at))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    pids.into_iter().for_each(assert_gone);
}

/// Has the shell itself, and no other program, write the descriptors that it has, and what signals do to it.
fn describe_itself(descriptors: &Path, status: &Path) -> String {
    let (descriptors, status) = (descriptors.display(), status.display());
    format!(
        "cd /proc/$$/fd; echo * > '{descriptors}'
        while read -r line; do echo \"$line\"; done < /proc/$$/status > '{status}'
        cat > /dev/null"
    )
}

#[test]
fn a_command_gets_nothing_else_of_this_process() {
    let folder = tempfile::tempdir().unwrap();
    let (listing, status) = (folder.path().join("fds"), folder.path().join("status"));
    let command = describe_itself(&listing, &status);
    let _others: Vec<_> = (0..5).map(|_| writer("cat > /dev/null")).collect();
    // What whoever runs this test lets everybody have.
    let plain = Command::new("/bin/sh").args(["-c", &command]).stdin(Stdio::null()).status().unwrap();
    assert!(plain.success());
    let inherited = std::fs::read_to_string(&listing).unwrap();
    let writer = writer(&command);
    let pid = pid_of(&writer);
    writer.finish(&go).unwrap();
    let listing = std::fs::read_to_string(&listing).unwrap();
    assert!(listing.contains("0 1"), "{listing}");
    assert_eq!(listing, inherited);
    let status = std::fs::read_to_string(status).unwrap();
    let mask = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        u64::from_str_radix(&line, 16).unwrap()
    };
    let pipe = 1 << (libc::SIGPIPE - 1);
    assert_eq!(mask(&status, "SigBlk:"), 0);
    assert_eq!(mask(&status, "SigIgn:") & pipe, 0);
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    assert_ne!(mask(&own, "SigIgn:") & pipe, 0, "else it could not fail");
    assert_ne!(stat("self").unwrap()[2], pid.to_string());
}

#[test]
fn a_command_has_a_group_of_its_own_and_its_other_ends_are_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("said");
    let command = format!(
        "(ls -l /proc/$$/fd/1; cut -d ' ' -f 5 /proc/$$/stat; echo $$) > '{}'; echo lost; cat",
        path.display()
    );
    let writer = writer(&command);
    let pid = pid_of(&writer);
    writer.finish(&go).unwrap();
    let said = std::fs::read_to_string(path).unwrap();
    let lines: Vec<_> = said.lines().collect();
    assert!(lines[0].ends_with("/dev/null"), "{said}");
    assert_eq!(lines[1..], [pid.to_string(), pid.to_string()]);
}
