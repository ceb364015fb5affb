//! What the destination does when its source's connections are lost before GO: it keeps what it has, and waits until the source takes
//! the session up again.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{IncomingError, Session, say_no};
use crate::clock;
use crate::engine::destination::environment::Environment;
use crate::engine::explain;
use crate::engine::progress::Outage;
use crate::link::{LinkError, LinkEvent};
use crate::session::SessionError;
use crate::wire::control::{ErrorCode, Message, Totals};

/// Lost connections, and who comes to take their place.
pub(super) struct Outages<E: Environment> {
    /// How long a source may stay away; zero where it does not come back at all.
    pub(super) patience: Duration,
    /// A connection on which RESUME is to come, and its generation.
    knocking: Option<(E::Link, u64)>,
    current: Option<(Outage, LinkError)>,
    /// What is said on a new control connection once all streams of before have stopped.
    taking_up: Option<(E::Link, Message)>,
    /// Streams whose number is still held by an earlier incarnation, by that number.
    pub(super) waiting: BTreeMap<u16, (u16, E::Request)>,
}

impl<E: Environment> Outages<E> {
    pub(super) fn new(patience: Duration) -> Self {
        Self { patience, knocking: None, current: None, taking_up: None, waiting: BTreeMap::new() }
    }

    /// The streams of before are being stopped.
    pub(super) fn is_taking_up(&self) -> bool {
        self.taking_up.is_some()
    }

    /// Somebody who knows the session's id wants to take it up. The last who came is the one who did not give up.
    pub(super) fn knock(&mut self, link: E::Link, generation: u64) {
        self.knocking = Some((link, generation));
    }
}

impl<E: Environment> Session<'_, E> {
    /// The control connection is lost: waits for another, if the source may come back with one.
    pub(super) fn lose_link(&mut self, error: LinkError) -> Result<(), IncomingError> {
        self.link = None;
        // If it was the one that took its place, too.
        self.outages.taking_up = None;
        let lost = matches!(error, LinkError::Io(_) | LinkError::Closed | LinkError::Timeout(_));
        // Before its first stream a source has nothing to lose: it begins anew.
        if !lost || self.outages.patience.is_zero() || !self.streams.any() {
            return Err(IncomingError::Link(error));
        }
        let outage = Outage::begin(self.progress, &explain(&error));
        self.outages.current = Some((outage, error));
        Ok(())
    }

    /// Gives the session up when its source has stayed away for too long.
    pub(super) fn check_outage(&mut self) -> Result<(), IncomingError> {
        let patience = self.outages.patience;
        match self.outages.current.take_if(|(outage, _)| outage.lasts(self.progress) >= patience) {
            Some((_, source)) => Err(IncomingError::NotResumed { seconds: patience.as_secs(), source }),
            None => Ok(()),
        }
    }

    /// The accounts differ. Pages were lost, or damaged, after FINISH was said of them, if it is by their `streams`: the source hears of
    /// that, by a stream's end or a receipt, and resumes the session. Whatever else they differ by is a fault.
    pub(super) async fn wait_late_loss(
        &mut self,
        error: SessionError,
        streams: bool,
        deadline: Duration,
    ) -> Result<Option<Totals>, IncomingError> {
        if !streams || self.outages.patience.is_zero() {
            return Err(error.into());
        }
        while !self.machine.is_moving() {
            // It hears as much over streams that work. Where it has not, its account is wrong, and so is this side's.
            if self.link.is_some() && clock::now() > deadline {
                return Err(error.into());
            }
            self.wait_resumption().await?;
        }
        Ok(None)
    }

    /// Waits until the source takes the session up again. What it had of the handover is void by then.
    pub(super) async fn wait_resumed(&mut self) -> Result<(), IncomingError> {
        while !self.machine.is_moving() {
            self.wait_resumption().await?;
        }
        Ok(())
    }

    /// Hears what comes meanwhile, or waits a moment for it.
    async fn wait_resumption(&mut self) -> Result<(), IncomingError> {
        self.check_outage()?;
        match self.next().await? {
            Some(LinkEvent::Message(message)) => {
                self.machine.handle(message)?;
                Ok(())
            }
            Some(LinkEvent::Dead(error)) => self.lose_link(error),
            None => Ok(()),
        }
    }

    /// Something on a connection that is not the session's own: it may become that. Returns the source's last word.
    pub(super) fn on_other_link(
        &mut self,
        generation: u64,
        event: LinkEvent,
    ) -> Result<Option<LinkEvent>, IncomingError> {
        let Some((link, _)) = self.outages.knocking.take_if(|(_, g)| *g == generation) else {
            return Ok(None);
        };
        let refuse = |error: &SessionError| say_no(&link, ErrorCode::Protocol, explain(error));
        match event {
            LinkEvent::Message(Message::Resume { epoch }) => match self.machine.resume(epoch) {
                Ok(resumed) => {
                    // Nothing more is said to the old connection, nor heard from it.
                    (self.link, self.generation) = (None, generation);
                    self.outages.taking_up = Some((link, resumed));
                    self.state.clear();
                    self.take_postcopy_back()?;
                    for stream in self.streams.void() {
                        self.env.break_worker(stream);
                    }
                    self.take_up();
                }
                Err(error) => refuse(&error),
            },
            // It does not come back, and says so.
            LinkEvent::Message(Message::Error { code, text }) => {
                return Ok(Some(LinkEvent::Message(Message::Error { code, text })));
            }
            LinkEvent::Message(message) => refuse(&SessionError::OutOfOrder {
                peer: "source",
                message: message.name(),
                state: "ExpectResume",
            }),
            LinkEvent::Dead(_) => {}
        }
        Ok(None)
    }

    /// Goes on over another control connection once all streams have stopped: nothing of them reaches memory any more.
    pub(super) fn take_up(&mut self) {
        if self.streams.unfinished().is_some() {
            return;
        }
        let Some((link, resumed)) = self.outages.taking_up.take() else { return };
        self.link = Some(link);
        self.send(resumed);
        let progress = self.progress;
        // Without one, the source noticed first.
        let outage = self.outages.current.take().map(|(outage, _)| outage);
        outage.unwrap_or_else(|| Outage::begin(progress, "the source lost its connections")).end(progress);
        progress.update(|r| r.reconnects += 1);
    }
}
