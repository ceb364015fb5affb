//! What a destination does that has not the descriptors for all who come. What else they can do to it is in the table.

use crate::common::raw::Peer;
use crate::common::{Ferry, Image, Job, MIB, Recv, folder, send, turn};

/// Without descriptors for everybody the destination says so, once, and the control socket still answers; it goes on by itself.
#[test]
fn few_descriptors_are_made_do_with() {
    let _turn = turn();
    let folder = folder();
    let api = format!("unix:{}", folder.path().join("api").display());
    let args = [
        "vm",
        "--no-kvm",
        "--mem",
        "16M",
        "--link-timeout",
        "60",
        "--api",
        &api,
        "--incoming",
        "tcp:127.0.0.1:0",
    ];
    let mut recv = Recv::of(Ferry::start_limited(80, args));
    let strangers: Vec<_> = (0..200).map(|_| Peer::connect(recv.port())).collect();
    recv.ferry.wait_stderr("ulimit -n");
    for _ in 0..20 {
        Ferry::run(["ctl", &api, "status"]).code(0);
    }
    drop(strangers);
    // A session that comes to nothing: what is wanted here is a guest.
    let job = Job::new(Image::Mixed, MIB);
    send(&recv.uri, &job.from, &[]).wait().code(1).says(&["waits for a running guest"]);
    Ferry::run(["ctl", &api, "quit"]).code(0);
    let ended = recv.ferry.wait();
    let said = ended.stderr.matches("no connection is accepted").count();
    assert_eq!(said, 1, "{ended:?}");
}
