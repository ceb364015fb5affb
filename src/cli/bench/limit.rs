//! What this machine itself can do, so that every figure has its limit beside it.
//!
//! Each rate is the best of a few tries with all cores, after one that warms up: the rate that nothing in between could beat,
//! not the one that a migration sees.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use crate::cli::words::explain;
use pageferry::pagecopy::backend::GuestRam;
use pageferry::pagecopy::layout::{CHUNK_SIZE, Layout};
use pageferry::pagecopy::zero::zero_pages;
use pageferry::transport::socket::{Connection, Listener};
use pageferry::transport::uri::Uri;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use serde::{Deserialize, Serialize};

use super::mix::in_parallel;

/// Bytes that each try handles: far more than any cache holds.
const BYTES: usize = 128 << 20;
/// Tries that count.
const TRIES: u32 = 3;
/// Bytes of a call to the kernel, from and to buffers that stay in cache.
const CALL_BYTES: usize = 512 << 10;
/// Silence after which a loopback connection is given up.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Rates of the machine, in 10^9 bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Limits {
    /// Copying memory, bytes copied.
    pub memcpy_gb_s: f64,
    /// The streams' kind of socket, with warm buffers and no work beside; the best of 1, 2 and 4 connections.
    pub socket_gb_s: f64,
    /// Connections that it took.
    pub socket_connections: usize,
    /// Telling that pages are zero.
    pub zero_scan_gb_s: f64,
    /// Fresh pages of a memfd.
    pub fault_memfd_gb_s: f64,
    /// Fresh anonymous pages of 4 KiB.
    pub fault_anon_4k_gb_s: f64,
    /// Fresh anonymous memory with huge pages.
    pub fault_anon_huge_gb_s: f64,
}

impl Limits {
    /// Measures the machine; `uri` is where to listen for the socket's rate.
    pub(super) fn measure(uri: &Uri) -> Result<Self, String> {
        let rates = [1, 2, 4].map(|n| sockets(uri, n).map(|rate| (rate, n)));
        let mut best = (0.0, 0);
        for rate in rates {
            let rate = rate.map_err(|e| format!("the socket's limit could not be measured: {e}"))?;
            best = if rate.0 > best.0 { rate } else { best };
        }
        let round = |value: f64| (value * 100.0).round() / 100.0;
        Ok(Self {
            memcpy_gb_s: round(memcpy()),
            socket_gb_s: round(best.0),
            socket_connections: best.1,
            zero_scan_gb_s: round(zero_scan()),
            fault_memfd_gb_s: round(faults(&Backing::Memfd)?),
            fault_anon_4k_gb_s: round(faults(&Backing::Anonymous { huge: false })?),
            fault_anon_huge_gb_s: round(faults(&Backing::Anonymous { huge: true })?),
        })
    }

    /// The limits, in a line each.
    pub(super) fn text(&self, transport: &str) -> String {
        let lines = [
            ("memcpy".into(), self.memcpy_gb_s, ""),
            (format!("{transport}, {} connections", self.socket_connections), self.socket_gb_s, ""),
            ("zero scan".into(), self.zero_scan_gb_s, ""),
            ("page faults, memfd".into(), self.fault_memfd_gb_s, " of 4 KiB pages"),
            ("page faults, anon4k".into(), self.fault_anon_4k_gb_s, " of 4 KiB pages"),
            ("page faults, anon".into(), self.fault_anon_huge_gb_s, " of huge pages"),
        ];
        let lines = lines.map(|(name, rate, of)| format!("  {name:<22}{rate:>7.2} GB/s{of}\n"));
        format!("limits of this machine, all cores:\n{}", lines.concat())
    }
}

/// The best rate, in 10^9 bytes a second, at which `work` handles [`BYTES`]; it tells how long it took.
fn best(mut work: impl FnMut() -> io::Result<Duration>) -> io::Result<f64> {
    work()?;
    let mut least = Duration::MAX;
    for _ in 0..TRIES {
        least = least.min(work()?);
    }
    Ok(BYTES as f64 / least.as_nanos().max(1) as f64)
}

/// How long it takes all cores to do `work` for every chunk of [`BYTES`].
fn timed(work: impl Fn(usize) + Sync) -> Duration {
    let began = Instant::now();
    in_parallel((BYTES / CHUNK_SIZE) as u64, |chunk, _| work(chunk as usize));
    began.elapsed()
}

