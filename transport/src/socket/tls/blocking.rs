//! TLS over a blocking socket whose two directions are used by two threads.
//!
//! The library's state is one for both directions and is locked for as long as records are made or taken apart, never while a thread
//! waits for the network: a thread that waits for room must not keep another from taking in what makes that room.

use std::io::{self, BufRead, IoSlice, Write};
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use super::{Connector, PROOF_LEN, SessionKey, broken, cut};
use crate::limit::Limit;
use crate::local::lock;
use crate::sys::{ReceiveList, SendList, wait_writable};
use crate::wire::{Preamble, SessionId};

/// Bytes that are made into records at a time: eight full ones, which stay in the caches of a core, and have room in a socket to loopback.
const PIECE: usize = 128 << 10;
/// Most bytes that are received at a time: they are still in a core's caches when they are taken apart.
const INCOMING: usize = 64 << 10;

/// TLS on one socket.
pub(in crate::socket) struct Records {
    tls: Mutex<rustls::Connection>,
    incoming: Mutex<Incoming>,
    /// What is about to be sent, copied so that it cannot change while it is encrypted.
    piece: Mutex<Box<[u8]>>,
    wait: Mutex<Wait>,
}

/// How long a call may wait for room.
#[derive(Clone, Copy)]
struct Wait {
    nonblocking: bool,
    timeout: Option<Duration>,
}

/// Records that came and were not taken apart.
struct Incoming {
    bytes: Box<[u8]>,
    begin: usize,
    end: usize,
    ended: bool,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Records")
    }
}

impl Records {
    pub(in crate::socket) fn new(tls: rustls::Connection) -> Self {
        let incoming = Incoming { bytes: vec![0; INCOMING].into(), begin: 0, end: 0, ended: false };
        Self {
            tls: Mutex::new(tls),
            incoming: Mutex::new(incoming),
            piece: Mutex::new(vec![0; PIECE].into()),
            wait: Mutex::new(Wait { nonblocking: false, timeout: None }),
        }
    }

    /// Shakes hands with a destination. The socket's reads must wait no longer than a step.
    pub(in crate::socket) fn connect(
        connector: &Connector,
        socket: BorrowedFd<'_>,
        limit: Limit<'_>,
    ) -> io::Result<Self> {
        let records = Self::new(connector.connection().map_err(|e| broken(&e))?);
        loop {
            let step = limit.step()?;
            lock(&records.wait).timeout = Some(step);
            let flushed = match records.flush(socket) {
                Err(e) if is_interruption(&e) => false,
                result => result.map(|()| true)?,
            };
            if flushed && !lock(&records.tls).is_handshaking() {
                lock(&records.wait).timeout = None;
                return Ok(records);
            }
            let mut incoming = lock(&records.incoming);
            match incoming.receive(socket, true) {
                Err(e) if is_interruption(&e) => {}
                result => result?,
            }
            let ended = incoming.ended;
            let mut tls = lock(&records.tls);
            let fed = incoming.feed_all(&mut tls);
            let is_handshaking = tls.is_handshaking();
            drop(tls);
            if fed.is_err() {
                // Says why, as far as it can be said.
                let _ = records.flush_at_once(socket);
            }
            fed?;
            if ended && is_handshaking {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "it was closed in the TLS handshake",
                ));
            }
        }
    }

    /// What is left when the socket goes to tokio.
    pub(in crate::socket) fn into_tls(self) -> io::Result<rustls::Connection> {
        let mut tls = self.tls.into_inner().unwrap_or_else(|e| e.into_inner());
        let mut incoming = self.incoming.into_inner().unwrap_or_else(|e| e.into_inner());
        incoming.feed_all(&mut tls)?;
        Ok(tls)
    }

    pub(in crate::socket) fn set_nonblocking(&self, nonblocking: bool) {
        lock(&self.wait).nonblocking = nonblocking;
    }

    pub(in crate::socket) fn set_write_timeout(&self, timeout: Option<Duration>) {
        lock(&self.wait).timeout = timeout;
    }

    /// The key of a session whose control connection this is.
    pub(in crate::socket) fn session_key(&self, session: &SessionId) -> io::Result<SessionKey> {
        SessionKey::of(&lock(&self.tls), session).map_err(|e| broken(&e))
    }

    pub(in crate::socket) fn prove(
        &self,
        key: &SessionKey,
        preamble: &Preamble,
    ) -> io::Result<[u8; PROOF_LEN]> {
        key.prove(&lock(&self.tls), preamble).map_err(|e| broken(&e))
    }

    pub(in crate::socket) fn check(
        &self,
        key: &SessionKey,
        preamble: &Preamble,
        proof: &[u8; PROOF_LEN],
    ) -> bool {
        key.check(&lock(&self.tls), preamble, proof)
    }

    /// Sends what is left of a list, as much as is made into records at a time.
    pub(in crate::socket) fn send(
        &self,
        socket: BorrowedFd<'_>,
        list: &mut SendList<'_>,
    ) -> io::Result<usize> {
        let mut piece = lock(&self.piece);
        let len = list.copy_to(&mut piece);
        self.send_bytes(socket, &piece[..len])?;
        Ok(len)
    }

    /// Sends all of these bytes.
    pub(in crate::socket) fn send_bytes(&self, socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
        lock(&self.tls).writer().write_all(bytes)?;
        self.flush(socket)
    }

    /// Gives the records that wait to the system.
    fn flush(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let wait = *lock(&self.wait);
        let mut since = Instant::now();
        loop {
            let mut tls = lock(&self.tls);
            while tls.wants_write() {
                match tls.write_tls(&mut AtOnce(socket)) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(_) => since = Instant::now(),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            if !tls.wants_write() {
                return Ok(());
            }
            drop(tls);
            let left = match wait.timeout {
                _ if wait.nonblocking => Duration::ZERO,
                None => Duration::MAX,
                Some(timeout) => timeout.saturating_sub(since.elapsed()),
            };
            if left.is_zero() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            wait_writable(socket, left)?;
        }
    }

    /// Receives into what is left of a list, as much as has come; see [`Connection::receive`](crate::socket::Connection).
    pub(in crate::socket) fn receive(
        &self,
        socket: BorrowedFd<'_>,
        list: &mut ReceiveList<'_>,
        wait: bool,
    ) -> io::Result<usize> {
        if list.is_empty() {
            return Ok(0);
        }
        let mut incoming = lock(&self.incoming);
        loop {
            let mut tls = lock(&self.tls);
            let taken = incoming.take(&mut tls, list);
            let answers = tls.wants_write();
            drop(tls);
            if answers {
                // To a peer that renews its keys, or what is wrong. What does not fit now goes out with what is sent next.
                self.flush_at_once(socket)?;
            }
            match taken? {
                Taken::Bytes(received) => return Ok(received),
                Taken::Goodbye => return Ok(0),
                Taken::Nothing => {}
            }
            incoming.receive(socket, wait)?;
        }
    }

    fn flush_at_once(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut tls = lock(&self.tls);
        match tls.write_tls(&mut AtOnce(socket)) {
            Err(e) if !is_interruption(&e) => Err(e),
            _ => Ok(()),
        }
    }

    /// Says that nothing more will be sent.
    pub(in crate::socket) fn say_goodbye(&self, socket: BorrowedFd<'_>) {
        lock(&self.tls).send_close_notify();
        // Whoever is gone needs no goodbye.
        let _ = self.flush(socket);
    }

    /// Makes new keys for what is sent from here on, as the library does by itself before the old ones have encrypted too much.
    #[cfg(test)]
    pub(in crate::socket) fn renew_keys(&self) {
        lock(&self.tls).refresh_traffic_keys().unwrap();
    }
}

