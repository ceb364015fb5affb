//! Several migrations at a time, which share what their host has.

use std::time::Instant;

use super::*;
use crate::source::HostShare;
use crate::wire::frame::FrameHeader;

/// Bytes of a frame on the wire, at most.
const FRAME: u64 = (CHUNK_SIZE + FrameHeader::LEN) as u64;
/// What a bucket holds.
const BURST: Duration = Duration::from_millis(10);

/// Moves so many machines of a host at the same time, under a limit that it has. Returns what each sent, and for how long the limit held.
fn evacuate(host: &Arc<HostShare>, machines: usize, rate: u64) -> (Vec<u64>, Duration) {
    // Until all have begun.
    host.limit_bandwidth(Some(1));
    let options = Options { codec: CodecMode::Raw, shared: Some(host.clone()), ..options() };
    let progress: Vec<_> = (0..machines).map(|_| Progress::default()).collect();
    let moving = |progress| moving(Trouble::Nowhere, &options, progress);
    std::thread::scope(|scope| {
        let running: Vec<_> = progress.iter().map(|progress| scope.spawn(move || moving(progress))).collect();
        let begun = |progress: &Progress| progress.report().setup_ms > 0.0;
        while !progress.iter().all(begun) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let began = Instant::now();
        host.limit_bandwidth(Some(rate));
        for (moved, progress) in running.into_iter().zip(&progress) {
            let moved = moved.join().unwrap();
            let text = moved.result.err().map(|failure| crate::engine::explain(&failure));
            assert_eq!(text, None, "{:?}", progress.report());
            assert!(moved.destination.runs());
        }
        (progress.iter().map(|progress| progress.report().wire_bytes).collect(), began.elapsed())
    })
}

#[test]
fn migrations_of_a_host_keep_to_its_limit_together() {
    let (rate, machines) = (40_000_000, 2);
    let host = Arc::new(HostShare::new());
    let (sent, time) = evacuate(&host, machines, rate);
    let memory = 64 * CHUNK_SIZE as u64;
    assert!(sent.iter().all(|&sent| sent >= memory), "{sent:?}");
    // Each stream overdraws by a frame: before the limit was set, and with it. A paused guest does not wait, with its one page.
    let streams = machines as u64 * u64::from(options().streams);
    let most = (rate as f64 * (time + BURST).as_secs_f64()) as u64 + (2 * streams + machines as u64) * FRAME;
    let all: u64 = sent.iter().sum();
    assert!(all <= most, "{sent:?} in {time:?}: {all} bytes, at most {most}");
}
