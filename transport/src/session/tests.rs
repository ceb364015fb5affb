//! Both machines of a session, message by message.

use super::*;

fn totals(pages: u64) -> Totals {
    Totals { streams: vec![], pages, state: 0 }
}

fn moving() -> (SourceSession, DestinationSession) {
    let (mut source, mut destination) = (SourceSession::new(), DestinationSession::new());
    let hello = Hello {
        seed: 0,
        capabilities: 0,
        streams: 1,
        live: true,
        timeout_ms: 1,
        reconnect_ms: 1,
        regions: vec![],
        presence: vec![],
        dense: vec![],
        data_bytes: 0,
        machine: String::new(),
    };
    destination.handle(Message::Hello(hello)).unwrap();
    let welcome = Welcome { version: 1, capabilities: 0, streams: 1, timeout_ms: 1, reconnect_ms: 1 };
    source.handle(Message::Welcome(welcome)).unwrap();
    source.handle(destination.prepared()).unwrap();
    (source, destination)
}

#[test]
fn a_welcome_takes_only_what_was_offered() {
    let good = Welcome { version: 1, capabilities: 1, streams: 2, timeout_ms: 1, reconnect_ms: 1 };
    assert_eq!(check_welcome(&good, 2, 3), Ok(()));
    for bad in [
        Welcome { version: 0, ..good },
        Welcome { version: VERSION_MAX + 1, ..good },
        Welcome { streams: 0, ..good },
        Welcome { streams: 3, ..good },
        Welcome { capabilities: 4, ..good },
    ] {
        assert!(matches!(check_welcome(&bad, 2, 3), Err(SessionError::NotOffered { .. })), "{bad:?}");
    }
}

#[test]
fn postcopy_is_announced_before_its_messages() {
    let (mut source, mut destination) = moving();
    let run = ChunkRun { first: 0, count: 1, pages: 1 };
    let missing = Message::Missing(vec![run]);
    assert!(destination.clone().handle(missing.clone()).is_err());
    assert!(source.clone().handle(Message::PostcopyReady { unit_chunks: 0 }).is_err());
    assert_eq!(destination.handle(source.postcopy()), Ok(DestinationEvent::Postcopy));
    assert!(destination.clone().handle(Message::Postcopy).is_err(), "once is enough");
    let ready = source.handle(Message::PostcopyReady { unit_chunks: 8 });
    assert_eq!(ready, Ok(SourceEvent::PostcopyReady { unit_chunks: 8 }));
    assert_eq!(destination.handle(missing.clone()), Ok(DestinationEvent::Missing(vec![run])));
    assert!(destination.clone().handle(Message::Sent { pages: 1 }).is_err(), "nobody runs yet");
    destination.handle(source.finish(totals(1))).unwrap();
    assert!(destination.clone().handle(missing).is_err(), "accounts are closed");
    source.handle(destination.ready(totals(1))).unwrap();
    let arrived = Message::Arrived(Arrived { pages: 1, ..Arrived::default() });
    assert!(source.clone().handle(arrived.clone()).is_err(), "it was not handed over");
    destination.handle(source.go()).unwrap();
    source.handle(Message::Running).unwrap();
    assert_eq!(destination.handle(Message::Sent { pages: 1 }), Ok(DestinationEvent::Sent(1)));
    assert!(matches!(source.handle(arrived), Ok(SourceEvent::Arrived(_))));
    assert!(!source.owns_guest());
}

