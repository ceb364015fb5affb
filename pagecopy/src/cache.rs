//! The page cache: content last sent, kept as the base of deltas, within a bound.
//!
//! One rule makes it usable: an entry, if there is one, is *exactly* what was last sent for its page. So whoever sends
//! a page either stores it here or removes its entry, and what may not have arrived is voided.
//!
//! A page helps from its second send on: pages of the first pass fill what is free. They never push anything out;
//! pages that are sent again take the place of pages that never were, and then of entries that were not used for a
//! long time. That last condition matters: a guest that writes through more memory than the cache holds would
//! otherwise push out every entry just before it is needed.
//!
//! Pages that were last sent as zeros need no entry: their base is a page of zeros.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use crate::bitmap::bits;
use crate::layout::{CHUNK_PAGES, PAGE_SIZE};
use crate::xbzrle::Page;

/// Pages allocated at a time.
const SLAB_PAGES: usize = 64;
/// Most shards; a power of two.
const SHARDS_MAX: usize = 64;
/// Pages that a shard should have at least.
const SHARD_PAGES_MIN: usize = 4 * SLAB_PAGES;
/// What a page takes at most: its content, and its share of the index when it is the only one of its chunk.
const PAGE_COST: u64 =
    (PAGE_SIZE + size_of::<Slot>() + 2 * (size_of::<ChunkSlots>() + size_of::<u64>())) as u64;
/// An entry that was sent again is replaced when this many times the shard's pages were offered since.
const STALE_AFTER: u64 = 4;
/// No slot.
const NONE: u32 = u32::MAX;

/// A bounded cache of the content last sent for pages; see the module's documentation.
#[derive(Debug)]
pub struct PageCache {
    shards: Box<[Mutex<Shard>]>,
}

impl PageCache {
    /// A cache that takes at most `bytes` of memory, its index included; 0 makes one that never holds anything.
    pub fn new(bytes: u64) -> Self {
        let pages = usize::try_from(bytes / PAGE_COST).unwrap_or(usize::MAX);
        let shards = (pages / SHARD_PAGES_MIN).clamp(1, SHARDS_MAX);
        let shards = 1 << shards.ilog2();
        // Slot numbers are u32, and NONE is none of them.
        let capacity = (pages / shards).min(NONE as usize);
        Self { shards: (0..shards).map(|_| Mutex::new(Shard::new(capacity))).collect() }
    }

    /// Locks the entries of one chunk (and of those that share its shard) for a whole chunk's work. A thread holds at
    /// most one of these at a time; a second one may wait for the first for ever.
    pub fn chunk(&self, chunk: u32) -> CachedChunk<'_> {
        let shard = &self.shards[chunk as usize & (self.shards.len() - 1)];
        let shard = shard.lock().expect("nothing panics while it holds a shard");
        CachedChunk { shard, chunk }
    }

    /// Drops the entries of pages whose last content may not have arrived.
    pub fn void(&self, chunk: u32, pages: u64) {
        self.chunk(chunk).remove(pages);
    }

    /// Bytes of page content that are allocated now.
    pub fn allocated_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| lock(shard).slabs.iter().map(|s| s.len() as u64).sum::<u64>()).sum()
    }

    /// Pages that are held now.
    pub fn pages(&self) -> u64 {
        self.shards
            .iter()
            .map(|shard| lock(shard).chunks.values().map(|c| u64::from(c.pages.count_ones())).sum::<u64>())
            .sum()
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().expect("nothing panics while it holds a shard")
}

/// The entries of one chunk, locked.
#[derive(Debug)]
pub struct CachedChunk<'a> {
    shard: MutexGuard<'a, Shard>,
    chunk: u32,
}

impl CachedChunk<'_> {
    /// The pages of the chunk that have an entry.
    pub fn pages(&self) -> u64 {
        self.shard.chunks.get(&self.chunk).map_or(0, |slots| slots.pages)
    }

    /// What was last sent for a page.
    pub fn base(&self, bit: u32) -> Option<&Page> {
        let slot = self.shard.chunks.get(&self.chunk)?.get(bit)?;
        Some(self.shard.content(slot))
    }

    /// Notes that `page` is sent: it becomes the page's entry where there is room, and where there is none, the page
    /// has no entry afterwards. Returns whether it has one.
    pub fn store(&mut self, bit: u32, page: &Page, first_pass: bool) -> bool {
        self.shard.store(self.chunk, bit, page, first_pass)
    }

    /// Removes entries: of pages that are sent without being stored, or that are voided.
    pub fn remove(&mut self, pages: u64) {
        let gone = pages & self.pages();
        for bit in bits(gone) {
            self.shard.remove(self.chunk, bit);
        }
    }
}

/// The slots of one chunk's pages.
#[derive(Debug)]
struct ChunkSlots {
    pages: u64,
    slots: [u32; CHUNK_PAGES],
}

