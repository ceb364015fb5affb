//! Whoever has a good certificate and wants into somebody else's session. He speaks the protocol by hand, as docs/protocol.md has it.

use std::io::{Read, Write};
use std::net::TcpStream;

use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::{ErrorCode, Message};

use crate::common::raw::{Door, Peer, SESSION, hello, preamble};
use crate::common::secure;
use crate::common::{Image, Job, MIB, turn};
use crate::lab::{Authority, Keys, Wanted, assert_serves, recv};

/// A connection under TLS, with the client's certificate in this folder, or none.
fn connect(port: u16, keys: &Keys, shows: bool) -> Peer {
    Door { port, tls: Some(secure::client(keys.path(), shows)) }.try_connect().unwrap()
}

#[test]
fn a_certificate_alone_lets_nobody_into_a_session() {
    let _turn = turn();
    let authority = Authority::new("the authority");
    let keys = Keys::trusting(&authority).with("server", &authority, &Wanted::good(), "");
    let keys = keys.with("client", &authority, &Wanted::good(), "");
    let others = Keys::trusting(&authority).with("client", &authority, &Wanted::good(), "");
    let job = Job::new(Image::Mixed, MIB);
    let listening = recv(&job, &keys, &[]);
    let port = listening.port();
    let mut control = connect(port, &keys, true);
    control.write(&preamble(Role::Control, 0).encode());
    control.send(&Message::Hello(hello(MIB as u64)));
    assert!(matches!(control.receive(), Some(Message::Welcome(_))));
    assert_eq!(control.receive(), Some(Message::Prepared));
    let key = control.socket.session_key(&SESSION);
    // Who knows the session's id, which never leaves the two, and has a good certificate.
    for role in [Role::Stream, Role::Query, Role::Resume, Role::Postcopy] {
        let said = preamble(role, 0);
        let mut thief = connect(port, &others, true);
        // By a key of his own, one that he made up, or the right proof of another connection.
        let another = connect(port, &keys, true).socket.proof(&key, &said);
        let own = thief.socket.session_key(&SESSION);
        let own = thief.socket.proof(&own, &said);
        for proof in [own, [0; 32], another] {
            thief.write(&said.encode());
            thief.write(&proof);
            thief.expect_error(ErrorCode::UnknownSession, "does not show that it belongs to the session");
            assert_eq!(thief.receive(), None, "the connection is closed");
            thief = connect(port, &others, true);
        }
    }
    // The session's own get in, once for each proof.
    let said = preamble(Role::Stream, 0);
    let mut stream = connect(port, &keys, true);
    let proof = stream.socket.proof(&key, &said);
    stream.write(&said.encode());
    stream.write(&proof);
    assert_eq!(stream.receive(), Some(Message::Attached { stream: 0 }));
    let mut replayed = connect(port, &others, true);
    replayed.write(&said.encode());
    replayed.write(&proof);
    replayed.expect_error(ErrorCode::UnknownSession, "does not show that it belongs to the session");
}

#[test]
fn whoever_shows_no_certificate_is_shown_out() {
    let _turn = turn();
    let keys = Keys::good();
    let job = Job::new(Image::Mixed, MIB);
    let mut listening = recv(&job, &keys, &[]);
    let mut peer = connect(listening.port(), &keys, false);
    peer.write(&preamble(Role::Control, 0).encode());
    let mut byte = [0];
    let error = peer.socket.read(&mut byte).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    listening.ferry.wait_stderr("the other side showed no certificate");
    assert_serves(&job, listening, &keys);
}

/// Whoever begins to shake hands, and does not go on, costs nobody else anything.
#[test]
fn handshakes_that_stand_still_keep_nobody_out() {
    let _turn = turn();
    let keys = Keys::good();
    let job = Job::new(Image::Mixed, MIB);
    let listening = recv(&job, &keys, &[]);
    let connect = || TcpStream::connect(("127.0.0.1", listening.port())).unwrap();
    let mut half: Vec<TcpStream> = (0..200).map(|_| connect()).collect();
    for (at, socket) in half.iter_mut().enumerate() {
        // The beginning of a record of a handshake, of a record that is too long, of a preamble, of nothing known; or a byte of each.
        let begun: [&[u8]; 4] =
            [&[22, 3, 1, 2, 0, 1, 0, 1], &[22, 3, 3, 0xff, 0xff], b"\x8fPGF", b"GET / HT"];
        let bytes = begun[at % 4];
        let _ = socket.write_all(if at < 100 { bytes } else { &bytes[..1] });
    }
    crate::common::send(&listening.uri, &job.from, &["--tls-dir", keys.text(), "--streams", "4"])
        .wait()
        .code(0);
    listening.ferry.wait().code(0);
    job.assert_arrived();
    drop(half);
}
