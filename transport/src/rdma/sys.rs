//! Verbs and the RDMA connection manager as owned, typed values: the only unsafe code of the RDMA transport.
//!
//! Everything here keeps alive what the system or the adapter may still use, whatever order the caller drops things in: an
//! [`Id`] its [`EventChannel`], a [`Domain`] and a [`CompletionQueue`] the [`Id`] that holds their device open, a
//! [`Region`] its domain and the memory below it, and a [`QueuePair`] every region and buffer of the work requests that
//! were posted on it and have not completed. A queue pair is destroyed before any of these.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::io;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pagecopy::backend::GuestRam;
use rdma_sys as ffi;

/// Completions that one call takes from a queue.
const POLL_MAX: usize = 16;
/// Buffers start at a page, so that no two registrations share one.
const ALIGN: usize = 4096;

/// Turns a return value of librdmacm (0, or -1 with `errno`) into a result.
fn cm(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Turns a return value of libibverbs (0, or a number of `errno`) into a result.
fn verbs(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result.abs())) }
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl on a descriptor takes and returns integers; a wrong descriptor is an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits until one of the descriptors is readable; says which.
pub(super) fn wait_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: Duration,
) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
    // SAFETY: the array holds N entries and lives through the call.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, millis) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(polled.map(|p| p.revents != 0))
}

/// What happened to connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventKind {
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
pub(super) struct Event {
    pub(super) kind: EventKind,
    /// Of a failure, as the system says it: an `errno`, negative, or a reason of the connection manager.
    pub(super) status: i32,
    /// What the peer sent along; may be longer than that, filled up by the transport.
    pub(super) private: Vec<u8>,
    /// The connection that is asked for, of a request.
    pub(super) incoming: Option<Id>,
}

/// Where events of connections come in.
#[derive(Debug)]
pub(super) struct EventChannel {
    raw: NonNull<ffi::rdma_event_channel>,
}