#[test]
fn ownership_passes_at_go_and_only_there() {
    let (mut source, mut destination) = moving();
    assert!(source.owns_guest());
    // GO out of turn is refused: without READY the destination never runs the guest.
    assert!(matches!(destination.clone().handle(Message::Go), Err(SessionError::OutOfOrder { .. })));
    let finish = source.finish(totals(3));
    assert!(source.owns_guest());
    assert!(matches!(destination.handle(finish), Ok(DestinationEvent::Finish(_))));
    assert!(matches!(destination.clone().handle(Message::Go), Err(SessionError::OutOfOrder { .. })));
    let ready = destination.ready(totals(3));
    assert_eq!(source.handle(ready), Ok(SourceEvent::Ready));
    assert!(source.owns_guest(), "READY alone takes nothing from the source");
    let go = source.go();
    assert!(!source.owns_guest());
    assert_eq!(destination.status(), SessionStatus::Ready);
    assert_eq!(destination.handle(go.clone()), Ok(DestinationEvent::Go));
    assert_eq!(destination.status(), SessionStatus::Running);
    assert!(!destination.abandon(), "a guest that runs is not given up");
    assert_eq!(destination.handle(go), Ok(DestinationEvent::Reply(Message::Running)));
    assert_eq!(source.handle(Message::Running), Ok(SourceEvent::Running));
    assert!(!source.owns_guest());
}

#[test]
fn a_destination_is_asked_only_after_ready() {
    let totals = || Totals { streams: vec![], pages: 0, state: 0 };
    let ready = || {
        let mut d = DestinationSession::new();
        d.state = DestinationState::Finishing;
        let _ = d.ready(totals());
        d
    };
    let mut d = ready();
    assert!(!d.may_be_asked());
    assert!(d.abandon() && d.may_be_asked());
    let mut d = ready();
    d.resume(1).unwrap();
    assert!(d.abandon() && !d.may_be_asked(), "READY was taken back");
    let mut d = ready();
    d.handle(Message::Go).unwrap();
    assert!(!d.abandon() && !d.may_be_asked(), "the guest may have run");
    d.never_ran();
    assert!(d.may_be_asked());
    assert_eq!(d.status(), SessionStatus::Abandoned);
}

#[test]
fn an_abandoned_destination_never_runs() {
    let (mut source, mut destination) = moving();
    let finish = source.finish(totals(3));
    destination.handle(finish).unwrap();
    let ready = destination.ready(totals(3));
    source.handle(ready).unwrap();
    let go = source.go();
    assert!(destination.abandon());
    assert!(destination.handle(go).is_err());
    assert_eq!(source.learn(destination.status()), Learnt::Abandoned);
    assert_eq!(source.learn(SessionStatus::Moving), Learnt::Unknown);
}

#[test]
fn a_stream_that_stopped_while_finish_was_on_its_way_is_left_out() {
    let (mut source, _) = moving();
    let end = |stream| crate::wire::control::StreamEnd { stream, frames: 1, fold: 2 };
    source.finish(Totals { streams: vec![end(0), end(1)], ..totals(3) });
    source.handle(Message::StreamStopped { stream: 1, reason: "closed".into() }).unwrap();
    let theirs = Totals { streams: vec![end(0)], ..totals(3) };
    assert_eq!(source.handle(Message::Ready(theirs)), Ok(SourceEvent::Ready));
}

#[test]
fn differing_totals_stop_the_handover() {
    let (mut source, _) = moving();
    source.finish(totals(3));
    let error = source.handle(Message::Ready(totals(4))).unwrap_err();
    assert!(error.to_string().contains("number of pages"), "{error}");
    assert!(source.owns_guest());
}

#[test]
#[should_panic(expected = "GO follows READY")]
fn go_before_ready_is_a_programming_error() {
    moving().0.go();
}

#[test]
fn pings_are_answered_in_every_state() {
    let (mut source, mut destination) = moving();
    assert_eq!(source.handle(Message::Ping(7)), Ok(SourceEvent::Reply(Message::Pong(7))));
    assert_eq!(destination.handle(Message::Ping(8)), Ok(DestinationEvent::Reply(Message::Pong(8))));
}

/// Both sides resumed.
fn resume(source: &mut SourceSession, destination: &mut DestinationSession) {
    let Message::Resume { epoch } = source.resume() else { panic!("RESUME is what resume() says") };
    assert_eq!(source.handle(destination.resume(epoch).unwrap()), Ok(SourceEvent::Resumed));
}

