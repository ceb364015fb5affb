//! The listening socket: reads preambles and hands connections to the session they belong to.

use std::io;
#[cfg(feature = "rdma")]
use std::net::SocketAddr;
#[cfg(feature = "rdma")]
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::accept::StreamRequest;
use crate::link::Link;
use crate::local::lock;
use crate::socket::{
    Acceptor, AsyncConnection, AsyncListener, Connection, Listener, PROOF_LEN, SessionKey, Unfit,
};
use crate::uri::Uri;
use crate::wire::control::{ErrorCode, Message};
use crate::wire::{Preamble, Role, SessionId, WireError};
use crossbeam_channel::Sender;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::AbortHandle;

use super::IncomingError;
use super::environment::{Call, Event, PostcopyEvent, Speaks};
use super::lobby::{Lobby, Place, Stage};

/// Refusals are not told of while this many events wait.
const REFUSALS_MAX: usize = 1024;
/// Descriptors that are kept for when there are no others: for the control socket, and files.
const SPARE_DESCRIPTORS: usize = 16;
/// How often it is seen whether descriptors are free again.
const SPARE_TICK: Duration = Duration::from_millis(250);
/// A shortage that ended less than this ago is the same one.
const TOLD_FOR: Duration = Duration::from_secs(60);
/// How often it is seen whether those who had to give way have gone.
const CLEARING_TICK: Duration = Duration::from_millis(1);
/// Pause after another failure to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long whoever failed to come in has to hear why.
const FAREWELL: Duration = Duration::from_secs(1);
/// What a connection under TLS 1.2 or later begins with: a record of a handshake.
const TLS_RECORD: [u8; 2] = [22, 3];

/// What shows that a connection belongs to the session.
type Proof = [u8; PROOF_LEN];

/// What is heard here.
pub(super) type Heard = Event<FrontLink, Request, Opened>;

/// A connection for messages, and its place in the lobby.
pub(super) struct FrontLink {
    link: Link,
    place: Arc<Place>,
    /// Of the session that it may become, under TLS.
    key: Option<SessionKey>,
}

impl Speaks for FrontLink {
    fn send(&self, message: Message) {
        self.link.send(message);
    }

    fn flush(&self, limit: Duration) {
        self.link.flush(limit);
    }

    fn is_sending(&self) -> bool {
        self.link.is_sending()
    }

    fn is_closed(&self) -> bool {
        self.link.is_closed()
    }
}

/// A data stream that is not answered, and its place in the lobby, if it came by that.
pub(super) struct Request {
    pub(super) stream: StreamRequest,
    _place: Option<Arc<Place>>,
}

/// A connection of postcopy that is not answered, and its place in the lobby.
pub(super) struct Opened {
    pub(super) connection: Connection,
    _place: Arc<Place>,
}

/// What is known of the session, for those who knock.
#[derive(Default)]
struct Session {
    /// And the version that both sides speak in it, once one has said HELLO and was not refused.
    agreed: Option<(SessionId, u16)>,
    /// What its connections prove to have, under TLS.
    key: Option<SessionKey>,
    generation: u64,
}

impl Session {
    fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// Whether a connection is of the session; if not, why.
    fn check(
        &self,
        preamble: &Preamble,
        connection: &Connection,
        proof: Option<&Proof>,
    ) -> Result<(), (ErrorCode, String)> {
        self.check_preamble(preamble)?;
        match (&self.key, proof) {
            (None, None) => Ok(()),
            (Some(key), Some(proof)) if connection.check(key, preamble, proof) => Ok(()),
            // As of a session that is not there: who may not know of it is told nothing.
            _ => Err((ErrorCode::UnknownSession, "it does not show that it belongs to the session".into())),
        }
    }

    fn check_preamble(&self, preamble: &Preamble) -> Result<(), (ErrorCode, String)> {
        match self.agreed {
            Some((id, version)) if id == preamble.session => {
                if (preamble.version_min..=preamble.version_max).contains(&version) {
                    return Ok(());
                }
                let Preamble { version_min, version_max, .. } = preamble;
                let text = format!(
                    "the session speaks version {version}; offered are {version_min} to {version_max}"
                );
                Err((ErrorCode::Version, text))
            }
            _ => Err((ErrorCode::UnknownSession, "there is no such session here".into())),
        }
    }
}

/// The running front; dropping it stops listening.
pub(super) struct Front {
    session: Arc<Mutex<Session>>,
    #[cfg(feature = "rdma")]
    _rdma: Option<RdmaFront>,
    accepting: AbortHandle,
    _runtime: OwnRuntime,
}

