//! The control connection: messages both ways, keepalive, and a verdict when the peer has gone.
//!
//! Runs on tokio. Messages that come in are handed to a callback; those that go out are queued. PING and PONG never show.

use std::io;
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::dial::{Limit, STEP, is_cancelled};
use crate::socket::{Connection, Listener};
use crate::wire::Preamble;
use crate::wire::WireError;
use crate::wire::control::{CHECKSUM_LEN, HEADER_LEN, Message};

/// How often the peer is pinged: often enough for the shortest time-out that a peer may have, [`TIMEOUT_MIN`].
const PING_EVERY: Duration = Duration::from_millis(250);
/// Shortest time-out that a side may have.
pub const TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Messages that may wait to be handled; a peer that sends more is cut off.
const UNHANDLED_MAX: usize = 4096;

/// Why a control connection is over.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed.
    #[error("the control connection broke")]
    Io(#[source] io::Error),
    /// The peer closed it.
    #[error("the peer closed the control connection")]
    Closed,
    /// The peer is silent.
    #[error("nothing was heard from the peer for {0} s")]
    Timeout(u64),
    /// The peer sends messages faster than they can be handled.
    #[error("the peer floods the control connection")]
    Flood,
    /// The peer says no.
    #[error("the peer refused: {0}")]
    Refused(String),
    /// Whoever waited for it asked to wait no longer.
    #[error("cancelled")]
    Cancelled,
    /// The peer does not keep to the protocol.
    #[error("the peer broke the control protocol: {0}")]
    Wire(#[from] WireError),
}

/// What comes in on a link.
#[derive(Debug)]
pub enum LinkEvent {
    /// A message, other than PING and PONG.
    Message(Message),
    /// The end; nothing follows.
    Dead(LinkError),
}

/// The sending end of a control connection. When the last clone is dropped, what is queued is sent and the connection closed.
#[derive(Clone, Debug)]
pub struct Link {
    outbox: mpsc::UnboundedSender<Outgoing>,
}

/// What waits to be written.
#[derive(Debug)]
enum Outgoing {
    Message(Message),
    /// Dropped once everything before it is written, or never will be.
    Flushed(Sender<()>),
}

impl Link {
    /// Queues a message. On a dead link it goes nowhere; the callback was told.
    pub fn send(&self, message: Message) {
        let _ = self.outbox.send(Outgoing::Message(message));
    }

    /// Waits until what is queued was given to the system, or the link is dead, at most `limit`. Due before a process ends or its
    /// runtime is dropped, or the reason why is never heard.
    pub fn flush(&self, limit: Duration) {
        let (written, wait) = crossbeam_channel::bounded(0);
        if self.outbox.send(Outgoing::Flushed(written)).is_ok() {
            // Nothing is ever sent: the wait ends by the sender's drop.
            let _ = wait.recv_timeout(limit);
        }
    }

    /// Runs a link over a connection whose preamble is done. What comes in goes to `events`, wrapped; the last of it is
    /// [`LinkEvent::Dead`]. The link is dead when nothing is heard for `timeout`.
    pub fn spawn<E: Send + 'static>(
        runtime: &Handle,
        connection: Connection,
        timeout: Duration,
        events: Sender<E>,
        wrap: impl Fn(LinkEvent) -> E + Send + 'static,
    ) -> io::Result<Self> {
        let _guard = runtime.enter();
        let socket = into_async(connection)?;
        let (outbox, queue) = mpsc::unbounded_channel();
        // Unbounded for the sender's sake, who must not block the runtime; what waits is bounded all the same.
        let deliver = move |event| {
            let flood = events.len() > UNHANDLED_MAX;
            let event = if flood { LinkEvent::Dead(LinkError::Flood) } else { event };
            events.send(wrap(event)).is_ok() && !flood
        };
        runtime.spawn(run(socket, timeout, queue, deliver));
        Ok(Self { outbox })
    }
}

/// A connection on tokio, until it is known what it is for.
#[derive(Debug)]
pub enum AsyncConnection {
    /// Over TCP.
    Tcp(tokio::net::TcpStream),
    /// Over a Unix socket.
    Unix(tokio::net::UnixStream),
}

