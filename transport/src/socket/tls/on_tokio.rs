//! TLS over a socket on tokio, whose two directions are one task's.

use std::io::{self, IoSlice, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::{Acceptor, broken, cut};
use crate::wire::MAGIC;

/// Bytes that are read at a time in a handshake.
const PIECE: usize = 4096;
/// Most bytes of one write that wait to be given to the system.
const WRITE_MAX: usize = 64 << 10;

/// A connection whose handshake is done, on tokio.
pub(in crate::socket) struct AsyncRecords<S> {
    stream: S,
    tls: rustls::Connection,
    /// Bytes of a write that became records which are not all with the system: it is not over before.
    accepted: Option<usize>,
}

impl<S> std::fmt::Debug for AsyncRecords<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AsyncRecords")
    }
}

/// Whether whoever has shaken hands may send; if not, why.
pub(in crate::socket) type Admitted = Result<(), String>;

/// Why a handshake failed.
pub(in crate::socket) enum Unprotected {
    /// The other side begins without TLS.
    Plain,
    /// It does not.
    Failed(io::Error),
}

impl From<io::Error> for Unprotected {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRecords<S> {
    pub(in crate::socket) fn new(stream: S, tls: rustls::Connection) -> Self {
        Self { stream, tls, accepted: None }
    }

    pub(in crate::socket) fn into_parts(self) -> (S, rustls::Connection) {
        (self.stream, self.tls)
    }

    /// Shakes hands with whoever has connected to `stream`. Whoever is refused is told so by TLS.
    pub(in crate::socket) async fn accept(
        acceptor: &Acceptor,
        stream: &mut S,
    ) -> Result<(rustls::Connection, Admitted), Unprotected> {
        let mut tls = acceptor.connection().map_err(|e| broken(&e))?;
        let mut buffer = [0; PIECE];
        let mut heard = 0;
        while tls.is_handshaking() || tls.wants_write() {
            write_out(&mut tls, stream).await?;
            if !tls.is_handshaking() {
                continue;
            }
            let read = stream.read(&mut buffer).await?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if heard < MAGIC.len()
                && buffer[..read].starts_with(&MAGIC[heard..][..read.min(MAGIC.len() - heard)])
            {
                // No TLS record begins so.
                heard += read;
                if heard >= MAGIC.len() {
                    return Err(Unprotected::Plain);
                }
                continue;
            }
            let mut rest = &buffer[..read];
            while !rest.is_empty() {
                let taken = tls.read_tls(&mut rest)?;
                let result = tls.process_new_packets();
                if let Err(error) = result {
                    // Says why, as far as it can be said.
                    let _ = write_out(&mut tls, stream).await;
                    return Err(broken(&error).into());
                }
                if taken == 0 {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
            }
        }
        let admitted = acceptor.admit(&tls);
        Ok((tls.into(), admitted))
    }
}

async fn write_out(
    tls: &mut rustls::ServerConnection,
    stream: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut records = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut records)?;
    }
    stream.write_all(&records).await
}

/// A stream as the library wants it: what would wait is an error, and the task is woken.
struct Polled<'a, 'b, S> {
    stream: &'a mut S,
    context: &'a mut Context<'b>,
}

fn at_once<T>(poll: Poll<io::Result<T>>) -> io::Result<T> {
    match poll {
        Poll::Ready(result) => result,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

impl<S: AsyncRead + Unpin> Read for Polled<'_, '_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(buffer);
        at_once(Pin::new(&mut *self.stream).poll_read(self.context, &mut buffer))?;
        Ok(buffer.filled().len())
    }
}

impl<S: AsyncWrite + Unpin> Write for Polled<'_, '_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        at_once(Pin::new(&mut *self.stream).poll_write(self.context, bytes))
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        at_once(Pin::new(&mut *self.stream).poll_write_vectored(self.context, pieces))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRecords<S> {
    /// Gives the records that wait to the system.
    fn poll_out(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Polled { stream: &mut self.stream, context }) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for AsyncRecords<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.tls.reader().read(buffer.initialize_unfilled()) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Poll::Ready(Err(cut())),
                Err(e) => return Poll::Ready(Err(e)),
            }
            match this.tls.read_tls(&mut Polled { stream: &mut this.stream, context }) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(e) => return Poll::Ready(Err(e)),
            }
            let processed = this.tls.process_new_packets();
            // An answer to a peer that renews its keys, or what was wrong; the rest goes out with what is written next.
            if let Poll::Ready(Err(e)) = this.poll_out(context) {
                return Poll::Ready(Err(e));
            }
            processed.map_err(|e| broken(&e))?;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for AsyncRecords<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.accepted.is_none() {
            ready!(this.poll_out(context))?;
            let written = this.tls.writer().write(&bytes[..bytes.len().min(WRITE_MAX)])?;
            this.accepted = Some(written);
        }
        ready!(this.poll_out(context))?;
        Poll::Ready(Ok(this.accepted.take().unwrap_or_default()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_out(context))?;
        Pin::new(&mut this.stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Said once, however often it is asked for.
        this.tls.send_close_notify();
        ready!(this.poll_out(context))?;
        Pin::new(&mut this.stream).poll_shutdown(context)
    }
}
