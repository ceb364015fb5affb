//! Wrong arguments, files and addresses: exit code 2 or 3, and words that help.

use std::os::unix::ffi::OsStrExt;

use crate::common::{Ferry, PAGE, Recv, folder, turn};

#[test]
fn arguments_that_make_no_sense_exit_with_2() {
    for (args, word) in [
        (&[][..], "Usage"),
        (&["fly"], "unrecognized subcommand"),
        (&["send"], "required"),
        (&["send", "tcp:127.0.0.1:1"], "--ram-file"),
        (&["recv", "tcp:127.0.0.1:0"], "--anon"),
        (&["recv", "tcp:127.0.0.1:0", "--anon", "--ram-file", "x"], "cannot be used with"),
        (&["recv", "tcp:127.0.0.1:99999", "--anon"], "not a number from 0 to 65535"),
        (&["recv", "tcp:::1:80", "--anon"], "brackets"),
        (&["recv", "unix:", "--anon"], "path is empty"),
        (&["recv", "vsock:2:1", "--anon"], "not built into this version"),
        (&["send", "nonsense", "--ram-file", "x"], "expected tcp:HOST:PORT"),
        (&["send", "tcp::1", "--ram-file", "x", "--streams", "0"], "1..=256"),
        (&["send", "tcp::1", "--ram-file", "x", "--streams", "257"], "1..=256"),
        (&["send", "tcp::1", "--ram-file", "x", "--link-timeout", "0"], "1..=3600"),
        (&["send", "tcp::1", "--ram-file", "x", "--codec", "rar"], "codec"),
        (&["send", "tcp::1", "--ram-file", "x", "--codec", "zstd:99"], "codec"),
        (&["send", "tcp::1", "--ram-file", "x", "--what"], "unexpected argument"),
    ] {
        let _turn = turn();
        Ferry::run(args).code(2).says(&[word]);
    }
}

#[test]
fn files_that_are_no_memory_exit_with_3() {
    let folder = folder();
    let file = |name: &str, len: u64| {
        let path = folder.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    };
    for (path, word) in [
        (folder.path().join("missing"), "No such file"),
        (file("empty", 0), "not empty"),
        (file("odd", PAGE as u64 + 1), "multiple of 4096"),
        (folder.path().to_path_buf(), "not a regular file"),
        ("/dev/null".into(), "not a regular file"),
    ] {
        let _turn = turn();
        let ended = Ferry::run(
            [b"send".as_slice(), b"tcp:127.0.0.1:1", b"--ram-file", path.as_os_str().as_bytes()]
                .map(std::ffi::OsStr::from_bytes),
        );
        ended.code(3).says(&[word]).says(&[path.to_str().unwrap()]);
    }
}

#[test]
fn addresses_that_do_not_serve_exit_with_3() {
    let folder = folder();
    let image = folder.path().join("image");
    std::fs::write(&image, [0; PAGE]).unwrap();
    let image = image.to_str().unwrap();
    let _turn = turn();
    // Nobody listens.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unix = format!("unix:{}", folder.path().join("nobody").display());
    for uri in [format!("tcp:{free}"), unix] {
        Ferry::run(["send", &uri, "--ram-file", image]).code(3).says(&["start `pageferry recv`"]);
    }
    Ferry::run(["send", "tcp:no-such-host.invalid:1", "--ram-file", image])
        .code(3)
        .says(&["does not resolve"]);
    // Somebody else does.
    let busy = Recv::start("tcp:127.0.0.1:0", ["--anon"]);
    Ferry::run(["recv", &busy.uri, "--anon"]).code(3).says(&["in use; choose another"]);
    let nowhere = format!("unix:{}", folder.path().join("no/folder").display());
    Ferry::run(["recv", &nowhere, "--anon"]).code(3).says(&["folder does not exist"]);
    let in_the_way = format!("unix:{image}");
    Ferry::run(["recv", &in_the_way, "--anon"]).code(3).says(&["in use"]);
    assert_eq!(std::fs::read(image).unwrap().len(), PAGE, "a file in the way is left alone");
    busy.ferry.signal("INT");
    busy.ferry.wait().code(130).says(&["cancel"]);
}

/// A target that cannot be made is found before a source has come for nothing.
#[test]
fn targets_that_cannot_be_made_exit_with_3() {
    let folder = folder();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for (target, word) in [
        (folder.path().join("no/such/folder"), "No such file"),
        (folder.path().to_path_buf(), "directory"),
        (file.join("below"), "Not a directory"),
        // Not even root makes a file there.
        ("/proc/pageferry-test".into(), "/proc/pageferry-test"),
        ("/dev/null".into(), "not a regular file"),
    ] {
        let _turn = turn();
        let target = target.to_str().unwrap();
        Ferry::run(["recv", "tcp:127.0.0.1:0", "--ram-file", target]).code(3).says(&[word]).says(&[target]);
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
}
