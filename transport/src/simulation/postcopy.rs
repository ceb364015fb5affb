//! Postcopy from one seed: a guest that runs at the destination and touches pages that are not there, over connections that break.
//!
//! The bitmap that decides who sends a page, the order, requests, what makes frames and opens them, receipts and the sink that places
//! pages are the real ones; the threads that carry them are not. What must hold: the guest never reads anything but what it left at
//! the source or has written itself, no page is placed twice, none stays away, and it ends.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pagecopy::backend::{BackendError, Fault, GuestRam, MissingPages};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::choose::CodecMode;
use pagecopy::chunk::{ChunkEncoder, Clocks};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{Layout, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileSlice;

use super::network::{Connection, Side};
use super::rng::Rng;
use super::weather;
use crate::guest_memory::Memory;
use crate::postcopy::sealed::{Opener, Sealer, check_sealed};
use crate::postcopy::{MissingRuns, MissingSink, PageServer, ServerOptions};
use crate::wire::control::capability;
use crate::wire::frame::{
    FrameHeader, RECEIPT_HEADER_LEN, RECEIPT_MAGIC, check_receipt, decode_receipt_header,
};
use crate::wire::postcopy::{PageRequest, REQUEST_MAGIC, SEAL_LEN};

/// Steps after which a run that is not over never will be.
const STEPS_MAX: u32 = 20_000;
/// Steps in which connections break; after that the weather is fair.
const STORM_STEPS: u32 = 400;
/// Cores that the guest runs on.
const CORES: usize = 3;
/// The connection of requests.
const FAULTS: usize = 0;

/// Memory of a guest, some of whose pages are still to come.
pub(crate) struct Partial {
    pub(crate) memory: Memory,
    presence: Mutex<Presence>,
}

struct Presence {
    /// For each chunk, pages that are not there.
    missing: Vec<u64>,
    /// How often each page was placed.
    placed: BTreeMap<(u32, u32), u32>,
}

impl Partial {
    pub(crate) fn new(layout: Layout) -> Arc<Self> {
        let presence = Presence { missing: vec![0; layout.chunks() as usize], placed: BTreeMap::new() };
        Arc::new(Self { memory: Memory::new(layout), presence: Mutex::new(presence) })
    }

    fn presence(&self) -> MutexGuard<'_, Presence> {
        self.presence.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn is_missing(&self, (chunk, page): (u32, u32)) -> bool {
        self.presence().missing[chunk as usize] >> page & 1 != 0
    }
}

impl GuestRam for Partial {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }
    fn region(&self, region: usize) -> VolatileSlice<'_> {
        self.memory.region(region)
    }
    fn populated(&self, _first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        pages.fill(u64::MAX);
        Ok(())
    }
    fn missing_unit(&self) -> Result<u32, BackendError> {
        Ok(0)
    }
    fn miss(self: Arc<Self>, missing: &PageBitmap) -> Result<Box<dyn MissingPages>, BackendError> {
        let mut presence = self.presence();
        for (chunk, pages) in missing.iter() {
            presence.missing[chunk as usize] |= pages;
            bits(pages).for_each(|bit| self.memory.write(chunk, bit, &[0xee; PAGE_SIZE]));
        }
        drop(presence);
        Ok(Box::new(Missing(self)))
    }
    fn discard(&self, _chunk: u32, _pages: u64) -> Result<(), BackendError> {
        Ok(())
    }
}

struct Missing(Arc<Partial>);

