//! What many strangers, or one who never stops, can do to a destination: cost it nothing that grows, and keep nobody out.

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pageferry::transport::wire::Role;
use pageferry::transport::wire::control::Message;
use testkit::PATIENCE;

use crate::common::raw::{Peer, preamble};
use crate::common::{Ferry, Image, Job, MIB, Recv, folder, send, turn};

/// A good source is served.
fn assert_serves(job: &Job, recv: Recv) -> crate::common::Ended {
    send(&recv.uri, &job.from, &["--streams", "8"]).wait().code(0);
    let received = recv.ferry.wait();
    received.code(0);
    job.assert_arrived();
    received
}

/// Runs `strangers` until `meanwhile` has ended, however it does.
fn besieged<T>(strangers: impl Fn(&AtomicBool) + Sync, threads: usize, meanwhile: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&over);
        for _ in 0..threads {
            scope.spawn(|| strangers(&over));
        }
        meanwhile()
    })
}

/// PINGs of a stranger who never reads are not answered into memory, and his connections end.
#[test]
fn pings_of_a_stranger_who_never_reads_take_no_memory() {
    const PUSHED_MIN: usize = 100 * MIB;
    const GROWS_MAX: usize = 16 * MIB;
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, 1);
    let pings: Vec<u8> = (0..2000).flat_map(|nonce| Message::Ping(nonce).encode()).collect();
    let (pushed, closed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let strangers = |over: &AtomicBool| {
        while !over.load(Ordering::Relaxed) {
            let Ok(mut socket) = TcpStream::connect(("127.0.0.1", recv.port())) else { return };
            // Without an end it would wait for ever.
            socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
            socket.write_all(&preamble(Role::Control, 0).encode()).unwrap();
            while !over.load(Ordering::Relaxed) {
                match socket.write(&pings) {
                    Ok(len) => pushed.fetch_add(len, Ordering::Relaxed),
                    Err(_) => {
                        closed.fetch_add(1, Ordering::Relaxed);
                        break;
                    }
                };
            }
        }
    };
    let before = recv.ferry.resident();
    besieged(strangers, 1, || {
        let mut most = 0;
        while pushed.load(Ordering::Relaxed) < PUSHED_MIN || closed.load(Ordering::Relaxed) == 0 {
            most = most.max(recv.ferry.resident());
            let grown = most.saturating_sub(before);
            assert!(grown < GROWS_MAX, "{grown} bytes for {pushed:?} of PINGs");
            std::thread::sleep(Duration::from_millis(20));
        }
        send(&recv.uri, &job.from, &[]).wait().code(0);
    });
    recv.ferry.wait().code(0);
    job.assert_arrived();
}

/// Keeps so many silent connections up: one that is closed is opened anew.
fn keep_up(port: u16, count: usize, over: &AtomicBool) {
    let connect = || {
        let socket = TcpStream::connect(("127.0.0.1", port)).ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(socket)
    };
    let is_open = |socket: &TcpStream| match socket.peek(&mut [0]) {
        Ok(_) => false,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    };
    let mut sockets: Vec<_> = (0..count).map(|_| connect()).collect();
    while !over.load(Ordering::Relaxed) {
        for socket in &mut sockets {
            if !socket.as_ref().is_some_and(is_open) {
                // First the old one goes.
                *socket = None;
                *socket = connect();
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn silent_connections_kept_up_keep_nobody_out() {
    const COUNT: usize = 640;
    const THREADS: usize = 4;
    const DESCRIPTORS_MAX: usize = 700;
    const CROWD_MIN: usize = 250;
    let _turn = turn();
    let job = Job::new(Image::Mixed, 64 * MIB);
    let recv = Recv::to_file(&job.to, 10);
    let port = recv.port();
    let strangers = |over: &AtomicBool| keep_up(port, COUNT / THREADS, over);
    besieged(strangers, THREADS, || {
        let deadline = Instant::now() + PATIENCE;
        while recv.ferry.descriptors() < CROWD_MIN {
            assert!(Instant::now() < deadline, "they do not come");
            std::thread::sleep(Duration::from_millis(5));
        }
        // So many that as many as there are may have come.
        std::thread::sleep(Duration::from_millis(500));
        let mut sending = send(&recv.uri, &job.from, &["--streams", "8"]);
        while !sending.has_ended() {
            let open = recv.ferry.descriptors();
            assert!(open < DESCRIPTORS_MAX, "{open} descriptors");
            std::thread::sleep(Duration::from_millis(5));
        }
        sending.wait().code(0);
    });
    recv.ferry.wait().code(0);
    job.assert_arrived();
}

/// Whoever opens control connections and says no HELLO does not have the session.
#[test]
fn callers_without_a_hello_keep_nobody_out() {
    let _turn = turn();
    let job = Job::new(Image::Mixed, 2 * MIB);
    let recv = Recv::to_file(&job.to, 10);
    let callers: Vec<Peer> = (0..100)
        .map(|_| {
            let mut peer = Peer::connect(recv.port());
            peer.write(&preamble(Role::Control, 0).encode());
            peer
        })
        .collect();
    assert_serves(&job, recv);
    drop(callers);
}

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
