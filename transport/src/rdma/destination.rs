//! The destination's end of a queue pair: messages in, receipts out, and guest memory registered for the source to write to.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};

use super::connect::{ConnectRequest, RdmaError, domain_of, failed};
use super::sys::{Access, Depth, Domain, Id, QueuePair, Region, Slot, wait_readable};
use super::{Cut, NotRegistered, POLLS, TICK, aborted, buffers_failed, is_over};
use crate::carrier::{Breaker, DestinationEnd, FrameReceiver, Landing};
use crate::local::is_local;
use crate::sys::ReceiveList;
use crate::wire::WireError;
use crate::wire::control::ErrorCode;
use crate::wire::queue::{
    ANSWER_BYTES, Accept, Kind, MESSAGE_BYTES, MessageHeader, Range, Refusal, Registered,
};

/// Buffers for what the source sends.
const RECEIVES: u32 = 16;
/// Buffers for messages to the source.
const ANSWERS: u32 = 32;

/// What the streams of a session share.
#[derive(Clone)]
pub(crate) struct DestinationContext {
    landing: Arc<dyn Landing>,
    registrar: Arc<Registrar>,
    timeout: Duration,
}

impl DestinationContext {
    /// For streams that place pages in `landing`, of which at most `pinned_max` bytes are registered at a time.
    pub(crate) fn new(landing: Arc<dyn Landing>, timeout: Duration, pinned_max: u64) -> Self {
        Self { landing, registrar: Arc::new(Registrar::new(pinned_max)), timeout }
    }
}

/// What the destination has registered, for all streams of a session.
struct Registrar {
    pinned_max: u64,
    table: Mutex<Table<Region>>,
}

/// What is registered, each as an `R`, and what it counts for.
struct Table<R> {
    /// One for each adapter that streams came in on.
    domains: Vec<Arc<Domain>>,
    /// By adapter and range; with how often it was asked for.
    regions: HashMap<(usize, Range), (Arc<R>, u32)>,
    pinned: u64,
    /// As much as this process was allowed to pin, once it was refused more.
    allowed: Option<u64>,
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self { domains: Vec::new(), regions: HashMap::new(), pinned: 0, allowed: None }
    }
}

