//! Queue pairs: what is posted on them, and what has completed.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard};

use rdma_sys as ffi;

use super::cm::Id;
use super::memory::{Domain, Region, Slot};
use super::{cm, set_nonblocking, verbs};

/// Completions that one call takes from a queue.
const POLL_MAX: usize = 16;

/// Where finished work requests show.
#[derive(Debug)]
pub(in crate::rdma) struct CompletionQueue {
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
    pub(in crate::rdma) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open until `self` is dropped, which the borrow excludes.
        unsafe { BorrowedFd::borrow_raw(self.channel.as_ref().fd) }
    }

    /// Asks for an event with the next completion. Those that are there already make none: poll once more after this.
    pub(in crate::rdma) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue lives.
        verbs(unsafe { ffi::ibv_req_notify_cq(self.raw.as_ptr(), 0) })
    }

    /// Takes the events that are there off the channel.
    pub(in crate::rdma) fn clear_events(&self) {
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
pub(in crate::rdma) struct Write {
    pub(in crate::rdma) region: Arc<Region>,
    /// Where it starts in the region.
    pub(in crate::rdma) offset: u64,
    pub(in crate::rdma) len: u32,
    /// Where it goes: the peer's address, and its key.
    pub(in crate::rdma) to: u64,
    pub(in crate::rdma) key: u32,
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
pub(in crate::rdma) struct Depth {
    pub(in crate::rdma) sends: u32,
    pub(in crate::rdma) receives: u32,
}

/// A reliable connection's end, with its completion queues and all that is posted on it.
pub(in crate::rdma) struct QueuePair {
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
    pub(in crate::rdma) fn new(id: Arc<Id>, domain: &Arc<Domain>, depth: Depth) -> io::Result<Self> {
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

    pub(in crate::rdma) fn id(&self) -> &Arc<Id> {
        &self.id
    }

    pub(in crate::rdma) fn send_queue(&self) -> &CompletionQueue {
        &self.send_queue
    }

    pub(in crate::rdma) fn receive_queue(&self) -> &CompletionQueue {
        &self.receive_queue
    }

    fn sends(&self) -> MutexGuard<'_, Sends> {
        self.sends.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn receives(&self) -> MutexGuard<'_, VecDeque<Slot>> {
        self.receives.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Work requests that may be posted for sending now.
    pub(in crate::rdma) fn room(&self) -> usize {
        self.depth.sends as usize - self.sends().posted.len()
    }

    /// Posts writes, and then a message of `len` bytes if there is one, in this order. Only the last one's completion is
    /// signalled; it stands for all before it.
    pub(in crate::rdma) fn post(&self, writes: &[Write], message: Option<(Slot, usize)>) -> io::Result<()> {
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
    pub(in crate::rdma) fn poll_sends(&self, free: &mut Vec<Slot>) -> io::Result<bool> {
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
    pub(in crate::rdma) fn post_receive(&self, slot: Slot) -> io::Result<()> {
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
    pub(in crate::rdma) fn poll_receives(&self, came: &mut VecDeque<(Slot, usize)>) -> io::Result<bool> {
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
