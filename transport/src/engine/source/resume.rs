//! What the source does when its connections are lost before GO: the guest runs on, and the session is taken up again over
//! others, where it was.

use std::time::Duration;

use super::environment::Environment;
use super::leave::Doing;
use super::watch::{TICK, Watch};
use super::{Attempt, Cause};
use crate::clock;
use crate::engine::explain;
use crate::engine::progress::Outage;
use crate::link::LinkError;
use crate::postcopy::PostcopyError;
use crate::session::SourceEvent;
use crate::streams::StreamsError;
use crate::wire::Role;
use crate::wire::control::Message;

/// Pause after the first attempt; doubled from one to the next.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);

impl<E: Environment> Attempt<'_, E> {
    /// Whether the session can be taken up again after this.
    pub(super) fn is_resumable(&self, cause: &Cause) -> bool {
        let lost = matches!(
            cause,
            // A destination that does not stop a stream may be one that is not heard. Taken up again, it stops them all.
            Cause::Streams(
                StreamsError::AllLost { .. }
                    | StreamsError::LateLoss { .. }
                    | StreamsError::NotStopped { .. }
            ) | Cause::Link(LinkError::Io(_) | LinkError::Closed | LinkError::Timeout(_))
        );
        // The control connection may break a moment later, or a path that carries nothing else may come to carry this as well.
        let undialled =
            matches!(
                cause,
                Cause::Postcopy(
                    PostcopyError::Socket(_)
                        | PostcopyError::Link(LinkError::Io(_) | LinkError::Closed | LinkError::Timeout(_))
                        | PostcopyError::Io { .. }
                )
            ) && self.undialled.is_some_and(|since| clock::now() - since < self.options.reconnect_timeout);
        (lost || undialled) && self.running.as_ref().is_some_and(|running| running.watch.is_resumable())
    }

    /// Takes the session up again. The guest comes first: it runs on, whether or not there will be connections.
    pub(super) async fn resume(&mut self, cause: &Cause) -> Result<(), Cause> {
        if let Some(guest) = &self.backend.guest
            && self.paused_at.is_some()
        {
            // Before it writes.
            self.parts().1.goes_on();
            if !self.backend.paused {
                guest.resume()?;
            }
            self.paused_at = None;
        }
        self.leave.begin(Doing::Reconnecting);
        let (env, progress) = (self.env, self.progress);
        let (watch, _) = self.parts();
        let outage = Outage::begin(progress, &explain(cause));
        watch.lose_all().await?;
        self.take_postcopy_back();
        let (watch, _) = self.parts();
        let mut pause = PAUSE_MIN;
        loop {
            let last = match watch.try_resume().await {
                Ok(()) => break,
                Err(Cause::Socket(error)) => Cause::Socket(error),
                Err(Cause::Link(error)) => Cause::Link(error),
                Err(Cause::System(error)) => Cause::System(error),
                Err(other) => return Err(other),
            };
            let waited = outage.lasts(progress);
            if waited >= watch.patience.reconnect {
                return Err(Cause::NotReconnected {
                    seconds: waited.as_secs(),
                    lost: explain(cause),
                    last: explain(&last),
                });
            }
            let until = clock::now() + pause.min(watch.patience.reconnect - waited);
            while clock::now() < until {
                watch.leave.check()?;
                outage.lasts(progress);
                env.sleep(TICK.min(pause)).await;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
        watch.resumed();
        outage.end(progress);
        progress.update(|r| r.reconnects += 1);
        Ok(())
    }
}

impl<E: Environment> Watch<'_, E> {
    /// Whether both sides agreed to take the session up again, and may.
    pub(super) fn is_resumable(&self) -> bool {
        !self.patience.reconnect.is_zero() && self.reopening.is_some() && self.session.may_resume()
    }

    /// The connections are lost, some perhaps only as far as the others are: ends what is left of them here. Frames without receipt
    /// are kept until the destination has stopped its workers.
    async fn lose_all(&mut self) -> Result<(), Cause> {
        self.outage = None;
        self.abort();
        self.join().await;
        self.take_lane_ends()
    }

    /// One attempt, that ends early when the migration is cancelled.
    async fn try_resume(&mut self) -> Result<(), Cause> {
        let leave = &self.leave;
        self.env.connect(Role::Resume, self.id, self.patience.timeout, &|| leave.is_over()).await?;
        self.link_lost = true;
        let resume = self.session.resume();
        self.send(resume);
        let deadline = clock::now() + self.patience.timeout;
        while self.next_event().await? != SourceEvent::Resumed {
            if clock::now() > deadline {
                return Err(LinkError::Timeout(self.patience.timeout.as_secs()).into());
            }
        }
        Ok(())
    }

    /// The destination has stopped all streams: what was under way on them is dirty again, and they are connected anew.
    fn resumed(&mut self) {
        self.link_lost = false;
        let frames = self.streams.void();
        self.take_back(frames);
        // What was said shortly before may have been lost.
        self.say_resent();
        if let Some(reopening) = &mut self.reopening {
            reopening.all_lost();
        }
    }

    /// Tells a destination that cannot be reached now that the session is over, as soon as it can be: it waits for this source, which
    /// will not come back. In the background, and no longer than it waits.
    pub(super) fn say_error_later(&self, cause: &Cause) {
        let mut session = self.session.clone();
        if !session.may_resume() {
            return;
        }
        let message = Message::Error { code: cause.code(), text: explain(cause) };
        self.env.say_farewell(self.id, session.resume(), message, self.patience);
    }
}
