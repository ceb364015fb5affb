//! Damage between a real source and a real destination: single bits flipped, connections cut, at chosen bytes.

use std::time::Duration;

use crate::common::{Ended, Image, Job, MIB, PAGE, Recv, send, turn};
use pageferry::transport::wire::Preamble;
use pageferry::transport::wire::control::Message;
use pageferry::transport::wire::frame::FrameHeader;
use testkit::proxy::{Harm, Plan, Proxy, Way};

const LIMIT: Duration = Duration::from_secs(15);
/// The session's id in a preamble.
const SESSION_ID: std::ops::Range<usize> = 16..Preamble::LEN;
/// Where the first frame begins on a stream.
const FRAME: usize = Preamble::LEN;
/// Where what follows its header begins.
const BODY: usize = FRAME + FrameHeader::LEN;

/// Runs a transfer with one harm in it.
fn harmed(job: &Job, plan: Plan, args: &[&str]) -> (Ended, Recv, bool) {
    let recv = Recv::to_file(&job.to, 2);
    let proxy = Proxy::start(recv.port(), plan);
    let args = [&["--link-timeout", "2"], args].concat();
    let sent = send(&proxy.uri(), &job.from, &args).wait_for(LIMIT);
    (sent, recv, proxy.done())
}

fn flip(connection: usize, way: Way, at: usize) -> Plan {
    Plan { connection, way, at, harm: Harm::Flip((at % 8) as u8) }
}

/// The source failed for a reason; the destination failed for one, too, or still listens and then serves a good source.
#[track_caller]
fn assert_clean_failure(job: &Job, plan: Plan, sent: &Ended, mut recv: Recv) {
    assert_eq!(sent.code, Some(1), "{plan:?}: {sent:?}");
    sent.says(&["the source is unchanged"]);
    // A session that began under a damaged id, or whose stream was refused, ends; a connection that began none is refused.
    let other_id = matches!(plan.harm, Harm::Flip(_)) && SESSION_ID.contains(&plan.at);
    let began = plan.connection != 0 || (other_id && plan.way == Way::ToDestination);
    if !began && recv.ferry.refused_or_ended() {
        send(&recv.uri, &job.from, &[]).wait().code(0);
        recv.ferry.wait().code(0);
        job.assert_arrived();
    } else {
        let received = recv.ferry.wait_for(LIMIT);
        assert_eq!(received.code, Some(1), "{plan:?}: {received:?}");
        assert!(!received.report().verified, "{plan:?}");
    }
}

#[test]
fn a_flipped_bit_in_a_preamble_or_control_message_fails_cleanly() {
    let job = Job::new(Image::Random, MIB);
    // Preamble: magic, versions, role, session; then a PING or HELLO: kind, flags, length, fields.
    for at in [0, 7, 9, 12, 13, 14, 20, 31, 32, 33, 34, 37, 44, 60] {
        let _turn = turn();
        let plan = flip(0, Way::ToDestination, at);
        let (sent, recv, done) = harmed(&job, plan, &["--streams", "1"]);
        assert!(done, "{plan:?}");
        assert_clean_failure(&job, plan, &sent, recv);
    }
    for at in [0, 3, 5, 9, 20, 30, 41] {
        let _turn = turn();
        let plan = flip(0, Way::ToSource, at);
        let (sent, recv, done) = harmed(&job, plan, &["--streams", "1"]);
        assert!(done, "{plan:?}");
        sent.says(&[
            "broke the control protocol",
            "nothing was heard",
            "comes too slowly",
            "has not sent WELCOME",
        ]);
        assert_clean_failure(&job, plan, &sent, recv);
    }
}

#[test]
fn a_flipped_bit_in_a_streams_opening_fails_cleanly() {
    let job = Job::new(Image::Random, MIB);
    for (way, ats) in [(Way::ToDestination, [0, 9, 13, 17]), (Way::ToSource, [0, 5, 8, 12])] {
        for at in ats {
            let _turn = turn();
            let plan = flip(1, way, at);
            let (sent, recv, done) = harmed(&job, plan, &["--streams", "1"]);
            assert!(done, "{plan:?}");
            sent.says(&["data stream 0 could not be opened"]);
            assert_clean_failure(&job, plan, &sent, recv);
        }
    }
}

