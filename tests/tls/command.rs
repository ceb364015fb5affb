//! The command line: keys, listeners that others reach, what TLS is not for, and a guest that moves under it.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::common::{Ferry, Image, Job, MIB, Recv, folder, send, turn};
use crate::lab::Keys;

#[test]
fn keys_that_are_made_work_are_private_and_are_left_alone() {
    let _turn = turn();
    let dir = folder();
    let keys = dir.path().join("keys");
    let text = keys.to_str().unwrap();
    let made = Ferry::run(["keys", "init", text, "--host", "node7.lab,10.0.0.7", "--json"]);
    made.code(0);
    let names = made.json()["names"].clone();
    for name in ["node7.lab", "10.0.0.7", "127.0.0.1", "::1", "localhost"] {
        assert!(names.as_array().unwrap().iter().any(|known| known == name), "{names}");
    }
    let mut files = 0;
    for file in std::fs::read_dir(&keys).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
        files += 1;
    }
    assert_eq!(files, 6);
    assert_eq!(keys.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    // They serve, over TCP and, where the name is said, a Unix socket.
    let job = Job::new(Image::Mixed, 4 * MIB);
    let socket = format!("unix:{}", dir.path().join("s").display());
    for (uri, name) in [("tcp:127.0.0.1:0", None), (&*socket, Some("node7.lab"))] {
        let file = job.to.to_str().unwrap();
        let listening =
            Recv::start(uri, ["--json", "--tls-dir", text, "--tls-allow", "10.0.0.7", "--ram-file", file]);
        if name.is_some() {
            let sent = send(&listening.uri, &job.from, &["--tls-dir", text]).wait();
            sent.code(3).says(&["the certificate's name must be said"]);
        }
        let mut args = vec!["--tls-dir", text, "--streams", "3"];
        args.extend(name.iter().flat_map(|name| ["--tls-hostname", name]));
        let sent = send(&listening.uri, &job.from, &args).wait();
        sent.code(0);
        assert!(sent.report().verified);
        listening.ferry.wait().code(0);
        job.assert_arrived();
        std::fs::remove_file(&job.to).unwrap();
    }
    // Shown, and never overwritten.
    let before = std::fs::read(keys.join("server-key.pem")).unwrap();
    let shown = Ferry::run(["keys", "show", text, "--json"]);
    shown.code(0);
    let shown = shown.json();
    assert_eq!(shown["certificates"].as_array().unwrap().len(), 3);
    // To the second a year, or a moment less.
    assert!(matches!(shown["certificates"][1]["days_left"].as_i64(), Some(364 | 365)), "{shown}");
    assert_eq!(shown["certificates"][1]["names"][0], "node7.lab");
    Ferry::run(["keys", "init", text]).code(3).says(&["is there already, and is left alone"]);
    assert!(std::fs::read(keys.join("server-key.pem")).unwrap() == before);
    // Another host's, by the same authority.
    let more = dir.path().join("more");
    Ferry::run(["keys", "init", more.to_str().unwrap(), "--host", "node8", "--ca", text]).code(0);
    let listening = Recv::start(
        "tcp:127.0.0.1:0",
        ["--json", "--tls-dir", more.to_str().unwrap(), "--ram-file", job.to.to_str().unwrap()],
    );
    send(&listening.uri, &job.from, &["--tls-dir", text]).wait().code(0);
    listening.ferry.wait().code(0);
    Ferry::run(["keys", "init", more.to_str().unwrap(), "--host", "not a name"]).code(2).says(&["--host"]);
    Ferry::run(["keys", "show", dir.path().to_str().unwrap()]).code(3).says(&["has none of ca-cert.pem"]);
}

/// QEMU asks of certificates what others do not: it is asked itself.
#[test]
fn qemu_takes_the_keys_too() {
    let dir = folder();
    let keys = dir.path().join("keys");
    Ferry::run(["keys", "init", keys.to_str().unwrap()]).code(0);
    for endpoint in ["server", "client"] {
        let object = format!("tls-creds-x509,id=t,dir={},endpoint={endpoint},verify-peer=on", keys.display());
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-machine", "none", "-display", "none", "-monitor", "stdio", "-object", &object]);
        let child = qemu.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let Ok(mut child) = child.stderr(std::process::Stdio::piped()).spawn() else {
            eprintln!("skipped: there is no qemu-system-x86_64 here (Debian: qemu-system-x86)");
            return;
        };
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"quit\n").unwrap();
        let ended = child.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    }
}

#[test]
fn a_listener_that_others_reach_wants_protection() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, MIB);
    let file = job.to.to_str().unwrap();
    let refused = Ferry::run(["recv", "tcp:0:0", "--json", "--ram-file", file]);
    refused.code(3).says(&["others can reach tcp:0:0, and nothing protects what comes there"]);
    refused.says(&["pageferry keys init"]);
    assert!(refused.json()["error"].as_str().unwrap().contains("--insecure"));
    assert!(!job.to.exists(), "nothing is left behind");
    let keys = Keys::good();
    for args in [&["--insecure"][..], &["--tls-dir", keys.text()]] {
        let all = [&["--json", "--ram-file", file], args].concat();
        let listening = Recv::start("tcp:0:0", all);
        let uri = format!("tcp:127.0.0.1:{}", listening.port());
        let args = if args.len() == 2 { args } else { &[] };
        send(&uri, &job.from, args).wait().code(0);
        listening.ferry.wait().code(0);
        job.assert_arrived();
        std::fs::remove_file(&job.to).unwrap();
    }
}

#[test]
fn what_tls_is_not_for_is_said() {
    let _turn = turn();
    let keys = Keys::good();
    let job = Job::new(Image::Mixed, MIB);
    let (dir, to) = (keys.text(), job.to.to_str().unwrap());
    let archive = format!("file:{}", keys.file("x.pferry").display());
    send(&archive, &job.from, &["--tls-dir", dir]).wait().code(3).says(&["TLS does not apply to file:"]);
    assert!(!keys.file("x.pferry").exists());
    Ferry::run(["recv", &archive, "--tls-dir", dir, "--ram-file", to])
        .code(3)
        .says(&["TLS does not apply to file:"]);
    // Another build does not know the address.
    if cfg!(feature = "rdma") {
        let sent = send("rdma:127.0.0.1:9", &job.from, &["--tls-dir", dir]).wait();
        sent.code(3).says(&["go by RDMA, which encrypts nothing"]);
        sent.says(&["--insecure-data-path"]);
    }
    let nowhere = keys.file("nowhere");
    let sent = send("tcp:127.0.0.1:9", &job.from, &["--tls-dir", nowhere.to_str().unwrap()]).wait();
    sent.code(3).says(&["cannot read"]);
    let sent = send("tcp:127.0.0.1:9", &job.from, &["--tls-cert", "x"]).wait();
    sent.code(2).says(&["--tls-ca, --tls-cert and --tls-key go together"]);
    Ferry::run(["recv", "tcp:127.0.0.1:0", "--tls-allow", "x", "--ram-file", to])
        .code(2)
        .says(&["give --tls-dir"]);
    send("tcp:127.0.0.1:9", &job.from, &["--tls-hostname", "x"]).wait().code(2).says(&["give --tls-dir"]);
}