impl MissingPages for Missing {
    fn wait(&self, _faults: &mut Vec<Fault>, _timeout: Duration) -> Result<(), BackendError> {
        unreachable!("the simulated guest asks by itself")
    }
    fn place(&self, chunk: u32, first: u32, bytes: &[u8]) -> Result<(), BackendError> {
        let mut presence = self.0.presence();
        for (bit, page) in (first..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
            *presence.placed.entry((chunk, bit)).or_default() += 1;
            // As the kernel does: what is there stays.
            if presence.missing[chunk as usize] >> bit & 1 != 0 {
                presence.missing[chunk as usize] &= !(1 << bit);
                self.0.memory.write(chunk, bit, page);
            }
        }
        Ok(())
    }
    fn place_zeros(&self, chunk: u32, first: u32, count: u32) -> Result<(), BackendError> {
        (first..first + count).try_for_each(|bit| self.place(chunk, bit, &[0; PAGE_SIZE]))
    }
    fn settle(&self, _fault: Fault) -> Result<(), BackendError> {
        Ok(())
    }
    fn end(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A frame without a receipt.
struct Sent {
    seq: u64,
    chunk: u32,
    pages: u64,
    seal: u64,
}

/// A connection, with what both ends know of it.
struct Wire {
    connection: Connection,
    flight: VecDeque<Sent>,
    sent: u64,
    received: u64,
    at_source: Vec<u8>,
    at_destination: Vec<u8>,
    /// Frames that were damaged on their way.
    damaged: Vec<u64>,
    /// Where connections are opened again: not before this step.
    closed_until: u32,
}

impl Wire {
    fn open() -> Self {
        Self {
            connection: Connection::default(),
            flight: VecDeque::new(),
            sent: 0,
            received: 0,
            at_source: Vec::new(),
            at_destination: Vec::new(),
            damaged: Vec::new(),
            closed_until: 0,
        }
    }
}

struct Run {
    rng: Rng,
    hasher: PageHasher,
    source: Arc<Partial>,
    destination: Arc<Partial>,
    server: PageServer,
    sealer: Sealer,
    /// What was asked for goes as it is.
    answering: Sealer,
    opener: Opener,
    sink: MissingSink,
    /// Those that are open, and after them those that are not and on which something may still arrive.
    wires: Vec<Wire>,
    open: usize,
    /// What each core waits for.
    cores: [Option<(u32, u32)>; CORES],
    /// What memory must hold for the guest.
    expected: Memory,
    pages: Vec<(u32, u32)>,
    came: Came,
    violation: Option<String>,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Came {
    /// How often a connection was cut.
    pub(super) cuts: u64,
    /// How often the guest waited.
    pub(super) waits: u64,
    /// Frames that were damaged.
    pub(super) damaged: u64,
    /// Of these, such with compressed pages.
    pub(super) damaged_encoded: u64,
    /// Pages that came compressed.
    pub(super) compressed: u64,
}

pub(super) fn run(seed: u64) -> Result<Came, String> {
    let mut run = Run::new(seed);
    for step in 0..STEPS_MAX {
        run.step(step);
        if let Some(violation) = run.violation {
            return Err(violation);
        }
        if run.server.left() == 0 && run.sink.left() == 0 {
            return run.end();
        }
    }
    let (at_source, at_destination) = (run.server.left(), run.sink.left());
    Err(format!("it does not end: {at_source} pages without receipt, {at_destination} missing"))
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x706f_7374);
        let layout = weather::layout(&mut rng);
        let chunks = layout.chunks();
        let (source, destination) = (Partial::new(layout.clone()), Partial::new(layout.clone()));
        let expected = Memory::new(layout.clone());
        let missing = [PageBitmap::new(chunks), PageBitmap::new(chunks)];
        let all = (0..chunks).flat_map(|c| bits(layout.valid(c)).map(move |b| (c, b)));
        let pages: Vec<(u32, u32)> = all.collect();
        let chance = rng.pick(&[20, 80, 100]);
        for &(chunk, bit) in &pages {
            let mut page = [0; PAGE_SIZE];
            match rng.below(10) {
                0..=2 => {}
                3..=7 => {
                    page.fill(rng.next() as u8);
                    page[..8].copy_from_slice(&rng.next().to_le_bytes());
                }
                _ => page.as_chunks_mut().0.iter_mut().for_each(|word| *word = rng.next().to_le_bytes()),
            }
            for memory in [&source.memory, &destination.memory, &expected] {
                memory.write(chunk, bit, &page);
            }
            if rng.percent(chance) {
                for set in &missing {
                    set.insert(chunk, 1 << bit);
                }
            }
        }
        let hasher = PageHasher::new(rng.next());
        let timeout = Duration::from_secs(1);
        let [at_source, at_destination] = missing;
        let mut announced = MissingRuns::new(&layout);
        let holes = PageBitmap::new(chunks);
        let codec = rng.pick(&[
            CodecMode::Raw,
            CodecMode::Zstd { level: Some(1) },
            CodecMode::Zstd { level: Some(-5) },
        ]);
        let options = ServerOptions { timeout, codec, pushing: 3, near: false };
        let server = PageServer::new(source.clone(), hasher.clone(), at_source, holes, 0, options);
        let sealer = |codec| Sealer::new(ChunkEncoder::new(codec, Clocks { now: || 0, worked: || 0 }));
        for runs in server.runs().chunks(2) {
            announced.add(runs, &layout).expect("runs of a real layout");
        }
        let announced = announced.into_pages();
        assert_eq!(announced.count(), at_destination.count());
        let open = rng.range(2, 4) as usize;
        let sink = MissingSink::new(destination.clone(), hasher.clone(), announced, capability::ALL, timeout);
        Self {
            wires: (0..open).map(|_| Wire::open()).collect(),
            open,
            sink: sink.expect("simulated memory can miss pages"),
            rng,
            hasher,
            source,
            destination,
            server,
            sealer: sealer(codec),
            answering: sealer(CodecMode::Raw),
            opener: Opener::new(),
            cores: [None; CORES],
            expected,
            pages,
            came: Came::default(),
            violation: None,
        }
    }

    /// One thing happens.
    fn step(&mut self, step: u32) {
        let any = self.rng.below(self.wires.len() as u64) as usize;
        let wire = self.rng.below(self.open as u64) as usize;
        match self.rng.below(100) {
            0..=1 if step < STORM_STEPS => self.cut(wire, step),
            0..=24 => self.core(),
            25..=44 => self.source_turn(wire, step),
            45..=64 => self.destination_turn(any),
            // What is under way arrives in order on each connection, and in any order between them.
            n => {
                let side = if n % 2 == 0 { Side::Source } else { Side::Destination };
                self.wires[any].connection.depart(side);
                self.wires[any].connection.arrive(side);
            }
        }
    }

    /// The connection breaks. The source sees it at once or later, and opens another.
    fn cut(&mut self, wire: usize, step: u32) {
        self.came.cuts += 1;
        let rng = &mut self.rng;
        let entry = &mut self.wires[wire];
        entry.connection.cut(|_, under_way| (rng.below(under_way as u64 + 1) as usize, 100));
        // Its own end is closed; what is under way may still arrive, long after.
        entry.connection.notice(Side::Source);
        entry.closed_until = step + rng.range(0, 60) as u32;
    }

    /// A core of the guest does something, unless it waits.
    fn core(&mut self) {
        let core = self.rng.below(CORES as u64) as usize;
        let page = match self.cores[core] {
            Some(page) if self.destination.is_missing(page) => return,
            Some(page) => page,
            None => self.rng.pick(&self.pages),
        };
        if self.destination.is_missing(page) {
            // As the sink does: whoever is first asks.
            if !self.cores.contains(&Some(page)) {
                self.ask(page);
            }
            self.came.waits += 1;
            self.cores[core] = Some(page);
            return;
        }
        self.cores[core] = None;
        let (chunk, bit) = page;
        let mut found = self.destination.memory.read(chunk, bit);
        if found != self.expected.read(chunk, bit) {
            self.violation =
                Some(format!("the guest reads what it never wrote: page {bit} of chunk {chunk}"));
        }
        let at = self.rng.below(PAGE_SIZE as u64) as usize;
        found[at] = found[at].wrapping_add(1);
        self.destination.memory.write(chunk, bit, &found);
        self.expected.write(chunk, bit, &found);
    }

    fn ask(&mut self, (chunk, page): (u32, u32)) {
        let request = PageRequest { chunk, pages: 1 << page }.encode(&self.hasher);
        // On a connection that is broken it is lost; the next one begins with it.
        let _ = self.wires[FAULTS].connection.write(Side::Destination, request.to_vec());
    }

    /// The source reads receipts and requests, and sends what nobody asked for.
    fn source_turn(&mut self, wire: usize, step: u32) {
        let entry = &mut self.wires[wire];
        let connection = entry.connection.clone();
        if !connection.read_all(Side::Source, &mut entry.at_source) {
            for sent in entry.flight.drain(..) {
                self.server.step_back(sent.chunk, sent.pages);
            }
            if step >= entry.closed_until {
                let old = std::mem::replace(entry, Wire::open());
                self.wires.push(old);
                if wire == FAULTS {
                    // What was asked for on the one that is gone.
                    let waiting: Vec<_> = self.cores.iter().flatten().copied().collect();
                    waiting.into_iter().for_each(|page| self.ask(page));
                }
            }
            return;
        }
        while self.take_one(wire) {}
        if wire != FAULTS
            && self.wires[wire].flight.len() < 3
            && let Some((chunk, pages)) = self.server.step_next(self.rng.range(1, 8) as u32)
        {
            self.send(wire, chunk, pages);
        }
    }

    /// Acts on a whole receipt or request; whether there was one.
    fn take_one(&mut self, wire: usize) -> bool {
        let entry = &mut self.wires[wire];
        let Some(&magic) = entry.at_source.first_chunk() else { return false };
        match u32::from_le_bytes(magic) {
            REQUEST_MAGIC => {
                let Some(bytes) = entry.at_source.first_chunk() else { return false };
                let layout = self.source.layout();
                let request = PageRequest::decode(bytes, &self.hasher, layout).expect("nothing is damaged");
                entry.at_source.drain(..PageRequest::LEN);
                for (chunk, pages) in self.server.step_requested(request) {
                    self.send(wire, chunk, pages);
                }
            }
            RECEIPT_MAGIC => {
                let Some(header) = entry.at_source.first_chunk::<RECEIPT_HEADER_LEN>() else { return false };
                let (count, seq) = decode_receipt_header(header).expect("nothing is damaged");
                let len = RECEIPT_HEADER_LEN + count * 8 + 8;
                if entry.at_source.len() < len {
                    return false;
                }
                let bytes: Vec<u8> = entry.at_source.drain(..len).collect();
                check_receipt(&bytes, &self.hasher).expect("nothing is damaged");
                let sent = entry.flight.pop_front().expect("a receipt is of a frame");
                let seal = u64::from_le_bytes(*bytes.last_chunk().expect("as long as this"));
                if sent.seq != seq || (sent.seal == seal) == entry.damaged.contains(&seq) {
                    self.violation = Some(format!("receipt {seq} is not that of frame {}", sent.seq));
                }
                if sent.seal == seal {
                    self.server.step_receipted(sent.pages.count_ones());
                } else {
                    self.server.step_back(sent.chunk, sent.pages);
                }
            }
            found => self.violation = Some(format!("{found:#x} is neither a receipt nor a request")),
        }
        true
    }

    fn send(&mut self, wire: usize, chunk: u32, pages: u64) {
        let entry = &mut self.wires[wire];
        let sealer = if wire == FAULTS { &mut self.answering } else { &mut self.sealer };
        let sealed = sealer.seal(&self.server, entry.sent, chunk, pages);
        let mut frame = Vec::new();
        sealed.head(&mut frame, &self.hasher);
        for bit in bits(sealed.header.raw) {
            frame.extend_from_slice(&self.source.memory.read(chunk, bit));
        }
        if frame.len() as u64 != sealed.wire_bytes() {
            self.violation = Some(format!("{} bytes count as {}", frame.len(), sealed.wire_bytes()));
        }
        entry.flight.push_back(Sent { seq: entry.sent, chunk, pages, seal: sealed.seal });
        entry.sent += 1;
        // A connection that has broken meanwhile is noticed when it is read.
        let _ = entry.connection.write(Side::Source, frame);
    }

    /// The destination takes frames, some of which are not what was sent.
    fn destination_turn(&mut self, wire: usize) {
        let entry = &mut self.wires[wire];
        entry.connection.read_all(Side::Destination, &mut entry.at_destination);
        let head = FrameHeader::LEN + SEAL_LEN;
        let Some(bytes) = entry.at_destination.first_chunk() else { return };
        let header = FrameHeader::decode(bytes, &self.hasher).expect("no header is damaged");
        header.check_layout(self.destination.layout()).expect("a frame of the layout");
        check_sealed(&header, true).expect("a frame of postcopy");
        let encoded_end = head + header.encoded_len as usize;
        let len = encoded_end + header.raw_len();
        if entry.at_destination.len() < len {
            return;
        }
        let mut frame: Vec<u8> = entry.at_destination.drain(..len).collect();
        if len > head && self.rng.percent(10) {
            let at = self.rng.range(head as u64, len as u64 - 1) as usize;
            frame[at] ^= 1 << self.rng.below(8);
            entry.damaged.push(header.seq);
            self.came.damaged += 1;
            self.came.damaged_encoded += u64::from(at < encoded_end);
        }
        let seal = u64::from_le_bytes(*frame[FrameHeader::LEN..].first_chunk().expect("as long as this"));
        let (encoded, raw) = frame[head..].split_at(encoded_end - head);
        let opened = self.opener.open(&header, seal, encoded, raw, &self.hasher);
        let opened = opened.expect("what fits its checksum decodes");
        if opened.fits == entry.damaged.contains(&header.seq) || header.seq != entry.received {
            self.violation = Some(format!("frame {} was taken for another", header.seq));
        }
        entry.received += 1;
        let _ = entry.connection.write(Side::Destination, opened.receipt.to_vec());
        if opened.fits {
            self.came.compressed += u64::from(header.zstd.count_ones());
            self.sink.step_place(&header, raw, opened.compressed);
        }
    }

    /// Nothing is missing: memory is what the guest left at the source, and what it has written since.
    fn end(self) -> Result<Came, String> {
        for &(chunk, bit) in &self.pages {
            if self.destination.memory.read(chunk, bit) != self.expected.read(chunk, bit) {
                return Err(format!("page {bit} of chunk {chunk} is stale"));
            }
        }
        if let Some((page, times)) = self.destination.presence().placed.iter().find(|&(_, &times)| times > 1)
        {
            return Err(format!("page {page:?} was placed {times} times"));
        }
        Ok(self.came)
    }
}
