//! The connection manager: channels of events, and identifiers of connections.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use rdma_sys as ffi;

use super::{cm, set_nonblocking};

/// What happened to connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rdma) enum EventKind {
    AddressResolved,
    RouteResolved,
    ConnectRequest,
    Established,
    Rejected,
    Disconnected,
    /// The adapter goes away: everything that uses it must be let go.
    DeviceRemoved,
    /// An attempt to connect that failed.
    Failed,
    Other,
}

/// An event, copied out and acknowledged.
#[derive(Debug)]
pub(in crate::rdma) struct Event {
    pub(in crate::rdma) kind: EventKind,
    /// Of a failure, as the system says it: an `errno`, negative, or a reason of the connection manager.
    pub(in crate::rdma) status: i32,
    /// What the peer sent along; may be longer than that, filled up by the transport.
    pub(in crate::rdma) private: Vec<u8>,
    /// The connection that is asked for, of a request.
    pub(in crate::rdma) incoming: Option<Id>,
}

/// Where events of connections come in.
#[derive(Debug)]
pub(in crate::rdma) struct EventChannel {
    raw: NonNull<ffi::rdma_event_channel>,
}

// SAFETY: librdmacm is thread-safe; the channel is a descriptor and a pointer that never change.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    /// Opens the connection manager; fails where the kernel has none, or no device.
    pub(in crate::rdma) fn new() -> io::Result<Arc<Self>> {
        // SAFETY: no arguments; the result is null or ours to destroy.
        let raw = unsafe { ffi::rdma_create_event_channel() };
        let channel = Self { raw: NonNull::new(raw).ok_or_else(io::Error::last_os_error)? };
        set_nonblocking(channel.fd().as_raw_fd())?;
        Ok(Arc::new(channel))
    }

    pub(in crate::rdma) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open until `self` is dropped, which the borrow excludes.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().fd) }
    }

    /// The next event, if there is one now.
    pub(in crate::rdma) fn next(self: &Arc<Self>) -> io::Result<Option<Event>> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel lives; `raw` takes a pointer that is valid until it is acknowledged below.
        if let Err(error) = cm(unsafe { ffi::rdma_get_cm_event(self.raw.as_ptr(), &raw mut raw) }) {
            let none = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if none { Ok(None) } else { Err(error) };
        }
        // SAFETY: an event that was just handed out; only read here.
        let event = unsafe { &*raw };
        let kind = kind_of(event.event);
        let carries = [EventKind::ConnectRequest, EventKind::Established, EventKind::Rejected];
        let private = if carries.contains(&kind) { private_of(event) } else { Vec::new() };
        let incoming = (kind == EventKind::ConnectRequest).then_some(event.id);
        let status = event.status;
        // SAFETY: acknowledged once; nothing of the event is used from here on.
        cm(unsafe { ffi::rdma_ack_cm_event(raw) })?;
        // The identifier of a request is new and belongs to whoever took the event.
        let incoming = incoming.and_then(NonNull::new).map(|raw| Id { raw, channel: self.clone() });
        Ok(Some(Event { kind, status, private, incoming }))
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: made by `new`; every Id on it holds it, so none is left.
        unsafe { ffi::rdma_destroy_event_channel(self.raw.as_ptr()) };
    }
}

fn kind_of(event: ffi::rdma_cm_event_type::Type) -> EventKind {
    use ffi::rdma_cm_event_type as e;
    match event {
        e::RDMA_CM_EVENT_ADDR_RESOLVED => EventKind::AddressResolved,
        e::RDMA_CM_EVENT_ROUTE_RESOLVED => EventKind::RouteResolved,
        e::RDMA_CM_EVENT_CONNECT_REQUEST => EventKind::ConnectRequest,
        e::RDMA_CM_EVENT_ESTABLISHED => EventKind::Established,
        e::RDMA_CM_EVENT_REJECTED => EventKind::Rejected,
        e::RDMA_CM_EVENT_DISCONNECTED => EventKind::Disconnected,
        e::RDMA_CM_EVENT_DEVICE_REMOVAL => EventKind::DeviceRemoved,
        e::RDMA_CM_EVENT_ADDR_ERROR
        | e::RDMA_CM_EVENT_ROUTE_ERROR
        | e::RDMA_CM_EVENT_CONNECT_ERROR
        | e::RDMA_CM_EVENT_UNREACHABLE => EventKind::Failed,
        _ => EventKind::Other,
    }
}

fn private_of(event: &ffi::rdma_cm_event) -> Vec<u8> {
    // SAFETY: events of these kinds carry the connection member of the union, which is plain integers and a pointer.
    let param = unsafe { event.param.conn };
    if param.private_data.is_null() || param.private_data_len == 0 {
        return Vec::new();
    }
    // SAFETY: the library points at that many bytes inside the event, which is not acknowledged yet.
    unsafe { std::slice::from_raw_parts(param.private_data.cast(), param.private_data_len.into()) }.to_vec()
}

/// An identifier of the connection manager: a listener, or an end of a connection. Holds its device open once it has one.
#[derive(Debug)]
pub(in crate::rdma) struct Id {
    pub(super) raw: NonNull<ffi::rdma_cm_id>,
    channel: Arc<EventChannel>,
}