impl AsyncConnection {
    /// Reads exactly `bytes`.
    pub async fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.read_exact(bytes).await,
            Self::Unix(stream) => stream.read_exact(bytes).await,
        }
        .map(drop)
    }

    /// Takes the socket off tokio; it stays non-blocking.
    pub fn into_connection(self) -> io::Result<Connection> {
        Ok(match self {
            Self::Tcp(stream) => Connection::Tcp(stream.into_std()?),
            Self::Unix(stream) => Connection::Unix(stream.into_std()?),
        })
    }
}

/// A listening socket on tokio.
#[derive(Debug)]
pub struct AsyncListener {
    inner: AsyncListenerKind,
    /// Removes a Unix socket's path in the end.
    _listener: Listener,
}

#[derive(Debug)]
enum AsyncListenerKind {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl AsyncListener {
    /// Hands a listener to tokio; must be called inside a runtime.
    pub fn new(listener: Listener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let inner = match &listener {
            Listener::Tcp(l) => AsyncListenerKind::Tcp(tokio::net::TcpListener::from_std(l.try_clone()?)?),
            Listener::Unix(l, _) => {
                AsyncListenerKind::Unix(tokio::net::UnixListener::from_std(l.try_clone()?)?)
            }
        };
        Ok(Self { inner, _listener: listener })
    }

    /// Waits for a connection; says who it is.
    pub async fn accept(&self) -> io::Result<(AsyncConnection, String)> {
        Ok(match &self.inner {
            AsyncListenerKind::Tcp(l) => {
                let (stream, peer) = l.accept().await?;
                (AsyncConnection::Tcp(stream), peer.to_string())
            }
            AsyncListenerKind::Unix(l) => {
                (AsyncConnection::Unix(l.accept().await?.0), "a local process".into())
            }
        })
    }
}

/// A socket of either family.
trait AsyncSocket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> AsyncSocket for T {}

/// Hands a connection to tokio; must be called inside a runtime.
fn into_async(connection: Connection) -> io::Result<Box<dyn AsyncSocket>> {
    connection.set_nonblocking(true)?;
    Ok(match connection {
        Connection::Tcp(stream) => Box::new(tokio::net::TcpStream::from_std(stream)?),
        Connection::Unix(stream) => Box::new(tokio::net::UnixStream::from_std(stream)?),
    })
}

async fn run(
    socket: Box<dyn AsyncSocket>,
    timeout: Duration,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    mut deliver: impl FnMut(LinkEvent) -> bool + Send,
) {
    let (mut reader, mut writer) = tokio::io::split(socket);
    let (own, mut replies) = mpsc::unbounded_channel();
    // Writing is its own task: a peer that does not read must not keep us from noticing that it is silent.
    let writing = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(PING_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut nonce = 0;
        loop {
            let message = tokio::select! {
                biased;
                Some(reply) = replies.recv() => reply,
                message = queue.recv() => match message {
                    Some(Outgoing::Message(message)) => message,
                    Some(Outgoing::Flushed(written)) => {
                        drop(written);
                        continue;
                    }
                    None => break,
                },
                _ = ticks.tick() => {
                    nonce += 1;
                    Message::Ping(nonce)
                }
            };
            if writer.write_all(&message.encode()).await.is_err() {
                // The reader will see it, too.
                std::future::pending::<()>().await;
            }
        }
        let _ = writer.shutdown().await;
    });
    let mut buffer = Vec::new();
    loop {
        let next = tokio::time::timeout(timeout, read_message(&mut reader, &mut buffer)).await;
        let event = match next {
            Err(_) => LinkEvent::Dead(LinkError::Timeout(timeout.as_secs())),
            Ok(Err(error)) => LinkEvent::Dead(error),
            Ok(Ok(Message::Ping(nonce))) => {
                let _ = own.send(Message::Pong(nonce));
                continue;
            }
            Ok(Ok(Message::Pong(_))) => continue,
            Ok(Ok(message)) => LinkEvent::Message(message),
        };
        let dead = matches!(event, LinkEvent::Dead(_));
        if !deliver(event) || dead {
            break;
        }
    }
    // What is queued, such as the reason why, still goes out; a peer that does not take it is left after a while.
    let mut writing = writing;
    if tokio::time::timeout(Duration::from_secs(1).min(timeout), &mut writing).await.is_err() {
        writing.abort();
    }
}

