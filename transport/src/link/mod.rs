//! The control connection: messages both ways, keepalive, and a verdict when the peer has gone.
//!
//! Runs on tokio. Messages that come in are handed to a callback; those that go out are queued. PING and PONG never show.
//!
//! Whatever a peer can make grow here is bounded. One PONG waits at a time, for the last PING. What waits to be written is bounded by
//! `OUTBOX_MAX`, and somebody who takes none of it for the time-out is left. What waits to be handled is bounded by
//! `UNHANDLED_MAX` and `UNHANDLED_BYTES_MAX`, and a message takes memory as its bytes come, not as it announces them.

mod exchange;
mod pace;
mod reader;
mod writer;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

pub use exchange::Exchange;
use reader::{Inbox, MessageReader};
use writer::{Outgoing, Waiting, write};

use crate::socket::Connection;
use crate::wire::WireError;
use crate::wire::control::Message;

/// Shortest time-out that a side may have.
pub const TIMEOUT_MIN: Duration = Duration::from_secs(1);
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
    /// every 128 KiB of it. `wrap` is dropped when the connection is closed. `announced` is told how many bytes of fields a message says
    /// that it has, before memory is taken for them.
    pub fn spawn<E: Send + 'static>(
        runtime: &Handle,
        connection: Connection,
        timeout: Duration,
        events: Sender<E>,
        wrap: impl Fn(LinkEvent) -> E + Send + Sync + 'static,
        announced: impl Fn(usize) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let _guard = runtime.enter();
        let socket = connection.into_async()?;
        let (mut link, queue) = Self::new();
        let inbox = Inbox { events, wrap, announced: Box::new(announced), unhandled_bytes: 0 };
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

async fn run<E, W: Fn(LinkEvent) -> E>(
    socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
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
    // Why nothing can be said any more, and until when the peer's last words are waited for: they tell more than that it is gone.
    let mut broken: Option<(io::Error, Instant)> = None;
    let error = loop {
        let next = {
            let next = async {
                let len = reader.header().await?;
                (inbox.announced)(len);
                inbox.room(len).await;
                reader.fields(len).await
            };
            tokio::pin!(next);
            if let Some((_, until)) = &broken {
                tokio::time::timeout_at(*until, next).await.unwrap_or(Err(LinkError::Closed))
            } else {
                tokio::select! {
                    biased;
                    written = &mut writing => {
                        writes = false;
                        // Else nobody has anything to say any more.
                        let Ok(Err(error)) = written else { break Some(LinkError::Closed) };
                        answers = false;
                        let until = Instant::now() + FAREWELL.min(timeout);
                        broken = Some((error, until));
                        tokio::time::timeout_at(until, next).await.unwrap_or(Err(LinkError::Closed))
                    }
                    () = waiting.too_much.notified() => break Some(LinkError::Flood),
                    heard = next.as_mut() => heard,
                }
            }
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
            Err(error) => break Some(broken.map_or(error, |(error, _)| LinkError::Io(error))),
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::{Receiver, unbounded};
    use pagecopy::backend::StateBlob;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::pace::PIECE;
    use super::writer::OUTBOX_MAX;
    use super::*;
    use crate::wire::control::{ErrorCode, FIRST_LEN_MAX, HEADER_LEN, STATE_LEN_MAX};

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// A link over a pipe in memory that holds so many bytes, on the runtime's clock; what comes in; and the pipe's other end.
    fn link(pipe: usize) -> (Link, Receiver<LinkEvent>, DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(pipe);
        let (link, queue) = Link::new();
        let (events, inbox) = unbounded();
        let wrap = |event| event;
        let to = Inbox { events, wrap, announced: Box::new(|_| {}), unhandled_bytes: 0 };
        tokio::spawn(run(ours, TIMEOUT, queue, link.waiting.clone(), to));
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

    /// A refusal is heard although nothing can be written any more.
    #[tokio::test(start_paused = true)]
    async fn the_last_words_of_a_peer_that_is_gone_are_heard() {
        let (link, inbox, mut peer) = link(PIECE);
        let words = Message::Error { code: ErrorCode::Busy, text: "no".into() };
        peer.write_all(&words.encode()).await.unwrap();
        drop(peer);
        link.send(state(1));
        assert!(matches!(next(&inbox).await, LinkEvent::Message(message) if message == words));
        assert!(matches!(next(&inbox).await, LinkEvent::Dead(_)));
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
        link.send(Message::Error { code: ErrorCode::Busy, text });
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
