//! The choice, observation by observation. Whole migrations are played by `peers choose`.

use super::ladder::Ladder;
use super::*;
use crate::layout::CHUNK_SIZE;

const BYTES: u64 = CHUNK_SIZE as u64;
const MS: u64 = 1_000_000;
/// As much ahead as is wanted, in nanoseconds.
const WANTED: u64 = 10 * MS;

fn chooser(mode: CodecMode) -> Chooser {
    Chooser::new(Arc::new(Effort::new(mode)))
}

/// A stream whose chunks cost and become what is assumed of their steps.
struct Stream {
    chooser: Chooser,
    now: u64,
    chunk: u32,
    /// Chunks become smaller.
    shrinks: bool,
}

impl Stream {
    fn new(chooser: Chooser) -> Self {
        Self { chooser, now: 0, chunk: 0, shrinks: true }
    }

    /// Sends a chunk with so much ahead; returns how.
    fn send(&mut self, ahead_nanos: u64) -> Plan {
        let plan = self.chooser.plan(self.chunk, ahead_nanos);
        self.chunk += 1;
        let scan = Took::ran(0, BYTES / 10);
        self.chooser.observe_encode(EncodeKind::Scan, BYTES, BYTES, scan);
        let step = plan.zstd_level.filter(|_| {
            matches!(self.chooser.effort.mode(), CodecMode::Auto | CodecMode::Zstd { level: None })
        });
        if let Some(level) = step {
            let kind = EncodeKind::Zstd { level, references: plan.references };
            let at = index_of(level, plan.references).expect("it is a step");
            let Average { nanos, out } = Ladder::new(true).estimate(at);
            let out = if self.shrinks { out } else { 1.0 };
            let [took, made] = [nanos, out].map(|part| (part * BYTES as f64) as u64);
            self.chooser.observe_encode(kind, BYTES, made, Took::ran(0, took));
        }
        self.now += MS;
        self.chooser.observe_sent(self.now, MS, || None);
        plan
    }

    /// Of so many chunks, those that were compressed.
    fn compressed(&mut self, chunks: u32, ahead_nanos: u64) -> u32 {
        (0..chunks).map(|_| u32::from(self.send(ahead_nanos).zstd_level.is_some())).sum()
    }
}

/// A thread of the destination that is busy for so many percent of 10 ms.
fn load(percent: u64) -> Load {
    Load { passed_nanos: 10 * MS, worked_nanos: percent * MS / 20, ready_nanos: percent * MS / 20 }
}

#[test]
fn what_waits_to_arrive_decides_how_hard() {
    let stream = || Stream::new(chooser(CodecMode::Auto));
    assert_eq!(stream().compressed(100, 0), 0, "nothing waits");
    assert_eq!(stream().compressed(100, WANTED), 100);
    let some = stream().compressed(100, WANTED / 4);
    assert!((1..50).contains(&some), "{some}: a little waits");
    // The longer more waits than is wanted, the harder.
    let mut stream = stream();
    let light = stream.send(WANTED).zstd_level.unwrap();
    stream.compressed(200, 10 * WANTED);
    let hard = stream.send(WANTED).zstd_level.unwrap();
    assert!(hard > light, "{hard} after {light}");
    // And no longer once nothing waits, without a moment's delay; nor when something does after a long time.
    assert_eq!(stream.send(0).zstd_level, None);
    stream.compressed(2000, 0);
    assert!(stream.compressed(100, WANTED) < 20);
    // A link that has become slow is soon compressed for as before.
    stream.compressed(200, 2 * WANTED);
    assert_eq!(stream.send(WANTED).zstd_level, Some(hard));
}

#[test]
fn a_destination_that_does_not_wait_gets_pages_as_they_are() {
    let mut stream = Stream::new(chooser(CodecMode::Auto));
    let effort = stream.chooser.effort().clone();
    let mut compressed = |percent: u64| {
        (0..200).fold(0, |sum, _| {
            effort.observe_destination(load(percent));
            sum + stream.compressed(1, 2 * WANTED)
        })
    };
    assert_eq!(compressed(10), 200, "the link is what limits");
    assert!(compressed(99) < 100, "it decompresses, or has no core, or brings memory in");
    assert!(compressed(100) < 10);
    compressed(10);
    assert_eq!(compressed(10), 200, "it waits again");
}

/// Frames that wait for a core do not wait for the link.
#[test]
fn what_waits_for_cores_counts_less() {
    let level = |ready: u64| {
        let mut stream = Stream::new(chooser(CodecMode::Auto));
        let effort = stream.chooser.effort().clone();
        for _ in 0..10 {
            let load = Load { passed_nanos: 10 * MS, worked_nanos: MS, ready_nanos: ready * MS };
            effort.observe_destination(load);
            stream.compressed(10, WANTED);
        }
        stream.compressed(100, WANTED)
    };
    assert_eq!(level(0), 100);
    assert!(level(8) < 90, "{}", level(8));
}

