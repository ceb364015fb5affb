//! What a stream needs of whatever carries it: bytes in order both ways and, where the carrier can, pages that it places straight
//! into the destination's memory.
//!
//! The workers of [`crate::source`] and [`crate::destination`] know no more of a socket or a queue pair than this.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::destination::PageSink;
use crate::dial::open_attached;
use crate::link::LinkError;
use crate::socket::{Connection, SocketError};
use crate::source::{PageSource, WINDOW_BYTES_MIN};
use crate::sys::{ReceiveList, SendList};
use crate::uri::Uri;
use crate::wire::control::{ErrorCode, Message};
use crate::wire::{Preamble, Role, SessionId};

/// How often a thread that waits for bytes looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);

/// Ends a stream from outside: threads that wait on it wake up with errors.
pub trait Breaker: Send + Sync + std::fmt::Debug {
    /// Ends both directions at once. Harmless when they have ended.
    fn shutdown(&self);
}

/// The source's sending end: frames.
pub(crate) trait FrameSender: Send {
    /// Queues all bytes of the list, in order, and says how many there were. Those of a carrier that gathers may wait for
    /// [`Self::flush`].
    fn send(&mut self, list: SendList<'_>) -> io::Result<u64>;

    /// Sends what was gathered.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Most frames that may be without a receipt.
    fn frames_max(&self) -> usize {
        usize::MAX
    }

    /// Bytes that may be under way at any rate.
    fn window_min(&self) -> u64 {
        WINDOW_BYTES_MIN
    }

    /// Whether raw pages may be placed at all.
    fn places(&self) -> bool {
        false
    }

    /// Queues these pages of a chunk to be placed, before the header that is sent next; `None` if they must travel with
    /// it. What is returned is kept until the frame is receipted, or its stream dead on both sides.
    fn place(&mut self, chunk: u32, pages: u64) -> io::Result<Option<Placement>> {
        let _ = (chunk, pages);
        Ok(None)
    }
}

/// Holds what a placed frame needs for as long as it is under way.
pub(crate) type Placement = Box<dyn std::any::Any + Send>;

/// The source's receiving end: receipts.
pub(crate) trait ReceiptReader: Send {
    /// Reads some bytes; 0 after the destination's last. `WouldBlock` when nothing came for a moment.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// The destination's end: frames in, receipts out.
pub(crate) trait FrameReceiver: Send {
    /// Receives some bytes into the list; 0 when the source closed the stream. `WouldBlock` when there are none, at once without
    /// `wait`, else after a moment.
    fn receive(&mut self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize>;

    /// Sends receipts, all of them.
    fn send(&mut self, receipts: &[u8]) -> io::Result<()>;

    /// Says that nothing more will be sent, once what was is on its way.
    fn finish(&mut self) -> io::Result<()>;

    /// Whether frames may come whose raw pages were placed.
    fn places(&self) -> bool {
        false
    }
}

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
    #[cfg(feature = "rdma")]
    #[error(transparent)]
    Rdma(#[from] crate::rdma::RdmaError),
}

impl OpenError {
    /// Whether whoever waited asked to wait no longer.
    pub fn is_cancelled(&self) -> bool {
        match self {
            Self::Socket(error) => error.is_cancelled(),
            Self::Link(error) => matches!(error, LinkError::Cancelled),
            #[cfg(feature = "rdma")]
            Self::Rdma(error) => matches!(error, crate::rdma::RdmaError::Cancelled),
        }
    }
}

/// What a stream is at the source: an end to give to [`crate::source::Lane::spawn`].
pub struct SourceEnd {
    pub(crate) frames: Box<dyn FrameSender>,
    pub(crate) receipts: Box<dyn ReceiptReader>,
    pub(crate) breaker: Arc<dyn Breaker>,
}

/// Begins, in the background, what opening the first stream to `uri` would otherwise wait for: the RDMA libraries look for devices
/// and load their drivers.
pub fn warm_up(uri: &Uri) {
    #[cfg(feature = "rdma")]
    if matches!(uri, Uri::Rdma { .. }) {
        // Whatever fails here fails again, and is reported, where a stream is opened.
        let _ = std::thread::Builder::new().name("rdma-warm-up".into()).spawn(crate::rdma::warm_up);
    }
    #[cfg(not(feature = "rdma"))]
    let _ = uri;
}

impl SourceEnd {
    /// Opens stream `stream` of a session with the destination at `uri`, which speaks `version`, each step of it within `timeout`. Ends
    /// soon once `cancelled`, which is asked several times a second, says yes.
    pub fn open(
        source: &Arc<PageSource>,
        uri: &Uri,
        session: SessionId,
        version: u16,
        stream: u16,
        timeout: Duration,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Self, OpenError> {
        let preamble =
            Preamble { version_min: version, version_max: version, role: Role::Stream, stream, session };
        match uri {
            Uri::Tcp { .. } | Uri::Unix(_) => {
                // Only RDMA registers the source's memory.
                let _ = source;
                let connection = open_attached::<OpenError>(uri, &preamble, timeout, cancelled)?;
                Ok(Self::socket(connection, timeout).map_err(LinkError::Io)?)
            }
            #[cfg(feature = "rdma")]
            Uri::Rdma { host, port } => {
                Ok(crate::rdma::connect(source, (host, *port), preamble, timeout, cancelled)?)
            }
            #[cfg(not(feature = "rdma"))]
            Uri::Rdma { .. } => unreachable!("such a URI is not read without the feature"),
        }
    }

    /// A stream over a socket on which ATTACHED has come. `timeout` bounds the wait for room to write.
    fn socket(connection: Connection, timeout: Duration) -> io::Result<Self> {
        connection.set_timeouts(Some(TICK), Some(timeout))?;
        let socket = Arc::new(connection);
        Ok(Self {
            frames: Box::new(SocketSender(socket.clone())),
            receipts: Box::new(SocketReader(socket.clone())),
            breaker: socket,
        })
    }
}

/// What a stream is at the destination: an end to give to [`crate::destination::receive_stream`].
pub struct DestinationEnd {
    pub(crate) frames: Box<dyn FrameReceiver>,
    breaker: Arc<dyn Breaker>,
}

impl DestinationEnd {
    /// A stream over a socket whose preamble was answered. `timeout` bounds the wait for room to write.
    fn socket(connection: Connection, timeout: Duration) -> io::Result<Self> {
        connection.set_timeouts(Some(TICK), Some(timeout))?;
        let socket = Arc::new(connection);
        Ok(Self { frames: Box::new(SocketReceiver(socket.clone())), breaker: socket })
    }

