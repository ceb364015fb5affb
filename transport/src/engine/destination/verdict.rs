//! What a destination says of a session that it gave up, to a source that may have said GO and not know what came of it: that the guest
//! never ran here. Without that word the source must keep the guest paused, for ever.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::link::{Link, LinkEvent};
use crate::session::SessionError;
use crate::wire::control::{ErrorCode, Message, SessionStatus};

use super::front::Event;
use super::opening::refuse_busy;
use super::postcopy::PostcopyEvent;
use super::{Destination, IncomingError, Session, TICK};
use crate::engine::explain;

/// Connections that are kept for a source that asks: one that asks again has given up the last.
const ASKING_MAX: usize = 8;

impl Session {
    /// Answers a source that asks, until it has heard or would hardly ask any more.
    pub(super) fn answer_late(&mut self, listening: &Destination, error: &IncomingError) {
        // A source that says itself that all is over has not said GO.
        if !self.machine.may_be_asked() || matches!(error, IncomingError::Session(SessionError::Peer { .. }))
        {
            return;
        }
        let cancelled = matches!(error, IncomingError::Cancelled);
        let patience = self.patience_for_questions(listening, cancelled);
        listening.tell(&format!(
            "{}; its source is answered for {} s, should it ask",
            explain(error),
            patience.as_secs()
        ));
        let deadline = Instant::now() + patience;
        let mut asking = VecDeque::new();
        if let Some(link) = self.link.take() {
            asking.push_back((self.generation, link));
        }
        while Instant::now() < deadline && (cancelled || !listening.progress.is_cancelled()) {
            let Ok(event) = listening.events.recv_timeout(TICK) else { continue };
            if answer(listening, &mut asking, event) {
                return;
            }
        }
    }

    /// How long a source may still ask what became of the session.
    pub(super) fn patience_for_questions(&self, listening: &Destination, cancelled: bool) -> Duration {
        let options = &listening.options;
        // Who asks after memory alone does so for one time-out. Who cancels wants an end, and the source is there.
        if cancelled || self.guest.is_none() {
            return options.timeout;
        }
        options.handover_timeout.max(options.reconnect_timeout).max(options.timeout)
    }
}

/// Says whether the source has heard.
fn answer(listening: &Destination, asking: &mut VecDeque<(u64, Link)>, event: Event) -> bool {
    let abandoned = || Message::Status(SessionStatus::Abandoned);
    match event {
        Event::Query { link, generation } => {
            link.send(abandoned());
            if asking.len() == ASKING_MAX {
                asking.pop_front();
            }
            asking.push_back((generation, link));
        }
        Event::Link { generation, event } => {
            let Some(at) = asking.iter().position(|(g, _)| *g == generation) else { return false };
            match event {
                LinkEvent::Message(Message::Status(SessionStatus::Abandoned)) => return true,
                LinkEvent::Message(Message::Query) => asking[at].1.send(abandoned()),
                LinkEvent::Message(_) => {}
                LinkEvent::Dead(_) => drop(asking.remove(at)),
            }
        }
        Event::Resume { link, .. } => {
            let text = "this destination has given the session up; the guest never ran here".into();
            link.send(Message::Error { code: ErrorCode::UnknownSession, text });
        }
        Event::Stream { request, .. } => {
            request.refuse(ErrorCode::UnknownSession, "this destination has given the session up".into());
        }
        Event::Control(call) => refuse_busy(&call.link),
        Event::Refused { peer, reason } => {
            listening.tell(&format!("refused a connection from {peer}: {reason}"));
        }
        Event::Notice(text) => listening.tell(&text),
        Event::Postcopy(
            PostcopyEvent::Opened { .. } | PostcopyEvent::Ended(_) | PostcopyEvent::Faults(_),
        )
        | Event::StreamEnded { .. } => {}
    }
    false
}
