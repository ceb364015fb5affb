//! The control connection: messages both ways, keepalive, and a verdict when the peer has gone.
//!
//! Runs on tokio. Messages that come in are handed to a callback; those that go out are queued. PING and PONG never show.
//!
//! Whatever a peer can make grow here is bounded. One PONG waits at a time, for the last PING. What waits to be written is bounded by
//! `OUTBOX_MAX`, and somebody who takes none of it for the time-out is left. What waits to be handled is bounded by
//! `UNHANDLED_MAX` and `UNHANDLED_BYTES_MAX`, and a message takes memory as its bytes come, not as it announces them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior};

use crate::dial::{Limit, STEP, is_cancelled};
use crate::socket::{Connection, Listener, SocketError};
use crate::uri::Uri;
use crate::wire::Preamble;
use crate::wire::WireError;
use crate::wire::control::{CHECKSUM_LEN, FIRST_LEN_MAX, HEADER_LEN, Message};

/// How often the peer is pinged: often enough for the shortest time-out that a peer may have, [`TIMEOUT_MIN`].
const PING_EVERY: Duration = Duration::from_millis(250);
/// Shortest time-out that a side may have.
pub const TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Slowest that a message may come or be taken, once the time-out is over: a control connection lasts no longer than this allows while it
/// carries less than whole messages.
const RATE_MIN: usize = 128 << 10;
/// Messages that may wait to be handled; a peer that sends more is cut off.
const UNHANDLED_MAX: usize = 4096;
/// Bytes of messages that may wait to be handled while more is read: the longest message, and one of the next longest.
const UNHANDLED_BYTES_MAX: usize = 80 << 20;
/// How often a reader that is ahead looks whether the others have caught up.
const BEHIND_TICK: Duration = Duration::from_millis(5);
/// Bytes of short messages that may wait to be written. A peer can make this side answer, and not read the answers.
const OUTBOX_MAX: usize = 4 << 20;
/// Longest of those; longer ones are said once in a session, and by no peer's wish.
const SHORT_MAX: usize = 20 << 10;
/// Bytes that are read or written at a time.
const PIECE: usize = 64 << 10;
/// Pause before a connection is opened again that was closed before an answer; doubled from one to the next, up to [`AGAIN_PAUSE_MAX`].
const AGAIN_PAUSE_MIN: Duration = Duration::from_millis(5);
/// The longest such pause.
const AGAIN_PAUSE_MAX: Duration = Duration::from_millis(50);
/// How long a peer has to take the last message, and to close.
const FAREWELL: Duration = Duration::from_secs(1);

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
    /// The peer sends messages faster than they can be handled, or does not read what they are answered with.
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
    waiting: Arc<Waiting>,
    task: Option<AbortHandle>,
}

/// What waits to be written.
#[derive(Debug)]
enum Outgoing {
    /// A message.
    Bytes(Vec<u8>),
    /// Dropped once everything before it is written, or never will be.
    Flushed(Sender<()>),
}

/// How much waits to be written.
#[derive(Debug, Default)]
struct Waiting {
    bytes: AtomicUsize,
    /// Of messages up to [`SHORT_MAX`].
    short: AtomicUsize,
    /// Told when that is too much.
    too_much: Notify,
}

impl Waiting {
    /// Takes note of a message; says whether it may wait.
    fn enter(&self, len: usize) -> bool {
        self.bytes.fetch_add(len, Ordering::Relaxed);
        if len > SHORT_MAX || self.short.fetch_add(len, Ordering::Relaxed) + len <= OUTBOX_MAX {
            return true;
        }
        self.leave(len);
        self.too_much.notify_one();
        false
    }

    fn leave(&self, len: usize) {
        self.bytes.fetch_sub(len, Ordering::Relaxed);
        if len <= SHORT_MAX {
            self.short.fetch_sub(len, Ordering::Relaxed);
        }
    }
}

impl Link {
    /// Queues a message. On a dead link it goes nowhere; the callback was told.
    ///
    /// # Panics
    /// In builds with debug assertions, when the message is none that the peer may take ([`Message::check`]).
    #[allow(clippy::needless_pass_by_value, reason = "a message that was sent is no longer the caller's")]
    pub fn send(&self, message: Message) {
        let bytes = message.encode();
        let len = bytes.len();
        if self.waiting.enter(len) && self.outbox.send(Outgoing::Bytes(bytes)).is_err() {
            self.waiting.leave(len);
        }
    }

