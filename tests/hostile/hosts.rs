//! Whether both ends share a host is proven, not claimed.

use pageferry::transport::host::{Host, Side};
use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::{ErrorCode, Hello, Message};

use crate::common::raw::{Peer, SEED, Server, hello, preamble};
use crate::common::{Image, Job, MIB, Recv, send, turn};

/// What a destination says of its host to a source that says `host`.
fn answer_to(host: u64) -> u64 {
    let job = Job::new(Image::Mixed, MIB);
    let recv = Recv::to_file(&job.to, 5);
    let mut peer = Peer::connect(recv.port());
    peer.write(&preamble(Role::Control, 0).encode());
    peer.send(&Message::Hello(Hello { host, ..hello(MIB as u64) }));
    match peer.receive() {
        Some(Message::Welcome(welcome)) => welcome.host,
        other => panic!("{other:?} instead of WELCOME"),
    }
}

#[test]
fn a_destination_tells_its_host_only_to_who_is_there() {
    let _turn = turn();
    let (here, elsewhere) = (Host::this(), Host::with_boot_id([7; 16]));
    let answer = answer_to(here.digest(Side::Source, SEED));
    assert!(answer != 0 && here.is_of(answer, Side::Destination, SEED));
    for stranger in [0, 1, elsewhere.digest(Side::Source, SEED), here.digest(Side::Destination, SEED)] {
        assert_eq!(answer_to(stranger), 0);
    }
}

#[test]
fn a_source_proves_its_host_anew_in_each_session() {
    let _turn = turn();
    let job = Job::new(Image::Random, MIB);
    let here = Host::this();
    let said = [(), ()].map(|()| {
        let (server, uri) = Server::new();
        let source = send(&uri, &job.from, &["--link-timeout", "5"]);
        let (mut peer, hello) = server.hello();
        peer.send(&Message::Error { code: ErrorCode::Busy, text: "another time".into() });
        source.wait().code(1);
        assert!(here.is_of(hello.host, Side::Source, hello.seed));
        hello.host
    });
    assert_ne!(said[0], said[1]);
}
