//! The source's end of a queue pair: frames and writes out, receipts in.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pagecopy::backend::GuestRam;
use pagecopy::bitmap::{PageBitmap, runs};
use pagecopy::digest::PageHasher;
use pagecopy::layout::PAGE_SIZE;

use super::connect::{RdmaError, ask, failed, reach};
use super::registry::{Next, Registry, Target};
use super::sys::{Access, Depth, QueuePair, Slot, Write, wait_readable};
use super::{Cut, POLLS, RdmaOptions, TICK, aborted, buffers_failed, is_over};
use crate::carrier::{Breaker, FrameSender, Placement, ReceiptReader, SourceEnd};
use crate::sys::SendList;
use crate::wire::queue::{ANSWER_BYTES, Kind, MESSAGE_BYTES, MessageHeader, Range, Registered};
use crate::wire::{Preamble, WireError};

/// Buffers for what the destination sends.
const RECEIVES: u32 = 64;
/// Most registrations asked for at a time: each brings one message.
const ASKED_MAX: usize = 16;
/// Most frames without a receipt. With the registrations they bring no more messages than there are buffers, the last one
/// being END.
const FRAMES_MAX: usize = RECEIVES as usize - ASKED_MAX - 1;
/// Work requests that may be posted for sending.
const SENDS: u32 = 512;
/// Buffers for messages to the destination.
const MESSAGES: usize = 8;
/// Longest write. Soft-RoCE loses packets of longer ones when the other side is slow, and sends all of them again.
const WRITE_BYTES_MAX: u64 = 64 << 10;
/// Once this much was placed the headers are sent after it, so that the destination hashes while more is on its way.
const PLACED_BYTES_MAX: u64 = 2 << 20;
/// Bytes under way at any rate: a destination that registers a run, which takes soft-RoCE some 50 ms, sends no receipts meanwhile.
const WINDOW_BYTES_MIN: u64 = 4 << 20;
/// Runs that are asked for ahead of the writes.
const AHEAD: usize = 1;

/// What the streams of a session share.
pub(crate) struct SourceContext {
    hasher: PageHasher,
    registry: Arc<Registry>,
}

impl SourceContext {
    /// For memory in which `populated` is no hole, and whose pages `hasher` hashes.
    pub(crate) fn new(
        ram: &Arc<dyn GuestRam>,
        hasher: &PageHasher,
        options: RdmaOptions,
        populated: &PageBitmap,
    ) -> Self {
        let registry = Arc::new(Registry::new(ram.clone(), options, populated));
        Self { hasher: hasher.clone(), registry }
    }
}

/// What both threads of a stream share.
struct Stream {
    pair: QueuePair,
    cut: Arc<Cut>,
    hasher: PageHasher,
    registry: Arc<Registry>,
    /// The pair of adapters.
    adapters: usize,
    /// Messages that the destination has taken.
    taken: AtomicU64,
    /// Runs asked for on this stream and not answered.
    asked: Mutex<Vec<usize>>,
    timeout: Duration,
}

