//! What goes out on a link: what waits, how much of it may, and writing it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::pace::{PIECE, time_for};
use crate::wire::control::Message;

/// How often the peer is pinged: often enough for the shortest time-out that a peer may have, [`TIMEOUT_MIN`](super::TIMEOUT_MIN).
const PING_EVERY: Duration = Duration::from_millis(250);
/// Bytes of short messages that may wait to be written. A peer can make this side answer, and not read the answers.
pub(super) const OUTBOX_MAX: usize = 4 << 20;
/// Longest of those; longer ones are said once in a session, and by no peer's wish.
const SHORT_MAX: usize = 20 << 10;

/// What waits to be written.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// A message.
    Bytes(Vec<u8>),
    /// Dropped once everything before it is written, or never will be.
    Flushed(Sender<()>),
}

/// How much waits to be written.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) bytes: AtomicUsize,
    /// Of messages up to [`SHORT_MAX`].
    short: AtomicUsize,
    /// Told when that is too much.
    pub(super) too_much: Notify,
}

impl Waiting {
    /// Takes note of a message; says whether it may wait.
    pub(super) fn enter(&self, len: usize) -> bool {
        self.bytes.fetch_add(len, Ordering::Relaxed);
        if len > SHORT_MAX || self.short.fetch_add(len, Ordering::Relaxed) + len <= OUTBOX_MAX {
            return true;
        }
        self.leave(len);
        self.too_much.notify_one();
        false
    }

    pub(super) fn leave(&self, len: usize) {
        self.bytes.fetch_sub(len, Ordering::Relaxed);
        if len <= SHORT_MAX {
            self.short.fetch_sub(len, Ordering::Relaxed);
        }
    }
}

/// Writes what is queued, PONGs and PINGs, until the last [`Link`](super::Link) is dropped. Fails when the peer takes none of it.
pub(super) async fn write(
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