    /// Whether something that was queued is not given to the system yet: while it is, the peer cannot be waited for.
    pub fn is_sending(&self) -> bool {
        self.waiting.bytes.load(Ordering::Relaxed) != 0
    }

    /// What ends the link at once and without a word, also to the callback, when it is aborted.
    pub fn task(&self) -> Option<AbortHandle> {
        self.task.clone()
    }

    /// Whether the link is over.
    pub fn is_closed(&self) -> bool {
        self.outbox.is_closed()
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
    /// [`LinkEvent::Dead`]. The link is dead when not a byte is heard for `timeout`, or a message takes longer than that and a second for
    /// every 128 KiB of it. `wrap` is dropped when the connection is closed.
    pub fn spawn<E: Send + 'static>(
        runtime: &Handle,
        connection: Connection,
        timeout: Duration,
        events: Sender<E>,
        wrap: impl Fn(LinkEvent) -> E + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let _guard = runtime.enter();
        let socket = into_async(connection)?;
        let (mut link, queue) = Self::new();
        let inbox = Inbox { events, wrap, unhandled_bytes: 0 };
        link.task =
            Some(runtime.spawn(run(socket, timeout, queue, link.waiting.clone(), inbox)).abort_handle());
        Ok(link)
    }

    fn new() -> (Self, mpsc::UnboundedReceiver<Outgoing>) {
        // Unbounded for the senders' sake, who must not block; what waits is bounded all the same.
        let (outbox, queue) = mpsc::unbounded_channel();
        (Self { outbox, waiting: Arc::default(), task: None }, queue)
    }
}

/// Where messages go that come in.
struct Inbox<E, W> {
    /// Unbounded, as the runtime must not be blocked; what waits is bounded all the same.
    events: Sender<E>,
    wrap: W,
    /// Bytes of messages since nothing waited.
    unhandled_bytes: usize,
}

impl<E, W: Fn(LinkEvent) -> E> Inbox<E, W> {
    /// Hands something over; says whether more may follow.
    fn deliver(&mut self, message: Message) -> Result<(), Option<LinkError>> {
        if self.events.len() > UNHANDLED_MAX {
            return Err(Some(LinkError::Flood));
        }
        self.events.send((self.wrap)(LinkEvent::Message(message))).map_err(|_| None)
    }