impl ChunkSlots {
    fn get(&self, bit: u32) -> Option<u32> {
        (self.pages >> bit & 1 != 0).then(|| self.slots[bit as usize])
    }
}

/// Who uses a slot, and its neighbours in the list that it is in.
#[derive(Clone, Copy, Debug)]
struct Slot {
    chunk: u32,
    bit: u8,
    /// Sent again since it was stored: in the list `resent`, otherwise in `filled`.
    resent: bool,
    /// Value of `Shard::offered` when it was last stored.
    stamp: u64,
    before: u32,
    after: u32,
}

/// A doubly linked list through the slots, oldest first.
#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
}

impl List {
    const EMPTY: Self = Self { first: NONE, last: NONE };

    fn push(&mut self, slots: &mut [Slot], slot: u32) {
        slots[slot as usize].before = self.last;
        slots[slot as usize].after = NONE;
        match self.last {
            NONE => self.first = slot,
            last => slots[last as usize].after = slot,
        }
        self.last = slot;
    }

    fn unlink(&mut self, slots: &mut [Slot], slot: u32) {
        let Slot { before, after, .. } = slots[slot as usize];
        match before {
            NONE => self.first = after,
            before => slots[before as usize].after = after,
        }
        match after {
            NONE => self.last = before,
            after => slots[after as usize].before = before,
        }
    }
}

#[derive(Debug)]
struct Shard {
    chunks: HashMap<u32, ChunkSlots>,
    slots: Vec<Slot>,
    slabs: Vec<Box<[u8]>>,
    /// Slots in use by no page.
    free: Vec<u32>,
    filled: List,
    resent: List,
    /// Pages offered by passes after the first, as the clock by which entries age.
    offered: u64,
    /// Most slots.
    capacity: usize,
}

impl Shard {
    fn new(capacity: usize) -> Self {
        Self {
            chunks: HashMap::new(),
            slots: Vec::new(),
            slabs: Vec::new(),
            free: Vec::new(),
            filled: List::EMPTY,
            resent: List::EMPTY,
            offered: 0,
            capacity,
        }
    }

    fn content(&self, slot: u32) -> &Page {
        let (slab, at) = (slot as usize / SLAB_PAGES, slot as usize % SLAB_PAGES);
        &self.slabs[slab].as_chunks::<PAGE_SIZE>().0[at]
    }

    fn list(&mut self, resent: bool) -> (&mut List, &mut [Slot]) {
        (if resent { &mut self.resent } else { &mut self.filled }, &mut self.slots)
    }

    fn store(&mut self, chunk: u32, bit: u32, page: &Page, first_pass: bool) -> bool {
        self.offered += u64::from(!first_pass);
        let slot = match self.chunks.get(&chunk).and_then(|slots| slots.get(bit)) {
            Some(slot) => {
                let (list, slots) = self.list(self.slots[slot as usize].resent);
                list.unlink(slots, slot);
                slot
            }
            None => {
                let Some(slot) = self.room(first_pass) else { return false };
                let slots =
                    self.chunks.entry(chunk).or_insert(ChunkSlots { pages: 0, slots: [NONE; CHUNK_PAGES] });
                slots.pages |= 1 << bit;
                slots.slots[bit as usize] = slot;
                let entry = &mut self.slots[slot as usize];
                (entry.chunk, entry.bit, entry.resent) = (chunk, bit as u8, false);
                slot
            }
        };
        let entry = &mut self.slots[slot as usize];
        entry.stamp = self.offered;
        entry.resent |= !first_pass;
        let (list, slots) = self.list(self.slots[slot as usize].resent);
        list.push(slots, slot);
        let (slab, at) = (slot as usize / SLAB_PAGES, slot as usize % SLAB_PAGES);
        self.slabs[slab].as_chunks_mut::<PAGE_SIZE>().0[at] = *page;
        true
    }

