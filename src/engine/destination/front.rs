//! The listening socket: reads preambles and hands connections to the session they belong to.

use std::io;
#[cfg(feature = "rdma")]
use std::net::SocketAddr;
#[cfg(feature = "rdma")]
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::runtime::{Handle, Runtime};
use transport::carrier::StreamRequest;
use transport::destination::ReceiveError;
use transport::link::{AsyncConnection, AsyncListener, Link, LinkEvent};
use transport::socket::{Connection, Listener};
use transport::uri::Uri;
use transport::wire::control::{ErrorCode, Message, StreamEnd};
use transport::wire::{Preamble, Role, SessionId, WireError};

use super::IncomingError;
use super::postcopy::PostcopyEvent;

/// Connections whose preamble is awaited at a time; more are closed at once. Far fewer than the 1024 descriptors that a process
/// usually may have, so that a session's own connections and files find some.
const STRANGERS_MAX: usize = 512;

/// Refusals are not told of while this many events wait.
const REFUSALS_MAX: usize = 1024;

/// What the session's thread hears.
pub(super) enum Event {
    /// A control connection; its messages follow as [`Event::Link`] with this generation.
    Control { link: Link, peer: String, version: u16, generation: u64 },
    /// Something came over a link.
    Link { generation: u64, event: LinkEvent },
    /// A data stream of the session, unanswered yet.
    Stream { request: StreamRequest, stream: u16 },
    /// Something about the pages that follow the guest.
    Postcopy(PostcopyEvent),
    /// A source asks what became of the session.
    Query { link: Link, generation: u64 },
    /// A source takes its session up again.
    Resume { link: Link, generation: u64 },
    /// A stream's worker has ended.
    StreamEnded { stream: u16, result: Result<StreamEnd, ReceiveError> },
    /// A connection was refused.
    Refused { peer: String, reason: String },
}

/// What is known of the session, for those who knock.
struct Session {
    id: Option<SessionId>,
    version: u16,
    generation: u64,
}

/// The running front; dropping it stops listening.
pub(super) struct Front {
    session: Arc<Mutex<Session>>,
    #[cfg(feature = "rdma")]
    _rdma: Option<RdmaFront>,
    _runtime: Runtime,
}

impl Front {
    /// Listens; returns where a source connects, with the port that the system chose.
    pub(super) fn start(
        listener: Listener,
        uri: &Uri,
        timeout: Duration,
        events: &Sender<Event>,
    ) -> Result<(Self, Uri), IncomingError> {
        let listening = listener.uri();
        #[cfg(feature = "rdma")]
        let address = listener.address();
        #[cfg(not(feature = "rdma"))]
        let _ = uri;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let session = Arc::new(Mutex::new(Session { id: None, version: 0, generation: 0 }));
        let listener = {
            let _guard = runtime.enter();
            AsyncListener::new(listener)?
        };
        let (shared, events_of) = (session.clone(), events.clone());
        runtime.spawn(async move {
            let strangers = Arc::new(tokio::sync::Semaphore::new(STRANGERS_MAX));
            loop {
                let Ok((connection, peer)) = listener.accept().await else {
                    // Out of descriptors, or a peer that went away while it waited: the others still want in.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let Ok(permit) = strangers.clone().try_acquire_owned() else { continue };
                let door = Door { session: shared.clone(), timeout, events: events_of.clone() };
                tokio::spawn(async move {
                    door.greet(connection, peer).await;
                    drop(permit);
                });
            }
        });
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
            _runtime: runtime,
        };
        Ok((front, listening))
    }

    /// The session is over before it began: another may open one.
    pub(super) fn end_session(&self) {
        lock(&self.session).id = None;
    }
}