/// They share the link: what one alone has ahead says little of it. One that is silent says nothing.
#[test]
fn streams_of_a_session_choose_together() {
    let effort = Arc::new(Effort::new(CodecMode::Auto));
    let mut streams = [(); 4].map(|()| Stream::new(Chooser::new(effort.clone())));
    for _ in 0..20 {
        for stream in &mut streams[1..] {
            stream.send(WANTED);
        }
    }
    let share =
        |streams: &mut [Stream; 4]| streams[1].compressed(100, WANTED) + streams[0].compressed(100, 0);
    // All four, three of which have as much as is wanted ahead.
    let levels: Vec<_> = streams.iter_mut().map(|stream| stream.send(WANTED).zstd_level.is_some()).collect();
    assert_eq!(levels, [true; 4]);
    let alone = share(&mut streams);
    assert!((100..200).contains(&alone), "{alone} of two hundred chunks: half of what waits");
}

/// Memory that looks as if it shrank, and does not; and then other memory.
#[test]
fn what_did_not_shrink_is_tried_again() {
    let mut stream = Stream::new(chooser(CodecMode::Auto));
    stream.shrinks = false;
    stream.compressed(1000, 2 * WANTED);
    let vain = stream.compressed(1000, 2 * WANTED);
    assert!((1..100).contains(&vain), "{vain} of a thousand chunks");
    stream.shrinks = true;
    stream.compressed(1000, 2 * WANTED);
    assert_eq!(stream.compressed(100, 2 * WANTED), 100);
    // Where nothing waits nothing is tried.
    stream.shrinks = false;
    stream.compressed(1000, 2 * WANTED);
    assert_eq!(stream.compressed(1000, 0), 0);
}

/// A stream that is slow still counts, and one that has nothing to send does not.
#[test]
fn streams_that_are_silent_say_nothing() {
    // What the session is pressed by, so many windows after the other stream had nothing ahead.
    let pressure = |windows: u32| {
        let effort = Arc::new(Effort::new(CodecMode::Auto));
        let [mut sends, mut other] = [(); 2].map(|()| Stream::new(Chooser::new(effort.clone())));
        other.send(0);
        sends.compressed(12 * windows, WANTED);
        effort.pressure(sends.chooser.stream, WANTED)
    };
    assert_eq!((pressure(0), pressure(3), pressure(40)), (0.5, 0.5, 1.0));
}

/// A stream that is opened again and again takes one place among the session's streams.
#[test]
fn streams_that_ended_say_nothing() {
    let effort = Arc::new(Effort::new(CodecMode::Auto));
    let mut stays = Stream::new(Chooser::new(effort.clone()));
    for _ in 0..100 {
        Stream::new(Chooser::new(effort.clone())).send(0);
    }
    assert_eq!(effort.lock().streams(), 2);
    assert!(stays.send(WANTED).zstd_level.is_some(), "those that have nothing ahead are gone");
}

#[test]
fn other_steps_are_tried_where_chunks_are_compressed() {
    let probed = |references: bool, ahead: u64| {
        let mut chooser = chooser(CodecMode::Auto);
        chooser.refer(references);
        let mut stream = Stream::new(chooser);
        let plans: Vec<Plan> = (0..2000).map(|_| stream.send(ahead)).collect();
        assert!(plans.iter().all(|plan| references || !plan.references));
        plans.iter().filter_map(|plan| plan.probe).collect::<std::collections::BTreeSet<_>>()
    };
    assert!(probed(true, 0).is_empty());
    let alone = probed(false, WANTED);
    assert!(alone.len() >= 3 && alone.iter().all(|(_, references)| !references), "{alone:?}");
    // With references only beside a step that has them, for they are found among pages that were sent with them.
    let mut chooser = chooser(CodecMode::Auto);
    chooser.refer(true);
    let mut stream = Stream::new(chooser);
    for _ in 0..5000 {
        let plan = stream.send(2 * WANTED);
        assert!(plan.references || plan.probe.is_none_or(|(_, references)| !references));
    }
}

#[test]
fn nothing_is_kept_of_what_is_sent_once() {
    for mode in [CodecMode::Auto, CodecMode::Delta] {
        let mut chooser = chooser(mode).each_once();
        let plans: Vec<Plan> = (0..200).map(|chunk| chooser.plan(chunk, 0)).collect();
        assert!(plans.iter().all(|plan| !plan.delta && !plan.fill));
        assert!(plans.iter().any(|plan| plan.in_place(true)));
    }
}

