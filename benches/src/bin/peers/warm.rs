//! Memory that the host has lately given us, kept for the contenders.
//!
//! Where this machine is itself a guest, memory that it frees goes back to the host within seconds (free page reporting), and takes
//! up to 20 times as long to fault in when it is needed again. A transfer would then measure the host, and whoever runs first
//! would pay for the others. So a reservoir is held here, and given to the kernel bit by bit as a contender takes memory: what it
//! gets was touched a moment ago. The reservoir is filled again as soon as the run has freed its memory.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use memmap2::{Advice, MmapMut, MmapOptions};

/// What the reservoir gives at a time, in bytes.
const PIECE: u64 = 16 << 20;
/// Freed memory that waits for whoever takes it. The less, the less of it the host takes first.
const AHEAD: u64 = 64 << 20;
/// How often it is looked how much is left of that. A machine that zeroes 10 GB/s takes a third of it meanwhile.
const TICK: Duration = Duration::from_millis(2);

/// Warm memory.
#[derive(Debug, Default)]
pub(crate) struct Reservoir {
    pieces: Vec<MmapMut>,
}

impl Reservoir {
    /// Fills it up to `bytes`, but takes no more than half of what can be had.
    pub(crate) fn fill(&mut self, bytes: u64) {
        let held = self.pieces.len() as u64 * PIECE;
        let bytes = bytes.min((available_bytes() + held) / 2);
        while (self.pieces.len() as u64) * PIECE < bytes {
            let Ok(piece) = MmapOptions::new().len(PIECE as usize).map_anon() else { return };
            // Small pages do as well, and take a little longer.
            let _ = piece.advise(Advice::HugePage);
            if piece.advise(Advice::PopulateWrite).is_err() {
                return;
            }
            self.pieces.push(piece);
        }
    }

    /// Gives memory away, as much as others take, until the returned [`Flow`] is dropped.
    pub(crate) fn flow(&mut self) -> Flow {
        self.flow_up_to(free_bytes() + AHEAD)
    }

    /// Gives memory away whenever less than `enough` is free.
    fn flow_up_to(&mut self, enough: u64) -> Flow {
        let mut pieces = std::mem::take(&mut self.pieces);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let feed = move || {
            loop {
                while free_bytes() < enough && pieces.pop().is_some() {}
                if stopped.load(Ordering::Relaxed) {
                    return pieces;
                }
                std::thread::sleep(TICK);
            }
        };
        Flow { stop, thread: Some(std::thread::spawn(feed)) }
    }

    /// Takes back what a flow did not give away.
    pub(crate) fn end(&mut self, flow: Flow) {
        self.pieces = flow.end();
    }
}

/// A reservoir that gives.
#[derive(Debug)]
pub(crate) struct Flow {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<MmapMut>>>,
}

impl Flow {
    fn end(mut self) -> Vec<MmapMut> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Memory that can be had, in bytes.
pub(crate) fn available_bytes() -> u64 {
    meminfo("MemAvailable:")
}

fn free_bytes() -> u64 {
    meminfo("MemFree:")
}

/// A figure of the kernel's, in bytes; 0 if there is none.
fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservoir_gives_what_is_taken() {
        let mut reservoir = Reservoir::default();
        reservoir.fill(4 * PIECE);
        assert_eq!(reservoir.pieces.len(), 4);
        let flow = reservoir.flow_up_to(0);
        std::thread::sleep(2 * TICK);
        reservoir.end(flow);
        assert_eq!(reservoir.pieces.len(), 4);
        let flow = reservoir.flow_up_to(u64::MAX);
        reservoir.end(flow);
        assert_eq!(reservoir.pieces.len(), 0);
        reservoir.fill(2 * PIECE);
        assert_eq!(reservoir.pieces.len(), 2);
    }
}
