//! Letting the streams of a session in.

use std::io;
use std::sync::Arc;

use crate::carrier::DestinationEnd;
use crate::destination::PageSink;
use crate::rdma::{self, ConnectRequest, DestinationContext};
use crate::socket::Connection;
use crate::wire::control::{ErrorCode, Message};

/// A source that asks to open a stream, not yet answered.
#[derive(Debug)]
pub enum StreamRequest {
    /// Over a socket whose preamble was read.
    Socket(Connection),
    /// Over RDMA.
    Queue(ConnectRequest),
}

impl StreamRequest {
    /// Says no, and why.
    pub fn refuse(self, code: ErrorCode, text: String) {
        match self {
            Self::Socket(connection) => {
                // Whoever asked hears of the end in any case.
                let _ = io::Write::write_all(&mut &connection, &Message::Error { code, text }.encode());
            }
            Self::Queue(request) => request.refuse(code, &text),
        }
    }
}

/// Lets the streams of a session in.
pub struct Acceptor {
    sink: Arc<PageSink>,
    rdma: DestinationContext,
}

impl Acceptor {
    /// For streams that bring pages to `sink`. At most `pinned_max` bytes of its memory are registered for RDMA at a time.
    pub fn new(sink: Arc<PageSink>, pinned_max: u64) -> Self {
        let rdma = DestinationContext::new(sink.clone(), sink.timeout(), pinned_max);
        Self { sink, rdma }
    }

    /// Says ATTACHED, after which frames may come. `None` when the source is gone already.
    pub fn accept(&self, request: StreamRequest, stream: u16) -> io::Result<Option<DestinationEnd>> {
        match request {
            StreamRequest::Socket(connection) => {
                let attached = Message::Attached { stream }.encode();
                if io::Write::write_all(&mut &connection, &attached).is_err() {
                    return Ok(None);
                }
                connection.into_destination_end(self.sink.timeout()).map(Some)
            }
            StreamRequest::Queue(request) => rdma::accept(request, &self.rdma),
        }
    }
}
