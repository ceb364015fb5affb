//! What a destination says of a session that it gave up, to a source that may have said GO and not know what came of it: that the guest
//! never ran here. Without that word the source must keep the guest paused, for ever.

use std::collections::VecDeque;
use std::time::Duration;

use super::{IncomingError, Session, say_busy, say_no};
use crate::clock;
use crate::engine::destination::environment::{Environment, Event, EventOf, Speaks};
use crate::engine::explain;
use crate::link::LinkEvent;
use crate::session::SessionError;
#[cfg(test)]
use crate::simulation::fault;
use crate::wire::control::{ErrorCode, Message, SessionStatus};

/// Connections that are kept for a source that asks: one that asks again has given up the last.
const ASKING_MAX: usize = 8;

impl<E: Environment> Session<'_, E> {
    /// Answers a source that asks, until it has heard or would hardly ask any more.
    pub(super) async fn answer_late(&mut self, error: &IncomingError) {
        // A source that says itself that all is over has not said GO.
        if !self.machine.may_be_asked() || matches!(error, IncomingError::Session(SessionError::Peer { .. }))
        {
            return;
        }
        #[cfg(test)]
        if fault::is(fault::Fault::AbandonedUnheard) {
            return;
        }
        let cancelled = matches!(error, IncomingError::Cancelled);
        let patience = self.patience_for_questions(cancelled);
        self.tell(&format!(
            "{}; its source is answered for {} s, should it ask",
            explain(error),
            patience.as_secs()
        ));
        let deadline = clock::now() + patience;
        let mut asking = VecDeque::new();
        if let Some(link) = self.link.take() {
            asking.push_back((self.generation, link));
        }
        while clock::now() < deadline && (cancelled || !self.progress.is_cancelled()) {
            self.env.wait().await;
            if let Some(event) = self.env.next()
                && self.answer(&mut asking, event)
            {
                return;
            }
        }
    }

    /// How long a source may still ask what became of the session.
    pub(super) fn patience_for_questions(&self, cancelled: bool) -> Duration {
        let options = self.options;
        // Who asks after memory alone does so for one time-out. Who cancels wants an end, and the source is there.
        if cancelled || self.guest.is_none() {
            return options.timeout;
        }
        let patience = options.handover_timeout.max(options.reconnect_timeout).max(options.timeout);
        // A source in postcopy asks without end, and is waited for as long.
        if self.postcopy.is_some() { patience.max(options.postcopy_timeout) } else { patience }
    }

    /// Says whether the source has heard.
    fn answer(&self, asking: &mut VecDeque<(u64, E::Link)>, event: EventOf<E>) -> bool {
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
                let text = "this destination has given the session up; the guest never ran here";
                say_no(&link, ErrorCode::UnknownSession, text.into());
            }
            Event::Stream { request, .. } => {
                let text = "this destination has given the session up";
                self.env.refuse(request, ErrorCode::UnknownSession, text.into());
            }
            Event::Control(call) => say_busy(&call.link),
            Event::Refused { peer, reason } => {
                self.tell(&format!("refused a connection from {peer}: {reason}"));
            }
            Event::Notice(text) => self.tell(&text),
            Event::Postcopy(_) | Event::StreamEnded { .. } | Event::Populated(_) => {}
        }
        false
    }
}