fn lock(session: &Mutex<Session>) -> std::sync::MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(|e| e.into_inner())
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
        events: Sender<Event>,
    ) -> Result<Self, IncomingError> {
        let listener = transport::rdma::Listener::bind(address)?;
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
fn admit(request: transport::rdma::ConnectRequest, session: &Mutex<Session>, events: &Sender<Event>) {
    let preamble = request.preamble();
    let refusal = match preamble.agree() {
        Err(e) => Some((ErrorCode::Version, e.to_string())),
        Ok(_) if preamble.role != Role::Stream => {
            Some((ErrorCode::Protocol, "only streams come over RDMA; the rest over TCP".into()))
        }
        Ok(_) if lock(session).id != Some(preamble.session) => {
            Some((ErrorCode::UnknownSession, "there is no such session here".into()))
        }
        Ok(_) => None,
    };
    let stream = preamble.stream;
    match refusal {
        None => {
            let _ = events.send(Event::Stream { request: StreamRequest::Queue(request), stream });
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
    events: Sender<Event>,
}

impl Door {
    async fn greet(self, connection: AsyncConnection, peer: String) {
        if let Err((mut connection, code, reason)) = self.admit(connection, &peer).await {
            if let Some(connection) = &mut connection {
                // Non-blocking, and far smaller than a fresh socket's buffer.
                let message = Message::Error { code, text: reason.clone() }.encode();
                let _ = io::Write::write_all(&mut &*connection, &message);
            }
            if self.events.len() < REFUSALS_MAX {
                let _ = self.events.send(Event::Refused { peer, reason });
            }
        }
    }

    async fn admit(
        &self,
        connection: AsyncConnection,
        peer: &str,
    ) -> Result<(), (Option<Connection>, ErrorCode, String)> {
        let (connection, preamble) = self.preamble(connection).await?;
        let refuse = |connection, code, reason: &str| Err((Some(connection), code, reason.to_owned()));
        let version = match preamble.agree() {
            Ok(version) => version,
            Err(e) => return refuse(connection, ErrorCode::Version, &e.to_string()),
        };
        if let Err(e) = connection.tune(self.timeout) {
            return refuse(connection, ErrorCode::Local, &format!("its socket takes no options: {e}"));
        }
        let known = {
            let mut session = lock(&self.session);
            match preamble.role {
                Role::Control if session.id.is_some() => {
                    drop(session);
                    return refuse(connection, ErrorCode::Busy, "this destination already serves a session");
                }
                Role::Control => {
                    session.id = Some(preamble.session);
                    session.version = version;
                    session.generation += 1;
                    true
                }
                Role::Stream | Role::Query | Role::Resume | Role::Postcopy => {
                    session.id == Some(preamble.session)
                }
            }
        };
        if !known {
            return refuse(connection, ErrorCode::UnknownSession, "there is no such session here");
        }
        match preamble.role {
            Role::Stream | Role::Postcopy => {
                let blocking = connection.set_nonblocking(false);
                let timeouts = connection.set_timeouts(Some(self.timeout), Some(self.timeout));
                if blocking.and(timeouts).is_err() {
                    return refuse(connection, ErrorCode::Local, "its socket takes no options");
                }
                let stream = preamble.stream;
                let _ = self.events.send(if preamble.role == Role::Postcopy {
                    Event::Postcopy(PostcopyEvent::Opened { connection, stream })
                } else {
                    Event::Stream { request: StreamRequest::Socket(connection), stream }
                });
            }
            Role::Control => {
                let generation = lock(&self.session).generation;
                if let Some(link) = self.link(connection, generation) {
                    let peer = peer.to_owned();
                    let _ = self.events.send(Event::Control { link, peer, version, generation });
                }
            }
            Role::Query | Role::Resume => {
                let generation = {
                    let mut session = lock(&self.session);
                    session.generation += 1;
                    session.generation
                };
                if let Some(link) = self.link(connection, generation) {
                    let _ = self.events.send(match preamble.role {
                        Role::Resume => Event::Resume { link, generation },
                        _ => Event::Query { link, generation },
                    });
                }
            }
        }
        Ok(())
    }

    /// Reads the preamble; whoever says nothing, or something else, is refused.
    async fn preamble(
        &self,
        mut connection: AsyncConnection,
    ) -> Result<(Connection, Preamble), (Option<Connection>, ErrorCode, String)> {
        let mut bytes = [0; Preamble::LEN];
        let result = tokio::time::timeout(self.timeout, connection.read_exact(&mut bytes)).await;
        let connection = connection
            .into_connection()
            .map_err(|e| (None, ErrorCode::Local, format!("its socket failed: {e}")))?;
        match result {
            Err(_) => {
                let reason = format!("it said nothing for {} s", self.timeout.as_secs());
                Err((Some(connection), ErrorCode::Timeout, reason))
            }
            Ok(Err(e)) => Err((None, ErrorCode::Protocol, format!("it closed the connection: {e}"))),
            Ok(Ok(())) => match Preamble::decode(&bytes) {
                Ok(preamble) => Ok((connection, preamble)),
                Err(e) => Err((Some(connection), code_of(&e), e.to_string())),
            },
        }
    }

    fn link(&self, connection: Connection, generation: u64) -> Option<Link> {
        let wrap = move |event| Event::Link { generation, event };
        Link::spawn(&Handle::current(), connection, self.timeout, self.events.clone(), wrap).ok()
    }
}

fn code_of(error: &WireError) -> ErrorCode {
    match error {
        WireError::NoCommonVersion { .. } => ErrorCode::Version,
        _ => ErrorCode::Protocol,
    }
}