impl Registrar {
    /// Registers at most `pinned_max` bytes at a time.
    fn new(pinned_max: u64) -> Self {
        Self { pinned_max, table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, Table<Region>> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Registers a range for the source to write to; `None` if it cannot be.
    fn register(
        &self,
        landing: &dyn Landing,
        adapter: usize,
        range: Range,
    ) -> io::Result<Option<(u64, u32)>> {
        let (region, offset, bytes) = place_of(landing, range).map_err(io::Error::other)?;
        let domain = {
            let mut table = self.table();
            if let Some((known, users)) = table.regions.get_mut(&(adapter, range)) {
                *users += 1;
                return Ok(Some(known.remote()));
            }
            // A source that asks for overlapping ranges pins no more than twice its guest.
            let most = self.pinned_max.min(2 * landing.ram().layout().bytes());
            let most = table.allowed.map_or(most, |allowed| most.min(allowed));
            if table.pinned + bytes > most {
                return Ok(None);
            }
            table.pinned += bytes;
            table.domains[adapter].clone()
        };
        landing.ram().expect_filled(range.first, range.count);
        for chunk in range.first..range.first + range.count {
            // What cannot be had is not touched either.
            if let Err(error) = landing.bring_in(chunk) {
                self.table().pinned -= bytes;
                return Err(error);
            }
            // From here on anything may come to lie there, announced or not: none of it counts as fresh any more.
            landing.touch(chunk);
        }
        let made = Region::guest(&domain, landing.ram(), region, offset, bytes, Access::RemoteWrite);
        self.table().settle((adapter, range), bytes, made, Region::remote)
    }

    /// Lets a range go, if whoever asked for it last does.
    fn release(&self, landing: &dyn Landing, adapter: usize, range: Range) -> Result<(), WireError> {
        let (_, _, bytes) = place_of(landing, range)?;
        let is_known = self.table().release((adapter, range), bytes);
        is_known.then_some(()).ok_or(WireError::BadValue { field: "first chunk", value: range.first.into() })
    }
}

impl<R> Table<R> {
    /// Takes note of what came of registering a range of `bytes`, which count as pinned already. `None`: it cannot be registered, and
    /// its pages come in messages.
    fn settle<T>(
        &mut self,
        key: (usize, Range),
        bytes: u64,
        made: io::Result<Arc<R>>,
        remote: impl Fn(&R) -> T,
    ) -> io::Result<Option<T>> {
        match made.map_err(|e| NotRegistered::of(&e, bytes)) {
            Ok(made) => {
                if self.regions.contains_key(&key) {
                    // Another stream asked at the same time, and was first: the memory is pinned once.
                    self.pinned -= bytes;
                }
                let (region, users) = self.regions.entry(key).or_insert((made, 0));
                *users += 1;
                Ok(Some(remote(region)))
            }
            Err(refused) => {
                self.pinned -= bytes;
                match refused {
                    // The limit of this process shows in mid transfer: what is pinned is as much as there may be.
                    NotRegistered::Fatal(_) if self.pinned != 0 => {
                        self.allowed = Some(self.pinned);
                        Ok(None)
                    }
                    NotRegistered::Fatal(error) => Err(error),
                    NotRegistered::Unfit => Ok(None),
                }
            }
        }
    }

    /// One who asked for a range of `bytes` lets it go; says whether anybody had.
    fn release(&mut self, key: (usize, Range), bytes: u64) -> bool {
        let Some((_, users)) = self.regions.get_mut(&key) else { return false };
        *users -= 1;
        if *users == 0 {
            self.regions.remove(&key);
            self.pinned -= bytes;
        }
        true
    }
}

/// The region that a range lies in, its offset there, and its bytes.
fn place_of(landing: &dyn Landing, range: Range) -> Result<(usize, u64, u64), WireError> {
    let layout = landing.ram().layout();
    let bad = |field, value: u32| WireError::BadValue { field, value: value.into() };
    let first = layout.locate(range.first).ok_or(bad("first chunk", range.first))?;
    let last = range.first.checked_add(range.count - 1).and_then(|chunk| layout.locate(chunk));
    let last = last.filter(|last| last.region == first.region).ok_or(bad("number of chunks", range.count))?;
    let bytes = u64::from(range.count - 1) * CHUNK_SIZE as u64 + (last.pages * PAGE_SIZE) as u64;
    Ok((first.region, first.offset, bytes))
}

/// Accepts a stream. What fails here the source is told, whose other streams go on; but what this host lacks is an error of the
/// session, for a source that tried again would be refused again.
pub(crate) fn accept(
    request: ConnectRequest,
    context: &DestinationContext,
) -> io::Result<Option<DestinationEnd>> {
    let stream = request.preamble().stream;
    let id = match request.into_id() {
        Ok(id) => id,
        Err(error) if is_local(&error) => return Err(error),
        Err(_) => return Ok(None),
    };
    match attach(&id, stream, context) {
        Ok(end) => Ok(Some(end)),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|e| format!(": {e}")).unwrap_or_default();
            // Whoever asks hears of the end in any case.
            let _ = id.reject(&Refusal::new(ErrorCode::Local, &format!("{error}{cause}")).encode());
            match error {
                RdmaError::System { source, .. } if is_local(&source) => Err(source),
                _ => Ok(None),
            }
        }
    }
}