    /// Waits until there is room for a message of so many bytes.
    async fn room(&mut self, len: usize) {
        loop {
            if self.events.is_empty() {
                self.unhandled_bytes = 0;
            }
            if self.unhandled_bytes + len <= UNHANDLED_BYTES_MAX {
                self.unhandled_bytes += len;
                return;
            }
            // The peer waits meanwhile: nothing is read.
            tokio::time::sleep(BEHIND_TICK).await;
        }
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

async fn run<E, W: Fn(LinkEvent) -> E>(
    socket: Box<dyn AsyncSocket>,
    timeout: Duration,
    queue: mpsc::UnboundedReceiver<Outgoing>,
    waiting: Arc<Waiting>,
    mut inbox: Inbox<E, W>,
) {
    let (reader, writer) = tokio::io::split(socket);
    let (pong, pongs) = watch::channel(0);
    // Writing is its own task: a peer that does not read must not keep us from noticing that it is silent.
    let mut writing = tokio::spawn(write(writer, timeout, queue, waiting.clone(), pongs));
    let _abort = AbortOnDrop(writing.abort_handle());
    let mut reader = MessageReader { reader, timeout, buffer: Vec::new(), opened: false };
    let (mut writes, mut answers) = (true, true);
    let error = loop {
        let next = async {
            let len = reader.header().await?;
            inbox.room(len).await;
            reader.fields(len).await
        };
        let next = tokio::select! {
            biased;
            written = &mut writing => {
                writes = false;
                match written {
                    Ok(Err(error)) => {
                        answers = false;
                        break Some(LinkError::Io(error));
                    }
                    // Nobody has anything to say any more.
                    _ => break Some(LinkError::Closed),
                }
            }
            () = waiting.too_much.notified() => break Some(LinkError::Flood),
            next = next => next,
        };
        match next {
            Ok(Message::Ping(nonce)) => {
                // One that still waits is answered by this one, too.
                pong.send_replace(nonce);
            }
            Ok(Message::Pong(_)) => {}
            Ok(message) => match inbox.deliver(message) {
                Ok(()) => {}
                Err(error) => break error,
            },
            Err(error) => break Some(error),
        }
    };
    if let Some(error) = error {
        let _ = inbox.events.send((inbox.wrap)(LinkEvent::Dead(error)));
    }
    // What is queued, such as the reason why, still goes out. What comes in is read as long: a socket that is closed with unread bytes
    // takes what was written with it.
    let farewell = async {
        if writes {
            tokio::select! {
                _ = &mut writing => {}
                () = reader.discard() => {
                    let _ = (&mut writing).await;
                }
            }
        }
        reader.discard().await;
    };
    if answers {
        let _ = tokio::time::timeout(FAREWELL.min(timeout), farewell).await;
    }
}

/// A task that ends with the one that began it.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Writes what is queued, PONGs and PINGs, until the last [`Link`] is dropped. Fails when the peer takes none of it.
async fn write(
    mut writer: impl AsyncWrite + Unpin,
    timeout: Duration,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    waiting: Arc<Waiting>,
    mut pongs: watch::Receiver<u64>,
) -> io::Result<()> {
    let mut ticks = tokio::time::interval(PING_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut nonce = 0;
    loop {
        tokio::select! {
            biased;
            message = queue.recv() => match message {
                Some(Outgoing::Bytes(bytes)) => {
                    let written = write_message(&mut writer, &bytes, timeout).await;
                    waiting.leave(bytes.len());
                    written?;
                }
                Some(Outgoing::Flushed(written)) => drop(written),
                None => return writer.shutdown().await,
            },
            Ok(()) = pongs.changed() => {
                let nonce = *pongs.borrow_and_update();
                write_message(&mut writer, &Message::Pong(nonce).encode(), timeout).await?;
            }
            _ = ticks.tick() => {
                nonce += 1;
                write_message(&mut writer, &Message::Ping(nonce).encode(), timeout).await?;
            }
        }
    }
}

/// Longest that a message may take which is no dead peer's.
fn time_for(len: usize, timeout: Duration) -> Duration {
    timeout + Duration::from_secs_f64(len as f64 / RATE_MIN as f64)
}

async fn write_message(
    writer: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    timeout: Duration,
) -> io::Result<()> {
    let deadline = Instant::now() + time_for(bytes.len(), timeout);
    let mut rest = bytes;
    while !rest.is_empty() {
        let until = deadline.min(Instant::now() + timeout);
        let piece = &rest[..rest.len().min(PIECE)];
        match tokio::time::timeout_at(until, writer.write(piece)).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(Ok(written)) => rest = &rest[written..],
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let text = format!("the peer has not taken {} of {} bytes in time", rest.len(), bytes.len());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    }
    Ok(())
}

/// Reads messages. Any byte is a sign of life, for a message may take long on a slow path; but not longer than [`time_for`] it.
struct MessageReader<R> {
    reader: R,
    timeout: Duration,
    buffer: Vec<u8>,
    /// The first message has come.
    opened: bool,
}

impl<R: AsyncRead + Unpin> MessageReader<R> {
    /// Reads a header; says how many bytes of fields follow.
    async fn header(&mut self) -> Result<usize, LinkError> {
        if self.buffer.capacity() > PIECE {
            self.buffer = Vec::new();
        }
        self.buffer.clear();
        self.fill(1, Instant::now() + self.timeout).await?;
        self.fill(HEADER_LEN, Instant::now() + self.timeout).await?;
        let (_, len) = Message::decode_header(self.buffer.first_chunk().expect("a header's length"))?;
        if !self.opened && len > FIRST_LEN_MAX {
            let (len, max) = (len as u64, FIRST_LEN_MAX as u64);
            return Err(WireError::TooLong { field: "first message", len, max }.into());
        }
        Ok(len)
    }

    /// Reads the rest of a message.
    async fn fields(&mut self, len: usize) -> Result<Message, LinkError> {
        let len = HEADER_LEN + len + CHECKSUM_LEN;
        self.fill(len, Instant::now() + time_for(len, self.timeout)).await?;
        let message = Message::decode(&self.buffer)?;
        self.opened |= !matches!(message, Message::Ping(_) | Message::Pong(_));
        Ok(message)
    }

    /// Reads until the buffer holds so many bytes.
    async fn fill(&mut self, want: usize, deadline: Instant) -> Result<(), LinkError> {
        let mut heard = None;
        while self.buffer.len() < want {
            let until = deadline.min(Instant::now() + self.timeout);
            let room = (want - self.buffer.len()).min(self.buffer.len().max(PIECE));
            self.buffer.reserve(room);
            let mut piece = (&mut self.reader).take(room as u64);
            match tokio::time::timeout_at(until, piece.read_buf(&mut self.buffer)).await {
                Ok(Ok(0)) => return Err(LinkError::Closed),
                Ok(Ok(_)) => heard = Some(Instant::now()),
                Ok(Err(error)) => return Err(LinkError::Io(error)),
                // Not a byte.
                Err(_) if heard.is_none_or(|at| at.elapsed() >= self.timeout) => {
                    return Err(LinkError::Timeout(self.timeout.as_secs()));
                }
                Err(_) => {
                    let text = format!("a message of {want} bytes comes too slowly");
                    return Err(LinkError::Io(io::Error::new(io::ErrorKind::TimedOut, text)));
                }
            }
        }
        Ok(())
    }

    /// Reads until the peer closes.
    async fn discard(&mut self) {
        let mut scrap = [0; 4096];
        while let Ok(1..) = self.reader.read(&mut scrap).await {}
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

/// Opens a connection that belongs to a session, blocking: preamble out, ATTACHED back. One that is closed before any answer, as by a
/// destination that has more strangers than it bears, is opened again within the time-out.
pub(crate) fn open_attached<E: From<SocketError> + From<LinkError>>(
    uri: &Uri,
    preamble: &Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<Connection, E> {
    let limit = Limit::new(timeout, cancelled);
    let mut pause = AGAIN_PAUSE_MIN;
    loop {
        let connection = Connection::connect(uri, timeout, cancelled)?;
        let attached = connection
            .tune(timeout)
            .map_err(LinkError::Io)
            .and_then(|()| attach(&connection, preamble, timeout, cancelled));
        let error = match attached {
            Ok(()) => return Ok(connection),
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::{Receiver, unbounded};
    use pagecopy::backend::StateBlob;
    use tokio::io::DuplexStream;

    use super::*;
    use crate::wire::control::STATE_LEN_MAX;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// A link over a pipe in memory that holds so many bytes, on the runtime's clock; what comes in; and the pipe's other end.
    fn link(pipe: usize) -> (Link, Receiver<LinkEvent>, DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(pipe);
        let (link, queue) = Link::new();
        let (events, inbox) = unbounded();
        let wrap = |event| event;
        let to = Inbox { events, wrap, unhandled_bytes: 0 };
        tokio::spawn(run(Box::new(ours), TIMEOUT, queue, link.waiting.clone(), to));
        (link, inbox, theirs)
    }

    /// Carries bytes from one pipe to another at so many a second.
    async fn carry(
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        bytes_per_second: usize,
    ) {
        let mut piece = vec![0; (bytes_per_second / 10).clamp(1, PIECE)];
        while let Ok(len @ 1..) = from.read(&mut piece).await {
            tokio::time::sleep(Duration::from_secs_f64(len as f64 / bytes_per_second as f64)).await;
            if to.write_all(&piece[..len]).await.is_err() {
                return;
            }
        }
    }

    /// Two links over a path of so many bytes a second each way.
    fn pair(bytes_per_second: usize) -> [(Link, Receiver<LinkEvent>); 2] {
        let ((a, from_b, end_a), (b, from_a, end_b)) = (link(PIECE), link(PIECE));
        let ((read_a, write_a), (read_b, write_b)) = (tokio::io::split(end_a), tokio::io::split(end_b));
        tokio::spawn(carry(read_a, write_b, bytes_per_second));
        tokio::spawn(carry(read_b, write_a, bytes_per_second));
        [(a, from_b), (b, from_a)]
    }

    /// The next event, by the runtime's clock.
    async fn next(inbox: &Receiver<LinkEvent>) -> LinkEvent {
        loop {
            match inbox.try_recv() {
                Ok(event) => return event,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    fn state(bytes: usize) -> Message {
        Message::State(vec![StateBlob { name: "ram".into(), version: 1, bytes: vec![7; bytes] }])
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_state_arrives_over_ten_megabits() {
        let [(source, at_source), (destination, at_destination)] = pair(10_000_000 / 8);
        let begun = Instant::now();
        let state = state(STATE_LEN_MAX - 64);
        source.send(Message::Resent { bytes: 1 });
        source.send(state.clone());
        source.send(Message::Query);
        assert!(source.is_sending());
        assert!(matches!(next(&at_destination).await, LinkEvent::Message(Message::Resent { .. })));
        assert!(matches!(next(&at_destination).await, LinkEvent::Message(m) if m == state));
        assert!(begun.elapsed() > TIMEOUT * 5, "it took {:?}", begun.elapsed());
        assert!(matches!(next(&at_destination).await, LinkEvent::Message(Message::Query)));
        assert!(!source.is_sending());
        destination.send(Message::Running);
        assert!(matches!(next(&at_source).await, LinkEvent::Message(Message::Running)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_by_drops_is_not_waited_for() {
        // Of a header, and of fields: a byte whenever silence is about to be taken for death.
        for already in [0, HEADER_LEN] {
            let (_link, inbox, mut peer) = link(PIECE);
            let bytes = state(1 << 20).encode();
            let begun = Instant::now();
            peer.write_all(&Message::Query.encode()).await.unwrap();
            peer.write_all(&bytes[..already]).await.unwrap();
            let (mut read, mut write) = tokio::io::split(peer);
            tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
            let dripping = tokio::spawn(async move {
                for byte in &bytes[already..] {
                    tokio::time::sleep(TIMEOUT - Duration::from_secs(1)).await;
                    if write.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                }
            });
            assert!(matches!(next(&inbox).await, LinkEvent::Message(Message::Query)));
            match next(&inbox).await {
                LinkEvent::Dead(LinkError::Io(error)) => {
                    assert!(error.to_string().contains("slowly"), "{error}");
                }
                other => panic!("{other:?}"),
            }
            assert!(begun.elapsed() < TIMEOUT * 4, "{:?}", begun.elapsed());
            dripping.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_a_link() {
        let (_link, inbox, _peer) = link(PIECE);
        assert!(matches!(next(&inbox).await, LinkEvent::Dead(LinkError::Timeout(10))));
    }

    /// PINGs of somebody who does not read are not answered one by one, and he is left though he is heard.
    #[tokio::test(start_paused = true)]
    async fn pings_of_a_deaf_peer_end_the_link() {
        let (_link, inbox, mut peer) = link(256);
        let begun = Instant::now();
        let flooding = tokio::spawn(async move {
            for nonce in 0.. {
                tokio::time::sleep(Duration::from_millis(1)).await;
                if peer.write_all(&Message::Ping(nonce).encode()).await.is_err() {
                    return nonce;
                }
            }
            0
        });
        match next(&inbox).await {
            LinkEvent::Dead(LinkError::Io(error)) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < TIMEOUT * 2);
        assert!(flooding.await.unwrap() > 1000, "the connection is closed at once");
    }

    /// Of many PINGs at once the last is answered.
    #[tokio::test(start_paused = true)]
    async fn the_last_ping_is_answered() {
        let (_link, _inbox, mut peer) = link(PIECE);
        let pings: Vec<u8> = (0..1000).flat_map(|nonce| Message::Ping(nonce).encode()).collect();
        peer.write_all(&pings).await.unwrap();
        let mut reader = MessageReader { reader: peer, timeout: TIMEOUT, buffer: Vec::new(), opened: true };
        loop {
            let len = reader.header().await.unwrap();
            if reader.fields(len).await.unwrap() == Message::Pong(999) {
                return;
            }
        }
    }

    /// Answers that a peer asks for and does not read are bounded.
    #[tokio::test(start_paused = true)]
    async fn an_outbox_that_nobody_reads_ends_the_link() {
        let (link, inbox, _peer) = link(256);
        let len = Message::Running.encode().len();
        for _ in 0..=OUTBOX_MAX / len {
            link.send(Message::Running);
        }
        assert!(matches!(next(&inbox).await, LinkEvent::Dead(LinkError::Flood)));
        assert!(link.waiting.bytes.load(Ordering::Relaxed) <= OUTBOX_MAX + len);
    }

    /// A link whose owner has dropped it is closed soon, however much still comes.
    #[tokio::test(start_paused = true)]
    async fn a_link_that_was_dropped_is_closed() {
        let (link, _inbox, peer) = link(PIECE);
        let text = "no".to_owned();
        link.send(Message::Error { code: crate::wire::control::ErrorCode::Busy, text });
        drop(link);
        let (mut read, mut write) = tokio::io::split(peer);
        let mut heard = Vec::new();
        read.read_to_end(&mut heard).await.unwrap();
        assert!(String::from_utf8_lossy(&heard).contains("no"));
        let begun = Instant::now();
        while write.write_all(&Message::Ping(1).encode()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
            assert!(begun.elapsed() < FAREWELL * 2);
        }
    }

    /// Before anything else nobody can make room for a state.
    #[tokio::test(start_paused = true)]
    async fn the_first_message_is_no_state() {
        let (_link, inbox, mut peer) = link(PIECE);
        peer.write_all(&state(FIRST_LEN_MAX).encode()[..PIECE / 2]).await.unwrap();
        assert!(matches!(next(&inbox).await, LinkEvent::Dead(LinkError::Wire(WireError::TooLong { .. }))));
    }
}
