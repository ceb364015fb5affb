//! Who wants to open a session: any number of callers at a time, until one says a HELLO that is not refused.

use std::time::Instant;

use crate::link::{Link, LinkEvent};
use crate::session::{DestinationEvent, DestinationSession};
use crate::wire::control::{ErrorCode, Hello, Message};

use super::front::{Call, Event};
use super::{Destination, IncomingError, TICK};
use crate::engine::explain;

/// Somebody who has opened a control connection and not said HELLO.
pub(super) struct Caller {
    call: Call,
    session: DestinationSession,
    until: Instant,
}

/// A source that said HELLO.
pub(super) struct Opening {
    pub(super) call: Call,
    pub(super) session: DestinationSession,
    pub(super) hello: Hello,
}

impl Destination {
    /// Waits for a HELLO. Each of those who call has the time-out for it, and none keeps another from being heard.
    pub(super) fn opening(&mut self) -> Result<Opening, IncomingError> {
        loop {
            if self.progress.is_cancelled() {
                return Err(IncomingError::Cancelled);
            }
            self.refuse_late();
            let Ok(event) = self.events.recv_timeout(TICK) else { continue };
            match event {
                Event::Control(call) => {
                    // Of those who had to give way nothing more is heard.
                    self.callers.retain(|caller| !caller.call.link.is_closed());
                    let until = Instant::now() + self.options.timeout;
                    self.callers.push(Caller { call, session: DestinationSession::new(), until });
                }
                Event::Link { generation, event } => {
                    if let Some(opening) = self.hear_caller(generation, event) {
                        return Ok(opening);
                    }
                }
                Event::Refused { peer, reason } => {
                    self.tell(&format!("refused a connection from {peer}: {reason}"));
                }
                Event::Notice(text) => self.tell(&text),
                // Of a session that is over.
                Event::Stream { .. }
                | Event::Query { .. }
                | Event::Postcopy(_)
                | Event::Resume { .. }
                | Event::StreamEnded { .. } => {}
            }
        }
    }

    /// The first message of a control connection must be HELLO.
    fn hear_caller(&mut self, generation: u64, event: LinkEvent) -> Option<Opening> {
        let at = self.callers.iter().position(|caller| caller.call.generation == generation)?;
        let (code, reason) = match event {
            LinkEvent::Message(message) => match self.callers[at].session.handle(message) {
                Ok(DestinationEvent::Hello(hello)) => {
                    let Caller { call, session, .. } = self.callers.remove(at);
                    return Some(Opening { call, session, hello });
                }
                Ok(_) => return None,
                Err(error) => (ErrorCode::Protocol, explain(&error)),
            },
            LinkEvent::Dead(error) => (ErrorCode::Protocol, format!("no HELLO came: {}", explain(&error))),
        };
        self.refuse(at, code, reason);
        None
    }

    fn refuse(&mut self, at: usize, code: ErrorCode, reason: String) {
        let Caller { call, .. } = self.callers.remove(at);
        self.tell(&format!("refused a connection from {}: {reason}", call.peer));
        call.link.send(Message::Error { code, text: reason });
    }

    /// HELLO is to come soon.
    fn refuse_late(&mut self) {
        let now = Instant::now();
        while let Some(at) = self.callers.iter().position(|caller| caller.until <= now) {
            let reason = format!("no HELLO came within {} s", self.options.timeout.as_secs());
            self.refuse(at, ErrorCode::Timeout, reason);
        }
    }

    /// Another has the session now.
    pub(super) fn refuse_callers(&mut self) {
        for caller in self.callers.drain(..) {
            refuse_busy(&caller.call.link);
        }
    }
}

/// Says that a session is served, and not this one's.
pub(super) fn refuse_busy(link: &Link) {
    let text = "this destination already serves a session".into();
    link.send(Message::Error { code: ErrorCode::Busy, text });
}
