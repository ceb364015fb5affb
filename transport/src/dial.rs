//! Opening the connections of a session that are not its first.

use std::io;
use std::time::{Duration, Instant};

use crate::carrier::SourceEnd;
use crate::limit::{Limit, is_cancelled};
use crate::link::{Exchange, LinkError};
use crate::rdma::{self, RdmaError, RdmaOptions, SourceContext};
use crate::socket::{Connection, SocketError};
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
        uri: &Uri,
        session: SessionId,
        version: u16,
        timeout: Duration,
        rdma: RdmaOptions,
    ) -> Self {
        let context = || SourceContext::new(source.ram(), source.hasher(), rdma, source.initial());
        let rdma = matches!(uri, Uri::Rdma { .. }).then(context);
        Self { uri: uri.clone(), session, version, timeout, rdma }
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
                let (connection, answered) = open_attached::<OpenError>(uri, &preamble, timeout, cancelled)?;
                Ok((connection.into_source_end(timeout).map_err(LinkError::Io)?, answered))
            }
        }
    }
}

/// Opens a connection that belongs to a session, blocking: preamble out, ATTACHED back. Returns how long that took, without the
/// connecting, which a forwarder on the way may answer itself. One that is closed before any answer, as by a
/// destination that has more strangers than it bears, is opened again within the time-out.
pub(crate) fn open_attached<E: From<SocketError> + From<LinkError>>(
    uri: &Uri,
    preamble: &Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<(Connection, Duration), E> {
    let limit = Limit::new(timeout, cancelled);
    let mut pause = AGAIN_PAUSE_MIN;
    loop {
        let connection = Connection::connect(uri, timeout, cancelled)?;
        let begun = Instant::now();
        let attached = connection
            .tune(timeout)
            .map_err(LinkError::Io)
            .and_then(|()| attach(&connection, preamble, timeout, cancelled));
        let error = match attached {
            Ok(()) => return Ok((connection, begun.elapsed())),
            Err(error) => error,
        };
        let step = match limit.step() {
            Ok(step) if is_unanswered(&error) => step,
            Err(over) if is_cancelled(&over) => return Err(LinkError::Cancelled.into()),
            _ => return Err(error.into()),
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
    connection: &Connection,
    preamble: &Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), LinkError> {
    match Exchange::open(connection, preamble, timeout, cancelled)?.receive()? {
        Message::Attached { stream } if stream == preamble.stream => Ok(()),
        other => {
            let field = "answer to a stream's preamble";
            Err(WireError::BadValue { field, value: other.kind().into() }.into())
        }
    }
}
