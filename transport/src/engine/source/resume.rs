//! What the source does when its connections are lost before GO: the guest runs on, and the session is taken up again over
//! others, where it was.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::link::{Exchange, Link, LinkError};
use crate::postcopy::PostcopyError;
use crate::session::SourceEvent;
use crate::socket::Connection;
use crate::streams::StreamsError;
use crate::uri::Uri;
use crate::wire::control::Message;
use crate::wire::{Preamble, Role, SessionId, VERSION_MAX, VERSION_MIN};
use crossbeam_channel::unbounded;

use super::leave::Doing;
use super::watch::{TICK, Watch};
use super::{Attempt, Cause};
use crate::engine::explain;
use crate::engine::progress::Outage;

/// Pause after the first attempt; doubled from one to the next.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);

impl Attempt<'_> {
    /// Whether the session can be taken up again after this.
    pub(super) fn is_resumable(&self, cause: &Cause) -> bool {
        let lost = matches!(
            cause,
            // A destination that does not stop a stream may be one that is not heard. Taken up again, it stops them all.
            Cause::Streams(StreamsError::AllLost { .. } | StreamsError::NotStopped { .. })
                | Cause::Link(LinkError::Io(_) | LinkError::Closed | LinkError::Timeout(_))
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
            ) && self.undialled.is_some_and(|since| since.elapsed() < self.options.reconnect_timeout);
        (lost || undialled) && self.running.as_ref().is_some_and(|running| running.watch.is_resumable())
    }

    /// Takes the session up again. The guest comes first: it runs on, whether or not there will be connections.
    pub(super) fn resume(&mut self, cause: &Cause) -> Result<(), Cause> {
        if let Some(guest) = &self.backend.guest
            && self.paused_at.is_some()
        {
            if !self.backend.paused {
                guest.resume()?;
            }
            self.paused_at = None;
        }
        self.leave.begin(Doing::Reconnecting);
        let (uri, progress) = (self.uri, self.progress);
        let (watch, _) = self.parts();
        let outage = Outage::begin(progress, &explain(cause));
        watch.lose_all()?;
        self.take_postcopy_back();
        let (watch, _) = self.parts();
        let mut pause = PAUSE_MIN;
        loop {
            let last = match watch.try_resume(uri) {
                Ok(()) => break,
                Err(Cause::Socket(error)) => Cause::Socket(error),
                Err(Cause::Link(error)) => Cause::Link(error),
                Err(Cause::System(error)) => Cause::System(error),
                Err(other) => return Err(other),
            };
            let waited = outage.lasts(progress);
            if waited >= watch.patience() {
                return Err(Cause::NotReconnected {
                    seconds: waited.as_secs(),
                    lost: explain(cause),
                    last: explain(&last),
                });
            }
            let until = Instant::now() + pause.min(watch.patience() - waited);
            while Instant::now() < until {
                watch.leave.check()?;
                outage.lasts(progress);
                std::thread::sleep(TICK.min(pause));
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
        watch.resumed();
        outage.end(progress);
        progress.update(|r| r.reconnects += 1);
        Ok(())
    }
}

impl Watch {
    /// Whether both sides agreed to take the session up again, and may.
    fn is_resumable(&self) -> bool {
        !self.reconnect.is_zero() && self.reopening.is_some() && self.session.may_resume()
    }

    /// How long it may take.
    fn patience(&self) -> Duration {
        self.reconnect
    }

    /// The connections are lost, some perhaps only as far as the others are: ends what is left of them here. Frames without receipt
    /// are kept until the destination has stopped its workers.
    fn lose_all(&mut self) -> Result<(), Cause> {
        self.outage = None;
        self.abort();
        self.join();
        while let Ok(end) = self.lane_ends.1.try_recv() {
            self.on_lane_end(end)?;
        }
        Ok(())
    }

    /// One attempt, that ends early when the migration is cancelled.
    fn try_resume(&mut self, uri: &Uri) -> Result<(), Cause> {
        let connection = connect(uri, Role::Resume, self.id, self.timeout, &|| self.leave.is_over())?;
        let (deliver, inbox) = unbounded();
        let link = Link::spawn(self.runtime.handle(), connection, self.timeout, deliver, |event| event)?;
        // What still comes over the old one is heard no more.
        (self.link, self.inbox, self.link_lost) = (link, inbox, true);
        let resume = self.session.resume();
        self.send(resume);
        let deadline = Instant::now() + self.timeout;
        while self.next_event()? != SourceEvent::Resumed {
            if Instant::now() > deadline {
                return Err(LinkError::Timeout(self.timeout.as_secs()).into());
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
    pub(super) fn say_error_later(&self, uri: &Uri, cause: &Cause) {
        let mut session = self.session.clone();
        if !session.may_resume() {
            return;
        }
        let message = Message::Error { code: cause.code(), text: explain(cause) };
        let (uri, id, timeout) = (uri.clone(), self.id, self.timeout);
        let until = Instant::now() + self.reconnect;
        // Without a thread it waits in vain, and then gives up by itself.
        let Some(turn) = FAREWELLS.turn() else { return };
        let _ = std::thread::Builder::new().name("farewell".into()).spawn(move || {
            let _turn = turn;
            while Instant::now() < until {
                match tell(&uri, id, timeout, &session.resume(), &message) {
                    // Somebody else is there, or it has given up by itself.
                    Ok(()) | Err(Cause::Link(LinkError::Refused(_))) => return,
                    Err(_) => std::thread::sleep(PAUSE_MAX),
                }
            }
        });
    }
}

/// How many threads say farewell: sessions that fail one after the other must not gather them without a bound.
struct Farewells(AtomicUsize);

/// Those of all sessions of this process.
static FAREWELLS: Farewells = Farewells(AtomicUsize::new(0));
/// Most of them.
const FAREWELLS_MAX: usize = 16;

/// The right to one.
struct Farewell<'a>(&'a Farewells);

impl Farewells {
    fn turn(&self) -> Option<Farewell<'_>> {
        let more = |count| (count < FAREWELLS_MAX).then_some(count + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok().then(|| Farewell(self))
    }
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes a session up and ends it. Only an answer tells that what was said has come to where it was meant for.
fn tell(
    uri: &Uri,
    session: SessionId,
    timeout: Duration,
    resume: &Message,
    error: &Message,
) -> Result<(), Cause> {
    let connection = connect(uri, Role::Resume, session, timeout, &|| false)?;
    let exchange = Exchange::new(&connection, timeout, &|| false)?;
    exchange.send(resume)?;
    let deadline = Instant::now() + timeout;
    while !matches!(exchange.receive()?, Message::Resumed { .. }) {
        if Instant::now() > deadline {
            return Err(LinkError::Timeout(timeout.as_secs()).into());
        }
    }
    Ok(exchange.send(error)?)
}

/// A control connection in whatever role, unless it is given up meanwhile.
pub(super) fn connect(
    uri: &Uri,
    role: Role,
    session: SessionId,
    timeout: Duration,
    given_up: &dyn Fn() -> bool,
) -> Result<Connection, Cause> {
    let connection = Connection::connect(uri, timeout, given_up)?;
    connection.tune(timeout)?;
    connection.set_timeouts(None, Some(timeout))?;
    let preamble = Preamble { version_min: VERSION_MIN, version_max: VERSION_MAX, role, stream: 0, session };
    (&connection).write_all(&preamble.encode())?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn farewells_are_bounded() {
        let farewells = Farewells(AtomicUsize::new(0));
        let turns: Vec<_> = std::iter::from_fn(|| farewells.turn()).take(2 * FAREWELLS_MAX).collect();
        assert_eq!(turns.len(), FAREWELLS_MAX);
        drop(turns);
        assert!(farewells.turn().is_some());
    }
}