impl Stream {
    fn asked(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.asked.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn check(&self) -> io::Result<()> {
        if self.cut.is_done() { Err(aborted()) } else { Ok(()) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let asked = std::mem::take(&mut *self.asked());
        self.registry.forget(self.adapters, &asked);
    }
}

/// Opens a stream of a session: connects a queue pair and waits for the destination's word.
pub(crate) fn connect(
    context: &SourceContext,
    (host, port): (&str, u16),
    preamble: Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<SourceEnd, RdmaError> {
    let registry = context.registry.clone();
    let (id, address) = reach(host, port, timeout, cancelled)?;
    let domain = registry.domain(&id).map_err(failed("use the RDMA device"))?;
    let depth = Depth { sends: SENDS, receives: RECEIVES };
    let make = failed("make a queue pair");
    let pair = QueuePair::new(id, &domain, depth).map_err(make)?;
    let bytes = MESSAGES * MESSAGE_BYTES + RECEIVES as usize * ANSWER_BYTES;
    let free = Slot::make(&domain, MESSAGES, MESSAGE_BYTES, Access::Read)
        .and_then(|free| {
            let receives = Slot::make(&domain, RECEIVES as usize, ANSWER_BYTES, Access::Receive)?;
            receives.into_iter().try_for_each(|slot| pair.post_receive(slot))?;
            Ok(free)
        })
        .map_err(|e| failed("register buffers")(buffers_failed(e, bytes)))?;
    let accept = ask(&pair, address, preamble, timeout, cancelled)?;
    if accept.stream != preamble.stream {
        return Err(WireError::BadValue { field: "stream", value: accept.stream.into() }.into());
    }
    let adapters = registry.pair(&domain, accept.adapter, accept.pinned_max);
    let cut = Cut::new(pair.id());
    let stream = Arc::new(Stream {
        pair,
        cut: cut.clone(),
        hasher: context.hasher.clone(),
        registry,
        adapters,
        taken: AtomicU64::new(0),
        asked: Mutex::default(),
        timeout,
    });
    let sender = Sender {
        stream: stream.clone(),
        buffers: accept.buffers.into(),
        writes: Vec::with_capacity(64),
        placed: 0,
        message: None,
        free,
        sent: 0,
        pinned: false,
    };
    let reader = Reader { stream, came: VecDeque::new(), rest: None, ended: false, over: false };
    Ok(SourceEnd { frames: Box::new(sender), receipts: Box::new(reader), breaker: cut })
}

/// The sending thread's part.
struct Sender {
    stream: Arc<Stream>,
    /// Messages that the destination has room for.
    buffers: u64,
    /// Writes that are not posted yet; the headers of their frames follow in the message.
    writes: Vec<Write>,
    /// Bytes placed and not yet told of as sent.
    placed: u64,
    /// The message that is being filled, and how far.
    message: Option<(Slot, usize)>,
    free: Vec<Slot>,
    /// Messages sent in all.
    sent: u64,
    /// All memory was asked for, where that is wanted.
    pinned: bool,
}

impl Sender {
    /// Waits until `ready` says yes, while completions are taken.
    fn wait_for(&mut self, mut ready: impl FnMut(&Self) -> bool) -> io::Result<()> {
        let deadline = Instant::now() + self.stream.timeout;
        let mut polls = 0;
        loop {
            let any = self.stream.pair.poll_sends(&mut self.free)?;
            if ready(self) {
                return Ok(());
            }
            self.stream.check()?;
            if any {
                polls = 0;
                continue;
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            polls += 1;
            if polls < POLLS {
                std::hint::spin_loop();
            } else if polls == POLLS {
                // Once more after this: what completed before makes no event.
                self.stream.pair.send_queue().arm()?;
            } else {
                let queue = self.stream.pair.send_queue();
                // Room for messages comes by the other thread, without an event here.
                wait_readable([queue.fd()], Duration::from_millis(1))?;
                queue.clear_events();
                polls = 0;
            }
        }
    }

    /// Posts the writes that are queued.
    fn post_writes(&mut self) -> io::Result<()> {
        while !self.writes.is_empty() {
            self.wait_for(|this| this.stream.pair.room() > 1)?;
            // One place stays for the message that follows.
            let count = self.writes.len().min(self.stream.pair.room() - 1);
            self.stream.pair.post(&self.writes[..count], None)?;
            self.writes.drain(..count);
        }
        Ok(())
    }

    /// Sends the message that was filled, after what it tells of.
    fn send_message(&mut self) -> io::Result<()> {
        let Some((slot, end)) = self.message.take() else { return self.post_writes() };
        self.send_as(Kind::Data, slot, end)
    }

    fn send_as(&mut self, kind: Kind, mut slot: Slot, end: usize) -> io::Result<()> {
        let len = (end - MessageHeader::LEN) as u32;
        // What the source has taken the destination knows from frames: it is not told.
        let header = MessageHeader { kind, len, taken: 0 };
        slot.bytes_mut()[..MessageHeader::LEN].copy_from_slice(&header.encode(&self.stream.hasher));
        let (buffers, sent) = (self.buffers, self.sent);
        if self.writes.len() >= SENDS as usize / 2 {
            self.post_writes()?;
        }
        let needed = self.writes.len() + 1;
        self.wait_for(|this| {
            let taken = this.stream.taken.load(Ordering::Acquire);
            this.stream.pair.room() >= needed && sent.saturating_sub(taken) < buffers
        })?;
        self.stream.pair.post(&self.writes, Some((slot, end)))?;
        self.writes.clear();
        self.sent += 1;
        Ok(())
    }

    fn slot(&mut self) -> io::Result<Slot> {
        self.wait_for(|this| !this.free.is_empty())?;
        Ok(self.free.pop().expect("waited for"))
    }

    /// Sends a message about a range, behind everything before it.
    fn send_range(&mut self, kind: Kind, range: Range) -> io::Result<()> {
        self.send_message()?;
        let mut slot = self.slot()?;
        let end = MessageHeader::LEN + Range::LEN;
        slot.bytes_mut()[MessageHeader::LEN..end].copy_from_slice(&range.encode(&self.stream.hasher));
        self.send_as(kind, slot, end)
    }

    /// Does what the registry wants done for a run; both ends register it at the same time.
    fn ask(&mut self, run: usize, range: Range, release: &[Range]) -> io::Result<()> {
        self.stream.asked().push(run);
        for &range in release {
            self.send_range(Kind::Release, range)?;
        }
        self.wait_for(|this| this.stream.asked().len() <= ASKED_MAX)?;
        self.send_range(Kind::Register, range)?;
        self.stream.registry.register(self.stream.adapters, run)
    }

    /// Asks for runs that will be needed next.
    fn ask_ahead(&mut self, run: usize) -> io::Result<()> {
        let end = (run + 1 + AHEAD).min(self.stream.registry.runs());
        for next in run + 1..end {
            if let Next::Ask { run, range, release } = self.stream.registry.ahead(self.stream.adapters, next)
            {
                self.ask(run, range, &release)?;
            }
        }
        Ok(())
    }

    /// Registers everything, as far as it may be pinned, before the first page is sent.
    fn pin_all(&mut self) -> io::Result<()> {
        for run in 0..self.stream.registry.runs() {
            if let Next::Ask { run, range, release } = self.stream.registry.ahead(self.stream.adapters, run) {
                self.ask(run, range, &release)?;
            }
        }
        self.wait_for(|this| this.stream.asked().is_empty())
    }

    /// Where a chunk's pages go; `None`: in the message.
    fn target(&mut self, chunk: u32) -> io::Result<Option<Target>> {
        let Some(run) = self.stream.registry.run_of(chunk) else { return Ok(None) };
        let deadline = Instant::now() + self.stream.timeout;
        let mut asked = false;
        loop {
            match self.stream.registry.next(self.stream.adapters, run, chunk) {
                Next::Place(target) => {
                    if asked {
                        self.ask_ahead(run)?;
                    }
                    return Ok(Some(target));
                }
                Next::Message => return Ok(None),
                Next::Ask { run, range, release } => {
                    self.ask(run, range, &release)?;
                    asked = true;
                }
                Next::Wait => {
                    // Room comes by receipts, and those by what is held back.
                    self.send_message()?;
                    self.stream.pair.poll_sends(&mut self.free)?;
                    self.stream.check()?;
                    if Instant::now() > deadline {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    self.stream.registry.wait(deadline);
                    asked = true;
                }
            }
        }
    }
}

impl FrameSender for Sender {
    fn send(&mut self, mut list: SendList<'_>) -> io::Result<u64> {
        let mut bytes = std::mem::take(&mut self.placed);
        while !list.is_empty() {
            let (mut slot, at) = match self.message.take() {
                Some(message) => message,
                None => (self.slot()?, MessageHeader::LEN),
            };
            let copied = list.copy_to(&mut slot.bytes_mut()[at..]);
            bytes += copied as u64;
            self.message = Some((slot, at + copied));
            if at + copied == MESSAGE_BYTES {
                self.send_message()?;
            }
        }
        let queued: u64 = self.writes.iter().map(|write| u64::from(write.len)).sum();
        if queued >= PLACED_BYTES_MAX {
            self.send_message()?;
        }
        Ok(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_message()?;
        self.stream.pair.poll_sends(&mut self.free).map(drop)
    }

    fn frames_max(&self) -> usize {
        FRAMES_MAX
    }

    fn window_min(&self) -> u64 {
        WINDOW_BYTES_MIN
    }

    fn places(&self) -> bool {
        true
    }

    fn place(&mut self, chunk: u32, pages: u64) -> io::Result<Option<Placement>> {
        if self.stream.registry.pins_all() && !self.pinned {
            self.pinned = true;
            self.pin_all()?;
        }
        let Some(target) = self.target(chunk)? else { return Ok(None) };
        for (first, count) in runs(pages) {
            let (mut at, end) =
                (u64::from(first) * PAGE_SIZE as u64, u64::from(first + count) * PAGE_SIZE as u64);
            while at < end {
                at += append(&mut self.writes, &target, at, end - at);
            }
        }
        self.placed += u64::from(pages.count_ones()) * PAGE_SIZE as u64;
        Ok(Some(Box::new(target.hold)))
    }
}

/// Adds up to `len` bytes at `at` of a chunk to the last write if they follow it, else as a new one; returns how many were added.
fn append(writes: &mut Vec<Write>, target: &Target, at: u64, len: u64) -> u64 {
    let (offset, to) = (target.offset + at, target.to + at);
    if let Some(last) = writes.last_mut()
        && Arc::ptr_eq(&last.region, &target.region)
        && last.offset + u64::from(last.len) == offset
        && last.to + u64::from(last.len) == to
        && u64::from(last.len) < WRITE_BYTES_MAX
    {
        let more = len.min(WRITE_BYTES_MAX - u64::from(last.len));
        last.len += more as u32;
        return more;
    }
    let len = len.min(WRITE_BYTES_MAX);
    writes.push(Write { region: target.region.clone(), offset, len: len as u32, to, key: target.key });
    len
}

/// The receipt thread's part.
struct Reader {
    stream: Arc<Stream>,
    came: VecDeque<(Slot, usize)>,
    /// A message that was read in part: from here to there.
    rest: Option<(Slot, usize, usize)>,
    ended: bool,
    over: bool,
}

impl Reader {
    /// The next message, if one came.
    fn next(&mut self) -> io::Result<Option<(Slot, usize)>> {
        let pair = &self.stream.pair;
        for _ in 0..POLLS {
            if self.came.is_empty() {
                pair.poll_receives(&mut self.came)?;
            }
            if let Some(message) = self.came.pop_front() {
                return Ok(Some(message));
            }
            std::hint::spin_loop();
        }
        let queue = pair.receive_queue();
        queue.arm()?;
        if !pair.poll_receives(&mut self.came)? {
            let [_, event] = wait_readable([queue.fd(), pair.id().channel().fd()], TICK)?;
            queue.clear_events();
            if event && is_over(pair.id())? {
                self.over = true;
                // What came before the end is still there.
                if !pair.poll_receives(&mut self.came)? {
                    self.stream.cut.shutdown();
                }
            }
        }
        Ok(self.came.pop_front())
    }

    /// Takes a message; receipts are left in `rest`.
    fn take(&mut self, slot: Slot, len: usize) -> io::Result<()> {
        let hasher = &self.stream.hasher;
        let (header, payload) =
            MessageHeader::decode(&slot.bytes()[..len], hasher).map_err(io::Error::other)?;
        self.stream.taken.fetch_max(header.taken, Ordering::AcqRel);
        match header.kind {
            Kind::Data => {
                self.rest = Some((slot, MessageHeader::LEN, len));
                return Ok(());
            }
            Kind::Register => {
                let answer = Registered::decode(payload, hasher).map_err(io::Error::other)?;
                let run = self.stream.registry.run_of(answer.range.first);
                let mut asked = self.stream.asked();
                let at = asked.iter().position(|&asked| Some(asked) == run);
                let (Some(at), true) = (at, self.stream.registry.answer(self.stream.adapters, answer)) else {
                    return Err(io::Error::other("the destination answers what was not asked"));
                };
                asked.swap_remove(at);
            }
            Kind::End => self.ended = true,
            Kind::Release => return Err(io::Error::other("the destination sent a message of the source's")),
        }
        self.stream.pair.post_receive(slot)
    }
}

impl ReceiptReader for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some((slot, at, end)) = self.rest.take() {
                let len = (end - at).min(buffer.len());
                buffer[..len].copy_from_slice(&slot.bytes()[at..at + len]);
                if at + len < end {
                    self.rest = Some((slot, at + len, end));
                } else {
                    // Before the receipts are settled: the frames they make room for find this buffer posted.
                    self.stream.pair.post_receive(slot)?;
                }
                if len != 0 {
                    return Ok(len);
                }
                continue;
            }
            if self.ended {
                return Ok(0);
            }
            match self.next()? {
                Some((slot, len)) => self.take(slot, len)?,
                None if self.over => return Ok(0),
                None => return Err(io::ErrorKind::WouldBlock.into()),
            }
        }
    }
}