#[test]
fn a_resumed_session_takes_ready_back() {
    let (mut source, mut destination) = moving();
    let finish = source.finish(totals(3));
    destination.handle(Message::State(vec![])).unwrap();
    destination.handle(finish).unwrap();
    // READY is lost.
    destination.ready(totals(3));
    resume(&mut source, &mut destination);
    assert_eq!(destination.status(), SessionStatus::Moving);
    assert!(destination.clone().handle(Message::Go).is_err(), "GO without READY since the session resumed");
    // All of it once more.
    destination.handle(Message::State(vec![])).unwrap();
    let finish = source.finish(totals(4));
    destination.handle(finish).unwrap();
    assert_eq!(source.handle(destination.ready(totals(4))), Ok(SourceEvent::Ready));
    let go = source.go();
    assert_eq!(destination.handle(go), Ok(DestinationEvent::Go));
}

#[test]
fn a_resumed_session_takes_postcopy_back() {
    let (mut source, mut destination) = moving();
    let missing = Message::Missing(vec![ChunkRun { first: 0, count: 1, pages: 1 }]);
    for go in [false, true] {
        destination.handle(source.postcopy()).unwrap();
        source.handle(Message::PostcopyReady { unit_chunks: 0 }).unwrap();
        destination.handle(missing.clone()).unwrap();
        destination.handle(Message::State(vec![])).unwrap();
        destination.handle(source.finish(totals(1))).unwrap();
        source.handle(destination.ready(totals(1))).unwrap();
        if go {
            break;
        }
        resume(&mut source, &mut destination);
        assert!(destination.clone().handle(missing.clone()).is_err(), "it was not announced anew");
        assert!(source.clone().handle(Message::PostcopyReady { unit_chunks: 0 }).is_err(), "it comes late");
    }
    assert_eq!(destination.handle(source.go()), Ok(DestinationEvent::Go));
    assert!(!source.may_resume() && destination.resume(9).is_err(), "the guest is the destination's");
}

#[test]
fn a_late_resume_takes_nothing_back() {
    let (mut source, mut destination) = moving();
    let late = source.resume();
    resume(&mut source, &mut destination);
    let Message::Resume { epoch } = late else { panic!() };
    let finish = source.finish(totals(3));
    destination.handle(finish).unwrap();
    source.handle(destination.ready(totals(3))).unwrap();
    for stale in [epoch, epoch + 1] {
        assert!(matches!(destination.resume(stale), Err(SessionError::NoResume { .. })), "{stale}");
    }
    assert_eq!(destination.status(), SessionStatus::Ready);
    assert_eq!(destination.handle(source.go()), Ok(DestinationEvent::Go));
    assert!(destination.resume(99).is_err(), "a guest that runs is not taken back");
    assert_eq!(destination.status(), SessionStatus::Running);
}

#[test]
fn only_the_answer_to_the_last_attempt_resumes() {
    let (mut source, _) = moving();
    source.resume();
    source.resume();
    assert!(source.clone().handle(Message::Resumed { epoch: 1 }).is_err());
    assert!(source.owns_guest());
    assert_eq!(source.handle(Message::Resumed { epoch: 2 }), Ok(SourceEvent::Resumed));
}

#[test]
fn an_abandoned_session_is_not_resumed() {
    let (_, mut destination) = moving();
    destination.abandon();
    assert!(destination.resume(1).is_err());
    assert!(DestinationSession::new().resume(1).is_err());
}

#[test]
#[should_panic(expected = "RESUME in state Gone")]
fn resume_after_go_is_a_programming_error() {
    let (mut source, mut destination) = moving();
    let finish = source.finish(totals(3));
    destination.handle(finish).unwrap();
    source.handle(destination.ready(totals(3))).unwrap();
    source.go();
    source.resume();
}
