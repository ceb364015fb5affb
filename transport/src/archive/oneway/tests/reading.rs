//! Commands that are read from.

use super::super::error::{Ended, OneWayError, Trouble};
use super::*;

fn pid_of(reader: &OneWayReader) -> i32 {
    reader.command.as_ref().unwrap().pid()
}

/// All that it gives.
fn read_all(reader: &mut OneWayReader) -> Result<Vec<u8>, OneWayError> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 100_000]);
    loop {
        match reader.read(&mut buffer, &go)? {
            0 => return Ok(all),
            count => all.extend_from_slice(&buffer[..count]),
        }
    }
}

#[test]
fn all_that_a_command_gives_is_read_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("saved");
    let bytes = content(3 << 20);
    std::fs::write(&path, &bytes).unwrap();
    let mut reader = reader(&format!("cat - '{}'", path.display()));
    let pid = pid_of(&reader);
    assert!(read_all(&mut reader).unwrap() == bytes);
    assert_eq!(reader.read(&mut [0; 5], &go).unwrap(), 0);
    reader.finish(&go).unwrap();
    assert_gone(pid);
}

#[test]
fn a_command_that_gives_nothing_has_ended_at_once() {
    let mut reader = reader("true");
    assert_eq!(reader.read(&mut [0; 5], &go).unwrap(), 0);
    reader.finish(&go).unwrap();
}

#[test]
fn a_command_that_fails_fails_though_it_gave_something() {
    for (command, ended, said) in [
        ("printf abc; echo lost the rest >&2; exit 3", Ended::Exited(3), "lost the rest"),
        ("printf abc; kill -KILL $$", Ended::Killed(9), ""),
        ("printf abc; no-such-command-anywhere", Ended::Exited(127), "no-such-command-anywhere"),
        ("printf abc; exec 1>&-; sleep 0.1; exit 5", Ended::Exited(5), ""),
        // Something else keeps the pipe open, and is not waited for.
        ("printf abc; sleep 1000 & exit 6", Ended::Exited(6), ""),
    ] {
        for finish_at_once in [false, true] {
            let mut reader = reader(command);
            let pid = pid_of(&reader);
            let mut three = [0; 3];
            reader.read_exact(&mut three, &go).unwrap();
            assert_eq!(&three, b"abc");
            let error = if finish_at_once {
                reader.finish(&go).unwrap_err()
            } else {
                let error = reader.read(&mut three, &go).unwrap_err();
                drop(reader);
                error
            };
            let (trouble, words) = trouble(error);
            assert_eq!(trouble, Trouble::Failed(ended), "{command}");
            assert!(words.contains(said), "{command}: {words}");
            assert_gone(pid);
        }
    }
}

#[test]
fn what_ends_early_says_how_much_was_there() {
    let mut reader = reader("printf abc");
    let error = reader.read_exact(&mut [0; 5], &go).unwrap_err();
    assert!(matches!(error, OneWayError::Truncated { wanted: 5, got: 3, .. }), "{error:?}");
    assert!(error.to_string().contains("exec:printf abc ended after 3 of 5 bytes"), "{error}");
}

#[test]
fn a_command_that_never_ends_is_ended_once_cancelled() {
    for command in [
        "printf abc; sleep 1000",
        "printf abc; exec 1>&-; sleep 1000",
        "printf abc; (sleep 1000; echo d) | cat",
    ] {
        for step in 0..2 {
            let mut reader = reader(command);
            let pid = pid_of(&reader);
            reader.read_exact(&mut [0; 3], &go).unwrap();
            let error = if step == 0 {
                let error = reader.read(&mut [0; 3], &until(4)).unwrap_err();
                assert!(!group(pid).is_empty());
                drop(reader);
                error
            } else {
                reader.finish(&until(4)).unwrap_err()
            };
            assert!(matches!(error, OneWayError::Cancelled), "{command}: {error}");
            assert_gone(pid);
        }
    }
}

#[test]
fn nothing_may_follow_what_was_wanted() {
    for command in ["printf abcdef", "yes", "printf abc; sleep 0.1; printf d; sleep 1000"] {
        let mut reader = reader(command);
        let pid = pid_of(&reader);
        reader.read_exact(&mut [0; 3], &go).unwrap();
        let error = reader.finish(&go).unwrap_err();
        assert!(matches!(error, OneWayError::MoreFollows { .. }), "{command}: {error}");
        assert!(error.to_string().contains(command), "{error}");
        assert_gone(pid);
    }
}

#[test]
fn what_a_command_leaves_in_the_background_is_not_waited_for() {
    let mut reader = reader("printf abc; sleep 2 & exit 0");
    let pid = pid_of(&reader);
    reader.read_exact(&mut [0; 3], &go).unwrap();
    reader.finish(&go).unwrap();
    assert_gone(pid);
}

#[test]
fn one_that_asks_at_the_terminal_is_told_apart() {
    let mut reader = reader("kill -TTIN $$; printf abc");
    let error = reader.read(&mut [0; 3], &go).unwrap_err();
    assert_eq!(trouble(error).0, Trouble::Asks(libc::SIGTTIN));
}

#[test]
fn a_command_whose_end_others_have_seen_is_no_success() {
    let reader = reader("true");
    let pid = rustix::process::Pid::from_raw(pid_of(&reader)).unwrap();
    let options = rustix::process::WaitIdOptions::EXITED;
    rustix::process::waitid(rustix::process::WaitId::Pid(pid), options).unwrap();
    let error = reader.finish(&go).unwrap_err();
    assert!(error.to_string().contains("ignores SIGCHLD"), "{error}");
    assert_eq!(trouble(error).0, Trouble::Failed(Ended::Unknown));
}

#[test]
fn a_flood_of_errors_holds_nobody_up() {
    let mut reader = reader("yes something went wrong | head -c 10000000 >&2; printf abc");
    assert_eq!(read_all(&mut reader).unwrap(), b"abc");
    reader.finish(&go).unwrap();
}
