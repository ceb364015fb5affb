//! The source's environment on a host: sockets, threads, and the system's clock and randomness.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use tokio::runtime::Handle;

use super::Cause;
use super::environment::{Environment, Event, Opening, Patience};
use super::leave::Leave;
use super::watch::TICK;
use crate::carrier::SourceEnd;
use crate::dial::{Dialler, OpenError, Route};
use crate::engine::{Options, runtime};
use crate::link::{Exchange, Link, LinkError};
use crate::local::{guarded, random};
use crate::postcopy::{self, PageServer, PostcopyError};
use crate::rdma::RdmaOptions;
use crate::socket::Connection;
use crate::source::{Batch, Lane, LaneNews, PageSource, Waits};
use crate::uri::Uri;
use crate::wire::control::Message;
use crate::wire::{Preamble, Role, SessionId, VERSION_MAX, VERSION_MIN};

/// Longest pause before a destination that could not be told is told again.
const FAREWELL_PAUSE: Duration = Duration::from_secs(2);

/// Runs phases on this thread until they are through. Their waits block it, so that they always are.
pub(in crate::engine) fn block<T>(phases: impl Future<Output = T>) -> T {
    match pin!(phases).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("every wait on a host blocks"),
    }
}

/// What is heard, with the number of what it is of: of links and attempts that were given up nothing is.
enum Heard {
    Link(u64, crate::link::LinkEvent),
    Opened { attempts: u64, id: u16, end: Result<SourceEnd, OpenError>, took: Duration },
}

/// See the module.
pub(super) struct Host {
    route: Route,
    uri: RefCell<Uri>,
    rdma: RdmaOptions,
    leave: Leave,
    dialler: RefCell<Option<Arc<Dialler>>>,
    heard: (Sender<Heard>, Receiver<Heard>),
    link: RefCell<Option<Link>>,
    links: Cell<u64>,
    /// Number of the attempts to open streams that are not given up, and what tells them when they are.
    attempts: Cell<u64>,
    vain: RefCell<Arc<AtomicBool>>,
    /// All that were started and have not ended.
    lanes: RefCell<Vec<Lane>>,
    lane_news: (Sender<LaneNews>, Receiver<LaneNews>),
    postcopy: RefCell<BTreeMap<u16, postcopy::Lane>>,
    /// Where those tell of their ends. Others than those get another channel: their numbers come again.
    postcopy_ends: RefCell<(Sender<postcopy::LaneEnd>, Receiver<postcopy::LaneEnd>)>,
    /// The one that was handed in, if any.
    runtime: Option<Handle>,
}

impl Host {
    /// For a destination at `uri`, and attempts to reach it that end when `leave` says so.
    pub(super) fn new(uri: &Uri, options: &Options, leave: Leave) -> Self {
        Self {
            route: Route::new(options.tls.clone()),
            uri: RefCell::new(uri.clone()),
            rdma: options.rdma,
            leave,
            dialler: RefCell::new(None),
            heard: unbounded(),
            link: RefCell::new(None),
            links: Cell::new(0),
            attempts: Cell::new(0),
            vain: RefCell::default(),
            lanes: RefCell::default(),
            lane_news: unbounded(),
            postcopy: RefCell::default(),
            postcopy_ends: RefCell::new(unbounded()),
            runtime: options.runtime.clone(),
        }
    }

    /// What it is, unless it is of something that was given up.
    fn of_now(&self, heard: Heard) -> Option<Event> {
        match heard {
            Heard::Link(link, event) => (link == self.links.get()).then_some(Event::Link(event)),
            Heard::Opened { attempts, id, end, took } => {
                (attempts == self.attempts.get()).then_some(Event::Opened { id, end, took })
            }
        }
    }
}

impl Waits for Host {}

impl Environment for Host {
    type Postcopy = Connection;

    fn session_id(&self) -> io::Result<SessionId> {
        random()
    }

    fn seed(&self) -> io::Result<u64> {
        random().map(u64::from_le_bytes)
    }

    fn set_address(&self, uri: Uri) {
        *self.uri.borrow_mut() = uri;
    }

    async fn wait(&self) {
        let mut any = crossbeam_channel::Select::new();
        any.recv(&self.heard.1);
        any.recv(&self.lane_news.1);
        let postcopy_ends = self.postcopy_ends.borrow();
        any.recv(&postcopy_ends.1);
        let _ = any.ready_timeout(TICK);
    }

    async fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn next(&self) -> Option<Event> {
        while let Ok(heard) = self.heard.1.try_recv() {
            if let Some(event) = self.of_now(heard) {
                return Some(event);
            }
        }
        match self.lane_news.1.try_recv() {
            Ok(LaneNews::Sent(account)) => return Some(Event::LaneSent(account)),
            Ok(LaneNews::Ended(end)) => return Some(Event::LaneEnd(end)),
            Err(_) => {}
        }
        let end = self.postcopy_ends.borrow().1.try_recv().ok()?;
        self.postcopy.borrow_mut().remove(&end.stream);
        Some(Event::PostcopyEnd(end))
    }