/// Reads one message; its length is checked before anything is allocated for it.
async fn read_message(
    reader: &mut (impl AsyncRead + Unpin + ?Sized),
    buffer: &mut Vec<u8>,
) -> Result<Message, LinkError> {
    let mut header = [0; HEADER_LEN];
    read_exact(reader, &mut header).await?;
    let (_, len) = Message::decode_header(&header)?;
    buffer.clear();
    buffer.extend_from_slice(&header);
    buffer.resize(HEADER_LEN + len + CHECKSUM_LEN, 0);
    read_exact(reader, &mut buffer[HEADER_LEN..]).await?;
    Ok(Message::decode(buffer)?)
}

async fn read_exact(
    reader: &mut (impl AsyncRead + Unpin + ?Sized),
    bytes: &mut [u8],
) -> Result<(), LinkError> {
    match reader.read_exact(bytes).await {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(LinkError::Closed),
        Err(e) => Err(LinkError::Io(e)),
    }
}

/// A control connection used by blocking calls, for short exchanges: attaching a stream, asking after a session.
///
/// Waiting for a whole message takes at most the timeout, however its bytes come. `cancelled` is asked several times a second
/// meanwhile; once it says yes the wait ends with [`LinkError::Cancelled`].
pub struct Exchange<'a> {
    connection: &'a Connection,
    timeout: Duration,
    cancelled: &'a dyn Fn() -> bool,
}

impl<'a> Exchange<'a> {
    /// An exchange over a connection whose preamble was sent.
    pub fn new(
        connection: &'a Connection,
        timeout: Duration,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Self, LinkError> {
        connection.set_timeouts(Some(STEP.min(timeout)), Some(timeout)).map_err(LinkError::Io)?;
        Ok(Self { connection, timeout, cancelled })
    }

    /// Sends the preamble.
    pub fn open(
        connection: &'a Connection,
        preamble: &Preamble,
        timeout: Duration,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Self, LinkError> {
        let exchange = Self::new(connection, timeout, cancelled)?;
        exchange.write(&preamble.encode())?;
        Ok(exchange)
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> Result<(), LinkError> {
        self.write(&message.encode())
    }

    /// Waits for a message; an ERROR becomes an error.
    pub fn receive(&self) -> Result<Message, LinkError> {
        let limit = Limit::new(self.timeout, self.cancelled);
        let mut bytes = vec![0; HEADER_LEN];
        self.read(&mut bytes, limit)?;
        let (_, len) = Message::decode_header(bytes.first_chunk().expect("a header's length"))?;
        bytes.resize(HEADER_LEN + len + CHECKSUM_LEN, 0);
        self.read(&mut bytes[HEADER_LEN..], limit)?;
        match Message::decode(&bytes)? {
            Message::Error { text, .. } => Err(LinkError::Refused(text)),
            message => Ok(message),
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), LinkError> {
        io::Write::write_all(&mut &*self.connection, bytes).map_err(|e| self.error(e))
    }

    fn read(&self, mut bytes: &mut [u8], limit: Limit<'_>) -> Result<(), LinkError> {
        while !bytes.is_empty() {
            limit.step().map_err(|e| self.error(e))?;
            match io::Read::read(&mut &*self.connection, bytes) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(read) => bytes = &mut bytes[read..],
                // Nothing came for one step.
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(self.error(e)),
            }
        }
        Ok(())
    }

    fn error(&self, error: io::Error) -> LinkError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => LinkError::Closed,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => LinkError::Timeout(self.timeout.as_secs()),
            _ if is_cancelled(&error) => LinkError::Cancelled,
            _ => LinkError::Io(error),
        }
    }
}

/// Opens a data stream of a session, blocking: preamble out, ATTACHED back.
pub(crate) fn attach_stream(
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
