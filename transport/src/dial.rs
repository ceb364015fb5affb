//! Opening the connections of a session that are not its first.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use crate::carrier::SourceEnd;
use crate::limit::{Limit, is_cancelled};
use crate::link::{Exchange, LinkError};
use crate::local::lock;
use crate::rdma::{self, RdmaError, RdmaOptions, SourceContext};
use crate::socket::{Connection, Connector, SessionKey, SocketError, Tls, TlsError};
use crate::source::PageSource;
use crate::uri::Uri;
use crate::wire::control::Message;
use crate::wire::{Preamble, Role, SessionId, WireError};

/// Pause before a connection is opened again that was closed before an answer; doubled from one to the next, up to [`AGAIN_PAUSE_MAX`].
const AGAIN_PAUSE_MIN: Duration = Duration::from_millis(5);
/// The longest such pause.
const AGAIN_PAUSE_MAX: Duration = Duration::from_millis(50);

/// A stream that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No connection.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The destination refused, or did not answer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// No connection over RDMA.
    #[error(transparent)]
    Rdma(#[from] RdmaError),
}

impl OpenError {
    /// Whether whoever waited asked to wait no longer.
    pub fn is_cancelled(&self) -> bool {
        match self {
            Self::Socket(error) => error.is_cancelled(),
            Self::Link(error) => matches!(error, LinkError::Cancelled),
            Self::Rdma(error) => error.is_cancelled(),
        }
    }
}

/// Begins, in the background, what opening the first stream to `uri` would otherwise wait for: the RDMA libraries look for devices
/// and load their drivers.
pub fn warm_up(uri: &Uri) {
    if matches!(uri, Uri::Rdma { .. }) {
        // Whatever fails here fails again, and is reported, where a stream is opened.
        let _ = std::thread::Builder::new().name("rdma-warm-up".into()).spawn(rdma::warm_up);
    }
}

/// Opens the streams of a session.
pub struct Dialler {
    route: Route,
    uri: Uri,
    session: SessionId,
    version: u16,
    timeout: Duration,
    rdma: Option<SourceContext>,
}

impl Dialler {
    /// For streams that carry the pages of `source` to the destination at `uri`, which speaks `version`; each step of opening one takes
    /// at most `timeout`.
    pub fn new(
        source: &PageSource,
        route: &Route,
        uri: &Uri,
        session: SessionId,
        version: u16,
        timeout: Duration,
        rdma: RdmaOptions,
    ) -> Self {
        let context = || SourceContext::new(source.ram(), source.hasher(), rdma, source.initial());
        let rdma = matches!(uri, Uri::Rdma { .. }).then(context);
        Self { route: route.clone(), uri: uri.clone(), session, version, timeout, rdma }
    }

    /// Opens the stream with the id `stream`; returns how long its opening was answered after, too: a round trip. Ends soon once
    /// `cancelled`, which is asked several times a second, says yes.
    pub fn open(
        &self,
        stream: u16,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(SourceEnd, Duration), OpenError> {
        let begun = Instant::now();
        let Self { version, session, timeout, .. } = *self;
        let preamble =
            Preamble { version_min: version, version_max: version, role: Role::Stream, stream, session };
        match (&self.uri, &self.rdma) {
            (Uri::Rdma { host, port }, Some(context)) => {
                let end = rdma::connect(context, (host, *port), preamble, timeout, cancelled)?;
                // There and back to find the way, and once more until it is attached.
                Ok((end, begun.elapsed() / 2))
            }
            (uri, _) => {
                let (connection, answered) =
                    open_attached::<OpenError>(&self.route, uri, &preamble, timeout, cancelled)?;
                Ok((connection.into_source_end(timeout).map_err(LinkError::Io)?, answered))
            }
        }
    }
}

/// The route to a destination: what protects a session's connections, and shows whose they are.
#[derive(Clone, Debug, Default)]
pub struct Route(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    tls: Option<Tls>,
    /// What the files held when the session's first connection was made.
    config: Mutex<Option<Arc<ClientConfig>>>,
    /// Of the session.
    key: Mutex<Option<SessionKey>>,
}

impl Route {
    /// Under TLS, or as it is.
    pub fn new(tls: Option<Tls>) -> Self {
        Self(Arc::new(Shared { tls, ..Shared::default() }))
    }

