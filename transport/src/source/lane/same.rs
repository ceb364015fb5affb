//! Pages that the destination's base holds: they are named, and not sent.

use pagecopy::bitmap::bits;
use pagecopy::digest::receipt;
use pagecopy::layout::{CHUNK_PAGES, PAGE_SIZE};

use super::{GATHER_BYTES, LaneSender, take_snapshot};
use crate::clock;
use crate::source::flight::{LaneError, Unreceipted};
use crate::spent::Lap;
use crate::wire::frame::FrameHeader;

impl LaneSender<'_> {
    /// Sends the pages of a claimed chunk. Those that are as in the destination's base have a frame of their own, before the others'. On
    /// failure they are among the unreceipted frames, or pending.
    pub(super) fn send_pages(&mut self, chunk: u32, pages: u64) -> Result<(), LaneError> {
        let source = self.source;
        let same = self.same_as_base(chunk, pages);
        let others = pages & !same;
        // Each frame has a claim; the chunk is this stream's already.
        if same == 0 || (others != 0 && !source.owners.claim(chunk, self.stream.id())) {
            return self.send_chunk(chunk, pages);
        }
        let sent = self.send_same(chunk, same);
        if others == 0 {
            return sent;
        }
        if sent.is_ok() {
            return self.send_chunk(chunk, others);
        }
        source.pending.insert(chunk, others);
        source.owners.release(chunk);
        sent
    }

    /// Of these pages, those that are as in the destination's base; they are in the snapshot then.
    fn same_as_base(&mut self, chunk: u32, pages: u64) -> u64 {
        let source = self.source;
        let Some(base) = &source.base else { return 0 };
        let tried = base.take(chunk, pages);
        if tried == 0 {
            return 0;
        }
        let begun = clock::nanos();
        let mut lap = Lap::start();
        // Both hashes must be of the same content, whatever the guest writes meanwhile.
        take_snapshot(&source.ram.chunk(chunk), tried, &mut self.snapshot);
        lap.to(&source.counters.spent.copy);
        let copies = self.snapshot.as_chunks::<PAGE_SIZE>().0;
        let holds = |&bit: &u32| base.holds(chunk, bit, &copies[bit as usize]);
        let same = bits(tried).filter(holds).fold(0, |same, bit| same | 1 << bit);
        lap.to(&source.counters.spent.encode);
        // What chooses the codec is not to take it for time that encoding or sending took.
        self.idle_nanos += clock::nanos() - begun;
        same
    }

    /// Names pages that are as in the base, and lie in the snapshot. A receipt that differs has an excuse: the base may be another by now.
    fn send_same(&mut self, chunk: u32, same: u64) -> Result<(), LaneError> {
        let source = self.source;
        let begun = clock::nanos();
        let copies = self.snapshot.as_chunks::<PAGE_SIZE>().0;
        let mut digests = [0; CHUNK_PAGES];
        // Only digests: no delta has a page for its base that did not travel.
        source.shared.void(chunk, same);
        for (slot, bit) in digests.iter_mut().zip(bits(same)) {
            let digest = source.shared.hasher.page(&copies[bit as usize]);
            source.shared.table.set(chunk, bit, digest);
            *slot = receipt(digest);
        }
        let header = FrameHeader::same(self.seq, chunk, same);
        self.seq += 1;
        self.out.extend_from_slice(&header.encode(&source.shared.hasher));
        let frame = Unreceipted {
            chunk,
            pages: same,
            seq: header.seq,
            wire_bytes: header.wire_bytes(),
            sent_at: source.now(),
            digests,
            doubtful: same,
            same,
            references: Box::default(),
            _placement: None,
        };
        self.last_doubt.note(frame.seq, frame.doubtful);
        source.carried.insert(chunk, same);
        source.bandwidth.spend(frame.wire_bytes);
        self.launch(frame)?;
        if self.out.len() >= GATHER_BYTES {
            self.write(0, None)?;
        }
        self.idle_nanos += clock::nanos() - begun;
        Ok(())
    }
}
