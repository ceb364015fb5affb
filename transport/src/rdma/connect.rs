//! Opening connections: asking for them, and listening for those who ask.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::TICK;
use super::sys::{Domain, Event, EventChannel, EventKind, Id, QueuePair, wait_readable};
use crate::limit::{Limit, is_cancelled};
use crate::socket::find;
use crate::wire::control::ErrorCode;
use crate::wire::queue::{Accept, Refusal, Request};
use crate::wire::{Preamble, WireError};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 256;

/// A connection over RDMA that failed.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    /// The host has no RDMA.
    #[error("there is no RDMA device on this host ({0}); use a tcp: address")]
    NoDevice(io::Error),
    /// The address leads over no RDMA device.
    #[error(
        "{address} is not reached over an RDMA device (`rdma link` lists them, with their network interfaces); use an address of such an interface, or tcp:"
    )]
    NoRoute {
        /// The address.
        address: SocketAddr,
    },
    /// Nobody answers, or listens.
    #[error("no RDMA connection to {address}: {why}")]
    NoAnswer {
        /// The address.
        address: SocketAddr,
        /// What happened.
        why: String,
    },
    /// The destination says no.
    #[error("the peer refused: {0}")]
    Refused(String),
    /// It answers in another language.
    #[error("the answer to the RDMA connection is no answer of pageferry's")]
    Wire(#[from] WireError),
    /// Whoever waited for it asked to wait no longer.
    #[error("cancelled")]
    Cancelled,
    /// A call failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl RdmaError {
    /// Whether whoever waited asked to wait no longer.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }
}

pub(super) fn failed(what: &'static str) -> impl FnOnce(io::Error) -> RdmaError {
    move |source| RdmaError::System { what, source }
}