    fn connector(&self, uri: &Uri) -> Result<Option<Connector>, TlsError> {
        let Some(tls) = &self.0.tls else { return Ok(None) };
        let mut config = lock(&self.0.config);
        if config.is_none() {
            *config = Some(tls.config()?);
        }
        let config = config.clone().expect("it was read");
        tls.connector(config, uri).map(Some)
    }

    /// Connects within `timeout`, and shakes hands where there is TLS.
    pub(crate) fn connect(
        &self,
        uri: &Uri,
        timeout: Duration,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Connection, SocketError> {
        let fail = |what: &str, source| SocketError::new(format!("cannot connect to {uri}{what}"), source);
        let connector = self.connector(uri).map_err(|e| fail("", io::Error::other(e)))?;
        let mut connection = Connection::connect(uri, timeout, cancelled)?;
        if let Some(connector) = connector {
            let shaken = connection.protect(&connector, Limit::new(timeout, cancelled));
            shaken.map_err(|e| fail(" by TLS", e))?;
        }
        Ok(connection)
    }

    /// Says what the connection is for and, where there is TLS, shows that it belongs to the session.
    pub(crate) fn greet(&self, connection: &Connection, preamble: &Preamble) -> io::Result<()> {
        let mut bytes = preamble.encode().to_vec();
        if preamble.role == Role::Control {
            *lock(&self.0.key) = connection.session_key(&preamble.session)?;
        } else if let Some(key) = &*lock(&self.0.key) {
            bytes.extend(connection.prove(key, preamble)?);
        }
        io::Write::write_all(&mut &*connection, &bytes)
    }
}

/// Opens a connection that belongs to a session, blocking: preamble out, ATTACHED back. Returns how long that took, without the
/// connecting, which a forwarder on the way may answer itself. One that is closed before any answer, as by a
/// destination that has more strangers than it bears, is opened again within the time-out.
pub(crate) fn open_attached<E: From<SocketError> + From<LinkError>>(
    route: &Route,
    uri: &Uri,
    preamble: &Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<(Connection, Duration), E> {
    let limit = Limit::new(timeout, cancelled);
    let mut pause = AGAIN_PAUSE_MIN;
    loop {
        let (error, unanswered): (E, bool) = match route.connect(uri, timeout, cancelled) {
            Ok(connection) => {
                let begun = Instant::now();
                let attached = connection
                    .tune(timeout)
                    .map_err(LinkError::Io)
                    .and_then(|()| attach(route, &connection, preamble, timeout, cancelled));
                let Err(error) = attached else { return Ok((connection, begun.elapsed())) };
                let unanswered = is_unanswered(&error);
                (error.into(), unanswered)
            }
            Err(error) => {
                let unanswered = error.is_unanswered();
                (error.into(), unanswered)
            }
        };
        let step = match limit.step() {
            Ok(step) if unanswered => step,
            Err(over) if is_cancelled(&over) => return Err(LinkError::Cancelled.into()),
            _ => return Err(error),
        };
        std::thread::sleep(pause.min(step));
        pause = (pause * 2).min(AGAIN_PAUSE_MAX);
    }
}

/// Whether a connection was closed without a word.
fn is_unanswered(error: &LinkError) -> bool {
    match error {
        LinkError::Closed => true,
        LinkError::Io(error) => {
            matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
        }
        _ => false,
    }
}

fn attach(
    route: &Route,
    connection: &Connection,
    preamble: &Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), LinkError> {
    let exchange = Exchange::new(connection, timeout, cancelled)?;
    route.greet(connection, preamble).map_err(|e| exchange.error(e))?;
    match exchange.receive()? {
        Message::Attached { stream } if stream == preamble.stream => Ok(()),
        other => {
            let field = "answer to a stream's preamble";
            Err(WireError::BadValue { field, value: other.kind().into() }.into())
        }
    }
}