    #[cfg(any(test, fuzzing, feature = "rdma"))]
    pub(crate) fn new(frames: Box<dyn FrameReceiver>, breaker: Arc<dyn Breaker>) -> Self {
        Self { frames, breaker }
    }

    /// What ends the stream from outside.
    pub fn breaker(&self) -> Arc<dyn Breaker> {
        self.breaker.clone()
    }
}

impl Breaker for Connection {
    fn shutdown(&self) {
        Connection::shutdown(self);
    }
}

/// A source that asks to open a stream, not yet answered.
#[derive(Debug)]
pub enum StreamRequest {
    /// Over a socket whose preamble was read.
    Socket(Connection),
    /// Over RDMA.
    #[cfg(feature = "rdma")]
    Queue(crate::rdma::ConnectRequest),
}

impl StreamRequest {
    /// Says no, and why.
    pub fn refuse(self, code: ErrorCode, text: String) {
        match self {
            Self::Socket(connection) => {
                // Whoever asked hears of the end in any case.
                let _ = io::Write::write_all(&mut &connection, &Message::Error { code, text }.encode());
            }
            #[cfg(feature = "rdma")]
            Self::Queue(request) => request.refuse(code, &text),
        }
    }

    /// Says ATTACHED, after which frames may come. `None` when the source is gone already.
    pub fn accept(self, stream: u16, sink: &Arc<PageSink>) -> io::Result<Option<DestinationEnd>> {
        match self {
            Self::Socket(connection) => {
                let attached = Message::Attached { stream }.encode();
                if io::Write::write_all(&mut &connection, &attached).is_err() {
                    return Ok(None);
                }
                DestinationEnd::socket(connection, sink.timeout()).map(Some)
            }
            #[cfg(feature = "rdma")]
            Self::Queue(request) => crate::rdma::accept(request, sink),
        }
    }
}

struct SocketSender(Arc<Connection>);

impl FrameSender for SocketSender {
    fn send(&mut self, mut list: SendList<'_>) -> io::Result<u64> {
        let mut bytes = 0;
        while !list.is_empty() {
            match list.send(self.0.as_fd()) {
                Ok(sent) => bytes += sent as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(bytes)
    }
}

struct SocketReader(Arc<Connection>);

impl ReceiptReader for SocketReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &*self.0, buffer)
    }
}

struct SocketReceiver(Arc<Connection>);

impl FrameReceiver for SocketReceiver {
    fn receive(&mut self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize> {
        list.receive(self.0.as_fd(), wait)
    }

    fn send(&mut self, receipts: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut &*self.0, receipts)
    }

    fn finish(&mut self) -> io::Result<()> {
        // Fails only when the peer closed first, which it then knows.
        self.0.shutdown_write();
        Ok(())
    }
}