fn attach(id: &Arc<Id>, stream: u16, context: &DestinationContext) -> Result<DestinationEnd, RdmaError> {
    let registrar = &context.registrar;
    let device = failed("use the RDMA device");
    let (adapter, domain) = {
        let mut table = registrar.table();
        let (known, domain) = domain_of(table.domains.iter().enumerate(), id).map_err(device)?;
        let adapter = known.unwrap_or_else(|| {
            table.domains.push(domain.clone());
            table.domains.len() - 1
        });
        (adapter, domain)
    };
    let depth = Depth { sends: ANSWERS, receives: RECEIVES };
    let pair = QueuePair::new(id.clone(), &domain, depth).map_err(failed("make a queue pair"))?;
    let bytes = ANSWERS as usize * ANSWER_BYTES + RECEIVES as usize * MESSAGE_BYTES;
    let free = Slot::make(&domain, ANSWERS as usize, ANSWER_BYTES, Access::Read)
        .and_then(|free| {
            let receives = Slot::make(&domain, RECEIVES as usize, MESSAGE_BYTES, Access::Receive)?;
            receives.into_iter().try_for_each(|slot| pair.post_receive(slot))?;
            Ok(free)
        })
        .map_err(|e| failed("register buffers")(buffers_failed(e, bytes)))?;
    let answer =
        Accept { stream, buffers: RECEIVES, adapter: adapter as u32, pinned_max: registrar.pinned_max };
    pair.id().accept(&answer.encode()).map_err(failed("accept a connection over RDMA"))?;
    let cut = Cut::new(pair.id());
    let receiver = Receiver {
        pair,
        cut: cut.clone(),
        context: context.clone(),
        adapter,
        came: VecDeque::new(),
        rest: None,
        taken: 0,
        free,
        over: false,
    };
    Ok(DestinationEnd::new(Box::new(receiver), cut))
}

struct Receiver {
    pair: QueuePair,
    cut: Arc<Cut>,
    context: DestinationContext,
    adapter: usize,
    came: VecDeque<(Slot, usize)>,
    /// A message whose bytes are read in part: from here to there.
    rest: Option<(Slot, usize, usize)>,
    /// Messages taken, whose buffers are posted again.
    taken: u64,
    free: Vec<Slot>,
    over: bool,
}

