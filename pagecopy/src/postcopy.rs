//! Postcopy: in which order pages follow a guest that runs at the destination already, and how long it waited for them.
//!
//! A guest that touches a page that is not there asks for it, and that page goes at once, by itself. What it asked for says
//! where it works, so everything else goes in the order of [`Order`]: on from its last faults, and where those say nothing,
//! from the start to the end. Pure: pages that wait are the caller's bitmap, time comes in as numbers.

use std::collections::VecDeque;

use crate::bitmap::PageBitmap;

/// Chunks that are sent on from a fault before older faults, and then the rest, have their turn (8 MiB).
const AHEAD_CHUNKS: u32 = 32;
/// A fault this near to the last one of a place, in chunks, is the guest going on from there.
const NEAR_CHUNKS: u32 = 16;
/// Places that are remembered: about what the vCPUs of a guest work at.
const PLACES_MAX: usize = 8;

/// A place where the guest works.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Chunk of its last fault.
    at: u32,
    /// Chunk to send next.
    next: u32,
    /// Chunks to look at before this place has had its turn.
    left: u32,
    /// The guest goes towards lower addresses.
    down: bool,
}

/// Decides which chunk is sent next.
///
/// It only proposes: whoever sends takes the pages from the bitmap of those that wait, which decides alone who sends what.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// The place of the last fault first.
    places: VecDeque<Place>,
    /// Where the pass over everything stands.
    sweep: u32,
}

impl Order {
    /// An order for a guest that has not asked for anything.
    pub fn new() -> Self {
        Self::default()
    }

    /// The guest asked for a page of this chunk.
    pub fn fault(&mut self, chunk: u32) {
        let near = self.places.iter().position(|place| place.at.abs_diff(chunk) <= NEAR_CHUNKS);
        let down = match near.and_then(|i| self.places.remove(i)) {
            // Another page of the same chunk says nothing new about the way.
            Some(place) if place.at == chunk => place.down,
            Some(place) => chunk < place.at,
            None => false,
        };
        self.places.truncate(PLACES_MAX - 1);
        self.places.push_front(Place { at: chunk, next: chunk, left: AHEAD_CHUNKS, down });
    }

    /// The chunk to send next: one that has pages in `pending`, or `None` when nothing waits. The same one is proposed again as
    /// long as it has some.
    pub fn next(&mut self, pending: &PageBitmap) -> Option<u32> {
        while let Some(place) = self.places.front_mut() {
            while place.left > 0 {
                if pending.get(place.next) != 0 {
                    return Some(place.next);
                }
                place.left -= 1;
                let next = if place.down { place.next.checked_sub(1) } else { place.next.checked_add(1) };
                match next.filter(|&next| next < pending.chunks()) {
                    Some(next) => place.next = next,
                    None => place.left = 0,
                }
            }
            self.places.pop_front();
        }
        let chunk = pending.next_chunk(self.sweep).or_else(|| pending.next_chunk(0))?;
        self.sweep = chunk;
        Some(chunk)
    }
}

/// Buckets for each doubling of a time: quantiles are exact to an eighth.
const STEPS: usize = 8;

/// How long things took: counts by time, in microseconds, from which quantiles are read.
#[derive(Clone, Debug)]
pub struct Latencies {
    counts: [u64; 64 * STEPS],
    count: u64,
    max: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: [0; 64 * STEPS], count: 0, max: 0 }
    }
}

impl Latencies {
    /// Takes note of one.
    pub fn record(&mut self, us: u64) {
        self.counts[bucket(us)] += 1;
        self.count += 1;
        self.max = self.max.max(us);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest, in microseconds.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The time that `percent` of them did not exceed, in microseconds, rounded up by at most an eighth; 0 where there are none.
    pub fn quantile(&self, percent: f64) -> u64 {
        let rank = (self.count as f64 * percent / 100.0).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return bucket_end(index).min(self.max);
            }
        }
        0
    }
}

/// Times below `STEPS` have a bucket each; of those above, `STEPS` share a power of two.
fn bucket(us: u64) -> usize {
    let shift = (us.max(1).ilog2() + 1).saturating_sub(STEPS.ilog2() + 1);
    shift as usize * STEPS + (us >> shift) as usize
}