// SAFETY: librdmacm is thread-safe; the channel is a descriptor and a pointer that never change.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    /// Opens the connection manager; fails where the kernel has none, or no device.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        // SAFETY: no arguments; the result is null or ours to destroy.
        let raw = unsafe { ffi::rdma_create_event_channel() };
        let channel = Self { raw: NonNull::new(raw).ok_or_else(io::Error::last_os_error)? };
        set_nonblocking(channel.fd().as_raw_fd())?;
        Ok(Arc::new(channel))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open until `self` is dropped, which the borrow excludes.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().fd) }
    }

    /// The next event, if there is one now.
    pub(super) fn next(self: &Arc<Self>) -> io::Result<Option<Event>> {
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
pub(super) struct Id {
    raw: NonNull<ffi::rdma_cm_id>,
    channel: Arc<EventChannel>,
}

// SAFETY: librdmacm's calls on an identifier are thread-safe; see rdma_cm(7).
unsafe impl Send for Id {}
// SAFETY: as above.
unsafe impl Sync for Id {}

impl Id {
    pub(super) fn new(channel: &Arc<EventChannel>) -> io::Result<Self> {
        let mut raw = ptr::null_mut();
        let space = ffi::rdma_port_space::RDMA_PS_TCP;
        // SAFETY: the channel lives as long as the identifier, which holds it; `raw` takes the result.
        cm(unsafe { ffi::rdma_create_id(channel.raw.as_ptr(), &raw mut raw, ptr::null_mut(), space) })?;
        let raw = NonNull::new(raw).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { raw, channel: channel.clone() })
    }

    pub(super) fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    /// Moves a connection to a channel of its own. No event of it may be in use.
    pub(super) fn migrate(&mut self) -> io::Result<()> {
        let channel = EventChannel::new()?;
        // SAFETY: both live; the exclusive borrow excludes other calls on the identifier.
        cm(unsafe { ffi::rdma_migrate_id(self.raw.as_ptr(), channel.raw.as_ptr()) })?;
        self.channel = channel;
        Ok(())
    }

    pub(super) fn listen(&self, address: SocketAddr, backlog: i32) -> io::Result<()> {
        let address = socket2::SockAddr::from(address);
        // SAFETY: the address is a valid sockaddr of its family; the call copies it.
        cm(unsafe { ffi::rdma_bind_addr(self.raw.as_ptr(), address.as_ptr().cast_mut().cast()) })?;
        // SAFETY: a bound identifier.
        cm(unsafe { ffi::rdma_listen(self.raw.as_ptr(), backlog) })
    }

    /// Begins to look up which device leads to an address.
    pub(super) fn resolve_address(&self, address: SocketAddr, timeout: Duration) -> io::Result<()> {
        let address = socket2::SockAddr::from(address);
        let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
        let to = address.as_ptr().cast_mut().cast();
        // SAFETY: as in `listen`; no source address is given.
        cm(unsafe { ffi::rdma_resolve_addr(self.raw.as_ptr(), ptr::null_mut(), to, millis) })
    }

    pub(super) fn resolve_route(&self, timeout: Duration) -> io::Result<()> {
        let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
        // SAFETY: an identifier; its state is checked by the library.
        cm(unsafe { ffi::rdma_resolve_route(self.raw.as_ptr(), millis) })
    }

    /// Asks for the connection; the queue pair must exist.
    pub(super) fn connect(&self, private: &[u8]) -> io::Result<()> {
        let mut param = connection_param(private)?;
        // SAFETY: the parameters point at `private`, which lives through the call and is copied by it.
        cm(unsafe { ffi::rdma_connect(self.raw.as_ptr(), &raw mut param) })
    }

    pub(super) fn accept(&self, private: &[u8]) -> io::Result<()> {
        let mut param = connection_param(private)?;
        // SAFETY: as in `connect`.
        cm(unsafe { ffi::rdma_accept(self.raw.as_ptr(), &raw mut param) })
    }

    pub(super) fn reject(&self, private: &[u8]) -> io::Result<()> {
        let len = u8::try_from(private.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `private` lives through the call and is copied by it.
        cm(unsafe { ffi::rdma_reject(self.raw.as_ptr(), private.as_ptr().cast(), len) })
    }

    /// Ends the connection: what is posted on its queue pair completes with errors.
    pub(super) fn disconnect(&self) {
        // SAFETY: an identifier in any state; in one without a connection the call fails, which is what is wanted.
        let _ = unsafe { ffi::rdma_disconnect(self.raw.as_ptr()) };
    }

    /// The device, once there is one.
    fn device(&self) -> io::Result<NonNull<ffi::ibv_context>> {
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

/// A protection domain: what regions and queue pairs must share to work together.
#[derive(Debug)]
pub(super) struct Domain {
    raw: NonNull<ffi::ibv_pd>,
    on_demand: bool,
    id: Arc<Id>,
}

// SAFETY: verbs are thread-safe, and the handle never changes.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    /// A domain on the device of a connection.
    pub(super) fn new(id: &Arc<Id>) -> io::Result<Arc<Self>> {
        let device = id.device()?;
        // SAFETY: the device stays open while `id` lives, which the domain holds.
        let raw = unsafe { ffi::ibv_alloc_pd(device.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self { raw, on_demand: on_demand(device), id: id.clone() }))
    }

    /// Whether a connection is on this domain's device.
    pub(super) fn is_of(&self, id: &Id) -> bool {
        matches!((self.id.device(), id.device()), (Ok(a), Ok(b)) if a == b)
    }

    /// Whether memory is registered without being pinned: the device faults pages in as it needs them.
    pub(super) fn on_demand(&self) -> bool {
        self.on_demand
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: made by `new`; regions and queue pairs hold the domain, so none is left on it.
        let result = unsafe { ffi::ibv_dealloc_pd(self.raw.as_ptr()) };
        debug_assert_eq!(result, 0, "ibv_dealloc_pd");
    }
}

/// Whether the device does on-demand paging for sends and writes over reliable connections.
fn on_demand(device: NonNull<ffi::ibv_context>) -> bool {
    // SAFETY: the structure is integers only, for which zeros are valid.
    let mut attributes: ffi::ibv_device_attr_ex = unsafe { std::mem::zeroed() };
    // SAFETY: the device is open; the library fills in the structure, whose size the binding passes.
    if unsafe { ffi::ibv_query_device_ex(device.as_ptr(), ptr::null(), &raw mut attributes) } != 0 {
        return false;
    }
    let caps = &attributes.odp_caps;
    let needed = ffi::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE.0;
    caps.general_caps & u64::from(ffi::ibv_odp_general_caps::IBV_ODP_SUPPORT.0) != 0
        && caps.per_transport_caps.rc_odp_caps & needed != 0
}

/// What lies below a region.
#[derive(Clone)]
enum Memory {
    /// A guest's mapping.
    Guest(#[expect(dead_code, reason = "keeps the mapping")] Arc<dyn GuestRam>),
    /// Buffers of our own.
    Own(#[expect(dead_code, reason = "keeps the allocation")] Arc<Allocation>),
}

/// What the adapter may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Send from it.
    Read,
    /// Receive into it.
    Receive,
    /// Let the peer write to it.
    RemoteWrite,
}

/// Registered memory.
pub(super) struct Region {
    raw: NonNull<ffi::ibv_mr>,
    base: u64,
    len: u64,
    _domain: Arc<Domain>,
    memory: ManuallyDrop<Memory>,
}

// SAFETY: a registration is a handle that never changes; its memory is accessed by the adapter only.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Registers `len` bytes at `offset` of a guest's region. Unless the device pages on demand that brings them all into
    /// memory and pins them.
    pub(super) fn guest(
        domain: &Arc<Domain>,
        ram: &Arc<dyn GuestRam>,
        region: usize,
        offset: u64,
        len: u64,
        access: Access,
    ) -> io::Result<Arc<Self>> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let at = usize::try_from(offset).map_err(|_| outside())?;
        let count = usize::try_from(len).map_err(|_| outside())?;
        let memory = ram.region(region);
        let piece = memory.subslice(at, count).map_err(|_| outside())?;
        let base = piece.ptr_guard_mut().as_ptr();
        Self::register(domain, base, count, access, domain.on_demand, Memory::Guest(ram.clone()))
    }

    fn register(
        domain: &Arc<Domain>,
        base: *mut u8,
        len: usize,
        access: Access,
        on_demand: bool,
        memory: Memory,
    ) -> io::Result<Arc<Self>> {
        use ffi::ibv_access_flags as a;
        let mut flags = match access {
            Access::Read => 0,
            Access::Receive => a::IBV_ACCESS_LOCAL_WRITE.0,
            Access::RemoteWrite => a::IBV_ACCESS_LOCAL_WRITE.0 | a::IBV_ACCESS_REMOTE_WRITE.0,
        };
        if on_demand {
            flags |= a::IBV_ACCESS_ON_DEMAND.0;
        }
        // SAFETY: `base..base + len` is mapped: a guest's mapping stays where it is as long as its GuestRam (which the trait demands),
        // an allocation as long as its Arc, and the region holds either until it is deregistered. No Rust reference to guest
        // memory exists, and own buffers are only referenced while no work request names them (Slot).
        let raw = unsafe { ffi::ibv_reg_mr(domain.raw.as_ptr(), base.cast(), len, flags as i32) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self {
            raw,
            base: base as u64,
            len: len as u64,
            _domain: domain.clone(),
            memory: ManuallyDrop::new(memory),
        }))
    }

    /// What a peer needs to write here: the address of the first byte, and the key.
    pub(super) fn remote(&self) -> (u64, u32) {
        // SAFETY: the registration lives until `self` is dropped.
        (self.base, unsafe { self.raw.as_ref().rkey })
    }

    fn key(&self) -> u32 {
        // SAFETY: as in `remote`.
        unsafe { self.raw.as_ref().lkey }
    }

    /// A piece of the region as a scatter-gather entry.
    fn entry(&self, offset: u64, len: u32) -> io::Result<ffi::ibv_sge> {
        if offset.checked_add(len.into()).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(ffi::ibv_sge { addr: self.base + offset, length: len, lkey: self.key() })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by `register`; queue pairs hold the regions of what is posted, so no work request names it.
        let result = unsafe { ffi::ibv_dereg_mr(self.raw.as_ptr()) };
        debug_assert_eq!(result, 0, "ibv_dereg_mr");
        if result == 0 {
            // SAFETY: dropped once, here. Where the registration lives on, so does the memory, for ever: the adapter may write to it.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

/// Bytes of our own that the adapter reads and writes.
struct Allocation {
    base: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: plain memory; who may touch which part is decided by Slot.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(len: usize) -> io::Result<Arc<Self>> {
        let layout =
            std::alloc::Layout::from_size_align(len, ALIGN).map_err(|_| io::ErrorKind::InvalidInput)?;
        assert_ne!(len, 0, "an allocation has bytes");
        // SAFETY: the layout is not empty.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(Self { base, layout }))
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; slots and regions hold it, so none is left.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// A message buffer. Whoever owns it may read and write it; while it is posted the queue pair owns it.
pub(super) struct Slot {
    region: Arc<Region>,
    memory: Arc<Allocation>,
    at: usize,
    len: usize,
}

impl Slot {
    /// `count` buffers of `len` bytes in one registration.
    pub(super) fn make(
        domain: &Arc<Domain>,
        count: usize,
        len: usize,
        access: Access,
    ) -> io::Result<Vec<Self>> {
        let memory = Allocation::new(count * len)?;
        let own = Memory::Own(memory.clone());
        let region = Region::register(domain, memory.base.as_ptr(), count * len, access, false, own)?;
        let slot = |i| Self { region: region.clone(), memory: memory.clone(), at: i * len, len };
        Ok((0..count).map(slot).collect())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `at..at + len` lies in the allocation and is this slot's alone (make). It was zeroed, and the adapter writes to it only
        // while the slot is posted, when nobody can call this.
        unsafe { std::slice::from_raw_parts(self.memory.base.as_ptr().add(self.at), self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the exclusive borrow of the slot is one of its bytes.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base.as_ptr().add(self.at), self.len) }
    }
}

/// Where finished work requests show.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    raw: NonNull<ffi::ibv_cq>,
    channel: NonNull<ffi::ibv_comp_channel>,
    _id: Arc<Id>,
}

// SAFETY: verbs are thread-safe, and the handles never change.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    fn new(id: &Arc<Id>, entries: u32) -> io::Result<Self> {
        let device = id.device()?.as_ptr();
        // SAFETY: the device stays open while `id` lives, which the queue holds.
        let channel = unsafe { ffi::ibv_create_comp_channel(device) };
        let channel = NonNull::new(channel).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: as above; the channel was just made.
        let raw = unsafe { ffi::ibv_create_cq(device, entries as i32, ptr::null_mut(), channel.as_ptr(), 0) };
        let Some(raw) = NonNull::new(raw) else {
            let error = io::Error::last_os_error();
            // SAFETY: made above, and nothing uses it.
            unsafe { ffi::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self { raw, channel, _id: id.clone() };
        set_nonblocking(queue.fd().as_raw_fd())?;
        Ok(queue)
    }

    /// Readable once something completed after [`Self::arm`].
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open until `self` is dropped, which the borrow excludes.
        unsafe { BorrowedFd::borrow_raw(self.channel.as_ref().fd) }
    }

    /// Asks for an event with the next completion. Those that are there already make none: poll once more after this.
    pub(super) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue lives.
        verbs(unsafe { ffi::ibv_req_notify_cq(self.raw.as_ptr(), 0) })
    }

    /// Takes the events that are there off the channel.
    pub(super) fn clear_events(&self) {
        loop {
            let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the channel lives and does not block; the pointers take what the event names.
            let got =
                unsafe { ffi::ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context) };
            if got != 0 {
                return;
            }
            // SAFETY: the channel has this queue only; each event is acknowledged once.
            unsafe { ffi::ibv_ack_cq_events(self.raw.as_ptr(), 1) };
        }
    }

    /// Takes completions; returns how many there were.
    fn poll(&self, completions: &mut [ffi::ibv_wc; POLL_MAX]) -> io::Result<usize> {
        // SAFETY: the queue lives, and the array has room for POLL_MAX.
        let got = unsafe { ffi::ibv_poll_cq(self.raw.as_ptr(), POLL_MAX as i32, completions.as_mut_ptr()) };
        usize::try_from(got).map_err(|_| io::Error::other("the completion queue cannot be polled"))
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        self.clear_events();
        // SAFETY: made by `new`; the queue pair on it is destroyed before its queues are dropped, and every event was acknowledged.
        let result = unsafe { ffi::ibv_destroy_cq(self.raw.as_ptr()) };
        debug_assert_eq!(result, 0, "ibv_destroy_cq");
        // SAFETY: its only queue is gone.
        let result = unsafe { ffi::ibv_destroy_comp_channel(self.channel.as_ptr()) };
        debug_assert_eq!(result, 0, "ibv_destroy_comp_channel");
    }
}

fn no_completions() -> [ffi::ibv_wc; POLL_MAX] {
    // SAFETY: the structure is integers only, for which zeros are valid.
    unsafe { std::mem::zeroed() }
}

/// Whether a work request succeeded, or why not.
fn check(completion: &ffi::ibv_wc) -> io::Result<()> {
    use ffi::ibv_wc_status as s;
    match completion.status {
        s::IBV_WC_SUCCESS => Ok(()),
        s::IBV_WC_WR_FLUSH_ERR => {
            Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the queue pair was shut down"))
        }
        status => {
            // SAFETY: returns a string that is never freed, for any number.
            let text = unsafe { CStr::from_ptr(ffi::ibv_wc_status_str(status)) };
            let text = format!("a work request failed: {}", text.to_string_lossy());
            Err(io::Error::new(io::ErrorKind::ConnectionReset, text))
        }
    }
}

/// A piece of memory to be written to the peer's.
#[derive(Clone)]
pub(super) struct Write {
    pub(super) region: Arc<Region>,
    /// Where it starts in the region.
    pub(super) offset: u64,
    pub(super) len: u32,
    /// Where it goes: the peer's address, and its key.
    pub(super) to: u64,
    pub(super) key: u32,
}

/// What a posted work request uses until it has completed.
enum Posted {
    Write { _region: Arc<Region> },
    Message(Slot),
}

#[derive(Default)]
struct Sends {
    posted: VecDeque<Posted>,
    /// Work requests that completed: the number of the first in `posted`.
    completed: u64,
}

/// Sizes of a queue pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depth {
    pub(super) sends: u32,
    pub(super) receives: u32,
}