/// A connection that has its device, not yet asked for, to the first address of a name that is reached over one.
pub(super) fn reach(
    host: &str,
    port: u16,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<(Arc<Id>, SocketAddr), RdmaError> {
    let addresses = find(host, port, Limit::new(timeout, cancelled))
        .map_err(|e| stopped(e, failed("resolve the destination's name")))?;
    let mut last = RdmaError::System { what: "find the destination", source: io::ErrorKind::NotFound.into() };
    for address in addresses {
        match resolve(address, timeout, cancelled) {
            Ok(id) => return Ok((id, address)),
            Err(RdmaError::Cancelled) => return Err(RdmaError::Cancelled),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn resolve(
    address: SocketAddr,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<Arc<Id>, RdmaError> {
    let channel = EventChannel::new().map_err(RdmaError::NoDevice)?;
    let id = Id::new(&channel).map_err(RdmaError::NoDevice)?;
    let no_route = |_| RdmaError::NoRoute { address };
    let step = |what| wait(&channel, Limit::new(timeout, cancelled)).map_err(|e| stopped(e, failed(what)));
    id.resolve_address(address, timeout).map_err(no_route)?;
    let event = step("look up an RDMA address")?;
    if !matches!(event, Some(Event { kind: EventKind::AddressResolved, .. })) {
        return Err(RdmaError::NoRoute { address });
    }
    id.resolve_route(timeout).map_err(no_route)?;
    let event = step("look up an RDMA route")?;
    if !matches!(event, Some(Event { kind: EventKind::RouteResolved, .. })) {
        return Err(RdmaError::NoRoute { address });
    }
    Ok(Arc::new(id))
}

/// An error of a wait, which may have been cancelled.
fn stopped(error: io::Error, otherwise: impl FnOnce(io::Error) -> RdmaError) -> RdmaError {
    if is_cancelled(&error) { RdmaError::Cancelled } else { otherwise(error) }
}

/// Asks for the connection, whose queue pair is ready to receive, and waits for the answer.
pub(super) fn ask(
    pair: &QueuePair,
    address: SocketAddr,
    preamble: Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<Accept, RdmaError> {
    let id = pair.id();
    id.connect(&Request { preamble }.encode()).map_err(failed("connect a queue pair"))?;
    let event = wait(id.channel(), Limit::new(timeout, cancelled))
        .map_err(|e| stopped(e, failed("connect a queue pair")))?;
    let no_answer = |why: String| RdmaError::NoAnswer { address, why };
    match event {
        Some(Event { kind: EventKind::Established, private, .. }) => Ok(Accept::decode(&private)?),
        Some(Event { kind: EventKind::Rejected, private, status, .. }) => match Refusal::decode(&private) {
            Ok(refusal) => Err(RdmaError::Refused(refusal.text)),
            // The kernel's own refusals carry a reason and nothing of ours.
            Err(_) => Err(no_answer(format!(
                "it was refused with reason {status}; does the destination listen at an rdma: address?"
            ))),
        },
        Some(event) => Err(no_answer(format!("{:?}, status {}", event.kind, event.status))),
        None => Err(no_answer(format!("no answer within {} s", timeout.as_secs()))),
    }
}

/// The next event of a connection, within a time.
fn wait(channel: &Arc<EventChannel>, limit: Limit<'_>) -> io::Result<Option<Event>> {
    loop {
        if let Some(event) = channel.next()? {
            return Ok(Some(event));
        }
        match limit.step() {
            Ok(step) => wait_readable([channel.fd()], step).map(drop)?,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => return Ok(None),
            Err(e) => return Err(e),
        }
    }
}

/// Somebody who wants to open a stream.
#[derive(Debug)]
pub struct ConnectRequest {
    id: Id,
    preamble: Preamble,
}

impl ConnectRequest {
    /// What it says it is.
    pub fn preamble(&self) -> &Preamble {
        &self.preamble
    }

    /// Sends it away with a reason.
    pub fn refuse(self, code: ErrorCode, text: &str) {
        // Whoever asks hears of the end in any case.
        let _ = self.id.reject(&Refusal::new(code, text).encode());
    }

    /// The connection, on an event channel of its own.
    pub(super) fn into_id(mut self) -> io::Result<Arc<Id>> {
        self.id.migrate()?;
        Ok(Arc::new(self.id))
    }
}

/// Listens for streams.
#[derive(Debug)]
pub struct Listener {
    channel: Arc<EventChannel>,
    _id: Id,
}

impl Listener {
    /// Listens at an address. The port is of another space than TCP's.
    pub fn bind(address: SocketAddr) -> Result<Self, RdmaError> {
        let channel = EventChannel::new().map_err(RdmaError::NoDevice)?;
        let id = Id::new(&channel).map_err(RdmaError::NoDevice)?;
        id.listen(address, BACKLOG).map_err(|e| match e.raw_os_error() {
            Some(libc::ENODEV | libc::EADDRNOTAVAIL) => RdmaError::NoRoute { address },
            _ => RdmaError::System { what: "listen for RDMA connections", source: e },
        })?;
        Ok(Self { channel, _id: id })
    }

    /// Waits a moment for somebody who asks; whoever does not say what for is sent away.
    pub fn accept(&self) -> io::Result<Option<ConnectRequest>> {
        let Some(event) = self.channel.next()? else {
            wait_readable([self.channel.fd()], TICK)?;
            return Ok(None);
        };
        let Some(id) = event.incoming else { return Ok(None) };
        match Request::decode(&event.private) {
            Ok(Request { preamble }) => Ok(Some(ConnectRequest { id, preamble })),
            Err(error) => {
                let _ = id.reject(&Refusal::new(ErrorCode::Protocol, &error.to_string()).encode());
                Ok(None)
            }
        }
    }
}

/// The domain for a connection among those there are, or a new one.
pub(super) fn domain_of<'a>(
    mut known: impl Iterator<Item = (usize, &'a Arc<Domain>)>,
    id: &Arc<Id>,
) -> io::Result<(Option<usize>, Arc<Domain>)> {
    match known.find(|(_, domain)| domain.is_of(id)) {
        Some((at, domain)) => Ok((Some(at), domain.clone())),
        None => Ok((None, Domain::new(id)?)),
    }
}