    /// A slot that no page uses: a free one, a new one, or one whose page is worth less.
    fn room(&mut self, first_pass: bool) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.slots.len() < self.capacity {
            let slot = self.slots.len();
            if slot.is_multiple_of(SLAB_PAGES) {
                let pages = SLAB_PAGES.min(self.capacity - slot);
                self.slabs.push(vec![0; pages * PAGE_SIZE].into_boxed_slice());
                self.slots.reserve_exact(pages);
            }
            self.slots.push(Slot { chunk: 0, bit: 0, resent: false, stamp: 0, before: NONE, after: NONE });
            return Some(slot as u32);
        }
        if first_pass {
            return None;
        }
        let stale = |slot: &Slot| self.offered - slot.stamp > STALE_AFTER * self.capacity as u64;
        let victim = match (self.filled.first, self.resent.first) {
            (NONE, NONE) => return None,
            (NONE, oldest) => stale(&self.slots[oldest as usize]).then_some(oldest)?,
            (filled, _) => filled,
        };
        let Slot { chunk, bit, .. } = self.slots[victim as usize];
        self.remove(chunk, bit.into());
        self.free.pop()
    }

    /// Frees the slot of a page that has one.
    fn remove(&mut self, chunk: u32, bit: u32) {
        let Some(slots) = self.chunks.get_mut(&chunk) else { return };
        let Some(slot) = slots.get(bit) else { return };
        slots.pages &= !(1 << bit);
        if slots.pages == 0 {
            self.chunks.remove(&chunk);
        }
        let (list, slots) = self.list(self.slots[slot as usize].resent);
        list.unlink(slots, slot);
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(value: u32) -> Page {
        let mut page = [0; PAGE_SIZE];
        page[..4].copy_from_slice(&value.to_le_bytes());
        page
    }

    fn cache_of(pages: u64) -> PageCache {
        PageCache::new(pages * PAGE_COST)
    }

    #[test]
    fn holds_the_last_version() {
        let cache = cache_of(100);
        assert!(cache.chunk(1).store(5, &page(1), true));
        assert!(cache.chunk(1).store(5, &page(2), false));
        assert_eq!(cache.chunk(1).base(5), Some(&page(2)));
        assert_eq!(cache.chunk(1).base(6), None);
        assert_eq!(cache.chunk(2).base(5), None);
        cache.void(1, 1 << 5);
        assert_eq!(cache.chunk(1).base(5), None);
        assert_eq!(cache.pages(), 0);
    }

    #[test]
    fn no_bytes_hold_no_page() {
        let cache = PageCache::new(4096);
        assert!(!cache.chunk(0).store(0, &page(1), true));
        assert!(!cache.chunk(0).store(0, &page(1), false));
        assert_eq!((cache.pages(), cache.allocated_bytes()), (0, 0));
    }

    #[test]
    fn the_first_pass_never_evicts_and_later_ones_do() {
        let cache = cache_of(64);
        for bit in 0..64 {
            assert!(cache.chunk(0).store(bit, &page(bit), true));
        }
        assert!(!cache.chunk(1).store(0, &page(99), true));
        assert_eq!(cache.chunk(0).pages(), u64::MAX);
        // A page sent again takes the place of the oldest of those that were not.
        assert!(cache.chunk(0).store(0, &page(100), false));
        assert!(cache.chunk(1).store(0, &page(99), false));
        assert_eq!(cache.chunk(0).pages(), !0b10);
        assert_eq!(cache.chunk(0).base(0), Some(&page(100)));
    }

    #[test]
    fn writing_through_too_much_memory_keeps_what_fits() {
        let cache = cache_of(128);
        let mut hits = 0;
        for round in 0..10 {
            for chunk in 0..4 {
                for bit in 0..64 {
                    let mut entries = cache.chunk(chunk);
                    hits += u32::from(round > 0 && entries.base(bit).is_some());
                    entries.store(bit, &page(round), round == 0);
                }
            }
        }
        // Half of the memory fits; plain LRU would hit nothing at all.
        assert!(hits >= 9 * 100, "{hits}");
    }

    #[test]
    fn cold_entries_make_room() {
        let cache = cache_of(64);
        for bit in 0..64 {
            cache.chunk(0).store(bit, &page(0), false);
        }
        let mut stored = 0;
        for _ in 0..20 {
            for bit in 0..64 {
                stored = stored.max(u64::from(cache.chunk(7).store(bit, &page(1), false)));
            }
        }
        assert_eq!(stored, 1);
        assert_eq!(cache.chunk(7).pages(), u64::MAX);
        assert_eq!(cache.chunk(0).pages(), 0);
    }

    proptest! {
        /// Never holds anything but the last content, and never more than its bound.
        #[test]
        fn never_stale_never_over(
            capacity in 0u64..300,
            ops in prop::collection::vec((0u32..6, 0u32..64, 0u8..8), 0..600),
        ) {
            let cache = cache_of(capacity);
            let mut sent = HashMap::new();
            for (version, (chunk, bit, kind)) in ops.into_iter().enumerate() {
                let version = version as u32;
                let held = cache.chunk(chunk).base(bit).copied();
                if let Some(held) = held {
                    prop_assert_eq!(Some(&held), sent.get(&(chunk, bit)));
                }
                match kind {
                    0 => cache.void(chunk, 1 << bit | u64::from(version)),
                    _ => {
                        let stored = cache.chunk(chunk).store(bit, &page(version), kind < 3);
                        prop_assert_eq!(cache.chunk(chunk).base(bit).is_some(), stored);
                        sent.insert((chunk, bit), page(version));
                    }
                }
                prop_assert!(cache.pages() <= capacity);
                prop_assert!(cache.allocated_bytes() <= capacity * PAGE_COST);
            }
        }
    }
}