// SAFETY: librdmacm's calls on an identifier are thread-safe; see rdma_cm(7).
unsafe impl Send for Id {}
// SAFETY: as above.
unsafe impl Sync for Id {}

impl Id {
    pub(in crate::rdma) fn new(channel: &Arc<EventChannel>) -> io::Result<Self> {
        let mut raw = ptr::null_mut();
        let space = ffi::rdma_port_space::RDMA_PS_TCP;
        // SAFETY: the channel lives as long as the identifier, which holds it; `raw` takes the result.
        cm(unsafe { ffi::rdma_create_id(channel.raw.as_ptr(), &raw mut raw, ptr::null_mut(), space) })?;
        let raw = NonNull::new(raw).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { raw, channel: channel.clone() })
    }

    pub(in crate::rdma) fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    /// Moves a connection to a channel of its own. No event of it may be in use.
    pub(in crate::rdma) fn migrate(&mut self) -> io::Result<()> {
        let channel = EventChannel::new()?;
        // SAFETY: both live; the exclusive borrow excludes other calls on the identifier.
        cm(unsafe { ffi::rdma_migrate_id(self.raw.as_ptr(), channel.raw.as_ptr()) })?;
        self.channel = channel;
        Ok(())
    }

    pub(in crate::rdma) fn listen(&self, address: SocketAddr, backlog: i32) -> io::Result<()> {
        let address = socket2::SockAddr::from(address);
        // SAFETY: the address is a valid sockaddr of its family; the call copies it.
        cm(unsafe { ffi::rdma_bind_addr(self.raw.as_ptr(), address.as_ptr().cast_mut().cast()) })?;
        // SAFETY: a bound identifier.
        cm(unsafe { ffi::rdma_listen(self.raw.as_ptr(), backlog) })
    }

    /// Begins to look up which device leads to an address.
    pub(in crate::rdma) fn resolve_address(&self, address: SocketAddr, timeout: Duration) -> io::Result<()> {
        let address = socket2::SockAddr::from(address);
        let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
        let to = address.as_ptr().cast_mut().cast();
        // SAFETY: as in `listen`; no source address is given.
        cm(unsafe { ffi::rdma_resolve_addr(self.raw.as_ptr(), ptr::null_mut(), to, millis) })
    }

    pub(in crate::rdma) fn resolve_route(&self, timeout: Duration) -> io::Result<()> {
        let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
        // SAFETY: an identifier; its state is checked by the library.
        cm(unsafe { ffi::rdma_resolve_route(self.raw.as_ptr(), millis) })
    }

    /// Asks for the connection; the queue pair must exist.
    pub(in crate::rdma) fn connect(&self, private: &[u8]) -> io::Result<()> {
        let mut param = connection_param(private)?;
        // SAFETY: the parameters point at `private`, which lives through the call and is copied by it.
        cm(unsafe { ffi::rdma_connect(self.raw.as_ptr(), &raw mut param) })
    }

    pub(in crate::rdma) fn accept(&self, private: &[u8]) -> io::Result<()> {
        let mut param = connection_param(private)?;
        // SAFETY: as in `connect`.
        cm(unsafe { ffi::rdma_accept(self.raw.as_ptr(), &raw mut param) })
    }

    pub(in crate::rdma) fn reject(&self, private: &[u8]) -> io::Result<()> {
        let len = u8::try_from(private.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `private` lives through the call and is copied by it.
        cm(unsafe { ffi::rdma_reject(self.raw.as_ptr(), private.as_ptr().cast(), len) })
    }

    /// Ends the connection: what is posted on its queue pair completes with errors.
    pub(in crate::rdma) fn disconnect(&self) {
        // SAFETY: an identifier in any state; in one without a connection the call fails, which is what is wanted.
        let _ = unsafe { ffi::rdma_disconnect(self.raw.as_ptr()) };
    }

    /// The device, once there is one.
    pub(super) fn device(&self) -> io::Result<NonNull<ffi::ibv_context>> {
        // SAFETY: the identifier lives; the field is set when its address was resolved or its request came, and stays.
        NonNull::new(unsafe { self.raw.as_ref().verbs }).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: made by the library and ours; queue pairs, queues and domains on it hold it, so none is left. All its events
        // were acknowledged where they were taken, so this does not wait for ever.
        let result = unsafe { ffi::rdma_destroy_id(self.raw.as_ptr()) };
        debug_assert_eq!(result, 0, "rdma_destroy_id");
    }
}

fn connection_param(private: &[u8]) -> io::Result<ffi::rdma_conn_param> {
    Ok(ffi::rdma_conn_param {
        private_data: private.as_ptr().cast(),
        private_data_len: u8::try_from(private.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        // No RDMA READ is used.
        responder_resources: 0,
        initiator_depth: 0,
        flow_control: 1,
        // The most of both; a peer that is not ready is waited for without end (7), a peer that is gone is not.
        retry_count: 7,
        rnr_retry_count: 7,
        srq: 0,
        qp_num: 0,
    })
}