fn memcpy() -> f64 {
    let from = vec![1u8; BYTES];
    let to: Vec<_> = (0..BYTES / CHUNK_SIZE).map(|_| std::sync::Mutex::new(vec![2u8; CHUNK_SIZE])).collect();
    let copy = |chunk: usize| {
        let mut to = to[chunk].lock().unwrap_or_else(|e| e.into_inner());
        to.copy_from_slice(&from[chunk * CHUNK_SIZE..][..CHUNK_SIZE]);
        std::hint::black_box(&mut *to);
    };
    best(|| Ok(timed(copy))).unwrap_or_default()
}

fn zero_scan() -> f64 {
    // Written, or all of it would be the kernel's one page of zeros.
    let mut memory = vec![1u8; BYTES];
    std::hint::black_box(&mut memory).fill(0);
    let scan = |chunk: usize| {
        let pages = zero_pages(&memory[chunk * CHUNK_SIZE..][..CHUNK_SIZE], u64::MAX);
        assert_eq!(pages, u64::MAX, "the memory is all zeros");
    };
    best(|| Ok(timed(scan))).unwrap_or_default()
}

/// The rate at which fresh memory is faulted in.
fn faults(backing: &Backing) -> Result<f64, String> {
    let fresh = || {
        let layout = Layout::flat(BYTES as u64).map_err(io::Error::other)?;
        let ram = GuestMemory::create(layout, backing).map_err(io::Error::other)?;
        // By as many chunks as a huge page has.
        const CHUNKS: usize = (2 << 20) / CHUNK_SIZE;
        let failed = std::sync::Mutex::new(None);
        let took = timed(|chunk| {
            if chunk % CHUNKS == 0
                && let Err(e) = ram.populate(chunk as u32, CHUNKS as u32)
            {
                *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(e);
            }
        });
        let failed = failed.into_inner().unwrap_or_else(|e| e.into_inner());
        failed.map_or(Ok(took), |e| Err(io::Error::other(e)))
    };
    best(fresh).map_err(|e| format!("the page faults' limit could not be measured: {}", explain(&e)))
}

/// The rate at which so many connections carry bytes between warm buffers, tuned as streams are.
fn sockets(uri: &Uri, connections: usize) -> io::Result<f64> {
    let listener = Listener::bind(uri).map_err(io::Error::other)?;
    let mut pairs = Vec::new();
    for _ in 0..connections {
        let out = Connection::connect(&listener.uri(), TIMEOUT, &|| false).map_err(io::Error::other)?;
        let into = listener.accept()?;
        for end in [&out, &into] {
            end.tune(TIMEOUT)?;
            end.set_timeouts(Some(TIMEOUT), Some(TIMEOUT))?;
        }
        pairs.push((out, into));
    }
    let each = BYTES / connections;
    let mut buffers = vec![(vec![1u8; CALL_BYTES], vec![2u8; CALL_BYTES]); connections];
    best(|| {
        let began = Instant::now();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for ((out, into), (from, to)) in pairs.iter().zip(&mut buffers) {
                let from = &*from;
                threads.push(scope.spawn(move || {
                    let mut out = out;
                    (0..each / CALL_BYTES).try_for_each(|_| out.write_all(from))
                }));
                threads.push(scope.spawn(move || {
                    let mut into = into;
                    let mut left = each / CALL_BYTES * CALL_BYTES;
                    while left != 0 {
                        match into.read(&mut to[..left.min(CALL_BYTES)])? {
                            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                            got => left -= got,
                        }
                    }
                    Ok(())
                }));
            }
            threads.into_iter().try_for_each(|thread| thread.join().expect("a copying thread does not panic"))
        })?;
        Ok(began.elapsed())
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Of no machine.
    pub(in crate::cli::bench) const LIMITS: Limits = Limits {
        memcpy_gb_s: 10.0,
        socket_gb_s: 5.0,
        socket_connections: 2,
        zero_scan_gb_s: 20.0,
        fault_memfd_gb_s: 2.0,
        fault_anon_4k_gb_s: 3.0,
        fault_anon_huge_gb_s: 10.0,
    };

    #[test]
    fn limits_are_told_in_a_line_each() {
        let text = LIMITS.text("tcp");
        assert!(text.contains("tcp, 2 connections") && text.contains("5.00 GB/s"), "{text}");
    }

    #[test]
    fn the_socket_carries_all_bytes() {
        let rate = sockets(&"tcp:127.0.0.1:0".parse().unwrap(), 2).unwrap();
        assert!(rate > 0.01 && rate.is_finite(), "{rate}");
    }
}