/// The largest time of a bucket.
fn bucket_end(index: usize) -> u64 {
    if index < 2 * STEPS {
        return index as u64;
    }
    let shift = index / STEPS - 1;
    let step = (index - shift * STEPS) as u128;
    u64::try_from(((step + 1) << shift) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(chunks: u32) -> PageBitmap {
        let pending = PageBitmap::new(chunks);
        (0..chunks).for_each(|chunk| {
            pending.insert(chunk, u64::MAX);
        });
        pending
    }

    fn take(order: &mut Order, pending: &PageBitmap, count: usize) -> Vec<u32> {
        (0..count)
            .map_while(|_| {
                let chunk = order.next(pending)?;
                pending.take(chunk);
                Some(chunk)
            })
            .collect()
    }

    #[test]
    fn without_faults_from_start_to_end() {
        let pending = all(5);
        assert_eq!(take(&mut Order::new(), &pending, 9), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn on_from_the_last_fault_then_from_older_ones_then_the_rest() {
        let (mut order, pending) = (Order::new(), all(1000));
        assert_eq!(take(&mut order, &pending, 2), [0, 1]);
        order.fault(500);
        order.fault(700);
        let ahead = AHEAD_CHUNKS;
        let expected: Vec<u32> = (700..700 + ahead).chain(500..500 + ahead).chain(2..6).collect();
        assert_eq!(take(&mut order, &pending, expected.len()), expected);
    }

    #[test]
    fn follows_a_guest_that_goes_down() {
        let (mut order, pending) = (Order::new(), all(1000));
        order.fault(500);
        assert_eq!(take(&mut order, &pending, 2), [500, 501]);
        order.fault(499);
        order.fault(499);
        assert_eq!(take(&mut order, &pending, 4), [499, 498, 497, 496]);
        order.fault(2);
        order.fault(1);
        // 2 was not taken yet when the guest went on to 1; the rest brings it.
        assert_eq!(take(&mut order, &pending, 4), [1, 0, 495, 494]);
    }

    #[test]
    fn a_chunk_that_got_pages_back_is_proposed_again() {
        let (mut order, pending) = (Order::new(), all(3));
        assert_eq!(take(&mut order, &pending, 5), [0, 1, 2]);
        pending.insert(1, 1);
        assert_eq!(order.next(&pending), Some(1));
        assert_eq!(order.next(&pending), Some(1));
    }

    proptest! {
        #[test]
        fn everything_is_proposed_and_it_ends(
            chunks in 1u32..300,
            words in proptest::collection::vec(any::<u64>(), 1..50),
            faults in proptest::collection::vec(0u32..300, 0..100),
        ) {
            let (mut order, pending) = (Order::new(), PageBitmap::new(chunks));
            for (i, &word) in words.iter().enumerate() {
                pending.insert((i as u32 * 7) % chunks, word);
            }
            let mut faults = faults.into_iter().map(|chunk| chunk % chunks);
            let mut steps = 0;
            while let Some(chunk) = order.next(&pending) {
                prop_assert!(pending.take(chunk) != 0);
                steps += 1;
                prop_assert!(steps <= words.len());
                if let Some(fault) = faults.next() {
                    order.fault(fault);
                }
            }
            prop_assert!(pending.is_empty());
        }

        #[test]
        fn quantiles_are_exact_to_an_eighth(mut times in proptest::collection::vec(any::<u64>(), 1..200)) {
            let mut latencies = Latencies::default();
            times.iter().for_each(|&us| latencies.record(us));
            times.sort_unstable();
            for percent in [0.0, 50.0, 99.0, 100.0] {
                let rank = ((times.len() as f64 * percent / 100.0).ceil() as usize).max(1);
                let (exact, found) = (times[rank - 1], latencies.quantile(percent));
                prop_assert!(found >= exact && found - exact <= exact / 8, "{percent}: {exact} {found}");
            }
        }
    }

    #[test]
    fn nothing_took_no_time() {
        assert_eq!(Latencies::default().quantile(50.0), 0);
    }
}