    async fn connect(
        &self,
        role: Role,
        session: SessionId,
        timeout: Duration,
        given_up: &dyn Fn() -> bool,
    ) -> Result<(), Cause> {
        let runtime = runtime::handle(self.runtime.as_ref(), timeout)?;
        let connection = connect(&self.route, &self.uri.borrow(), role, session, timeout, given_up)?;
        let number = self.links.get() + 1;
        self.links.set(number);
        let heard = self.heard.0.clone();
        let wrap = move |event| Heard::Link(number, event);
        let link = Link::spawn(&runtime, connection, timeout, heard, wrap, |_| {})?;
        *self.link.borrow_mut() = Some(link);
        Ok(())
    }

    fn send(&self, message: Message) {
        if let Some(link) = &*self.link.borrow() {
            link.send(message);
        }
    }

    fn is_sending(&self) -> bool {
        self.link.borrow().as_ref().is_some_and(Link::is_sending)
    }

    fn flush(&self, limit: Duration) {
        if let Some(link) = &*self.link.borrow() {
            link.flush(limit);
        }
    }

    fn say_farewell(&self, session: SessionId, resume: Message, error: Message, time: Patience) {
        let (route, uri, timeout) = (self.route.clone(), self.uri.borrow().clone(), time.timeout);
        let until = Instant::now() + time.reconnect;
        // Without a thread it waits in vain, and then gives up by itself.
        let Some(turn) = FAREWELLS.turn() else { return };
        let _ = std::thread::Builder::new().name("farewell".into()).spawn(move || {
            let _turn = turn;
            while Instant::now() < until {
                match tell(&route, &uri, session, timeout, &resume, &error) {
                    // Somebody else is there, or it has given up by itself.
                    Ok(()) | Err(Cause::Link(LinkError::Refused(_))) => return,
                    Err(_) => std::thread::sleep(FAREWELL_PAUSE),
                }
            }
        });
    }

    fn prepare_streams(&self, opening: &Opening, timeout: Duration) {
        let Opening { source, session, version } = opening;
        let dialler =
            Dialler::new(source, &self.route, &self.uri.borrow(), *session, *version, timeout, self.rdma);
        *self.dialler.borrow_mut() = Some(Arc::new(dialler));
    }

    fn open(&self, id: u16) -> io::Result<()> {
        let (dialler, leave) = (self.dialler.borrow().clone(), self.leave.clone());
        let dialler = dialler.expect("streams were prepared");
        let (heard, attempts, vain) = (self.heard.0.clone(), self.attempts.get(), self.vain.borrow().clone());
        let name = format!("open-{}", crate::wire::stream_number(id));
        std::thread::Builder::new().name(name).spawn(move || {
            let given_up = || vain.load(Ordering::Relaxed) || leave.is_over();
            let opened = guarded(|| dialler.open(id, &given_up)).unwrap_or_else(|what| {
                let text = format!("opening it panicked: {what}");
                Err(LinkError::Io(io::Error::other(text)).into())
            });
            let (end, took) = match opened {
                Ok((end, took)) => (Ok(end), took),
                Err(error) => (Err(error), Duration::ZERO),
            };
            // Nobody listens any more where the session went on without it.
            let _ = heard.send(Heard::Opened { attempts, id, end, took });
        })?;
        Ok(())
    }

    fn give_up_opening(&self) {
        self.attempts.set(self.attempts.get() + 1);
        self.vain.take().store(true, Ordering::Relaxed);
    }

    fn start_lane(
        &self,
        source: &Arc<PageSource>,
        end: SourceEnd,
        id: u16,
        work: Receiver<Batch>,
    ) -> io::Result<()> {
        let mut lanes = self.lanes.borrow_mut();
        lanes.retain(|lane| !lane.is_finished());
        lanes.push(Lane::spawn(source.clone(), end, id, work, self.lane_news.0.clone())?);
        Ok(())
    }

    fn abort_lanes(&self) {
        self.lanes.borrow().iter().for_each(Lane::abort);
    }

    async fn join_lanes(&self) {
        self.lanes.take().into_iter().for_each(Lane::join);
    }

    async fn dial_postcopy(
        &self,
        session: SessionId,
        version: u16,
        stream: u16,
        timeout: Duration,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Connection, PostcopyError> {
        postcopy::Lane::dial(&self.route, &self.uri.borrow(), session, version, stream, timeout, given_up)
    }

    fn start_postcopy(
        &self,
        server: &Arc<PageServer>,
        connection: Connection,
        stream: u16,
    ) -> io::Result<()> {
        let lane = postcopy::Lane::spawn(server, connection, stream, self.postcopy_ends.borrow().0.clone())?;
        self.postcopy.borrow_mut().insert(stream, lane);
        Ok(())
    }

    fn end_postcopy(&self) {
        self.postcopy.take();
        self.postcopy_ends.replace(unbounded());
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
    route: &Route,
    uri: &Uri,
    session: SessionId,
    timeout: Duration,
    resume: &Message,
    error: &Message,
) -> Result<(), Cause> {
    let connection = connect(route, uri, Role::Resume, session, timeout, &|| false)?;
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
fn connect(
    route: &Route,
    uri: &Uri,
    role: Role,
    session: SessionId,
    timeout: Duration,
    given_up: &dyn Fn() -> bool,
) -> Result<Connection, Cause> {
    let connection = route.connect(uri, timeout, given_up)?;
    connection.tune(timeout)?;
    connection.set_timeouts(None, Some(timeout))?;
    let preamble = Preamble { version_min: VERSION_MIN, version_max: VERSION_MAX, role, stream: 0, session };
    route.greet(&connection, &preamble)?;
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