#[test]
fn deltas_stay_only_while_they_pay() {
    let run = |passed: u64, delta_nanos: u64, out: u64| {
        let mut chooser = chooser(CodecMode::Auto);
        for chunk in 0..400 {
            if chooser.plan(chunk, 0).delta {
                let took = Took::ran(0, BYTES * delta_nanos / 100);
                chooser.observe_encode(EncodeKind::Delta { chunk }, BYTES, BYTES * out / 100, took);
            }
            chooser.observe_encode(EncodeKind::Scan, BYTES, BYTES, Took::default());
            let passed = BYTES * passed / 100;
            chooser.observe_sent(u64::from(chunk + 1) * passed, passed, || None);
        }
        (0..200).filter(|&chunk| chooser.plan(chunk, 0).delta).count()
    };
    // A thread has a byte for 0.35 ns, of which the delta takes 0.1: it pays when it saves most, not when it saves 10 %.
    assert_eq!(run(35, 10, 5), 200);
    let sampled = run(35, 10, 90);
    assert!((1..40).contains(&sampled), "{sampled}");
    // On 1 Gbit/s even 10 % pay.
    assert_eq!(run(800, 10, 90), 200);
}

#[test]
fn pinned_modes_stay_pinned() {
    for (mode, delta, level) in [
        (CodecMode::Raw, false, None),
        (CodecMode::Delta, true, None),
        (CodecMode::Zstd { level: Some(9) }, false, Some(9)),
    ] {
        let mut stream = Stream::new(chooser(mode));
        for chunk in 0..300 {
            let plan = stream.send(chunk % 3 * WANTED);
            assert_eq!((plan.delta, plan.zstd_level, plan.probe), (delta, level, None));
        }
    }
    let mut stream = Stream::new(chooser(CodecMode::Zstd { level: None }));
    assert_eq!(stream.compressed(100, 0), 100, "as the user wants it");
    for (level, references) in [(1, false), (2, true), (19, true)] {
        let mut pinned = chooser(CodecMode::Zstd { level: Some(level) });
        assert!(!pinned.plan(0, 0).references);
        pinned.refer(true);
        assert_eq!(pinned.plan(0, 0).references, references);
    }
}

#[test]
fn names_round_trip() {
    for name in ["auto", "raw", "delta", "zstd", "zstd:-7", "zstd:19"] {
        assert_eq!(name.parse::<CodecMode>().unwrap().to_string(), name);
    }
    assert!(matches!("lz4".parse::<CodecMode>(), Err(CodecModeError::Unknown { .. })));
    assert!(matches!("raw:1".parse::<CodecMode>(), Err(CodecModeError::Unknown { .. })));
    for level in ["zstd:", "zstd:99", "zstd:x"] {
        assert!(matches!(level.parse::<CodecMode>(), Err(CodecModeError::Level { .. })));
    }
}

#[test]
fn survives_any_observation() {
    let mut chooser = chooser(CodecMode::Auto);
    for (a, b) in [(0, 0), (0, u64::MAX), (u64::MAX, 0), (u64::MAX, u64::MAX), (1, 1)] {
        chooser.observe_encode(EncodeKind::Scan, a, b, Took::ran(0, b));
        chooser.observe_encode(EncodeKind::Zstd { level: 1, references: false }, a, b, Took::ran(0, b));
        chooser.observe_encode(EncodeKind::Delta { chunk: 0 }, a, b, Took::ran(b, a));
        chooser.effort().observe_destination(Load { passed_nanos: a, worked_nanos: b, ready_nanos: b });
        chooser.observe_sent(a, b, || Some(Busy { worked_nanos: b, ready_nanos: a }));
        let plan = chooser.plan(0, b);
        assert!((PAGE_SIZE / 8..=DELTA_BYTES_MAX).contains(&plan.delta_bytes_max));
        assert!(chooser.decision.budget.is_finite());
    }
}

/// What a step costs is what its thread ran, however long others had the core meanwhile.
#[test]
fn a_chunk_that_was_made_to_wait_is_no_dearer() {
    let estimate = |waited: u64| {
        let mut chooser = chooser(CodecMode::Auto);
        for _ in 0..100 {
            let took = Took { nanos: 3 * BYTES + waited, worked_nanos: 3 * BYTES };
            let kind = EncodeKind::Zstd { level: 1, references: false };
            chooser.observe_encode(kind, BYTES, BYTES / 3, took);
        }
        chooser.effort().lock().ladder.estimate(index_of(1, false).unwrap()).nanos
    };
    assert!((2.9..3.1).contains(&estimate(0)), "{}", estimate(0));
    assert_eq!(estimate(0), estimate(10 * MS));
}