/// A reliable connection's end, with its completion queues and all that is posted on it.
pub(super) struct QueuePair {
    raw: NonNull<ffi::ibv_qp>,
    depth: Depth,
    // In this order: buffers and regions go when the queue pair is gone (drop), then what it was made on.
    sends: Mutex<Sends>,
    receives: Mutex<VecDeque<Slot>>,
    send_queue: CompletionQueue,
    receive_queue: CompletionQueue,
    _domain: Arc<Domain>,
    id: Arc<Id>,
}

// SAFETY: verbs are thread-safe; the handle never changes, and the rest is.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// A queue pair for a connection that has its device, in a domain on it.
    pub(super) fn new(id: Arc<Id>, domain: &Arc<Domain>, depth: Depth) -> io::Result<Self> {
        assert!(domain.is_of(&id), "a queue pair is on its domain's device");
        let send_queue = CompletionQueue::new(&id, depth.sends)?;
        let receive_queue = CompletionQueue::new(&id, depth.receives)?;
        // SAFETY: integers and pointers, for which zeros are valid.
        let mut init: ffi::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        (init.send_cq, init.recv_cq) = (send_queue.raw.as_ptr(), receive_queue.raw.as_ptr());
        (init.cap.max_send_wr, init.cap.max_recv_wr) = (depth.sends, depth.receives);
        (init.cap.max_send_sge, init.cap.max_recv_sge) = (1, 1);
        init.qp_type = ffi::ibv_qp_type::IBV_QPT_RC;
        // SAFETY: identifier, domain and queues live, and on one device; the queue pair holds them all.
        cm(unsafe { ffi::rdma_create_qp(id.raw.as_ptr(), domain.raw.as_ptr(), &raw mut init) })?;
        // SAFETY: the identifier lives; the call set the field.
        let raw = NonNull::new(unsafe { id.raw.as_ref().qp }).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            raw,
            depth,
            sends: Mutex::default(),
            receives: Mutex::default(),
            send_queue,
            receive_queue,
            _domain: domain.clone(),
            id,
        })
    }

    pub(super) fn id(&self) -> &Arc<Id> {
        &self.id
    }

    pub(super) fn send_queue(&self) -> &CompletionQueue {
        &self.send_queue
    }

    pub(super) fn receive_queue(&self) -> &CompletionQueue {
        &self.receive_queue
    }

    fn sends(&self) -> MutexGuard<'_, Sends> {
        self.sends.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn receives(&self) -> MutexGuard<'_, VecDeque<Slot>> {
        self.receives.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Work requests that may be posted for sending now.
    pub(super) fn room(&self) -> usize {
        self.depth.sends as usize - self.sends().posted.len()
    }

    /// Posts writes, and then a message of `len` bytes if there is one, in this order. Only the last one's completion is
    /// signalled; it stands for all before it.
    pub(super) fn post(&self, writes: &[Write], message: Option<(Slot, usize)>) -> io::Result<()> {
        let count = writes.len() + usize::from(message.is_some());
        if count == 0 {
            return Ok(());
        }
        let mut sends = self.sends();
        assert!(sends.posted.len() + count <= self.depth.sends as usize, "the caller asked for room");
        let mut entries = Vec::with_capacity(count);
        for write in writes {
            entries.push(write.region.entry(write.offset, write.len)?);
        }
        if let Some((slot, len)) = &message {
            assert!(*len <= slot.len, "a message lies in its buffer");
            entries.push(slot.region.entry(slot.at as u64, *len as u32)?);
        }
        let first = sends.completed + sends.posted.len() as u64;
        let mut requests: Vec<ffi::ibv_send_wr> = Vec::with_capacity(count);
        for (i, entry) in entries.iter_mut().enumerate() {
            // SAFETY: integers and pointers, for which zeros are valid.
            let mut request: ffi::ibv_send_wr = unsafe { std::mem::zeroed() };
            request.wr_id = first + i as u64;
            (request.sg_list, request.num_sge) = (entry, 1);
            if let Some(write) = writes.get(i) {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE;
                request.wr.rdma.remote_addr = write.to;
                request.wr.rdma.rkey = write.key;
            } else {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_SEND;
            }
            if i + 1 == count {
                request.send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
            }
            requests.push(request);
        }
        // One pointer for all of them: the vector is not borrowed again until they are posted.
        let list = requests.as_mut_ptr();
        for i in 1..count {
            // SAFETY: `count` requests lie there, and `i` is one of them.
            unsafe { (*list.add(i - 1)).next = list.add(i) };
        }
        // Before they are posted: whatever is posted is kept.
        sends.posted.extend(writes.iter().map(|write| Posted::Write { _region: write.region.clone() }));
        sends.posted.extend(message.map(|(slot, _)| Posted::Message(slot)));
        let mut bad = ptr::null_mut();
        // SAFETY: the list and its entries live through the call, which copies them. What they point at lies in registered memory
        // (Region::entry) that `posted` holds until the requests have completed or the queue pair is gone.
        verbs(unsafe { ffi::ibv_post_send(self.raw.as_ptr(), list, &raw mut bad) })
    }

    /// Takes completions of sends; buffers that are free again go to `free`. Says whether there were any.
    pub(super) fn poll_sends(&self, free: &mut Vec<Slot>) -> io::Result<bool> {
        let mut completions = no_completions();
        let mut sends = self.sends();
        let got = self.send_queue.poll(&mut completions)?;
        for completion in &completions[..got] {
            check(completion)?;
            // Requests complete in order, so a signalled one stands for all before it.
            while sends.completed <= completion.wr_id {
                sends.completed += 1;
                if let Some(Posted::Message(slot)) = sends.posted.pop_front() {
                    free.push(slot);
                }
            }
        }
        Ok(got != 0)
    }

    /// Posts a buffer to be received into.
    pub(super) fn post_receive(&self, slot: Slot) -> io::Result<()> {
        let mut receives = self.receives();
        assert!(receives.len() < self.depth.receives as usize, "no more buffers than the queue pair takes");
        let mut entry = slot.region.entry(slot.at as u64, slot.len as u32)?;
        let mut request =
            ffi::ibv_recv_wr { wr_id: 0, next: ptr::null_mut(), sg_list: &raw mut entry, num_sge: 1 };
        receives.push_back(slot);
        let mut bad = ptr::null_mut();
        // SAFETY: request and entry live through the call, which copies them; the buffer is held by `receives` until it completed or
        // the queue pair is gone, and nobody else has it.
        verbs(unsafe { ffi::ibv_post_recv(self.raw.as_ptr(), &raw mut request, &raw mut bad) })
    }

    /// Takes messages that came, each with its length, in order. Says whether there were any.
    pub(super) fn poll_receives(&self, came: &mut VecDeque<(Slot, usize)>) -> io::Result<bool> {
        let mut completions = no_completions();
        let mut receives = self.receives();
        let got = self.receive_queue.poll(&mut completions)?;
        let mut result = Ok(got != 0);
        for completion in &completions[..got] {
            if let Err(error) = check(completion) {
                result = Err(error);
                break;
            }
            // Buffers of a connection are used in the order in which they were posted.
            if let Some(slot) = receives.pop_front() {
                let len = (completion.byte_len as usize).min(slot.len);
                came.push_back((slot, len));
            }
        }
        // What came before a failure still counts.
        if came.is_empty() { result } else { result.or(Ok(true)) }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.id.disconnect();
        // SAFETY: the identifier has the queue pair made in `new`, which nothing else destroys. From here on the adapter touches
        // nothing of what was posted; the fields are dropped after this.
        unsafe { ffi::rdma_destroy_qp(self.id.raw.as_ptr()) };
    }
}

/// How many bytes this process may pin, unless without limit.
pub(super) fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills in the structure it is given.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    (got == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}