/// The receipt tells; the page is sent again.
#[test]
fn a_flipped_bit_in_a_raw_page_is_repaired() {
    let job = Job::new(Image::Random, 2 * MIB + PAGE);
    for at in [BODY, BODY + 5 * PAGE + 77, BODY + 64 * PAGE - 1] {
        let _turn = turn();
        let plan = flip(1, Way::ToDestination, at);
        let (sent, recv, done) = harmed(&job, plan, &["--streams", "1", "--codec", "raw"]);
        let received = recv.ferry.wait();
        assert!(done, "{plan:?}");
        let report = sent.code(0).report();
        assert_eq!((report.mismatches, report.streams_lost), (1, 0), "{plan:?}: {sent:?}");
        assert!(report.verified);
        received.code(0);
        job.assert_arrived();
    }
}

/// Offsets in the first stream of a transfer, in which way, of which memory, and what the error says.
const IN_A_STREAM: [(Way, usize, Image, &str); 7] = [
    (Way::ToDestination, FRAME + 1, Image::Random, "magic"),
    (Way::ToDestination, FRAME + 9, Image::Random, "checksum"),
    (Way::ToDestination, FRAME + 70, Image::Text, "checksum"),
    (Way::ToDestination, BODY + 3, Image::Text, "encoded section"),
    (Way::ToSource, 18, Image::Random, "magic"),
    (Way::ToSource, 18 + 12, Image::Random, "checksum"),
    (Way::ToSource, 18 + 40, Image::Text, "checksum"),
];

#[test]
fn a_flipped_bit_elsewhere_in_a_stream_loses_that_stream_only() {
    let jobs = [Job::new(Image::Random, 24 * MIB), Job::new(Image::Text, 24 * MIB)];
    let mut all_lost = 0;
    for (way, at, image, _) in IN_A_STREAM {
        let _turn = turn();
        let job = &jobs[usize::from(image == Image::Text)];
        let (sent, recv, done) = harmed(job, flip(1, way, at), &["--streams", "4", "--codec", codec(image)]);
        let received = recv.ferry.wait();
        received.code(0);
        // Stream 0 may get no work at all; then there is nothing to be harmed, or its end, without which both sides go on alike.
        let lost = sent.code(0).report().streams_lost;
        assert!(lost <= u32::from(done), "{way:?} {at}: {sent:?}");
        all_lost += lost;
        job.assert_arrived();
    }
    assert!(all_lost as usize > IN_A_STREAM.len() / 2, "{all_lost} streams were lost");
}

fn codec(image: Image) -> &'static str {
    if image == Image::Text { "zstd" } else { "raw" }
}

#[test]
fn a_flipped_bit_in_the_only_stream_fails_with_its_reason() {
    let jobs = [Job::new(Image::Random, 2 * MIB), Job::new(Image::Text, 2 * MIB)];
    for (way, at, image, word) in IN_A_STREAM {
        let _turn = turn();
        let job = &jobs[usize::from(image == Image::Text)];
        let plan = flip(1, way, at);
        let (sent, recv, done) = harmed(job, plan, &["--streams", "1", "--codec", codec(image)]);
        assert!(done, "{plan:?}");
        sent.code(1).says(&["all data streams are lost"]).says(&[word]);
        recv.ferry.wait_for(LIMIT).code(1).says(&[word]);
    }
}

#[test]
fn a_cut_stream_of_four_is_survived() {
    let job = Job::new(Image::Random, 24 * MIB);
    // In the first frame's header (or the end frame's), in its pages, and later.
    for (way, at) in [
        (Way::ToDestination, FRAME + 30),
        (Way::ToDestination, BODY + 3 * PAGE + 1),
        (Way::ToDestination, MIB + 7),
        (Way::ToSource, 18 + 100),
    ] {
        let _turn = turn();
        let plan = Plan { connection: 2, way, at, harm: Harm::Cut };
        let (sent, recv, done) = harmed(&job, plan, &["--streams", "4", "--codec", "raw"]);
        let received = recv.ferry.wait();
        received.code(0);
        let report = sent.code(0).report();
        assert!(done || at > FRAME + 30, "{plan:?}");
        assert_eq!(report.streams_lost, u32::from(done), "{plan:?}: {sent:?}");
        assert!(report.verified);
        job.assert_arrived();
    }
}

#[test]
fn a_cut_control_connection_ends_both_sides() {
    let job = Job::new(Image::Random, MIB);
    let first = Message::Prepared.encode().len();
    for (way, at) in [
        (Way::ToDestination, 0),
        (Way::ToDestination, 17),
        (Way::ToDestination, 50),
        (Way::ToSource, 0),
        (Way::ToSource, first),
    ] {
        let _turn = turn();
        let plan = Plan { connection: 0, way, at, harm: Harm::Cut };
        let (sent, recv, done) = harmed(&job, plan, &["--streams", "2"]);
        assert!(done, "{plan:?}");
        sent.says(&["closed the control connection", "control connection broke"]);
        assert_clean_failure(&job, plan, &sent, recv);
    }
}