impl Drop for Front {
    fn drop(&mut self) {
        // A runtime that was handed in goes on. Those who have not said who they are have their time, and then nobody to say it to.
        self.accepting.abort();
    }
}

/// A runtime that may be dropped anywhere. Where tasks run that is not allowed, for it waits until its own have ended.
struct OwnRuntime(Option<Runtime>);

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        let Some(runtime) = self.0.take() else { return };
        if Handle::try_current().is_err() {
            return drop(runtime);
        }
        std::thread::scope(|scope| {
            // Without a thread it ends a little later.
            let given = Arc::new(Mutex::new(Some(runtime)));
            let taken = given.clone();
            let work = move || drop(lock(&taken).take());
            if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                lock(&given).take().into_iter().for_each(Runtime::shutdown_background);
            }
        });
    }
}

impl Front {
    /// Listens; returns where a source connects, with the port that the system chose.
    pub(super) fn start(
        listener: Listener,
        uri: &Uri,
        timeout: Duration,
        tls: Option<Acceptor>,
        given: Option<&Handle>,
        events: &Sender<Heard>,
    ) -> Result<(Self, Uri), IncomingError> {
        let listening = listener.uri();
        #[cfg(feature = "rdma")]
        let address = listener.address();
        #[cfg(not(feature = "rdma"))]
        let _ = uri;
        let own = match given {
            Some(_) => None,
            None => Some(Builder::new_multi_thread().worker_threads(1).enable_all().build()?),
        };
        let runtime = own.as_ref().map(Runtime::handle).or(given).expect("one of the two").clone();
        let session = Arc::new(Mutex::new(Session::default()));
        let listener = {
            let _guard = runtime.enter();
            AsyncListener::new(listener)?
        };
        let accepting = runtime
            .spawn(accept(listener, session.clone(), timeout, tls.map(Arc::new), events.clone()))
            .abort_handle();
        #[cfg(feature = "rdma")]
        let (rdma, listening) = match (uri, address, &listening) {
            (Uri::Rdma { .. }, Some(address), Uri::Tcp { host, port }) => {
                let listening = Uri::Rdma { host: host.clone(), port: *port };
                (Some(RdmaFront::start(address, session.clone(), events.clone())?), listening)
            }
            _ => (None, listening),
        };
        let front = Self {
            session,
            #[cfg(feature = "rdma")]
            _rdma: rdma,
            accepting,
            _runtime: OwnRuntime(own),
        };
        Ok((front, listening))
    }

    /// The session is this one's: connections of others are refused from here on.
    pub(super) fn give_to(&self, call: &Call<FrontLink>) {
        call.link.place.become_stage(Stage::Own);
        let mut session = lock(&self.session);
        session.agreed = Some((call.session, call.version));
        session.key = call.link.key.clone();
    }
}

/// Descriptors that are given up when there are no others.
struct Spare(Vec<std::fs::File>);

impl Spare {
    /// As many as there are to be; says whether there are.
    fn fill(&mut self) -> bool {
        while self.0.len() < SPARE_DESCRIPTORS {
            let Ok(file) = std::fs::File::open("/dev/null") else {
                self.0.clear();
                return false;
            };
            self.0.push(file);
        }
        true
    }
}