impl Receiver {
    /// Waits a moment for something to happen.
    fn wait(&mut self) -> io::Result<()> {
        let queue = self.pair.receive_queue();
        for _ in 0..POLLS {
            if self.pair.poll_receives(&mut self.came)? {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        queue.arm()?;
        if self.pair.poll_receives(&mut self.came)? {
            return Ok(());
        }
        let [_, event] = wait_readable([queue.fd(), self.pair.id().channel().fd()], TICK)?;
        queue.clear_events();
        if event && is_over(self.pair.id())? {
            // What came before the end is still there.
            self.pair.poll_receives(&mut self.came)?;
            self.over = true;
        }
        Ok(())
    }

    fn give_back(&mut self, slot: Slot) -> io::Result<()> {
        self.pair.post_receive(slot)?;
        self.taken += 1;
        Ok(())
    }

    /// Takes a message; bytes of the stream are left in `rest`.
    fn take(&mut self, slot: Slot, len: usize) -> io::Result<()> {
        let DestinationContext { landing, registrar, .. } = self.context.clone();
        let hasher = landing.hasher();
        let (header, payload) =
            MessageHeader::decode(&slot.bytes()[..len], hasher).map_err(io::Error::other)?;
        match header.kind {
            Kind::Data => {
                self.rest = Some((slot, MessageHeader::LEN, len));
                Ok(())
            }
            Kind::Register => {
                let range = Range::decode(payload, hasher).map_err(io::Error::other)?;
                self.give_back(slot)?;
                let place = registrar.register(&*landing, self.adapter, range)?;
                self.answer(Kind::Register, &Registered { range, place }.encode(hasher))
            }
            Kind::Release => {
                let range = Range::decode(payload, hasher).map_err(io::Error::other)?;
                registrar.release(&*landing, self.adapter, range).map_err(io::Error::other)?;
                self.give_back(slot)
            }
            Kind::End => Err(io::Error::other("the source sent a message of the destination's")),
        }
    }

    fn answer(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.wait_sends(|this| !this.free.is_empty())?;
        let mut slot = self.free.pop().expect("waited for");
        let end = MessageHeader::LEN + payload.len();
        let header = MessageHeader { kind, len: payload.len() as u32, taken: self.taken };
        slot.bytes_mut()[..MessageHeader::LEN].copy_from_slice(&header.encode(self.context.landing.hasher()));
        slot.bytes_mut()[MessageHeader::LEN..end].copy_from_slice(payload);
        self.pair.post(&[], Some((slot, end)))
    }

    /// Takes completions of answers until `ready` says yes.
    fn wait_sends(&mut self, ready: impl Fn(&Self) -> bool) -> io::Result<()> {
        let deadline = Instant::now() + self.context.timeout;
        loop {
            self.pair.poll_sends(&mut self.free)?;
            if ready(self) {
                return Ok(());
            }
            if self.cut.is_done() {
                return Err(aborted());
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let queue = self.pair.send_queue();
            queue.arm()?;
            if !self.pair.poll_sends(&mut self.free)? {
                wait_readable([queue.fd()], TICK)?;
                queue.clear_events();
            }
        }
    }
}

impl FrameReceiver for Receiver {
    fn receive(&mut self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize> {
        let mut waited = !wait;
        loop {
            if let Some((slot, at, end)) = self.rest.take() {
                let filled = list.fill(&slot.bytes()[at..end]);
                if at + filled < end {
                    self.rest = Some((slot, at + filled, end));
                } else {
                    self.give_back(slot)?;
                }
                if filled != 0 {
                    return Ok(filled);
                }
                continue;
            }
            if self.came.is_empty() {
                self.pair.poll_receives(&mut self.came)?;
            }
            if let Some((slot, len)) = self.came.pop_front() {
                self.take(slot, len)?;
            } else if self.over {
                return Ok(0);
            } else if waited {
                return Err(io::ErrorKind::WouldBlock.into());
            } else {
                self.wait()?;
                waited = true;
            }
        }
    }

    fn send(&mut self, receipts: &[u8]) -> io::Result<()> {
        receipts
            .chunks(ANSWER_BYTES - MessageHeader::LEN)
            .try_for_each(|receipts| self.answer(Kind::Data, receipts))
    }

    fn finish(&mut self) -> io::Result<()> {
        self.answer(Kind::End, &[])?;
        // The connection ends with this value: not before the last receipt is there.
        self.wait_sends(|this| this.pair.room() == ANSWERS as usize)
    }

    fn places(&self) -> bool {
        true
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.cut.shutdown();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both saw that it was not registered, and count it before they do so.
    #[test]
    fn a_range_that_two_streams_ask_for_at_once_is_pinned_once() {
        let (key, bytes) = ((0, Range { first: 0, count: 2 }), 1 << 19);
        let mut table = Table { pinned: 2 * bytes, ..Table::default() };
        for made in ["first", "second"] {
            let known = table.settle(key, bytes, Ok(Arc::new(made)), |region| *region).unwrap();
            assert_eq!(known, Some("first"), "the source writes to one of them");
        }
        assert_eq!(table.pinned, bytes);
        // It stays as long as one of them needs it.
        for left in [bytes, 0] {
            assert!(table.release(key, bytes));
            assert_eq!(table.pinned, left);
        }
        assert!(!table.release(key, bytes), "nobody has it any more");
    }

    #[test]
    fn a_limit_that_shows_in_mid_transfer_is_kept_to_and_one_that_allows_nothing_is_named() {
        let key = (0, Range { first: 0, count: 2 });
        let refused = || Err(io::Error::from_raw_os_error(libc::ENOMEM));
        let mut table = Table { pinned: 3 << 19, ..Table::default() };
        assert_eq!(table.settle(key, 1 << 19, refused(), Region::remote).unwrap(), None);
        assert_eq!((table.pinned, table.allowed), (2 << 19, Some(2 << 19)));
        let mut table = Table { pinned: 1 << 19, ..Table::default() };
        let error = table.settle(key, 1 << 19, refused(), Region::remote).unwrap_err();
        assert!(is_local(&error) && error.to_string().contains("cannot pin 524288 bytes"), "{error}");
        assert_eq!((table.pinned, table.allowed), (0, None));
        // What the adapter does not take at all comes in messages.
        let mut table = Table { pinned: 1 << 19, ..Table::default() };
        let unfit = Err(io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(table.settle(key, 1 << 19, unfit, Region::remote).unwrap(), None);
        assert_eq!((table.pinned, table.allowed), (0, None));
    }
}