/// Whether nothing happened, for now.
fn is_interruption(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// What there was to take.
enum Taken {
    Bytes(usize),
    Nothing,
    /// The peer has said that it sends no more.
    Goodbye,
}

/// Copies a piece of what was decrypted to where it belongs.
fn copy_out(tls: &mut rustls::Connection, list: &mut ReceiveList<'_>) -> io::Result<Taken> {
    let mut reader = tls.reader();
    let len = match reader.fill_buf() {
        Ok([]) => return Ok(Taken::Goodbye),
        Ok(bytes) => list.fill(bytes),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Taken::Nothing),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(cut()),
        Err(e) => return Err(e),
    };
    reader.consume(len);
    Ok(Taken::Bytes(len))
}

impl Incoming {
    /// Receives what there is.
    fn receive(&mut self, socket: BorrowedFd<'_>, wait: bool) -> io::Result<()> {
        debug_assert!(self.begin == self.end, "what came before was taken apart");
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let (_, received) = rustix::net::recv(socket, &mut *self.bytes, flags)?;
        (self.begin, self.end, self.ended) = (0, received, received == 0);
        Ok(())
    }

    /// Has as much taken apart as there is room for in the list.
    fn take(&mut self, tls: &mut rustls::Connection, list: &mut ReceiveList<'_>) -> io::Result<Taken> {
        let mut received = 0;
        while !list.is_empty() {
            match copy_out(tls, list) {
                Ok(Taken::Bytes(bytes)) => received += bytes,
                Ok(Taken::Nothing) if self.feed(tls)? => {}
                // What came before an end is not held up by it.
                _ if received != 0 => break,
                end => return end,
            }
        }
        Ok(Taken::Bytes(received))
    }

    /// Has all of it taken apart.
    fn feed_all(&mut self, tls: &mut rustls::Connection) -> io::Result<()> {
        while self.feed(tls)? {}
        Ok(())
    }

    /// Has some of it taken apart; says whether there was any.
    fn feed(&mut self, tls: &mut rustls::Connection) -> io::Result<bool> {
        let mut rest = &self.bytes[self.begin..self.end];
        if rest.is_empty() && !self.ended {
            return Ok(false);
        }
        let empty = rest.is_empty();
        let read = tls.read_tls(&mut rest)?;
        self.begin += read;
        let state = tls.process_new_packets().map_err(|e| broken(&e))?;
        if read == 0 && !empty {
            if !state.peer_has_closed() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "what came is no TLS record"));
            }
            // Whatever follows a goodbye is nobody's.
            self.begin = self.end;
        }
        Ok(read > 0)
    }
}

/// A socket that takes what it has room for.
struct AtOnce<'a>(BorrowedFd<'a>);

impl Write for AtOnce<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::net::sendmsg(self.0, pieces, &mut SendAncillaryBuffer::default(), flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