async fn accept(
    listener: AsyncListener,
    session: Arc<Mutex<Session>>,
    timeout: Duration,
    tls: Option<Arc<Acceptor>>,
    events: Sender<Heard>,
) {
    let lobby = Arc::new(Lobby::default());
    let mut spare = Spare(Vec::new());
    spare.fill();
    let mut told = None;
    loop {
        match listener.accept().await {
            Ok((connection, peer)) => {
                let (place, patience) = lobby.enter(&peer, timeout);
                let door = Door {
                    session: session.clone(),
                    timeout,
                    patience,
                    tls: tls.clone(),
                    events: events.clone(),
                    place: Arc::new(place),
                };
                let place = door.place.clone();
                place.set_task(tokio::spawn(door.greet(connection, peer)).abort_handle());
                while lobby.is_clearing() {
                    tokio::time::sleep(CLEARING_TICK).await;
                }
                let closed_for = lobby.closed_for();
                if !closed_for.is_zero() {
                    tokio::time::sleep(closed_for).await;
                }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                // Others in this process get by with those that are given up: nobody else comes in until they are back.
                spare.0.clear();
                lobby.halve();
                if told.is_none_or(|at: Instant| at.elapsed() > TOLD_FOR) {
                    let text =
                        format!("no connection is accepted for now: {error}; raise the limit (ulimit -n)");
                    let _ = events.send(Event::Notice(text));
                }
                told = Some(Instant::now());
                tokio::time::sleep(SPARE_TICK).await;
                while !spare.fill() {
                    lobby.halve();
                    tokio::time::sleep(SPARE_TICK).await;
                }
            }
            // A peer that went away while it waited, or no memory: the others still want in.
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Listens for streams over RDMA; dropping it stops that.
#[cfg(feature = "rdma")]
struct RdmaFront {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[cfg(feature = "rdma")]
impl RdmaFront {
    fn start(
        address: SocketAddr,
        session: Arc<Mutex<Session>>,
        events: Sender<Heard>,
    ) -> Result<Self, IncomingError> {
        let listener = crate::rdma::Listener::bind(address)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("rdma-accept".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok(Some(request)) => admit(request, &session, &events),
                    Ok(None) => {}
                    // The manager failed, or the adapter is gone: those who wait still want in when it is back.
                    Err(_) => std::thread::sleep(Duration::from_millis(50)),
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

#[cfg(feature = "rdma")]
impl Drop for RdmaFront {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed.
            let _ = thread.join();
        }
    }
}

/// Lets a stream over RDMA in that belongs to the session.
#[cfg(feature = "rdma")]
fn admit(request: crate::rdma::ConnectRequest, session: &Mutex<Session>, events: &Sender<Heard>) {
    let preamble = request.preamble();
    let refusal = match preamble.agree() {
        Err(e) => Some((ErrorCode::Version, e.to_string())),
        Ok(_) if preamble.role != Role::Stream => {
            Some((ErrorCode::Protocol, "only streams come over RDMA; the rest over TCP".into()))
        }
        Ok(_) => lock(session).check_preamble(preamble).err(),
    };
    let stream = preamble.stream;
    match refusal {
        None => {
            let request = Request { stream: StreamRequest::Queue(request), _place: None };
            let _ = events.send(Event::Stream { request, stream });
        }
        Some((code, reason)) => {
            request.refuse(code, &reason);
            if events.len() < REFUSALS_MAX {
                let _ = events.send(Event::Refused { peer: "an RDMA peer".into(), reason });
            }
        }
    }
}

/// What one connection needs to be let in.
struct Door {
    session: Arc<Mutex<Session>>,
    timeout: Duration,
    /// For the preamble, and all that comes before it.
    patience: Duration,
    tls: Option<Arc<Acceptor>>,
    events: Sender<Heard>,
    place: Arc<Place>,
}

impl Door {
    async fn greet(self, connection: AsyncConnection, peer: String) {
        let Err((connection, code, reason)) = self.admit(connection, &peer).await else { return };
        let message = Message::Error { code, text: reason.clone() }.encode();
        if self.events.len() < REFUSALS_MAX {
            let _ = self.events.send(Event::Refused { peer, reason });
        }
        if let Some(Ok(mut connection)) = connection.map(Connection::into_async) {
            self.part(&mut connection, &message).await;
        }
    }

    /// Says the last words, and waits until they are heard. A socket that is closed with unread bytes takes with it what was said last.
    async fn part(&self, connection: &mut AsyncConnection, words: &[u8]) {
        let farewell = async {
            connection.write_all(words).await?;
            connection.shutdown().await?;
            let mut scrap = [0; 4096];
            while connection.read(&mut scrap).await? > 0 {}
            Ok::<_, io::Error>(())
        };
        let _ = tokio::time::timeout(FAREWELL.min(self.patience), farewell).await;
    }

    async fn admit(
        &self,
        connection: AsyncConnection,
        peer: &str,
    ) -> Result<(), (Option<Connection>, ErrorCode, String)> {
        let (connection, preamble, proof) = self.preamble(connection).await?;
        let refuse = |connection, code, reason: &str| Err((Some(connection), code, reason.to_owned()));
        let version = match preamble.agree() {
            Ok(version) => version,
            Err(e) => return refuse(connection, ErrorCode::Version, &e.to_string()),
        };
        if let Err(e) = connection.tune(self.timeout) {
            return refuse(connection, ErrorCode::Local, &format!("its socket takes no options: {e}"));
        }
        let (stage, known) = {
            let session = lock(&self.session);
            match preamble.role {
                Role::Control if session.agreed.is_some() => {
                    drop(session);
                    return refuse(connection, ErrorCode::Busy, "this destination already serves a session");
                }
                Role::Control => (Stage::Caller, Ok(())),
                Role::Stream | Role::Query | Role::Resume | Role::Postcopy => {
                    (Stage::Known, session.check(&preamble, &connection, proof.as_ref()))
                }
            }
        };
        if let Err((code, reason)) = known {
            return refuse(connection, code, &reason);
        }
        if !self.place.become_stage(stage) {
            return refuse(connection, ErrorCode::Busy, "too many connections wait here");
        }
        match preamble.role {
            Role::Stream | Role::Postcopy => {
                let blocking = connection.set_nonblocking(false);
                let timeouts = connection.set_timeouts(Some(self.timeout), Some(self.timeout));
                if blocking.and(timeouts).is_err() {
                    return refuse(connection, ErrorCode::Local, "its socket takes no options");
                }
                let (stream, place) = (preamble.stream, self.place.clone());
                let _ = self.events.send(if preamble.role == Role::Postcopy {
                    let connection = Opened { connection, _place: place };
                    Event::Postcopy(PostcopyEvent::Opened { connection, stream })
                } else {
                    let request = Request { stream: StreamRequest::Socket(connection), _place: Some(place) };
                    Event::Stream { request, stream }
                });
            }
            Role::Control | Role::Query | Role::Resume => {
                let generation = lock(&self.session).next_generation();
                let key = match preamble.role {
                    Role::Control => connection.session_key(&preamble.session),
                    _ => Ok(None),
                };
                let Ok(key) = key else {
                    return refuse(connection, ErrorCode::Local, "its secrets give no key");
                };
                if let Some(link) = self.link(connection, generation, key) {
                    let _ = self.events.send(match preamble.role {
                        Role::Resume => Event::Resume { link, generation },
                        Role::Query => Event::Query { link, generation },
                        _ => {
                            let (peer, session) = (peer.to_owned(), preamble.session);
                            Event::Control(Call { link, peer, version, generation, session })
                        }
                    });
                }
            }
        }
        Ok(())
    }

    /// Shakes hands, where there is TLS, and reads the preamble and what proves it; whoever says nothing, or something else, is refused.
    async fn preamble(
        &self,
        connection: AsyncConnection,
    ) -> Result<(Connection, Preamble, Option<Proof>), (Option<Connection>, ErrorCode, String)> {
        let until = tokio::time::Instant::now() + self.patience;
        let silent = format!("it said nothing for {} s", self.patience.as_secs());
        let closed = |e: io::Error| (None, ErrorCode::Protocol, format!("it closed the connection: {e}"));
        let (mut connection, admitted) = match &self.tls {
            None => (connection, Ok(())),
            Some(acceptor) => match tokio::time::timeout_at(until, connection.protect(acceptor)).await {
                Err(_) => return Err((None, ErrorCode::Timeout, format!("{silent} of its TLS handshake"))),
                Ok(Ok(protected)) => protected,
                Ok(Err(unfit)) => return Err(self.turn_away(unfit).await),
            },
        };
        let mut bytes = [0; Preamble::LEN];
        let mut proof = [0; PROOF_LEN];
        let read = async {
            connection.read_exact(&mut bytes).await?;
            let decoded = Preamble::decode(&bytes);
            let proves = self.tls.is_some() && decoded.as_ref().is_ok_and(|said| said.role != Role::Control);
            if proves {
                connection.read_exact(&mut proof).await?;
            }
            Ok((decoded, proves.then_some(proof)))
        };
        let result = tokio::time::timeout_at(until, read).await;
        let connection = connection
            .into_connection()
            .map_err(|e| (None, ErrorCode::Local, format!("its socket failed: {e}")))?;
        match result {
            Err(_) => Err((Some(connection), ErrorCode::Timeout, silent)),
            Ok(Err(e)) => Err(closed(e)),
            Ok(Ok((Ok(preamble), proof))) => match admitted {
                Ok(()) => Ok((connection, preamble, proof)),
                Err(why) => Err((Some(connection), ErrorCode::Protocol, why)),
            },
            Ok(Ok((Err(_), _))) if bytes.starts_with(&TLS_RECORD) => Err((
                Some(connection),
                ErrorCode::Protocol,
                "it speaks TLS, and this destination does not".into(),
            )),
            Ok(Ok((Err(e), _))) => Err((Some(connection), code_of(&e), e.to_string())),
        }
    }

    /// Whoever did not come through the handshake.
    async fn turn_away(&self, unfit: Unfit) -> (Option<Connection>, ErrorCode, String) {
        match unfit {
            Unfit::Plain(connection) => {
                let reason = "it does not speak TLS, and this destination speaks nothing else".into();
                (Some(connection), ErrorCode::Protocol, reason)
            }
            Unfit::Failed(mut connection, error) => {
                // It has been told why.
                self.part(&mut connection, &[]).await;
                (None, ErrorCode::Protocol, format!("no TLS connection: {error}"))
            }
            Unfit::Gone => (None, ErrorCode::Protocol, "it does not speak TLS, and is gone".into()),
        }
    }

    fn link(&self, connection: Connection, generation: u64, key: Option<SessionKey>) -> Option<FrontLink> {
        let place = self.place.clone();
        let announced = move |len| place.expect(len);
        let place = self.place.clone();
        let wrap = move |event| {
            // Held until the connection is closed.
            let _ = &place;
            Event::Link { generation, event }
        };
        let (runtime, events) = (Handle::current(), self.events.clone());
        // Aborted with the link from here on; this task has nothing more to wait for.
        let link = Link::spawn(&runtime, connection, self.timeout, events, wrap, announced).ok()?;
        if let Some(task) = link.task() {
            self.place.set_task(task);
        }
        Some(FrontLink { link, place: self.place.clone(), key })
    }
}

fn code_of(error: &WireError) -> ErrorCode {
    match error {
        WireError::NoCommonVersion { .. } => ErrorCode::Version,
        _ => ErrorCode::Protocol,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::io::Write;
    use std::net::TcpStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const ID: SessionId = [7; 16];

    fn preamble(role: Role, versions: [u16; 2], session: SessionId) -> Preamble {
        let [version_min, version_max] = versions;
        Preamble { version_min, version_max, role, stream: 0, session }
    }

    /// On several workers, though the front has one; and the lobby, which each enters on its way, is never free for long.
    #[test]
    fn control_connections_that_come_at_once_have_a_number_each() {
        const AT_ONCE: usize = 60;
        const TIMES: usize = 100;
        let runtime = Builder::new_multi_thread().worker_threads(4).enable_all().build();
        let runtime = runtime.unwrap();
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().unwrap();
        let listener = runtime.block_on(async { AsyncListener::new(listener) }).unwrap();
        let (lobby, session) = (Arc::new(Lobby::default()), Arc::default());
        let (events, heard) = crossbeam_channel::unbounded();
        let timeout = Duration::from_secs(30);
        let says = preamble(Role::Control, [1, 1], ID).encode();
        let (over, mut numbers) = (AtomicBool::new(false), HashSet::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    lobby.is_clearing();
                }
            });
            let _over = Over(&over);
            for _ in 0..TIMES {
                let mut callers = Vec::new();
                for _ in 0..AT_ONCE {
                    callers.push(TcpStream::connect(address).unwrap());
                    let (connection, peer) = runtime.block_on(listener.accept()).unwrap();
                    let (place, patience) = lobby.enter(&peer, timeout);
                    let (session, events, place) = (Arc::clone(&session), events.clone(), Arc::new(place));
                    runtime.spawn(
                        Door { session, timeout, patience, tls: None, events, place }.greet(connection, peer),
                    );
                }
                callers.iter_mut().for_each(|caller| caller.write_all(&says).unwrap());
                for _ in 0..AT_ONCE {
                    let call = control(&heard);
                    assert!(numbers.insert(call.generation), "two have number {}", call.generation);
                }
            }
        });
    }

    /// Ends what waits for it, also after a failure.
    struct Over<'a>(&'a AtomicBool);

    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// The next control connection.
    fn control(heard: &crossbeam_channel::Receiver<Heard>) -> Call<FrontLink> {
        loop {
            if let Event::Control(call) = heard.recv_timeout(Duration::from_secs(30)).unwrap() {
                return call;
            }
        }
    }

    /// With a version that nobody speaks yet: there is only one so far.
    #[test]
    fn what_belongs_to_a_session_offers_the_version_that_it_agreed_on() {
        let session = Session { agreed: Some((ID, 7)), key: None, generation: 0 };
        let code = |versions, id| {
            session.check_preamble(&preamble(Role::Stream, versions, id)).map_err(|(code, _)| code)
        };
        for versions in [[7, 7], [1, 7], [7, 9], [6, 8]] {
            assert_eq!(code(versions, ID), Ok(()), "{versions:?}");
        }
        for versions in [[1, 1], [1, 6], [8, 9]] {
            assert_eq!(code(versions, ID), Err(ErrorCode::Version), "{versions:?}");
        }
        assert_eq!(code([7, 7], [8; 16]), Err(ErrorCode::UnknownSession));
        let nobodys = Session::default().check_preamble(&preamble(Role::Stream, [7, 7], ID));
        assert_eq!(nobodys.map_err(|(code, _)| code), Err(ErrorCode::UnknownSession));
    }
}
