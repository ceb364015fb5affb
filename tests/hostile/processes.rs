//! Either side killed, stopped or interrupted in the middle of a transfer.

use std::time::Duration;

use crate::common::{Image, Job, MIB, Recv, send, turn};
use testkit::proxy::{Harm, Plan, Proxy, Way};

/// `--link-timeout` of both sides, and what they may take at most.
const TIMEOUT: u64 = 2;
const LIMIT: Duration = Duration::from_secs(3 * TIMEOUT + 10);

/// In the middle: the bytes of stream 0 no longer arrive, and everything else is as it was.
const MIDDLE: Plan = Plan { connection: 1, way: Way::ToDestination, at: MIB, harm: Harm::Stall };

/// Starts a transfer and waits until it is in the middle.
fn middle() -> (Job, Recv, Proxy, crate::common::Ferry) {
    let job = Job::new(Image::Random, 24 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let proxy = Proxy::start(recv.port(), MIDDLE);
    let sender = send(&proxy.uri(), &job.from, &["--streams", "1", "--link-timeout", "2"]);
    proxy.wait_done();
    (job, recv, proxy, sender)
}

#[test]
fn a_killed_source_is_missed() {
    let _turn = turn();
    let (_job, recv, _proxy, sender) = middle();
    sender.signal("KILL");
    assert_eq!(sender.wait().code, None);
    let ended = recv.ferry.wait_for(LIMIT);
    ended.code(1).says(&["the source is gone", "incomplete"]);
    assert!(!ended.report().verified);
}

#[test]
fn a_killed_destination_is_missed() {
    let _turn = turn();
    let (job, recv, _proxy, sender) = middle();
    recv.ferry.signal("KILL");
    let ended = sender.wait_for(LIMIT);
    ended.code(1).says(&["the source is unchanged"]).says(&["closed", "broke", "lost"]);
    assert_eq!(ended.json()["status"], "failed");
    assert_eq!(std::fs::read(&job.from).unwrap(), job.content);
}

#[test]
fn a_stopped_source_is_missed_and_then_hears_so() {
    let _turn = turn();
    let (_job, recv, _proxy, sender) = middle();
    sender.signal("STOP");
    recv.ferry.wait_for(LIMIT).code(1).says(&["nothing was heard"]);
    sender.signal("CONT");
    sender.wait_for(LIMIT).code(1).says(&["the source is unchanged"]);
}

#[test]
fn a_stopped_destination_is_missed_and_then_hears_so() {
    let _turn = turn();
    let (_job, recv, _proxy, sender) = middle();
    recv.ferry.signal("STOP");
    sender.wait_for(LIMIT).code(1).says(&["nothing was heard", "no receipt"]);
    recv.ferry.signal("CONT");
    recv.ferry.wait_for(LIMIT).code(1).says(&["the source"]);
}

#[test]
fn an_interrupted_side_says_so_to_the_other() {
    for interrupted in ["source", "destination"] {
        let _turn = turn();
        let (_job, recv, _proxy, sender) = middle();
        let ferry = if interrupted == "source" { &sender } else { &recv.ferry };
        ferry.signal("INT");
        let (sent, received) = (sender.wait_for(LIMIT), recv.ferry.wait_for(LIMIT));
        let (mine, other) = if interrupted == "source" { (sent, received) } else { (received, sent) };
        mine.code(130).says(&["cancelled"]);
        other.code(1).says(&["cancelled"]);
        assert_eq!(mine.json()["status"], "cancelled");
    }
}

/// All its memory arrives, and then nothing: the stalled stream is given up after the timeout, by both.
#[test]
fn a_stream_that_stalls_is_given_up() {
    let _turn = turn();
    let job = Job::new(Image::Random, 24 * MIB);
    let recv = Recv::to_file(&job.to, TIMEOUT);
    let plan = Plan { at: 60, ..MIDDLE };
    let proxy = Proxy::start(recv.port(), plan);
    let sent = send(&proxy.uri(), &job.from, &["--streams", "4", "--link-timeout", "2"]).wait_for(LIMIT);
    let received = recv.ferry.wait_for(LIMIT);
    assert!(proxy.done());
    assert_eq!(sent.code(0).report().streams_lost, 1, "{sent:?}");
    received.code(0);
    job.assert_arrived();
}
